from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.data.dataset import bucket_of
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.embeddings.vectors import FINAL, SELECTION, SongVectors
from rayrec.embeddings.word2vec import MINUTE_MS, EmbedConfig
from rayrec.errors import InputError, MismatchError
from rayrec.jobs.embed import embed
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, write_dataset_manifest
from rayrec.storage.workspace import PLAYLISTS, SONGS_TABLE, Workspace, histories_file

pytestmark = pytest.mark.usefixtures("cluster")

NUM_SONGS = 24
VALIDATION_FROM, TEST_FROM = 10_000 * MINUTE_MS, 20_000 * MINUTE_MS
SPLIT = Split(id="s", dataset="planted", validation_from=VALIDATION_FROM, test_from=TEST_FROM)
CONFIG = EmbedConfig(dim=16, epochs=5, workers=1)


def planted_histories(users: int = 120) -> Histories:
    """Histories of songs 0..9 or of songs 10..19 before any cut, then of songs 20 and 21 in the
    validation range, and of songs 22 and 23 in the test range."""
    random = np.random.default_rng(0)
    songs = random.integers(0, 10, size=(users, 20)) + 10 * (np.arange(users) % 2)[:, None]
    late_songs = np.tile([20, 21, 22, 23], (users, 1))
    times = np.arange(20) * MINUTE_MS
    late_times = [VALIDATION_FROM, VALIDATION_FROM + 1, TEST_FROM, TEST_FROM + 1]
    return Histories.from_lists(
        np.hstack([songs, late_songs]).tolist(),
        np.tile(np.append(times, late_times), (users, 1)).tolist(),
        [f"user {row}" for row in range(users)],
    )


@pytest.fixture
def planted(workspace: Workspace) -> Workspace:
    """A workspace with the planted histories as a data set of two buckets."""
    histories = planted_histories()
    buckets = bucket_of(histories.user_ids, 2)
    for bucket in range(2):
        workspace.write_table(histories_file(0, bucket), histories.take(buckets == bucket).to_arrow())
    names = [f"song {row}" for row in range(NUM_SONGS)]
    table = {columns.SONG: range(NUM_SONGS), columns.SONG_ID: names, columns.TITLE: names, columns.ARTIST: names}
    workspace.write_table(SONGS_TABLE, pa.table(table, columns.SONGS_TABLE))
    write_dataset_manifest(
        workspace,
        DatasetManifest(
            id="planted", source="test", buckets=2, parts=1, users=120, plays=120 * 24, songs=NUM_SONGS
        ),
    )  # fmt: skip
    return workspace


def test_final_and_selection_vectors_see_only_what_they_may(planted: Workspace) -> None:
    manifest = embed(planted, CONFIG, split=SPLIT)
    final, selection = (SongVectors(planted.read_array(manifest.path(name))) for name in (FINAL, SELECTION))
    assert np.flatnonzero(final.known).tolist() == list(range(22))
    assert np.flatnonzero(selection.known).tolist() == list(range(20))
    for vectors in (final, selection):
        nearest, _ = vectors.nearest(3, 9)
        assert set(nearest) == set(range(10)) - {3}
    assert manifest.inputs == {"dataset": "planted", "split": "s"}


def test_without_a_split_all_plays_are_used_and_the_health_is_kept(planted: Workspace) -> None:
    manifest = embed(planted, CONFIG)
    metrics = artifacts.load_manifest(planted, "songs", manifest.id).metrics
    assert (metrics["tokens"], metrics["sentences"]) == (120 * 24, 120 * 3)
    assert (metrics["source"], metrics["coverage"], metrics["songs_with_vector"]) == ("histories", 1.0, NUM_SONGS)
    assert len(metrics["neighbors"]) == 5
    assert metrics["seconds"] > 0
    assert list(manifest.files) == ["vectors.npy"]


def test_the_same_settings_are_not_embedded_again_unless_repeated(planted: Workspace) -> None:
    first = embed(planted, CONFIG)
    assert embed(planted, CONFIG) == first
    second = embed(planted, CONFIG, repeat=True)
    assert second.id == f"{first.id}.2"
    # With one thread and one seed, the repetition gives the same vectors.
    assert second.files == first.files
    assert embed(planted, CONFIG.replace(seed=1)).files != first.files


def test_playlists_are_preferred_where_there_are_any(planted: Workspace) -> None:
    playlists = pa.array([[0, 10, 0, 10]] * 50 + [[5]], pa.list_(pa.int32()))
    table = pa.table({columns.PLAYLIST: [str(row) for row in range(51)], columns.SONGS: playlists}, columns.PLAYLISTS)
    planted.write_table(f"{PLAYLISTS}/0.parquet", table)
    manifest_data = planted.read_json("dataset/dataset.json")
    write_dataset_manifest(planted, DatasetManifest(**{**manifest_data, "playlists": 51, "playlist_entries": 201}))
    manifest = embed(planted, CONFIG)
    assert manifest.metrics["source"] == "playlists"
    assert SongVectors(planted.read_array(manifest.path(FINAL))).known.nonzero()[0].tolist() == [0, 10]
    assert embed(planted, CONFIG.replace(source="histories")).metrics["coverage"] == 1.0


def test_vectors_from_outside_are_taken_for_both_fits(planted: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "outside.npy"
    raw = np.random.default_rng(0).normal(size=(NUM_SONGS, 4))
    np.save(path, raw)
    config = EmbedConfig(vectors=str(path))
    manifest = embed(planted, config, split=SPLIT)
    expected = SongVectors.normalized(raw).vectors
    for name in (FINAL, SELECTION):
        np.testing.assert_array_equal(planted.read_array(manifest.path(name)), expected)
    assert manifest.metrics["unknown_ids"] == 0
    assert manifest.metrics["neighbors"][0]["plays"] > 0
    np.save(path, raw + 1)
    assert embed(planted, config, split=SPLIT).id != manifest.id


def test_what_does_not_fit_is_refused(planted: Workspace) -> None:
    with pytest.raises(MismatchError, match="belongs to data set other,"):
        embed(planted, CONFIG, split=replace(SPLIT, dataset="other"))
    with pytest.raises(InputError, match="has none"):
        embed(planted, CONFIG.replace(source="playlists"))
    with pytest.raises(InputError, match="does not exist"):
        embed(planted, EmbedConfig(vectors="nowhere.npy"))


def test_an_error_in_the_task_comes_out_as_an_error_of_rayrec_and_leaves_no_artifact(planted: Workspace) -> None:
    with pytest.raises(InputError, match=r"^nothing to train song embeddings on"):
        embed(planted, CONFIG.replace(min_count=10**6))
    assert artifacts.listing(planted, "songs") == []
