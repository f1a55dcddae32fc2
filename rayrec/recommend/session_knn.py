"""Session kNN: V-SKNN and V-STAN."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from copy import copy
from dataclasses import asdict, dataclass

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix, vstack

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.ragged import group_of_each_item, ranges
from rayrec.data.split import FitRange
from rayrec.embeddings.word2vec import cut_sessions, drop_short_sentences
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
    number of songs. The weight of a play is 1 for the latest and falls linearly. The authors' code also weights each
    session by the place of the latest play that it shares; this is left out. `sessions` is a sparse (S, N) matrix
    of ones: S sessions, N songs.
    """

    name = "vsknn"

    def __init__(self, sessions: csr_matrix, settings: VsknnSettings | None = None) -> None:
        self.sessions, self.tuning = sessions, settings or VsknnSettings()
        self.settings = asdict(self.tuning)
        self.num_songs = sessions.shape[1]
        self._sessions_of_songs = sessions.T.tocsr()  # (N, S)
        lengths = np.maximum(1, np.diff(sessions.indptr))
        self._length_factors = (1 / np.sqrt(lengths)).astype(np.float32)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, max_sessions: int = MAX_SESSIONS
    ) -> VsknnRecommender:
        """Cut histories into sessions at pauses of more than 30 minutes and keep the last `max_sessions` sessions read.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        blocks, count = deque([_session_matrix(np.zeros(0, np.int32), np.zeros(1, np.int64), num_songs)]), 0
        for histories in batches:
            allowed.require(histories)
            blocks.append(_session_matrix(*drop_short_sentences(cut_sessions(histories)), num_songs))
            count += blocks[-1].shape[0]
            while count - blocks[0].shape[0] >= max_sessions:
                count -= blocks.popleft().shape[0]
        return cls(vstack(blocks, format="csr")[-max_sessions:])

    def with_settings(self, settings: VsknnSettings) -> VsknnRecommender:
        """Return a recommender with the same sessions and other settings."""
        recommender = copy(self)
        recommender.tuning, recommender.settings = settings, asdict(settings)
        return recommender

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the summed similarity of the neighbors that hold each song; 0 if none does."""
        scores = np.zeros((len(queries), self.num_songs), dtype=np.float32)
        rows, songs, later_plays = last_plays(histories, queries, self.num_songs, self.tuning.last_plays)
        shape = (len(queries), self.num_songs)
        # weights of the same song add up
        weights = csr_matrix(
            ((1 - later_plays / self.tuning.last_plays).astype(np.float32), (rows, songs)), shape=shape
        )
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            chunk = slice(start, start + QUERIES_AT_ONCE)
            (self._nearest(weights[chunk]) @ self.sessions).toarray(out=scores[chunk])
        return scores

    def _nearest(self, weights: csr_matrix) -> csr_matrix:
        """Sparse (Q, S): the similarity of the nearest sessions, from the weights of songs (Q, N)."""
        similarity: csr_matrix = (weights @ self._sessions_of_songs).tocsr()
        similarity.data *= self._length_factors[similarity.indices]
        return keep_nearest(similarity, self.tuning.neighbors)


def keep_nearest(similarity: csr_matrix, count: int) -> csr_matrix:
    """Keep the `count` largest entries of each row of a sparse (Q, S) matrix, and ties with the smallest of them.

    Changes `similarity` in place and returns it.
    """
    for start, end in zip(similarity.indptr[:-1], similarity.indptr[1:], strict=True):
        if end - start > count:
            values = similarity.data[start:end]
            values[values < np.partition(values, -count)[-count]] = 0
    similarity.eliminate_zeros()
    return similarity


def last_plays(histories: Histories, queries: Queries, num_songs: int, limit: int) -> tuple[np.ndarray, ...]:
    """Return the last `limit` plays before each query as three int arrays: query, song, and number of later plays.

    Songs with rows from `num_songs` on are left out.
    """
    counts = np.minimum(queries.plays_before, limit)
    later_plays = np.repeat(counts, counts) - 1 - ranges(0, counts)
    songs = histories.songs[ranges(histories.offsets[queries.rows] + queries.plays_before - counts, counts)]
    rows = group_of_each_item(counts)
    is_known = songs < num_songs
    return rows[is_known], songs[is_known], later_plays[is_known]


