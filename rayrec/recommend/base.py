"""The base classes of all recommenders, and the batch of queries that retrievers and features read.

A recommender scores every song (`BaseRecommender`), only candidates (`CandidateRecommender`), or compares song vectors
with a taste vector (`VectorRecommender`). A `QueryBatch` holds the plays before each query and the songs in them,
computed once.

Shapes: Q queries, U users, N songs, k answers, D dimensions, C candidates of all queries together, E plays of all
queries together, P pairs of a query and a song that its user has played.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import ASSUMED_GAP_MS, HOUR_MS, LINE_GAP_MS
from rayrec.data.ragged import (
    find_in_groups,
    group_of_each_item,
    group_sizes,
    group_starts,
    offsets_of,
    ranges,
    stable_order,
    sum_groups,
)
from rayrec.data.top_k import top_k
from rayrec.errors import InputError
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.filters import AnswerFilter, without_heard

if TYPE_CHECKING:
    from rayrec.recommend.index import SongIndex

HorizonName = Literal["short", "long"]


def weight_of_long(horizon: object) -> float:
    """Return the weight of the long horizon: 0 for "short", 1 for "long", a number from 0 to 1 unchanged.

    The number mixes both horizons and may also be given as text. Raises `ValueError` for anything else.
    """
    if horizon in ("short", "long"):
        return float(horizon == "long")
    try:
        weight = float(horizon) if isinstance(horizon, str | int | float) and not isinstance(horizon, bool) else -1.0
    except (ValueError, OverflowError):  # a whole number may be too large for a float
        weight = -1.0
    if not 0 <= weight <= 1:
        raise ValueError("expected short, long, or a number from 0 to 1")
    return weight


Kind = Literal["baseline", "network"]
# How an answer was found. index: a search of the index, filtered afterwards; selector: a search of the index limited
# to songs that pass the filter; exact: a score for every song that passes the filter.
SearchPath = Literal["index", "selector", "exact"]

# Maximum float32 scores in memory at once: 8 MiB, which fit into a CPU cache, or 64 MiB for at most QUERIES_PER_PASS
# queries, which share one pass over the songs.
SCORES_IN_CACHE, SCORES_PER_CHUNK = 1 << 21, 1 << 24
QUERIES_PER_PASS = 64
NO_SONG = -1  # fills answers of fewer than k songs

LATEST_PLAYS = 5_000  # latest plays before a query that retrievers and features read
LATEST_LIKES = 1_000  # latest likes before a query that features read
SESSION_GAP_MS = HOUR_MS // 2  # a longer pause ends a session
ACTIVATION_DECAY = 0.5  # exponent of the base level of ACT-R: a play of age t counts t^-0.5


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answers to Q queries, best song first, padded with -1 and -inf if fewer than k songs pass the filter."""

    songs: np.ndarray  # int32 (Q, k), song rows
    scores: np.ndarray  # float32 (Q, k), descending
    paths: tuple[SearchPath, ...]  # (Q,), how each answer was found
    filled: np.ndarray  # int64 (Q,), songs at the end that no retriever proposed; 0 without retrievers

    @classmethod
    def empty(cls, num_queries: int, k: int, path: SearchPath = "exact") -> Ranking:
        """Return answers without songs, to be filled in by the caller."""
        return cls(
            songs=np.full((num_queries, k), NO_SONG, dtype=np.int32),
            scores=np.full((num_queries, k), -np.inf, dtype=np.float32),
            paths=(path,) * num_queries,
            filled=np.zeros(num_queries, dtype=np.int64),
        )


