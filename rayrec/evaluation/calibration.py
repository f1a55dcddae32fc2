"""The expected calibration error: how far scores that are chances lie from how often songs are the next play.

Sums by narrow bins of the chance add up over any division of the users; the bins of the error are joined from them.

A answered songs of all queries together.
"""

import numpy as np

CALIBRATED = ("served", "next")  # the targets: with heard songs left out, and of all songs; queries are all next plays
CHANCE_BINS = 256  # narrow ones, between the fourth powers of 0, 1/256, 2/256 ...: most chances are small
CHANCE_SUMS = 3  # of each narrow bin: answered songs, their chances, and how many of them are right
ERROR_BINS = 15  # of the error, which hold about as many answered songs each


def chance_sums(chances: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 (CHANCE_BINS, CHANCE_SUMS), from the chances of answered songs, float (A,), and bool (A,), if right."""
    bins = np.minimum((CHANCE_BINS * np.sqrt(np.sqrt(chances))).astype(np.int64), CHANCE_BINS - 1)
    columns = (np.ones(len(bins)), chances, right)
    return np.stack([np.bincount(bins, weights=column, minlength=CHANCE_BINS) for column in columns], axis=1)


def expected_calibration_error(sums: np.ndarray) -> float:
    """The mean over bins of as many answered songs of |mean chance - share of right songs|; 0 without songs.

    `sums` are those of `chance_sums`. A narrow bin is never divided, so bins may differ a little in size.
    """
    counts, chances, right = sums.T
    total = counts.sum()
    if not total:
        return 0.0
    middles = (np.cumsum(counts) - counts / 2) / total
    bins = np.minimum((ERROR_BINS * middles).astype(np.int64), ERROR_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=chances - right)).sum() / total)
