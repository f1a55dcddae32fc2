"""Intervals by bootstrap over users, in sums that add up over any cut of the users.

The Poisson bootstrap (Chamandy et al. 2012, "Estimating uncertainty for massive data streams"): in
each sample a user counts Poisson(1) times, drawn from the user's hash, so that no pass needs all
users at once and the answer is the same however they are divided.

U users, B samples, C columns.
"""

import math

import numpy as np

from rayrec.data.histories import user_hash

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(count) for count in range(18)])  # of Poisson(1)


def poisson_weights(user_ids: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """float64 (B + 1, U): how often each user counts; once in row 0, Poisson(1) times in each sample below it."""
    hashes = user_hash(user_ids, salt=f"bootstrap {seed} ")
    uniform = uniform_draws(hashes[None, :], np.arange(1, samples + 1, dtype=np.uint64)[:, None])
    weights = np.searchsorted(_CUMULATIVE, uniform.ravel(), side="right").reshape(uniform.shape)
    return np.concatenate([np.ones((1, len(user_ids))), weights])


def uniform_draws(hashes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): one number for each hash and step, uint64 arrays that broadcast; always the same one."""
    bits = _mixed(hashes + steps.astype(np.uint64) * _GOLDEN)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a counter in, random bits out."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def means_with_intervals(
    sums: np.ndarray, counts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value, low and high, float64 (C,) each, of the means sums / counts, both (B + 1, C), row 0 the data itself.

    NaN where nothing was counted. Samples that counted nothing are left out. Without samples low and
    high are the value.
    """
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    value, samples = means[0], means[1:]
    low, high = value.copy(), value.copy()
    filled = ~np.isnan(value) & (counts[1:] > 0).any(axis=0)
    if filled.any():
        tail = (1 - confidence) / 2
        low[filled], high[filled] = np.nanquantile(samples[:, filled], [tail, 1 - tail], axis=0)
    return value, low, high
