"""Intervals by bootstrap over users, from sums that add up over any division of the users.

Users fall by hash into 1,024 cells, and a sample of the bootstrap draws cells: each counts Poisson(1) times (Chamandy
et al. 2012, "Estimating uncertainty for massive data streams"). Workers thus return sums by cell, whose size depends
neither on the number of users nor on that of the samples, and two models are compared on the same users.

U users, B samples, C cells, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import user_hash

CELLS = 1024
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class CellRange:
    """The cells that one unit of work holds: `count` of `total` from `first` on."""

    total: int = CELLS
    first: int = 0
    count: int = CELLS

    def cells_of(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the cell of each user, counted from `first`; not within [0, count) for users of other units."""
        hashes = user_hash(user_ids, salt="bootstrap cell ")
        return np.asarray((hashes % np.uint64(self.total)).astype(np.int64) - self.first)

    def holds(self, user_ids: np.ndarray) -> np.ndarray:
        """bool (U,): the users whose cells are among these."""
        cells = self.cells_of(user_ids)
        return np.asarray((cells >= 0) & (cells < self.count))


def cell_ranges(units: int, most_cells: int) -> list[CellRange]:
    """How to divide each of `units` shares of the users, so that all together have about 1,024 cells.

    No range has more than `most_cells`. The ranges are those of one unit; every unit is divided alike.
    """
    count = max(1, min(-(-CELLS // units), most_cells))
    parts = -(-CELLS // (units * count))
    return [CellRange(total=parts * count, first=part * count, count=count) for part in range(parts)]


def bootstrap_weights(cells: int, samples: int, seed: int) -> np.ndarray:
    """float64 (B + 1, C): how often each cell counts; once in row 0, Poisson(1) times in each sample below it."""
    weights = np.ones((samples + 1, cells))
    weights[1:] = np.random.default_rng(seed).poisson(1.0, size=(samples, cells))
    return weights


def uniform_draws(hashes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): one number for each hash and step, uint64 arrays that broadcast; always the same one."""
    bits = _mixed(hashes + steps.astype(np.uint64) * _GOLDEN)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a counter in, random bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def means_with_intervals(
    sums: np.ndarray, counts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high, float64 (K,) each, of the means sums / counts, both (B + 1, K), row 0 the data itself.

    NaN where nothing was counted. Samples that counted nothing are left out. Without samples low and
    high are the value.
    """
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    value, samples = means[0], means[1:]
    low, high = value.copy(), value.copy()
    filled = ~np.isnan(value) & (counts[1:] > 0).any(axis=0)
    if filled.any():
        tail = (1 - confidence) / 2
        low[filled], high[filled] = np.nanquantile(samples[:, filled], [tail, 1 - tail], axis=0)
    return value, low, high
