"""Each baseline against answers worked out by hand; no fit reads plays outside its range."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.errors import InputError, LeakError
from rayrec.recommend.baselines import (
    BASELINES,
    USUAL_DAYS,
    AverageRecommender,
    ItemKnnRecommender,
    PopularityRecommender,
    SequentialRulesRecommender,
    count_rules,
    fit_baselines,
    needs_vectors,
    strongest,
)
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender
from rayrec.storage.workspace import Workspace

FITS: list[Callable[..., Any]] = [
    PopularityRecommender.fit,
    SequentialRulesRecommender.fit,
    VsknnRecommender.fit,
    VstanRecommender.fit,
]


def _histories(*lists: list[int]) -> Histories:
    return Histories.from_lists(list(lists), [list(range(len(songs))) for songs in lists])


def _score(recommender: Any, songs: list[int]) -> np.ndarray:
    histories = _histories(songs)
    return np.asarray(recommender.score(histories, Queries.at_end(histories, 0)))[0]


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_refuses_plays_past_the_cut(fit: Callable[..., Any]) -> None:
    with pytest.raises(LeakError, match="2 plays at or after its cut 3"):
        fit([_histories([0, 1, 2]), _histories([0, 1, 2, 0, 1])], num_songs=3, allowed=FitRange(before=3))


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_refuses_held_out_users(fit: Callable[..., Any]) -> None:
    with pytest.raises(LeakError, match="held out"):
        fit([random_histories(50, 5)], num_songs=5, allowed=FitRange(held_out_share=0.5))


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_does_not_depend_on_how_the_batches_are_cut(fit: Callable[..., Any]) -> None:
    histories = random_histories(40, 9)
    full = fit([histories], num_songs=9, allowed=FitRange())
    batched = fit((histories.take(np.array([row])) for row in range(40)), num_songs=9, allowed=FitRange())
    queries = Queries.at_end(histories, 0)
    np.testing.assert_allclose(batched.score(histories, queries), full.score(histories, queries), rtol=1e-5)


def test_fits_from_a_data_set_see_only_what_is_allowed(workspace: Workspace) -> None:
    allowed = FitRange(before=900_000, held_out_share=0.3)
    histories = random_histories(60, 12)
    dataset = write_dataset(workspace, histories, 12)
    popularity, rules = fit_baselines(["popularity", "sequential-rules"], dataset, None, allowed)
    allowed_histories = allowed.select(histories)
    assert 0 < allowed_histories.num_plays < histories.num_plays
    assert isinstance(popularity, PopularityRecommender)
    assert isinstance(rules, SequentialRulesRecommender)
    np.testing.assert_array_equal(popularity.plays, np.bincount(allowed_histories.songs, minlength=12))
    np.testing.assert_allclose(rules.rules.toarray(), count_rules(allowed_histories, 12, 10).toarray(), rtol=1e-5)


def test_every_name_makes_the_recommender_of_that_name(workspace: Workspace) -> None:
    dataset = write_dataset(workspace, random_histories(10, 6), 6)
    recommenders = fit_baselines(BASELINES, dataset, random_vectors(6), FitRange())
    assert tuple(recommender.name for recommender in recommenders) == BASELINES
    assert "average-0.5" in BASELINES
    assert "average-1.0" in BASELINES


def test_unknown_names_and_missing_vectors_are_refused(workspace: Workspace) -> None:
    dataset = write_dataset(workspace, random_histories(10, 6), 6)
    with pytest.raises(InputError, match="unknown baseline 'popular'; expected one of popularity"):
        fit_baselines(["popular"], dataset, None, FitRange())
    with pytest.raises(InputError, match="item-knn requires song embeddings"):
        fit_baselines(["item-knn"], dataset, None, FitRange())
    assert needs_vectors(["popularity", "average-0.9"])
    assert needs_vectors(["weighted-long"])
    assert not needs_vectors(["popularity", "sequential-rules"])


def test_popularity_is_the_number_of_plays() -> None:
    recommender = PopularityRecommender.fit(
        [_histories([0, 2, 2]), _histories([2, 1])], num_songs=4, allowed=FitRange()
    )
    np.testing.assert_array_equal(_score(recommender, [0]), [1, 1, 3, 0])


def test_recent_popularity_counts_the_last_days_before_the_cut(workspace: Workspace) -> None:
    day, cut = 24 * 3600 * 1000, 100 * 24 * 3600 * 1000
    old_time, recent_time = cut - USUAL_DAYS * day - 1, cut - USUAL_DAYS * day
    histories = Histories.from_lists([[0, 0, 1, 2, 3]], [[0, old_time, recent_time, cut - 1, cut]])
    dataset = write_dataset(workspace, histories, 5)
    (recommender,) = fit_baselines(["popularity-recent"], dataset, None, FitRange(before=cut))
    np.testing.assert_array_equal(_score(recommender, [0]), [0, 1, 1, 0, 0])
    (full,) = fit_baselines(["popularity-recent"], dataset, None, FitRange())  # the days end with the last play
    np.testing.assert_array_equal(_score(full, [0]), [0, 0, 1, 1, 0])


def test_without_times_recent_popularity_counts_all_plays(workspace: Workspace) -> None:
    histories = Histories.from_lists([[0, 0], [1] * 20_000], [[0, 180_000], (180_000 * np.arange(20_000)).tolist()])
    dataset = write_dataset(workspace, histories, 2, times="positions")
    (recommender,) = fit_baselines(["popularity-recent"], dataset, None, FitRange())
    np.testing.assert_array_equal(_score(recommender, [0]), [2, 20_000])


def test_rules_weigh_what_followed_by_one_over_the_distance() -> None:
    recommender = SequentialRulesRecommender.fit([_histories([0, 1, 2], [0, 1, 1])], num_songs=4, allowed=FitRange())
    np.testing.assert_allclose(_score(recommender, [3, 0]), [0, 1 + 1 + 0.5, 0.5, 0])
    np.testing.assert_allclose(_score(recommender, [1]), [0, 1, 1, 0])
    np.testing.assert_array_equal(_score(recommender, [2]), [0, 0, 0, 0])


def test_rules_reach_ten_plays_far_and_never_from_user_to_user() -> None:
    recommender = SequentialRulesRecommender.fit(
        [_histories(list(range(12)), list(range(12, 14)))], num_songs=14, allowed=FitRange()
    )
    scores = _score(recommender, [0])
    np.testing.assert_allclose(scores[1:11], 1 / np.arange(1, 11), rtol=1e-6)
    np.testing.assert_array_equal(scores[[0, 11, 12, 13]], 0)
    np.testing.assert_array_equal(_score(recommender, [11]), 0)


def test_only_the_strongest_rules_of_each_song_are_kept() -> None:
    rules = count_rules(_histories([0, 1, 0, 1, 0, 2, 0, 3]), 4, 1)
    kept_rules = strongest(rules, 2).toarray()
    np.testing.assert_array_equal(kept_rules[0], [0, 2, 1, 0])  # of equal weights, that of the lower song is kept
    np.testing.assert_array_equal(kept_rules[1:], rules.toarray()[1:])


def test_rules_stay_few_however_many_users_there_are() -> None:
    def batches() -> Iterable[Histories]:
        return (random_histories(40, 50, seed=seed) for seed in range(6))

    exact = SequentialRulesRecommender.fit(batches(), num_songs=50, allowed=FitRange())
    bounded = SequentialRulesRecommender.fit(batches(), num_songs=50, allowed=FitRange(), max_rules=1_500)
    few = SequentialRulesRecommender.fit(batches(), num_songs=50, allowed=FitRange(), rules_per_song=3)
    assert exact.rules.nnz > 2_000
    assert bounded.rules.nnz <= 1_500 / 2
    assert few.rules.nnz <= 3 * 50
    assert bounded.settings["rules_per_song"] == 15  # 1,500 / (2 · 50)
    assert "rules_per_song" not in exact.settings
    np.testing.assert_allclose(bounded.rules.max(axis=1).toarray(), exact.rules.max(axis=1).toarray(), rtol=0.2)


def test_neighbors_are_those_of_the_last_song() -> None:
    vectors = random_vectors(5)
    vectors[4] = 0
    np.testing.assert_allclose(_score(ItemKnnRecommender(vectors), [0, 1, 3])[:4], vectors[:4] @ vectors[3], rtol=1e-6)
    assert np.isneginf(_score(ItemKnnRecommender(vectors), [0])[4])
    assert np.isneginf(_score(ItemKnnRecommender(vectors), [4])).all()


@pytest.mark.parametrize("discount", [0.25, 0.9, 1.0])
def test_the_average_is_the_discounted_sum_of_the_paper_at_every_position(discount: float) -> None:
    vectors = random_vectors(6)
    vectors[5] = 0
    histories = random_histories(12, 6, seed=5)
    plays = np.random.default_rng(0).permutation(histories.num_plays)
    queries = Queries.before_plays(histories, plays)
    taste_vectors = AverageRecommender(vectors, discount).vectors(histories, queries)
    for row, (user, plays_before) in enumerate(zip(queries.rows, queries.plays_before, strict=True)):
        songs = histories.songs[histories.offsets[user] : histories.offsets[user] + plays_before]
        ages = np.arange(plays_before)[::-1]
        expected = (discount**ages) @ vectors[songs] if plays_before else np.zeros(8)
        expected = expected / (np.linalg.norm(expected) or 1)
        np.testing.assert_allclose(taste_vectors[row], expected, atol=2e-5)


def test_the_same_query_twice_gets_the_same_vector_twice() -> None:
    histories = _histories([0, 1, 2, 3])
    queries = Queries(rows=np.zeros(4, np.int64), plays_before=np.array([3, 2, 3, 3]), at=np.zeros(4, np.int64))
    vectors = AverageRecommender(random_vectors(4), 0.5).vectors(histories, queries)
    np.testing.assert_array_equal(vectors[0], vectors[2])
    np.testing.assert_array_equal(vectors[0], vectors[3])
    assert not np.allclose(vectors[0], vectors[1])


def test_baselines_share_the_vectors_they_are_given() -> None:
    vectors = random_vectors(5)
    assert ItemKnnRecommender(vectors).song_vectors is AverageRecommender(vectors, 0.5).song_vectors
