"""Metrics of right answers among all songs, from their ranks.

Q questions, N songs, T right answers of all questions together, K cut-offs.
"""

from collections.abc import Sequence

import numpy as np

METRICS = ("recall", "mrr", "ndcg")
NEVER = np.iinfo(np.int64).max  # rank of a song that lies too deep, or that no recommender could have known


def best_scores(scores: np.ndarray, depth: int) -> np.ndarray:
    """float32 (Q, min(depth, N)): the best scores of each row of float32 (Q, N), ascending. NaN counts as -inf."""
    depth = min(depth, scores.shape[1])
    floor = _floor(scores, depth)
    flat = np.flatnonzero(scores > floor[:, None])  # NaN is above nothing
    rows, songs = np.divmod(flat, max(1, scores.shape[1]))
    count = np.bincount(rows, minlength=len(scores))
    # What is above the floor, and the floor itself in all places that are left of the depth.
    above = np.full((len(scores), depth + int(count.max(initial=0))), floor[:, None], dtype=np.float32)
    above[rows, np.arange(len(rows)) - (np.cumsum(count) - count)[rows]] = scores[rows, songs]
    return np.sort(np.partition(above, above.shape[1] - depth, axis=1)[:, above.shape[1] - depth :], axis=1)


def _floor(scores: np.ndarray, depth: int) -> np.ndarray:
    """float32 (Q,): a score that at least `depth` of each row reach, so that few need to be put in order.

    The `depth` best of twice as many groups hold one each.
    """
    groups = 2 * depth
    width = scores.shape[1] // groups
    if not width:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    best = np.fmax.reduce(scores[:, : groups * width].reshape(len(scores), width, groups), axis=1)
    best[np.isnan(best)] = -np.inf
    return np.asarray(np.partition(best, depth, axis=1)[:, depth])


def ranks_of(scores: np.ndarray, rows: np.ndarray, songs: np.ndarray, best: np.ndarray) -> np.ndarray:
    """int64 (T,): the rank, from 1, of song songs[t] among scores[rows[t]] of float32 (Q, N).

    `best` are the `best_scores` of a depth above any cut-off; a song that is not among them is NEVER
    found, nor is one at -inf. Ties count against a song: 1 + the others that score at least as much.
    """
    own = scores[rows, songs]
    near = np.flatnonzero((own >= best[rows, 0]) & (own > -np.inf))
    found = np.count_nonzero(best[rows[near]] >= own[near, None], axis=1)  # the song itself is the 1
    # All of the best, and more lie below: others may tie with it among these.
    whole = (found == best.shape[1]) & (best.shape[1] < scores.shape[1])
    ranks = np.full(len(own), NEVER, dtype=np.int64)
    ranks[near] = np.where(whole, NEVER, found)
    return ranks


def metric_columns(ks: Sequence[int]) -> list[tuple[str, int]]:
    """The metric and the cut-off of each column of `metrics_of`."""
    return [(metric, k) for metric in METRICS for k in ks]


def metrics_of(ranks: np.ndarray, rows: np.ndarray, sizes: np.ndarray, ks: Sequence[int]) -> np.ndarray:
    """float64 (Q, 3 · K): recall, reciprocal rank and NDCG, each at every k.

    `ranks` and `rows` are int64 (T,), the rank of each right answer and its question; `sizes` is
    int64 (Q,), how many right answers a question has. Recall at k is the share of them within the first
    k; MRR is 1 / the best rank there; NDCG is Σ 1 / log2(rank + 1) over those there, divided by what
    min(k, size) answers in the first places would give.
    """
    questions = len(sizes)
    columns = np.zeros((len(METRICS), len(ks), questions))
    ideals = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))])
    for place, k in enumerate(ks):
        within = ranks <= k
        there, their = ranks[within].astype(np.float64), rows[within]
        recall, reciprocal, gain = columns[:, place]
        recall += np.bincount(their, minlength=questions) / np.maximum(sizes, 1)
        np.maximum.at(reciprocal, their, 1 / there)
        ideal = ideals[np.clip(sizes, 1, k)]
        gain += np.bincount(their, weights=1 / np.log2(there + 1), minlength=questions) / ideal
    return np.asarray(columns.reshape(len(METRICS) * len(ks), questions).T)
