"""Item kNN: the songs whose embeddings are nearest to that of the last song."""

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import Horizon
from rayrec.recommend.vector_recommender import VectorRecommender


class ItemKnnRecommender(VectorRecommender):
    """The taste vector is the vector of the last song played: item-to-item in the space of the songs."""

    name = "item-knn"

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the last song's vector; zeros where there is no play, or the song has no vector."""
        last = last_songs(histories, questions, self.num_songs)
        return np.where(last[:, None] >= 0, self.song_vectors[last], np.float32(0))


def last_songs(histories: Histories, questions: Questions, num_songs: int) -> np.ndarray:
    """int64 (Q,): the last song played before each query, -1 where there is none among the first `num_songs`."""
    last = np.full(len(questions), -1, dtype=np.int64)
    asked = questions.seen > 0
    last[asked] = histories.songs[histories.offsets[questions.rows[asked]] + questions.seen[asked] - 1]
    last[last >= num_songs] = -1
    return last