def _session_matrix(songs: np.ndarray, offsets: np.ndarray, num_songs: int) -> csr_matrix:
    """Sparse (S, N) of ones: the songs of sessions given as songs and offsets; repeats in a session count once."""
    arrays = (np.ones(len(songs), np.float32), songs, offsets)
    sessions = csr_matrix(arrays, shape=(len(offsets) - 1, num_songs), copy=True)
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
    distance_decay: float = 5.0  # distance from the matched song, in places, at which a song's weight is 1/e
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

    def __init__(self, sessions: csr_matrix, ended_at: np.ndarray, settings: VstanSettings | None = None) -> None:
        """`sessions`, sparse float32 (S, N), holds the place of each song in a session, from 1.

        `ended_at`, int64 (S,), is the time of each session's last play, ms UTC.
        """
        self.sessions, self.ended_at, self.tuning = sessions, ended_at, settings or VstanSettings()
        self.settings = asdict(self.tuning)
        self.num_songs = sessions.shape[1]
        arrays = (np.ones(sessions.nnz, np.float32), sessions.indices, sessions.indptr)
        self._sessions_of_songs = csr_matrix(arrays, shape=sessions.shape).T.tocsr()  # (N, S)
        lengths = np.maximum(1, np.diff(sessions.indptr))
        self._length_factors = (1 / np.sqrt(lengths)).astype(np.float32)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, max_sessions: int = MAX_SESSIONS
    ) -> VstanRecommender:
        """Cut histories into sessions at pauses of more than 30 minutes and keep the last `max_sessions` sessions read.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        blocks = deque([_position_matrix(np.zeros(0, np.int32), np.zeros(1, np.int64), num_songs)])
        end_times, count = deque([np.zeros(0, np.int64)]), 0
        for histories in batches:
            allowed.require(histories)
            songs, cuts = cut_sessions(histories)
            blocks.append(_position_matrix(*drop_short_sentences((songs, cuts)), num_songs))
            played_at, offsets = drop_short_sentences((histories.played_at, cuts))
            end_times.append(played_at[offsets[1:] - 1])
            count += len(end_times[-1])
            while count - len(end_times[0]) >= max_sessions:
                count -= len(end_times.popleft())
                blocks.popleft()
        return cls(vstack(blocks, format="csr")[-max_sessions:], np.concatenate(end_times)[-max_sessions:])

    def with_settings(self, settings: VstanSettings) -> VstanRecommender:
        """Return a recommender with the same sessions and other settings."""
        recommender = copy(self)
        recommender.tuning, recommender.settings = settings, asdict(settings)
        return recommender

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the summed weight of each song in the neighbors that hold it; 0 if none does."""
        scores = np.zeros((len(queries), self.num_songs), dtype=np.float32)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            chunk = slice(start, start + QUERIES_AT_ONCE)
            chunk_queries, settings = queries.take(chunk), self.tuning
            rows, songs, later_plays = last_plays(histories, chunk_queries, self.num_songs, settings.last_plays)
            shape = (len(chunk_queries), self.num_songs)
            play_weights = np.exp(-later_plays / settings.plays_decay).astype(np.float32)
            weights = csr_matrix((play_weights, (rows, songs)), shape=shape)
            plays_since = np.full(shape, settings.last_plays, dtype=np.uint8)  # plays after each song, or `last_plays`
            np.minimum.at(plays_since, (rows, songs), later_plays.astype(np.uint8))
            self._weigh_songs(self._nearest(weights, chunk_queries.at), plays_since).toarray(out=scores[chunk])
        return scores

    def _nearest(self, weights: csr_matrix, at: np.ndarray) -> csr_matrix:
        """Sparse (Q, S): the similarity of the nearest sessions, from the weights of songs (Q, N)."""
        similarity: csr_matrix = (weights @ self._sessions_of_songs).tocsr()
        ages = np.repeat(at, np.diff(similarity.indptr)) - self.ended_at[similarity.indices]
        age_factors = np.exp(-np.maximum(0, ages) / (self.tuning.days_decay * DAY_MS)).astype(np.float32)
        similarity.data *= self._length_factors[similarity.indices] * age_factors
        return keep_nearest(similarity, self.tuning.neighbors)

    def _weigh_songs(self, nearest: csr_matrix, plays_since: np.ndarray) -> coo_matrix:
        """Sparse (Q, N): the weights of the songs of the nearest sessions (Q, S).

        `plays_since`, uint8 (Q, N), is the number of plays after each song's last play. Suffixes: B entries of
        `nearest`, E songs of their sessions.
        """
        if not nearest.nnz:
            return coo_matrix(plays_since.shape, dtype=np.float32)
        lengths = np.diff(self.sessions.indptr)[nearest.indices]
        start_B = np.cumsum(lengths) - lengths
        neighbor_E = group_of_each_item(lengths)
        entry_E = np.arange(len(neighbor_E)) + (self.sessions.indptr[nearest.indices] - start_B)[neighbor_E]
        song_E, position_E = self.sessions.indices[entry_E], self.sessions.data[entry_E]
        row_E = group_of_each_item(np.diff(nearest.indptr))[neighbor_E]
        plays_since_E = plays_since[row_E, song_E]
        matched_position_B = np.zeros(nearest.nnz, np.float32)
        # One match per session: a song is in a session once.
        is_match = plays_since_E == np.minimum.reduceat(plays_since_E, start_B)[neighbor_E]
        matched_position_B[neighbor_E[is_match]] = position_E[is_match]
        distance_E = np.abs(position_E - matched_position_B[neighbor_E])
        weight_E = nearest.data[neighbor_E] * np.exp(-distance_E / np.float32(self.tuning.distance_decay))
        weight_E *= np.where(plays_since_E < self.tuning.last_plays, np.float32(self.tuning.just_played), np.float32(1))
        return coo_matrix((weight_E, (row_E, song_E)), shape=plays_since.shape)


def _position_matrix(songs: np.ndarray, offsets: np.ndarray, num_songs: int) -> csr_matrix:
    """Sparse float32 (S, N): the place of each song in its session, from 1; the last place if it is played again."""
    lengths = np.diff(offsets)
    rows = group_of_each_item(lengths)
    order = np.lexsort((np.arange(len(songs)), songs, rows))
    is_last = np.ones(len(order), dtype=bool)
    is_last[:-1] = (np.diff(rows[order]) != 0) | (np.diff(songs[order]) != 0)
    last_of_song = order[is_last]
    positions = (last_of_song - offsets[rows[last_of_song]] + 1).astype(np.float32)
    return csr_matrix((positions, (rows[last_of_song], songs[last_of_song])), shape=(len(lengths), num_songs))
