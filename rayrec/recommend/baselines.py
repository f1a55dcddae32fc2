"""The baselines: popularity, user top, item kNN, sequential rules, weighted averages; how each is fitted and tuned.

The weighted baselines are those of the paper (De Boom et al. 2018): a sum of the last songs, with a learned weight for
each age.

Shapes: Q queries, N songs, P plays, D dimensions, J weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.linalg import solve
from scipy.sparse import coo_matrix, csr_matrix

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.ragged import group_of_each_item, group_sizes, ranges
from rayrec.data.split import FitRange, Split, validation_histories
from rayrec.errors import InputError
from rayrec.recommend.base import BaseRecommender, HorizonName, VectorRecommender, normalized
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender, last_plays
from rayrec.recommend.stored_retrieval import MAX_DISTANCE

SELECTION_PLAYS = 10_000  # plays of the validation range that are predicted


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The validation range of a split, and the plays before it that a trial fit may see."""

    dataset: Dataset
    allowed: FitRange  # the plays that trial fits may see
    vectors: np.ndarray | None  # float32 (N, D), normalized, fitted on these plays only; None without embeddings
    histories: Histories  # users with plays in the validation range; no plays after it
    plays: np.ndarray  # int64 (Q,), positions of the plays in the validation range

    def batches(self) -> Iterator[Histories]:
        """Yield the histories that a trial fit may see."""
        return (self.allowed.select(histories) for histories in self.dataset.read_all())

    def ahead(self, min_offset: int, max_offset: int) -> tuple[Queries, np.ndarray]:
        """Return queries whose targets are the plays, and the songs of the targets.

        A target is l plays ahead of its query, l drawn from unif{min_offset, max_offset}. Plays with fewer than l
        plays of the user before them are left out, and plays of songs newer than the vectors.
        """
        num_songs = self.dataset.num_songs if self.vectors is None else len(self.vectors)
        target_offsets = np.random.default_rng(0).integers(min_offset, max_offset + 1, size=len(self.plays))
        rows = self.histories.rows[self.plays]
        plays_before = self.plays - self.histories.offsets[rows] + 1 - target_offsets
        is_usable = (plays_before > 0) & (self.histories.songs[self.plays] < num_songs)
        rows, plays_before, targets = rows[is_usable], plays_before[is_usable], self.plays[is_usable]
        queries = Queries(rows=rows, plays_before=plays_before, at=self.histories.played_at[targets])
        return queries, self.histories.songs[targets]


def make_selection(dataset: Dataset, split: Split, vectors: np.ndarray | None) -> Selection | None:
    """Return about SELECTION_PLAYS plays of the validation range, from the first buckets; None without plays."""
    histories = validation_histories(dataset, split, SELECTION_PLAYS)
    plays = np.flatnonzero(split.is_validation(histories))
    if not len(plays):
        return None
    return Selection(dataset=dataset, allowed=split.selection, vectors=vectors, histories=histories, plays=plays)


WEIGHTS = 100  # last songs that have a weight
OFFSETS = {"weighted-short": (1, 1), "weighted-long": (25, 50)}  # offsets of targets, as the network's horizons
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # λ to choose from; a song's vector has the squared length 1
USUAL_PENALTY = 1e-1  # λ without a validation range
PLAYS_FOR_WEIGHTS = 2_000_000  # maximum plays read; a hundred weights need far fewer


