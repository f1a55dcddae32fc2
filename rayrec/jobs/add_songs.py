"""The songs stage: estimates vectors of songs that the network has not learned.

The estimates come from artist, album, content and first plays.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, fit_range, load_split
from rayrec.display import progress
from rayrec.importing.descriptions import add_described_songs
from rayrec.importing.staging import finish_publishing
from rayrec.jobs.forget import erase_forgotten
from rayrec.model.added_songs import AddedSongs, FirstPlays, songs_without_vector
from rayrec.model.checkpoint import INPUT_VECTORS
from rayrec.model.train_config import SONG_VECTORS
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "added_songs"


@writes("songs add")
def add_songs(workspace: Workspace, *, model_id: str | None = None, repeat: bool = False) -> Manifest:
    """Estimate an embedding for every song of the catalog without plays in training.

    The estimate uses the song's artist, album and content, and the songs played around its plays since the training.
    Described songs that are not in the catalog yet are added to it. The network and the index stay unchanged, so the
    size of the artifact depends on the added songs only. The map from content to vectors is learned once per model.

    Metrics: seconds; new_songs, songs added to the catalog; songs, songs with an estimated vector; with_content,
    those of them with content; with_plays, those of them played since the training; rows_read, songs of the same
    artists and albums whose vectors were read; map_explained, the share of the squared distance from the mean vector
    that the map explains on held-out songs; map_penalty, the chosen penalty of squared weights; map_strengths, the
    numbers of songs that the priors of artist and album count as.

    Raises `NotFoundError` if there is no model, `MismatchError` if this data set does not descend from the model's.
    """
    finish_publishing(workspace)
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    model = dataset.model(model_id)
    started = time.monotonic()
    new_songs = add_described_songs(dataset)
    descriptions = dataset.descriptions()
    inputs = {"dataset": dataset.manifest.id, "models": model.id}
    if descriptions:
        inputs["descriptions"] = descriptions[-1].id
    earlier_songs = artifacts.latest(workspace, KIND, lambda candidate: candidate.inputs["models"] == model.id)
    fingerprint_id = artifacts.fingerprint(KIND, {}, inputs)
    added_id, complete = artifacts.new_id(workspace, KIND, fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, added_id)
    with progress("Added songs"):
        split = load_split(workspace, model.inputs["split"]) if "split" in model.inputs else None
        songs = added_since(dataset, model, fit_range(split), earlier_songs)
    manifest = Manifest(kind=KIND, id=added_id, inputs=inputs)
    checksums = songs.save(workspace, manifest.folder)
    content = dataset.content()
    metrics = {
        "seconds": round(time.monotonic() - started, 1),
        "new_songs": new_songs,
        "songs": len(songs),
        "with_content": int((content.places[songs.rows] >= 0).sum()),
        "with_plays": songs.played,
        "rows_read": songs.rows_read,
        "map_explained": round(songs.output_map.explained, 4),
        "map_penalty": songs.output_map.penalty,
        "map_strengths": songs.output_map.strengths.tolist(),
    }
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), checksums, checksums)


def added_since(dataset: Dataset, model: Manifest, allowed: FitRange, earlier_songs: Manifest | None) -> AddedSongs:
    """Return the songs to add to a model, estimated with the plays since its training that `allowed` permits.

    `earlier_songs` is the artifact of the songs that were added to the model before, or None.
    """
    return added_to(
        dataset,
        model.folder,
        plays=_plays_since(dataset, model, allowed),
        earlier=None if earlier_songs is None else AddedSongs.load(dataset.workspace, earlier_songs.folder),
        earlier_num_songs=0 if earlier_songs is None else dataset.earlier(earlier_songs.inputs["dataset"]).songs,
    )


def added_to(
    dataset: Dataset,
    folder: str,
    *,
    plays: Iterable[Histories] = (),
    earlier: AddedSongs | None = None,
    earlier_num_songs: int = 0,
) -> AddedSongs:
    """Return the songs to add to the network in `folder`.

    `plays` are the plays since the network's training; `earlier` and `earlier_num_songs` are as in `AddedSongs.make`.
    """
    workspace = dataset.workspace
    output_vectors = workspace.read_array(f"{folder}/{SONG_VECTORS}")
    path = f"{folder}/{INPUT_VECTORS}"
    input_vectors = workspace.read_array(path) if workspace.exists(path) else output_vectors
    rows = songs_without_vector(output_vectors, dataset.num_songs)
    return AddedSongs.make(
        output_vectors,
        input_vectors,
        dataset.catalog(),
        dataset.content(),
        earlier=earlier,
        earlier_num_songs=earlier_num_songs,
        first_plays=FirstPlays.read(plays, rows, output_vectors, input_vectors),
    )


def _plays_since(dataset: Dataset, model: Manifest, allowed: FitRange) -> Iterator[Histories]:
    """Yield the plays that `allowed` permits among those appended since the model was trained.

    If their parts were joined with earlier ones, yield the plays after the last one that the model was trained on, by
    their times; nothing if the times are not real.
    """
    manifest, trained = dataset.manifest, dataset.earlier(model.inputs["dataset"])
    if trained.parts == manifest.parts:
        return
    is_separate = manifest.splits_at(trained.parts)
    if not is_separate and manifest.times != "real":
        return
    for bucket in range(manifest.buckets):
        for histories in dataset.read_bucket(bucket, first_part=trained.parts if is_separate else 0):
            selected = allowed.select(histories)
            yield selected if is_separate else selected.keep(selected.played_at > trained.last_play)
