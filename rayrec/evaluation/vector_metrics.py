"""Metrics of taste vectors: mean cosine with the songs played later, and how often these are nearer than random songs.

Q queries, U users, N songs, P pairs of a query and a later play, L offsets, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.evaluation.protocol import OFFSETS, plays_ahead
from rayrec.recommend.base import BaseRecommender, HorizonName, VectorRecommender

NEGATIVES = ("uniform", "zipf")
PAIRED = ("next", "offsets25_50")  # the targets for which pairs are made
ZIPF_EXPONENT = 1.0  # z: a song's chance falls with its popularity rank to this power
PAIR_QUERIES_AT_ONCE = 1 << 12
TIE = 1e-6  # cosines nearer to each other than rounding can tell; (a + b) is as near to a as to b
PLACES = 1 << 32  # more than anyone's plays
CURVE_QUERIES_AT_ONCE = 1 << 14

Curve = tuple[VectorRecommender, HorizonName]


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
