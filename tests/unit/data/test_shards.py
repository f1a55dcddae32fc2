"""Batches of an epoch: the same for any number of workers, with each window once and windows of similar length."""

import numpy as np
import pytest

from rayrec.data.windows import SHARD_GROUPS, WORKER_WINDOWS, EpochBatches, PoolBatches, WindowLengths, divisors

WINDOW = 100


def window_lengths(units: int, windows: int = 20_000) -> WindowLengths:
    """Windows of any length, spread over the units."""
    random = np.random.default_rng(3)
    counts = np.full(units, windows // units) + random.integers(0, max(2, windows // units // 10), units)
    return WindowLengths.of_units([random.integers(1, WINDOW + 1, count) for count in counts])


def make_epoch(
    windows: WindowLengths, *, shards: int = 64, batch: int = 64, seed: int = 0, epoch: int = 0
) -> EpochBatches:
    return EpochBatches(windows, shards=shards, batch=batch, seed=seed, epoch=epoch)


def pools_of(epoch: EpochBatches) -> list[PoolBatches]:
    return [epoch.pool(number) for number in range(epoch.pools)]


@pytest.mark.parametrize("units", [1, 3, 16, 40, 64, 200])
@pytest.mark.parametrize("batch", [16, 64, 250])
def test_every_window_stands_in_one_batch_and_batches_are_full(units: int, batch: int) -> None:
    windows = window_lengths(units)
    epoch = make_epoch(windows, batch=batch)
    assert sorted(unit for lane in epoch.lanes for unit in lane) == list(range(units))
    assert max(map(len, epoch.lanes)) - min(map(len, epoch.lanes)) <= 1
    pools = pools_of(epoch)
    for lane, lane_units in enumerate(epoch.lanes):  # in the order in which the lane is read
        inputs = np.concatenate([pool.inputs[pool.lanes == lane] for pool in pools])
        np.testing.assert_array_equal(inputs, np.concatenate([windows.of_unit(unit) for unit in lane_units]))
    positions = {(step, place) for pool in pools for step, place in zip(pool.steps, pool.places, strict=True)}
    assert len(positions) == len(windows.inputs)
    sizes = np.bincount(np.concatenate([pool.steps for pool in pools]))
    assert len(sizes) == epoch.steps
    assert batch <= sizes.min() <= sizes.max() < 2 * batch
    for pool in pools[:-1]:
        assert pool.steps.max() < pools[-1].steps.min()  # the last pool comes after all others


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    windows = window_lengths(20)

    def steps(**changes: int) -> list[int]:
        return np.concatenate([pool.steps for pool in pools_of(make_epoch(windows, **changes))]).tolist()

    assert steps() == steps()
    assert steps() != steps(epoch=1)
    assert steps() != steps(seed=1)
    assert make_epoch(windows).lanes != make_epoch(windows, epoch=1).lanes


@pytest.mark.parametrize(("units", "workers"), [(1, 4), (16, 2), (16, 64), (40, 8), (200, 32)])
def test_workers_have_shards_of_their_own_and_read_as_few_lanes_as_they_can(units: int, workers: int) -> None:
    epoch = make_epoch(window_lengths(units))
    lanes_of_workers = [epoch.lanes_of(rank, workers) for rank in range(workers)]
    for pool in pools_of(epoch):
        for rank, worker_lanes in enumerate(lanes_of_workers):
            assert set(pool.lanes[pool.shards % workers == rank].tolist()) <= set(worker_lanes)
    reader_counts = np.bincount(
        np.concatenate([np.array(worker_lanes) for worker_lanes in lanes_of_workers]), minlength=len(epoch.lanes)
    )
    assert set(reader_counts.tolist()) == {max(1, workers // len(epoch.lanes))}


@pytest.mark.parametrize(
    ("workers", "batch", "windows"),
    [
        *((workers, 64, 20_000) for workers in (2, 4, 8)),
        *((workers, WORKER_WINDOWS * workers, windows) for workers in (2, 16, 32, 64) for windows in (5_000, 20_000)),
    ],
)
def test_workers_have_their_share_of_every_step(workers: int, batch: int, windows: int) -> None:
    """Any number of workers if a batch has WORKER_WINDOWS per worker; otherwise up to 8, with enough data."""
    for pool in pools_of(make_epoch(window_lengths(64, windows), batch=batch)):
        share_W = np.bincount(pool.shards % workers, minlength=workers) / len(pool.shards)
        for step in np.unique(pool.steps).tolist():
            counts_W = np.bincount(pool.shards[pool.steps == step] % workers, minlength=workers)
            assert np.abs(counts_W - share_W * counts_W.sum()).max() <= max(2, SHARD_GROUPS / workers)


@pytest.mark.parametrize(
    ("windows", "batch", "share"), [(1_000, 64, 0.9), (20_000, 64, 0.9), (20_000, 256, 0.9), (100_000, 1024, 0.88)]
)
def test_a_batch_holds_windows_of_similar_length(windows: int, batch: int, share: float) -> None:
    used = padded = 0
    for pool in pools_of(make_epoch(window_lengths(64, windows), batch=batch)):
        for step in np.unique(pool.steps).tolist():
            inputs = pool.inputs[pool.steps == step].astype(np.int64)
            used, padded = used + int(inputs.sum()), padded + int(inputs.max()) * len(inputs)
    assert used > share * padded


def test_data_without_windows_have_no_batches() -> None:
    epoch = make_epoch(WindowLengths.of_units([np.zeros(0, np.int64)] * 3))
    assert (epoch.steps, len(epoch.pool(0).steps)) == (0, 0)


def test_divisors_are_all_there() -> None:
    assert [divisors(number) for number in (1, 12, 64)] == [[1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16, 32, 64]]
