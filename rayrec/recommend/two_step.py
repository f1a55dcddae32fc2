"""Retrieve, then rank: a few hundred candidates a query, put in order by what is known of each.

Q queries, N songs, C candidates of all queries together, k answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import (
    NO_SONG,
    CandidateRecommender,
    Horizon,
    Kind,
    Ranking,
    ScoredCandidates,
    SearchPath,
    check_count,
)
from rayrec.recommend.candidate_features import FeatureSources
from rayrec.recommend.filters import Limits
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.query_batch import LATEST, QueryBatch
from rayrec.recommend.ranker import Ranker, RankingExamples
from rayrec.recommend.retrieval.ragged import ranges
from rayrec.recommend.retrieval.retrieval import Retrieval
from rayrec.recommend.retrievers import Candidates, make_retrievers, retrieve
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

# next: the next play among all songs; served: a next play new to the user, among songs new to the user, since answers
# leave out songs heard by default; long: the plays at offsets 25 to 50.
RankerKind = Literal["next", "served", "long"]
KINDS: tuple[RankerKind, ...] = get_args(RankerKind)
HORIZONS: tuple[Horizon, ...] = ("short", "long")
QUERIES_AT_ONCE = 512
PLAYS_AT_ONCE = 1 << 19  # before the queries that are answered together


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Candidates of some queries with their features; scores are chances."""

    batch: QueryBatch
    candidates: Candidates
    features: np.ndarray  # float32 (C, F)


class CandidateSource:
    """Retrievers and features: everything of the two steps but the order.

    Training a ranker and answering with it share it, so that the features mean the same.
    """

    def __init__(
        self,
        network: TasteRecommender,
        retrieval: Retrieval,
        *,
        real_times: bool = True,
        left_out: Sequence[str] = (),
        counts: dict[str, int] | None = None,
    ) -> None:
        """`left_out` names retrievers to do without, `counts` how many songs a query retrievers propose."""
        index = network.index or SongIndex.build(network.song_vectors, IndexConfig())
        self.network, self.index, self.retrieval = network, index, retrieval
        scales = (network.scale("short"), network.scale("long"))
        self.retrievers = make_retrievers(retrieval, index, scales=scales, left_out=left_out)
        self.num_songs = max(network.num_songs, retrieval.num_songs)  # either may know songs that came later
        self._counts = counts
        self.sources = FeatureSources(
            retrieval=retrieval,
            song_vectors=network.song_vectors,
            scales=scales,
            retrievers=tuple(retriever.name for retriever in self.retrievers),
            real_times=real_times,
        )

    def batches(
        self, histories: Histories, queries: Questions, vectors: Mapping[Horizon, np.ndarray] | None = None
    ) -> Iterator[tuple[slice, Scored]]:
        """The queries in slices, few enough at once that little is held, with candidates and features.

        `vectors`, float32 (Q, D) by horizon, are the taste vectors where they are at hand.
        """
        vectors = vectors or {}
        short, long = (
            vectors[horizon] if horizon in vectors else self.network.vectors(histories, queries, horizon)
            for horizon in HORIZONS
        )
        for chunk in slices_of(queries):
            batch = QueryBatch.of(
                histories, queries.take(chunk), self.num_songs, short_vectors=short[chunk], long_vectors=long[chunk]
            )
            candidates = retrieve(self.retrievers, batch, self._counts)
            yield chunk, Scored(batch=batch, candidates=candidates, features=self.sources.features(batch, candidates))


def slices_of(queries: Questions) -> Iterator[slice]:
    """The queries to answer at once, one slice after the other."""
    plays = np.minimum(queries.seen, LATEST) + 1
    by_plays, by_count = (np.cumsum(plays) - plays) // PLAYS_AT_ONCE, np.arange(len(queries)) // QUERIES_AT_ONCE
    changes = np.flatnonzero((np.diff(by_plays) != 0) | (np.diff(by_count) != 0)) + 1
    for begin, end in zip([0, *changes.tolist()], [*changes.tolist(), len(queries)], strict=True):
        if end > begin:
            yield slice(begin, end)