class AverageRecommender(VectorRecommender):
    """t_u = Σ_j γ^(n−j) s_j over the n plays so far, normalized (De Boom et al. 2018, their baseline).

    `discount` is γ in (0, 1]: with 1 it is the plain average, near 0 only the last song counts. A play of a
    song without a vector adds nothing, but the plays before it are still discounted.
    """

    def __init__(self, song_vectors: np.ndarray, discount: float) -> None:
        super().__init__(song_vectors)
        self.discount = discount
        self.name = f"average-{float(discount)}"

    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the discounted average of the songs before each query."""
        order = np.lexsort((queries.plays_before, queries.rows))
        rows, plays_before = queries.rows[order], queries.plays_before[order]
        same_user = np.concatenate([[False], rows[1:] == rows[:-1]])  # True if the previous query is of the same user
        plays_since = plays_before - np.where(same_user, np.concatenate([[0], plays_before[:-1]]), 0)
        weights = np.float32(self.discount) ** np.arange(plays_since.max(initial=0))
        totals = _sum_last_vectors(self.song_vectors, histories, rows, plays_before, plays_since, weights)
        _carry(totals, same_user, np.float32(self.discount) ** plays_since)
        vectors = np.empty_like(totals)
        vectors[order] = normalized(totals)
        return vectors


def _sum_last_vectors(
    song_vectors: np.ndarray,
    histories: Histories,
    rows: np.ndarray,
    plays_before: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    """float32 (Q, D): the weighted sum of the vectors of the last `counts[q]` songs before each query q.

    The weight of the last song is the first of `weights`, float. Songs without a vector add nothing. Computed as one
    sparse product, to avoid a (P, D) array.
    """
    ends = np.cumsum(counts)
    ages = np.repeat(ends, counts) - np.arange(counts.sum()) - 1  # plays between this one and the query
    songs = histories.songs[np.repeat(histories.offsets[rows] + plays_before, counts) - ages - 1]
    is_known = songs < len(song_vectors)
    known_weights = np.where(is_known, weights[ages], 0).astype(np.float32)
    pointers = np.concatenate([[0], ends])
    shape = (len(rows), len(song_vectors))
    return np.asarray(csr_matrix((known_weights, np.where(is_known, songs, 0), pointers), shape) @ song_vectors)


def _carry(totals: np.ndarray, same_user: np.ndarray, decay: np.ndarray) -> None:
    """Add the final value of the previous row of `totals` times `decay` to each row with `same_user`, in place.

    Each step handles one query of every user, so the user with the most queries determines the number of steps.
    """
    starts = np.flatnonzero(~same_user)
    lengths = group_sizes(starts, len(same_user))
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = starts[longest_first], lengths[longest_first]
    for step in range(1, int(lengths.max(initial=0))):
        rows = starts[: np.searchsorted(-lengths, -step)] + step
        totals[rows] += decay[rows, None] * totals[rows - 1]


class WeightedRecommender(VectorRecommender):
    """t_u = Σ_j w_j s_(n−j) over the last songs, normalized (De Boom et al. 2018: their b_WST and b_WLT).

    A play of a song without a vector adds nothing, and does not change the weights of the plays before it.
    """

    def __init__(
        self, song_vectors: np.ndarray, weights: np.ndarray, name: str, penalty: float = USUAL_PENALTY
    ) -> None:
        """`weights`, float (J,), were fitted with the penalty λ; the weight of the last song is first."""
        super().__init__(song_vectors)
        self.weights = np.asarray(weights, dtype=np.float32)
        self.name, self.settings = name, {"penalty": penalty}

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        vectors: np.ndarray,
        *,
        name: str,
        allowed: FitRange,
        penalty: float = USUAL_PENALTY,
    ) -> "WeightedRecommender":
        """Fit the weights w that minimize the mean of ‖t_u − s‖² over positions and targets s, plus λ‖w‖².

        The squared distance [ours] replaces L_cos, which is the same for every multiple of w, so that λ‖w‖² would only
        shrink w. w is the solution of J linear equations, whose sums are collected in one pass over the plays. λ is
        chosen by L_cos: docs/method.md#baselines. Raises `LeakError` for a play that `allowed` forbids.
        """
        lag_sums = _fit_lag_sums(batches, vectors, OFFSETS[name], allowed)
        return cls(vectors, lag_sums.weights(penalty), name, penalty)

    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the weighted sum of the last songs before each query."""
        rows, plays_before = queries.rows, queries.plays_before
        counts = np.minimum(plays_before, len(self.weights))
        return normalized(_sum_last_vectors(self.song_vectors, histories, rows, plays_before, counts, self.weights))


