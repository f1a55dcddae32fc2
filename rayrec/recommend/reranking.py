"""From ranked songs to an answer: diverse songs, explored ones, and those for a user of whom nothing is known.

P songs of a pool, k answers, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field, InstanceOf

from rayrec.config import Settings
from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import places_in
from rayrec.recommend.base import NO_SONG, BaseRecommender, HorizonName, Ranking, SearchPath, normalized, top_k
from rayrec.recommend.filters import AnswerFilter, first_of_order
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender

FEW_PLAYS = 20  # fewer plays than so many are few
POOL = 500  # songs behind the answer among which those with few plays are looked for
EVENLY = 0.5  # of the probabilities, the part that is the same for all songs of the pool; the rest follows the scores


@dataclass(frozen=True, kw_only=True)
class Explored:
    """An answer of k songs, some of them explored; the others are the best, in their order."""

    songs: np.ndarray  # int32 (k,)
    scores: np.ndarray  # float32 (k,)
    probabilities: np.ndarray  # float64 (k,), with which an explored song is shown; NaN for the others


def with_explored(
    recommender: BaseRecommender,
    history: Histories,
    at: int,
    ranked: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
    share: float,
) -> Explored:
    """`explore` for one user at `at`, ms UTC.

    `ranked` are song rows, int32 (n,), and scores, float32 (n,), of the answer and of POOL songs behind it; `places`,
    int64 (k,), are the places among them of the answer without exploring.
    """
    songs, scores = ranked
    few = few_plays(recommender, songs)
    few[places] = False
    draw = draw_of(history, at)
    return explore((songs[places], scores[places]), (songs[few], scores[few]), share, draw)


def few_plays(recommender: BaseRecommender, songs: np.ndarray) -> np.ndarray:
    """bool (n,): songs, int (n,) rows, with fewer than FEW_PLAYS plays; a network alone knows those added to it."""
    if not isinstance(recommender, TwoStepRecommender):
        added = recommender.added_songs if isinstance(recommender, TasteRecommender) else np.zeros(0, np.int64)
        return np.isin(songs, added)
    plays = recommender.source.retrieval.plays.plays
    few = np.ones(len(songs), dtype=bool)
    inside = songs < len(plays)
    few[inside] = plays[songs[inside]] < FEW_PLAYS
    return few


def draw_of(history: Histories, at: int) -> float:
    """In [0, 1): the same for the same last plays and moment, ms UTC, whoever asks and wherever."""
    songs, played_at = history.songs[-20:].astype("<i4"), history.played_at[-20:].astype("<i8")
    digest = blake2b(songs.tobytes() + played_at.tobytes() + at.to_bytes(8, "little", signed=True), digest_size=8)
    return int.from_bytes(digest.digest(), "little") / 2.0**64


def explore(
    best: tuple[np.ndarray, np.ndarray], pool: tuple[np.ndarray, np.ndarray], share: float, draw: float
) -> Explored:
    """Put songs of a pool into `share` of the places of an answer; `draw`, in [0, 1), says which.

    `best` and `pool` are song rows, int32, and scores, float32: the k songs without exploring, and P others with few
    plays. Of k places share · k are explored, rounded up or down by the draw, spread evenly. A song's probability is
    half the same for all of the pool, half in proportion to its score, and at most 1: the pool is laid out on a line,
    each song as long as its probability, and those are taken that the points draw, draw + 1, ... hit (systematic
    sampling, Madow 1949), so each is taken with exactly that probability.
    """
    (songs, scores), (others, other_scores) = best, pool
    chances = probabilities(other_scores, share * len(songs))
    ends = np.cumsum(chances)
    drawn = np.flatnonzero(np.ceil(ends - draw) > np.ceil(ends - chances - draw))[: len(songs)]
    explored = np.full(len(songs), np.nan)
    if not len(drawn):
        return Explored(songs=songs, scores=scores, probabilities=explored)
    places = ((np.arange(len(drawn)) + 0.5) * len(songs) / len(drawn)).astype(np.int64)
    not_explored = np.setdiff1d(np.arange(len(songs)), places)
    answer, values = np.empty_like(songs), np.empty_like(scores)
    answer[places], answer[not_explored] = others[drawn], songs[: len(not_explored)]
    values[places], values[not_explored] = other_scores[drawn], scores[: len(not_explored)]
    explored[places] = chances[drawn]
    return Explored(songs=answer, scores=values, probabilities=explored)


def probabilities(scores: np.ndarray, places: float) -> np.ndarray:
    """float64 (P,): with which each song of a pool takes one of so many places; their sum is at most `places`."""
    chances, left = np.zeros(len(scores)), np.ones(len(scores), dtype=bool)
    worth = np.maximum(np.nan_to_num(scores.astype(np.float64), neginf=0.0), 0.0)
    while left.any() and places > 0:
        total = worth[left].sum()
        by_score = worth / total if total > 0 else np.full(len(scores), 1 / left.sum())
        chances[left] = (places - (~left).sum()) * (EVENLY / left.sum() + (1 - EVENLY) * by_score[left])
        certain = left & (chances >= 1)
        if not certain.any():
            break
        chances[certain], left = 1.0, left & ~certain
    return chances


Path = SearchPath | Literal["popular"]  # how an answer was found; popular: by play counts alone


def diversify(vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """int64 (k,): which of P ranked songs to take, in the order of choice, by MMR (Carbonell and Goldstein 1998).

    `vectors`, float32 (P, D), are normalized and in the order of the ranking. Each choice is the song
    of the highest (1 − diversity) · relevance − diversity · likeness. Relevance falls evenly from 1 for
    the first place to 0 for the last, since the scores of recommenders differ in scale [ours]; likeness
    is the largest cosine with a song chosen before. Diversity 0 keeps the order, 1 looks at likeness
    alone. Of equal songs the one that ranks higher is taken. Fewer than k where P is smaller.
    """
    songs = len(vectors)
    k = min(k, songs)
    if not diversity:
        return np.arange(k)
    relevance = (1 - diversity) * np.linspace(1, 0, songs, dtype=np.float32) if songs > 1 else np.ones(songs)
    chosen = np.zeros(k, dtype=np.int64)
    likeness = np.full(songs, -np.inf, dtype=np.float32)  # no song is like none
    worth = relevance.copy()
    for place in range(k):
        best = int(np.argmax(worth))
        chosen[place] = best
        np.maximum(likeness, vectors @ vectors[best], out=likeness)
        worth = relevance - diversity * likeness
        worth[chosen[: place + 1]] = -np.inf
    return chosen


def pool_size(k: int) -> int:
    """How many songs to rank so that k diverse ones can be chosen among them."""
    return k + max(k, 100)


class AnswerOptions(Settings):
    """What one request asks for."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    k: int = Field(ge=1)  # songs
    long_weight: float = Field(0.0, ge=0, le=1)  # 0: the next songs; 1: songs for later; between: both, mixed
    answer_filter: InstanceOf[AnswerFilter] = Field(default_factory=AnswerFilter)  # the songs that may come
    diversity: float = Field(0.0, ge=0, le=1)  # 0: the best songs; 1: songs unlike each other
    explore: float = Field(0.0, ge=0, le=1)  # share of the songs that have few plays and were drawn
    explain: bool = False  # whether the answer holds what is known of each song
    # int (any,), rows of songs that the recommender can score, to put in order instead of retrieving songs.
    songs_to_rank: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one user at the moment of a request."""

    vectors: Mapping[HorizonName, np.ndarray]  # float32 (D,) each, the taste vectors of both horizons
    history: Histories  # of this one user: the plays that retrievers and features look at
    at: int  # ms UTC, the moment

    @property
    def batch_vectors(self) -> dict[HorizonName, np.ndarray]:
        """float32 (1, D) by horizon: the taste vectors as those of a batch of one user."""
        return {horizon: vector[None] for horizon, vector in self.vectors.items()}


def known_of(vectors: Mapping[HorizonName, np.ndarray], plays: Histories, at: np.ndarray) -> list[Known]:
    """What is known of each of U users: taste vectors, float32 (U, D) by horizon, plays, and moments, int64 (U,)."""
    return [
        Known(
            vectors={horizon: values[row] for horizon, values in vectors.items()},
            history=plays.take(np.array([row])) if len(plays) > 1 else plays,
            at=int(at[row]),
        )
        for row in range(len(plays))
    ]


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The songs, best first; equal scores in the order of song rows. With diversity, in the order of choice."""

    songs: np.ndarray  # int32 (n,), n = k wherever as many songs qualify
    scores: np.ndarray  # float32 (n,), descending without diversity, but for those explored
    path: Path
    probabilities: np.ndarray | None = None  # float64 (n,), of explored songs; NaN for the others, None without any
    # What is known of each song, by name of the feature, where the request asks for it: `reasons` puts it in words.
    features: tuple[dict[str, float], ...] = ()

    def take(self, places: slice) -> "Chosen":
        """Some of them, in their order."""
        songs, scores, features = self.songs[places], self.scores[places], self.features[places]
        probabilities = None if self.probabilities is None else self.probabilities[places]
        return replace(self, songs=songs, scores=scores, features=features, probabilities=probabilities)