class TwoStepRecommender(CandidateRecommender):
    """Orders the candidates of all retrievers by learned rankers: for the next play, new songs and the long term.

    A score is the chance that the song is the next play, or on the long horizon one of the plays there. Where the
    candidates that qualify are fewer than k, the songs nearest to the taste vector fill the answer; their scores are 0.
    """

    name = "two-step"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[Horizon, ...] = ("short", "long")

    def __init__(self, source: CandidateSource, rankers: Mapping[RankerKind, Ranker]) -> None:
        """`rankers` hold one for the next play, and may hold one for answers of new songs and one for the long term."""
        self.source, self.rankers = source, rankers
        self.num_songs = source.num_songs
        self.retrievers = tuple(retriever.name for retriever in source.retrievers)
        self.horizons = HORIZONS if "long" in rankers else ("short",)

    def candidate_chunks(self, histories: Histories, queries: Questions) -> Iterator[tuple[slice, ScoredCandidates]]:
        """As in `CandidateRecommender`."""
        for chunk, scored in self.source.batches(histories, queries):

            def scores(horizon: Horizon, exclude_heard: bool, scored: Scored = scored) -> np.ndarray:
                new_only = np.full(len(scored.batch), exclude_heard)
                return self.chances(scored, float(horizon == "long"), new_only)

            proposed = scored.candidates
            yield (
                chunk,
                ScoredCandidates(
                    rows=proposed.rows, songs=proposed.songs, scores=scores, retrievers=proposed.positions
                ),
            )

    def rank(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: Horizon = "short",
        limits: Sequence[Limits] | None = None,
        hidden: np.ndarray | None = None,
    ) -> Ranking:
        """As in `Recommender`, without a score for every song."""
        queries = Questions.at_end(histories, at, hidden)
        return self.rank_queries(histories, queries, k, long_weight=float(horizon == "long"), limits=limits)

    def rank_queries(
        self,
        histories: Histories,
        queries: Questions,
        k: int,
        *,
        long_weight: float = 0.0,
        limits: Sequence[Limits] | None = None,
        vectors: Mapping[Horizon, np.ndarray] | None = None,
    ) -> Ranking:
        """The k best songs of each query within its limits, exactly k wherever as many qualify.

        `long_weight` is 0 for the order of the short horizon, 1 for that of the long one, and between them mixes both.
        Paths say `index` where songs near the taste vector had to fill an answer.
        """
        check_count(k)
        ranking = Ranking.empty(len(queries), k, "exact")
        paths = list(ranking.paths)
        for chunk, scored in self.source.batches(histories, queries, vectors):
            some = None if limits is None else limits[chunk]
            new_only = np.array([limit.new_only for limit in some or ()] or [False] * len(scored.batch))
            chances = self.chances(scored, long_weight, new_only)
            songs, scores = _best(scored.candidates, chances, len(scored.batch), k, some)
            for row in np.flatnonzero(songs[:, -1] == NO_SONG).tolist():
                path = self._fill(scored.batch, row, songs[row], scores[row], some, long_weight)
                paths[chunk.start + row] = path
            ranking.songs[chunk], ranking.scores[chunk] = songs, scores
        return Ranking(songs=ranking.songs, scores=ranking.scores, paths=tuple(paths))

    def chances(self, scored: Scored, long_weight: float, new_only: np.ndarray) -> np.ndarray:
        """float64 (C,): the chance of each candidate; `new_only`, bool (Q,), says which queries want new songs alone.

        Between the horizons it is the mean of each candidate's shares on them.
        """
        if "long" not in self.rankers:
            long_weight = 0.0
        if long_weight == 1:
            return self._of_ranker(scored, "long", shares=False)
        rows = scored.candidates.rows
        if "served" not in self.rankers or not new_only.any():
            short = self._of_ranker(scored, "next", shares=long_weight > 0)
        elif new_only.all():
            short = self._of_ranker(scored, "served", shares=long_weight > 0)
        else:
            next_play, served = (self._of_ranker(scored, kind, shares=long_weight > 0) for kind in ("next", "served"))
            short = np.where(new_only[rows], served, next_play)
        if long_weight == 0:
            return short
        return np.asarray((1 - long_weight) * short + long_weight * self._of_ranker(scored, "long", shares=True))

    def _of_ranker(self, scored: Scored, kind: RankerKind, *, shares: bool) -> np.ndarray:
        """float64 (C,): chances of one ranker, or what share of the scores of its query each candidate has."""
        ranker, rows = self.rankers[kind], scored.candidates.rows
        if kind == "served":  # chances among new songs alone, as the ranker learned them
            new = scored.batch.user_songs.find(scored.candidates.keys) < 0
            values = np.zeros(len(rows))
            scores = ranker.scores(scored.features[new])
            values[new] = (ranker.calibration.shares_of if shares else ranker.calibration)(rows[new], scores)
            return values
        scores = ranker.scores(scored.features)
        return np.asarray((ranker.calibration.shares_of if shares else ranker.calibration)(rows, scores))

    def explain(self, histories: Histories, queries: Questions, songs: np.ndarray) -> list[dict[str, float]]:
        """The features by name of songs, int (n,), as candidates of one query; {} for a song that is no candidate."""
        found: list[dict[str, float]] = []
        for _, scored in self.source.batches(histories, queries.take(slice(0, 1))):
            rows = scored.candidates.find(np.asarray(songs, dtype=np.int64))
            table = [scored.features[row].tolist() if row >= 0 else [] for row in rows.tolist()]
            found = [dict(zip(self.source.sources.names, values, strict=False)) for values in table]
        return found

    def _fill(
        self,
        batch: QueryBatch,
        row: int,
        songs: np.ndarray,
        scores: np.ndarray,
        limits: Sequence[Limits] | None,
        long_weight: float,
    ) -> SearchPath:
        """Put the songs nearest to the taste vector behind the candidates of one query, in place."""
        vector = batch.short_vectors[row] if long_weight < 0.5 else batch.long_vectors[row]
        found = int(np.count_nonzero(songs != NO_SONG))
        limit = Limits() if limits is None else limits[row]
        if not vector.any():
            return "exact"
        within = Limits(banned=np.concatenate([limit.banned, songs[:found]]), allowed=limit.allowed)
        more = self.source.index.rank(vector[None], len(songs) - found, [within])
        songs[found:] = more.songs[0]
        scores[found:] = np.where(more.songs[0] == NO_SONG, -np.inf, 0)
        return "index"