class LagSums:
    """Sums of the inner products of two songs of a user, by their distance in plays (the lag).

    The equations of the weights sum the products s_(i−j) · s_(i−k) and s_(i−j) · target over positions i and their
    targets. Both are products of two songs of a user at some lag. So the products are summed once, by lag and by the
    number of plays of the user after the later song, which gives the number of positions and targets that a product
    counts for. The weights depend on nothing else.
    """

    def __init__(self, offsets: tuple[int, int]) -> None:
        self._offsets = offsets
        num_lags = num_ends = WEIGHTS + offsets[1]
        self._sums = np.zeros((num_lags, num_ends))  # by lag and number of later plays, at most `num_ends` - 1
        self._num_pairs = 0  # number of pairs of a position and a target
        self.plays = 0

    def add(self, histories: Histories, vectors: np.ndarray) -> None:
        """Add the plays of some users; songs without a vector count as zeros."""
        songs, rows = np.minimum(histories.songs, len(vectors) - 1), histories.rows
        is_unknown = histories.songs >= len(vectors)
        play_vectors = np.where(is_unknown[:, None], np.float32(0), vectors[songs])
        later_plays = np.minimum(histories.offsets[1:][rows] - 1 - np.arange(len(rows)), self._sums.shape[1] - 1)
        for lag in range(min(len(self._sums), int(histories.lengths.max(initial=0)))):
            pairs = np.flatnonzero(rows[lag:] == rows[: len(rows) - lag])
            products = np.einsum("pd,pd->p", play_vectors[pairs], play_vectors[pairs + lag])
            self._sums[lag] += np.bincount(later_plays[pairs + lag], weights=products, minlength=self._sums.shape[1])
        self._num_pairs += int(self._target_counts(later_plays).sum())
        self.plays += histories.num_plays

    def weights(self, penalty: float) -> np.ndarray:
        """float64 (J,): the solution of the equations for λ = `penalty`."""
        # If the later song of a pair is `age` plays before position i, `age` more plays follow it than follow i.
        later_plays = np.arange(self._sums.shape[1])
        # (J, number of later plays)
        target_counts = np.stack([self._target_counts(later_plays - age) for age in range(WEIGHTS)])
        gram = np.zeros((WEIGHTS, WEIGHTS))
        for lag in range(WEIGHTS):
            diagonal = target_counts[: WEIGHTS - lag] @ self._sums[lag]
            ages = np.arange(WEIGHTS - lag)
            gram[ages, ages + lag] = gram[ages + lag, ages] = diagonal
        totals = self._sums.sum(axis=1)
        min_offset, max_offset = self._offsets
        right_side = np.array([totals[age + min_offset : age + max_offset + 1].sum() for age in range(WEIGHTS)])
        num_pairs = max(1, self._num_pairs)
        solution: np.ndarray = solve(
            gram / num_pairs + penalty * np.eye(WEIGHTS), right_side / num_pairs, assume_a="pos"
        )
        return solution

    def _target_counts(self, later_plays: np.ndarray) -> np.ndarray:
        """Return the number of targets of a position that is followed by `later_plays` plays."""
        min_offset, max_offset = self._offsets
        return np.asarray(np.clip(later_plays - min_offset + 1, 0, max_offset - min_offset + 1))


def fit_weighted(
    batches: Iterable[Histories], vectors: np.ndarray, name: str, allowed: FitRange, selection: Selection | None
) -> WeightedRecommender:
    """Fit the baseline `name` of OFFSETS with the λ of smallest L_cos on the plays of `selection`."""
    penalty = USUAL_PENALTY
    if selection is not None and selection.vectors is not None:
        penalty = choose_penalty(selection, name)
    return WeightedRecommender.fit(batches, vectors, name=name, allowed=allowed, penalty=penalty)


