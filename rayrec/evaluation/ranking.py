"""Where the right answers stand in a recommender's ranking, from one look at the scores of each question.

Q questions, N songs, T right answers, L listed songs.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.evaluation.lists import LIST_LENGTH, listed_songs
from rayrec.evaluation.metrics import NEVER, best_scores, ranks_of
from rayrec.evaluation.targets import Answers
from rayrec.recommend.base import Horizon, Recommender


class Ranked(NamedTuple):
    """What a recommender made of questions."""

    ranks: dict[str, np.ndarray]  # target -> int64 (T,), NEVER beyond the depth asked for
    listed_rows: np.ndarray  # int64 (L,), the question of each listed song
    listed_songs: np.ndarray  # int64 (L,)


def rank_answers(
    recommender: Recommender,
    histories: Histories,
    questions: Questions,
    wanted: Mapping[str, Answers],
    known_songs: np.ndarray,
    *,
    depth: int,
    horizon: Horizon = "short",
    drawn: np.ndarray | None = None,
) -> Ranked:
    """The rank of each right answer of each target, exact up to `depth`, ties counted against.

    `known_songs` is bool (N,): any other song is NEVER found, however well it scores. Of the
    questions in `drawn`, bool (Q,), the first LIST_LENGTH songs are listed too.
    """
    ranks = {target: np.full(len(answers.songs), NEVER, dtype=np.int64) for target, answers in wanted.items()}
    known = {target: _known(answers.songs, known_songs, recommender.num_songs) for target, answers in wanted.items()}
    listed = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
    for chunk, scores in recommender.score_chunks(histories, questions, horizon):
        first, behind = chunk.start, chunk.start + len(scores)
        best = best_scores(scores, max(depth, LIST_LENGTH) + 1)
        for target, answers in wanted.items():
            start, stop = np.searchsorted(answers.rows, [first, behind])
            asked = start + np.flatnonzero(known[target][start:stop])
            ranks[target][asked] = ranks_of(scores, answers.rows[asked] - first, answers.songs[asked], best)
        if drawn is not None:
            some = np.flatnonzero(drawn[first:behind])
            rows, songs = listed_songs(scores[some], best[some])
            listed.append((first + some[rows], songs))
    rows, songs = (np.concatenate(parts) for parts in zip(*listed, strict=True))
    return Ranked(ranks, rows, songs)


def _known(songs: np.ndarray, known_songs: np.ndarray, num_songs: int) -> np.ndarray:
    """bool (T,): songs that the fit range and the recommender know."""
    known = songs < min(len(known_songs), num_songs)
    known[known] = known_songs[songs[known]]
    return known
