"""Popularity: every user gets the songs played most often, ever or of late."""

from collections.abc import Iterable

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.base import Horizon, Recommender

RECENT_DAYS = 21.0  # whose plays popularity-recent counts, where no validation range chooses them


class PopularityRecommender(Recommender):
    """Scores a song by its plays in the fit range, or the end of it; a song not played there scores 0.

    `plays` is int64 (N,).
    """

    def __init__(self, plays: np.ndarray, name: str = "popularity") -> None:
        self.plays, self.name = np.asarray(plays), name
        self.num_songs = len(self.plays)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, since: int | None = None
    ) -> "PopularityRecommender":
        """Count the plays, those from `since` (ms UTC) on where it is given.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        plays = np.zeros(num_songs, dtype=np.int64)
        for histories in batches:
            allowed.require(histories)
            songs = histories.songs if since is None else histories.songs[histories.played_at >= since]
            plays += np.bincount(songs, minlength=num_songs)
        return cls(plays, "popularity" if since is None else "popularity-recent")

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the plays of each song, the same read-only row for every query."""
        return np.broadcast_to(self.plays.astype(np.float32), (len(questions), self.num_songs))
