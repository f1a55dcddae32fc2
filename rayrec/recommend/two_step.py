"""Two-step recommendation: retrieve a few hundred candidates per query, then rank them by their features.

Also the training examples of rankers: queries of the validation range with the songs that were played next or later.

Shapes: Q queries, U users, N songs, D dimensions, F features, C candidates of all queries together, k answers, T right
songs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories, Queries, user_hash
from rayrec.data.ragged import best_of_each, places_in, ranges
from rayrec.data.split import Split
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
    may_come: np.ndarray | None = None  # bool (C,), candidates that an answer may hold; None: all


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
        counts: dict[str, int] | None = None,
    ) -> None:
        """`without` names one of ABLATED_PARTS to leave out; `counts` are songs per query, by name of the retriever.

        If songs were added to the network, separate retrievers propose them.
        """
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
        self._counts = counts
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
        short, long = (vectors[horizon] for horizon in HORIZONS)
        for chunk in query_slices(queries):
            batch = QueryBatch.of(
                histories,
                queries.take(chunk),
                self.num_songs,
                short_vectors=short[chunk],
                long_vectors=long[chunk],
                real_times=self.sources.real_times,
            )
            keys = None if songs_to_rank is None else _keys_of(batch, songs_to_rank[chunk])
            candidates = retrieve(self.retrievers, batch, self._counts, keys)
            yield (
                chunk,
                Scored(
                    batch=batch,
                    candidates=candidates,
                    features=self.sources.features(batch, candidates),
                    may_come=None if keys is None else np.isin(candidates.keys, keys, assume_unique=True),
                ),
            )


def _keys_of(batch: QueryBatch, songs: Sequence[np.ndarray]) -> np.ndarray:
    """int64, ascending: the keys of the pairs of each query and its `songs`, each once; unknown rows are left out."""
    rows = np.repeat(np.arange(len(songs)), [len(each) for each in songs])
    joined = np.concatenate([np.zeros(0, np.int64), *songs])
    known = (joined >= 0) & (joined < batch.num_songs)
    return np.unique(batch.keys(rows[known], joined[known]))


def query_slices(queries: Queries) -> Iterator[slice]:
    """Yield slices of the queries that are answered together, in order."""
    plays = np.minimum(queries.seen, LATEST_PLAYS) + 1
    by_plays, by_count = (np.cumsum(plays) - plays) // PLAYS_AT_ONCE, np.arange(len(queries)) // QUERIES_AT_ONCE
    changes = np.flatnonzero((np.diff(by_plays) != 0) | (np.diff(by_count) != 0)) + 1
    for begin, end in zip([0, *changes.tolist()], [*changes.tolist(), len(queries)], strict=True):
        if end > begin:
            yield slice(begin, end)


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
    scores_are_chances: ClassVar[bool] = True

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
            self.source.network, self.source.retrieval, real_times=self.source.sources.real_times, without=part
        )
        return TwoStepRecommender(source, rankers)

    def with_added_songs(self, added: AddedSongs, *, room: int = 0) -> TwoStepRecommender:
        """Return this recommender with `added` songs, see `TasteRecommender.add_songs`; changes its network."""
        self.source.network.add_songs(added, room=room)
        source = CandidateSource(self.source.network, self.source.retrieval, real_times=self.source.sources.real_times)
        return TwoStepRecommender(source, self.rankers)

    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """As in `CandidateRecommender`."""
        for chunk, scored in self.source.batches(histories, queries):
            candidates, chances = scored.candidates, _Chances(self, scored)
            yield (
                chunk,
                ScoredCandidates(
                    rows=candidates.rows, songs=candidates.songs, scores=chances, retrievers=candidates.positions
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
        hidden: np.ndarray | None = None,
    ) -> Ranking:
        """As in `BaseRecommender`, but without scoring every song."""
        queries = Queries.at_end(histories, at, hidden)
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

        `long_weight` is 0 for the short horizon, 1 for the long one; values between mix both. If songs near the taste
        vector fill an answer, its path is `index`, and `filled` is their number. `songs_to_rank`, int song rows for
        each query, are ranked instead of the proposals of the retrievers. A song that retrievers propose, too, has the
        same score as without `songs_to_rank`, or a slightly lower one if there are many other songs to rank.
        """
        check_count(k)
        ranking = Ranking.empty(len(queries), k, "exact")
        paths = list(ranking.paths)
        for chunk, scored in self.source.batches(histories, queries, vectors, songs_to_rank):
            some = None if filters is None else filters[chunk]
            part = self.rank_scored(scored, k, some, long_weight=long_weight)
            ranking.songs[chunk], ranking.scores[chunk], paths[chunk] = part.songs, part.scores, part.paths
            ranking.filled[chunk] = part.filled
        return replace(ranking, paths=tuple(paths))

    def rank_scored(
        self, scored: Scored, k: int, filters: Sequence[AnswerFilter] | None = None, *, long_weight: float = 0.0
    ) -> Ranking:
        """As `rank_queries`, for queries whose candidates and features are already computed."""
        new_only = np.array([answer_filter.new_only for answer_filter in filters or ()] or [False] * len(scored.batch))
        chances = self.chances(scored, long_weight, new_only)
        songs, scores = _best(scored, chances, k, filters)
        filled = np.zeros(len(songs), dtype=np.int64)
        short = songs[:, -1] == NO_SONG if scored.may_come is None else np.zeros(len(songs), dtype=bool)
        for row in np.flatnonzero(short).tolist():
            filled[row] = self._fill(scored.batch, row, songs[row], scores[row], filters, long_weight)
        paths: list[SearchPath] = ["index" if count else "exact" for count in filled.tolist()]
        return Ranking(songs=songs, scores=scores, paths=tuple(paths), filled=filled)

    def chances(self, scored: Scored, long_weight: float, new_only: np.ndarray) -> np.ndarray:
        """float64 (C,): the probability of each candidate; `new_only`, bool (Q,): which queries ask only for new songs.

        If `long_weight` is between 0 and 1, the weighted mean of the candidate's softmax shares on both horizons.
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
        """float64 (C,): the probabilities by one ranker, or, with `shares`, the softmax shares within each query."""
        ranker, rows = self.rankers[kind], scored.candidates.rows
        if kind == "served":  # this ranker orders only new songs
            new = scored.batch.user_songs.find(scored.candidates.keys) < 0
            values = np.zeros(len(rows))
            scores = ranker.scores(self._features(scored, kind)[new])
            values[new] = (ranker.calibration.shares_of if shares else ranker.calibration)(rows[new], scores)
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
            table = [scored.features[row].tolist() if row >= 0 else [] for row in rows.tolist()]
            features = [dict(zip(self.source.sources.names, values, strict=False)) for values in table]
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
        proposed = int(np.count_nonzero(songs != NO_SONG))
        answer_filter = AnswerFilter() if filters is None else filters[row]
        within = replace(answer_filter, excluded=np.concatenate([answer_filter.excluded, songs[:proposed]]))
        more = self.source.index.rank(vector[None], len(songs) - proposed, [within])
        songs[proposed:] = more.songs[0]
        scores[proposed:] = np.where(more.songs[0] == NO_SONG, -np.inf, 0)
        return int(np.count_nonzero(more.songs[0] != NO_SONG))


class _Chances:
    """The probabilities of a batch of candidates, computed once for each kind of answer."""

    def __init__(self, recommender: TwoStepRecommender, scored: Scored) -> None:
        self._recommender, self._scored = recommender, scored
        self._known: dict[tuple[HorizonName, bool], np.ndarray] = {}

    def __call__(self, horizon: HorizonName, exclude_heard: bool) -> np.ndarray:
        """float64 (C,): the probabilities; the long horizon uses one ranker, with or without heard songs."""
        key = horizon, exclude_heard and horizon == "short"
        if key not in self._known:
            new_only = np.full(len(self._scored.batch), exclude_heard)
            self._known[key] = self._recommender.chances(self._scored, float(horizon == "long"), new_only)
        return self._known[key]


def _columns(learned: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """int64: the column in `names` of each feature that a ranker learned from, -1 if missing; None if all are equal."""
    if list(learned) == list(names):
        return None
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(name, -1) for name in learned])


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


def _best(
    scored: Scored, chances: np.ndarray, k: int, filters: Sequence[AnswerFilter] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return songs int32 (Q, k) and scores float32 (Q, k): the best candidates an answer may hold; ties by song row."""
    candidates, queries = scored.candidates, len(scored.batch)
    rows, songs = candidates.rows, candidates.songs
    may_come = scored.may_come
    if filters is not None:
        within = _qualify(candidates, filters)
        may_come = within if may_come is None else within & may_come
    if may_come is not None:
        rows, songs, chances = rows[may_come], songs[may_come], chances[may_come]
    best, places = best_of_each(rows, chances, songs, k)
    best_songs = np.full((queries, k), NO_SONG, dtype=np.int32)
    best_scores = np.full((queries, k), -np.inf, dtype=np.float32)
    best_songs[rows[best], places] = songs[best]
    best_scores[rows[best], places] = chances[best]
    return best_songs, best_scores


