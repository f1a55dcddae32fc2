"""Diversity: songs that are good and unlike those already chosen (maximal marginal relevance).

P songs to choose from, D numbers per vector.
"""

import numpy as np


def diversify(vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """int64 (k,): which of P ranked songs to take, in the order of choice, by MMR (Carbonell and Goldstein 1998).

    `vectors`, float32 (P, D), are normalized and in the order of the ranking. Each choice is the song
    of the highest (1 − diversity) · relevance − diversity · likeness. Relevance falls evenly from 1 for
    the first place to 0 for the last, since the scores of recommenders differ in scale [ours]; likeness
    is the largest cosine with a song chosen before. Diversity 0 keeps the order, 1 looks at likeness
    alone. Of equal songs the one that ranks higher is taken. Fewer than k where P is smaller.
    """
    songs = len(vectors)
    k = min(k, songs)
    if not diversity:
        return np.arange(k)
    relevance = (1 - diversity) * np.linspace(1, 0, songs, dtype=np.float32) if songs > 1 else np.ones(songs)
    chosen = np.zeros(k, dtype=np.int64)
    likeness = np.full(songs, -np.inf, dtype=np.float32)  # no song is like none
    worth = relevance.copy()
    for place in range(k):
        best = int(np.argmax(worth))
        chosen[place] = best
        np.maximum(likeness, vectors @ vectors[best], out=likeness)
        worth = relevance - diversity * likeness
        worth[chosen[: place + 1]] = -np.inf
    return chosen


def pool_size(k: int) -> int:
    """How many songs to rank so that k diverse ones can be chosen among them."""
    return k + max(k, 100)
