"""Metrics of a single right answer among all songs, from its rank.

Q questions, N songs, K cut-offs.
"""

from collections.abc import Sequence

import numpy as np

METRICS = ("recall", "mrr", "ndcg")
NEVER = np.iinfo(np.int64).max  # rank of a song that no recommender could have known


def ranks_of(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """int64 (Q,): the rank, from 1, of song targets[q] among scores[q] of float32 (Q, N).

    Ties count against the target: 1 + the other songs that score at least as much. NaN counts as -inf.
    """
    target_scores = scores[np.arange(len(scores)), targets]
    ranks = np.count_nonzero(scores >= target_scores[:, None], axis=1)  # the target itself is the 1
    unscored = np.isnan(target_scores) | np.isneginf(target_scores)
    return np.asarray(np.where(unscored, scores.shape[1], ranks), dtype=np.int64)


def metric_columns(ks: Sequence[int]) -> list[tuple[str, int]]:
    """The metric and the cut-off of each column of `metrics_of`."""
    return [(metric, k) for metric in METRICS for k in ks]


def metrics_of(ranks: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64 (Q, 3 · K): recall, reciprocal rank and NDCG of one right answer at `ranks`, each at every k.

    With one right answer recall is 1 within the first k and 0 elsewhere, and NDCG is 1 / log2(rank + 1) there.
    """
    ranks = ranks.astype(np.float64)
    gains = (np.ones_like(ranks), 1 / ranks, 1 / np.log2(ranks + 1))
    return np.stack([np.where(ranks <= k, gain, 0) for gain in gains for k in ks], axis=1)
