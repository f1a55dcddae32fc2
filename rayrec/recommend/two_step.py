"""Retrieve, then rank: a few hundred candidates a query, put in order by what is known of each; and what rankers
learn from: the queries of the validation range, with the songs that were played next or later.

Q queries, N songs, C candidates of all queries together, k answers, T right songs.
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

# next: the next play among all songs; served: a next play new to the user, among songs new to the user, since answers
# leave out songs heard by default; long: the plays at offsets 25 to 50, or in the days that the network's is for.
RankerKind = Literal["next", "served", "long"]
KINDS: tuple[RankerKind, ...] = get_args(RankerKind)
HORIZONS: tuple[HorizonName, ...] = ("short", "long")
NEGATIVES = 50  # wrong candidates of a query that a ranker learns from
QUERIES_AT_ONCE = 512
PLAYS_AT_ONCE = 1 << 19  # before the queries that are answered together


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Candidates of some queries with their features; scores are chances."""

    batch: QueryBatch
    candidates: Candidates
    features: np.ndarray  # float32 (C, F)
    may_come: np.ndarray | None = None  # bool (C,), candidates that an answer may hold; None: all


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
        without: str = "",
        counts: dict[str, int] | None = None,
    ) -> None:
        """`without` names one of ABLATED_PARTS to leave out, `counts` how many songs a query retrievers propose.

        Where songs were added to the network, retrievers of their own propose them.
        """
        added = network.added or None  # none where there are none
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
        self.num_songs = max(network.num_songs, retrieval.num_songs)  # either may know songs that came later
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
        """The queries in slices, few enough at once that little is held, with candidates and features.

        `vectors`, float32 (Q, D) by horizon, are the taste vectors where they are at hand. `songs_to_rank`, int song
        rows for each query, are candidates beside those of the retrievers, so that features and chances mean the same,
        and the only ones that an answer may hold.
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
    """int64, ascending: the keys of the song rows of each query, each once; rows that are not known are left out."""
    rows = np.repeat(np.arange(len(songs)), [len(each) for each in songs])
    joined = np.concatenate([np.zeros(0, np.int64), *songs])
    known = (joined >= 0) & (joined < batch.num_songs)
    return np.unique(batch.keys(rows[known], joined[known]))


def query_slices(queries: Queries) -> Iterator[slice]:
    """The queries to answer at once, one slice after the other."""
    plays = np.minimum(queries.seen, LATEST_PLAYS) + 1
    by_plays, by_count = (np.cumsum(plays) - plays) // PLAYS_AT_ONCE, np.arange(len(queries)) // QUERIES_AT_ONCE
    changes = np.flatnonzero((np.diff(by_plays) != 0) | (np.diff(by_count) != 0)) + 1
    for begin, end in zip([0, *changes.tolist()], [*changes.tolist(), len(queries)], strict=True):
        if end > begin:
            yield slice(begin, end)


class TwoStepRecommender(CandidateRecommender):
    """Orders the candidates of all retrievers by learned rankers: for the next play, new songs and the long term.

    A score of the short horizon is the chance that the song is the next play, whether songs that the user has heard are
    left out or not. One of the long horizon is the chance that the song is among the distinct songs 25 to 50 plays
    ahead, or in the days that the network's long horizon is for. Where the candidates that qualify are fewer than k,
    the songs nearest to the taste vector fill the answer; their scores are 0.
    """

    name = "two-step"
    kind: ClassVar[Kind] = "network"
    horizons: tuple[HorizonName, ...] = ("short", "long")
    scores_are_chances: ClassVar[bool] = True

    def __init__(self, source: CandidateSource, rankers: Mapping[RankerKind, Ranker]) -> None:
        """`rankers` hold one for the next play, and may hold one for answers of new songs and one for the long term."""
        self.source, self.rankers = source, rankers
        self.num_songs, self.added_songs = source.num_songs, source.network.added_songs
        self._columns = {kind: _columns(ranker.names, source.sources.names) for kind, ranker in rankers.items()}
        self.retrievers = tuple(retriever.name for retriever in source.retrievers)
        self.horizons = HORIZONS if "long" in rankers else ("short",)
        self.long_days = source.network.long_days

    def without_part(self, part: str, rankers: Mapping[RankerKind, Ranker]) -> TwoStepRecommender:
        """The same without one of ABLATED_PARTS, by rankers that were learned without it."""
        source = CandidateSource(
            self.source.network, self.source.retrieval, real_times=self.source.sources.real_times, without=part
        )
        return TwoStepRecommender(source, rankers)

    def with_added_songs(self, added: AddedSongs, *, room: int = 0) -> TwoStepRecommender:
        """The same with songs that came later, as `TasteRecommender.add_songs` takes them: the network changes."""
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
        """As in `BaseRecommender`, without a score for every song."""
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
        """The k best songs of each query that pass its filter, exactly k wherever as many qualify.

        `long_weight` is 0 for the order of the short horizon, 1 for that of the long one, and between them mixes both.
        Paths say `index`, and `filled` how many, where songs near the taste vector fill an answer. `songs_to_rank`, int
        song rows for each query, are put in order in place of what retrievers propose: a song that they propose, too,
        scores as it does without `songs_to_rank`, or a little less where there are many others.
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
        """As `rank_queries`, of queries whose candidates and features are at hand."""
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
        if kind == "served":  # it puts new songs alone in order
            new = scored.batch.user_songs.find(scored.candidates.keys) < 0
            values = np.zeros(len(rows))
            scores = ranker.scores(self._features(scored, kind)[new])
            values[new] = (ranker.calibration.shares_of if shares else ranker.calibration)(rows[new], scores)
            return values
        scores = ranker.scores(self._features(scored, kind))
        return np.asarray((ranker.calibration.shares_of if shares else ranker.calibration)(rows, scores))

    def _features(self, scored: Scored, kind: RankerKind) -> np.ndarray:
        """float32 (C, F): the features that a ranker learned from, those that are not there as zeros."""
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
        """The features of songs as candidates; {} for a song that is not known. See `BaseRecommender.explain`."""
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
        """Put the songs nearest to the taste vector behind the candidates of one query, in place; how many."""
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
    """The chances of the candidates of some queries, each kind of answer computed once."""

    def __init__(self, recommender: TwoStepRecommender, scored: Scored) -> None:
        self._recommender, self._scored = recommender, scored
        self._known: dict[tuple[HorizonName, bool], np.ndarray] = {}

    def __call__(self, horizon: HorizonName, exclude_heard: bool) -> np.ndarray:
        """float64 (C,); the long horizon has one ranker for both."""
        key = horizon, exclude_heard and horizon == "short"
        if key not in self._known:
            new_only = np.full(len(self._scored.batch), exclude_heard)
            self._known[key] = self._recommender.chances(self._scored, float(horizon == "long"), new_only)
        return self._known[key]


