"""Retrieval and rankers over a small world, fitted in this process."""

import numpy as np

from rayrec.data.histories import Histories, Queries
from rayrec.recommend.ranker import Ranker, RankerSettings, fit_ranker
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import KINDS, CandidateSource, RankerKind, examples_for

SMALL = RankerSettings(trees=6, leaves=4, min_leaf=5, patience=6)


def fit_rankers(
    network: TasteRecommender, histories: Histories, artist_of_song: np.ndarray | None = None
) -> tuple[Retrieval, dict[RankerKind, Ranker]]:
    """Fit a retrieval on all plays, and rankers on the last play of each user."""
    retrieval = Retrieval.fit([histories], num_songs=network.num_songs, artist_of_song=artist_of_song)
    source = CandidateSource(network, retrieval)
    last_plays = histories.offsets[1:][histories.lengths > 1] - 1
    queries = Queries.before_plays(histories, last_plays)
    held_out = np.arange(len(last_plays)) % 4 == 0
    last_songs, rows = histories.songs[last_plays], np.arange(len(last_plays))
    answers = {kind: (rows, last_songs if kind != "served" else (last_songs + 1) % network.num_songs) for kind in KINDS}
    examples = examples_for(source, histories, queries, answers, held_out=held_out)
    return retrieval, {kind: fit_ranker(examples[kind], source.sources.names, SMALL).ranker for kind in KINDS}
