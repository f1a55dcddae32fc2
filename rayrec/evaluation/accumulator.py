"""Sums from which all metrics and their intervals are computed, and the metrics of taste vectors.

Sums add up over any division of the users. Intervals are computed by a bootstrap over users. A hash assigns users to
1,024 cells, and in each bootstrap sample each cell counts Poisson(1) times (Chamandy et al. 2012, "Estimating
uncertainty for massive data streams"). So workers return sums by cell, whose size depends neither on the number of
users nor on the number of samples, and two models are compared on the same users.

The metrics of taste vectors are the mean cosine with the songs played later, and how often these songs are nearer than
random songs.

M models, V views, G groups of users, U users, B samples, C bootstrap cells, K cut-offs or columns, T curves, S slices,
R retrievers, N songs, Q queries, P pairs of a query and a later play, L offsets, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.evaluation.calibration import BIN_COLUMNS, CALIBRATED, PROBABILITY_BINS
from rayrec.evaluation.protocol import GROUPS, OFFSETS, TARGETS, plays_ahead
from rayrec.evaluation.ranks import METRICS
from rayrec.recommend.base import BaseRecommender, HorizonName, VectorRecommender

CELLS = 1024
LAST = "last"  # leave one out: each user's last play alone
VIEWS = (*TARGETS, LAST)
SLICED = ("recall", "mrr")  # the metrics of breakdowns
LISTED = ("popularity_rank", "repeats")  # the figures of recommended lists
COVERAGE_SONGS = 1 << 15  # songs by which coverage is measured, drawn if the catalog has more
RETURN_BYTES = 1 << 19  # bytes of sums that a worker returns, so that its whole result stays below 1 MB

NEGATIVES = ("uniform", "zipf")
PAIRED = ("next", "offsets25_50")  # the targets for which pairs are made
ZIPF_EXPONENT = 1.0  # z: the probability of a song is proportional to 1 / rank^z, by its popularity rank
PAIR_QUERIES_AT_ONCE = 1 << 12
TIE = 1e-6  # cosines that differ by less are equal except for rounding, as those of a + b with a and with b
PLACES = 1 << 32  # more than the plays of any user
CURVE_QUERIES_AT_ONCE = 1 << 14

Curve = tuple[VectorRecommender, HorizonName]


@dataclass(frozen=True, kw_only=True)
class CellRange:
    """The bootstrap cells of one unit of work: `count` of `total` cells, from `first` on."""

    total: int = CELLS
    first: int = 0
    count: int = CELLS

    def cells_of(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the cell of each user, counted from `first`; outside of [0, count) for users of other units."""
        hashes = user_hash(user_ids, salt="bootstrap cell ")
        return np.asarray((hashes % np.uint64(self.total)).astype(np.int64) - self.first)

    def holds(self, user_ids: np.ndarray) -> np.ndarray:
        """bool (U,): True for users whose cells are in this range."""
        cells = self.cells_of(user_ids)
        return np.asarray((cells >= 0) & (cells < self.count))


