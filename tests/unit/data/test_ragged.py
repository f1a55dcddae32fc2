"""Offsets, ranges and orders of groups are those of plain sorts and loops."""

import numpy as np
import pytest

from rayrec.data.ragged import (
    find_in_groups,
    group_of_each_item,
    group_sizes,
    group_starts,
    offsets_of,
    ranges,
    stable_order,
    sum_groups,
)


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


def test_sizes_and_sums_of_groups_are_those_of_a_plain_loop() -> None:
    starts = group_starts(np.array([4, 4, 7, 9, 9, 9]))
    assert group_sizes(starts, 6).tolist() == [2, 1, 3]
    assert sum_groups(np.array([1, 2, 3, 4, 5, 6]), starts).tolist() == [3, 3, 15]
    assert sum_groups(np.arange(12.0).reshape(6, 2), starts).tolist() == [[2, 4], [4, 5], [24, 27]]


@pytest.mark.parametrize("values", [np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((0, 3))], ids=str)
def test_without_values_there_are_no_groups_and_no_sums(values: np.ndarray) -> None:
    starts = group_starts(values)
    assert (starts.tolist(), group_sizes(starts, 0).tolist()) == ([], [])
    sums = sum_groups(values, starts)
    assert (sums.shape, sums.dtype) == (values.shape, values.dtype)


def test_the_first_value_from_a_bound_on_is_that_of_a_search_in_each_group() -> None:
    values = np.array([1, 3, 3, 7, 2, 5])
    starts, ends = np.array([0, 0, 0, 4, 4, 2, 6]), np.array([4, 4, 4, 6, 6, 2, 6])
    bounds = np.array([3, 8, 0, 3, 2, 1, 1])
    assert find_in_groups(values, starts, ends, bounds).tolist() == [1, 4, 0, 5, 4, 2, 6]
