"""Bootstrap weights and intervals, pairwise accuracy against drawn negatives, and cosines by offset."""

import numpy as np
import pytest
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.evaluation import accumulator
from rayrec.evaluation.accumulator import (
    CELLS,
    NEGATIVES,
    CellRange,
    RandomSongs,
    bootstrap_weights,
    cell_ranges,
    cosine_sums,
    curves_of,
    means_with_intervals,
    pair_sums,
    popularity_ranks,
    songs_by_popularity,
)
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender


def _users(count: int, prefix: str = "user") -> np.ndarray:
    return np.array([f"{prefix}-{row}" for row in range(count)], dtype=object)


def _interval(
    values: np.ndarray, counts: np.ndarray, *, samples: int, confidence: float, prefix: str = "user"
) -> tuple[float, float, float]:
    """The sum of `values` over the sum of `counts`, (U,) by user, and the bounds of its interval."""
    cells = CellRange().cells_of(_users(len(values), prefix))
    weights = bootstrap_weights(CELLS, samples, seed=0)
    value_sums, count_sums = (
        weights @ np.bincount(cells, weights=amounts, minlength=CELLS) for amounts in (values, counts)
    )
    value, low, high = means_with_intervals(value_sums[:, None], count_sums[:, None], confidence)
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
    masks = np.stack([cells.holds(users) for cells in ranges])
    assert (masks.sum(axis=0) == 1).all()
    total = units * sum(cells.count for cells in ranges)
    assert CELLS <= total < 2 * max(CELLS, units)
    for cells, mask in zip(ranges, masks, strict=True):
        user_cells = cells.cells_of(users[mask])
        assert user_cells.min() >= 0
        assert user_cells.max() < cells.count


def test_the_cell_of_a_user_does_not_depend_on_the_other_users() -> None:
    users = _users(50)
    cells = CellRange().cells_of(users)
    np.testing.assert_array_equal(CellRange().cells_of(users[20:23]), cells[20:23])
    assert len(np.unique(cells)) > 40


def test_the_interval_has_the_width_that_theory_gives() -> None:
    num_users = 4_000
    values = np.random.default_rng(0).normal(3.0, 2.0, size=num_users)
    value, low, high = _interval(values, np.ones(num_users), samples=2_000, confidence=0.95)
    assert value == pytest.approx(values.mean())
    expected_margin = 1.96 * values.std() / np.sqrt(num_users)
    assert value - low == pytest.approx(expected_margin, rel=0.1)
    assert high - value == pytest.approx(expected_margin, rel=0.1)


def test_users_with_many_similar_plays_widen_the_interval() -> None:
    plays_per_user, num_users = 25, 2_000
    # All of a user's plays or none:
    right_plays = (np.random.default_rng(1).random(num_users) < 0.3) * float(plays_per_user)
    _, low, high = _interval(right_plays, np.full(num_users, plays_per_user), samples=2_000, confidence=0.95)
    expected_width = 2 * 1.96 * np.sqrt(0.3 * 0.7 / num_users)
    assert high - low == pytest.approx(expected_width, rel=0.1)  # independent plays would give a fifth of this width


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    is_covered = []
    for repetition in range(200):
        values = np.random.default_rng(repetition).exponential(1.0, size=200)
        _, low, high = _interval(values, np.ones(200), samples=300, confidence=0.9, prefix=f"run-{repetition}")
        is_covered.append(low <= 1.0 <= high)
    assert 0.83 <= np.mean(is_covered) <= 0.96


def test_nothing_counted_gives_nan_and_no_samples_give_the_value() -> None:
    value, low, high = means_with_intervals(np.array([[0.0, 3.0]]), np.array([[0.0, 4.0]]), 0.95)
    assert np.isnan([value[0], low[0], high[0]]).all()
    assert value[1] == low[1] == high[1] == 0.75


PLAYS = np.array([4, 0, 9, 1, 4])


def test_songs_stand_in_the_order_of_their_plays() -> None:
    assert songs_by_popularity(PLAYS).tolist() == [2, 0, 4, 3]
    assert popularity_ranks(PLAYS).tolist() == [2, 5, 1, 4, 3]