class BaseRecommender(ABC):
    """Base class of all recommenders: scores songs for users at a moment.

    Subclasses implement `score`, and `rank` sorts songs by it. A subclass may override `rank` with a faster method
    that returns the same answer. A song with a score of -inf is never recommended.
    """

    name: str  # as in reports and `--models`
    kind: ClassVar[Kind] = "baseline"
    horizons: tuple[HorizonName, ...] = ("short",)  # horizons that have answers of their own
    scores_are_probabilities: ClassVar[bool] = False  # True if short-horizon scores are probabilities of the next play
    long_days: DaysHorizon | None = None  # days that the long horizon predicts; None if it is not in days
    num_songs: int  # N
    settings: Mapping[str, float] = {}  # settings chosen for the data set, by name
    without: str = ""  # in an ablation, the part that is left out
    added_songs: np.ndarray = np.zeros(0, dtype=np.int64)  # rows of songs that it recommends without a play in training

    @abstractmethod
    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the score of every song, computed only from the plays before each query."""

    def score_chunks(
        self, histories: Histories, queries: Queries, horizon: HorizonName = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield slices of the queries with their rows of `score`, so that few scores are in memory at once.

        A subclass may share work between the slices. The arrays may be read-only.
        """
        for chunk in chunks_of(len(queries), self.num_songs):
            yield chunk, self.score(histories, queries.take(chunk), horizon)

    def rank(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: HorizonName = "short",
        filters: Sequence[AnswerFilter] | None = None,
    ) -> Ranking:
        """Return the k best songs of each user among those that pass the user's filter, and how they were found.

        `at` (ms UTC) is the moment of the request: one for all users, or one per user. An answer has exactly k songs
        if at least k pass the filter; songs with equal scores are sorted by row. Raises `InputError`
        for k below 1.
        """
        check_count(k)
        queries = Queries.at_end(histories, at)
        ranking = Ranking.empty(len(queries), k)
        for chunk, chunk_scores in self.score_chunks(histories, queries, horizon):
            scores = np.array(chunk_scores)
            if filters is not None:
                for query_scores, answer_filter in zip(scores, filters[chunk], strict=True):
                    answer_filter.mask_scores(query_scores)
            ranking.songs[chunk], ranking.scores[chunk] = top_k(scores, k)
        return ranking

    def recommend(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: HorizonName = "short",
        exclude_heard: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best songs of each user, without the songs of the history if `exclude_heard`.

        Other parameters are those of `rank`. Returns song rows int32 (U, k) and scores float32 (U, k), padded with -1
        and -inf if fewer than k songs remain. Raises `InputError` for k below 1.
        """
        filters = without_heard(histories) if exclude_heard else None
        ranking = self.rank(histories, at, k, horizon=horizon, filters=filters)
        return ranking.songs, ranking.scores

    def explain(
        self,
        history: Histories,
        at: int,
        songs: np.ndarray,
        *,
        long_weight: float = 0.0,
        vectors: Mapping[HorizonName, np.ndarray] | None = None,
    ) -> list[dict[str, float]]:
        """Return the features of each of `songs`, int (n,) rows, for one user at `at` (ms UTC): name -> value.

        `reasons` turns them into words. A recommender without features returns {} for each song. `long_weight` is the
        weight of the long horizon in the answer. `vectors`, float32 (1, D) by horizon, are the taste vectors, if they
        are already computed.
        """
        return [{} for _ in songs]

    def recommend_one(
        self,
        history: Histories,
        at: int,
        k: int,
        *,
        horizon: HorizonName = "short",
        exclude_heard: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend` for a single user: returns song rows int32 and scores float32, 1-D, at most k of each."""
        if len(history) != 1:
            raise ValueError(f"recommend_one expects the history of one user, got {len(history)} histories")
        songs, scores = self.recommend(history, at, k, horizon=horizon, exclude_heard=exclude_heard)
        is_song = songs[0] != NO_SONG
        return songs[0][is_song], scores[0][is_song]


@dataclass(frozen=True, kw_only=True)
class ScoredCandidates:
    """The candidates of a slice of queries, C in total, and their scores."""

    rows: np.ndarray  # int64 (C,), the query of each candidate, from 0 for the first query of the slice
    songs: np.ndarray  # int64 (C,), song rows, each at most once per query
    # (horizon, True to leave out songs that the user has heard) -> float (C,), the scores.
    scores: Callable[[HorizonName, bool], np.ndarray]
    retrievers: Mapping[str, np.ndarray]  # name -> int64, positions of the candidates that the retriever proposes


class CandidateRecommender(BaseRecommender):
    """Base class of recommenders that score a few candidates of each query; other songs have no score."""

    retrievers: tuple[str, ...]  # names of the retrievers that propose the candidates

    @abstractmethod
    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """Yield slices of the queries, in order, with their candidates, so that few are in memory at once."""

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the scores of the candidates, -inf for all other songs. For small catalogs."""
        scores = np.full((len(queries), self.num_songs), -np.inf, dtype=np.float32)
        for chunk, candidates in self.candidate_chunks(histories, queries):
            scores[(chunk.start or 0) + candidates.rows, candidates.songs] = candidates.scores(horizon, False)
        return scores


def check_count(k: int) -> None:
    """Raise `InputError` if the number of songs is below 1."""
    if k < 1:
        raise InputError(f"k is {k}; expected at least 1")


def chunks_of(num_queries: int, num_songs: int) -> Iterator[slice]:
    """Yield slices of the queries, in order, whose scores fit into memory together."""
    scores_per_query = max(1, num_songs)
    step = max(1, SCORES_IN_CACHE // scores_per_query, min(QUERIES_PER_PASS, SCORES_PER_CHUNK // scores_per_query))
    return (slice(start, start + step) for start in range(0, num_queries, step))


class VectorRecommender(BaseRecommender):
    """Scores songs by the cosine of their vector with the user's taste vector.

    `song_vectors` is float32 (N, D), L2-normalized; a row of zeros is a song without a vector, which
    is never recommended. The optional `index` holds the same vectors; with it `rank` need not score every song.
    """

    def __init__(self, song_vectors: np.ndarray, index: SongIndex | None = None) -> None:
        self.song_vectors = np.ascontiguousarray(song_vectors, dtype=np.float32)
        self.num_songs = len(self.song_vectors)
        self.index = index
        self.rows_without_vector = np.flatnonzero(~self.song_vectors.any(axis=1))

    @abstractmethod
    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the taste vector of each query, L2-normalized.

        A row of zeros means that nothing is known of the user; then no song is recommended.
        """

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the cosine of each song with the taste vector."""
        return self.score_vectors(self.vectors(histories, queries, horizon))

    def score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (Q, N): the cosine of each song with `vectors`, float32 (Q, D); -inf if either is a row of zeros."""
        scores = np.asarray(vectors @ self.song_vectors.T)
        scores[:, self.rows_without_vector] = -np.inf
        scores[~vectors.any(axis=1)] = -np.inf
        return scores

    def score_chunks(
        self, histories: Histories, queries: Queries, horizon: HorizonName = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """As in `BaseRecommender`; the vectors of all queries are computed in one pass."""
        vectors = self.vectors(histories, queries, horizon)
        for chunk in chunks_of(len(queries), self.num_songs):
            yield chunk, self.score_vectors(vectors[chunk])

    def rank(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: HorizonName = "short",
        filters: Sequence[AnswerFilter] | None = None,
    ) -> Ranking:
        """As in `BaseRecommender`; uses the index if there is one."""
        if self.index is None:
            return super().rank(histories, at, k, horizon=horizon, filters=filters)
        check_count(k)
        vectors = self.vectors(histories, Queries.at_end(histories, at), horizon)
        return self.rank_vectors(vectors, k, filters)

    def rank_vectors(self, vectors: np.ndarray, k: int, filters: Sequence[AnswerFilter] | None = None) -> Ranking:
        """As `rank`, for taste `vectors`, float32 (Q, D), that are already computed. Needs the index."""
        if self.index is None:
            raise ValueError("rank_vectors needs an index; this recommender has none")
        ranking = self.index.rank(vectors, k, filters)
        is_empty = ~vectors.any(axis=1)
        ranking.songs[is_empty], ranking.scores[is_empty] = NO_SONG, -np.inf
        return ranking


def normalized(vectors: np.ndarray) -> np.ndarray:
    """float32: the rows of `vectors`, scaled to length 1; rows of zeros are unchanged."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """E different pairs of a query and a song, sorted by query and then by song."""

    num_songs: int
    rows: np.ndarray  # int64 (E,), the query
    songs: np.ndarray  # int64 (E,)

    @property
    def keys(self) -> np.ndarray:
        """int64 (E,), ascending: a number that identifies each pair."""
        return np.asarray(self.rows * self.num_songs + self.songs)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64: the position of the pair with each key, -1 if the pair is not contained."""
        pair_keys = self.keys
        if not len(pair_keys):
            return np.full(len(keys), -1, dtype=np.int64)
        positions = np.minimum(np.searchsorted(pair_keys, keys), len(pair_keys) - 1)
        return np.where(pair_keys[positions] == keys, positions, -1)


@dataclass(frozen=True, kw_only=True)
class UserSongs(Pairs):
    """The songs among the last 5,000 plays before each query."""

    plays: np.ndarray  # int64 (P,), plays of the song
    back: np.ndarray  # int64 (P,), number of plays after the song's last play, 0 for the song played last
    hours: np.ndarray  # float32 (P,), hours from the song's last play to the query
    base_level: np.ndarray  # float32 (P,), ACT-R: log of the sum of age^-0.5 over its plays, ages in plays
    base_level_hours: np.ndarray  # float32 (P,), the same with ages in hours
    session_plays: np.ndarray  # int64 (P,), plays of the song in the current session
    skips: np.ndarray  # int64 (P,), how often the user skipped the song


@dataclass(frozen=True, kw_only=True)
class QueryBatch:
    """A batch of queries with their recent plays, oldest first, and their taste vectors.

    Plays of songs with rows from `num_songs` on, which were added after the fit, are left out.
    """

    histories: Histories
    queries: Queries
    num_songs: int
    offsets: np.ndarray  # int64 (Q + 1,), where the plays of each query begin
    rows: np.ndarray  # int64 (E,), the query of each play
    songs: np.ndarray  # int64 (E,)
    back: np.ndarray  # int64 (E,), number of later plays before the query, 0 for the last play
    played_at: np.ndarray  # int64 (E,), ms UTC
    in_session: np.ndarray  # bool (E,), plays in the session that the query continues
    repeated: np.ndarray  # bool (E,), True if an earlier play of the query is of the same song
    skipped: np.ndarray  # bool (E,), all False if the data has no skips
    user_songs: UserSongs
    liked: Pairs  # the songs of the user's last 1,000 likes before the query
    short_vectors: np.ndarray  # float32 (Q, D)
    long_vectors: np.ndarray  # float32 (Q, D)

    def __len__(self) -> int:
        return len(self.queries)

    @classmethod
    def of(
        cls,
        histories: Histories,
        queries: Queries,
        num_songs: int,
        *,
        short_vectors: np.ndarray,
        long_vectors: np.ndarray,
        real_times: bool = True,
    ) -> QueryBatch:
        """Create the batch from `histories`, using only the plays that the queries have seen.

        Without `real_times` the times of plays and queries are replaced: the gaps between plays, and from the last
        play to the query, are those of an import without times. Otherwise rankers would learn from short gaps, while
        a request comes years after the last play.
        """
        ends = histories.offsets[queries.rows] + queries.plays_before
        counts = np.minimum(queries.plays_before, LATEST_PLAYS)
        plays = ranges(ends - counts, counts)
        rows = group_of_each_item(counts)
        is_known = histories.songs[plays] < num_songs
        plays, rows = plays[is_known], rows[is_known]
        offsets = offsets_of(np.bincount(rows, minlength=len(queries)))
        later_plays = offsets[1:][rows] - 1 - np.arange(len(rows))
        songs = histories.songs[plays].astype(np.int64)
        played_at = histories.played_at[plays]
        liked = _liked_songs(histories, queries, num_songs)
        if not real_times:
            gaps = _gaps_to_next(offsets, rows, played_at, queries.at)
            assumed_gaps = np.where(gaps == LINE_GAP_MS, LINE_GAP_MS, ASSUMED_GAP_MS)
            queries = replace(queries, at=ASSUMED_GAP_MS * queries.plays_before)
            played_at = queries.at[rows] - _sums_to_end(offsets, rows, assumed_gaps)
        in_session = _in_session(offsets, rows, played_at, queries.at)
        skipped = np.zeros(len(plays), dtype=bool) if histories.skipped is None else histories.skipped[plays]
        user_songs, repeated = _user_songs(
            rows, songs, later_plays, played_at, in_session, skipped, queries.at, num_songs
        )
        return cls(
            histories=histories,
            queries=queries,
            num_songs=num_songs,
            offsets=offsets,
            rows=rows,
            songs=songs,
            back=later_plays,
            played_at=played_at,
            in_session=in_session,
            repeated=repeated,
            skipped=skipped,
            user_songs=user_songs,
            liked=liked,
            short_vectors=short_vectors,
            long_vectors=long_vectors,
        )

    @property
    def last_songs(self) -> np.ndarray:
        """int64 (Q,): the song played last, -1 without a play."""
        last_songs = np.full(len(self), -1, dtype=np.int64)
        has_plays = np.diff(self.offsets) > 0
        last_songs[has_plays] = self.songs[self.offsets[1:][has_plays] - 1]
        return last_songs

    def latest(self, count: int) -> np.ndarray:
        """int64: positions of the last `count` plays of each query, in order."""
        counts = np.minimum(np.diff(self.offsets), count)
        return ranges(self.offsets[1:] - counts, counts)

    def keys(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """int64: the key of each pair of a query and a song, as in `Pairs.keys`."""
        return np.asarray(rows * self.num_songs + songs)


def _in_session(offsets: np.ndarray, rows: np.ndarray, played_at: np.ndarray, at: np.ndarray) -> np.ndarray:
    """bool (E,): True if no pause of more than 30 minutes lies between the play and the query."""
    return np.asarray(_sums_to_end(offsets, rows, _gaps_to_next(offsets, rows, played_at, at) > SESSION_GAP_MS) == 0)


def _gaps_to_next(offsets: np.ndarray, rows: np.ndarray, played_at: np.ndarray, at: np.ndarray) -> np.ndarray:
    """int64 (E,): ms from each play to the next play of its query, or from the last play to the query."""
    next_at = np.append(played_at[1:], 0)
    last_plays = offsets[1:][np.diff(offsets) > 0] - 1
    next_at[last_plays] = at[rows[last_plays]]
    return np.asarray(next_at - played_at)


def _sums_to_end(offsets: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """int64 (E,): the sum of `values` over each play and the later plays of its query."""
    cumulative = np.concatenate([[0], np.cumsum(values)])
    return np.asarray(cumulative[offsets[1:]][rows] - cumulative[:-1])


def _user_songs(
    rows: np.ndarray,
    songs: np.ndarray,
    later_plays: np.ndarray,
    played_at: np.ndarray,
    in_session: np.ndarray,
    skipped: np.ndarray,
    at: np.ndarray,
    num_songs: int,
) -> tuple[UserSongs, np.ndarray]:
    """Return the songs of each query, and bool (E,): True for plays of a song that was played earlier."""
    keys = rows * num_songs + songs
    order = stable_order(keys)  # groups plays of one query and song, in the order of time
    first_positions = group_starts(keys[order])
    last_plays = order[np.append(first_positions[1:], len(order)) - 1] if len(order) else order
    hours = np.maximum(0, at[rows] - played_at) / HOUR_MS

    def sum_per_song(values: np.ndarray) -> np.ndarray:
        return sum_groups(values[order], first_positions)

    repeated = np.ones(len(order), dtype=bool)
    repeated[order[first_positions]] = False
    user_songs = UserSongs(
        num_songs=num_songs,
        rows=rows[last_plays],
        songs=songs[last_plays],
        plays=group_sizes(first_positions, len(order)),
        back=later_plays[last_plays],
        hours=hours[last_plays].astype(np.float32),
        base_level=np.log(sum_per_song((later_plays + 1.0) ** -ACTIVATION_DECAY)).astype(np.float32),
        base_level_hours=np.log(sum_per_song((hours + 0.05) ** -ACTIVATION_DECAY)).astype(np.float32),
        session_plays=sum_per_song(in_session.astype(np.int64)),
        skips=sum_per_song(skipped.astype(np.int64)),
    )
    return user_songs, repeated


def _liked_songs(histories: Histories, queries: Queries, num_songs: int) -> Pairs:
    """Return the songs of the user's last 1,000 likes before each query."""
    likes = histories.likes
    if likes is None:
        return Pairs(num_songs=num_songs, rows=np.zeros(0, np.int64), songs=np.zeros(0, np.int64))
    starts = likes.offsets[queries.rows]
    ends = find_in_groups(likes.played_at, starts, likes.offsets[queries.rows + 1], queries.at)
    counts = np.minimum(ends - starts, LATEST_LIKES)
    rows, liked_songs = group_of_each_item(counts), likes.songs[ranges(ends - counts, counts)]
    is_known = liked_songs < num_songs
    keys = np.unique(rows[is_known] * num_songs + liked_songs[is_known])
    liked_rows, songs = np.divmod(keys, max(1, num_songs))
    return Pairs(num_songs=num_songs, rows=liked_rows, songs=songs)
