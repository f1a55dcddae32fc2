"""Sums over users, which add up over any division of the users.

M models, V views, G groups of users, B bootstrap samples, K cut-offs, C curves, S slices, N songs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from rayrec.evaluation.pairwise import NEGATIVES, PAIRED
from rayrec.evaluation.protocol import GROUPS, TARGETS
from rayrec.evaluation.ranks import METRICS

LAST = "last"  # leave one out: each user's last play alone
VIEWS = (*TARGETS, LAST)
SLICED = ("recall", "mrr")  # the metrics of breakdowns
LISTED = ("popularity_rank", "repeats")  # the figures of what is recommended
FEW_SAMPLES = 200  # bootstrap samples of all but the metrics, whose sums are large


@dataclass
class Tally:
    """Tallies of different users add up to the tally of all of them.

    Axis B + 1 holds the data itself and then the bootstrap samples; b is at most FEW_SAMPLES.
    """

    users: np.ndarray  # int64 (V, G): users with questions
    questions: np.ndarray  # float64 (V, G, B + 1)
    metrics: np.ndarray  # float64 (M, V, G, B + 1, 3 · K): see metric_columns
    curve_sums: np.ndarray  # float64 (C, b + 1, offsets): cosines
    curve_counts: np.ndarray  # float64 (C, b + 1, offsets): plays behind them
    pairs_won: np.ndarray  # float64 (C, len(PAIRED), b + 1, len(NEGATIVES))
    pairs: np.ndarray  # the same shape
    slice_metrics: np.ndarray  # float64 (M, S, b + 1, len(SLICED))
    slice_questions: np.ndarray  # float64 (S, b + 1)
    listed: np.ndarray  # bool (M, N): songs in any list
    list_sums: np.ndarray  # float64 (M, b + 1, len(LISTED))
    list_counts: np.ndarray  # float64 (M, b + 1): places in the lists
    lists: np.ndarray  # int64 (M,)

    def __add__(self, other: Tally) -> Tally:
        names = [field.name for field in fields(Tally)]
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @classmethod
    def empty(cls, *, models: int, curves: int, slices: int, songs: int, samples: int, ks: int, offsets: int) -> Tally:
        """The tally of no users."""
        few = min(samples, FEW_SAMPLES) + 1
        views, groups = len(VIEWS), len(GROUPS)
        pairs = (curves, len(PAIRED), few, len(NEGATIVES))
        return cls(
            users=np.zeros((views, groups), dtype=np.int64),
            questions=np.zeros((views, groups, samples + 1)),
            metrics=np.zeros((models, views, groups, samples + 1, len(METRICS) * ks)),
            curve_sums=np.zeros((curves, few, offsets)),
            curve_counts=np.zeros((curves, few, offsets)),
            pairs_won=np.zeros(pairs),
            pairs=np.zeros(pairs),
            slice_metrics=np.zeros((models, slices, few, len(SLICED))),
            slice_questions=np.zeros((slices, few)),
            listed=np.zeros((models, songs), dtype=bool),
            list_sums=np.zeros((models, few, len(LISTED))),
            list_counts=np.zeros((models, few)),
            lists=np.zeros(models, dtype=np.int64),
        )
