"""Virtual shards: which windows make up which batch of an epoch, the same for any number of workers.

The units of the data (buckets, or files of playlists) are put into lanes. A lane is read from its first unit to its
last, and its windows are dealt to a number of shards; of W workers each reads the lanes of every W-th shard. The
lengths of all windows are known before, so that every worker computes all batches and none needs what another reads.
"""

from dataclasses import dataclass

import numpy as np

GROUPS = 8  # of shards, of which a batch takes the same share: up to so many workers have as much to do in each step
GROUP_WINDOWS = 1 << 10  # of a pool in each group, or there are fewer groups: else a batch would hold all lengths
POOL_WINDOWS = 1 << 14  # of all shards together, whose windows are put in batches by length


@dataclass(frozen=True, kw_only=True)
class WindowLengths:
    """The inputs of every window of the data in the order in which units are read; a byte or two a window."""

    inputs: np.ndarray  # unsigned int (T,)
    offsets: np.ndarray  # int64 (units + 1,): where each unit's windows begin

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self.offsets) - 1

    @classmethod
    def of_units(cls, inputs: list[np.ndarray]) -> "WindowLengths":
        """From those of each unit."""
        flat = np.concatenate([np.zeros(0, dtype=np.uint8), *inputs])
        return cls(
            inputs=flat.astype(np.min_scalar_type(int(flat.max(initial=0)))),
            offsets=np.cumsum([0, *map(len, inputs)]),
        )

    def of_unit(self, unit: int) -> np.ndarray:
        """Those of one unit."""
        return self.inputs[self.offsets[unit] : self.offsets[unit + 1]]


@dataclass(frozen=True, kw_only=True)
class PoolBatches:
    """The batches of a pool, by lane and then in the order in which its windows are read."""

    lanes: np.ndarray  # int64 (P,): the lane of each window
    shards: np.ndarray  # int64 (P,): its shard
    inputs: np.ndarray  # unsigned int (P,): its length
    steps: np.ndarray  # int64 (P,): the number of its batch within the epoch
    places: np.ndarray  # int64 (P,): its place in the batch


class EpochBatches:
    """The batches of an epoch: a function of seed, epoch and the lengths of windows alone."""

    def __init__(self, windows: WindowLengths, *, shards: int, batch: int, seed: int, epoch: int) -> None:
        """`batch` is in windows over all workers. Batches hold at least as many; the odd windows are spread."""
        order = np.random.default_rng([seed, epoch]).permutation(windows.units)
        lanes = max(number for number in divisors(shards) if number <= max(1, windows.units))
        self.lanes: list[list[int]] = [order[lane::lanes].tolist() for lane in range(lanes)]
        self._inputs = [np.concatenate([windows.of_unit(unit) for unit in units]) for units in self.lanes]
        self._shards, self._batch, self._entropy = shards, batch, [seed, epoch]
        sizes = np.array([len(inputs) for inputs in self._inputs])
        self.pools = max(1, -(-int(sizes.sum()) // POOL_WINDOWS))
        # int64 (lanes, pools + 1): every pool takes the same share of each lane, so that all end together
        self._bounds = sizes[:, None] * np.arange(self.pools + 1) // self.pools
        of_pools = np.diff(self._bounds).sum(axis=0)
        self._first = np.append(0, np.cumsum(np.where(of_pools, np.maximum(1, of_pools // batch), 0)))

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return int(self._first[-1])

    def lanes_of(self, rank: int, workers: int) -> list[int]:
        """The lanes that hold shards of one of so many workers."""
        return sorted({shard % len(self.lanes) for shard in range(rank, self._shards, workers)})

    def pool(self, number: int) -> PoolBatches:
        """Windows of like length together, batches in random order."""
        rng = np.random.default_rng([*self._entropy, number])
        bounds = self._bounds[:, number : number + 2].tolist()
        inputs = np.concatenate([self._inputs[lane][begin:end] for lane, (begin, end) in enumerate(bounds)])
        counts = [end - begin for begin, end in bounds]
        lanes = np.repeat(np.arange(len(self.lanes)), counts)
        dealt = np.concatenate([np.arange(count) for count in counts]) % (self._shards // len(self.lanes))
        shards = lanes + len(self.lanes) * dealt
        most = min(GROUPS, max(1, len(inputs) // GROUP_WINDOWS))
        groups = shards % max(number for number in divisors(self._shards) if number <= most)
        # The shortest window of each group, the next of each, and so on: neighbours have about the same length.
        by_length = np.lexsort((rng.random(len(inputs)), inputs, groups))
        sizes = np.bincount(groups)
        ranks = np.arange(len(inputs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        share = (ranks + 0.5) / np.repeat(sizes, sizes)
        order = by_length[np.lexsort((groups[by_length], share))]
        first, count = int(self._first[number]), int(self._first[number + 1] - self._first[number])
        steps, places = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
        for step, rows in zip(rng.permutation(count).tolist(), np.array_split(order, max(1, count)), strict=False):
            steps[rows], places[rows] = first + step, np.arange(len(rows))
        return PoolBatches(lanes=lanes, shards=shards, inputs=inputs, steps=steps, places=places)


def divisors(number: int) -> list[int]:
    """All divisors of a number from 1 on, ascending."""
    return [each for each in range(1, number + 1) if number % each == 0]
