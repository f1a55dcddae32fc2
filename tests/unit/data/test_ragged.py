"""Sorting and cutting by group give what the plain way gives."""

import numpy as np
import pytest

from rayrec.data.histories import highest_of_each, stable_order


@pytest.mark.parametrize("largest", [3, 10**6, 2**62])
@pytest.mark.parametrize("count", [0, 1, 2, 5_000])
def test_the_order_is_that_of_a_stable_sort_whatever_the_size_of_the_keys(count: int, largest: int) -> None:
    keys = np.random.default_rng(0).integers(largest, size=count)
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))


def test_the_highest_of_each_group_are_kept_and_those_equal_to_the_last() -> None:
    random = np.random.default_rng(0)
    groups = np.sort(random.integers(40, size=3_000)) * 7
    scores = random.integers(50, size=3_000).astype(np.float64)
    kept = highest_of_each(groups, scores, 10)
    assert (np.diff(kept) > 0).all()
    for group in np.unique(groups):
        own = np.flatnonzero(groups == group)
        last = np.sort(scores[own])[::-1][min(10, len(own)) - 1]
        assert set(kept) & set(own) == set(own[scores[own] >= last])
    assert highest_of_each(groups[:0], scores[:0], 10).tolist() == []
    assert highest_of_each(np.array([1, 1, 2]), np.array([0.0, 1.0, 2.0]), 5).tolist() == [0, 1, 2]