def network_of(recommender: BaseRecommender) -> TasteRecommender:
    """The network within a recommender that has one."""
    network = recommender.source.network if isinstance(recommender, TwoStepRecommender) else recommender
    if not isinstance(network, TasteRecommender):
        raise TypeError(f"{type(recommender).__name__} has no taste network to answer with")
    return network


def choose(
    recommender: BaseRecommender,
    vectors: Mapping[HorizonName, np.ndarray],
    plays: Histories,
    at: np.ndarray,
    all_options: Sequence[AnswerOptions],
) -> list[Chosen]:
    """The k best songs of each of U users, as `recommender` ranks them.

    Taste vectors are float32 (U, D) by horizon, moments int64 (U,), ms UTC. At weight 0 and 1 these are the songs of
    `recommender.recommend` on the horizon. Between them a network alone looks around the mean of its two taste
    vectors; two-step recommendation mixes the chances of both. Diverse songs are chosen among the first of them,
    explored ones among those behind. Users whose requests ask for as many songs of one horizon are ranked together.
    """
    known = known_of(vectors, plays, at)
    alike: dict[tuple[int, float, bool], list[int]] = {}  # what a pool is ranked by -> rows of the users
    for row, options in enumerate(all_options):
        size = _pool_size(options) + (POOL if options.explore else 0)
        alike.setdefault((size, options.long_weight, options.songs_to_rank is None), []).append(row)
    chosen: dict[int, Chosen] = {}
    for (size, _, _), rows in alike.items():
        some = [all_options[row].replace(k=size) for row in rows]
        if isinstance(recommender, TwoStepRecommender):
            pools = _ranked(recommender, vectors, plays, at, np.array(rows), some)
        else:
            pools = _near(network_of(recommender), [known[row] for row in rows], some)
        for row, pool in zip(rows, pools, strict=True):
            chosen[row] = _chosen_from(pool, recommender, known[row], all_options[row])
    return [chosen[row] for row in range(len(plays))]