def _columns(learned: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """int64: the column of each feature that a ranker learned from, -1 for one that is not there; None: the same."""
    if list(learned) == list(names):
        return None
    places = {name: place for place, name in enumerate(names)}
    return np.array([places.get(name, -1) for name in learned])


def load_two_step(
    workspace: Workspace, network: TasteRecommender, retrieval: str, rankers: str, *, real_times: bool
) -> TwoStepRecommender:
    """From a network, with its index where it has one, the folder of a retrieval and that of rankers."""
    source = CandidateSource(network, Retrieval.load(workspace, retrieval), real_times=real_times)
    return TwoStepRecommender(source, load_rankers(workspace, rankers))


def load_rankers(workspace: Workspace, folder: str) -> dict[RankerKind, Ranker]:
    """The rankers in a folder; not every kind need be there."""
    kinds = [kind for kind in KINDS if workspace.exists(f"{folder}/{kind}.json")]
    return {kind: Ranker.load(workspace, folder, kind) for kind in kinds}


def _best(
    scored: Scored, chances: np.ndarray, k: int, filters: Sequence[AnswerFilter] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Songs int32 (Q, k) and scores float32 (Q, k): the best candidates that qualify; equal ones by song row."""
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
    """bool (C,): candidates that pass the filter of their query."""
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
    """What the ranker of each kind learns from: the candidates of queries, and which of them are right.

    `answers` hold the right songs of each kind, int (T,), after the queries to which they belong, int (T,);
    `held_out` is bool (Q,). For served, songs that the user has played are neither candidates nor right: a query held
    out that such a song answers is a miss, so that chances are those of all next plays. The source must not have seen
    the answers. Of each query at most NEGATIVES wrong candidates are drawn to learn from: more make learning longer and
    the order no better; of queries held out the others are kept, to check on. `vectors` are the taste vectors where
    they are at hand.
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
    """bool (C,): of each query NEGATIVES of its `wrong` candidates, bool (C,), by a hash of its time and the song."""
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
    """The examples of some queries whose right songs have `keys`, int64; `allowed`, bool (C,), are candidates.

    Queries that teach nothing are left out, but for those in `counted`, bool (Q,), which chances count.
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


LONG = Horizon(min_offset=25, max_offset=50)  # unless the network's long horizon is one of days
HELD_OUT = 5  # one user in so many checks what the others' examples taught
SELECTION_RANKERS = "selection"  # folder in an artifact of rankers: those that have not learned from these users


def validation_queries(histories: Histories, split: Split, most: int) -> tuple[Histories, np.ndarray]:
    """Histories that end with the validation range, and positions int64 (Q,) of at most `most` plays in it.

    Each has an earlier play by the same user. Which are taken follows from user and time alone.
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
    """bool (U,): the users whose queries check what rankers learned from the others."""
    return np.asarray(user_hash(user_ids) % np.uint64(HELD_OUT) == 0)


def collect_examples(
    sources: Mapping[str, CandidateSource], histories: Histories, plays: np.ndarray
) -> dict[str, dict[RankerKind, RankingExamples]]:
    """The examples of each source and kind for the plays at positions `plays`, int (Q,), which no source has seen.

    The sources have one network.
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
    """As bytes, for whoever trains."""
    arrays = {field.name: np.ascontiguousarray(getattr(examples, field.name)) for field in fields(examples)}
    return bytes(save(arrays))


def unpack_examples(data: bytes) -> RankingExamples:
    """What `pack_examples` made."""
    return RankingExamples(**load(data))


def _play_hash(histories: Histories, plays: np.ndarray) -> np.ndarray:
    """uint64: spreads plays evenly, whatever the order of the users."""
    rows = np.searchsorted(histories.offsets, plays, side="right") - 1
    mixed = user_hash(histories.user_ids)[rows] ^ (
        histories.played_at[plays].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    return np.asarray((mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9))
