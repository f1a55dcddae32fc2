"""The bootstrap over cells of users: what it draws, and that its intervals are as wide as they must be."""

import numpy as np
import pytest

from rayrec.evaluation.accumulator import CELLS, CellRange, bootstrap_weights, cell_ranges, means_with_intervals


def _users(count: int, prefix: str = "user") -> np.ndarray:
    return np.array([f"{prefix}-{row}" for row in range(count)], dtype=object)


def _interval(
    values: np.ndarray, counts: np.ndarray, *, samples: int, confidence: float, prefix: str = "user"
) -> tuple[float, float, float]:
    """The mean of values by user over counts by user, (U,) each, with its interval."""
    cells = CellRange().cells_of(_users(len(values), prefix))
    weights = bootstrap_weights(CELLS, samples, seed=0)
    sums, behind = (weights @ np.bincount(cells, weights=some, minlength=CELLS) for some in (values, counts))
    value, low, high = means_with_intervals(sums[:, None], behind[:, None], confidence)
    return value[0], low[0], high[0]


def test_weights_are_poisson_of_mean_one() -> None:
    weights = bootstrap_weights(1_000, 400, seed=1)
    assert (weights[0] == 1).all()
    expected = [np.exp(-1), np.exp(-1), np.exp(-1) / 2, np.exp(-1) / 6]
    shares = [(weights[1:] == count).mean() for count in range(4)]
    np.testing.assert_allclose(shares, expected, atol=0.005)
    assert (bootstrap_weights(1_000, 400, seed=2) != weights).any()


@pytest.mark.parametrize(("units", "most_cells"), [(1, 2_000), (1, 20), (4, 20), (64, 20), (1_024, 20), (5_000, 20)])
def test_ranges_of_cells_divide_the_users_of_a_unit_into_about_1024_cells_in_all(units: int, most_cells: int) -> None:
    users = _users(3_000)
    ranges = cell_ranges(units, most_cells)
    assert all(cells.count <= most_cells for cells in ranges)
    holds = np.stack([cells.holds(users) for cells in ranges])
    assert (holds.sum(axis=0) == 1).all()
    total = units * sum(cells.count for cells in ranges)
    assert CELLS <= total < 2 * max(CELLS, units)
    for cells, held in zip(ranges, holds, strict=True):
        own = cells.cells_of(users[held])
        assert own.min() >= 0
        assert own.max() < cells.count


def test_a_user_is_in_the_same_cell_in_every_company() -> None:
    users = _users(50)
    cells = CellRange().cells_of(users)
    np.testing.assert_array_equal(CellRange().cells_of(users[20:23]), cells[20:23])
    assert len(np.unique(cells)) > 40


def test_the_interval_has_the_width_that_theory_gives() -> None:
    users = 4_000
    values = np.random.default_rng(0).normal(3.0, 2.0, size=users)
    value, low, high = _interval(values, np.ones(users), samples=2_000, confidence=0.95)
    assert value == pytest.approx(values.mean())
    expected = 1.96 * values.std() / np.sqrt(users)
    assert value - low == pytest.approx(expected, rel=0.1)
    assert high - value == pytest.approx(expected, rel=0.1)


def test_users_with_many_alike_plays_widen_the_interval_as_clusters_do() -> None:
    plays_each, users = 25, 2_000
    right = (np.random.default_rng(1).random(users) < 0.3) * float(plays_each)  # all of a user's plays or none
    _, low, high = _interval(right, np.full(users, plays_each), samples=2_000, confidence=0.95)
    of_users = 2 * 1.96 * np.sqrt(0.3 * 0.7 / users)
    assert high - low == pytest.approx(of_users, rel=0.1)  # and not a fifth of it, as of single plays


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    covered = []
    for repetition in range(200):
        values = np.random.default_rng(repetition).exponential(1.0, size=200)
        _, low, high = _interval(values, np.ones(200), samples=300, confidence=0.9, prefix=f"run-{repetition}")
        covered.append(low <= 1.0 <= high)
    assert 0.83 <= np.mean(covered) <= 0.96


def test_nothing_counted_gives_nan_and_no_samples_give_the_value() -> None:
    value, low, high = means_with_intervals(np.array([[0.0, 3.0]]), np.array([[0.0, 4.0]]), 0.95)
    assert np.isnan([value[0], low[0], high[0]]).all()
    assert value[1] == low[1] == high[1] == 0.75