def _pool_size(options: AnswerOptions) -> int:
    """How many ranked songs an answer is chosen from, without those to explore."""
    return pool_size(options.k) if options.diversity else options.k


def _chosen_from(pool: Chosen, recommender: BaseRecommender, known: Known, options: AnswerOptions) -> Chosen:
    """The songs of an answer among those of a pool, best first."""
    places = np.arange(min(options.k, len(pool.songs)))
    if options.diversity:
        first = pool.songs[: _pool_size(options)]
        places = diversify(network_of(recommender).song_vectors[first], options.k, options.diversity)
    chosen = replace(pool, songs=pool.songs[places], scores=pool.scores[places])
    if options.explore:
        ranked = pool.songs, pool.scores
        explored = with_explored(recommender, known.history, known.at, ranked, places, options.explore)
        songs, scores = explored.songs, explored.scores
        chosen = replace(chosen, songs=songs, scores=scores, probabilities=explored.probabilities)
    if not options.explain:
        return chosen
    features = recommender.explain(
        known.history, known.at, chosen.songs, long_weight=options.long_weight, vectors=known.batch_vectors
    )
    return replace(chosen, features=tuple(features))


def choose_for_users(
    recommender: BaseRecommender,
    histories: Histories,
    at: int,
    all_options: Sequence[AnswerOptions],
    load_starting: Callable[[], "Starting"],
) -> list[Chosen]:
    """The songs of each user at `at` (ms UTC): `choose`, or those of `choose_popular` where no play is known."""
    played = np.flatnonzero(histories.lengths)
    chosen: dict[int, Chosen] = {}
    if len(played):
        plays = histories.take(played)
        vectors = network_of(recommender).vectors_of(plays, Queries.at_end(plays, at), HORIZONS)
        some = [all_options[row] for row in played.tolist()]
        each = choose(recommender, vectors, plays, np.full(len(plays), at), some)
        chosen = dict(zip(played.tolist(), each, strict=True))
    if len(played) < len(histories):
        starting = load_starting()
        for row in np.flatnonzero(histories.lengths == 0).tolist():
            chosen[row] = choose_popular(starting, all_options[row])
    return [chosen[row] for row in range(len(histories))]


