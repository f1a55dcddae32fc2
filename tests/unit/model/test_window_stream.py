"""From buckets to batches: equal batches for any number of workers, each of which reads only its part."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from counted_reads import CountedWorkspace
from worlds import random_histories, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.data.windows import WindowLengths, Windows
from rayrec.errors import InputError, LeakError, MismatchError
from rayrec.model.song_tables import Share
from rayrec.model.train_config import TrainConfig
from rayrec.model.training_windows import ShardReader, WindowCounter, split_batches, stream_batches, window_lengths
from rayrec.storage.workspace import Workspace

CONFIG = TrainConfig(window=5, batch=6, long=(2, 3))
EVERYTHING = FitRange()
BUCKETS = 4


@pytest.fixture
def histories() -> Histories:
    """Random histories in which every play is of a different song."""
    made = random_histories(60, 10, seed=9)
    return replace(made, songs=np.arange(made.num_plays, dtype=np.int32))


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    return write_dataset(workspace, histories, histories.num_plays, buckets=BUCKETS)


def reader(dataset: Dataset, allowed: FitRange = EVERYTHING, share: Share | None = None) -> ShardReader:
    return ShardReader(dataset, allowed, CONFIG, window_lengths(dataset, allowed, CONFIG), share or Share())


def batches(
    dataset: Dataset, allowed: FitRange = EVERYTHING, share: Share | None = None, epoch: int = 0
) -> list[Windows]:
    return list(stream_batches(reader(dataset, allowed, share), epoch))


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


@pytest.mark.parametrize("workers", [2, 4, 64])
def test_workers_share_the_batches(dataset: Dataset, workers: int) -> None:
    whole = batches(dataset)
    shares = [batches(dataset, share=Share(rank=rank, workers=workers)) for rank in range(workers)]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert sorted(sum(contents(parts), start=list[int]())) == sorted(contents([batch])[0])
        place_of = dict(zip(contents([batch])[0], batch.places.tolist(), strict=True))
        for part in parts:
            assert [place_of[song] for song in contents([part])[0]] == part.places.tolist()
    assert {len(share) for share in shares} == {len(whole)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_opens_and_reads_its_part_of_the_files(workspace: Workspace, workers: int, tmp_path: Path) -> None:
    buckets = 16
    write_dataset(workspace, random_histories(600, 10, seed=9), 10, buckets=buckets)
    counted = CountedWorkspace(workspace.root, tmp_path / "log")
    dataset = Dataset(counted)
    lengths = window_lengths(dataset, EVERYTHING, CONFIG)
    all_bytes = sum(size for file, size in counted.reads() if "histories" in file)
    for rank in range(workers):
        list(stream_batches(ShardReader(dataset, EVERYTHING, CONFIG, lengths, Share(rank=rank, workers=workers)), 0))
        files, sizes = zip(*counted.reads(), strict=True)
        assert len(files) == len(set(files)) == buckets // workers
        assert sum(sizes) < 1.2 * all_bytes / workers


def test_another_number_of_workers_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"workers is 3; expected a divisor of shards \(64\): 1, 2, 4, 8, 16, 32, 64"):
        TrainConfig(workers=3)
    assert TrainConfig(workers=3, shards=60).workers == 3


def test_plays_are_counted_by_song_and_windows_by_length_in_each_range(workspace: Workspace) -> None:
    plays = Histories.from_lists([[0, 2, 2], [2, 4]], [[10, 20, 30], [10, 40]], user_ids=["a", "b"])
    counter = WindowCounter(write_dataset(workspace, plays, 5, buckets=1), CONFIG, [EVERYTHING, FitRange(before=30)])
    unit, (everything, early) = counter(0)
    assert unit == 0
    assert [values.tolist() for values in everything] == [[0, 2, 4], [1, 3, 1], [2, 1]]
    assert [values.tolist() for values in early] == [[0, 2], [1, 2], [1]]


def test_plays_that_changed_after_they_were_counted_stop_the_training(dataset: Dataset) -> None:
    lengths = window_lengths(dataset, EVERYTHING, CONFIG)
    more = WindowLengths(inputs=lengths.inputs + 1, offsets=lengths.offsets)
    with pytest.raises(MismatchError, match="the plays changed during the training"):
        list(stream_batches(ShardReader(dataset, EVERYTHING, CONFIG, more, Share()), 0))


def test_plays_past_the_cut_and_of_held_out_users_are_in_no_window(dataset: Dataset, histories: Histories) -> None:
    allowed = FitRange(before=int(np.median(histories.played_at)), held_out_share=0.3)
    found = batches(dataset, allowed)
    assert max(int(windows.plays.played_at.max()) for windows in found) < (allowed.before or 0)
    seen = set(allowed.select(histories).songs.tolist())
    assert {song for windows in found for song in windows.plays.songs.tolist()} <= seen


def test_a_reader_that_selects_too_much_is_stopped(
    dataset: Dataset, histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    for allowed, told in (
        (FitRange(before=int(np.median(histories.played_at))), "at or after its cut"),
        (FitRange(held_out_share=0.5), "held out"),
    ):
        made = reader(dataset, allowed)
        with monkeypatch.context() as patch:
            patch.setattr(FitRange, "select", lambda _, plays: plays)
            with pytest.raises(LeakError, match=told):
                list(stream_batches(made, 0))


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_batches_stay_whole_wherever_an_engine_cuts_or_joins_the_tables(
    dataset: Dataset, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec.data.windows.POOL_WINDOWS", 20)  # several pools
    made = reader(dataset, share=Share(rank=5, workers=16))  # some batches have no window for this worker
    batches_of_epoch = made.batches(0)
    tables, steps = list(made.tables(batches_of_epoch)), batches_of_epoch.steps
    assert len(tables) > 3
    joined = pa.concat_tables(tables)
    recut = [joined.slice(start, rows) for start in range(0, len(joined), rows)]
    wanted = contents(list(split_batches(tables, steps)))
    assert [] in wanted
    assert len(wanted) == steps
    assert contents(list(split_batches(recut, steps))) == wanted
    assert contents(list(split_batches([], 2))) == [[], []]


def test_buckets_without_pairs_of_plays_give_no_batches(workspace: Workspace) -> None:
    lonely = Histories.from_lists([[0], [1]], [[5], [5]])
    assert batches(write_dataset(workspace, lonely, 2, buckets=BUCKETS)) == []
