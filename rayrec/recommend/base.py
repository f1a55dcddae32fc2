"""The one interface of everything that recommends, by a score of each song, by candidates or by a vector.

Q queries, N songs, k answers, D dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from rayrec.data.histories import Histories, Queries
from rayrec.errors import InputError
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.filters import AnswerFilter, without_heard

if TYPE_CHECKING:
    from rayrec.recommend.index import SongIndex

HorizonName = Literal["short", "long"]
Kind = Literal["baseline", "network"]
# How an answer was found: the first of the index that qualify, a search of the index among those that
# qualify, or a score for every song that qualifies.
SearchPath = Literal["index", "selector", "exact"]

# float32 scores held at once: those of as many queries as a cache holds (8 MiB), or of a few that share a pass over
# the songs (64 MiB).
SCORES_IN_CACHE, SCORES_PER_CHUNK = 1 << 21, 1 << 24
FEW_QUESTIONS = 64
NO_SONG = -1  # fills answers of fewer than k songs


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answers to Q queries, best first, filled with -1 and -inf where fewer than k songs qualify."""

    songs: np.ndarray  # int32 (Q, k), song rows
    scores: np.ndarray  # float32 (Q, k), descending
    paths: tuple[SearchPath, ...]  # (Q,), how each was found

    @classmethod
    def empty(cls, queries: int, k: int, path: SearchPath = "exact") -> "Ranking":
        """Answers without a song, to be filled in."""
        return cls(
            songs=np.full((queries, k), NO_SONG, dtype=np.int32),
            scores=np.full((queries, k), -np.inf, dtype=np.float32),
            paths=(path,) * queries,
        )


class BaseRecommender(ABC):
    """Scores songs for users at a moment.

    Subclasses give `score`; `rank` orders by it, and a subclass may rank faster as long as the
    answer is the same. A score of -inf says that a song is never recommended.
    """

    name: str  # as reports and `--models` spell it
    kind: ClassVar[Kind] = "baseline"
    horizons: tuple[HorizonName, ...] = ("short",)  # those whose answers differ
    long_days: DaysHorizon | None = None  # what the long horizon was trained for, where that is days
    num_songs: int  # N
    settings: Mapping[str, float] = {}  # those chosen for the data set, by name
    without: str = ""  # the part that is left out, in an ablation
    added_songs: np.ndarray = np.zeros(0, dtype=np.int64)  # rows of songs that it finds though no fit has seen a play

    @abstractmethod
    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the score of every song, from the plays before each query only."""

    def score_chunks(
        self, histories: Histories, queries: Queries, horizon: HorizonName = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of `score` in slices of the queries, so that few scores are held at once.

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
        hidden: np.ndarray | None = None,
    ) -> Ranking:
        """The k best songs of each user among those that pass the user's filter, and how they were found.

        `at` (ms UTC) is the moment of the request, one for all users or one each. Exactly k
        songs wherever as many qualify; equal scores in the order of song rows. `hidden`, float32 (U, state
        layers, H), is where a taste network stands after the histories, if that is stored; others ignore it.
        Raises `InputError` for k below 1.
        """
        check_count(k)
        queries = Queries.at_end(histories, at, hidden)
        ranking = Ranking.empty(len(queries), k)
        for chunk, chunk_scores in self.score_chunks(histories, queries, horizon):
            scored = np.array(chunk_scores)
            if filters is not None:
                for row, answer_filter in zip(scored, filters[chunk], strict=True):
                    answer_filter.mask_scores(row)
            ranking.songs[chunk], ranking.scores[chunk] = top_k(scored, k)
        return ranking

    def recommend(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: HorizonName = "short",
        exclude_heard: bool = False,
        hidden: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, without filters but perhaps that of new songs.

        Returns song rows int32 (U, k) and scores float32 (U, k), filled with -1 and -inf where
        fewer than k songs qualify. Raises `InputError` for k below 1.
        """
        filters = without_heard(histories) if exclude_heard else None
        ranking = self.rank(histories, at, k, horizon=horizon, filters=filters, hidden=hidden)
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
        """What is known of songs, int (n,) rows, for one user at `at` (ms UTC), by name of the feature.

        `reasons` puts it in words. A model without features knows nothing of them: {}. `long_weight` is that of the
        answer, `vectors`, float32 (1, D) by horizon, the taste vectors where they are at hand.
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
        hidden: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend` for a single user: song rows int32 and scores float32, 1-D, at most k long."""
        if len(history) != 1:
            raise ValueError(f"recommend_one takes the history of one user, got {len(history)}")
        songs, scores = self.recommend(history, at, k, horizon=horizon, exclude_heard=exclude_heard, hidden=hidden)
        real = songs[0] != NO_SONG
        return songs[0][real], scores[0][real]