def choose_penalty(selection: Selection, name: str) -> float:
    """Return the λ of PENALTIES whose taste vectors are nearest to the plays of `selection`, by L_cos."""
    vectors = selection.vectors
    if vectors is None:
        raise ValueError("choosing the penalty needs song embeddings; the selection has none")
    lag_sums = _fit_lag_sums(selection.batches(), vectors, OFFSETS[name], selection.allowed)
    queries, targets = selection.ahead(*OFFSETS[name])
    target_vectors = vectors[targets]

    def cosine(penalty: float) -> float:
        recommender = WeightedRecommender(vectors, lag_sums.weights(penalty), name)
        taste_vectors = recommender.vectors(selection.histories, queries)
        return float(np.einsum("qd,qd->", taste_vectors, target_vectors, dtype=np.float64))

    return max(PENALTIES, key=cosine)


def _fit_lag_sums(
    batches: Iterable[Histories], vectors: np.ndarray, offsets: tuple[int, int], allowed: FitRange
) -> LagSums:
    lag_sums = LagSums(offsets)
    for histories in batches:
        allowed.require(histories)
        lag_sums.add(histories, vectors)
        if lag_sums.plays >= PLAYS_FOR_WEIGHTS:
            break
    return lag_sums


USUAL_DAYS = 21.0  # last days whose plays popularity-recent counts, if no validation range chooses them
LATEST = 1_000  # latest plays of a user that user-top counts, to limit the cost of long histories
USUAL_DECAY = 1.0  # a pair of plays counts distance^-USUAL_DECAY, if no validation range chooses the exponent
USUAL_RULES = 1_000  # strongest rules kept per song
MAX_RULES = 20_000_000  # maximum rules in memory while counting: 160 MB
DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 1.0)


class PopularityRecommender(BaseRecommender):
    """Scores a song by its number of plays in the fit range, or in the last days of it; 0 without a play.

    `plays` is int64 (N,).
    """

    def __init__(self, plays: np.ndarray, name: str = "popularity") -> None:
        self.plays, self.name = np.asarray(plays), name
        self.num_songs = len(self.plays)

    @classmethod
    def fit(
        cls, batches: Iterable[Histories], *, num_songs: int, allowed: FitRange, since: int | None = None
    ) -> "PopularityRecommender":
        """Count the plays; if `since` (ms UTC) is given, only those from then on.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        plays = np.zeros(num_songs, dtype=np.int64)
        for histories in batches:
            allowed.require(histories)
            songs = histories.songs if since is None else histories.songs[histories.played_at >= since]
            plays += np.bincount(songs, minlength=num_songs)
        return cls(plays, "popularity" if since is None else "popularity-recent")

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the plays of each song, the same read-only row for every query."""
        return np.broadcast_to(self.plays.astype(np.float32), (len(queries), self.num_songs))


class UserTopRecommender(BaseRecommender):
    """Scores a song by how often the user has played it recently: P-TopFreq of next-basket research (Li et al. 2023).

    Nothing is fitted, since scores depend only on the plays before a query.
    """

    name = "user-top"

    def __init__(self, num_songs: int) -> None:
        self.num_songs = num_songs

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): how often each song is among the last 1,000 plays.

        Most songs of a user were played once. So a number from 0 to 0.5 is added, the higher the later the last play of
        the song was: it orders songs that were played equally often.
        """
        rows, songs, ages = last_plays(histories, queries, self.num_songs, LATEST)
        ones = np.ones(len(rows), dtype=np.float32)
        counts: np.ndarray = coo_matrix((ones, (rows, songs)), shape=(len(queries), self.num_songs)).toarray()
        recency = np.zeros_like(counts)
        np.maximum.at(recency, (rows, songs), (0.5 * (1 - ages / LATEST)).astype(np.float32))
        counts += recency
        return counts


class ItemKnnRecommender(VectorRecommender):
    """Uses the vector of the last song played as the taste vector, so it recommends the nearest songs of that song."""

    name = "item-knn"

    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, D): the last song's vector; zeros if there is no play, or the song has no vector."""
        song_rows = last_songs(histories, queries, self.num_songs)
        return np.where(song_rows[:, None] >= 0, self.song_vectors[song_rows], np.float32(0))


