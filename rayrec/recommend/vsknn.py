"""V-SKNN, a session kNN: songs of past sessions that share songs with the last plays.

S sessions, N songs, Q queries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass

import numpy as np
from scipy.sparse import csr_matrix, vstack

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.embeddings.sessions import cut_sessions, drop_single
from rayrec.recommend.base import Horizon, Recommender

MAX_SESSIONS = 5_000_000  # kept, the latest of those read
QUERIES_AT_ONCE = 256  # a popular song is in many sessions, and all of them are compared


@dataclass(frozen=True, kw_only=True)
class VsknnSettings:
    """What is chosen for a data set on its validation range."""

    last_plays: int = 5  # that a session is compared with
    neighbours: int = 200  # nearest sessions whose songs are scored, and all that are as near as the last of them


class VsknnRecommender(Recommender):
    """V-SKNN (Ludewig and Jannach 2018): a song's score is the similarity of the nearest sessions that hold it.

    A session's similarity is the weight of the last plays it shares, 1 for the latest and falling evenly, over the
    square root of its number of songs. `sessions` is a sparse (S, N) of ones.
    """

    name = "vsknn"

    def __init__(self, sessions: csr_matrix, chosen: VsknnSettings | None = None) -> None:
        self.sessions, self.chosen = sessions, chosen or VsknnSettings()
        self.settings = asdict(self.chosen)
        self.num_songs = sessions.shape[1]
        self._holders = sessions.T.tocsr()  # (N, S)
        lengths = np.maximum(1, np.diff(sessions.indptr))
        self._damping = (1 / np.sqrt(lengths)).astype(np.float32)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, max_sessions: int = MAX_SESSIONS
    ) -> VsknnRecommender:
        """Cut histories at pauses of over 30 minutes. Raises `LeakError` for a play that `allowed` forbids.

        Of more than `max_sessions` sessions those that were read first are forgotten.
        """
        blocks, count = deque([_sessions(np.zeros(0, np.int32), np.zeros(1, np.int64), num_songs)]), 0
        for histories in batches:
            allowed.require(histories)
            blocks.append(_sessions(*drop_single(cut_sessions(histories)), num_songs))
            count += blocks[-1].shape[0]
            while count - blocks[0].shape[0] >= max_sessions:
                count -= blocks.popleft().shape[0]
        return cls(vstack(blocks, format="csr")[-max_sessions:])

    def with_settings(self, chosen: VsknnSettings) -> VsknnRecommender:
        """The same sessions under other settings."""
        other = copy(self)
        other.chosen, other.settings = chosen, asdict(chosen)
        return other

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the summed similarity of the neighbours that hold each song; 0 where none does."""
        scores = np.zeros((len(questions), self.num_songs), dtype=np.float32)
        rows, songs, back = last_plays(histories, questions, self.num_songs, self.chosen.last_plays)
        shape = (len(questions), self.num_songs)
        weights = csr_matrix(
            ((1 - back / self.chosen.last_plays).astype(np.float32), (rows, songs)), shape=shape
        )  # of one song add up
        for begin in range(0, len(questions), QUERIES_AT_ONCE):
            chunk = slice(begin, begin + QUERIES_AT_ONCE)
            (self._nearest(weights[chunk]) @ self.sessions).toarray(out=scores[chunk])
        return scores

    def _nearest(self, weights: csr_matrix) -> csr_matrix:
        """Sparse (Q, S): the similarity of the nearest sessions, from the weights of songs (Q, N)."""
        similarity: csr_matrix = (weights @ self._holders).tocsr()
        similarity.data *= self._damping[similarity.indices]
        return keep_nearest(similarity, self.chosen.neighbours)


def keep_nearest(similarity: csr_matrix, count: int) -> csr_matrix:
    """Sparse (Q, S): of each row the `count` largest entries and all that are as large as the last of them."""
    for begin, end in zip(similarity.indptr[:-1], similarity.indptr[1:], strict=True):
        if end - begin > count:
            values = similarity.data[begin:end]
            values[values < np.partition(values, -count)[-count]] = 0
    similarity.eliminate_zeros()
    return similarity


def last_plays(histories: Histories, questions: Questions, num_songs: int, limit: int) -> tuple[np.ndarray, ...]:
    """The last `limit` plays before each query as three int arrays: query, song, and plays since, from 0.

    Songs from `num_songs` on are left out.
    """
    end = histories.offsets[questions.rows] + questions.seen
    count = np.minimum(questions.seen, limit)
    starts = np.cumsum(count) - count
    place = np.arange(count.sum()) - np.repeat(starts, count)
    back = np.repeat(count, count) - 1 - place
    songs = histories.songs[np.repeat(end - count, count) + place]
    rows = np.repeat(np.arange(len(questions)), count)
    known = songs < num_songs
    return rows[known], songs[known], back[known]


def _sessions(songs: np.ndarray, offsets: np.ndarray, num_songs: int) -> csr_matrix:
    """Sparse (S, N) of ones from sessions given as songs and offsets, each song of a session once."""
    parts = (np.ones(len(songs), np.float32), songs, offsets)
    sessions = csr_matrix(parts, shape=(len(offsets) - 1, num_songs), copy=True)
    sessions.sum_duplicates()
    sessions.data[:] = 1
    return sessions