@dataclass(frozen=True, kw_only=True)
class ScoredCandidates:
    """The candidates of some queries, C of all together, and their scores."""

    rows: np.ndarray  # int64 (C,), the query, counted from the first of these
    songs: np.ndarray  # int64 (C,), song rows, each once a query
    # float32 (C,) for a horizon, and for answers without the songs that the user has heard (True) or with them.
    scores: Callable[[HorizonName, bool], np.ndarray]
    retrievers: Mapping[str, np.ndarray]  # name -> int64, positions of the candidates that each retriever proposes


class CandidateRecommender(BaseRecommender):
    """Scores a few candidates of each query instead of every song; a song that is no candidate has no score."""

    retrievers: tuple[str, ...]  # names of what proposes the candidates

    @abstractmethod
    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """The candidates in slices of the queries, in order, so that few are held at once."""

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the scores of the candidates, -inf for all other songs. For small catalogs."""
        scores = np.full((len(queries), self.num_songs), -np.inf, dtype=np.float32)
        for chunk, candidates in self.candidate_chunks(histories, queries):
            scores[(chunk.start or 0) + candidates.rows, candidates.songs] = candidates.scores(horizon, False)
        return scores


def check_count(k: int) -> None:
    """Raises `InputError` for a number of songs below 1."""
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 song")


def chunks_of(queries: int, num_songs: int) -> Iterator[slice]:
    """The queries to score at once, one slice after the other."""
    songs = max(1, num_songs)
    step = max(1, SCORES_IN_CACHE // songs, min(FEW_QUESTIONS, SCORES_PER_CHUNK // songs))
    return (slice(start, start + step) for start in range(0, queries, step))


def top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 (Q, k) and values float32 (Q, k) of the k best of scores (Q, N), best first.

    Equal scores come in the order of song rows; songs at -inf do not come.
    """
    count, num_songs = scores.shape
    width = min(k, num_songs)
    songs = np.full((count, k), NO_SONG, dtype=np.int32)
    values = np.full((count, k), -np.inf, dtype=np.float32)
    if not width:
        return songs, values
    threshold = -np.partition(-scores, width - 1, axis=1)[:, width - 1]
    for row in range(count):
        candidates = np.flatnonzero((scores[row] >= threshold[row]) & (scores[row] > -np.inf))
        order = candidates[np.argsort(-scores[row, candidates], kind="stable")][:width]
        songs[row, : len(order)] = order
        values[row, : len(order)] = scores[row, order]
    return songs, values


class VectorRecommender(BaseRecommender):
    """Scores songs by the cosine of their vector with the user's taste vector.

    `song_vectors` is float32 (N, D), L2-normalized; a row of zeros is a song without a vector, which
    is never recommended. `index`, where there is one, holds the same vectors and answers
    `rank` without scoring every song.
    """

    def __init__(self, song_vectors: np.ndarray, index: "SongIndex | None" = None) -> None:
        self.song_vectors = np.ascontiguousarray(song_vectors, dtype=np.float32)
        self.num_songs = len(self.song_vectors)
        self.index = index
        self.without_vector = np.flatnonzero(~self.song_vectors.any(axis=1))

    @abstractmethod
    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the taste vector of each query, L2-normalized.

        A row of zeros says that nothing is known, and then no song is recommended.
        """

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the cosine of each song with the taste vector."""
        return self.score_vectors(self.vectors(histories, queries, horizon))

    def score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (Q, N): the cosine of each song with taste vectors, float32 (Q, D)."""
        scores = np.asarray(vectors @ self.song_vectors.T)
        scores[:, self.without_vector] = -np.inf
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
        hidden: np.ndarray | None = None,
    ) -> Ranking:
        """As in `BaseRecommender`; through the index where there is one."""
        if self.index is None:
            return super().rank(histories, at, k, horizon=horizon, filters=filters, hidden=hidden)
        check_count(k)
        vectors = self.vectors(histories, Queries.at_end(histories, at, hidden), horizon)
        return self.rank_vectors(vectors, k, filters)

    def rank_vectors(self, vectors: np.ndarray, k: int, filters: Sequence[AnswerFilter] | None = None) -> Ranking:
        """As `rank`, from taste vectors, float32 (Q, D), that are at hand. Needs the index."""
        if self.index is None:
            raise ValueError("vectors are ranked through an index, and there is none")
        ranking = self.index.rank(vectors, k, filters)
        silent = ~vectors.any(axis=1)
        ranking.songs[silent], ranking.scores[silent] = NO_SONG, -np.inf
        return ranking


def normalized(vectors: np.ndarray) -> np.ndarray:
    """float32: rows of `vectors` scaled to length 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)
