"""Session kNN: V-SKNN and V-STAN."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, vstack

from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import ranges
from rayrec.data.split import DAY_MS, FitRange
from rayrec.embeddings.word2vec import cut_sessions, drop_single
from rayrec.recommend.base import BaseRecommender, HorizonName

MAX_SESSIONS = 5_000_000  # maximum sessions kept: the last ones that were read
QUERIES_AT_ONCE = 256  # queries scored at once; limits memory, since a popular song is in many sessions


@dataclass(frozen=True, kw_only=True)
class VsknnSettings:
    """Settings of V-SKNN that are chosen for a data set on its validation range."""

    last_plays: int = 5  # number of last plays that are compared with sessions
    neighbors: int = 200  # nearest sessions whose songs are scored; ties with the last of them are included


class VsknnRecommender(BaseRecommender):
    """V-SKNN (Ludewig and Jannach 2018): a song's score is the summed similarity of the nearest sessions that hold it.

    A session's similarity is the summed weight of the last plays that it shares, divided by the square root of its
    number of songs. The weight of a play is 1 for the latest and falls linearly. `sessions` is a sparse (S, N) matrix
    of ones: S sessions, N songs.
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
        """Cut histories into sessions at pauses of more than 30 minutes and keep the last `max_sessions` sessions read.

        Raises `LeakError` for a play that `allowed` forbids.
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
        """Return a recommender with the same sessions and other settings."""
        other = copy(self)
        other.chosen, other.settings = chosen, asdict(chosen)
        return other

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the summed similarity of the neighbors that hold each song; 0 if none does."""
        scores = np.zeros((len(queries), self.num_songs), dtype=np.float32)
        rows, songs, back = last_plays(histories, queries, self.num_songs, self.chosen.last_plays)
        shape = (len(queries), self.num_songs)
        weights = csr_matrix(
            ((1 - back / self.chosen.last_plays).astype(np.float32), (rows, songs)), shape=shape
        )  # weights of the same song add up
        for begin in range(0, len(queries), QUERIES_AT_ONCE):
            chunk = slice(begin, begin + QUERIES_AT_ONCE)
            (self._nearest(weights[chunk]) @ self.sessions).toarray(out=scores[chunk])
        return scores

    def _nearest(self, weights: csr_matrix) -> csr_matrix:
        """Sparse (Q, S): the similarity of the nearest sessions, from the weights of songs (Q, N)."""
        similarity: csr_matrix = (weights @ self._holders).tocsr()
        similarity.data *= self._damping[similarity.indices]
        return keep_nearest(similarity, self.chosen.neighbors)


def keep_nearest(similarity: csr_matrix, count: int) -> csr_matrix:
    """Keep the `count` largest entries of each row of a sparse (Q, S) matrix, and ties with the smallest of them.

    Changes `similarity` in place and returns it.
    """
    for begin, end in zip(similarity.indptr[:-1], similarity.indptr[1:], strict=True):
        if end - begin > count:
            values = similarity.data[begin:end]
            values[values < np.partition(values, -count)[-count]] = 0
    similarity.eliminate_zeros()
    return similarity


def last_plays(histories: Histories, queries: Queries, num_songs: int, limit: int) -> tuple[np.ndarray, ...]:
    """Return the last `limit` plays before each query as three int arrays: query, song, and number of later plays.

    Songs with rows from `num_songs` on are left out.
    """
    count = np.minimum(queries.seen, limit)
    back = np.repeat(count, count) - 1 - ranges(0, count)
    songs = histories.songs[ranges(histories.offsets[queries.rows] + queries.seen - count, count)]
    rows = np.repeat(np.arange(len(queries)), count)
    known = songs < num_songs
    return rows[known], songs[known], back[known]


def _sessions(songs: np.ndarray, offsets: np.ndarray, num_songs: int) -> csr_matrix:
    """Sparse (S, N) of ones: the songs of sessions given as songs and offsets; repeats in a session count once."""
    parts = (np.ones(len(songs), np.float32), songs, offsets)
    sessions = csr_matrix(parts, shape=(len(offsets) - 1, num_songs), copy=True)
    sessions.sum_duplicates()
    sessions.data[:] = 1
    return sessions


@dataclass(frozen=True, kw_only=True)
class VstanSettings:
    """Settings of V-STAN that are chosen for a data set on its validation range."""

    last_plays: int = 10  # number of last plays that are compared with sessions
    neighbors: int = 200  # nearest sessions whose songs are scored; ties with the last of them are included
    plays_decay: float = 2.0  # age of a play, in later plays, at which its weight is 1/e
    days_decay: float = 365.0  # age of a session, in days, at which its weight is 1/e
    places_decay: float = 5.0  # distance from the matched song, in places, at which a song's weight is 1/e
    just_played: float = 0.25  # factor of the weight of a song that is among the last plays


