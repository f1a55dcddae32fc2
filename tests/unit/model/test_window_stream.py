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
FULL_RANGE = FitRange()
BUCKETS = 4


@pytest.fixture
def histories() -> Histories:
    """Random histories in which every play is of a different song."""
    original = random_histories(60, 10, seed=9)
    return replace(original, songs=np.arange(original.num_plays, dtype=np.int32))


@pytest.fixture
def dataset(workspace: Workspace, histories: Histories) -> Dataset:
    return write_dataset(workspace, histories, histories.num_plays, buckets=BUCKETS)


def reader(dataset: Dataset, allowed: FitRange = FULL_RANGE, share: Share | None = None) -> ShardReader:
    return ShardReader(dataset, allowed, CONFIG, window_lengths(dataset, allowed, CONFIG), share or Share())


def batches(
    dataset: Dataset, allowed: FitRange = FULL_RANGE, share: Share | None = None, epoch: int = 0
) -> list[Windows]:
    return list(stream_batches(reader(dataset, allowed, share), epoch))


def first_songs(window_batches: list[Windows]) -> list[list[int]]:
    """The first song of each window, for every batch."""
    return [windows.plays.songs[windows.plays.offsets[:-1]].tolist() for windows in window_batches]


def test_an_epoch_holds_every_input_once(dataset: Dataset, histories: Histories) -> None:
    input_songs = sorted(
        song
        for windows in batches(dataset)
        for start, count in zip(windows.plays.offsets, windows.inputs, strict=False)
        for song in windows.plays.songs[start : start + count].tolist()
    )
    last_plays = histories.offsets[1:][histories.lengths > 0] - 1
    assert input_songs == np.delete(histories.songs, last_plays).tolist()


def test_epochs_come_again_the_same_and_differ_from_each_other(dataset: Dataset) -> None:
    first, repeated, second = (first_songs(batches(dataset, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == repeated
    assert first != second


@pytest.mark.parametrize("workers", [2, 4, 64])
def test_workers_share_the_batches(dataset: Dataset, workers: int) -> None:
    full_batches = batches(dataset)
    shares = [batches(dataset, share=Share(rank=rank, workers=workers)) for rank in range(workers)]
    for step, batch in enumerate(full_batches):
        parts = [share[step] for share in shares]
        assert sorted(sum(first_songs(parts), start=list[int]())) == sorted(first_songs([batch])[0])
        place_by_song = dict(zip(first_songs([batch])[0], batch.places.tolist(), strict=True))
        for part in parts:
            assert [place_by_song[song] for song in first_songs([part])[0]] == part.places.tolist()
    assert {len(share) for share in shares} == {len(full_batches)}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_opens_and_reads_its_part_of_the_files(workspace: Workspace, workers: int, tmp_path: Path) -> None:
    buckets = 16
    write_dataset(workspace, random_histories(600, 10, seed=9), 10, buckets=buckets)
    counted_workspace = CountedWorkspace(workspace.root, tmp_path / "log")
    dataset = Dataset(counted_workspace)
    lengths = window_lengths(dataset, FULL_RANGE, CONFIG)
    all_bytes = sum(size for file, size in counted_workspace.reads() if "histories" in file)
    for rank in range(workers):
        list(stream_batches(ShardReader(dataset, FULL_RANGE, CONFIG, lengths, Share(rank=rank, workers=workers)), 0))
        files, sizes = zip(*counted_workspace.reads(), strict=True)
        assert len(files) == len(set(files)) == buckets // workers
        assert sum(sizes) < 1.2 * all_bytes / workers


def test_another_number_of_workers_is_refused_with_the_choices() -> None:
    with pytest.raises(InputError, match=r"workers is 3; expected a divisor of shards \(64\): 1, 2, 4, 8, 16, 32, 64"):
        TrainConfig(workers=3)
    assert TrainConfig(workers=3, shards=60).workers == 3


def test_plays_are_counted_by_song_and_windows_by_length_in_each_range(workspace: Workspace) -> None:
    plays = Histories.from_lists([[0, 2, 2], [2, 4]], [[10, 20, 30], [10, 40]], user_ids=["a", "b"])
    counter = WindowCounter(write_dataset(workspace, plays, 5, buckets=1), CONFIG, [FULL_RANGE, FitRange(before=30)])
    unit, (full_counts, early_counts) = counter(0)
    assert unit == 0
    assert [values.tolist() for values in full_counts] == [[0, 2, 4], [1, 3, 1], [2, 1]]
    assert [values.tolist() for values in early_counts] == [[0, 2], [1, 2], [1]]


def test_plays_that_changed_after_they_were_counted_stop_the_training(dataset: Dataset) -> None:
    lengths = window_lengths(dataset, FULL_RANGE, CONFIG)
    changed_lengths = WindowLengths(inputs=lengths.inputs + 1, offsets=lengths.offsets)
    with pytest.raises(MismatchError, match="the plays changed during the training"):
        list(stream_batches(ShardReader(dataset, FULL_RANGE, CONFIG, changed_lengths, Share()), 0))


def test_plays_past_the_cut_and_of_held_out_users_are_in_no_window(dataset: Dataset, histories: Histories) -> None:
    allowed = FitRange(before=int(np.median(histories.played_at)), held_out_share=0.3)
    all_batches = batches(dataset, allowed)
    assert max(int(windows.plays.played_at.max()) for windows in all_batches) < (allowed.before or 0)
    allowed_songs = set(allowed.select(histories).songs.tolist())
    assert {song for windows in all_batches for song in windows.plays.songs.tolist()} <= allowed_songs


def test_a_reader_that_selects_too_much_is_stopped(
    dataset: Dataset, histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    for allowed, message in (
        (FitRange(before=int(np.median(histories.played_at))), "at or after its cut"),
        (FitRange(held_out_share=0.5), "held out"),
    ):
        shard_reader = reader(dataset, allowed)
        with monkeypatch.context() as patch:
            patch.setattr(FitRange, "select", lambda _, plays: plays)
            with pytest.raises(LeakError, match=message):
                list(stream_batches(shard_reader, 0))


@pytest.mark.parametrize("rows", [1, 7, 10_000])
def test_batches_stay_whole_wherever_an_engine_cuts_or_joins_the_tables(
    dataset: Dataset, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec.data.windows.POOL_WINDOWS", 20)  # several pools
    shard_reader = reader(dataset, share=Share(rank=5, workers=16))  # some batches have no window for this worker
    batches_of_epoch = shard_reader.batches(0)
    tables, steps = list(shard_reader.tables(batches_of_epoch)), batches_of_epoch.steps
    assert len(tables) > 3
    joined = pa.concat_tables(tables)
    recut_tables = [joined.slice(start, rows) for start in range(0, len(joined), rows)]
    expected = first_songs(list(split_batches(tables, steps)))
    assert [] in expected
    assert len(expected) == steps
    assert first_songs(list(split_batches(recut_tables, steps))) == expected
    assert first_songs(list(split_batches([], 2))) == [[], []]


def test_buckets_without_pairs_of_plays_give_no_batches(workspace: Workspace) -> None:
    single_plays = Histories.from_lists([[0], [1]], [[5], [5]])
    assert batches(write_dataset(workspace, single_plays, 2, buckets=BUCKETS)) == []