def _qualify(candidates: Candidates, filters: Sequence[AnswerFilter]) -> np.ndarray:
    """bool (C,): True for candidates that pass the filter of their query."""
    excluded = [answer_filter.excluded for answer_filter in filters]
    rows = np.repeat(np.arange(len(filters)), [len(songs) for songs in excluded])
    songs = np.concatenate([np.zeros(0, np.int64), *excluded])
    known = songs < candidates.num_songs
    keys = np.unique(rows[known] * candidates.num_songs + songs[known])
    qualified = ~np.isin(candidates.keys, keys, assume_unique=True)
    if any(answer_filter.allowed is not None for answer_filter in filters):
        bounds = np.searchsorted(candidates.rows, np.arange(len(filters) + 1))
        for row, answer_filter in enumerate(filters):
            if answer_filter.allowed is not None:
                own = slice(int(bounds[row]), int(bounds[row + 1]))
                qualified[own] &= answer_filter.allowed.holds(candidates.songs[own])
    return np.asarray(qualified)


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
    parts = {kind: [RankingExamples.none(len(source.sources.names))] for kind in answers}
    for chunk, scored in source.batches(histories, queries, vectors):
        heard = scored.batch.user_songs.find(scored.candidates.keys) >= 0
        for kind, (rows, songs) in answers.items():
            inside = (rows >= chunk.start) & (rows < chunk.stop)
            answered = np.bincount(rows[inside] - chunk.start, minlength=len(scored.batch)) > 0
            inside &= songs < source.num_songs
            keys = np.unique(scored.batch.keys(rows[inside] - chunk.start, songs[inside].astype(np.int64)))
            allowed = np.ones(len(heard), dtype=bool)
            if kind == "served":
                allowed, keys = ~heard, keys[scored.batch.user_songs.find(keys) < 0]
            parts[kind].append(_examples_of(scored, keys, allowed, answered & held_out[chunk], held_out[chunk]))
    return {kind: RankingExamples.joined(examples) for kind, examples in parts.items()}


