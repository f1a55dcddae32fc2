"""Turns ranked songs into an answer: diversity, exploration, and popular songs for users without known plays.

Shapes: U users, N songs, P songs of a pool, k answers, D dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Literal

import numpy as np
from pydantic import ConfigDict, Field, InstanceOf

from rayrec.config import Settings
from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import positions_in_groups
from rayrec.data.top_k import top_k
from rayrec.recommend.base import NO_SONG, BaseRecommender, HorizonName, Ranking, SearchPath, normalized
from rayrec.recommend.candidate_features import look_up
from rayrec.recommend.filters import AnswerFilter, first_of_order
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender

FEW_PLAYS = 20  # songs with fewer plays can be explored
POOL = 500  # songs ranked after the answer, among which songs with few plays are explored
UNIFORM_SHARE = (
    0.5  # part of a probability that is equal for all songs of the pool; the rest is proportional to the score
)


@dataclass(frozen=True, kw_only=True)
class Explored:
    """An answer of k songs, some of them explored; the others are the best songs, in their order."""

    songs: np.ndarray  # int32 (k,)
    scores: np.ndarray  # float32 (k,)
    probabilities: np.ndarray  # float64 (k,), probability that an explored song is shown; NaN for other songs


def with_explored(
    recommender: BaseRecommender,
    history: Histories,
    at: int,
    ranked: tuple[np.ndarray, np.ndarray],
    positions: np.ndarray,
    share: float,
) -> Explored:
    """Return the answer for one user at `at` (ms UTC) with a `share` of explored songs, see `explore`.

    `ranked` are song rows, int32 (n,), and scores, float32 (n,), of the answer and of POOL songs ranked after it.
    `positions`, int64 (k,), are the positions in `ranked` of the answer without exploration.
    """
    songs, scores = ranked
    has_few_plays = few_plays(recommender, songs)
    has_few_plays[positions] = False
    draw = draw_of(history, at)
    return explore((songs[positions], scores[positions]), (songs[has_few_plays], scores[has_few_plays]), share, draw)


def few_plays(recommender: BaseRecommender, songs: np.ndarray) -> np.ndarray:
    """bool (n,): True for `songs`, int (n,) rows, with fewer than FEW_PLAYS plays.

    A recommender without retrieval has no play counts; for it, only the songs added to the network have few plays.
    """
    if not isinstance(recommender, TwoStepRecommender):
        added_rows = recommender.added_songs if isinstance(recommender, TasteRecommender) else np.zeros(0, np.int64)
        return np.isin(songs, added_rows)
    plays = recommender.source.retrieval.plays.plays
    has_few_plays = np.ones(len(songs), dtype=bool)
    in_range = songs < len(plays)
    has_few_plays[in_range] = plays[songs[in_range]] < FEW_PLAYS
    return has_few_plays


def draw_of(history: Histories, at: int) -> float:
    """Return a pseudo-random number in [0, 1) that depends only on the last 20 plays and the moment `at` (ms UTC)."""
    songs, played_at = history.songs[-20:].astype("<i4"), history.played_at[-20:].astype("<i8")
    digest = blake2b(songs.tobytes() + played_at.tobytes() + at.to_bytes(8, "little", signed=True), digest_size=8)
    return int.from_bytes(digest.digest(), "little") / 2.0**64


def explore(
    best: tuple[np.ndarray, np.ndarray], pool: tuple[np.ndarray, np.ndarray], share: float, draw: float
) -> Explored:
    """Put songs of a pool into a `share` of the places of an answer; `draw`, in [0, 1), is the random number.

    `best` and `pool` are song rows, int32, and scores, float32: the k songs without exploration, and P other songs with
    few plays. share · k of the k places are explored, rounded up or down depending on `draw`, and evenly spread. Half
    of a song's probability is equal for all songs of the pool, half is proportional to its score; it is at most 1.
    Songs are drawn by systematic sampling (Madow 1949): the songs of the pool lie on a line, each as long as its
    probability, and the songs at the points draw, draw + 1, ... are taken. So each song is taken with exactly its
    probability.
    """
    (songs, scores), (pool_songs, pool_scores) = best, pool
    pool_probabilities = probabilities(pool_scores, share * len(songs))
    ends = np.cumsum(pool_probabilities)
    sampled = np.flatnonzero(np.ceil(ends - draw) > np.ceil(ends - pool_probabilities - draw))[: len(songs)]
    answer_probabilities = np.full(len(songs), np.nan)
    if not len(sampled):
        return Explored(songs=songs, scores=scores, probabilities=answer_probabilities)
    positions = ((np.arange(len(sampled)) + 0.5) * len(songs) / len(sampled)).astype(np.int64)
    other_positions = np.setdiff1d(np.arange(len(songs)), positions)
    answer_songs, answer_scores = np.empty_like(songs), np.empty_like(scores)
    answer_songs[positions], answer_songs[other_positions] = pool_songs[sampled], songs[: len(other_positions)]
    answer_scores[positions], answer_scores[other_positions] = pool_scores[sampled], scores[: len(other_positions)]
    answer_probabilities[positions] = pool_probabilities[sampled]
    return Explored(songs=answer_songs, scores=answer_scores, probabilities=answer_probabilities)


def probabilities(scores: np.ndarray, expected_count: float) -> np.ndarray:
    """float64 (P,): the probability of each song of a pool to be drawn; their sum is at most `expected_count`."""
    song_probabilities, is_remaining = np.zeros(len(scores)), np.ones(len(scores), dtype=bool)
    weights = np.maximum(np.nan_to_num(scores.astype(np.float64), neginf=0.0), 0.0)
    while is_remaining.any() and expected_count > 0:
        total = weights[is_remaining].sum()
        by_score = weights / total if total > 0 else np.full(len(scores), 1 / is_remaining.sum())
        song_probabilities[is_remaining] = (expected_count - (~is_remaining).sum()) * (
            UNIFORM_SHARE / is_remaining.sum() + (1 - UNIFORM_SHARE) * by_score[is_remaining]
        )
        is_certain = is_remaining & (song_probabilities >= 1)
        if not is_certain.any():
            break
        song_probabilities[is_certain], is_remaining = 1.0, is_remaining & ~is_certain
    return song_probabilities


Path = SearchPath | Literal["popular"]  # how an answer was found; popular: by play counts alone


def diversify(vectors: np.ndarray, k: int, diversity: float) -> np.ndarray:
    """int64 (k,): the positions of the songs to choose among P ranked songs, by MMR (Carbonell and Goldstein 1998).

    They are in the order of choice. `vectors`, float32 (P, D), are normalized and in the order of the ranking. Each
    step chooses the song with the highest (1 − diversity) · relevance − diversity · similarity. Relevance falls
    linearly from 1 for the first place to 0 for the last, since the scores of recommenders differ in scale [ours].
    Similarity is the largest cosine with a song that is already chosen. Diversity 0 keeps the order, 1 uses only
    similarity. Of equal songs the one that ranks higher is chosen. If P is below k, the result has P positions.
    """
    num_songs = len(vectors)
    k = min(k, num_songs)
    if not diversity:
        return np.arange(k)
    relevance = (
        (1 - diversity) * np.linspace(1, 0, num_songs, dtype=np.float32) if num_songs > 1 else np.ones(num_songs)
    )
    selected = np.zeros(k, dtype=np.int64)
    similarity = np.full(num_songs, -np.inf, dtype=np.float32)  # no song is chosen yet
    mmr_scores = relevance.copy()
    for step in range(k):
        best = int(np.argmax(mmr_scores))
        selected[step] = best
        np.maximum(similarity, vectors @ vectors[best], out=similarity)
        mmr_scores = relevance - diversity * similarity
        mmr_scores[selected[: step + 1]] = -np.inf
    return selected


class AnswerOptions(Settings):
    """The options of one request."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    k: int = Field(ge=1)  # number of songs
    long_weight: float = Field(0.0, ge=0, le=1)  # 0: the next songs; 1: songs for later; between: both, mixed
    answer_filter: InstanceOf[AnswerFilter] = Field(default_factory=AnswerFilter)  # the songs that an answer may hold
    diversity: float = Field(0.0, ge=0, le=1)  # 0: the best songs; 1: songs unlike each other
    explore: float = Field(0.0, ge=0, le=1)  # share of the songs that are drawn from songs with few plays
    explain: bool = False  # whether the answer holds the features of each song
    # int (any,), song rows to rank instead of retrieving songs; the recommender must be able to score them.
    songs_to_rank: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class UserInput:
    """The taste vectors and plays of one user at the moment of a request."""

    vectors: Mapping[HorizonName, np.ndarray]  # float32 (D,) each, the taste vectors of both horizons
    history: Histories  # of this user only: the plays that retrievers and features read
    at: int  # ms UTC, the moment

    @property
    def batch_vectors(self) -> dict[HorizonName, np.ndarray]:
        """float32 (1, D) by horizon: the taste vectors as a batch of one user."""
        return {horizon: vector[None] for horizon, vector in self.vectors.items()}


