"""The highest scores are those of a plain sort, with planted ties in the order of songs."""

import numpy as np
import pytest

from rayrec.data.top_k import top_k, top_positions, top_ranked


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("k", [0, 1, 4, 30])
@pytest.mark.parametrize("seed", range(5))
def test_the_top_k_of_each_row_are_those_of_a_plain_sort_ties_by_song(seed: int, k: int, dtype: type) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(-2, 3, size=(3, 20)).astype(dtype)
    if dtype is not np.int64:
        scores[random.random(scores.shape) < 0.3] = -np.inf
    for songs in (None, random.permutation(100)[:20], np.stack([random.permutation(100)[:20] for _ in range(3)])):
        song_rows = np.broadcast_to(np.arange(20) if songs is None else songs, scores.shape)
        top_songs, top_scores = top_k(scores, k, songs)
        assert (top_songs.dtype, top_scores.dtype) == (np.int32, np.float32)
        for row in range(3):
            pairs = [(-score, song) for score, song in zip(scores[row], song_rows[row], strict=True) if score > -np.inf]
            best = sorted(pairs)[:k]
            num_empty = k - len(best)
            assert top_songs[row].tolist() == [song for _, song in best] + [-1] * num_empty
            assert top_scores[row].tolist() == [-score for score, _ in best] + [-np.inf] * num_empty


def test_rows_without_scores_and_no_rows_have_no_top_songs() -> None:
    assert top_k(np.zeros((2, 0)), 2)[0].tolist() == [[-1, -1], [-1, -1]]
    assert top_k(np.zeros((0, 5)), 2)[0].shape == (0, 2)


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