def _drawn(scored: Scored, wrong: np.ndarray) -> np.ndarray:
    """bool (C,): True for NEGATIVES of the `wrong` candidates, bool (C,), of each query, drawn by a hash.

    The hash depends on the time of the query and on the song.
    """
    places = np.flatnonzero(wrong)
    rows, songs = scored.candidates.rows[places], scored.candidates.songs[places]
    mixed = (scored.batch.queries.at[rows] * 1_000_003 + songs).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    order = np.lexsort((mixed ^ (mixed >> np.uint64(29)), rows))
    drawn = np.zeros(len(wrong), dtype=bool)
    drawn[places[order[places_in(rows[order]) < NEGATIVES]]] = True
    return drawn


def _examples_of(
    scored: Scored, keys: np.ndarray, allowed: np.ndarray, counted: np.ndarray, held_out: np.ndarray
) -> RankingExamples:
    """Return the examples of a batch of queries; the pairs of a query and its right song have the keys `keys`, int64.

    `allowed`, bool (C,), is True for candidates that may be used. Queries without a right candidate are left out, apart
    from those in `counted`, bool (Q,), which the calibration of probabilities needs.
    """
    rows, queries = scored.candidates.rows, len(scored.batch)
    hit = np.isin(scored.candidates.keys, keys, assume_unique=True) & allowed
    has_hit = np.bincount(rows, weights=hit, minlength=queries) > 0
    used = has_hit | counted
    is_example = allowed & used[rows]
    drawn = hit | _drawn(scored, is_example & ~hit)
    is_example &= held_out[rows] | drawn
    return RankingExamples(
        features=scored.features[is_example],
        right=hit[is_example],
        counts=np.bincount(rows[is_example], minlength=queries)[used],
        held_out=held_out[used],
        drawn=drawn[is_example],
    )


LONG = Horizon(min_offset=25, max_offset=50)  # used unless the network's long horizon is in days
HELD_OUT = 5  # one user in five is held out to check rankers trained on the others
SELECTION_RANKERS = "selection"  # folder in an artifact of rankers: rankers trained without the held-out users


def validation_queries(histories: Histories, split: Split, most: int) -> tuple[Histories, np.ndarray]:
    """Return histories up to the end of the validation range, and positions int64 (Q,) of at most `most` plays in it.

    Each of these plays has an earlier play by the same user. The choice depends only on user and time.
    """
    final_histories = split.final.select(histories)
    inside = split.is_validation(final_histories)
    inside[final_histories.offsets[:-1][final_histories.lengths > 0]] = False
    with_queries = np.bincount(final_histories.rows[inside], minlength=len(final_histories)) > 0
    query_histories = final_histories.take(with_queries)
    plays = np.flatnonzero(inside[with_queries[final_histories.rows]])
    if len(plays) > most:
        order = np.argsort(_play_hash(query_histories, plays), kind="stable")
        plays = np.sort(plays[order[:most]])
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
    begin, end = (network.long_days or LONG).spans(histories, queries)
    later = np.repeat(np.arange(len(plays)), end - begin), histories.songs[ranges(begin, end - begin)]
    following = np.arange(len(plays)), histories.songs[plays]
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"next": following, "served": following, "long": later}
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
    mixed = user_hash(histories.user_ids)[rows] ^ (
        histories.played_at[plays].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9))
