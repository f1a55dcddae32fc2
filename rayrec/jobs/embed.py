"""The embed stage: song vectors by word2vec in one task on one node, or from an outside file."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.artifacts import Manifest, fingerprint, load, new_id, publish, sha256
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange, Split, fit_range
from rayrec.errors import InputError, MismatchError
from rayrec.jobs.cluster import ray_cluster
from rayrec.jobs.node import node_cpus, run_on_node
from rayrec.progress import progress
from rayrec.songs import health, sessions
from rayrec.songs.embedding import EmbedConfig
from rayrec.songs.outside import read_outside
from rayrec.songs.sessions import Sentences
from rayrec.songs.vectors import FINAL, SELECTION, SongVectors
from rayrec.songs.word2vec import Word2Vec, write_corpus
from rayrec.workspace import Workspace


def embed(workspace: Workspace, config: EmbedConfig, *, split: Split | None = None, repeat: bool = False) -> Manifest:
    """Make the song vectors of a data set: vectors.npy, and with a validation range selection_vectors.npy.

    The first are fitted on all that a final fit may see, the second without the validation range.
    Vectors from outside are taken as they are, for both. Metrics: seconds, source, tokens,
    sentences, workers, rows, unknown_ids, zero_vectors (those that apply) and the keys of
    `rayrec.songs.health.check`.

    Raises `MismatchError` for a split of another data set, `InputError` for settings or files that
    do not fit the data.
    """
    dataset = Dataset(workspace)
    if split is not None and split.dataset != dataset.manifest.id:
        raise MismatchError(
            f"split {split.id!r} cuts data set {split.dataset!r}, the workspace holds {dataset.manifest.id!r}; "
            "run `rayrec split` again"
        )
    inputs = {"dataset": dataset.manifest.id}
    if split is not None:
        inputs["split"] = split.id
    if config.vectors is not None:
        inputs["vectors"] = _file_id(config.vectors)
    stage_id = fingerprint("embed", to_mapping(config), inputs)
    songs_id, complete = new_id(workspace, "songs", stage_id, repeat=repeat)
    if complete:
        return load(workspace, "songs", songs_id)
    manifest = Manifest(kind="songs", id=songs_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.perf_counter()
    fits = {FINAL: fit_range(split)}
    if split is not None and split.has_validation:
        fits[SELECTION] = split.selection
    made = _train(dataset, config, manifest, fits) if config.vectors is None else _take(dataset, config, manifest, fits)
    counts = made.pop("counts")
    vectors = SongVectors(workspace.read_array(manifest.path(FINAL)))
    metrics = {**made, **health.check(vectors, counts, dataset.catalog(), config.seed)}
    metrics["seconds"] = time.perf_counter() - started
    return publish(workspace, replace(manifest, metrics=metrics), fits)


def _train(dataset: Dataset, config: EmbedConfig, manifest: Manifest, fits: dict[str, FitRange]) -> dict[str, Any]:
    """Fit by word2vec, one range after another, with one bar over all epochs."""
    source = _source(dataset, config)
    with ray_cluster(), progress("song vectors, epochs", total=len(fits) * config.epochs) as bar:
        cpus = min(config.workers or node_cpus(), node_cpus())
        workers = config.workers or cpus
        made: dict[str, Any] = {}
        for name, allowed in fits.items():
            arguments = (dataset.workspace, source, config, allowed, workers, manifest.path(name))
            for result in run_on_node(fit_vectors, *arguments, cpus=cpus):
                if result is None:
                    bar.advance()
                elif name == FINAL:
                    made = result
    return {"source": source, **made}


def fit_vectors(
    workspace: Workspace, source: str, config: EmbedConfig, allowed: FitRange, workers: int, path: str
) -> Iterator[dict[str, Any] | None]:
    """Fit vectors on what is `allowed` and write them to `path`.

    Yields None after each epoch and at the end the figures: counts (int64 (N,)), tokens, sentences, workers.
    """
    dataset = Dataset(workspace)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        corpus = write_corpus(_sentences(dataset, source, config, allowed), Path(folder) / "corpus", dataset.num_songs)
        run = Word2Vec(corpus, config, workers)
        for _ in run.train():
            yield None
    run.vectors().save(workspace, path)
    yield {
        "counts": corpus.counts,
        "tokens": corpus.tokens,
        "sentences": corpus.sentences,
        "workers": run.workers,
    }


def _source(dataset: Dataset, config: EmbedConfig) -> str:
    if config.source == "playlists" and not dataset.manifest.playlists:
        raise InputError("embed source is playlists, but the data set has none; import some, or use histories")
    if config.source == "auto":
        return "playlists" if dataset.manifest.playlists else "histories"
    return config.source


def _sentences(dataset: Dataset, source: str, config: EmbedConfig, allowed: FitRange) -> Iterator[Sentences]:
    if source == "playlists":
        return sessions.from_playlists(dataset.read_playlists())
    histories = (allowed.select(batch) for batch in dataset.read_all())
    return sessions.from_histories(histories, allowed, config.session_gap_minutes)


def _take(dataset: Dataset, config: EmbedConfig, manifest: Manifest, names: dict[str, FitRange]) -> dict[str, Any]:
    """Take vectors from an outside file, under all the names that training would have made."""
    outside = read_outside(str(config.vectors), dataset.catalog())
    for name in names:
        outside.vectors.save(dataset.workspace, manifest.path(name))
    counts = np.zeros(dataset.num_songs, dtype=np.int64)
    for batch in dataset.read_all():
        counts += np.bincount(names[FINAL].select(batch).songs, minlength=dataset.num_songs)
    return {
        "counts": counts,
        "source": str(config.vectors),
        "rows": outside.rows,
        "unknown_ids": outside.unknown_ids,
        "zero_vectors": outside.zero_vectors,
    }


def _file_id(name: str) -> str:
    """Twelve hex digits of a local file's content: another file under the same name is another input."""
    path = Path(name).resolve()
    if not path.is_file():
        raise InputError(f"vectors file {name} is not there; give a .npy or .parquet file")
    return sha256(Workspace(path.parent), path.name)[:12]
