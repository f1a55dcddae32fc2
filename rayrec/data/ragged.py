"""Values in groups, stored one group after another: offsets, and positions within groups."""

from collections.abc import Sequence

import numpy as np


def ranges(starts: np.ndarray | int, counts: np.ndarray) -> np.ndarray:
    """int64: `counts[0]` consecutive numbers from `starts[0]` on, then `counts[1]` from `starts[1]` on, and so on.

    A single start applies to all groups.
    """
    counts = np.asarray(counts, dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    return np.asarray(np.repeat(np.asarray(starts, dtype=np.int64) - ends + counts, counts) + np.arange(total))


def offsets_of(counts: np.ndarray | Sequence[int]) -> np.ndarray:
    """int64 (len(counts) + 1,): where each group begins, from 0 to the total."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def group_of_each_item(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """int64 (sum of `lengths`,): the number of the group of each item; group i has `lengths[i]` items."""
    return np.repeat(np.arange(len(lengths)), lengths)


def positions_in_groups(sorted_groups: np.ndarray) -> np.ndarray:
    """int64: the position of each value within its run of equal values, from 0. Equal values must be adjacent."""
    count = len(sorted_groups)
    is_first = np.ones(count, dtype=bool)
    is_first[1:] = sorted_groups[1:] != sorted_groups[:-1]
    starts = np.flatnonzero(is_first)
    return np.asarray(np.arange(count) - np.repeat(starts, group_sizes(starts, count)))


def group_starts(sorted_values: np.ndarray) -> np.ndarray:
    """int64: the positions at which a run of equal values begins."""
    if not len(sorted_values):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate([[True], sorted_values[1:] != sorted_values[:-1]]))


def group_sizes(starts: np.ndarray, count: int) -> np.ndarray:
    """int64: the sizes of the groups of `count` values that begin at `starts`, int (G,), ascending from 0."""
    return np.diff(np.append(starts, count))


def sum_groups(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the sum of the values, (n,) or (n, D), of each group; the groups begin at `starts`, int (G,), from 0."""
    return np.asarray(np.add.reduceat(values, starts)) if len(starts) else values[:0]


def find_in_groups(values: np.ndarray, starts: np.ndarray, ends: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """int64 (Q,): the first position in [start, end) whose value is at least the bound; the end if there is none.

    `starts`, `ends` and `bounds` are (Q,); the values between a start and its end are ascending.
    """
    while (starts < ends).any():  # a binary search for all queries at once
        middle = (starts + ends) // 2
        is_open = starts < ends
        is_below = is_open & (values[np.where(is_open, middle, 0)] < bounds)
        starts, ends = np.where(is_below, middle + 1, starts), np.where(is_open & ~is_below, middle, ends)
    return starts


def stable_order(keys: np.ndarray) -> np.ndarray:
    """int64: the result of `np.argsort(keys, kind="stable")` for keys that are int64 and not negative.

    If a key and its position fit in 63 bits, they are sorted as one number, about five times as fast.
    """
    bits = max(1, (len(keys) - 1).bit_length())
    if not len(keys) or int(keys.max()) >> (63 - bits):
        return np.argsort(keys, kind="stable")
    packed = (keys << bits) | np.arange(len(keys))
    packed.sort()
    return np.asarray(packed & ((1 << bits) - 1))