def similar(recommender: BaseRecommender, song: int, k: int) -> Chosen:
    """The k songs nearest to a song, int row, by cosine of the network's vectors; none to a song without a vector."""
    network = network_of(recommender)
    options = AnswerOptions(k=k, answer_filter=AnswerFilter(excluded=np.array([song])))
    (nearest,) = _nearest(network, network.song_vectors[song][None], [options])
    return nearest


def _near(network: TasteRecommender, known: Sequence[Known], all_options: Sequence[AnswerOptions]) -> list[Chosen]:
    """The songs of each user by a network alone; all ask for as many, and either all or none name those to rank."""
    vectors = np.stack([_mixed_vector(each, options) for each, options in zip(known, all_options, strict=True)])
    if all_options[0].songs_to_rank is None:
        return _nearest(network, vectors, all_options)
    return [_ordered(network, vector, options) for vector, options in zip(vectors, all_options, strict=True)]


def _ordered(network: TasteRecommender, vector: np.ndarray, options: AnswerOptions) -> Chosen:
    """The songs to rank by their likeness to a taste vector, float32 (D,)."""
    rows = options.songs_to_rank
    assert rows is not None
    return _in_order(rows, network.song_vectors[rows] @ vector, "exact", options)


def _in_order(rows: np.ndarray, scores: np.ndarray, path: Path, options: AnswerOptions) -> Chosen:
    """Song rows, int (n,), by descending scores, (n,), equal ones by row: those that pass the filter, at most k."""
    order = np.lexsort((rows, -scores))
    order = order[options.answer_filter.qualify(rows[order])][: options.k]
    return Chosen(songs=rows[order].astype(np.int32), scores=scores[order].astype(np.float32), path=path)


def _nearest(network: TasteRecommender, vectors: np.ndarray, all_options: Sequence[AnswerOptions]) -> list[Chosen]:
    """The songs nearest to each vector, float32 (n, D); all options ask for as many."""
    if network.index is None:
        return [_best(network.score_vectors(vectors[row : row + 1])[0], each) for row, each in enumerate(all_options)]
    filters = [options.answer_filter for options in all_options]
    return _of_ranking(network.rank_vectors(vectors, all_options[0].k, filters))