def user_inputs(vectors: Mapping[HorizonName, np.ndarray], plays: Histories, at: np.ndarray) -> list[UserInput]:
    """Return a `UserInput` per user, from taste `vectors`, float32 (U, D) by horizon, `plays`, and `at`, int64 (U,)."""
    return [
        UserInput(
            vectors={horizon: values[row] for horizon, values in vectors.items()},
            history=plays.take(np.array([row])) if len(plays) > 1 else plays,
            at=int(at[row]),
        )
        for row in range(len(plays))
    ]


@dataclass(frozen=True, kw_only=True)
class SelectedSongs:
    """The songs of an answer, best first; equal scores by song row. With diversity, in the order of choice."""

    songs: np.ndarray  # int32 (n,), n = k if at least k songs pass the filter
    scores: np.ndarray  # float32 (n,), descending, except with diversity or explored songs
    path: Path
    probabilities: np.ndarray | None = None  # float64 (n,), of explored songs; NaN for others; None if not exploring
    # The features of each song, name -> value, if the request asks for reasons: `reasons` turns them into words.
    features: tuple[dict[str, float], ...] = ()

    def take(self, positions: slice) -> "SelectedSongs":
        """Return the songs at `positions`, in the same order."""
        songs, scores, features = self.songs[positions], self.scores[positions], self.features[positions]
        probabilities = None if self.probabilities is None else self.probabilities[positions]
        return replace(self, songs=songs, scores=scores, features=features, probabilities=probabilities)


