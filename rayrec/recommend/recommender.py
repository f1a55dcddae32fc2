"""The one interface of everything that recommends.

Q questions, N songs, k answers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.errors import InputError
from rayrec.recommend.filters import Limits, without_heard

Horizon = Literal["short", "long"]
Kind = Literal["baseline", "network"]
# How an answer was found: the first of the index that qualify, a search of the index among those that
# qualify, or a score for every song that qualifies.
SearchPath = Literal["index", "selector", "exact"]

SCORES_PER_CHUNK = 1 << 24  # float32 scores held at once: 64 MiB
NO_SONG = -1  # fills answers of fewer than k songs


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answers to Q questions, best first, filled with -1 and -inf where fewer than k songs qualify."""

    songs: np.ndarray  # int32 (Q, k), song rows
    scores: np.ndarray  # float32 (Q, k), descending
    paths: tuple[SearchPath, ...]  # (Q,), how each was found

    @classmethod
    def empty(cls, questions: int, k: int, path: SearchPath = "exact") -> "Ranking":
        """Answers without a song, to be filled in."""
        return cls(
            songs=np.full((questions, k), NO_SONG, dtype=np.int32),
            scores=np.full((questions, k), -np.inf, dtype=np.float32),
            paths=(path,) * questions,
        )


class Recommender(ABC):
    """Scores songs for users at a moment.

    Subclasses give `score`; `rank` orders by it, and a subclass may rank faster as long as the
    answer is the same. A score of -inf says that a song is never recommended.
    """

    name: str  # as reports and `--models` spell it
    kind: ClassVar[Kind] = "baseline"
    horizons: tuple[Horizon, ...] = ("short",)  # those whose answers differ
    num_songs: int  # N

    @abstractmethod
    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the score of every song, from the plays before each question only."""

    def score_chunks(
        self, histories: Histories, questions: Questions, horizon: Horizon = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """The rows of `score` in slices of the questions, so that few scores are held at once.

        A subclass may share work between the slices. The arrays may be read-only.
        """
        step = chunk_size(self.num_songs)
        for start in range(0, len(questions), step):
            chunk = slice(start, start + step)
            yield chunk, self.score(histories, questions.take(chunk), horizon)

    def rank(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: Horizon = "short",
        limits: Sequence[Limits] | None = None,
        hidden: np.ndarray | None = None,
    ) -> Ranking:
        """The k best songs of each user among those within the user's limits, and how they were found.

        `at` (ms UTC) is the moment of the request, one for all users or one each. Exactly k
        songs wherever as many qualify; equal scores in the order of song rows. `hidden`, float32 (U, state
        layers, H), is where a taste network stands after the histories, if that is stored; others ignore it.
        Raises `InputError` for k below 1.
        """
        check_count(k)
        questions = Questions.at_end(histories, at, hidden)
        ranking = Ranking.empty(len(questions), k)
        for chunk, chunk_scores in self.score_chunks(histories, questions, horizon):
            scored = np.array(chunk_scores)
            if limits is not None:
                for row, limit in zip(scored, limits[chunk], strict=True):
                    limit.strike(row)
            ranking.songs[chunk], ranking.scores[chunk] = top_k(scored, k)
        return ranking

    def recommend(
        self,
        histories: Histories,
        at: int | np.ndarray,
        k: int,
        *,
        horizon: Horizon = "short",
        exclude_heard: bool = False,
        hidden: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, within no limits but perhaps that of new songs.

        Returns song rows int32 (U, k) and scores float32 (U, k), filled with -1 and -inf where
        fewer than k songs qualify. Raises `InputError` for k below 1.
        """
        limits = without_heard(histories) if exclude_heard else None
        ranking = self.rank(histories, at, k, horizon=horizon, limits=limits, hidden=hidden)
        return ranking.songs, ranking.scores

    def recommend_one(
        self,
        history: Histories,
        at: int,
        k: int,
        *,
        horizon: Horizon = "short",
        exclude_heard: bool = False,
        hidden: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend` for a single user: song rows int32 and scores float32, 1-D, at most k long."""
        if len(history) != 1:
            raise ValueError(f"recommend_one takes the history of one user, got {len(history)}")
        songs, scores = self.recommend(history, at, k, horizon=horizon, exclude_heard=exclude_heard, hidden=hidden)
        real = songs[0] != NO_SONG
        return songs[0][real], scores[0][real]


def check_count(k: int) -> None:
    """Raises `InputError` for a number of songs below 1."""
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 song")


def chunk_size(num_songs: int) -> int:
    """Questions to score at once so that the scores stay within SCORES_PER_CHUNK."""
    return max(1, SCORES_PER_CHUNK // max(1, num_songs))


def top_k(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32 (Q, k) and values float32 (Q, k) of the k best of scores (Q, N), best first.

    Equal scores come in the order of song rows; songs at -inf do not come.
    """
    count, num_songs = scores.shape
    kept = min(k, num_songs)
    songs = np.full((count, k), NO_SONG, dtype=np.int32)
    values = np.full((count, k), -np.inf, dtype=np.float32)
    if not kept:
        return songs, values
    threshold = -np.partition(-scores, kept - 1, axis=1)[:, kept - 1]
    for row in range(count):
        candidates = np.flatnonzero((scores[row] >= threshold[row]) & (scores[row] > -np.inf))
        order = candidates[np.argsort(-scores[row, candidates], kind="stable")][:kept]
        songs[row, : len(order)] = order
        values[row, : len(order)] = scores[row, order]
    return songs, values
