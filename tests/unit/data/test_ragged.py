"""Offsets, ranges and orders of groups are those of plain sorts and loops."""

import numpy as np
import pytest

from rayrec.data.ragged import find_in_groups, group_of_each_item, offsets_of, ranges, stable_order


@pytest.mark.parametrize("largest", [3, 10**6, 2**62])
@pytest.mark.parametrize("count", [0, 1, 2, 5_000])
def test_the_order_is_that_of_a_stable_sort_whatever_the_size_of_the_keys(count: int, largest: int) -> None:
    keys = np.random.default_rng(0).integers(largest, size=count)
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))


def test_ranges_offsets_and_groups_are_those_of_a_plain_loop() -> None:
    counts = np.array([2, 0, 3])
    assert offsets_of(counts).tolist() == [0, 2, 2, 5]
    assert group_of_each_item(counts).tolist() == [0, 0, 2, 2, 2]
    assert ranges(np.array([10, 5, 1]), counts).tolist() == [10, 11, 1, 2, 3]
    assert ranges(0, counts).tolist() == [0, 1, 0, 1, 2]
    assert ranges(0, np.zeros(0, np.int64)).tolist() == []


def test_the_first_value_from_a_bound_on_is_that_of_a_search_in_each_group() -> None:
    values = np.array([1, 3, 3, 7, 2, 5])
    starts, ends = np.array([0, 0, 0, 4, 4, 2, 6]), np.array([4, 4, 4, 6, 6, 2, 6])
    bounds = np.array([3, 8, 0, 3, 2, 1, 1])
    assert find_in_groups(values, starts, ends, bounds).tolist() == [1, 4, 0, 5, 4, 2, 6]
