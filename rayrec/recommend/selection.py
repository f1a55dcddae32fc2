"""What the settings of a baseline are chosen by: plays that neither a trial fit nor its song vectors have seen."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange, Split, validation_histories

MOST_PLAYS = 10_000  # of the validation range that are predicted


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The validation range of a split, and what a trial fit may see before it."""

    dataset: Dataset
    allowed: FitRange  # of trial fits
    vectors: np.ndarray | None  # float32 (N, D), normalized, made of no more than that; None where there are none
    histories: Histories  # users with plays in the validation range; nothing after it
    plays: np.ndarray  # int64 (Q,), positions of these plays

    def batches(self) -> Iterator[Histories]:
        """What a trial fit may see."""
        return (self.allowed.select(histories) for histories in self.dataset.read_all())

    def ahead(self, first: int, last: int) -> tuple[Questions, np.ndarray]:
        """Queries whose targets are the plays, so many plays ahead, drawn from unif{first, last}; and their songs.

        Plays of users who had fewer plays before are left out, and those of songs newer than the vectors.
        """
        num_songs = self.dataset.num_songs if self.vectors is None else len(self.vectors)
        ahead = np.random.default_rng(0).integers(first, last + 1, size=len(self.plays))
        rows = self.histories.rows[self.plays]
        seen = self.plays - self.histories.offsets[rows] + 1 - ahead
        kept = (seen > 0) & (self.histories.songs[self.plays] < num_songs)
        rows, seen, targets = rows[kept], seen[kept], self.plays[kept]
        queries = Questions(rows=rows, seen=seen, at=self.histories.played_at[targets])
        return queries, self.histories.songs[targets]


def make_selection(
    dataset: Dataset, split: Split, vectors: np.ndarray | None, limit: int = MOST_PLAYS
) -> Selection | None:
    """The first plays of the validation range in the order of the buckets, about `limit`; None where there are none."""
    kept = validation_histories(dataset, split, limit)
    plays = np.flatnonzero(split.is_validation(kept))
    if not len(plays):
        return None
    return Selection(dataset=dataset, allowed=split.selection, vectors=vectors, histories=kept, plays=plays)
