"""Top k: the highest scores of each row or group, best first, with equal scores in the order of songs.

Shapes: Q queries, N songs, k answers.
"""

import numpy as np

from rayrec.data.ragged import group_sizes, group_starts, positions_in_groups


def top_k(scores: np.ndarray, k: int, songs: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the songs int32 (Q, k) and scores float32 (Q, k) of the k highest of `scores` (Q, N), best first.

    `songs`, int (N,) or (Q, N), are the song rows of the scores; without it they are 0 to N - 1. Equal scores are
    sorted by song row. Songs at -inf are left out; empty places hold -1 and -inf.
    """
    num_queries, num_songs = scores.shape
    song_rows = np.broadcast_to(np.arange(num_songs) if songs is None else songs, scores.shape)
    best_songs = np.full((num_queries, k), -1, dtype=np.int32)
    best_scores = np.full((num_queries, k), -np.inf, dtype=np.float32)
    for query in range(num_queries):
        highest = np.flatnonzero(_is_highest(scores[query], k) & (scores[query] > -np.inf))
        best = highest[np.lexsort((song_rows[query, highest], -scores[query, highest]))][:k]
        best_songs[query, : len(best)] = song_rows[query, best]
        best_scores[query, : len(best)] = scores[query, best]
    return best_songs, best_scores


def top_positions(sorted_groups: np.ndarray, scores: np.ndarray, count: int) -> np.ndarray:
    """int64, ascending: the positions of the `count` highest scores of each group, and of scores equal to the lowest.

    Equal values of `sorted_groups`, int, must be adjacent. The result is short and so cheap to sort.
    """
    starts = group_starts(sorted_groups)
    sizes = group_sizes(starts, len(sorted_groups))
    is_highest = np.ones(len(scores), dtype=bool)
    for start, size in zip(starts[sizes > count].tolist(), sizes[sizes > count].tolist(), strict=True):
        is_highest[start : start + size] = _is_highest(scores[start : start + size], count)
    return np.flatnonzero(is_highest)


def top_ranked(
    sorted_groups: np.ndarray, scores: np.ndarray, songs: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 (n,) each: the positions of the `count` highest scores of each group, best first, and their ranks from 0.

    Equal scores are sorted by `songs`, int. Equal values of `sorted_groups`, int, must be adjacent.
    """
    highest = top_positions(sorted_groups, scores, count)
    order = highest[np.lexsort((songs[highest], -scores[highest], sorted_groups[highest]))]
    ranks = positions_in_groups(sorted_groups[order])
    is_kept = ranks < count
    return order[is_kept], ranks[is_kept]


def _is_highest(scores: np.ndarray, count: int) -> np.ndarray:
    """bool (n,): True for the `count` highest of `scores`, (n,), and for scores equal to the lowest of them."""
    if len(scores) <= count:
        return np.ones(len(scores), dtype=bool)
    # If most scores are equal to the lowest, the same partition of `scores` takes ten times as long.
    return np.asarray(scores >= -np.partition(-scores, count - 1)[count - 1])
