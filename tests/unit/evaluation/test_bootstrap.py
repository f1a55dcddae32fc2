"""The Poisson bootstrap: what it draws, that it adds up, and that its intervals are as wide as they must be."""

import numpy as np
import pytest

from rayrec.evaluation.bootstrap import means_with_intervals, poisson_weights


def _users(count: int, prefix: str = "user") -> np.ndarray:
    return np.array([f"{prefix}-{row}" for row in range(count)], dtype=object)


def test_weights_are_poisson_of_mean_one() -> None:
    weights = poisson_weights(_users(2_000), 200, seed=1)[1:]
    expected = [np.exp(-1), np.exp(-1), np.exp(-1) / 2, np.exp(-1) / 6]
    shares = [(weights == count).mean() for count in range(4)]
    np.testing.assert_allclose(shares, expected, atol=0.005)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    assert weights.var() == pytest.approx(1, abs=0.02)


def test_weights_of_users_and_of_samples_are_independent() -> None:
    weights = poisson_weights(_users(300), 300, seed=1)[1:]
    for correlations in (np.corrcoef(weights), np.corrcoef(weights.T)):
        np.fill_diagonal(correlations, 0)
        assert np.abs(correlations).max() < 0.35
        assert correlations.mean() == pytest.approx(0, abs=0.01)


def test_a_user_counts_the_same_in_every_company() -> None:
    users = _users(50)
    together = poisson_weights(users, 30, seed=4)
    np.testing.assert_array_equal(poisson_weights(users[20:23], 30, seed=4), together[:, 20:23])
    np.testing.assert_array_equal(poisson_weights(users, 10, seed=4), together[:11])
    assert (together[0] == 1).all()
    assert (poisson_weights(users, 30, seed=5) != together).any()


def test_the_interval_has_the_width_that_theory_gives() -> None:
    users = 4_000
    values = np.random.default_rng(0).normal(3.0, 2.0, size=users)
    weights = poisson_weights(_users(users), 2_000, seed=0)
    sums, counts = weights @ values, weights @ np.ones(users)
    value, low, high = means_with_intervals(sums[:, None], counts[:, None], 0.95)
    assert value[0] == pytest.approx(values.mean())
    expected = 1.96 * values.std() / np.sqrt(users)
    assert value[0] - low[0] == pytest.approx(expected, rel=0.1)
    assert high[0] - value[0] == pytest.approx(expected, rel=0.1)


def test_users_with_many_alike_plays_widen_the_interval_as_clusters_do() -> None:
    plays_each, users = 25, 2_000
    right = (np.random.default_rng(1).random(users) < 0.3) * float(plays_each)  # all of a user's plays or none
    weights = poisson_weights(_users(users), 2_000, seed=0)
    _, low, high = means_with_intervals(
        (weights @ right)[:, None], (weights @ np.full(users, plays_each))[:, None], 0.95
    )
    of_users = 2 * 1.96 * np.sqrt(0.3 * 0.7 / users)
    assert high[0] - low[0] == pytest.approx(of_users, rel=0.1)  # and not a fifth of it, as of single plays


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = []
    for repetition in range(200):
        values = np.random.default_rng(repetition).exponential(1.0, size=200)
        weights = poisson_weights(_users(200, f"run-{repetition}"), 300, seed=0)
        sums, counts = (weights @ values)[:, None], weights.sum(axis=1)[:, None]
        _, low, high = means_with_intervals(sums, counts, 0.9)
        covered.append(low[0] <= 1.0 <= high[0])
    assert 0.83 <= np.mean(covered) <= 0.96


def test_nothing_counted_gives_nan_and_no_samples_give_the_value() -> None:
    value, low, high = means_with_intervals(np.array([[0.0, 3.0]]), np.array([[0.0, 4.0]]), 0.95)
    assert np.isnan([value[0], low[0], high[0]]).all()
    assert value[1] == low[1] == high[1] == 0.75
