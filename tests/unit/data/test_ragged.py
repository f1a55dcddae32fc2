"""Sorting and cutting by group give the same as plain sorts and loops."""

import numpy as np
import pytest

from rayrec.data.ragged import offsets_of, ranges, stable_order, top_positions, top_ranked


@pytest.mark.parametrize("largest", [3, 10**6, 2**62])
@pytest.mark.parametrize("count", [0, 1, 2, 5_000])
def test_the_order_is_that_of_a_stable_sort_whatever_the_size_of_the_keys(count: int, largest: int) -> None:
    keys = np.random.default_rng(0).integers(largest, size=count)
    np.testing.assert_array_equal(stable_order(keys), np.argsort(keys, kind="stable"))


def test_the_highest_of_each_group_are_kept_and_those_equal_to_the_last() -> None:
    random = np.random.default_rng(0)
    groups = np.sort(random.integers(40, size=3_000)) * 7
    scores = random.integers(50, size=3_000).astype(np.float64)
    result = top_positions(groups, scores, 10)
    assert (np.diff(result) > 0).all()
    for group in np.unique(groups):
        positions = np.flatnonzero(groups == group)
        last_score = np.sort(scores[positions])[::-1][min(10, len(positions)) - 1]
        assert set(result) & set(positions) == set(positions[scores[positions] >= last_score])
    assert top_positions(groups[:0], scores[:0], 10).tolist() == []
    assert top_positions(np.array([1, 1, 2]), np.array([0.0, 1.0, 2.0]), 5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_each_group_are_those_of_a_plain_sort_equal_ones_by_song(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.repeat([2, 3, 7], random.integers(0, 12, size=3))
    scores, songs = random.integers(0, 4, size=len(groups)), random.permutation(len(groups))
    positions, ranks = top_ranked(groups, scores, songs, 5)
    expected = []
    for group in np.unique(groups):
        best = sorted(np.flatnonzero(groups == group), key=lambda position: (-scores[position], songs[position]))[:5]
        expected += [(position, rank) for rank, position in enumerate(best)]
    assert list(zip(positions, ranks, strict=True)) == expected


def test_ranges_and_offsets_are_those_of_a_plain_loop() -> None:
    counts = np.array([2, 0, 3])
    assert offsets_of(counts).tolist() == [0, 2, 2, 5]
    assert ranges(np.array([10, 5, 1]), counts).tolist() == [10, 11, 1, 2, 3]
    assert ranges(0, counts).tolist() == [0, 1, 0, 1, 2]
    assert ranges(0, np.zeros(0, np.int64)).tolist() == []
