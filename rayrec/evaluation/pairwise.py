"""Pairwise accuracy: how often a song that was played later is nearer to the taste vector than a random one.

Q questions, U users, N songs, P pairs of a question and a later play, D dimensions.
"""

import numpy as np

from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.evaluation.bootstrap import uniform_draws
from rayrec.evaluation.cosine_curves import song_cosines
from rayrec.evaluation.protocol import OFFSETS, plays_ahead
from rayrec.recommend.vector_recommender import VectorRecommender

NEGATIVES = ("uniform", "zipf")
PAIRED = ("next", "offsets25_50")  # the targets for which pairs are made
ZIPF_EXPONENT = 1.0  # z: a song's chance falls with its popularity rank to this power
QUESTIONS_AT_ONCE = 1 << 12
TIE = 1e-6  # cosines nearer to each other than rounding can tell; (a + b) is as near to a as to b
PLACES = 1 << 32  # more than anyone's plays


class Negatives:
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
    questions: Questions,
    target: str,
    negatives: Negatives,
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs won and pairs, float64 (U, 2) each, by kind of NEGATIVES.

    A pair is a question, with its taste vector in float32 (Q, D), and a play at one of the target's
    offsets; it is won where the cosine with the song played is above that with the negative, and ties
    count against it. Pairs in which either song has no vector, or both are the same song, are not counted.
    """
    won, pairs = np.zeros((2, len(histories), len(NEGATIVES)))
    hashes = user_hash(histories.user_ids, salt=f"negatives {negatives.seed} ")
    asked = np.flatnonzero(vectors.any(axis=1)) if len(negatives.by_rank) else np.zeros(0, dtype=np.int64)
    for start in range(0, len(asked), QUESTIONS_AT_ONCE):
        block = asked[start : start + QUESTIONS_AT_ONCE]
        rows, plays = plays_ahead(histories, questions.take(block), *OFFSETS[target])
        rows = block[rows]
        users, songs = questions.rows[rows], histories.songs[plays]
        steps = (questions.seen[rows] * PLACES + plays - histories.offsets[users]).astype(np.uint64)
        near, known = song_cosines(recommender, vectors[rows], songs)
        for place, kind in enumerate(NEGATIVES):
            others = negatives.draw(kind, hashes[users], steps)
            far, drawn = song_cosines(recommender, vectors[rows], others)
            counted = known & drawn & (others != songs)
            pairs[:, place] += np.bincount(users, weights=counted, minlength=len(histories))
            won[:, place] += np.bincount(users, weights=counted & (near > far + TIE), minlength=len(histories))
    return won, pairs
