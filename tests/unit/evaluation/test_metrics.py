"""Ranks and metrics against cases worked out by hand, and against plain loops over sorted songs."""

import math

import numpy as np
import pytest

from rayrec.evaluation.ranks import NOT_FOUND, best_scores, metric_columns, metrics_of, ranks_of

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize("depth", [4, 100])
@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3, 1, 2], 0, 1),
        ([3, 1, 2], 1, 3),
        ([2, 2, 2], 1, 3),  # ties count against
        ([0, 5, 5, 1], 2, 2),
        ([NAN, 1, NAN], 1, 1),  # NaN is -inf
        ([NAN, 1, 0], 0, NOT_FOUND),
        ([-INF, -INF, 4], 0, NOT_FOUND),  # a song with -inf is never recommended
        ([-INF, NAN, -INF], 1, NOT_FOUND),
    ],
)
def test_the_rank_counts_every_other_song_that_scores_as_much(
    scores: list[float], target: int, rank: int, depth: int
) -> None:
    row = np.array([scores], dtype=np.float32)
    assert ranks_of(row, np.array([0]), np.array([target]), best_scores(row, depth)).tolist() == [rank]


def test_ranks_of_several_songs_a_row_are_exact_above_the_depth_and_never_below() -> None:
    random = np.random.default_rng(0)
    scores = random.integers(0, 12, size=(40, 30)).astype(np.float32)
    scores[random.random(scores.shape) < 0.1] = -np.inf
    rows, songs = np.divmod(np.arange(40 * 30), 30)
    top_scores = best_scores(scores, 11)
    ranks = ranks_of(scores, rows, songs, top_scores)
    for row, song, rank in zip(rows, songs, ranks, strict=True):
        score = scores[row, song]
        expected = sum(other_score >= score for other_score in scores[row])
        assert rank == (expected if expected < 11 and score > -np.inf else NOT_FOUND)


@pytest.mark.parametrize("depth", [1, 5, 21, 400])
@pytest.mark.parametrize("values", ["all different", "mostly ties", "few finite", "few numbers", "ascending"])
def test_the_best_scores_are_those_that_sorting_finds(values: str, depth: int) -> None:
    random = np.random.default_rng(2)
    scores = random.standard_normal((30, 300)).astype(np.float32)
    chance = random.random(scores.shape)
    if values == "mostly ties":
        scores = np.where(chance < 0.9, np.float32(0), scores)
    elif values == "few finite":
        scores[chance < 0.97] = -INF
    elif values == "few numbers":
        scores[chance < 0.97] = NAN
    elif values == "ascending":
        scores.sort(axis=1)
    expected = np.sort(np.nan_to_num(scores, nan=-INF, neginf=-INF), axis=1)[:, -depth:]
    np.testing.assert_array_equal(best_scores(scores, depth), expected)


def _by_loops(ranks: list[int], k: int) -> tuple[float, float, float]:
    hits = sorted(rank for rank in ranks if rank <= k)
    gain = sum(1 / math.log2(rank + 1) for rank in hits)
    ideal = sum(1 / math.log2(position + 2) for position in range(min(k, len(ranks))))
    return len(hits) / len(ranks), 1 / hits[0] if hits else 0.0, gain / ideal


def test_metrics_of_one_right_answer_are_those_of_the_textbook() -> None:
    columns = metric_columns((2, 5))
    assert columns == [("recall", 2), ("recall", 5), ("mrr", 2), ("mrr", 5), ("ndcg", 2), ("ndcg", 5)]
    ranks = np.array([1, 3, 6, NOT_FOUND])
    first, third, sixth, not_found = metrics_of(ranks, np.arange(4), np.ones(4, int), (2, 5))
    np.testing.assert_allclose(first, [1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(third, [0, 1, 0, 1 / 3, 0, 1 / 2])  # log2(4) = 2
    np.testing.assert_array_equal(sixth, 0)
    np.testing.assert_array_equal(not_found, 0)


def test_metrics_of_several_right_answers_are_those_worked_out_by_hand() -> None:
    # The right answers have the ranks 1, 3 and none: one of three is within 2, two of three are within 5.
    ranks, rows = np.array([3, NOT_FOUND, 1]), np.array([1, 1, 1])
    row_without_targets, row_with_targets = metrics_of(ranks, rows, np.array([0, 3]), (2, 5))
    ideal_2, ideal_3 = 1 + 1 / np.log2(3), 1 + 1 / np.log2(3) + 0.5
    np.testing.assert_allclose(row_with_targets, [1 / 3, 2 / 3, 1, 1, 1 / ideal_2, 1.5 / ideal_3])
    np.testing.assert_array_equal(row_without_targets, 0)
    assert metrics_of(ranks[:0], rows[:0], np.zeros(0, int), (2, 5)).shape == (0, 6)


def test_metrics_equal_plain_loops() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(1, 14, size=60)
    rows = np.repeat(np.arange(60), sizes)
    ranks = np.concatenate([random.permutation(30)[:size] + 1 for size in sizes])
    ks = (1, 10, 20)
    metrics = metrics_of(ranks, rows, sizes, ks)
    for row in range(60):
        by_k = [_by_loops(ranks[rows == row].tolist(), k) for k in ks]
        np.testing.assert_allclose(metrics[row], np.array(by_k).T.ravel())
