"""Plays of each song in a fit range, added up bucket by bucket."""

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange


class SongCounter:
    """A bucket worker that counts plays by song, once for each of several fit ranges."""

    def __init__(self, dataset: Dataset, ranges: list[FitRange]) -> None:
        self._dataset, self._ranges = dataset, ranges

    def __call__(self, bucket: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each range, the songs played, int64, and their plays, int64: small where the catalog is large."""
        totals = [np.zeros(self._dataset.num_songs, dtype=np.int64) for _ in self._ranges]
        for histories in self._dataset.read_bucket(int(bucket)):
            for total, allowed in zip(totals, self._ranges, strict=True):
                total += np.bincount(allowed.select(histories).songs, minlength=len(total))
        return [(np.flatnonzero(total), total[total > 0]) for total in totals]
