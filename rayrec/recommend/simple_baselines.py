"""Popularity: every user gets the songs played most often, ever or of late."""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.base import BaseRecommender, Horizon
from rayrec.recommend.session_knn import last_plays
from rayrec.recommend.vector_recommender import VectorRecommender

RECENT_DAYS = 21.0  # whose plays popularity-recent counts, where no validation range chooses them
LATEST = 1_000  # plays of a user that are counted, so that long histories cost no more


class PopularityRecommender(BaseRecommender):
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


class UserTopRecommender(BaseRecommender):
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
