"""Cosines by offset, on a path of songs whose angles are known."""

import numpy as np
import pytest

from rayrec.data.histories import Histories, Questions
from rayrec.evaluation import vector_metrics
from rayrec.evaluation.vector_metrics import cosine_sums, curves_of
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender


def _circle(songs: int, degrees: float) -> np.ndarray:
    """Song s lies at s · degrees."""
    angles = np.deg2rad(degrees) * np.arange(songs)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _walk(*lengths: int) -> Histories:
    return Histories.from_lists([range(length) for length in lengths], [range(length) for length in lengths])


def _cosine_sums(
    recommender: ItemKnnRecommender, histories: Histories, questions: Questions, offsets: int
) -> tuple[np.ndarray, np.ndarray]:
    return cosine_sums(recommender, recommender.vectors(histories, questions), histories, questions, offsets)


def test_the_cosine_at_an_offset_is_that_with_the_song_so_many_plays_ahead() -> None:
    histories = _walk(6, 4)
    questions = Questions.before_plays(histories, np.array([2, 7]))  # after 2 plays of the first, 1 of the second
    sums, counts = _cosine_sums(ItemKnnRecommender(_circle(6, 10)), histories, questions, 5)
    np.testing.assert_array_equal(counts, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    steps = np.cos(np.deg2rad(10 * np.arange(1, 6)))
    np.testing.assert_allclose(sums, counts * steps, atol=1e-6)


def test_songs_without_a_vector_are_not_counted() -> None:
    vectors = _circle(4, 10)
    vectors[2] = 0
    histories = _walk(6)  # songs 4 and 5 came after the vectors were made
    questions = Questions.before_plays(histories, np.arange(1, 6))
    sums, counts = _cosine_sums(ItemKnnRecommender(vectors), histories, questions, 3)
    # The questions after songs 0 and 1 have a vector; those after 2, 4 and 5 have none.
    np.testing.assert_array_equal(counts, [[1, 1, 1]])
    ten_degrees, twenty, thirty = np.cos(np.deg2rad([10, 20, 30]))
    np.testing.assert_allclose(sums, [[ten_degrees, twenty, thirty]], atol=1e-6)


def test_blocks_of_questions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = _walk(9, 3, 7)
    questions = Questions.before_plays(histories, np.flatnonzero(np.arange(19) % 9))
    recommender = ItemKnnRecommender(_circle(9, 7))
    whole = _cosine_sums(recommender, histories, questions, 4)
    monkeypatch.setattr(vector_metrics, "CURVE_QUERIES_AT_ONCE", 3)
    np.testing.assert_allclose(_cosine_sums(recommender, histories, questions, 4), whole)


def test_there_is_a_curve_for_each_horizon_of_what_has_vectors() -> None:
    class Both(ItemKnnRecommender):
        horizons = ("short", "long")

    both = Both(_circle(3, 10))
    found = curves_of([PopularityRecommender(np.ones(3)), both])
    assert found == [(both, "short"), (both, "long")]
