"""The popularity prior against its formula, and its purpose: it raises hits, the most played songs."""

import numpy as np
import pytest

from rayrec.model.objectives import HITS, HITS_POWER, log_popularity, log_prior


def test_popularity_is_the_share_of_plays_with_hits_counted_up() -> None:
    counts = np.array([5, 0, 80, 15])
    ranks = np.array([3, 4, 1, 2])
    shares = np.array([0.05, 1e-12, 0.8, 0.15])
    np.testing.assert_allclose(log_popularity(counts), np.log(shares * (1 + 4 * HITS / ranks) ** HITS_POWER), rtol=1e-5)


def test_hits_count_up_and_the_many_songs_behind_them_do_not() -> None:
    counts = np.arange(10_000, 0, -1)
    factors = np.exp(log_popularity(counts) - np.log(counts / counts.sum()))
    assert factors[0] ** 0.25 > 170
    assert factors[99] == pytest.approx(1.3**HITS_POWER, rel=0.01)
    assert factors[3_000] ** 0.25 < 1.03


def test_equally_popular_songs_are_ranked_in_the_order_of_rows() -> None:
    assert (np.diff(log_popularity(np.full(50, 3))) < 0).all()


@pytest.mark.parametrize("correction", [0.0, 0.25, 1.0])
def test_the_prior_is_the_part_that_taste_vectors_leave_out(correction: float) -> None:
    counts = np.array([5, 1, 80, 15])
    prior = log_prior(counts, correction)
    assert prior.dtype == np.float32
    np.testing.assert_allclose(prior, (1 - correction) * log_popularity(counts), rtol=1e-6)


def test_songs_that_nobody_played_have_a_prior_too() -> None:
    assert np.isfinite(log_prior(np.zeros(4, np.int64), 0.5)).all()
