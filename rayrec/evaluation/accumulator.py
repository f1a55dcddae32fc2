"""Sums from which all metrics come; they add up over any division of the users.

M models, V views, G groups of users, C bootstrap cells, K cut-offs, T curves, S slices, R retrievers, N songs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rayrec.evaluation.bootstrap import bootstrap_weights
from rayrec.evaluation.protocol import GROUPS, OFFSETS, TARGETS
from rayrec.evaluation.ranks import METRICS
from rayrec.evaluation.vector_metrics import NEGATIVES, PAIRED

LAST = "last"  # leave one out: each user's last play alone
VIEWS = (*TARGETS, LAST)
SLICED = ("recall", "mrr")  # the metrics of breakdowns
LISTED = ("popularity_rank", "repeats")  # the figures of what is recommended
COVERAGE_SONGS = 1 << 15  # songs of the catalog, drawn where it has more, by which coverage is measured
RETURN_BYTES = 1 << 19  # of the sums that a worker returns, so that with what else it returns it stays below 1 MB


@dataclass
class MetricAccumulator:
    """Sums by bootstrap cell, or, as `resampled` returns them, of the data itself and of B bootstrap samples."""

    users: np.ndarray  # int64 (V, G): users with queries; V are VIEWS, then the targets in days
    queries: np.ndarray  # float64 (C, V, G)
    metrics: np.ndarray  # float64 (C, M, V, G, 3 · K): see metric_columns
    curve_sums: np.ndarray  # float64 (C, T, offsets): cosines
    curve_counts: np.ndarray  # float64 (C, T, offsets): plays behind them
    pairs_won: np.ndarray  # float64 (C, T, len(PAIRED), len(NEGATIVES))
    pairs: np.ndarray  # the same shape
    slice_metrics: np.ndarray  # float64 (C, M, S, len(SLICED))
    slice_queries: np.ndarray  # float64 (C, S)
    listed: np.ndarray  # uint8 (M, n / 8): bits of the songs drawn for coverage that are in any list
    list_sums: np.ndarray  # float64 (C, M, len(LISTED))
    list_counts: np.ndarray  # float64 (C, M): places in the lists
    lists: np.ndarray  # int64 (M,)
    # float64 (C, M, OFFSETS and targets in days, R + 1): recall of the candidates, of all and by retriever
    retrieved: np.ndarray
    candidates: np.ndarray  # float64 (C, M, R + 1): how many there were

    @classmethod
    def empty(
        cls,
        *,
        cells: int,
        models: int,
        ks: int,
        curves: int = 0,
        offsets: int = 0,
        slices: int = 0,
        songs: int = 0,
        retrievers: int = 0,
        day_targets: int = 0,
    ) -> MetricAccumulator:
        """The sums of no users; `songs` are those drawn for coverage. `day_targets` come behind the VIEWS."""
        views, groups = len(VIEWS) + day_targets, len(GROUPS)
        pairs = (cells, curves, len(PAIRED), len(NEGATIVES))
        columns = retrievers + 1 if retrievers else 0
        return cls(
            users=np.zeros((views, groups), dtype=np.int64),
            queries=np.zeros((cells, views, groups)),
            metrics=np.zeros((cells, models, views, groups, len(METRICS) * ks)),
            curve_sums=np.zeros((cells, curves, offsets)),
            curve_counts=np.zeros((cells, curves, offsets)),
            pairs_won=np.zeros(pairs),
            pairs=np.zeros(pairs),
            slice_metrics=np.zeros((cells, models, slices, len(SLICED))),
            slice_queries=np.zeros((cells, slices)),
            listed=np.zeros((models, -(-songs // 8)), dtype=np.uint8),
            list_sums=np.zeros((cells, models, len(LISTED))),
            list_counts=np.zeros((cells, models)),
            lists=np.zeros(models, dtype=np.int64),
            retrieved=np.zeros((cells, models, len(OFFSETS) + day_targets, columns)),
            candidates=np.zeros((cells, models, columns)),
        )

    @property
    def cells(self) -> int:
        """C."""
        return len(self.queries)

    @property
    def bytes_of_cell(self) -> int:
        """Bytes of the sums of one cell."""
        return int(sum(getattr(self, name).nbytes for name in BY_CELL)) // max(1, self.cells)

    def add(self, other: MetricAccumulator, first_cell: int = 0) -> None:
        """Add sums whose cells are these from `first_cell` on; cells beyond the last go on at the first."""
        places = (first_cell + np.arange(other.cells)) % max(1, self.cells)
        for name in BY_CELL:
            np.add.at(getattr(self, name), places, getattr(other, name))
        self.users += other.users
        self.lists += other.lists
        self.listed |= other.listed

    def resampled(self, samples: int, seed: int) -> MetricAccumulator:
        """The sums of the data itself and of bootstrap samples along the first axis, B + 1 long."""
        weights = bootstrap_weights(self.cells, samples, seed)
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in BY_CELL:
            sums = values[name]
            values[name] = (weights @ sums.reshape(self.cells, -1)).reshape(samples + 1, *sums.shape[1:])
        return MetricAccumulator(**values)


BY_CELL: Sequence[str] = [
    item.name for item in fields(MetricAccumulator) if item.name not in ("users", "listed", "lists")
]