def network_of(recommender: BaseRecommender) -> TasteRecommender:
    """Return the taste network of a recommender. Raises `TypeError` if it has none."""
    network = recommender.source.network if isinstance(recommender, TwoStepRecommender) else recommender
    if not isinstance(network, TasteRecommender):
        raise TypeError(f"expected a recommender with a taste network, got {type(recommender).__name__}")
    return network


def choose(
    recommender: BaseRecommender,
    vectors: Mapping[HorizonName, np.ndarray],
    plays: Histories,
    at: np.ndarray,
    all_options: Sequence[AnswerOptions],
) -> list[SelectedSongs]:
    """Return the k best songs of each of U users, as `recommender` ranks them.

    `vectors` are the taste vectors, float32 (U, D) by horizon; `at` are the moments, int64 (U,), ms UTC. With a
    `long_weight` of 0 or 1 the songs are those of `recommender.recommend` on the horizon. With a weight between, a
    network without rankers searches around the weighted mean of its two taste vectors, and two-step recommendation
    mixes the probabilities of both horizons. Diverse songs are chosen among the first ranked songs, explored songs
    among those after the answer. Requests for the same number of songs and the same horizon are ranked together.
    """
    users = user_inputs(vectors, plays, at)
    # Number of songs, long weight, retrieved or not -> rows of the users.
    rows_by_request: dict[tuple[int, float, bool], list[int]] = {}
    for row, options in enumerate(all_options):
        size = pool_size(options) + (POOL if options.explore else 0)
        rows_by_request.setdefault((size, options.long_weight, options.songs_to_rank is None), []).append(row)
    selected_by_row: dict[int, SelectedSongs] = {}
    for (size, long_weight, _), rows in rows_by_request.items():
        pool_options = [all_options[row].replace(k=size) for row in rows]
        if isinstance(recommender, TwoStepRecommender):
            group_plays = plays if len(rows) == len(plays) else plays.take(np.array(rows))
            songs_to_rank = [options.songs_to_rank for options in pool_options if options.songs_to_rank is not None]
            ranking = recommender.rank_queries(
                group_plays,
                Queries.at_end(group_plays, at[rows]),
                size,
                long_weight=long_weight,
                filters=[options.answer_filter for options in pool_options],
                vectors={horizon: values[rows] for horizon, values in vectors.items()},
                songs_to_rank=songs_to_rank or None,
            )
            pools = _split_ranking(ranking)
        else:
            pools = _rank_by_vectors(network_of(recommender), [users[row] for row in rows], pool_options)
        for row, pool in zip(rows, pools, strict=True):
            selected_by_row[row] = _select_from_pool(pool, recommender, users[row], all_options[row])
    return [selected_by_row[row] for row in range(len(plays))]


def pool_size(options: AnswerOptions) -> int:
    """Return the number of ranked songs that an answer is chosen from, without the songs to explore."""
    return options.k + max(options.k, 100) if options.diversity else options.k


