"""Own rules: what followed the last song when this user played it before.

P plays, N songs, Q questions.
"""

from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import Horizon, Recommender
from rayrec.recommend.item_knn import last_songs
from rayrec.recommend.sequential_rules import MAX_DISTANCE


class OwnRulesRecommender(Recommender):
    """Sequential rules from the user's own history alone: how a listener replays an album or a list [ours].

    Nothing is fitted: the plays before a question hold all that it needs.
    """

    name = "own-rules"

    def __init__(self, num_songs: int) -> None:
        self.num_songs = num_songs

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): Σ 1/distance over earlier plays of the last song and the plays up to 10 after each."""
        rows, inverse = np.unique(questions.rows, return_inverse=True)
        histories, questions = histories.take(rows), replace(questions, rows=inverse)  # a chunk asks of few users
        asked, plays = self._earlier(histories, questions)
        end = (histories.offsets[questions.rows] + questions.seen)[asked]
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for distance in range(1, MAX_DISTANCE + 1):
            inside = plays + distance < end
            rows, songs = asked[inside], histories.songs[plays[inside] + distance]
            known = songs < self.num_songs
            weights = np.full(int(known.sum()), 1 / distance, dtype=np.float32)
            parts.append((weights, rows[known], songs[known]))
        weights, rows, songs = (np.concatenate(values) for values in zip(*parts, strict=True))
        shape = (len(questions), self.num_songs)
        scores: np.ndarray = coo_matrix((weights, (rows, songs)), shape=shape).toarray()
        return scores

    def _earlier(self, histories: Histories, questions: Questions) -> tuple[np.ndarray, np.ndarray]:
        """Questions, int64 (E,), and the earlier plays, int64 (E,), of the song played last before each."""
        last = last_songs(histories, questions, self.num_songs)
        keys = histories.rows * self.num_songs + np.minimum(histories.songs, self.num_songs - 1)
        order = np.argsort(keys, kind="stable")  # plays of one user and song together, in the order of time
        wanted = questions.rows * self.num_songs + last
        first = np.searchsorted(keys[order], wanted, side="left")
        count = np.where(last >= 0, np.searchsorted(keys[order], wanted, side="right") - first, 0)
        asked = np.repeat(np.arange(len(questions)), count)
        place = np.arange(len(asked)) - np.repeat(np.cumsum(count) - count, count)
        plays = order[np.repeat(first, count) + place]
        newest = (histories.offsets[questions.rows] + questions.seen - 1)[asked]
        earlier = (plays < newest) & (histories.songs[plays] == last[asked])
        return asked[earlier], plays[earlier]
