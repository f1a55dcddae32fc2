"""Two-step recommendation: retrieve a few hundred candidates per query, then rank them by their features.

Also the training examples of rankers: queries of the validation range with the songs that were played next or later.

Shapes: Q queries, U users, N songs, D dimensions, F features, C candidates of all queries together, k answers, T right
songs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories, Queries, concatenate, user_hash
from rayrec.data.ragged import group_of_each_item, positions_in_groups, ranges
from rayrec.data.split import Split
from rayrec.data.top_k import top_ranked
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import Horizon
from rayrec.recommend.base import (
    LATEST_PLAYS,
    NO_SONG,
    CandidateRecommender,
    HorizonName,
    Kind,
    QueryBatch,
    Ranking,
    ScoredCandidates,
    SearchPath,
    check_count,
)
from rayrec.recommend.candidate_features import FeatureSources
from rayrec.recommend.filters import AnswerFilter
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.ranker import Ranker, RankingExamples
from rayrec.recommend.retrievers import Candidates, make_new_song_retrievers, make_retrievers, retrieve
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step_config import ABLATED_PARTS
from rayrec.storage.workspace import Workspace

# What each ranker predicts. next: the next play, among all songs. served: the next play, among songs new to the user,
# because answers leave out heard songs by default. long: the plays at offsets 25 to 50, or in the days of the network's
# long horizon.
RankerKind = Literal["next", "served", "long"]
KINDS: tuple[RankerKind, ...] = get_args(RankerKind)
HORIZONS: tuple[HorizonName, ...] = ("short", "long")
NEGATIVES = 50  # maximum wrong candidates per query that a ranker learns from
QUERIES_AT_ONCE = 512
PLAYS_AT_ONCE = 1 << 19  # maximum plays before the queries that are answered together


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The candidates of a batch of queries, with their features."""

    batch: QueryBatch
    candidates: Candidates
    features: np.ndarray  # float32 (C, F)
    is_allowed: np.ndarray | None = None  # bool (C,), candidates that an answer may hold; None: all


class CandidateSource:
    """Retrievers and features: all of two-step recommendation except the rankers.

    Training a ranker and answering with it use the same class, so that features mean the same in both.
    """

    def __init__(
        self,
        network: TasteRecommender,
        retrieval: Retrieval,
        *,
        real_times: bool = True,
        without: str = "",
    ) -> None:
        """`without` names one of ABLATED_PARTS to leave out.

        If songs were added to the network, separate retrievers propose them.
        """
        self.base_retrieval = retrieval  # without the artists and albums of added songs
        added = network.added or None  # None if no song was added
        if added is not None:
            retrieval = retrieval.with_added(added.rows, added.artist_rows, added.album_rows)
        index = network.index or SongIndex.build(network.song_vectors, IndexConfig())
        self.network, self.index, self.retrieval = network, index, retrieval
        scales = (network.scale("short"), network.scale("long"))
        part = ABLATED_PARTS[without] if without else None
        self.retrievers = make_retrievers(retrieval, index, scales=scales, without=part)
        if added is not None:
            self.retrievers += make_new_song_retrievers(
                retrieval, network.song_vectors, added.rows, scale=scales[0], without=part
            )
        self.num_songs = max(network.num_songs, retrieval.num_songs)  # either may hold songs that were added later
        self.sources = FeatureSources(
            retrieval=retrieval,
            song_vectors=network.song_vectors,
            scales=scales,
            retrievers=tuple(retriever.name for retriever in self.retrievers),
            real_times=real_times,
            without=part,
        )

    def batches(
        self,
        histories: Histories,
        queries: Queries,
        vectors: Mapping[HorizonName, np.ndarray] | None = None,
        songs_to_rank: Sequence[np.ndarray] | None = None,
    ) -> Iterator[tuple[slice, Scored]]:
        """Yield slices of the queries with their candidates and features; slices are small, to save memory.

        `vectors`, float32 (Q, D) by horizon, are the taste vectors, if they are already computed. `songs_to_rank`, int
        song rows for each query, are added to the candidates of the retrievers and are the only songs that an answer
        may hold. The other candidates remain, so that features and probabilities keep their meaning.
        """
        vectors = vectors or self.network.vectors_of(histories, queries, HORIZONS)
        short_vectors, long_vectors = (vectors[horizon] for horizon in HORIZONS)
        for chunk in query_slices(queries):
            batch = QueryBatch.of(
                histories,
                queries.take(chunk),
                self.num_songs,
                short_vectors=short_vectors[chunk],
                long_vectors=long_vectors[chunk],
                real_times=self.sources.real_times,
            )
            keys = None if songs_to_rank is None else _pair_keys(batch, songs_to_rank[chunk])
            candidates = retrieve(self.retrievers, batch, keys)
            yield (
                chunk,
                Scored(
                    batch=batch,
                    candidates=candidates,
                    features=self.sources.features(batch, candidates),
                    is_allowed=None if keys is None else np.isin(candidates.keys, keys, assume_unique=True),
                ),
            )


