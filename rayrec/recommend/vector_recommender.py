"""Recommenders that answer with a vector: the songs nearest to it by cosine come first.

Q questions, N songs, D dimensions.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import NO_SONG, BaseRecommender, Horizon, Ranking, check_count, chunks_of
from rayrec.recommend.filters import Limits

if TYPE_CHECKING:
    from rayrec.recommend.index import SongIndex


class VectorRecommender(BaseRecommender):
    """Scores songs by the cosine of their vector with the user's taste vector.

    `song_vectors` is float32 (N, D), L2-normalized; a row of zeros is a song without a vector, which
    is never recommended. `index`, where there is one, holds the same vectors and answers
    `rank` without scoring every song.
    """

    def __init__(self, song_vectors: np.ndarray, index: "SongIndex | None" = None) -> None:
        self.song_vectors = np.ascontiguousarray(song_vectors, dtype=np.float32)
        self.num_songs = len(self.song_vectors)
        self.index = index
        self.without_vector = np.flatnonzero(~self.song_vectors.any(axis=1))

    @abstractmethod
    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, D): the taste vector of each question, L2-normalized.

        A row of zeros says that nothing is known, and then no song is recommended.
        """

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the cosine of each song with the taste vector."""
        return self.score_vectors(self.vectors(histories, questions, horizon))

    def score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (Q, N): the cosine of each song with taste vectors, float32 (Q, D)."""
        scores = np.asarray(vectors @ self.song_vectors.T)
        scores[:, self.without_vector] = -np.inf
        scores[~vectors.any(axis=1)] = -np.inf
        return scores

    def score_chunks(
        self, histories: Histories, questions: Questions, horizon: Horizon = "short"
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """As in `BaseRecommender`; the vectors of all questions are computed in one pass."""
        vectors = self.vectors(histories, questions, horizon)
        for chunk in chunks_of(len(questions), self.num_songs):
            yield chunk, self.score_vectors(vectors[chunk])

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
        """As in `BaseRecommender`; through the index where there is one."""
        if self.index is None:
            return super().rank(histories, at, k, horizon=horizon, limits=limits, hidden=hidden)
        check_count(k)
        vectors = self.vectors(histories, Questions.at_end(histories, at, hidden), horizon)
        return self.rank_vectors(vectors, k, limits)

    def rank_vectors(self, vectors: np.ndarray, k: int, limits: Sequence[Limits] | None = None) -> Ranking:
        """As `rank`, from taste vectors, float32 (Q, D), that are at hand. Needs the index."""
        if self.index is None:
            raise ValueError("vectors are ranked through an index, and there is none")
        ranking = self.index.rank(vectors, k, limits)
        silent = ~vectors.any(axis=1)
        ranking.songs[silent], ranking.scores[silent] = NO_SONG, -np.inf
        return ranking


def normalized(vectors: np.ndarray) -> np.ndarray:
    """float32: rows of `vectors` scaled to length 1; rows of zeros stay."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), dtype=np.float32)
