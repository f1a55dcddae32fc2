"""Sums from which all metrics come, with their intervals, and the metrics of taste vectors.

Sums add up over any division of the users. Intervals come by bootstrap over users. Users fall by hash into 1,024 cells,
and a sample of the bootstrap draws cells: each counts Poisson(1) times (Chamandy et al. 2012, "Estimating uncertainty
for massive data streams"). Workers thus return sums by cell, whose size depends neither on the number of users nor on
that of the samples, and two models are compared on the same users.

Metrics of taste vectors are the mean cosine with the songs played later, and how often these are nearer than random
songs.

M models, V views, G groups of users, U users, B samples, C bootstrap cells, K cut-offs or columns, T curves, S slices,
R retrievers, N songs, Q queries, P pairs of a query and a later play, L offsets, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.evaluation.calibration import CALIBRATED, CHANCE_BINS, CHANCE_SUMS
from rayrec.evaluation.protocol import GROUPS, OFFSETS, TARGETS, plays_ahead
from rayrec.evaluation.ranks import METRICS
from rayrec.recommend.base import BaseRecommender, HorizonName, VectorRecommender

CELLS = 1024
LAST = "last"  # leave one out: each user's last play alone
VIEWS = (*TARGETS, LAST)
SLICED = ("recall", "mrr")  # the metrics of breakdowns
LISTED = ("popularity_rank", "repeats")  # the figures of what is recommended
COVERAGE_SONGS = 1 << 15  # songs of the catalog, drawn where it has more, by which coverage is measured
RETURN_BYTES = 1 << 19  # of the sums that a worker returns, so that with what else it returns it stays below 1 MB

NEGATIVES = ("uniform", "zipf")
PAIRED = ("next", "offsets25_50")  # the targets for which pairs are made
ZIPF_EXPONENT = 1.0  # z: a song's chance falls with its popularity rank to this power
PAIR_QUERIES_AT_ONCE = 1 << 12
TIE = 1e-6  # cosines nearer to each other than rounding can tell; (a + b) is as near to a as to b
PLACES = 1 << 32  # more than anyone's plays
CURVE_QUERIES_AT_ONCE = 1 << 14

Curve = tuple[VectorRecommender, HorizonName]


@dataclass(frozen=True, kw_only=True)
class CellRange:
    """The cells that one unit of work holds: `count` of `total` from `first` on."""

    total: int = CELLS
    first: int = 0
    count: int = CELLS

    def cells_of(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the cell of each user, counted from `first`; not within [0, count) for users of other units."""
        hashes = user_hash(user_ids, salt="bootstrap cell ")
        return np.asarray((hashes % np.uint64(self.total)).astype(np.int64) - self.first)

    def holds(self, user_ids: np.ndarray) -> np.ndarray:
        """bool (U,): the users whose cells are among these."""
        cells = self.cells_of(user_ids)
        return np.asarray((cells >= 0) & (cells < self.count))