def _pair_keys(batch: QueryBatch, songs: Sequence[np.ndarray]) -> np.ndarray:
    """int64, ascending: the keys of the pairs of each query and its `songs`, each once; unknown rows are left out."""
    rows = group_of_each_item([len(song_rows) for song_rows in songs])
    all_songs = np.concatenate([np.zeros(0, np.int64), *songs])
    is_known = (all_songs >= 0) & (all_songs < batch.num_songs)
    return np.unique(batch.keys(rows[is_known], all_songs[is_known]))


def query_slices(queries: Queries) -> Iterator[slice]:
    """Yield slices of the queries that are answered together, in order."""
    plays = np.minimum(queries.plays_before, LATEST_PLAYS) + 1
    slice_by_plays = (np.cumsum(plays) - plays) // PLAYS_AT_ONCE
    slice_by_count = np.arange(len(queries)) // QUERIES_AT_ONCE
    changes = np.flatnonzero((np.diff(slice_by_plays) != 0) | (np.diff(slice_by_count) != 0)) + 1
    for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(queries)], strict=True):
        if end > start:
            yield slice(start, end)


class TwoStepRecommender(CandidateRecommender):
    """Ranks the candidates of all retrievers with trained rankers: for the next play, new songs and the long horizon.

    A score of the short horizon is the probability that the song is the next play, with or without the songs that the
    user has heard. A score of the long horizon is the probability that the song is among the distinct songs 25 to 50
    plays ahead, or those in the days of the network's long horizon. If fewer than k candidates pass the filter, the
    songs nearest to the taste vector fill the answer; their scores are 0.
    """

    name = "two-step"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[HorizonName, ...] = ("short", "long")
    scores_are_probabilities: ClassVar[bool] = True

    def __init__(self, source: CandidateSource, rankers: Mapping[RankerKind, Ranker]) -> None:
        """`rankers` must hold `next`, and may hold `served` and `long`."""
        self.source, self.rankers = source, rankers
        self.num_songs, self.added_songs = source.num_songs, source.network.added_songs
        self._columns = {kind: _columns(ranker.names, source.sources.names) for kind, ranker in rankers.items()}
        self.retrievers = tuple(retriever.name for retriever in source.retrievers)
        self.horizons = HORIZONS if "long" in rankers else ("short",)
        self.long_days = source.network.long_days

    def without_part(self, part: str, rankers: Mapping[RankerKind, Ranker]) -> TwoStepRecommender:
        """Return this recommender without one of ABLATED_PARTS; `rankers` must be trained without it."""
        source = CandidateSource(
            self.source.network, self.source.base_retrieval, real_times=self.source.sources.real_times, without=part
        )
        return TwoStepRecommender(source, rankers)

    def with_added_songs(self, added: AddedSongs, *, room: int = 0) -> TwoStepRecommender:
        """Return this recommender with `added` songs, see `TasteRecommender.add_songs`; changes its network."""
        self.source.network.add_songs(added, room=room)
        source = CandidateSource(
            self.source.network, self.source.base_retrieval, real_times=self.source.sources.real_times
        )
        return TwoStepRecommender(source, self.rankers)

    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """As in `CandidateRecommender`."""
        for chunk, scored in self.source.batches(histories, queries):
            candidates, probabilities = scored.candidates, _CandidateProbabilities(self, scored)
            yield (
                chunk,
                ScoredCandidates(
                    rows=candidates.rows, songs=candidates.songs, scores=probabilities, retrievers=candidates.positions
                ),
            )

    def rank(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: HorizonName = "short",
        filters: Sequence[AnswerFilter] | None = None,
    ) -> Ranking:
        """As in `BaseRecommender`, but without scoring every song."""
        queries = Queries.at_end(histories, at)
        return self.rank_queries(histories, queries, k, long_weight=float(horizon == "long"), filters=filters)

    def rank_queries(
        self,
        histories: Histories,
        queries: Queries,
        k: int,
        *,
        long_weight: float = 0.0,
        filters: Sequence[AnswerFilter] | None = None,
        vectors: Mapping[HorizonName, np.ndarray] | None = None,
        songs_to_rank: Sequence[np.ndarray] | None = None,
    ) -> Ranking:
        """Return the k best songs of each query that pass its filter; exactly k if at least k songs pass.

        Equal scores are sorted by song row. `long_weight` is 0 for the short horizon, 1 for the long one; values
        between mix both. If songs near the taste vector fill an answer, its path is `index`, and `filled` is their
        number. `songs_to_rank`, int song rows for each query, are ranked instead of the proposals of the retrievers. A
        song that retrievers propose, too, has the same score as without `songs_to_rank`, or a slightly lower one if
        there are many other songs to rank.
        """
        check_count(k)
        ranking = Ranking.empty(len(queries), k, "exact")
        paths = list(ranking.paths)
        for chunk, scored in self.source.batches(histories, queries, vectors, songs_to_rank):
            chunk_filters = None if filters is None else filters[chunk]
            chunk_ranking = self.rank_scored(scored, k, chunk_filters, long_weight=long_weight)
            ranking.songs[chunk], ranking.scores[chunk] = chunk_ranking.songs, chunk_ranking.scores
            paths[chunk] = chunk_ranking.paths
            ranking.filled[chunk] = chunk_ranking.filled
        return replace(ranking, paths=tuple(paths))

    def rank_scored(
        self, scored: Scored, k: int, filters: Sequence[AnswerFilter] | None = None, *, long_weight: float = 0.0
    ) -> Ranking:
        """As `rank_queries`, for queries whose candidates and features are already computed."""
        new_only = np.array([answer_filter.new_only for answer_filter in filters or ()] or [False] * len(scored.batch))
        probabilities = self.probabilities(scored, long_weight, new_only)
        candidates, is_allowed = scored.candidates, scored.is_allowed
        if is_allowed is None:
            is_allowed = np.ones(len(probabilities), dtype=bool)
        if filters is not None:
            is_allowed = is_allowed & _qualify_candidates(candidates, filters)
        rows, songs, scores = candidates.rows[is_allowed], candidates.songs[is_allowed], probabilities[is_allowed]
        best, ranks = top_ranked(rows, scores, songs, k)
        ranking = Ranking.empty(len(scored.batch), k)
        ranking.songs[rows[best], ranks], ranking.scores[rows[best], ranks] = songs[best], scores[best]
        if scored.is_allowed is None:
            for row in np.flatnonzero(ranking.songs[:, -1] == NO_SONG).tolist():
                ranking.filled[row] = self._fill(
                    scored.batch, row, ranking.songs[row], ranking.scores[row], filters, long_weight
                )
        paths: list[SearchPath] = ["index" if count else "exact" for count in ranking.filled.tolist()]
        return replace(ranking, paths=tuple(paths))

    def probabilities(self, scored: Scored, long_weight: float, new_only: np.ndarray) -> np.ndarray:
        """float64 (C,): the probability of each candidate; `new_only`, bool (Q,): which queries ask only for new songs.

        If `long_weight` is between 0 and 1, the weighted mean of the candidate's softmax shares on both horizons.
        """
        if "long" not in self.rankers:
            long_weight = 0.0
        if long_weight == 1:
            return self._ranker_probabilities(scored, "long", shares=False)
        rows = scored.candidates.rows
        if "served" not in self.rankers or not new_only.any():
            short_probabilities = self._ranker_probabilities(scored, "next", shares=long_weight > 0)
        elif new_only.all():
            short_probabilities = self._ranker_probabilities(scored, "served", shares=long_weight > 0)
        else:
            next_probabilities, served_probabilities = (
                self._ranker_probabilities(scored, kind, shares=long_weight > 0) for kind in ("next", "served")
            )
            short_probabilities = np.where(new_only[rows], served_probabilities, next_probabilities)
        if long_weight == 0:
            return short_probabilities
        return np.asarray(
            (1 - long_weight) * short_probabilities
            + long_weight * self._ranker_probabilities(scored, "long", shares=True)
        )

    def _ranker_probabilities(self, scored: Scored, kind: RankerKind, *, shares: bool) -> np.ndarray:
        """float64 (C,): the probabilities by one ranker, or, with `shares`, the softmax shares within each query."""
        ranker, rows = self.rankers[kind], scored.candidates.rows
        if kind == "served":  # this ranker orders only new songs
            is_new = scored.batch.user_songs.find(scored.candidates.keys) < 0
            values = np.zeros(len(rows))
            scores = ranker.scores(self._features(scored, kind)[is_new])
            values[is_new] = (ranker.calibration.shares_of if shares else ranker.calibration)(rows[is_new], scores)
            return values
        scores = ranker.scores(self._features(scored, kind))
        return np.asarray((ranker.calibration.shares_of if shares else ranker.calibration)(rows, scores))

    def _features(self, scored: Scored, kind: RankerKind) -> np.ndarray:
        """float32 (C, F): the features that a ranker learned from; missing features are zeros."""
        columns = self._columns[kind]
        if columns is None:
            return scored.features
        features = np.zeros((len(scored.features), len(columns)), dtype=np.float32)
        features[:, columns >= 0] = scored.features[:, columns[columns >= 0]]
        return features

    def explain(
        self,
        history: Histories,
        at: int,
        songs: np.ndarray,
        *,
        long_weight: float = 0.0,
        vectors: Mapping[HorizonName, np.ndarray] | None = None,
    ) -> list[dict[str, float]]:
        """Return the features of `songs` as candidates; {} for an unknown song. See `BaseRecommender.explain`."""
        features: list[dict[str, float]] = []
        for _, scored in self.source.batches(history, Queries.at_end(history, at), vectors, [songs]):
            rows = scored.candidates.find(np.asarray(songs, dtype=np.int64))
            feature_rows = [scored.features[row].tolist() if row >= 0 else [] for row in rows.tolist()]
            features = [dict(zip(self.source.sources.names, values, strict=False)) for values in feature_rows]
        return features

    def _fill(
        self,
        batch: QueryBatch,
        row: int,
        songs: np.ndarray,
        scores: np.ndarray,
        filters: Sequence[AnswerFilter] | None,
        long_weight: float,
    ) -> int:
        """Append the songs nearest to the taste vector to the answer of one query, in place; return their number."""
        vector = batch.short_vectors[row] if long_weight < 0.5 else batch.long_vectors[row]
        if not vector.any():
            return 0
        num_proposed = int(np.count_nonzero(songs != NO_SONG))
        answer_filter = AnswerFilter() if filters is None else filters[row]
        remaining_filter = replace(
            answer_filter, excluded=np.concatenate([answer_filter.excluded, songs[:num_proposed]])
        )
        nearest = self.source.index.rank(vector[None], len(songs) - num_proposed, [remaining_filter])
        songs[num_proposed:] = nearest.songs[0]
        scores[num_proposed:] = np.where(nearest.songs[0] == NO_SONG, -np.inf, 0)
        return int(np.count_nonzero(nearest.songs[0] != NO_SONG))