def last_songs(histories: Histories, queries: Queries, num_songs: int) -> np.ndarray:
    """int64 (Q,): the last song played before each query; -1 without a play, or for a row from `num_songs` on."""
    song_rows = np.full(len(queries), -1, dtype=np.int64)
    has_plays = queries.plays_before > 0
    last_plays = histories.offsets[queries.rows] + queries.plays_before - 1
    song_rows[has_plays] = histories.songs[last_plays[has_plays]]
    song_rows[song_rows >= num_songs] = -1
    return song_rows


class SequentialRulesRecommender(BaseRecommender):
    """Scores a song by how often it followed the last song, weighted distance^-decay (SR; Ludewig and Jannach 2018).

    `rules` is a sparse float32 (N, N): rows are songs, columns the songs that followed them. A song that never
    followed scores 0.
    """

    name = "sequential-rules"

    def __init__(self, rules: csr_matrix, decay: float = USUAL_DECAY) -> None:
        self.rules, self.settings = rules, {"decay": decay}
        self.num_songs = rules.shape[0]

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        *,
        num_songs: int,
        allowed: FitRange,
        max_distance: int = MAX_DISTANCE,
        decay: float = USUAL_DECAY,
        rules_per_song: int = USUAL_RULES,
        max_rules: int = MAX_RULES,
    ) -> "SequentialRulesRecommender":
        """Count which songs follow which in each user's history.

        The strongest `rules_per_song` rules of each song are kept, fewer if `max_rules` requires it. When there are
        more than `max_rules` rules while counting, the weaker ones are dropped early, so their weights may be slightly
        too low. Raises `LeakError` for a play that `allowed` forbids.
        """
        max_per_song = max(1, min(rules_per_song, max_rules // (2 * max(1, num_songs))))
        rules = count_rules(Histories.from_lists([], []), num_songs, max_distance, decay)
        for histories in batches:
            allowed.require(histories)
            rules = rules + count_rules(histories, num_songs, max_distance, decay)
            if rules.nnz > max_rules:
                rules = strongest(rules, max_per_song)
        recommender = cls(strongest(rules, max_per_song), decay)
        if max_per_song < rules_per_song:
            # The report names them, because a large catalog has few.
            recommender.settings = {**recommender.settings, "rules_per_song": max_per_song}
        return recommender

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        """float32 (Q, N): the weight of the rule from the last song to each song."""
        song_rows = last_songs(histories, queries, self.num_songs)
        scores = np.zeros((len(queries), self.num_songs), dtype=np.float32)
        query_rows = np.flatnonzero(song_rows >= 0)
        counts = np.diff(self.rules.indptr)[song_rows[query_rows]]
        starts = self.rules.indptr[song_rows[query_rows]].astype(np.int64)
        entries = ranges(starts, counts)
        scores[np.repeat(query_rows, counts), self.rules.indices[entries]] = self.rules.data[entries]
        return scores


def count_rules(histories: Histories, num_songs: int, max_distance: int, decay: float = USUAL_DECAY) -> csr_matrix:
    """Sparse float32 (N, N): Σ distance^-decay over pairs of plays of one user at most `max_distance` apart."""
    rows, songs = histories.rows, histories.songs
    rules = csr_matrix((np.zeros(0, np.float32), (np.zeros(0, np.int32),) * 2), shape=(num_songs, num_songs))
    for distance in range(1, max_distance + 1):  # one at a time, so that few pairs are in memory at once
        pairs = np.flatnonzero(rows[distance:] == rows[:-distance])
        weights = np.full(len(pairs), distance**-decay, dtype=np.float32)
        coordinates = (songs[pairs], songs[pairs + distance])
        rules = rules + csr_matrix((weights, coordinates), shape=(num_songs, num_songs))
    return rules


def strongest(rules: csr_matrix, count: int) -> csr_matrix:
    """Return the `count` largest entries of each row; of equal entries those with lower columns."""
    rows = group_of_each_item(np.diff(rules.indptr))
    order = np.lexsort((rules.indices, -rules.data, rows))
    ranks = np.arange(rules.nnz) - rules.indptr[rows]  # within the sorted row
    kept_entries = order[ranks < count]
    return csr_matrix(
        (rules.data[kept_entries], (rows[kept_entries], rules.indices[kept_entries])),
        shape=rules.shape,
        dtype=np.float32,
    )


Settings = Mapping[str, Any]  # settings of a baseline, name -> number; missing ones have their defaults
FromPlays = Callable[[Iterator[Histories], Dataset, FitRange, Settings], BaseRecommender]
FromVectors = Callable[[np.ndarray], BaseRecommender]


def _fit_popularity(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)


def _fit_popularity_recent(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings
) -> BaseRecommender:
    """Fit popularity-recent. If the data has no times, all plays count."""
    end = dataset.manifest.last_play + 1 if allowed.before is None else allowed.before
    days = settings.get("days", USUAL_DAYS)
    since = end - round(days * DAY_MS) if dataset.manifest.times == "real" else 0
    recommender = PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, since=since)
    recommender.settings = {"days": days} if since else {}  # without times all days count
    return recommender


def _fit_rules(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings
) -> BaseRecommender:
    decay = settings.get("decay", USUAL_DECAY)
    return SequentialRulesRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, decay=decay)