def test_negatives_are_drawn_uniformly_or_by_zipf_over_popularity_ranks() -> None:
    hashes, steps = np.full(100_000, 7, np.uint64), np.arange(100_000, dtype=np.uint64)
    negatives = RandomSongs(PLAYS, seed=0)
    for kind, expected in (("uniform", [1 / 4] * 4), ("zipf", np.array([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12))):
        shares = np.bincount(negatives.draw(kind, hashes, steps), minlength=5) / 100_000
        np.testing.assert_allclose(shares[[2, 0, 4, 3]], expected, atol=0.005)
        assert shares[1] == 0


def _pair_sums(histories: Histories, target: str, vectors: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    recommender = ItemKnnRecommender(vectors)
    queries = Queries.before_plays(histories, np.flatnonzero(histories.places > 0))
    negatives = RandomSongs(np.ones(len(vectors)), seed)
    return pair_sums(recommender, recommender.vectors(histories, queries), histories, queries, target, negatives)


def test_a_pair_is_won_where_the_song_played_is_nearer() -> None:
    # Songs 0, 1 and 2 lie together, all others opposite: whoever plays 0, 1, 2 beats any far negative.
    vectors = np.array([[1, 0], [0.99, 0.14], [0.98, 0.2]] + [[-1, 0]] * 997, dtype=np.float32)
    histories = Histories.from_lists([[0, 1, 2, 0, 1, 2, 0, 1]], [range(8)])
    wins, pairs = _pair_sums(histories, "next", vectors)
    uniform, zipf = NEGATIVES.index("uniform"), NEGATIVES.index("zipf")
    assert pairs[0, uniform] == wins[0, uniform] == 7
    assert wins[0, zipf] < 7  # a popular negative is near too, or is the song itself, which makes no pair


def test_every_query_and_offset_makes_a_pair() -> None:
    histories, vectors = random_histories(12, 40, longest=60, seed=5), random_vectors(40)
    wins, pairs = _pair_sums(histories, "offsets25_50", vectors)
    num_pairs = sum(
        max(0, min(50, length - plays) - 24) for length in histories.lengths for plays in range(1, max(1, length))
    )
    assert 0.9 * num_pairs < pairs[:, 0].sum() < num_pairs  # one in forty negatives is the song itself
    assert wins.sum() / pairs.sum() == pytest.approx(0.5, abs=0.03)  # the vectors are random


def test_a_tie_counts_against_the_song_played_even_if_rounding_breaks_it() -> None:
    next_float = np.nextafter(np.float32(0.6), np.float32(1))  # the next larger float32
    vectors = np.array([[1, 0], [next_float, 0.8], [0.6, 0.8]], dtype=np.float32)
    histories = Histories.from_lists([[0, 1]] * 50, [[0, 1]] * 50)
    wins, pairs = _pair_sums(histories, "next", vectors)
    assert pairs[:, 0].sum() > 20
    assert wins.sum() == 0  # against song 0, which is nearer, and against song 2, which is as near


def test_songs_without_a_vector_make_no_pair() -> None:
    vectors = random_vectors(5)
    vectors[1] = 0
    histories = Histories.from_lists([[0, 1, 0, 7, 2]], [range(5)])
    _, pairs = _pair_sums(histories, "next", vectors)
    # Song 1 has no vector, neither as a target nor as the last song; song 7 is not in the catalog.
    assert pairs.sum() == 0


def test_division_of_users_and_queries_changes_no_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    histories, vectors = random_histories(12, 40, longest=60, seed=5), random_vectors(40)
    full = _pair_sums(histories, "offsets25_50", vectors)
    monkeypatch.setattr(accumulator, "PAIR_QUERIES_AT_ONCE", 5)
    parts = [_pair_sums(histories.take(np.array([row])), "offsets25_50", vectors) for row in range(12)]
    for field in (0, 1):
        np.testing.assert_array_equal(np.concatenate([part[field] for part in parts]), full[field])
    assert sum(part[1].sum() for part in parts) > 0
    other_seed = _pair_sums(histories, "offsets25_50", vectors, seed=1)
    assert (other_seed[0] != full[0]).any()


def _circle_vectors(songs: int, degrees: float) -> np.ndarray:
    """float32 (N, 2): vectors on a circle; song s lies at the angle s · `degrees`."""
    angles = np.deg2rad(degrees) * np.arange(songs)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def _histories_in_song_order(*lengths: int) -> Histories:
    return Histories.from_lists([range(length) for length in lengths], [range(length) for length in lengths])


def _cosine_sums(
    recommender: ItemKnnRecommender, histories: Histories, queries: Queries, offsets: int
) -> tuple[np.ndarray, np.ndarray]:
    return cosine_sums(recommender, recommender.vectors(histories, queries), histories, queries, offsets)


def test_the_cosine_at_an_offset_is_that_with_the_song_so_many_plays_ahead() -> None:
    histories = _histories_in_song_order(6, 4)
    queries = Queries.before_plays(histories, np.array([2, 7]))  # after 2 plays of the first user and 1 of the second
    sums, counts = _cosine_sums(ItemKnnRecommender(_circle_vectors(6, 10)), histories, queries, 5)
    np.testing.assert_array_equal(counts, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    cosines = np.cos(np.deg2rad(10 * np.arange(1, 6)))
    np.testing.assert_allclose(sums, counts * cosines, atol=1e-6)


def test_songs_without_a_vector_are_not_counted() -> None:
    vectors = _circle_vectors(4, 10)
    vectors[2] = 0
    histories = _histories_in_song_order(6)  # songs 4 and 5 came after the vectors were made
    queries = Queries.before_plays(histories, np.arange(1, 6))
    sums, counts = _cosine_sums(ItemKnnRecommender(vectors), histories, queries, 3)
    # The queries after songs 0 and 1 have a vector; those after 2, 4 and 5 have none.
    np.testing.assert_array_equal(counts, [[1, 1, 1]])
    cosine_10, cosine_20, cosine_30 = np.cos(np.deg2rad([10, 20, 30]))
    np.testing.assert_allclose(sums, [[cosine_10, cosine_20, cosine_30]], atol=1e-6)


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = _histories_in_song_order(9, 3, 7)
    queries = Queries.before_plays(histories, np.flatnonzero(np.arange(19) % 9))
    recommender = ItemKnnRecommender(_circle_vectors(9, 7))
    full = _cosine_sums(recommender, histories, queries, 4)
    monkeypatch.setattr(accumulator, "CURVE_QUERIES_AT_ONCE", 3)
    np.testing.assert_allclose(_cosine_sums(recommender, histories, queries, 4), full)


def test_each_horizon_of_a_recommender_with_vectors_has_a_curve() -> None:
    class TwoHorizons(ItemKnnRecommender):
        horizons = ("short", "long")

    recommender = TwoHorizons(_circle_vectors(3, 10))
    curves = curves_of([PopularityRecommender(np.ones(3)), recommender])
    assert curves == [(recommender, "short"), (recommender, "long")]
