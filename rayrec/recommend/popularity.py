"""Popularity: every user gets the songs played most often."""

from collections.abc import Iterable

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.recommender import Horizon, Recommender


class PopularityRecommender(Recommender):
    """Scores a song by its plays in the fit range; a song never played scores 0.

    `plays` is int64 (N,).
    """

    name = "popularity"

    def __init__(self, plays: np.ndarray) -> None:
        self.plays = np.asarray(plays)
        self.num_songs = len(self.plays)

    @classmethod
    def fit(cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange) -> "PopularityRecommender":
        """Count the plays. Raises `LeakError` for a play that `allowed` forbids."""
        plays = np.zeros(num_songs, dtype=np.int64)
        for histories in batches:
            allowed.require(histories)
            plays += np.bincount(histories.songs, minlength=num_songs)
        return cls(plays)

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the plays of each song, the same read-only row for every question."""
        return np.broadcast_to(self.plays.astype(np.float32), (len(questions), self.num_songs))