def cell_ranges(units: int, most_cells: int) -> list[CellRange]:
    """How to divide each of `units` shares of the users, so that all together have about 1,024 cells.

    No range has more than `most_cells`. The ranges are those of one unit; every unit is divided alike.
    """
    count = max(1, min(-(-CELLS // units), most_cells))
    parts = -(-CELLS // (units * count))
    return [CellRange(total=parts * count, first=part * count, count=count) for part in range(parts)]


def bootstrap_weights(cells: int, samples: int, seed: int) -> np.ndarray:
    """float64 (B + 1, C): how often each cell counts; once in row 0, Poisson(1) times in each sample below it."""
    weights = np.ones((samples + 1, cells))
    weights[1:] = np.random.default_rng(seed).poisson(1.0, size=(samples, cells))
    return weights


def means_with_intervals(
    sums: np.ndarray, counts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high, float64 (K,) each, of the means sums / counts, both (B + 1, K), row 0 the data itself.

    NaN where nothing was counted. Samples that counted nothing are left out. Without samples low and
    high are the value.
    """
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    value, samples = means[0], means[1:]
    low, high = value.copy(), value.copy()
    filled = ~np.isnan(value) & (counts[1:] > 0).any(axis=0)
    if filled.any():
        tail = (1 - confidence) / 2
        low[filled], high[filled] = np.nanquantile(samples[:, filled], [tail, 1 - tail], axis=0)
    return value, low, high


@dataclass
class MetricAccumulator:
    """Sums by bootstrap cell, or, as `resampled` returns them, of the data itself and of B bootstrap samples."""

    users: np.ndarray  # int64 (V, G): users with queries; V are VIEWS, then the targets in days
    queries: np.ndarray  # float64 (C, V, G)
    metrics: np.ndarray  # float64 (C, M, V, G, 3 · K): see metric_columns
    curve_sums: np.ndarray  # float64 (C, T, offsets): cosines
    curve_counts: np.ndarray  # float64 (C, T, offsets): plays behind them
    pairs_won: np.ndarray  # float64 (C, T, len(PAIRED), len(NEGATIVES))
    pairs: np.ndarray  # the same shape
    slice_metrics: np.ndarray  # float64 (C, M, S, len(SLICED))
    slice_queries: np.ndarray  # float64 (C, S)
    listed: np.ndarray  # uint8 (M, n / 8): bits of the songs drawn for coverage that are in any list
    list_sums: np.ndarray  # float64 (C, M, len(LISTED))
    list_counts: np.ndarray  # float64 (C, M): places in the lists
    lists: np.ndarray  # int64 (M,)
    # float64 (C, M, OFFSETS and targets in days, R + 1): recall of the candidates, of all and by retriever
    retrieved: np.ndarray
    candidates: np.ndarray  # float64 (C, M, R + 1): how many there were
    chances: np.ndarray  # float64 (models whose scores are chances, len(CALIBRATED), CHANCE_BINS, CHANCE_SUMS)

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
        """The sums of no users; `songs` are those drawn for coverage. `day_targets` come behind the VIEWS.

        `calibrated` is the number of models whose scores are chances.
        """
        views, groups = len(VIEWS) + day_targets, len(GROUPS)
        pairs = (cells, curves, len(PAIRED), len(NEGATIVES))
        columns = retrievers + 1 if retrievers else 0
        return cls(
            users=np.zeros((views, groups), dtype=np.int64),
            queries=np.zeros((cells, views, groups)),
            metrics=np.zeros((cells, models, views, groups, len(METRICS) * ks)),
            curve_sums=np.zeros((cells, curves, offsets)),
            curve_counts=np.zeros((cells, curves, offsets)),
            pairs_won=np.zeros(pairs),
            pairs=np.zeros(pairs),
            slice_metrics=np.zeros((cells, models, slices, len(SLICED))),
            slice_queries=np.zeros((cells, slices)),
            listed=np.zeros((models, -(-songs // 8)), dtype=np.uint8),
            list_sums=np.zeros((cells, models, len(LISTED))),
            list_counts=np.zeros((cells, models)),
            lists=np.zeros(models, dtype=np.int64),
            retrieved=np.zeros((cells, models, len(OFFSETS) + day_targets, columns)),
            candidates=np.zeros((cells, models, columns)),
            chances=np.zeros((calibrated, len(CALIBRATED), CHANCE_BINS, CHANCE_SUMS)),
        )

    @property
    def cells(self) -> int:
        """C."""
        return len(self.queries)

    @property
    def bytes_of_cell(self) -> int:
        """Bytes of the sums of one cell."""
        return int(sum(getattr(self, name).nbytes for name in BY_CELL)) // max(1, self.cells)

    def add(self, other: MetricAccumulator, first_cell: int = 0) -> None:
        """Add sums whose cells are these from `first_cell` on; cells beyond the last go on at the first."""
        places = (first_cell + np.arange(other.cells)) % max(1, self.cells)
        for name in BY_CELL:
            np.add.at(getattr(self, name), places, getattr(other, name))
        self.users += other.users
        self.lists += other.lists
        self.listed |= other.listed
        self.chances += other.chances

    def resampled(self, samples: int, seed: int) -> MetricAccumulator:
        """The sums of the data itself and of bootstrap samples along the first axis, B + 1 long."""
        weights = bootstrap_weights(self.cells, samples, seed)
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in BY_CELL:
            sums = values[name]
            values[name] = (weights @ sums.reshape(self.cells, -1)).reshape(samples + 1, *sums.shape[1:])
        return MetricAccumulator(**values)


BY_CELL: Sequence[str] = [
    item.name for item in fields(MetricAccumulator) if item.name not in ("users", "listed", "lists", "chances")
]


def curves_of(recommenders: Sequence[BaseRecommender]) -> list[Curve]:
    """One curve per horizon of each recommender that has vectors."""
    vector_recommenders = [one for one in recommenders if isinstance(one, VectorRecommender)]
    return [(one, horizon) for one in vector_recommenders for horizon in one.horizons]


def cosine_sums(
    recommender: VectorRecommender, vectors: np.ndarray, histories: Histories, queries: Queries, offsets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of cosines and their counts, float64 (U, L) each.

    The cosine of a query's taste vector, in float32 (Q, D), with the song l plays ahead, l from 1
    to L, offset 1 being the next song. What has no vector, or lies beyond the history, is not counted.
    """
    sums, counts = np.zeros((2, len(histories), offsets))
    known_queries = np.flatnonzero(vectors.any(axis=1))
    for start in range(0, len(known_queries), CURVE_QUERIES_AT_ONCE):
        block = known_queries[start : start + CURVE_QUERIES_AT_ONCE]
        rows = queries.rows[block]
        plays = histories.offsets[rows] + queries.seen[block]
        for ahead in range(offsets):
            in_history = plays + ahead < histories.offsets[rows + 1]
            block, rows, plays = block[in_history], rows[in_history], plays[in_history]
            if not len(block):
                break
            cosines, known = song_cosines(recommender, vectors[block], histories.songs[plays + ahead])
            sums[:, ahead] += np.bincount(rows, weights=cosines, minlength=len(histories))
            counts[:, ahead] += np.bincount(rows, weights=known, minlength=len(histories))
    return sums, counts


def song_cosines(
    recommender: VectorRecommender, vectors: np.ndarray, songs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float32 (Q,), the cosines, 0 for songs without a vector; and bool (Q,), which songs have one."""
    known = songs < recommender.num_songs
    song_vectors = recommender.song_vectors[np.where(known, songs, 0)]
    cosines = np.einsum("qd,qd->q", vectors, song_vectors)
    return np.where(known, cosines, 0), known & song_vectors.any(axis=1)


class RandomSongs:
    """Draws songs at random, the same one for the same pair however users are divided.

    From the songs with a play in `song_plays`, (N,): all equally often, or by Zipf_z over their
    popularity ranks, 1 being the most played.
    """

    def __init__(self, song_plays: np.ndarray, seed: int) -> None:
        self.seed = seed
        self.by_rank = songs_by_popularity(song_plays)
        chances = np.arange(1, len(self.by_rank) + 1, dtype=np.float64) ** -ZIPF_EXPONENT
        self._below = np.cumsum(chances)[:-1] / chances.sum()  # chance of any rank before each but the first

    def draw(self, kind: str, hashes: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """int64 (P,): a song for each pair, which uint64 hashes of users and steps tell apart."""
        uniform = uniform_draws(hashes, steps * np.uint64(len(NEGATIVES)) + np.uint64(NEGATIVES.index(kind)))
        if kind == "uniform":
            return np.asarray(self.by_rank[(uniform * len(self.by_rank)).astype(np.int64)])
        return np.asarray(self.by_rank[np.searchsorted(self._below, uniform, side="right")])


def songs_by_popularity(song_plays: np.ndarray) -> np.ndarray:
    """int64: the songs with a play in `song_plays`, (N,), the most played first, equal ones in the order of rows."""
    order = np.argsort(-np.asarray(song_plays, dtype=np.float64), kind="stable")
    return np.asarray(order[song_plays[order] > 0])


def popularity_ranks(song_plays: np.ndarray) -> np.ndarray:
    """float64 (N,): the popularity rank of each song, 1 the most played; those never played share the last rank."""
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
    """Pairs won and pairs, float64 (U, 2) each, by kind of NEGATIVES.

    A pair is a query, with its taste vector in float32 (Q, D), and a play at one of the target's
    offsets; it is won where the cosine with the song played is above that with the negative, and ties
    count against it. Pairs in which either song has no vector, or both are the same song, are not counted.
    """
    won, pairs = np.zeros((2, len(histories), len(NEGATIVES)))
    hashes = user_hash(histories.user_ids, salt=f"negatives {negatives.seed} ")
    known_queries = np.flatnonzero(vectors.any(axis=1)) if len(negatives.by_rank) else np.zeros(0, dtype=np.int64)
    for start in range(0, len(known_queries), PAIR_QUERIES_AT_ONCE):
        block = known_queries[start : start + PAIR_QUERIES_AT_ONCE]
        rows, plays = plays_ahead(histories, queries.take(block), *OFFSETS[target])
        rows = block[rows]
        users, songs = queries.rows[rows], histories.songs[plays]
        steps = (queries.seen[rows] * PLACES + plays - histories.offsets[users]).astype(np.uint64)
        near, known = song_cosines(recommender, vectors[rows], songs)
        for place, kind in enumerate(NEGATIVES):
            others = negatives.draw(kind, hashes[users], steps)
            far, drawn = song_cosines(recommender, vectors[rows], others)
            counted = known & drawn & (others != songs)
            pairs[:, place] += np.bincount(users, weights=counted, minlength=len(histories))
            won[:, place] += np.bincount(users, weights=counted & (near > far + TIE), minlength=len(histories))
    return won, pairs
