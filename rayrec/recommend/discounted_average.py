"""The discounted average of the songs played: the paper's baseline.

Q queries, P plays, D dimensions.
"""

import numpy as np
from scipy.sparse import csr_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.errors import InputError
from rayrec.recommend.base import Horizon
from rayrec.recommend.vector_recommender import VectorRecommender, normalized


class AverageRecommender(VectorRecommender):
    """t_u = Σ_j γ^(n−j) s_j over the n plays so far, normalized (De Boom et al. 2018, their baseline).

    `discount` is γ in (0, 1]: 1 is the plain average, near 0 only the last song counts. A play of a
    song without a vector adds nothing, and the plays before it are discounted all the same.
    Raises `InputError` for another discount.
    """

    def __init__(self, song_vectors: np.ndarray, discount: float) -> None:
        if not 0 < discount <= 1:
            raise InputError(f"discount {discount} is not in (0, 1]; 1 is the plain average")
        super().__init__(song_vectors)
        self.discount = discount
        self.name = f"average-{float(discount)}"

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the discounted average of the songs before each query."""
        order = np.lexsort((questions.seen, questions.rows))
        rows, seen = questions.rows[order], questions.seen[order]
        follows = np.concatenate([[False], rows[1:] == rows[:-1]])  # another query of the same user
        plays_since = seen - np.where(follows, np.concatenate([[0], seen[:-1]]), 0)
        sums = self._sums_of_recent(histories, rows, seen, plays_since)
        _carry(sums, follows, np.float32(self.discount) ** plays_since)
        vectors = np.empty_like(sums)
        vectors[order] = normalized(sums)
        return vectors

    def _sums_of_recent(
        self, histories: Histories, rows: np.ndarray, seen: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """float32 (Q, D): the discounted sum over the last counts[q] plays before each query.

        As one sparse product, so that no (P, D) array is made.
        """
        ends = np.cumsum(counts)
        ages = np.repeat(ends, counts) - np.arange(counts.sum()) - 1  # plays between this one and the query
        songs = histories.songs[np.repeat(histories.offsets[rows] + seen, counts) - ages - 1]
        known = songs < self.num_songs
        weights = np.where(known, np.float32(self.discount) ** ages, 0).astype(np.float32)
        pointers = np.concatenate([[0], ends])
        matrix = csr_matrix((weights, np.where(known, songs, 0), pointers), shape=(len(rows), self.num_songs))
        return np.asarray(matrix @ self.song_vectors, dtype=np.float32)


def _carry(sums: np.ndarray, follows: np.ndarray, decay: np.ndarray) -> None:
    """Add to each row of `sums`, in place, the finished row before it, decayed, where it `follows` that row.

    One step per query of the user who has the most, over all users at once.
    """
    starts = np.flatnonzero(~follows)
    lengths = np.diff(np.append(starts, len(follows)))
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    for step in range(1, int(lengths.max(initial=0))):
        rows = starts[: np.searchsorted(-lengths, -step)] + step
        sums[rows] += decay[rows, None] * sums[rows - 1]
