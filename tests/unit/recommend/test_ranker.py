"""The ranker learns a planted order, and its probabilities agree with how often it is right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rayrec.errors import DamagedArtifactError, InputError
from rayrec.recommend.ranker import (
    Ranker,
    RankerSettings,
    RankingExamples,
    TreeModel,
    calibrate,
    fit_ranker,
    ndcg,
    simplest_of_best,
    softmax_shares,
)
from rayrec.storage.workspace import Workspace

CANDIDATES = 20
FEATURE_NAMES = ["planted", "noise", "of_query"]


def _examples(queries: int, seed: int = 0) -> RankingExamples:
    """One right candidate per query, drawn by a softmax over the planted feature."""
    random = np.random.default_rng(seed)
    planted = random.normal(size=(queries, CANDIDATES)) * 2
    probabilities = np.exp(planted) / np.exp(planted).sum(axis=1, keepdims=True)
    right = np.zeros((queries, CANDIDATES), dtype=bool)
    choices = (np.cumsum(probabilities, axis=1) < random.random((queries, 1))).sum(axis=1)
    right[np.arange(queries), np.minimum(choices, CANDIDATES - 1)] = True
    noise, query_feature = random.normal(size=(2, queries, CANDIDATES))
    features = np.stack([planted, noise, np.broadcast_to(query_feature[:, :1], query_feature.shape)], axis=2)
    return RankingExamples(
        features=features.reshape(-1, 3).astype(np.float32),
        right=right.ravel(),
        counts=np.full(queries, CANDIDATES),
        held_out=np.arange(queries) % 5 == 0,
        drawn=np.ones(right.size, dtype=bool),
    )


@pytest.fixture(scope="module")
def ranker() -> Ranker:
    return fit_ranker(_examples(3_000), FEATURE_NAMES, RankerSettings(trees=60, min_leaf=20)).ranker


def test_candidates_are_ordered_by_what_makes_them_right(ranker: Ranker) -> None:
    other_examples = _examples(200, seed=1)
    scores = ranker.scores(other_examples.features).reshape(-1, CANDIDATES)
    planted = other_examples.features[:, 0].reshape(-1, CANDIDATES)
    assert (scores.argmax(axis=1) == planted.argmax(axis=1)).mean() > 0.8
    assert next(iter(ranker.importance)) == "planted"


def _calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error over ten bins."""
    bins = np.minimum((probabilities * 10).astype(int), 9)
    return float(np.abs(np.bincount(bins, weights=probabilities - right, minlength=10)).sum() / len(right))


def test_probabilities_agree_with_how_often_candidates_are_right(ranker: Ranker) -> None:
    other_examples = _examples(2_000, seed=2)
    rows = np.repeat(np.arange(len(other_examples)), other_examples.counts)
    scores = ranker.scores(other_examples.features)
    probabilities = ranker.calibration(rows, scores)
    assert _calibration_error(probabilities, other_examples.right) < 0.02
    best = np.lexsort((-scores, rows))[::CANDIDATES]
    assert _calibration_error(probabilities[best], other_examples.right[best]) < 0.05
    assert probabilities.min() >= 0
    assert probabilities.max() <= 1


def test_probabilities_count_queries_without_a_right_candidate() -> None:
    examples, other_examples = _examples(600), _examples(100, seed=3)
    unanswered = _examples(120, seed=4)
    unanswered = replace(
        unanswered, right=np.zeros_like(unanswered.right), held_out=np.ones(len(unanswered), dtype=bool)
    )
    # For the second ranker half of the held-out queries have no answer.
    full_ranker, half_ranker = (
        fit_ranker(part, FEATURE_NAMES, RankerSettings(trees=20)).ranker
        for part in (examples, RankingExamples.concatenate([examples, unanswered]))
    )
    full_probabilities, half_probabilities = (
        ranker.calibration(other_examples.rows, ranker.scores(other_examples.features))
        for ranker in (full_ranker, half_ranker)
    )
    assert half_probabilities.sum() / full_probabilities.sum() == pytest.approx(0.5, abs=0.1)


def test_candidates_of_equal_scores_have_the_chance_that_they_are_right_together() -> None:
    """In a third of the queries the first candidate is right; its score is always far above that of the second."""
    rows, scores = np.repeat(np.arange(300), 2), np.tile([90.0, 0.0], 300)
    right = np.zeros(600, dtype=bool)
    right[400::2] = True  # in the last 100 queries
    probabilities = calibrate(rows, scores, right)(rows, scores)
    assert probabilities[::2] == pytest.approx(np.full(300, 1 / 3), abs=0.01)
    assert probabilities[1::2].max() < 0.01