def _select_from_pool(
    pool: SelectedSongs, recommender: BaseRecommender, user: UserInput, options: AnswerOptions
) -> SelectedSongs:
    """Return the songs of an answer, chosen from a ranked pool, best first."""
    positions = np.arange(min(options.k, len(pool.songs)))
    if options.diversity:
        vectors = look_up(network_of(recommender).song_vectors, pool.songs[: pool_size(options)])
        positions = diversify(vectors, options.k, options.diversity)
    selected = replace(pool, songs=pool.songs[positions], scores=pool.scores[positions])
    if options.explore:
        ranked = pool.songs, pool.scores
        explored = with_explored(recommender, user.history, user.at, ranked, positions, options.explore)
        songs, scores = explored.songs, explored.scores
        selected = replace(selected, songs=songs, scores=scores, probabilities=explored.probabilities)
    if not options.explain:
        return selected
    features = recommender.explain(
        user.history, user.at, selected.songs, long_weight=options.long_weight, vectors=user.batch_vectors
    )
    return replace(selected, features=tuple(features))


def choose_for_users(
    recommender: BaseRecommender,
    histories: Histories,
    at: int,
    all_options: Sequence[AnswerOptions],
    load_starting: Callable[[], "PopularOrder"],
) -> list[SelectedSongs]:
    """Return the songs of each user at `at` (ms UTC): from `choose`, or `choose_popular` if no play is known."""
    rows_with_plays = np.flatnonzero(histories.lengths)
    selected_by_row: dict[int, SelectedSongs] = {}
    if len(rows_with_plays):
        plays = histories.take(rows_with_plays)
        vectors = network_of(recommender).vectors_of(plays, Queries.at_end(plays, at), HORIZONS)
        user_options = [all_options[row] for row in rows_with_plays.tolist()]
        selected = choose(recommender, vectors, plays, np.full(len(plays), at), user_options)
        selected_by_row = dict(zip(rows_with_plays.tolist(), selected, strict=True))
    if len(rows_with_plays) < len(histories):
        starting = load_starting()
        for row in np.flatnonzero(histories.lengths == 0).tolist():
            selected_by_row[row] = choose_popular(starting, all_options[row])
    return [selected_by_row[row] for row in range(len(histories))]


def similar(recommender: BaseRecommender, song: int, k: int) -> SelectedSongs:
    """Return the k songs nearest to row `song` by cosine of the network's vectors; none for a song without a vector."""
    network = network_of(recommender)
    options = AnswerOptions(k=k, answer_filter=AnswerFilter(excluded=np.array([song])))
    (nearest,) = _nearest_songs(network, look_up(network.song_vectors, np.array([song])), [options])
    return nearest


def _rank_by_vectors(
    network: TasteRecommender, users: Sequence[UserInput], all_options: Sequence[AnswerOptions]
) -> list[SelectedSongs]:
    """Return the songs of each user by a network without rankers.

    All options must have the same k, and either all or none of them `songs_to_rank`.
    """
    vectors = np.stack([_mixed_vector(user, options) for user, options in zip(users, all_options, strict=True)])
    if all_options[0].songs_to_rank is None:
        return _nearest_songs(network, vectors, all_options)
    return [
        _order_songs_to_rank(network, vector, options) for vector, options in zip(vectors, all_options, strict=True)
    ]


def _order_songs_to_rank(network: TasteRecommender, vector: np.ndarray, options: AnswerOptions) -> SelectedSongs:
    """Return at most k of the songs to rank that pass the filter, by inner product with a taste vector, float32 (D,).

    Equal products are sorted by song row.
    """
    rows = options.songs_to_rank
    assert rows is not None
    scores = network.song_vectors[rows] @ vector
    order = np.lexsort((rows, -scores))
    order = order[options.answer_filter.qualify(rows[order])][: options.k]
    return SelectedSongs(songs=rows[order].astype(np.int32), scores=scores[order].astype(np.float32), path="exact")


def _nearest_songs(
    network: TasteRecommender, vectors: np.ndarray, all_options: Sequence[AnswerOptions]
) -> list[SelectedSongs]:
    """Return the songs nearest to each of `vectors`, float32 (n, D); all options must have the same k."""
    if network.index is None:
        return [
            _best_songs(network.score_vectors(vectors[row : row + 1])[0], user_options)
            for row, user_options in enumerate(all_options)
        ]
    filters = [options.answer_filter for options in all_options]
    return _split_ranking(network.rank_vectors(vectors, all_options[0].k, filters))


