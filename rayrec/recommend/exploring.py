"""Exploring: a share of an answer for songs with few plays, each shown with a probability that the answer holds.

P songs of a pool, k answers.
"""

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from rayrec.data.histories import Histories
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import TwoStepRecommender

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
    taken: np.ndarray,
    share: float,
) -> Explored:
    """`explore` for one user at `at`, ms UTC.

    `ranked` are song rows, int32 (n,), and scores, float32 (n,), of the answer and of POOL songs behind it; `taken`,
    int64 (k,), are the places among them of the answer without exploring.
    """
    songs, scores = ranked
    few = few_plays(recommender, songs)
    few[taken] = False
    draw = draw_of(history, at)
    return explore((songs[taken], scores[taken]), (songs[few], scores[few]), share, draw)


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
    taken = np.flatnonzero(np.ceil(ends - draw) > np.ceil(ends - chances - draw))[: len(songs)]
    explored = np.full(len(songs), np.nan)
    if not len(taken):
        return Explored(songs=songs, scores=scores, probabilities=explored)
    places = ((np.arange(len(taken)) + 0.5) * len(songs) / len(taken)).astype(np.int64)
    not_explored = np.setdiff1d(np.arange(len(songs)), places)
    answer, values = np.empty_like(songs), np.empty_like(scores)
    answer[places], answer[not_explored] = others[taken], songs[: len(not_explored)]
    values[places], values[not_explored] = other_scores[taken], scores[: len(not_explored)]
    explored[places] = chances[taken]
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
