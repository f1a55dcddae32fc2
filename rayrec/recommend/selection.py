"""What the settings of a baseline are chosen by: plays that neither a trial fit nor its song vectors have seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange, Split, validation_histories
from rayrec.recommend.base import NO_SONG, BaseRecommender, Horizon, SearchPath, check_count, top_k
from rayrec.recommend.exploring import POOL, with_explored
from rayrec.recommend.filters import Limits
from rayrec.recommend.retrieval.ragged import places_in
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.recommend.vector_recommender import normalized

MOST_PLAYS = 10_000  # of the validation range that are predicted
Path = SearchPath | Literal["popular"]  # how an answer was found; popular: by play counts alone


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The validation range of a split, and what a trial fit may see before it."""

    dataset: Dataset
    allowed: FitRange  # of trial fits
    vectors: np.ndarray | None  # float32 (N, D), normalized, made of no more than that; None where there are none
    histories: Histories  # users with plays in the validation range; nothing after it
    plays: np.ndarray  # int64 (Q,), positions of these plays

    def batches(self) -> Iterator[Histories]:
        """What a trial fit may see."""
        return (self.allowed.select(histories) for histories in self.dataset.read_all())

    def ahead(self, first: int, last: int) -> tuple[Questions, np.ndarray]:
        """Queries whose targets are the plays, so many plays ahead, drawn from unif{first, last}; and their songs.

        Plays of users who had fewer plays before are left out, and those of songs newer than the vectors.
        """
        num_songs = self.dataset.num_songs if self.vectors is None else len(self.vectors)
        ahead = np.random.default_rng(0).integers(first, last + 1, size=len(self.plays))
        rows = self.histories.rows[self.plays]
        seen = self.plays - self.histories.offsets[rows] + 1 - ahead
        kept = (seen > 0) & (self.histories.songs[self.plays] < num_songs)
        rows, seen, targets = rows[kept], seen[kept], self.plays[kept]
        queries = Questions(rows=rows, seen=seen, at=self.histories.played_at[targets])
        return queries, self.histories.songs[targets]


def make_selection(
    dataset: Dataset, split: Split, vectors: np.ndarray | None, limit: int = MOST_PLAYS
) -> Selection | None:
    """The first plays of the validation range in the order of the buckets, about `limit`; None where there are none."""
    kept = validation_histories(dataset, split, limit)
    plays = np.flatnonzero(split.is_validation(kept))
    if not len(plays):
        return None
    return Selection(dataset=dataset, allowed=split.selection, vectors=vectors, histories=kept, plays=plays)


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


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one request asks for."""

    k: int  # songs, at least 1
    long_weight: float = 0.0  # 0: the next songs; 1: songs for the time to come; between: both, mixed
    limits: Limits = field(default_factory=Limits)  # the songs that may come
    diversity: float = 0.0  # 0: the best songs; 1: songs unlike each other
    explore: float = 0.0  # share of the songs that have few plays and were drawn
    explain: bool = False  # whether the answer holds what is known of each song
    given: np.ndarray | None = None  # int (any,), song rows to put in order instead of retrieving songs

    def __post_init__(self) -> None:
        check_count(self.k)
        if not 0 <= self.long_weight <= 1:
            raise ValueError(f"long_weight is {self.long_weight}; expected a number in [0, 1]")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity is {self.diversity}; expected a number in [0, 1]")
        if not 0 <= self.explore <= 1:
            raise ValueError(f"explore is {self.explore}; expected a number in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of one user at the moment of a request."""

    vectors: Mapping[Horizon, np.ndarray]  # float32 (D,) each, the taste vectors of both horizons
    history: Histories  # of this one user: the plays that retrievers and features look at
    at: int  # ms UTC, the moment

    @property
    def batch_vectors(self) -> dict[Horizon, np.ndarray]:
        """float32 (1, D) by horizon: the taste vectors as those of a batch of one user."""
        return {horizon: vector[None] for horizon, vector in self.vectors.items()}


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The songs, best first; equal scores in the order of song rows. With diversity, in the order of choice."""

    songs: np.ndarray  # int32 (n,), n = k wherever as many songs qualify
    scores: np.ndarray  # float32 (n,), descending without diversity, but for those explored
    path: Path
    probabilities: np.ndarray | None = None  # float64 (n,), of explored songs; NaN for the others, None without any
    # What is known of each song, by name of the feature, where the request asks for it: `reasons` puts it in words.
    features: tuple[dict[str, float], ...] = ()

    def since(self, first: int) -> "Chosen":
        """Those after the `first` songs."""
        songs, scores, features = self.songs[first:], self.scores[first:], self.features[first:]
        probabilities = None if self.probabilities is None else self.probabilities[first:]
        return replace(self, songs=songs, scores=scores, features=features, probabilities=probabilities)


def network_of(recommender: BaseRecommender) -> TasteRecommender:
    """The network within a recommender that has one."""
    network = recommender.source.network if isinstance(recommender, TwoStepRecommender) else recommender
    if not isinstance(network, TasteRecommender):
        raise TypeError(f"{type(recommender).__name__} has no taste network to answer with")
    return network


def choose(recommender: BaseRecommender, known: Known, wish: Wish) -> Chosen:
    """The k best songs of a user, as `recommender` ranks them.

    At weight 0 and 1 these are the songs of `recommender.recommend` on the horizon. Between them a network
    alone looks around the mean of its two taste vectors; two-step recommendation mixes the chances of both.
    Diverse songs are chosen among the first of them, explored ones among those behind.
    """
    count = pool_size(wish.k) if wish.diversity else wish.k
    pool = _choose(recommender, known, replace(wish, k=count + (POOL if wish.explore else 0)))
    taken = np.arange(min(wish.k, len(pool.songs)))
    if wish.diversity:
        taken = diversify(network_of(recommender).song_vectors[pool.songs[:count]], wish.k, wish.diversity)
    chosen = replace(pool, songs=pool.songs[taken], scores=pool.scores[taken])
    if wish.explore:
        ranked = pool.songs, pool.scores
        explored = with_explored(recommender, known.history, known.at, ranked, taken, wish.explore)
        songs, scores = explored.songs, explored.scores
        chosen = replace(chosen, songs=songs, scores=scores, probabilities=explored.probabilities)
    if not wish.explain:
        return chosen
    features = recommender.explain(
        known.history, known.at, chosen.songs, long_weight=wish.long_weight, vectors=known.batch_vectors
    )
    return replace(chosen, features=tuple(features))


def similar(recommender: BaseRecommender, song: int, k: int) -> Chosen:
    """The k songs nearest to a song, int row, by cosine of the network's vectors; none to a song without a vector."""
    network = network_of(recommender)
    vector, wish = network.song_vectors[song], Wish(k=k, limits=Limits(banned=np.array([song])))
    return _nearest(network, vector, wish)


