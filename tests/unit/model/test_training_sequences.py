"""Training sequences: whole playlists, or histories and sessions, which end at the cut."""

import numpy as np
import pyarrow as pa
import pytest
from networks import MINUTE
from worlds import write_dataset

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.errors import InputError, LeakError
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TrainConfig
from rayrec.model.training_windows import Sequences, ShardReader, stream_batches, window_lengths
from rayrec.storage.artifacts import write_dataset_manifest
from rayrec.storage.workspace import Workspace, playlists_file

PLAYLISTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
LONG_PAUSE = 60 * MINUTE
FULL_RANGE = FitRange()


@pytest.fixture
def without(workspace: Workspace) -> Dataset:
    """Two users, the first with two sessions, and no playlists."""
    plays = Histories.from_lists(
        [[0, 1, 2, 3], [4, 5, 6]],
        [[0, MINUTE, LONG_PAUSE, LONG_PAUSE + MINUTE], [0, MINUTE, 2 * MINUTE]],
        user_ids=["a", "b"],
    )
    return write_dataset(workspace, plays, 10, buckets=1)


@pytest.fixture
def dataset(without: Dataset) -> Dataset:
    """The data set of `without`, with three playlists in two files."""
    for number, playlists in enumerate((PLAYLISTS[:2], PLAYLISTS[2:])):
        ids = [f"{number}-{row}" for row in range(len(playlists))]
        values = {columns.PLAYLIST: pa.array(ids), columns.SONGS: pa.array(playlists, pa.list_(pa.int32()))}
        without.workspace.write_table(playlists_file(number), pa.table(values))
    manifest = without.manifest.__class__(**{**without.manifest.__dict__, "playlists": 3, "playlist_entries": 9})
    write_dataset_manifest(without.workspace, manifest)
    return Dataset(without.workspace)


def _read(sequences: Sequences, allowed: FitRange = FULL_RANGE) -> list[list[int]]:
    return [
        part.tolist()
        for unit in range(sequences.units)
        for histories in sequences.read(unit, allowed, 1_000)
        for part in np.split(histories.songs, histories.offsets[1:-1])
    ]


def test_playlists_are_read_in_their_order_file_by_file(dataset: Dataset) -> None:
    sequences = Sequences(dataset, "playlists")
    assert (sequences.kind, sequences.units, sequences.plays) == ("playlists", 2, 9)
    assert _read(sequences) == PLAYLISTS
    (first,) = sequences.read(0, FitRange(before=1), 1_000)
    assert first.played_at.tolist() == [0, 1, 2, 0, 1]  # positions, because playlists have an order but no times
    assert first.contexts is None


def test_without_playlists_sessions_within_the_fit_range_serve_as_playlists(without: Dataset) -> None:
    sequences = Sequences(without, "playlists")
    assert (sequences.kind, sequences.units, sequences.plays) == ("sessions", 1, 7)
    assert sorted(_read(sequences)) == [[0, 1], [2, 3], [4, 5, 6]]
    assert sorted(_read(sequences, FitRange(before=2 * MINUTE))) == [[0, 1], [4, 5]]


def test_histories_are_whole_and_cut_by_the_range_though_there_are_playlists(dataset: Dataset) -> None:
    sequences = Sequences(dataset, "histories")
    assert (sequences.kind, sequences.units, sequences.plays) == ("histories", 1, 7)
    assert sorted(_read(sequences)) == [[0, 1, 2, 3], [4, 5, 6]]
    assert sorted(_read(sequences, FitRange(before=LONG_PAUSE))) == [[0, 1], [4, 5, 6]]


@pytest.mark.parametrize("source", ["histories", "playlists"])
def test_a_source_that_selects_too_much_is_stopped(
    without: Dataset, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FitRange, "select", lambda _, plays: plays)
    with pytest.raises(LeakError, match="at or after its cut"):
        _read(Sequences(without, source), FitRange(before=LONG_PAUSE))  # type: ignore[arg-type]


def test_windows_are_cut_from_playlists_and_none_spans_two(dataset: Dataset) -> None:
    preset = TrainConfig.PRESETS["r_pst"]
    config = TrainConfig(**preset, window=2, batch=1)
    lengths = window_lengths(dataset, FitRange(), config)
    reader = ShardReader(dataset, FitRange(), config, lengths, Share())
    window_songs = [
        part.tolist()
        for windows in stream_batches(reader, 0)
        for part in np.split(windows.plays.songs, windows.plays.offsets[1:-1])
    ]
    assert sorted(window_songs) == [[1, 2, 3], [4, 5], [6, 7, 8], [8, 9]]  # inputs and one play of lookahead


def test_the_papers_four_networks_are_presets() -> None:
    presets = {name: TrainConfig(**TrainConfig.PRESETS[name]) for name in ("r_pst", "r_plt", "r_hst", "r_hlt")}
    for name, config in presets.items():
        assert config.source == ("playlists" if name[2] == "p" else "histories")
        assert list(config.horizons) == (["short"] if name[3] == "s" else ["long"])
        assert (config.objective, config.song_table, config.averages) == ("cosine", "frozen", ())


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(InputError, match="source is 'albums'; expected one of histories, playlists"):
        TrainConfig(source="albums")  # type: ignore[arg-type]
