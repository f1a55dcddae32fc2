"""Session neighbours: songs of past sessions that share songs with the last plays.

S sessions, N songs, Q questions.
"""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.recommender import Horizon, Recommender
from rayrec.songs.sessions import cut_sessions, drop_single

LAST_PLAYS = 5  # that a session is compared with; 10 and 20 found fewer of the next songs on 30Music
NEIGHBOURS = 200  # sessions that speak, the nearest
MAX_SESSIONS = 5_000_000  # kept, the latest of those read


class SessionNeighboursRecommender(Recommender):
    """V-SKNN (Ludewig and Jannach 2018): a song's score is the similarity of the nearest sessions that hold it.

    A session's similarity is the weight of the last plays it shares, 1 for the latest and falling
    evenly to 1/5, over the square root of its number of songs. `sessions` is a sparse (S, N) of
    ones.
    """

    name = "session-neighbours"

    def __init__(self, sessions: csr_matrix) -> None:
        self.sessions = sessions
        self.num_songs = sessions.shape[1]
        self._holders = sessions.T.tocsr()  # (N, S)
        lengths = np.maximum(1, np.diff(sessions.indptr))
        self._damping = (1 / np.sqrt(lengths)).astype(np.float32)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, max_sessions: int = MAX_SESSIONS
    ) -> "SessionNeighboursRecommender":
        """Cut histories at pauses of over 30 minutes. Raises `LeakError` for a play that `allowed` forbids.

        Of more than `max_sessions` sessions those that were read first are forgotten.
        """
        kept = _sessions([], num_songs)
        for histories in batches:
            allowed.require(histories)
            songs, offsets = drop_single(cut_sessions(histories))
            parts = [(kept.indices, kept.indptr), (songs, offsets)]
            kept = _sessions(parts, num_songs)[-max_sessions:]
        return cls(kept)

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the summed similarity of the neighbours that hold each song; 0 where none does."""
        similarity = (self._weights(histories, questions) @ self._holders).tocsr()
        similarity.data *= self._damping[similarity.indices]
        for begin, end in zip(similarity.indptr[:-1], similarity.indptr[1:], strict=True):
            if end - begin > NEIGHBOURS:
                values = similarity.data[begin:end]
                values[values < np.partition(values, -NEIGHBOURS)[-NEIGHBOURS]] = 0
        scores: np.ndarray = (similarity @ self.sessions).toarray()
        return scores

    def _weights(self, histories: Histories, questions: Questions) -> csr_matrix:
        """Sparse (Q, N): the weight of each of the last plays before a question; a repeated song adds up."""
        end = histories.offsets[questions.rows] + questions.seen
        count = np.minimum(questions.seen, LAST_PLAYS)
        starts = np.cumsum(count) - count
        place = np.arange(count.sum()) - np.repeat(starts, count)
        back = np.repeat(count, count) - 1 - place
        songs = histories.songs[np.repeat(end - count, count) + place]
        weights = (1 - back / LAST_PLAYS).astype(np.float32)
        rows = np.repeat(np.arange(len(questions)), count)
        known = songs < self.num_songs
        return csr_matrix((weights[known], (rows[known], songs[known])), shape=(len(questions), self.num_songs))


def _sessions(parts: list[tuple[np.ndarray, np.ndarray]], num_songs: int) -> csr_matrix:
    """Sparse (S, N) of ones from sessions given as songs and offsets, each song of a session once."""
    lengths = [np.diff(offsets) for _, offsets in parts]
    rows = np.repeat(np.arange(sum(map(len, lengths))), np.concatenate([np.zeros(0, np.int64), *lengths]))
    songs = np.concatenate([np.zeros(0, np.int32), *(songs for songs, _ in parts)])
    sessions = csr_matrix((np.ones(len(songs), np.float32), (rows, songs)), shape=(sum(map(len, lengths)), num_songs))
    sessions.sum_duplicates()
    sessions.data[:] = 1
    return sessions
