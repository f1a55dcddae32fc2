"""From buckets to batches: the same for any reader, and never a play past the cut."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.data.windows import Windows, epoch_units
from rayrec.errors import LeakError
from rayrec.model import training_windows
from rayrec.model.train_config import TrainConfig
from rayrec.model.training_windows import UnitReader, plain_stream, split_batches
from rayrec.model.workers import Share
from rayrec.storage.workspace import Workspace

CONFIG = TrainConfig(window=5, batch=6, long=(2, 3))
EVERYTHING = FitRange()
BUCKETS = 4


@pytest.fixture
def histories() -> Histories:
    """Every play has a song of its own."""
    made = random_histories(60, 10, seed=9)
    return replace(made, songs=np.arange(made.num_plays, dtype=np.int32))


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    return write_dataset(workspace, histories, histories.num_plays, buckets=BUCKETS)


def batches(
    dataset: Dataset, allowed: FitRange = EVERYTHING, share: Share | None = None, epoch: int = 0, group: int = 2
) -> list[Windows]:
    reader = UnitReader(dataset, allowed, CONFIG, share or Share(), epoch)
    return list(plain_stream(reader, epoch_units(BUCKETS, group, seed=CONFIG.seed, epoch=epoch)))


def contents(found: list[Windows]) -> list[list[int]]:
    """The first song of each window, for every batch."""
    return [windows.plays.songs[windows.plays.offsets[:-1]].tolist() for windows in found]


def test_an_epoch_holds_every_input_once(dataset: Dataset, histories: Histories) -> None:
    found = sorted(
        song
        for windows in batches(dataset)
        for start, count in zip(windows.plays.offsets, windows.inputs, strict=False)
        for song in windows.plays.songs[start : start + count].tolist()
    )
    last = histories.offsets[1:][histories.lengths > 0] - 1
    assert found == np.delete(histories.songs, last).tolist()


def test_epochs_come_again_the_same_and_differ_from_each_other(dataset: Dataset) -> None:
    first, again, second = (contents(batches(dataset, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == again
    assert first != second


def test_workers_share_the_batches(dataset: Dataset) -> None:
    whole = contents(batches(dataset))
    shares = [contents(batches(dataset, share=Share(rank=rank, workers=3))) for rank in range(3)]
    assert [sorted(sum(parts, start=list[int]())) for parts in zip(*shares, strict=True)] == [
        sorted(batch) for batch in whole
    ]


def test_plays_past_the_cut_and_of_held_out_users_are_in_no_window(dataset: Dataset, histories: Histories) -> None:
    allowed = FitRange(before=int(np.median(histories.played_at)), held_out_share=0.3)
    found = batches(dataset, allowed)
    assert max(int(windows.plays.played_at.max()) for windows in found) < (allowed.before or 0)
    seen = set(allowed.select(histories).songs.tolist())
    assert {song for windows in found for song in windows.plays.songs.tolist()} <= seen


def test_a_reader_that_selects_too_much_is_stopped(
    dataset: Dataset, histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FitRange, "select", lambda _, plays: plays)
    with pytest.raises(LeakError, match="at or after its cut"):
        batches(dataset, FitRange(before=int(np.median(histories.played_at))))
    with pytest.raises(LeakError, match="held out"):
        batches(dataset, FitRange(held_out_share=0.5))


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_batches_stay_whole_wherever_an_engine_cuts_or_joins_the_tables(
    dataset: Dataset, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_windows, "POOL_PLAYS", 100)  # several pools to a unit, each with few batches
    reader = UnitReader(dataset, EVERYTHING, CONFIG.replace(batch=50), Share(), 0)
    units = {"unit": np.array(["[0, 1]", "[3]", "[2]"], dtype=object)}
    tables = list(reader.tables(units))
    assert len(tables) > 3
    joined = pa.concat_tables(tables)
    recut = [joined.slice(start, rows) for start in range(0, len(joined), rows)]
    wanted = [batch for table in tables for batch in split_batches([table])]
    assert contents(list(split_batches(recut))) == contents(wanted)
    assert list(split_batches([])) == []


def test_buckets_without_pairs_of_plays_give_no_batches(workspace: Workspace) -> None:
    lonely = Histories.from_lists([[0], [1]], [[5], [5]])
    assert batches(write_dataset(workspace, lonely, 2, buckets=BUCKETS)) == []