def test_queries_without_a_right_candidate_change_no_tree() -> None:
    examples, unanswered = _examples(3_000), _examples(900, seed=4)
    unanswered = replace(
        unanswered, right=np.zeros_like(unanswered.right), held_out=np.ones(len(unanswered), dtype=bool)
    )
    plain, extended = (
        fit_ranker(part, FEATURE_NAMES, RankerSettings(trees=40, min_leaf=20))
        for part in (examples, RankingExamples.concatenate([examples, unanswered]))
    )
    features = _examples(50, seed=5).features
    np.testing.assert_array_equal(extended.ranker.scores(features), plain.ranker.scores(features))
    np.testing.assert_array_equal(extended.checked.scores(features), plain.checked.scores(features))
    assert extended.ranker.calibration.probabilities != plain.ranker.calibration.probabilities


def test_a_chance_rises_wherever_the_score_does(ranker: Ranker) -> None:
    scores = np.sort(np.random.default_rng(0).normal(size=50))
    assert (np.diff(ranker.calibration(np.zeros(50, np.int64), scores)) > 0).all()


def test_a_saved_ranker_scores_the_same(ranker: Ranker, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    file_names = ranker.save(workspace, "rankers/one", "short")
    assert sorted(f"rankers/one/{name}" for name in file_names) == workspace.files("rankers/one")
    loaded = Ranker.load(workspace, "rankers/one", "short")
    other_examples = _examples(20, seed=5)
    np.testing.assert_array_equal(loaded.scores(other_examples.features), ranker.scores(other_examples.features))
    assert (loaded.names, loaded.calibration) == (ranker.names, ranker.calibration)


def test_a_damaged_file_is_named(ranker: Ranker, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    ranker.save(workspace, "rankers/one", "short")
    workspace.write_bytes("rankers/one/short.trees.txt", b"no trees")
    with pytest.raises(DamagedArtifactError, match=r"short\.trees\.txt"):
        Ranker.load(workspace, "rankers/one", "short")


@pytest.mark.parametrize("settings", [RankerSettings(trees=10), RankerSettings(trees=10).overlapping()])
def test_the_same_examples_give_the_same_ranker_whatever_the_number_of_threads(settings: RankerSettings) -> None:
    first, second = (
        fit_ranker(_examples(3_000), FEATURE_NAMES, replace(settings, threads=threads)).ranker for threads in (1, 3)
    )
    assert first.form == "trees"
    features = _examples(20, seed=5).features
    np.testing.assert_array_equal(first.scores(features), second.scores(features))


def test_examples_without_queries_to_check_on_are_refused() -> None:
    examples = _examples(50)
    with pytest.raises(InputError, match="run `rayrec split` with more --validation-days"):
        fit_ranker(examples.take(~examples.held_out), FEATURE_NAMES)


def test_a_ranker_learns_from_the_queries_held_out_too_once_it_is_chosen() -> None:
    """Only there, a negative feature marks the right candidate: a ranker without these queries cannot know this."""
    examples = _examples_with_weak_features(5_000, seed=0)
    held_out_marks = np.zeros(len(examples.right), dtype=np.float32)
    held_out_marks[examples.right & examples.held_out[examples.rows]] = -1
    features = examples.features.copy()
    features[:, 0] = held_out_marks
    feature_names = [f"weak-{number}" for number in range(10)]
    fitted = fit_ranker(replace(examples, features=features), feature_names, RankerSettings(trees=40))
    feature_rows = np.zeros((2, 10), dtype=np.float32)
    feature_rows[0, 0] = -1
    assert fitted.ranker.form == fitted.checked.form == "trees"
    assert np.diff(fitted.checked.scores(feature_rows)) == 0
    assert np.diff(fitted.ranker.scores(feature_rows)) < -0.5
    assert fitted.ranker.calibration == fitted.checked.calibration


def test_candidates_that_were_not_drawn_teach_nothing() -> None:
    """Candidates of held-out queries that were not drawn have a planted value that no other candidate has."""
    examples = _examples(100)
    random = np.random.default_rng(1)
    is_drawn = examples.right | ~examples.held_out[examples.rows] | (random.random(len(examples.right)) < 0.5)
    features = examples.features.copy()
    features[~is_drawn, 1] = 50
    teaching = replace(examples, features=features, drawn=is_drawn).teaching
    assert len(teaching) == len(examples)
    assert teaching.features[:, 1].max() < 10
    assert (np.bincount(teaching.rows, weights=teaching.right) == 1).all()


def test_softmax_shares_add_up_to_one_within_each_query() -> None:
    rows = np.array([0, 0, 2, 2, 2])
    shares = softmax_shares(rows, np.array([900.0, 900.0, 0.0, 0.0, np.log(2)]))
    np.testing.assert_allclose(shares, [0.5, 0.5, 0.25, 0.25, 0.5])


def _examples_with_weak_features(queries: int, seed: int) -> RankingExamples:
    """Ten features that each say little about the right candidate: from few queries a sum learns it, trees do not."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(queries, CANDIDATES, 10))
    score = 0.8 * features.sum(axis=2)
    right = np.zeros((queries, CANDIDATES), dtype=bool)
    right[np.arange(queries), score.argmax(axis=1)] = True
    return RankingExamples(
        features=features.reshape(-1, 10).astype(np.float32),
        right=right.ravel(),
        counts=np.full(queries, CANDIDATES),
        held_out=np.arange(queries) % 4 == 0,
        drawn=np.ones(right.size, dtype=bool),
    )


def test_few_queries_get_the_weighted_sum_that_trees_cannot_learn_from_them(tmp_path: Path) -> None:
    feature_names = [f"weak-{number}" for number in range(10)]
    ranker = fit_ranker(_examples_with_weak_features(120, seed=0), feature_names, RankerSettings(min_leaf=20)).ranker
    assert ranker.form == "linear"
    other_examples = _examples_with_weak_features(200, seed=1)
    scores = ranker.scores(other_examples.features).reshape(-1, CANDIDATES)
    assert (scores.argmax(axis=1) == other_examples.right.reshape(-1, CANDIDATES).argmax(axis=1)).mean() > 0.8
    workspace = Workspace(tmp_path)
    file_names = ranker.save(workspace, "rankers/one", "long")
    assert file_names == ["long.json", "long.weights.npy"]
    loaded = Ranker.load(workspace, "rankers/one", "long")
    np.testing.assert_array_equal(loaded.scores(other_examples.features), ranker.scores(other_examples.features))
    assert loaded.form == "linear"
    # Values as large as the time since the last play of a user who returns after years.
    far_features = np.full_like(other_examples.features, 1e6)
    assert np.ptp(ranker.scores(np.concatenate([far_features[:1], other_examples.features]))) < 100


def test_trees_do_not_memorize_the_users_of_queries_that_overlap() -> None:
    """One candidate is right in all queries of a user: trees that see all queries memorize it by user features."""
    random = np.random.default_rng(0)
    num_users, queries_per_user = 80, 200
    shape = (num_users, queries_per_user, CANDIDATES)
    right = np.zeros(shape, dtype=bool)
    right[np.arange(num_users), :, random.integers(0, CANDIDATES, size=num_users)] = True
    hint_features = [random.normal(size=shape) * 2 + 0.5 * right for _ in range(20)]
    user_features = [np.broadcast_to(random.normal(size=(num_users, 1, 1)), shape) for _ in range(2)]
    user_song_features = [np.broadcast_to(random.normal(size=(num_users, 1, CANDIDATES)), shape) for _ in range(2)]
    features = np.stack([*hint_features, *user_features, *user_song_features], axis=3)
    examples = RankingExamples(
        features=features.reshape(right.size, -1).astype(np.float32),
        right=right.ravel(),
        counts=np.full(num_users * queries_per_user, CANDIDATES),
        held_out=np.repeat(np.arange(num_users) % 5 == 0, queries_per_user),
        drawn=np.ones(right.size, dtype=bool),
    )
    feature_names = [f"feature_{number}" for number in range(features.shape[-1])]
    settings = RankerSettings(trees=100)
    plain_ranker, overlapping_ranker = (
        fit_ranker(examples, feature_names, variant).checked for variant in (settings, settings.overlapping())
    )
    held_out = examples.take(examples.held_out)
    plain_ndcg, overlapping_ndcg = (
        ndcg(held_out.rows, ranker.scores(held_out.features), held_out.right)
        for ranker in (plain_ranker, overlapping_ranker)
    )
    assert overlapping_ndcg > plain_ndcg + 0.02


def test_a_few_overlapping_queries_still_grow_trees() -> None:
    """With a minimum of a thousand candidates per leaf, no tree could grow."""
    examples = _examples(100)
    training, validation = (examples.take(part) for part in (~examples.held_out, examples.held_out))
    trees = TreeModel.fit(training, validation, FEATURE_NAMES, RankerSettings(trees=100).overlapping())
    tree_ndcg = ndcg(validation.rows, trees.scores(validation.features), validation.right)
    assert tree_ndcg > ndcg(validation.rows, validation.features[:, 0], validation.right) - 0.1


def test_ndcg_is_one_for_a_perfect_order_and_counts_ties_against() -> None:
    rows, right = np.array([0, 0, 0, 1, 1]), np.array([True, False, True, False, True])
    assert ndcg(rows, np.array([3.0, 1.0, 2.0, 0.0, 1.0]), right) == 1
    tied_ndcg = ndcg(np.array([0, 0]), np.array([1.0, 1.0]), np.array([True, False]))
    assert tied_ndcg == pytest.approx(1 / np.log2(3))


def test_of_models_that_chance_cannot_tell_apart_the_simplest_is_kept() -> None:
    random = np.random.default_rng(0)
    best = random.uniform(0.2, 0.6, size=900)
    noise = random.normal(0, 0.3, size=900)
    slightly_worse, much_worse = best + noise - noise.mean() - 0.005, best + noise - noise.mean() - 0.03
    assert simplest_of_best([much_worse, slightly_worse, best]) == 1  # the standard error is 0.01
    assert simplest_of_best([much_worse, best, slightly_worse]) == 1
    assert simplest_of_best([best, best + 0.01]) == 1  # better in every query, even if by little
    assert simplest_of_best([best, best]) == 0