class VstanRecommender(BaseRecommender):
    """V-STAN (Ludewig et al. 2020, arXiv:2011.03424), after STAN (Garg et al. 2019).

    A session's similarity is the summed weight of the last plays that it shares, divided by the square root of its
    number of songs. Older plays weigh less, and so do older sessions. A song's score is the summed similarity of the
    nearest sessions that hold it; a session counts less the farther the song is from the matched song, which is the
    song of the session that the user played most recently. The idf weight of the paper is left out, since it changed
    nothing. The lower weight of songs just played is [ours].
    """

    name = "vstan"

    def __init__(self, sessions: csr_matrix, ended_at: np.ndarray, chosen: VstanSettings | None = None) -> None:
        """`sessions`, sparse float32 (S, N), holds the place of each song in a session, from 1.

        `ended_at`, int64 (S,), is the time of each session's last play, ms UTC.
        """
        self.sessions, self.ended_at, self.chosen = sessions, ended_at, chosen or VstanSettings()
        self.settings = asdict(self.chosen)
        self.num_songs = sessions.shape[1]
        ones = (np.ones(sessions.nnz, np.float32), sessions.indices, sessions.indptr)
        self._holders = csr_matrix(ones, shape=sessions.shape).T.tocsr()  # (N, S)
        lengths = np.maximum(1, np.diff(sessions.indptr))
        self._damping = (1 / np.sqrt(lengths)).astype(np.float32)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, max_sessions: int = MAX_SESSIONS
    ) -> VstanRecommender:
        """Cut histories into sessions at pauses of more than 30 minutes and keep the last `max_sessions` sessions read.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        blocks = deque([_places(np.zeros(0, np.int32), np.zeros(1, np.int64), num_songs)])
        times, count = deque([np.zeros(0, np.int64)]), 0
        for histories in batches:
            allowed.require(histories)
            songs, cuts = cut_sessions(histories)
            blocks.append(_places(*drop_single((songs, cuts)), num_songs))
            played_at, offsets = drop_single((histories.played_at, cuts))
            times.append(played_at[offsets[1:] - 1])
            count += len(times[-1])
            while count - len(times[0]) >= max_sessions:
                count -= len(times.popleft())
                blocks.popleft()
        return cls(vstack(blocks, format="csr")[-max_sessions:], np.concatenate(times)[-max_sessions:])

    def with_settings(self, chosen: VstanSettings) -> VstanRecommender:
        """Return a recommender with the same sessions and other settings."""
        other = copy(self)
        other.chosen, other.settings = chosen, asdict(chosen)
        return other

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the summed weight of each song in the neighbors that hold it; 0 if none does."""
        scores = np.zeros((len(queries), self.num_songs), dtype=np.float32)
        for begin in range(0, len(queries), QUERIES_AT_ONCE):
            chunk = slice(begin, begin + QUERIES_AT_ONCE)
            some, chosen = queries.take(chunk), self.chosen
            rows, songs, back = last_plays(histories, some, self.num_songs, chosen.last_plays)
            shape = (len(some), self.num_songs)
            decayed = np.exp(-back / chosen.plays_decay).astype(np.float32)
            weights = csr_matrix((decayed, (rows, songs)), shape=shape)
            since = np.full(shape, chosen.last_plays, dtype=np.uint8)  # plays after each song, or `last_plays`
            np.minimum.at(since, (rows, songs), back.astype(np.uint8))
            self._weigh_songs(self._nearest(weights, some.at), since).toarray(out=scores[chunk])
        return scores

    def _nearest(self, weights: csr_matrix, at: np.ndarray) -> csr_matrix:
        """Sparse (Q, S): the similarity of the nearest sessions, from the weights of songs (Q, N)."""
        similarity: csr_matrix = (weights @ self._holders).tocsr()
        age = np.repeat(at, np.diff(similarity.indptr)) - self.ended_at[similarity.indices]
        recency = np.exp(-np.maximum(0, age) / (self.chosen.days_decay * DAY_MS)).astype(np.float32)
        similarity.data *= self._damping[similarity.indices] * recency
        return keep_nearest(similarity, self.chosen.neighbors)

    def _weigh_songs(self, nearest: csr_matrix, since: np.ndarray) -> coo_matrix:
        """Sparse (Q, N): the weights of the songs of the nearest sessions (Q, S).

        `since`, uint8 (Q, N), is the number of plays after each song's last play. Suffixes: B entries of `nearest`, E
        songs of their sessions.
        """
        if not nearest.nnz:
            return coo_matrix(since.shape, dtype=np.float32)
        lengths = np.diff(self.sessions.indptr)[nearest.indices]
        first_B = np.cumsum(lengths) - lengths
        pair_E = np.repeat(np.arange(nearest.nnz), lengths)
        entry_E = np.arange(len(pair_E)) + (self.sessions.indptr[nearest.indices] - first_B)[pair_E]
        songs_E, places_E = self.sessions.indices[entry_E], self.sessions.data[entry_E]
        rows_E = np.repeat(np.arange(nearest.shape[0]), np.diff(nearest.indptr))[pair_E]
        since_E = since[rows_E, songs_E]
        matched_B = np.zeros(nearest.nnz, np.float32)
        is_match = since_E == np.minimum.reduceat(since_E, first_B)[pair_E]  # one each: a song is in a session once
        matched_B[pair_E[is_match]] = places_E[is_match]
        apart_E = np.abs(places_E - matched_B[pair_E])
        weights_E = nearest.data[pair_E] * np.exp(-apart_E / np.float32(self.chosen.places_decay))
        weights_E *= np.where(since_E < self.chosen.last_plays, np.float32(self.chosen.just_played), np.float32(1))
        return coo_matrix((weights_E, (rows_E, songs_E)), shape=since.shape)


def _places(songs: np.ndarray, offsets: np.ndarray, num_songs: int) -> csr_matrix:
    """Sparse float32 (S, N): the place of each song in its session, from 1; the last place if it is played again."""
    lengths = np.diff(offsets)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    order = np.lexsort((np.arange(len(songs)), songs, rows))
    last = np.ones(len(order), dtype=bool)
    last[:-1] = (np.diff(rows[order]) != 0) | (np.diff(songs[order]) != 0)
    last_of_song = order[last]
    places = (last_of_song - offsets[rows[last_of_song]] + 1).astype(np.float32)
    return csr_matrix((places, (rows[last_of_song], songs[last_of_song])), shape=(len(lengths), num_songs))
