"""Choose k songs for one user: at a horizon between short and long, some songs left out, others not allowed.

Where `Recommender.recommend` answers for many users alike, this answers each request as it was put, from
taste vectors that may come out of a stored state. N songs, D numbers per vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import NO_SONG, Horizon, Recommender, SearchPath, check_count, top_k
from rayrec.recommend.diversity import diversify, pool_size
from rayrec.recommend.filters import Limits
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.recommend.vector_recommender import normalized

Path = SearchPath | Literal["popular"]  # how an answer was found; popular: by play counts alone


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one request asks for."""

    k: int  # songs, at least 1
    long_weight: float = 0.0  # 0: the next songs; 1: songs for the time to come; between: both, mixed
    limits: Limits = field(default_factory=Limits)  # the songs that may come
    diversity: float = 0.0  # 0: the best songs; 1: songs unlike each other
    explain: bool = False  # whether the answer holds what is known of each song

    def __post_init__(self) -> None:
        check_count(self.k)
        if not 0 <= self.long_weight <= 1:
            raise ValueError(f"long_weight is {self.long_weight}; expected a number in [0, 1]")
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity is {self.diversity}; expected a number in [0, 1]")


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
    scores: np.ndarray  # float32 (n,), descending without diversity
    path: Path
    # What is known of each song, by name of the feature, where the request asks for it: `reasons` puts it in words.
    features: tuple[dict[str, float], ...] = ()


def network_of(recommender: Recommender) -> TasteRecommender:
    """The network within a recommender that has one."""
    network = recommender.source.network if isinstance(recommender, TwoStepRecommender) else recommender
    if not isinstance(network, TasteRecommender):
        raise TypeError(f"{type(recommender).__name__} has no taste network to answer with")
    return network


def choose(recommender: Recommender, known: Known, wish: Wish) -> Chosen:
    """The k best songs of a user, as `recommender` ranks them.

    At weight 0 and 1 these are the songs of `recommender.recommend` on the horizon. Between them a network
    alone looks around the mean of its two taste vectors; two-step recommendation mixes the chances of both.
    Diverse songs are chosen among the first of them.
    """
    if wish.diversity:
        pool = _choose(recommender, known, replace(wish, k=pool_size(wish.k)))
        taken = diversify(network_of(recommender).song_vectors[pool.songs], wish.k, wish.diversity)
        chosen = replace(pool, songs=pool.songs[taken], scores=pool.scores[taken])
    else:
        chosen = _choose(recommender, known, wish)
    if not wish.explain:
        return chosen
    features = recommender.explain(
        known.history, known.at, chosen.songs, long_weight=wish.long_weight, vectors=known.batch_vectors
    )
    return replace(chosen, features=tuple(features))


def similar(recommender: Recommender, song: int, k: int) -> Chosen:
    """The k songs nearest to a song, int row, by cosine of the network's vectors; none to a song without a vector."""
    network = network_of(recommender)
    vector, wish = network.song_vectors[song], Wish(k=k, limits=Limits(banned=np.array([song])))
    return _nearest(network, vector, wish)


def _choose(recommender: Recommender, known: Known, wish: Wish) -> Chosen:
    network = network_of(recommender)
    if isinstance(recommender, TwoStepRecommender):
        return _ranked(recommender, known, wish)
    return _nearest(network, _mixed_vector(known, wish), wish)


def _nearest(network: TasteRecommender, vector: np.ndarray, wish: Wish) -> Chosen:
    """The songs nearest to a vector, float32 (D,)."""
    if network.index is None:
        return _best(network.score_vectors(vector[None])[0], wish)
    ranking = network.rank_vectors(vector[None], wish.k, [wish.limits])
    real = ranking.songs[0] != NO_SONG
    return Chosen(songs=ranking.songs[0][real], scores=ranking.scores[0][real], path=ranking.paths[0])


def choose_popular(plays: np.ndarray, order: np.ndarray, wish: Wish) -> Chosen:
    """The k most played songs; `plays` is int64 (N,) and `order` the song rows, int32, by descending plays."""
    songs = order[wish.limits.mask(len(plays))[order]][: wish.k]
    return Chosen(songs=songs, scores=plays[songs].astype(np.float32), path="popular")


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
        known.history, queries, wish.k, long_weight=wish.long_weight, limits=[wish.limits], vectors=known.batch_vectors
    )
    real = ranking.songs[0] != NO_SONG
    return Chosen(songs=ranking.songs[0][real], scores=ranking.scores[0][real], path=ranking.paths[0])


def _best(scores: np.ndarray, wish: Wish) -> Chosen:
    """The k best of scores, float32 (N,), which are overwritten."""
    wish.limits.strike(scores)
    songs, values = top_k(scores[None], wish.k)
    real = songs[0] != NO_SONG
    return Chosen(songs=songs[0][real], scores=values[0][real], path="exact")