def load_two_step(
    workspace: Workspace, network: TasteRecommender, retrieval: str, rankers: Manifest, *, real_times: bool
) -> TwoStepRecommender:
    """From a network, with its index where it has one, the folder of a retrieval and the artifact of rankers."""
    source = CandidateSource(network, Retrieval.load(workspace, retrieval), real_times=real_times)
    kinds = [kind for kind in KINDS if f"{kind}.json" in rankers.files]
    return TwoStepRecommender(source, {kind: Ranker.load(workspace, rankers.folder, kind) for kind in kinds})


def _best(
    candidates: Candidates, chances: np.ndarray, queries: int, k: int, limits: Sequence[Limits] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Songs int32 (Q, k) and scores float32 (Q, k): the best candidates that qualify; equal ones by song row."""
    rows, songs = candidates.rows, candidates.songs
    if limits is not None:
        kept = _qualify(candidates, limits)
        rows, songs, chances = rows[kept], songs[kept], chances[kept]
    order = np.lexsort((songs, -chances, rows))
    counts = np.bincount(rows, minlength=queries)
    place = ranges(np.zeros(queries, np.int64), counts)
    inside = place < k
    best_songs = np.full((queries, k), NO_SONG, dtype=np.int32)
    best_scores = np.full((queries, k), -np.inf, dtype=np.float32)
    best_songs[rows[order][inside], place[inside]] = songs[order][inside]
    best_scores[rows[order][inside], place[inside]] = chances[order][inside]
    return best_songs, best_scores


def _qualify(candidates: Candidates, limits: Sequence[Limits]) -> np.ndarray:
    """bool (C,): candidates within the limits of their query."""
    banned = [limit.banned for limit in limits]
    rows = np.repeat(np.arange(len(limits)), [len(songs) for songs in banned])
    songs = np.concatenate([np.zeros(0, np.int64), *banned])
    known = songs < candidates.num_songs
    keys = np.unique(rows[known] * candidates.num_songs + songs[known])
    kept = ~np.isin(candidates.keys, keys, assume_unique=True)
    if any(limit.allowed is not None for limit in limits):
        bounds = np.searchsorted(candidates.rows, np.arange(len(limits) + 1))
        for row, limit in enumerate(limits):
            if limit.allowed is not None:
                own = slice(int(bounds[row]), int(bounds[row + 1]))
                inside = candidates.songs[own] < len(limit.allowed)
                kept[own] &= inside & limit.allowed[np.minimum(candidates.songs[own], len(limit.allowed) - 1)]
    return np.asarray(kept)


def examples_for(
    source: CandidateSource,
    histories: Histories,
    queries: Questions,
    answer_rows: np.ndarray,
    answer_songs: np.ndarray,
    *,
    new_only: bool = False,
    held_out: np.ndarray,
) -> RankingExamples:
    """What a ranker learns from: the candidates of queries, and which of them are right.

    `answer_rows`, int (T,), say to which query each right song, int (T,), belongs; `held_out` is bool (Q,).
    With `new_only` songs that the user has played are neither candidates nor right. The source must not have seen the
    answers.
    """
    parts = [RankingExamples.none(len(source.sources.names))]
    for chunk, scored in source.batches(histories, queries):
        candidates, batch = scored.candidates, scored.batch
        inside = (answer_rows >= chunk.start) & (answer_rows < chunk.stop) & (answer_songs < source.num_songs)
        keys = np.unique(batch.keys(answer_rows[inside] - chunk.start, answer_songs[inside].astype(np.int64)))
        allowed = np.ones(len(candidates.rows), dtype=bool)
        if new_only:
            allowed = batch.user_songs.find(candidates.keys) < 0
            keys = keys[batch.user_songs.find(keys) < 0]
        hit = np.isin(candidates.keys, keys, assume_unique=True) & allowed
        # Queries that teach nothing are left out, but for those held out that have an answer: chances count them.
        asked = np.bincount(keys // source.num_songs, minlength=len(batch)) > 0
        found = np.bincount(candidates.rows, weights=hit, minlength=len(batch)) > 0
        used = found | (asked & held_out[chunk])
        kept = allowed & used[candidates.rows]
        parts.append(
            RankingExamples(
                features=scored.features[kept],
                right=hit[kept],
                counts=np.bincount(candidates.rows[kept], minlength=len(batch))[used],
                held_out=held_out[chunk][used],
            )
        )
    return RankingExamples.joined(parts)