def cell_ranges(units: int, max_cells: int) -> list[CellRange]:
    """Divide each of `units` shares of the users into ranges of cells; all units together have about 1,024 cells.

    No range has more than `max_cells`. Return the ranges of one unit; all units are divided in the same way.
    """
    count = max(1, min(-(-CELLS // units), max_cells))
    num_ranges = -(-CELLS // (units * count))
    return [CellRange(total=num_ranges * count, first=index * count, count=count) for index in range(num_ranges)]


def bootstrap_weights(cells: int, samples: int, seed: int) -> np.ndarray:
    """float64 (B + 1, C): how often each cell counts, once in row 0 and Poisson(1) times in each sample after it."""
    weights = np.ones((samples + 1, cells))
    weights[1:] = np.random.default_rng(seed).poisson(1.0, size=(samples, cells))
    return weights


def means_with_intervals(
    sums: np.ndarray, counts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return value, low and high, float64 (K,) each, of the means `sums` / `counts`, both (B + 1, K).

    Row 0 holds the data itself, the other rows bootstrap samples. The result is NaN if nothing was counted. Samples
    that counted nothing are left out. Without samples, low and high equal the value.
    """
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    value, samples = means[0], means[1:]
    low, high = value.copy(), value.copy()
    has_value = ~np.isnan(value) & (counts[1:] > 0).any(axis=0)
    if has_value.any():
        tail = (1 - confidence) / 2
        low[has_value], high[has_value] = np.nanquantile(samples[:, has_value], [tail, 1 - tail], axis=0)
    return value, low, high


@dataclass
class MetricAccumulator:
    """The sums of all metrics, by bootstrap cell; `resampled` turns them into those of the data and of B samples."""

    users: np.ndarray  # int64 (V, G): users with queries; V are VIEWS, then the targets in days
    queries: np.ndarray  # float64 (C, V, G)
    metrics: np.ndarray  # float64 (C, M, V, G, 3 · K): see metric_columns
    curve_sums: np.ndarray  # float64 (C, T, offsets): cosines
    curve_counts: np.ndarray  # float64 (C, T, offsets): plays in `curve_sums`
    pairs_won: np.ndarray  # float64 (C, T, len(PAIRED), len(NEGATIVES)): see `pair_sums`
    pairs: np.ndarray  # the same shape: all pairs
    slice_metrics: np.ndarray  # float64 (C, M, S, len(SLICED))
    slice_queries: np.ndarray  # float64 (C, S)
    listed: np.ndarray  # uint8 (M, n / 8): bits of the songs drawn for coverage that are in any list
    list_sums: np.ndarray  # float64 (C, M, len(LISTED))
    list_counts: np.ndarray  # float64 (C, M): number of songs in the lists
    lists: np.ndarray  # int64 (M,): number of lists
    # float64 (C, M, OFFSETS and targets in days, R + 1): recall of the candidates, of all and by retriever
    retrieved: np.ndarray
    candidates: np.ndarray  # float64 (C, M, R + 1): number of candidates
    # float64 (calibrated models, len(CALIBRATED), PROBABILITY_BINS, BIN_COLUMNS): see `calibration_sums`
    bin_sums: np.ndarray

    @classmethod
    def empty(
        cls,
        *,
        cells: int,
        models: int,
        ks: int,
        curves: int = 0,
        offsets: int = 0,
        slices: int = 0,
        songs: int = 0,
        retrievers: int = 0,
        day_targets: int = 0,
        calibrated: int = 0,
    ) -> MetricAccumulator:
        """Return an accumulator of zeros; `songs` is the number of songs drawn for coverage.

        `day_targets` come after the VIEWS. `calibrated` is the number of models whose scores are probabilities.
        """
        views, groups = len(VIEWS) + day_targets, len(GROUPS)
        pair_shape = (cells, curves, len(PAIRED), len(NEGATIVES))
        retriever_columns = retrievers + 1 if retrievers else 0
        return cls(
            users=np.zeros((views, groups), dtype=np.int64),
            queries=np.zeros((cells, views, groups)),
            metrics=np.zeros((cells, models, views, groups, len(METRICS) * ks)),
            curve_sums=np.zeros((cells, curves, offsets)),
            curve_counts=np.zeros((cells, curves, offsets)),
            pairs_won=np.zeros(pair_shape),
            pairs=np.zeros(pair_shape),
            slice_metrics=np.zeros((cells, models, slices, len(SLICED))),
            slice_queries=np.zeros((cells, slices)),
            listed=np.zeros((models, -(-songs // 8)), dtype=np.uint8),
            list_sums=np.zeros((cells, models, len(LISTED))),
            list_counts=np.zeros((cells, models)),
            lists=np.zeros(models, dtype=np.int64),
            retrieved=np.zeros((cells, models, len(OFFSETS) + day_targets, retriever_columns)),
            candidates=np.zeros((cells, models, retriever_columns)),
            bin_sums=np.zeros((calibrated, len(CALIBRATED), PROBABILITY_BINS, BIN_COLUMNS)),
        )

    @property
    def cells(self) -> int:
        """C, the number of cells."""
        return len(self.queries)

    @property
    def bytes_of_cell(self) -> int:
        """The size of the sums of one cell in bytes."""
        return int(sum(getattr(self, name).nbytes for name in BY_CELL)) // max(1, self.cells)

    def add(self, other: MetricAccumulator, first_cell: int = 0) -> None:
        """Add `other` to the cells from `first_cell` on; cells beyond the last one continue at the first one."""
        cell_indices = (first_cell + np.arange(other.cells)) % max(1, self.cells)
        for name in BY_CELL:
            np.add.at(getattr(self, name), cell_indices, getattr(other, name))
        self.users += other.users
        self.lists += other.lists
        self.listed |= other.listed
        self.bin_sums += other.bin_sums

    def resampled(self, samples: int, seed: int) -> MetricAccumulator:
        """Return the sums of the data itself and of bootstrap samples along the first axis, of length B + 1."""
        weights = bootstrap_weights(self.cells, samples, seed)
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in BY_CELL:
            cell_sums = values[name]
            values[name] = (weights @ cell_sums.reshape(self.cells, -1)).reshape(samples + 1, *cell_sums.shape[1:])
        return MetricAccumulator(**values)


BY_CELL: Sequence[str] = [
    item.name for item in fields(MetricAccumulator) if item.name not in ("users", "listed", "lists", "bin_sums")
]


def curves_of(recommenders: Sequence[BaseRecommender]) -> list[Curve]:
    """Return one curve per horizon of each recommender that has vectors."""
    vector_recommenders = [recommender for recommender in recommenders if isinstance(recommender, VectorRecommender)]
    return [(recommender, horizon) for recommender in vector_recommenders for horizon in recommender.horizons]


def cosine_sums(
    recommender: VectorRecommender, vectors: np.ndarray, histories: Histories, queries: Queries, offsets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of cosines and their counts, float64 (U, L) each.

    The cosines are those of each query's taste vector, in `vectors`, float32 (Q, D), with the song l plays ahead, for l
    from 1 (the next song) to L. Queries and songs without a vector, and plays beyond the history, are not counted.
    """
    sums, counts = np.zeros((2, len(histories), offsets))
    rows_with_vector = np.flatnonzero(vectors.any(axis=1))
    for start in range(0, len(rows_with_vector), CURVE_QUERIES_AT_ONCE):
        block_rows = rows_with_vector[start : start + CURVE_QUERIES_AT_ONCE]
        user_rows = queries.rows[block_rows]
        plays = histories.offsets[user_rows] + queries.plays_before[block_rows]
        for steps_ahead in range(offsets):
            in_history = plays + steps_ahead < histories.offsets[user_rows + 1]
            block_rows, user_rows, plays = block_rows[in_history], user_rows[in_history], plays[in_history]
            if not len(block_rows):
                break
            cosines, has_vector = song_cosines(recommender, vectors[block_rows], histories.songs[plays + steps_ahead])
            sums[:, steps_ahead] += np.bincount(user_rows, weights=cosines, minlength=len(histories))
            counts[:, steps_ahead] += np.bincount(user_rows, weights=has_vector, minlength=len(histories))
    return sums, counts


def song_cosines(
    recommender: VectorRecommender, vectors: np.ndarray, songs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines, float32 (Q,), 0 for songs without a vector, and which songs have a vector, bool (Q,)."""
    has_row = songs < recommender.num_songs
    song_vectors = recommender.song_vectors[np.where(has_row, songs, 0)]
    cosines = np.einsum("qd,qd->q", vectors, song_vectors)
    return np.where(has_row, cosines, 0), has_row & song_vectors.any(axis=1)


class RandomSongs:
    """Draws songs at random; a pair always gets the same song, however users are divided.

    Songs are drawn from those with a play in `song_plays`, (N,): all with the same probability, or by Zipf's law with
    exponent z over their popularity ranks, where 1 is the most played song.
    """

    def __init__(self, song_plays: np.ndarray, seed: int) -> None:
        self.seed = seed
        self.by_rank = songs_by_popularity(song_plays)
        weights = np.arange(1, len(self.by_rank) + 1, dtype=np.float64) ** -ZIPF_EXPONENT
        self._cumulative = np.cumsum(weights)[:-1] / weights.sum()  # cumulative probability before ranks 2, 3, ...

    def draw(self, kind: str, hashes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """int64 (P,): a song for each pair; pairs are identified by hashes of users and by steps, uint64 each."""
        draws = uniform_draws(hashes, steps * np.uint64(len(NEGATIVES)) + np.uint64(NEGATIVES.index(kind)))
        if kind == "uniform":
            return np.asarray(self.by_rank[(draws * len(self.by_rank)).astype(np.int64)])
        return np.asarray(self.by_rank[np.searchsorted(self._cumulative, draws, side="right")])


def songs_by_popularity(song_plays: np.ndarray) -> np.ndarray:
    """int64: the songs with a play in `song_plays`, (N,), the most played first, ties in the order of rows."""
    order = np.argsort(-np.asarray(song_plays, dtype=np.float64), kind="stable")
    return np.asarray(order[song_plays[order] > 0])


def popularity_ranks(song_plays: np.ndarray) -> np.ndarray:
    """float64 (N,): popularity rank of each song, 1 for the most played; songs without plays share the last rank."""
    by_rank = songs_by_popularity(song_plays)
    ranks = np.full(len(song_plays), len(by_rank) + 1, dtype=np.float64)
    ranks[by_rank] = np.arange(1, len(by_rank) + 1)
    return ranks


def pair_sums(
    recommender: VectorRecommender,
    vectors: np.ndarray,
    histories: Histories,
    queries: Queries,
    target: str,
    negatives: RandomSongs,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of pairs won and of all pairs, float64 (U, 2) each, by kind of NEGATIVES.

    A pair is a query, with its taste vector in `vectors`, float32 (Q, D), and a play at one of the target's offsets. It
    is won if the cosine with the song played is higher than that with a random song, the negative; a tie is not won.
    Pairs in which one of the songs has no vector, or both are the same song, are not counted.
    """
    won_counts, pair_counts = np.zeros((2, len(histories), len(NEGATIVES)))
    hashes = user_hash(histories.user_ids, salt=f"negatives {negatives.seed} ")
    rows_with_vector = np.flatnonzero(vectors.any(axis=1)) if len(negatives.by_rank) else np.zeros(0, dtype=np.int64)
    for start in range(0, len(rows_with_vector), PAIR_QUERIES_AT_ONCE):
        block_rows = rows_with_vector[start : start + PAIR_QUERIES_AT_ONCE]
        rows, plays = plays_ahead(histories, queries.take(block_rows), *OFFSETS[target])
        rows = block_rows[rows]
        users, songs = queries.rows[rows], histories.songs[plays]
        steps = (queries.plays_before[rows] * PLACES + plays - histories.offsets[users]).astype(np.uint64)
        positive_cosines, positive_has_vector = song_cosines(recommender, vectors[rows], songs)
        for kind_index, kind in enumerate(NEGATIVES):
            negative_songs = negatives.draw(kind, hashes[users], steps)
            negative_cosines, negative_has_vector = song_cosines(recommender, vectors[rows], negative_songs)
            is_counted = positive_has_vector & negative_has_vector & (negative_songs != songs)
            pair_counts[:, kind_index] += np.bincount(users, weights=is_counted, minlength=len(histories))
            won_counts[:, kind_index] += np.bincount(
                users, weights=is_counted & (positive_cosines > negative_cosines + TIE), minlength=len(histories)
            )
    return won_counts, pair_counts
