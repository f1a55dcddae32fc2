"""Ranks and metrics against cases worked out by hand."""

import numpy as np
import pytest

from rayrec.evaluation.metrics import NEVER, metric_columns, metrics_of, ranks_of

NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3, 1, 2], 0, 1),
        ([3, 1, 2], 1, 3),
        ([2, 2, 2], 1, 3),  # ties count against
        ([0, 5, 5, 1], 2, 2),
        ([NAN, 1, NAN], 1, 1),  # NaN is -inf
        ([NAN, 1, 0], 0, 3),
        ([-INF, -INF, 4], 0, 3),
        ([-INF, NAN, -INF], 1, 3),
    ],
)
def test_the_rank_counts_every_other_song_that_scores_as_much(scores: list[float], target: int, rank: int) -> None:
    assert ranks_of(np.array([scores], dtype=np.float32), np.array([target])).tolist() == [rank]


def test_ranks_of_a_batch_are_those_of_each_row() -> None:
    scores = np.random.default_rng(0).integers(0, 4, size=(20, 9)).astype(np.float32)
    targets = np.arange(20) % 9
    alone = [ranks_of(scores[row : row + 1], targets[row : row + 1])[0] for row in range(20)]
    assert ranks_of(scores, targets).tolist() == alone


def test_metrics_of_one_right_answer_are_those_of_the_textbook() -> None:
    columns = metric_columns((2, 5))
    assert columns == [("recall", 2), ("recall", 5), ("mrr", 2), ("mrr", 5), ("ndcg", 2), ("ndcg", 5)]
    first, third, sixth, never = metrics_of(np.array([1, 3, 6, NEVER]), (2, 5))
    np.testing.assert_allclose(first, [1, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(third, [0, 1, 0, 1 / 3, 0, 1 / 2])  # log2(4) = 2
    np.testing.assert_array_equal(sixth, 0)
    np.testing.assert_array_equal(never, 0)