@dataclass(frozen=True, kw_only=True)
class PopularOrder:
    """The order of songs for users without known plays: recently popular songs by many different artists."""

    plays: np.ndarray  # int64 (N,), all plays
    # float64 (N,), recent plays, divided by 2 for an artist's second song, by 3 for the third, ...
    discounted_plays: np.ndarray
    is_known: np.ndarray  # bool (N,), songs that an answer may hold
    order: np.ndarray  # int32 (any,), rows of the songs that an answer may hold, by descending discounted plays

    @classmethod
    def of(
        cls,
        plays: np.ndarray,
        is_known: np.ndarray,
        *,
        recent_plays: np.ndarray | None = None,
        artist_of_song: np.ndarray | None = None,
    ) -> "PopularOrder":
        """Create the order from all `plays` of each song, (N,), and its `recent_plays`, which may be shorter than N.

        Without `recent_plays` all plays count. `is_known`, bool (N,), is True for songs that an answer may hold.
        `artist_of_song` is int, -1 if unknown, and may be shorter than N. Of songs with equal discounted plays
        those with more plays come first.
        """
        songs = np.arange(len(plays))
        counted_plays, artist_ids = plays, -1 - songs
        if recent_plays is not None and recent_plays.any():
            counted_plays = np.zeros(len(plays))
            counted_plays[: len(recent_plays)] = recent_plays[: len(plays)]
        if artist_of_song is not None:
            known_artists = artist_of_song[: len(plays)]
            artist_ids[: len(known_artists)] = np.where(
                known_artists >= 0, known_artists, artist_ids[: len(known_artists)]
            )
        order = np.lexsort((songs, -plays, -counted_plays, artist_ids))
        discounted_plays = np.zeros(len(plays))
        discounted_plays[order] = counted_plays[order] / (1 + positions_in_groups(artist_ids[order]))
        rows = np.lexsort((songs, -plays, -discounted_plays))
        return cls(
            plays=plays,
            discounted_plays=discounted_plays,
            is_known=is_known,
            order=rows[is_known[rows]].astype(np.int32),
        )

    def sort(self, rows: np.ndarray) -> np.ndarray:
        """Return the songs among `rows`, int (any,), that an answer may hold, in the order of `order`: int32 (n,).

        The cost does not depend on the catalog.
        """
        rows = rows[rows < len(self.is_known)]
        rows = rows[self.is_known[rows]]
        sorted_rows = rows[np.lexsort((rows, -self.plays[rows], -self.discounted_plays[rows]))]
        return np.asarray(sorted_rows, dtype=np.int32)


def choose_popular(starting: PopularOrder, options: AnswerOptions) -> SelectedSongs:
    """Return the first k songs for a user without known plays; with `songs_to_rank`, those songs in that order."""
    answer_filter, rows = options.answer_filter, options.songs_to_rank
    if rows is None and answer_filter.allowed is not None:
        rows = answer_filter.allowed.rows  # few songs, before which nearly the whole order may stand
    songs = (
        first_of_order(starting.order, answer_filter.qualify, options.k)
        if rows is None
        else starting.sort(rows[answer_filter.qualify(rows)])[: options.k]
    )
    return SelectedSongs(songs=songs, scores=starting.discounted_plays[songs].astype(np.float32), path="popular")


def _mixed_vector(user: UserInput, options: AnswerOptions) -> np.ndarray:
    """float32 (D,): the taste vector of the horizon, or the weighted mean of both."""
    if options.long_weight in (0, 1):
        return user.vectors["long" if options.long_weight else "short"]
    short_vector, long_vector = user.vectors["short"], user.vectors["long"]
    mixed_vector: np.ndarray = normalized(
        ((1 - options.long_weight) * short_vector + options.long_weight * long_vector)[None]
    )[0]
    return mixed_vector


def _split_ranking(ranking: Ranking) -> list[SelectedSongs]:
    """Return the songs of each query, without empty places."""
    is_song = ranking.songs != NO_SONG
    return [
        SelectedSongs(songs=songs[mask], scores=scores[mask], path=path)
        for songs, scores, mask, path in zip(ranking.songs, ranking.scores, is_song, ranking.paths, strict=True)
    ]


def _best_songs(scores: np.ndarray, options: AnswerOptions) -> SelectedSongs:
    """Return the k best songs by `scores`, float32 (N,), that pass the filter. Overwrites `scores`."""
    options.answer_filter.mask_scores(scores)
    songs, values = top_k(scores[None], options.k)
    is_song = songs[0] != NO_SONG
    return SelectedSongs(songs=songs[0][is_song], scores=values[0][is_song], path="exact")
