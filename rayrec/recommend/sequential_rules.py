"""Sequential rules: the songs that most often followed the last one.

P plays, N songs, Q queries.
"""

from collections.abc import Iterable

import numpy as np
from scipy.sparse import csr_matrix

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.recommend.base import BaseRecommender, Horizon
from rayrec.recommend.simple_baselines import last_songs

MAX_DISTANCE = 10  # plays between a song and one that follows it
DECAY = 1.0  # a pair of plays so many plays apart counts distance^-DECAY, where no validation range chooses it
RULES_PER_SONG = 1_000  # kept, the strongest
MAX_RULES = 20_000_000  # held at a time while counting: 160 MB


class SequentialRulesRecommender(BaseRecommender):
    """Scores a song by how often it followed the last song, weighted distance^-decay (SR; Ludewig and Jannach 2018).

    `rules` is a sparse float32 (N, N): row the song, column what followed it. A song that never
    followed scores 0.
    """

    name = "sequential-rules"

    def __init__(self, rules: csr_matrix, decay: float = DECAY) -> None:
        self.rules, self.settings = rules, {"decay": decay}
        self.num_songs = rules.shape[0]

    @classmethod
    def fit(
        cls,
        batches: Iterable[Histories],
        *,
        num_songs: int,
        allowed: FitRange,
        max_distance: int = MAX_DISTANCE,
        decay: float = DECAY,
        rules_per_song: int = RULES_PER_SONG,
        max_rules: int = MAX_RULES,
    ) -> "SequentialRulesRecommender":
        """Count what follows what in each user's history.

        The strongest `rules_per_song` of each song are kept, fewer where `max_rules` would be passed:
        then the weaker ones go early, and with them a little of what they might have come to. Raises
        `LeakError` for a play that `allowed` forbids.
        """
        kept = max(1, min(rules_per_song, max_rules // (2 * max(1, num_songs))))
        rules = count_rules(Histories.from_lists([], []), num_songs, max_distance, decay)
        for histories in batches:
            allowed.require(histories)
            rules = rules + count_rules(histories, num_songs, max_distance, decay)
            if rules.nnz > max_rules:
                rules = strongest(rules, kept)
        return cls(strongest(rules, kept), decay)

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): the weight of the rule from the last song to each song."""
        last = last_songs(histories, questions, self.num_songs)
        scores = np.zeros((len(questions), self.num_songs), dtype=np.float32)
        known = np.flatnonzero(last >= 0)
        lengths = np.diff(self.rules.indptr)[last[known]]
        starts = self.rules.indptr[last[known]].astype(np.int64)
        entries = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
        scores[np.repeat(known, lengths), self.rules.indices[entries]] = self.rules.data[entries]
        return scores


def count_rules(histories: Histories, num_songs: int, max_distance: int, decay: float = DECAY) -> csr_matrix:
    """Sparse float32 (N, N): Σ distance^-decay over pairs of plays of one user at most `max_distance` apart."""
    rows, songs = histories.rows, histories.songs
    rules = csr_matrix((np.zeros(0, np.float32), (np.zeros(0, np.int32),) * 2), shape=(num_songs, num_songs))
    for distance in range(1, max_distance + 1):  # one at a time, so that few pairs are held at once
        pairs = np.flatnonzero(rows[distance:] == rows[:-distance])
        weights = np.full(len(pairs), distance**-decay, dtype=np.float32)
        pair = (songs[pairs], songs[pairs + distance])
        rules = rules + csr_matrix((weights, pair), shape=(num_songs, num_songs))
    return rules


def strongest(rules: csr_matrix, count: int) -> csr_matrix:
    """The `count` largest entries of each row; of equal ones those with the lower column."""
    rows = np.repeat(np.arange(rules.shape[0]), np.diff(rules.indptr))
    order = np.lexsort((rules.indices, -rules.data, rows))
    place = np.arange(rules.nnz) - rules.indptr[rows]  # within the sorted row
    kept = order[place < count]
    return csr_matrix((rules.data[kept], (rows[kept], rules.indices[kept])), shape=rules.shape, dtype=np.float32)