@dataclass(frozen=True, kw_only=True)
class Starting:
    """What comes first for a user of whom nothing is known: what is played of late, by many different artists."""

    worth: np.ndarray  # float64 (N,), plays of late; those of the second song of an artist halved, and so on
    order: np.ndarray  # int32 (any,), rows of the songs that may come, by descending worth

    @classmethod
    def of(
        cls,
        plays: np.ndarray,
        known: np.ndarray,
        *,
        recent_plays: np.ndarray | None = None,
        artist_of_song: np.ndarray | None = None,
    ) -> "Starting":
        """From the plays of each song, (N,), and those of late, which may end before N; without these all plays count.

        `known`, bool (N,), are the songs that may come; `artist_of_song` is int, -1 where it is not known, and may end
        before N. Of songs of equal worth those with more plays come first.
        """
        songs = np.arange(len(plays))
        late, artists = plays, -1 - songs
        if recent_plays is not None and recent_plays.any():
            late = np.zeros(len(plays))
            late[: len(recent_plays)] = recent_plays[: len(plays)]
        if artist_of_song is not None:
            own = artist_of_song[: len(plays)]
            artists[: len(own)] = np.where(own >= 0, own, artists[: len(own)])
        order = np.lexsort((songs, -plays, -late, artists))
        worth = np.zeros(len(plays))
        worth[order] = late[order] / (1 + places_in(artists[order]))
        rows = np.lexsort((songs, -plays, -worth))
        return cls(worth=worth, order=rows[known[rows]].astype(np.int32))


def choose_popular(starting: Starting, options: AnswerOptions) -> Chosen:
    """The k songs that come first for a user of whom nothing is known."""
    worth, order = starting.worth, starting.order
    if options.songs_to_rank is not None:
        rows = options.songs_to_rank
        played = rows < len(worth)  # others were added online: nothing is known of their plays
        return _in_order(rows, np.where(played, worth[np.where(played, rows, 0)], 0.0), "popular", options)
    songs = first_of_order(order, options.answer_filter.qualify, options.k)
    return Chosen(songs=songs, scores=worth[songs].astype(np.float32), path="popular")


def _mixed_vector(known: Known, options: AnswerOptions) -> np.ndarray:
    """float32 (D,): the taste vector of the horizon."""
    if options.long_weight in (0, 1):
        return known.vectors["long" if options.long_weight else "short"]
    short, long = known.vectors["short"], known.vectors["long"]
    mixed: np.ndarray = normalized(((1 - options.long_weight) * short + options.long_weight * long)[None])[0]
    return mixed


def _ranked(
    recommender: TwoStepRecommender,
    vectors: Mapping[HorizonName, np.ndarray],
    plays: Histories,
    at: np.ndarray,
    rows: np.ndarray,
    all_options: Sequence[AnswerOptions],
) -> list[Chosen]:
    """The best candidates of some users, int (n,) `rows`, by the rankers; their requests differ in filters and in the
    songs to rank alone."""
    some = plays if len(rows) == len(plays) else plays.take(rows)
    to_rank = [options.songs_to_rank for options in all_options if options.songs_to_rank is not None]
    ranking = recommender.rank_queries(
        some,
        Queries.at_end(some, at[rows]),
        all_options[0].k,
        long_weight=all_options[0].long_weight,
        filters=[options.answer_filter for options in all_options],
        vectors={horizon: values[rows] for horizon, values in vectors.items()},
        songs_to_rank=to_rank or None,
    )
    return _of_ranking(ranking)


def _of_ranking(ranking: Ranking) -> list[Chosen]:
    """The songs of each query, without the places that are empty."""
    real = ranking.songs != NO_SONG
    return [
        Chosen(songs=songs[there], scores=scores[there], path=path)
        for songs, scores, there, path in zip(ranking.songs, ranking.scores, real, ranking.paths, strict=True)
    ]


def _best(scores: np.ndarray, options: AnswerOptions) -> Chosen:
    """The k best of scores, float32 (N,), which are overwritten."""
    options.answer_filter.mask_scores(scores)
    songs, values = top_k(scores[None], options.k)
    real = songs[0] != NO_SONG
    return Chosen(songs=songs[0][real], scores=values[0][real], path="exact")
