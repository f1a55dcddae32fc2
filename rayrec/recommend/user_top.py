"""User top: the songs that the user has played most."""

import numpy as np
from scipy.sparse import coo_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import Horizon, Recommender
from rayrec.recommend.vsknn import last_plays

LATEST = 1_000  # plays of a user that are counted, so that long histories cost no more


class UserTopRecommender(Recommender):
    """How often the user has played each song of late: P-TopFreq of next-basket research (Li et al. 2023).

    Nothing is fitted: the plays before a query hold all that it needs.
    """

    name = "user-top"

    def __init__(self, num_songs: int) -> None:
        self.num_songs = num_songs

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): times that each song is among the last 1,000 plays."""
        rows, songs, _ = last_plays(histories, questions, self.num_songs, LATEST)
        once = np.ones(len(rows), dtype=np.float32)
        counts: np.ndarray = coo_matrix((once, (rows, songs)), shape=(len(questions), self.num_songs)).toarray()
        return counts
