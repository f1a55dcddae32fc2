"""Mean cosine by offset: how near a taste vector is to the songs played later.

Q questions, U users, L offsets, D dimensions.
"""

from collections.abc import Sequence

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import Horizon, Recommender
from rayrec.recommend.vector_recommender import VectorRecommender

QUESTIONS_AT_ONCE = 1 << 14

Curve = tuple[VectorRecommender, Horizon]


def curves_of(recommenders: Sequence[Recommender]) -> list[Curve]:
    """One curve per horizon of each recommender that has vectors."""
    vector_recommenders = [one for one in recommenders if isinstance(one, VectorRecommender)]
    return [(one, horizon) for one in vector_recommenders for horizon in one.horizons]


def cosine_sums(
    recommender: VectorRecommender, vectors: np.ndarray, histories: Histories, questions: Questions, offsets: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of cosines and their counts, float64 (U, L) each.

    The cosine of a question's taste vector, in float32 (Q, D), with the song l plays ahead, l from 1
    to L, offset 1 being the next song. What has no vector, or lies beyond the history, is not counted.
    """
    sums, counts = np.zeros((2, len(histories), offsets))
    asked = np.flatnonzero(vectors.any(axis=1))
    for start in range(0, len(asked), QUESTIONS_AT_ONCE):
        block = asked[start : start + QUESTIONS_AT_ONCE]
        rows = questions.rows[block]
        plays = histories.offsets[rows] + questions.seen[block]
        for ahead in range(offsets):
            there = plays + ahead < histories.offsets[rows + 1]
            block, rows, plays = block[there], rows[there], plays[there]
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