def _choose(recommender: BaseRecommender, known: Known, wish: Wish) -> Chosen:
    network = network_of(recommender)
    if isinstance(recommender, TwoStepRecommender):
        return _ranked(recommender, known, wish)
    vector = _mixed_vector(known, wish)
    if wish.given is not None:
        rows = wish.given[wish.given < network.num_songs]
        vectors = network.song_vectors[rows]
        rows, vectors = rows[vectors.any(axis=1)], vectors[vectors.any(axis=1)]
        return _in_order(rows, vectors @ vector, "exact", wish)
    return _nearest(network, vector, wish)


def _in_order(rows: np.ndarray, scores: np.ndarray, path: Path, wish: Wish) -> Chosen:
    """Song rows, int (n,), by descending scores, (n,), equal ones by row: those within the limits, at most k."""
    order = np.lexsort((rows, -scores))
    order = order[wish.limits.qualify(rows[order])][: wish.k]
    return Chosen(songs=rows[order].astype(np.int32), scores=scores[order].astype(np.float32), path=path)


def _nearest(network: TasteRecommender, vector: np.ndarray, wish: Wish) -> Chosen:
    """The songs nearest to a vector, float32 (D,)."""
    if network.index is None:
        return _best(network.score_vectors(vector[None])[0], wish)
    ranking = network.rank_vectors(vector[None], wish.k, [wish.limits])
    real = ranking.songs[0] != NO_SONG
    return Chosen(songs=ranking.songs[0][real], scores=ranking.scores[0][real], path=ranking.paths[0])


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


def choose_popular(starting: Starting, wish: Wish) -> Chosen:
    """The k songs that come first for a user of whom nothing is known."""
    worth, order = starting.worth, starting.order
    if wish.given is not None:
        rows = wish.given[wish.given < len(worth)]
        return _in_order(rows, worth[rows], "popular", wish)
    songs = order[wish.limits.mask(len(worth))[order]][: wish.k]
    return Chosen(songs=songs, scores=worth[songs].astype(np.float32), path="popular")


def _mixed_vector(known: Known, wish: Wish) -> np.ndarray:
    """float32 (D,): the taste vector of the wish's horizon."""
    if wish.long_weight in (0, 1):
        return known.vectors["long" if wish.long_weight else "short"]
    short, long = known.vectors["short"], known.vectors["long"]
    mixed: np.ndarray = normalized(((1 - wish.long_weight) * short + wish.long_weight * long)[None])[0]
    return mixed


def _ranked(recommender: TwoStepRecommender, known: Known, wish: Wish) -> Chosen:
    """The best candidates by the rankers."""
    queries = Questions.at_end(known.history, known.at)
    ranking = recommender.rank_queries(
        known.history,
        queries,
        wish.k,
        long_weight=wish.long_weight,
        limits=[wish.limits],
        vectors=known.batch_vectors,
        given=None if wish.given is None else [wish.given],
    )
    real = ranking.songs[0] != NO_SONG
    return Chosen(songs=ranking.songs[0][real], scores=ranking.scores[0][real], path=ranking.paths[0])


def _best(scores: np.ndarray, wish: Wish) -> Chosen:
    """The k best of scores, float32 (N,), which are overwritten."""
    wish.limits.strike(scores)
    songs, values = top_k(scores[None], wish.k)
    real = songs[0] != NO_SONG
    return Chosen(songs=songs[0][real], scores=values[0][real], path="exact")