class _CandidateProbabilities:
    """The probabilities of a batch of candidates, computed once for each kind of answer."""

    def __init__(self, recommender: TwoStepRecommender, scored: Scored) -> None:
        self._recommender, self._scored = recommender, scored
        self._cache: dict[tuple[HorizonName, bool], np.ndarray] = {}

    def __call__(self, horizon: HorizonName, exclude_heard: bool) -> np.ndarray:
        """float64 (C,): the probabilities; the long horizon uses one ranker, with or without heard songs."""
        key = horizon, exclude_heard and horizon == "short"
        if key not in self._cache:
            new_only = np.full(len(self._scored.batch), exclude_heard)
            self._cache[key] = self._recommender.probabilities(self._scored, float(horizon == "long"), new_only)
        return self._cache[key]


def _columns(learned_names: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """int64: the column in `names` of each feature that a ranker learned from, -1 if missing; None if all are equal."""
    if list(learned_names) == list(names):
        return None
    column_of_name = {name: column for column, name in enumerate(names)}
    return np.array([column_of_name.get(name, -1) for name in learned_names])


def load_two_step(
    workspace: Workspace, network: TasteRecommender, retrieval: str, rankers: str, *, real_times: bool
) -> TwoStepRecommender:
    """Load a recommender from a network, with any index it has, and the folders of a retrieval and of rankers."""
    source = CandidateSource(network, Retrieval.load(workspace, retrieval), real_times=real_times)
    return TwoStepRecommender(source, load_rankers(workspace, rankers))


def load_rankers(workspace: Workspace, folder: str) -> dict[RankerKind, Ranker]:
    """Load the rankers in a folder; it need not hold every kind."""
    kinds = [kind for kind in KINDS if workspace.exists(f"{folder}/{kind}.json")]
    return {kind: Ranker.load(workspace, folder, kind) for kind in kinds}


def _qualify_candidates(candidates: Candidates, filters: Sequence[AnswerFilter]) -> np.ndarray:
    """bool (C,): True for candidates that pass the filter of their query."""
    excluded_songs = [answer_filter.excluded for answer_filter in filters]
    rows = group_of_each_item([len(songs) for songs in excluded_songs])
    songs = np.concatenate([np.zeros(0, np.int64), *excluded_songs])
    is_known = songs < candidates.num_songs
    keys = np.unique(rows[is_known] * candidates.num_songs + songs[is_known])
    is_qualified = ~np.isin(candidates.keys, keys, assume_unique=True)
    if any(answer_filter.allowed is not None for answer_filter in filters):
        bounds = np.searchsorted(candidates.rows, np.arange(len(filters) + 1))
        for row, answer_filter in enumerate(filters):
            if answer_filter.allowed is not None:
                query_candidates = slice(int(bounds[row]), int(bounds[row + 1]))
                is_qualified[query_candidates] &= answer_filter.allowed.holds(candidates.songs[query_candidates])
    return np.asarray(is_qualified)


def examples_for(
    source: CandidateSource,
    histories: Histories,
    queries: Queries,
    answers: Mapping[RankerKind, tuple[np.ndarray, np.ndarray]],
    *,
    held_out: np.ndarray,
    vectors: Mapping[HorizonName, np.ndarray] | None = None,
) -> dict[RankerKind, RankingExamples]:
    """Return the training examples of each kind of ranker: the candidates of queries, and which of them are right.

    `answers` maps each kind to a pair of arrays: queries, int (T,), and the right songs of these queries, int (T,).
    `held_out` is bool (Q,). For `served`, songs that the user has played are neither candidates nor right; a held-out
    query whose right song is such a song counts as a miss, so that probabilities refer to all next plays. The source
    must not have seen the answers. At most NEGATIVES wrong candidates per query are drawn for training: more take
    longer and do not improve the order. Held-out queries keep all wrong candidates, for the check. `vectors` are the
    taste vectors, if they are already computed.
    """
    examples_by_kind = {kind: [RankingExamples.none(len(source.sources.names))] for kind in answers}
    for chunk, scored in source.batches(histories, queries, vectors):
        is_heard = scored.batch.user_songs.find(scored.candidates.keys) >= 0
        for kind, (rows, songs) in answers.items():
            in_chunk = (rows >= chunk.start) & (rows < chunk.stop)
            has_answer = np.bincount(rows[in_chunk] - chunk.start, minlength=len(scored.batch)) > 0
            in_chunk &= songs < source.num_songs
            keys = np.unique(scored.batch.keys(rows[in_chunk] - chunk.start, songs[in_chunk].astype(np.int64)))
            is_allowed = np.ones(len(is_heard), dtype=bool)
            if kind == "served":
                is_allowed, keys = ~is_heard, keys[scored.batch.user_songs.find(keys) < 0]
            examples_by_kind[kind].append(
                _batch_examples(scored, keys, is_allowed, has_answer & held_out[chunk], held_out[chunk])
            )
    return {kind: RankingExamples.concatenate(examples) for kind, examples in examples_by_kind.items()}


def _draw_negatives(scored: Scored, is_wrong: np.ndarray) -> np.ndarray:
    """bool (C,): True for NEGATIVES of the candidates in `is_wrong`, bool (C,), of each query, drawn by a hash.

    The hash depends on the time of the query and on the song.
    """
    positions = np.flatnonzero(is_wrong)
    rows, songs = scored.candidates.rows[positions], scored.candidates.songs[positions]
    hashes = (scored.batch.queries.at[rows] * 1_000_003 + songs).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((hashes ^ (hashes >> np.uint64(29)), rows))
    is_drawn = np.zeros(len(is_wrong), dtype=bool)
    is_drawn[positions[order[positions_in_groups(rows[order]) < NEGATIVES]]] = True
    return is_drawn


def _batch_examples(
    scored: Scored, right_keys: np.ndarray, is_allowed: np.ndarray, is_counted: np.ndarray, held_out: np.ndarray
) -> RankingExamples:
    """Return the examples of a batch of queries; `right_keys`, int64, identify the pairs of a query and a right song.

    `is_allowed`, bool (C,), is True for candidates that may be used. Queries without a right candidate are left out,
    apart from those in `is_counted`, bool (Q,), which the calibration of probabilities needs.
    """
    rows, num_queries = scored.candidates.rows, len(scored.batch)
    is_right = np.isin(scored.candidates.keys, right_keys, assume_unique=True) & is_allowed
    has_right = np.bincount(rows, weights=is_right, minlength=num_queries) > 0
    is_used = has_right | is_counted
    is_example = is_allowed & is_used[rows]
    is_drawn = is_right | _draw_negatives(scored, is_example & ~is_right)
    is_example &= held_out[rows] | is_drawn
    return RankingExamples(
        features=scored.features[is_example],
        right=is_right[is_example],
        counts=np.bincount(rows[is_example], minlength=num_queries)[is_used],
        held_out=held_out[is_used],
        drawn=is_drawn[is_example],
    )


LONG = Horizon(min_offset=25, max_offset=50)  # used unless the network's long horizon is in days
HELD_OUT = 5  # one user in five is held out to check rankers trained on the others


def validation_queries(batches: Iterable[Histories], split: Split, limit: int) -> tuple[Histories, np.ndarray]:
    """Return histories up to the end of the validation range, and positions int64 (Q,) of at most `limit` plays in it.

    Each of these plays has an earlier play by the same user. The choice depends only on user and time, not on the
    batches in which users are read. The histories are those of the users of these plays.
    """
    query_histories, plays = Histories.from_lists([], []), np.zeros(0, dtype=np.int64)
    for batch in batches:
        histories = split.final.select(batch)
        in_validation = split.is_validation(histories)
        in_validation[histories.offsets[:-1][histories.lengths > 0]] = False
        batch_plays = np.flatnonzero(in_validation)
        if len(plays):
            batch_plays = np.concatenate([plays, batch_plays + query_histories.num_plays])
            histories = concatenate([query_histories, histories])
        if len(batch_plays) > limit:
            order = np.argsort(_play_hash(histories, batch_plays), kind="stable")
            batch_plays = np.sort(batch_plays[order[:limit]])
        rows, play_rows = np.unique(histories.rows[batch_plays], return_inverse=True)
        query_histories = histories.take(rows)
        plays = batch_plays - histories.offsets[rows][play_rows] + query_histories.offsets[play_rows]
    return query_histories, plays


def checks_rankers(user_ids: np.ndarray) -> np.ndarray:
    """bool (U,): True for held-out users, whose queries check the rankers trained on the other users."""
    return np.asarray(user_hash(user_ids) % np.uint64(HELD_OUT) == 0)


def collect_examples(
    sources: Mapping[str, CandidateSource], histories: Histories, plays: np.ndarray
) -> dict[str, dict[RankerKind, RankingExamples]]:
    """Return the examples of each source and kind for the plays at positions `plays`, int (Q,).

    No source may have seen these plays, and all sources must have the same network.
    """
    queries = Queries.before_plays(histories, plays)
    held_out = checks_rankers(histories.user_ids)[queries.rows]
    network = next(iter(sources.values())).network
    starts, ends = (network.long_days or LONG).spans(histories, queries)
    later_answers = group_of_each_item(ends - starts), histories.songs[ranges(starts, ends - starts)]
    next_answers = np.arange(len(plays)), histories.songs[plays]
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {
        "next": next_answers,
        "served": next_answers,
        "long": later_answers,
    }
    vectors = network.vectors_of(histories, queries, HORIZONS)
    return {
        name: examples_for(source, histories, queries, answers, held_out=held_out, vectors=vectors)
        for name, source in sources.items()
    }


def pack_examples(examples: RankingExamples) -> bytes:
    """Serialize the examples to bytes, so that a training worker can read them from the workspace."""
    arrays = {field.name: np.ascontiguousarray(getattr(examples, field.name)) for field in fields(examples)}
    return bytes(save(arrays))


def unpack_examples(data: bytes) -> RankingExamples:
    """Return the examples in bytes of `pack_examples`."""
    return RankingExamples(**load(data))


def _play_hash(histories: Histories, plays: np.ndarray) -> np.ndarray:
    """uint64 (Q,): a hash of the user and time of each play, which does not depend on the order of the users."""
    rows = np.searchsorted(histories.offsets, plays, side="right") - 1
    hashes = user_hash(histories.user_ids)[rows] ^ (
        histories.played_at[plays].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    return np.asarray((hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9))
