"""Windows: pieces of histories that the network learns from, in batches of similar length. [ours]

Virtual shards decide which windows form which batch of an epoch, independently of the number of workers. The units of
the data (buckets, or files of playlists) are distributed over lanes. A lane is read from its first unit to its last,
and its windows are distributed over several shards. Each of the W workers reads the lanes of every W-th shard. The
lengths of all windows are known in advance, so every worker computes all batches and needs no data that another worker
reads. A worker's share of a batch is the windows of the batch that this worker reads; the share may be empty. If a
batch has at least 64 windows per worker, and the number of shards is a power of two, the batch takes the same fraction
of the windows of each worker.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from rayrec.data.histories import Histories, concatenate
from rayrec.data.ragged import group_of_each_item, offsets_of, ranges

_COLUMNS = ("inputs", "previous_at", "places")  # fields of Windows apart from the plays, one number per window
NEVER = np.iinfo(np.int64).min  # a time before all others: the time of the play before the first one
# Shards are in groups, and a batch takes the same fraction of each group's windows. The more groups, the more the
# lengths in a batch differ.
SHARD_GROUPS = 8  # number of groups; fewer if a pool has fewer than `GROUP_WINDOWS` windows per group
GROUP_WINDOWS = 1 << 10
WORKER_WINDOWS = 64  # large batches have more groups: one per `WORKER_WINDOWS` windows of a batch
POOL_WINDOWS = 1 << 14  # windows in a pool, over all shards; the windows of a pool are put in batches by length


@dataclass(frozen=True, kw_only=True)
class Windows:
    """W windows of a batch. Each holds its input plays, followed by the plays in which targets may lie."""

    plays: Histories  # one row per window; user ids are empty
    inputs: np.ndarray  # int64 (W,): number of plays that are inputs
    previous_at: np.ndarray  # int64 (W,): ms UTC of the play before the window, NEVER if there is none
    places: np.ndarray  # int64 (W,): position of each window in its batch, over all workers

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> "Windows":
        """Return the windows at `rows`, in that order."""
        return Windows(
            plays=self.plays.take(rows),
            inputs=self.inputs[rows],
            previous_at=self.previous_at[rows],
            places=self.places[rows],
        )

    def to_arrow(self) -> pa.Table:
        """Return a table with one row per window."""
        table = self.plays.to_arrow()
        for name in _COLUMNS:
            table = table.append_column(name, pa.array(getattr(self, name)))
        return table

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Windows":
        """Return the windows of a table that `to_arrow` made."""
        arrays = {name: table.column(name).to_numpy() for name in _COLUMNS}
        return cls(plays=Histories.from_arrow(table), **arrays)

    @classmethod
    def concatenate(cls, parts: Sequence["Windows"]) -> "Windows":
        """Return the windows of all parts as one batch, in the order of the parts; empty without parts."""
        parts = [part for part in parts if len(part)]
        arrays = {
            name: np.concatenate([np.zeros(0, dtype=np.int64), *(getattr(part, name) for part in parts)])
            for name in ("inputs", "previous_at")
        }
        plays = concatenate([part.plays for part in parts])
        return cls(plays=plays, places=np.arange(len(plays)), **arrays)


def count_inputs(lengths: np.ndarray, window: int) -> np.ndarray:
    """int64 (W,): the number of inputs of each window that `cut_windows` makes of histories of `lengths`, int (U,)."""
    users, starts = _window_starts(lengths, window)
    return np.asarray(np.minimum(window, lengths[users] - 1 - starts))


def _window_starts(lengths: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (W,) each: the user of each window, and the position in the user's history where the window starts."""
    window_counts = -(-np.maximum(lengths - 1, 0) // window)  # the last play of a history is only ever a target
    users = group_of_each_item(window_counts)
    return users, ranges(0, window_counts) * window


def cut_windows(histories: Histories, window: int, lookahead: int) -> Windows:
    """Cut every history into windows of at most `window` inputs, each input in exactly one window.

    After its inputs a window holds up to `lookahead` more plays. A last window of one play has
    nothing to predict and is left out.
    """
    lengths = histories.lengths
    users, starts = _window_starts(lengths, window)
    inputs = np.minimum(window, lengths[users] - 1 - starts)
    window_lengths = np.minimum(inputs + lookahead, lengths[users] - starts)
    first_plays = histories.offsets[users] + starts
    previous_at = (
        np.where(starts > 0, histories.played_at[np.maximum(first_plays - 1, 0)], NEVER)
        if len(first_plays)
        else first_plays
    )
    return Windows(
        plays=Histories(
            user_ids=np.full(len(users), "", dtype=object),
            offsets=offsets_of(window_lengths),
            **histories.columns_at(ranges(first_plays, window_lengths)),
        ),
        inputs=inputs,
        previous_at=previous_at,
        places=np.arange(len(users)),
    )


def batch_rows(inputs: np.ndarray, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the rows of each batch. Windows in a batch have similar lengths; batches are in random order.

    `inputs`, int (W,), are the lengths of the windows. Every batch has at least `batch` rows, and the remainder is
    spread over all batches. Fewer than `batch` windows form one batch.
    """
    if not len(inputs):
        return []
    order = np.lexsort((rng.random(len(inputs)), inputs))
    batches = np.array_split(order, max(1, len(order) // batch))
    return [batches[index] for index in rng.permutation(len(batches))]


def batches_in_memory(windows: Windows, batch: int, rng: np.random.Generator) -> Iterator[Windows]:
    """Yield the batches of windows that are all in memory."""
    for rows in batch_rows(windows.inputs, batch, rng):
        yield replace(windows.take(rows), places=np.arange(len(rows)))


@dataclass(frozen=True, kw_only=True)
class WindowLengths:
    """The number of inputs of every window of the data, in the order of the units; one or two bytes per window."""

    inputs: np.ndarray  # unsigned int (T,)
    offsets: np.ndarray  # int64 (units + 1,): where each unit's windows begin

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self.offsets) - 1

    @classmethod
    def of_units(cls, inputs: list[np.ndarray]) -> "WindowLengths":
        """Create from one array per unit with the number of inputs of each of its windows."""
        flat = np.concatenate([np.zeros(0, dtype=np.uint8), *inputs])
        return cls(
            inputs=flat.astype(np.min_scalar_type(int(flat.max(initial=0)))),
            offsets=offsets_of([len(unit_inputs) for unit_inputs in inputs]),
        )

    def of_unit(self, unit: int) -> np.ndarray:
        """Return the number of inputs of each window of one unit."""
        return self.inputs[self.offsets[unit] : self.offsets[unit + 1]]


@dataclass(frozen=True, kw_only=True)
class PoolBatches:
    """The batch of each of the P windows of a pool, by lane and then in the order in which the lane is read."""

    lanes: np.ndarray  # int64 (P,): the lane of each window
    shards: np.ndarray  # int64 (P,): the shard of each window
    inputs: np.ndarray  # unsigned int (P,): the length of each window
    steps: np.ndarray  # int64 (P,): the number of each window's batch within the epoch
    places: np.ndarray  # int64 (P,): the position of each window in its batch


class EpochBatches:
    """The batches of an epoch. They depend on the seed, the epoch and the window lengths, not on the workers."""

    def __init__(self, windows: WindowLengths, *, shards: int, batch: int, seed: int, epoch: int) -> None:
        """`batch` is the minimum number of windows per batch over all workers; batches share the remainder."""
        unit_order = np.random.default_rng([seed, epoch]).permutation(windows.units)
        lanes = max(divisor for divisor in divisors(shards) if divisor <= max(1, windows.units))
        self.lanes: list[list[int]] = [unit_order[lane::lanes].tolist() for lane in range(lanes)]
        self._inputs = [np.concatenate([windows.of_unit(unit) for unit in units]) for units in self.lanes]
        self._shards, self._batch, self._entropy = shards, batch, [seed, epoch]
        lane_sizes = np.array([len(inputs) for inputs in self._inputs])
        self.pools = max(1, -(-int(lane_sizes.sum()) // POOL_WINDOWS))
        # int64 (lanes, pools + 1): every pool takes the same fraction of each lane, so that all lanes end together
        self._bounds = lane_sizes[:, None] * np.arange(self.pools + 1) // self.pools
        pool_sizes = np.diff(self._bounds).sum(axis=0)
        self._step_offsets = np.append(0, np.cumsum(np.where(pool_sizes, np.maximum(1, pool_sizes // batch), 0)))

    @property
    def steps(self) -> int:
        """The number of batches."""
        return int(self._step_offsets[-1])

    def lanes_of(self, rank: int, workers: int) -> list[int]:
        """Return the lanes that hold the shards of worker `rank` of `workers`."""
        return sorted({shard % len(self.lanes) for shard in range(rank, self._shards, workers)})

    def pool(self, number: int) -> PoolBatches:
        """Return the batches of one pool. Windows in a batch have similar lengths; batches are in random order."""
        rng = np.random.default_rng([*self._entropy, number])
        bounds = self._bounds[:, number : number + 2].tolist()
        inputs = np.concatenate([self._inputs[lane][start:end] for lane, (start, end) in enumerate(bounds)])
        counts = [end - start for start, end in bounds]
        lanes = group_of_each_item(counts)
        shard_in_lane = np.concatenate([np.arange(count) for count in counts]) % (self._shards // len(self.lanes))
        shards = lanes + len(self.lanes) * shard_in_lane
        max_groups = max(1, min(SHARD_GROUPS, len(inputs) // GROUP_WINDOWS), self._batch // WORKER_WINDOWS)
        groups = shards % max(number for number in divisors(self._shards) if number <= max_groups)
        # Take the shortest window of each group, then the next of each, and so on: neighbors have similar lengths.
        by_length = np.lexsort((rng.random(len(inputs)), inputs, groups))
        group_sizes = np.bincount(groups)
        ranks = ranges(0, group_sizes)
        relative_ranks = (ranks + 0.5) / np.repeat(group_sizes, group_sizes)
        order = by_length[np.lexsort((groups[by_length], relative_ranks))]
        first_step = int(self._step_offsets[number])
        count = int(self._step_offsets[number + 1] - self._step_offsets[number])
        steps, places = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
        for step, rows in zip(rng.permutation(count).tolist(), np.array_split(order, max(1, count)), strict=False):
            steps[rows], places[rows] = first_step + step, np.arange(len(rows))
        return PoolBatches(lanes=lanes, shards=shards, inputs=inputs, steps=steps, places=places)


def divisors(number: int) -> list[int]:
    """All divisors of a number from 1 on, ascending."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