def _fit_vsknn(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings
) -> BaseRecommender:
    recommender = VsknnRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return recommender.with_settings(replace(recommender.tuning, **settings))


def _fit_vstan(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings
) -> BaseRecommender:
    recommender = VstanRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return recommender.with_settings(replace(recommender.tuning, **settings))


def _make_user_top(
    _batches: Iterator[Histories], dataset: Dataset, _allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return UserTopRecommender(dataset.num_songs)


FROM_PLAYS: dict[str, FromPlays] = {
    "popularity": _fit_popularity,
    "popularity-recent": _fit_popularity_recent,
    "user-top": _make_user_top,
    "sequential-rules": _fit_rules,
    "vsknn": _fit_vsknn,
    "vstan": _fit_vstan,
}


def _make_average(discount: float) -> FromVectors:
    return lambda vectors: AverageRecommender(vectors, discount)


FROM_VECTORS: dict[str, FromVectors] = {
    "item-knn": ItemKnnRecommender,
    **{f"average-{discount}": _make_average(discount) for discount in DISCOUNTS},
}
WEIGHTED_BASELINES = tuple(OFFSETS)  # the weighted baselines

BASELINES: tuple[str, ...] = (*FROM_PLAYS, *FROM_VECTORS, *WEIGHTED_BASELINES)


def needs_vectors(names: Sequence[str]) -> bool:
    """True if one of the named baselines works on song vectors."""
    return any(name in FROM_VECTORS or name in WEIGHTED_BASELINES for name in names)


def fit_baselines(
    names: Sequence[str],
    dataset: Dataset,
    vectors: np.ndarray | None,
    allowed: FitRange,
    selection: Selection | None = None,
    settings: Mapping[str, Settings] | None = None,
) -> list[BaseRecommender]:
    """Fit the named baselines on the plays of the data set that `allowed` permits, in the order of the names.

    `vectors`, float32 (N, D), normalized, must be fitted on the same range; `item-knn`, the averages and the weighted
    baselines need them and share the array. The weighted baselines choose λ on `selection`, or use a default without
    it. `settings` are those of the other baselines, by name. Raises `InputError` for an unknown name.
    """
    recommenders: list[BaseRecommender] = []
    for name in names:
        batches = (allowed.select(batch) for batch in dataset.read_all())
        if name in FROM_PLAYS:
            recommenders.append(FROM_PLAYS[name](batches, dataset, allowed, (settings or {}).get(name, {})))
        elif name not in BASELINES:
            raise InputError(f"unknown baseline {name!r}; expected one of {', '.join(BASELINES)}")
        elif vectors is None:
            raise InputError(f"{name} requires song embeddings; run `rayrec embed` first")
        elif name in FROM_VECTORS:
            recommenders.append(FROM_VECTORS[name](vectors))
        else:
            recommenders.append(fit_weighted(batches, vectors, name, allowed, selection))
    return recommenders
