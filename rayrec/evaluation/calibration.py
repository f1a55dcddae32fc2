"""The expected calibration error: how far scores that are probabilities differ from how often songs are the next play.

Sums are kept for narrow bins of the probability, so that they add up over any division of the users. The bins of the
error are joined from the narrow bins.

A recommended songs of all queries together.
"""

import numpy as np

CALIBRATED = ("served", "next")  # rankings without heard songs, and of all songs; both for all next plays
PROBABILITY_BINS = (
    256  # narrow bins between the fourth powers of 0, 1/256, 2/256 ..., since most probabilities are small
)
BIN_COLUMNS = 3  # per narrow bin: number of songs, sum of their probabilities, number of songs that are right
ERROR_BINS = 15  # bins of the error, each with about the same number of songs


def calibration_sums(probabilities: np.ndarray, is_right: np.ndarray) -> np.ndarray:
    """float64 (PROBABILITY_BINS, BIN_COLUMNS): sums of songs by probability, float (A,); `is_right` is bool (A,)."""
    bins = np.minimum((PROBABILITY_BINS * np.sqrt(np.sqrt(probabilities))).astype(np.int64), PROBABILITY_BINS - 1)
    columns = (np.ones(len(bins)), probabilities, is_right)
    return np.stack([np.bincount(bins, weights=column, minlength=PROBABILITY_BINS) for column in columns], axis=1)


def expected_calibration_error(bin_sums: np.ndarray) -> float:
    """Return the mean over bins of equal size of |mean probability - share of right songs|; 0 without songs.

    `bin_sums` is the result of `calibration_sums`. A narrow bin is never divided, so bins may differ a little in size.
    """
    counts, probability_sums, right_counts = bin_sums.T
    total = counts.sum()
    if not total:
        return 0.0
    middles = (np.cumsum(counts) - counts / 2) / total
    bins = np.minimum((ERROR_BINS * middles).astype(np.int64), ERROR_BINS - 1)
    return float(np.abs(np.bincount(bins, weights=probability_sums - right_counts)).sum() / total)
