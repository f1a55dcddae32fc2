"""Retrieval and rankers over a small world, fitted in this process."""

from collections.abc import Iterable, Sequence

import numpy as np

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.recommend.base import QueryBatch
from rayrec.recommend.filters import AnswerFilter
from rayrec.recommend.index import SongIndex
from rayrec.recommend.ranker import Ranker, RankerSettings, fit_ranker
from rayrec.recommend.retrievers import Proposals, Retriever
from rayrec.recommend.stored_retrieval import SESSIONS_PER_SONG, Retrieval, RetrievalCounts
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import KINDS, CandidateSource, RankerKind, examples_for

SMALL = RankerSettings(trees=6, leaves=4, min_leaf=5, patience=6)


def retrieval_of(
    batches: Iterable[Histories],
    *,
    num_songs: int,
    allowed: FitRange | None = None,
    newest: int = SESSIONS_PER_SONG,
    artist_of_song: np.ndarray | None = None,
    album_of_song: np.ndarray | None = None,
) -> Retrieval:
    """Fit a retrieval on all plays of the batches. Raises `LeakError` for a play that `allowed` forbids."""
    parts, has_likes = [], False
    for histories in batches:
        parts.append(RetrievalCounts.fit(histories, num_songs=num_songs, allowed=allowed, newest=newest))
        has_likes |= histories.likes is not None
    counts = RetrievalCounts.merge(parts).strongest()
    return Retrieval.build(counts, artist_of_song=artist_of_song, album_of_song=album_of_song, has_likes=has_likes)


def fit_rankers(
    network: TasteRecommender, histories: Histories, artist_of_song: np.ndarray | None = None
) -> tuple[Retrieval, dict[RankerKind, Ranker]]:
    """Fit a retrieval on all plays, and rankers on the last play of each user."""
    retrieval = retrieval_of([histories], num_songs=network.num_songs, artist_of_song=artist_of_song)
    source = CandidateSource(network, retrieval)
    last_plays = histories.offsets[1:][histories.lengths > 1] - 1
    queries = Queries.before_plays(histories, last_plays)
    held_out = np.arange(len(last_plays)) % 4 == 0
    last_songs, rows = histories.songs[last_plays], np.arange(len(last_plays))
    answers = {kind: (rows, last_songs if kind != "served" else (last_songs + 1) % network.num_songs) for kind in KINDS}
    examples = examples_for(source, histories, queries, answers, held_out=held_out)
    return retrieval, {kind: fit_ranker(examples[kind], source.sources.names, SMALL).ranker for kind in KINDS}


class LimitedRetriever(Retriever):
    """Proposes at most `limit` songs of another retriever per query."""

    def __init__(self, retriever: Retriever, limit: int) -> None:
        self.name, self._retriever, self._limit = retriever.name, retriever, limit

    def propose(self, batch: QueryBatch, count: int) -> Proposals:
        """As the other retriever does."""
        return self._retriever.propose(batch, min(count, self._limit))


def limited(retrievers: Sequence[Retriever], limit: int) -> list[Retriever]:
    """Return the retrievers, each of which proposes at most `limit` songs per query."""
    return [LimitedRetriever(retriever, limit) for retriever in retrievers]


def limited_source(source: CandidateSource, limit: int) -> CandidateSource:
    """Return a source like `source`, whose retrievers propose at most `limit` songs each per query."""
    new_source = CandidateSource(source.network, source.base_retrieval)
    new_source.retrievers = limited(new_source.retrievers, limit)
    return new_source


def nearest(
    index: SongIndex, queries: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best songs of each query, int32 (Q, k), without its rows in `exclude`, and their scores."""
    ranking = index.rank(queries, k, None if exclude is None else [AnswerFilter(excluded=rows) for rows in exclude])
    return ranking.songs, ranking.scores
