"""Which plays are predicted, for whom they count, and that the figures add up."""

import pickle
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import pytest
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange, Split
from rayrec.errors import InputError
from rayrec.evaluation import evaluator as module
from rayrec.evaluation.accumulator import MetricAccumulator, cell_ranges
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import GROUPS, EvaluateConfig, blocks, plays_to_predict, user_groups, usual_k
from rayrec.evaluation.results import Statistics
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import (
    AverageRecommender,
    ItemKnnRecommender,
    PopularityRecommender,
    SequentialRulesRecommender,
)

CUT = 100
SPLIT = Split(id="split", dataset="by-hand", validation_from=90, test_from=CUT)
NUM_SONGS = 4


@pytest.fixture
def world() -> Histories:
    """Plays of the songs 0 to 3; the cut is at 100."""
    return Histories.from_lists(
        songs=[[0, 1, 2], [0, 1], [3], [1, 1, 0], [], [2]],
        played_at=[[10, 100, 110], [10, 95], [120], [130, 140, 150], [], [5]],
        user_ids=["seen", "quiet", "once", "new", "empty", "early"],
    )


def _evaluator(recommenders: list[BaseRecommender], split: Split = SPLIT, **settings: object) -> Evaluator:
    config = EvaluateConfig(**{"ks": (1, 2), "bootstrap_samples": 20, "offsets": 3, **settings})
    return Evaluator(recommenders, split=split, song_plays=np.array([1, 1, 1, 0]), config=config)


def test_every_play_from_the_cut_on_that_follows_another_is_predicted(world: Histories) -> None:
    plays = plays_to_predict(world, SPLIT)
    queries = Queries.before_plays(world, plays)
    assert list(zip(world.user_ids[queries.rows], queries.plays_before, strict=True)) == [
        ("seen", 1),
        ("seen", 2),
        ("new", 1),
        ("new", 2),
    ]
    assert queries.at.tolist() == [100, 110, 140, 150]


@pytest.mark.parametrize("per_block", [1, 2, 3, 100])
def test_blocks_hold_every_query_once(world: Histories, per_block: int) -> None:
    queries = [
        (block.user_ids[row], int(block.played_at[play]))
        for block, plays in blocks(world, SPLIT, per_block)
        for row, play in zip(Queries.before_plays(block, plays).rows, plays, strict=True)
    ]
    assert queries == [("seen", 100), ("seen", 110), ("new", 140), ("new", 150)]


def test_users_are_seen_new_or_held_out(world: Histories) -> None:
    assert [GROUPS[group] for group in user_groups(world, SPLIT)] == ["seen", "seen", "new", "new", "new", "seen"]
    held_out_split = Split(id="s", dataset="d", validation_from=90, test_from=CUT, held_out_share=0.5, held_out_seed=2)
    is_allowed = held_out_split.final.allowed_users(world.user_ids)
    assert 0 < is_allowed.sum() < len(world)
    expected = np.where(is_allowed, user_groups(world, SPLIT), GROUPS.index("held_out"))
    np.testing.assert_array_equal(user_groups(world, held_out_split), expected)


def test_figures_of_each_group_are_those_worked_out_by_hand(world: Histories) -> None:
    # Popularity 5, 4, 3, 9: song 3 scores highest, although it was never played before the cut.
    evaluator = _evaluator([PopularityRecommender(np.array([5, 4, 3, 9]))])
    results = Statistics(evaluator(world), evaluator.recommenders, evaluator.config).results(["next"])
    # User "seen" plays songs 1 and 2, which rank 3 and 4; user "new" plays songs 1 and 0, which rank 3 and 2.
    entries = {(entry["users"], entry["metric"], entry["k"]): entry for entry in results}
    assert entries["new", "recall", 2]["value"] == 0.5
    assert entries["new", "mrr", 2]["value"] == 0.25
    assert entries["new", "ndcg", 2]["value"] == pytest.approx(0.5 / np.log2(3), abs=1e-6)
    assert entries["seen", "recall", 2]["value"] == 0
    assert entries["all", "recall", 2]["value"] == 0.25
    assert entries["all", "recall", 1]["value"] == 0
    assert (entries["all", "recall", 2]["plays"], entries["all", "recall", 2]["users_count"]) == (4, 2)
    assert (entries["new", "recall", 2]["plays"], entries["new", "recall", 2]["users_count"]) == (2, 1)
    assert not any(entry["users"] == "held_out" for entry in results)
    assert set(results[0]) == {
        *("model", "kind", "users", "target", "metric", "k", "value", "low", "high", "plays", "users_count")
    }


def test_figures_are_means_over_plays_and_not_over_users() -> None:
    popularity = PopularityRecommender(np.array([9, 1, 1, 1]))
    histories = Histories.from_lists([[0, 0, 0, 0, 0], [0, 1]], [[100, 101, 102, 103, 104], [100, 101]])
    evaluator = _evaluator([popularity])
    results = Statistics(evaluator(histories), [popularity], evaluator.config).results(["next"])
    assert results[0]["value"] == 0.8  # 4 of 5 plays; the mean over users would be 0.5


def _models(histories: Histories) -> list[BaseRecommender]:
    allowed = FitRange(before=600_000)
    fit_histories = allowed.select(histories)
    vectors = random_vectors(25)
    return [
        PopularityRecommender.fit([fit_histories], num_songs=25, allowed=allowed),
        SequentialRulesRecommender.fit([fit_histories], num_songs=25, allowed=allowed),
        ItemKnnRecommender(vectors),
        AverageRecommender(vectors, 0.75),
    ]


def _assert_same(left: MetricAccumulator, right: MetricAccumulator) -> None:
    for field in fields(MetricAccumulator):
        np.testing.assert_allclose(getattr(left, field.name), getattr(right, field.name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cut", [7, 60])
def test_sums_of_parts_add_up_to_the_sums_of_the_whole(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    histories = random_histories(120, 25, seed=2)
    split = Split(id="s", dataset="d", validation_from=1, test_from=600_000, held_out_share=0.2)
    config = EvaluateConfig(bootstrap_samples=50, offsets=5)
    song_plays = np.array([0] * 4 + [1] * 21)
    evaluator = Evaluator(_models(histories), split=split, song_plays=song_plays, config=config, curve_share=0.5)
    full = evaluator(histories)
    assert (full.users > 0).all()
    assert min(full.curve_counts.sum(), full.pairs.sum(), full.slice_queries.sum(), full.lists.sum()) > 0
    monkeypatch.setattr(module, "QUERIES_PER_BLOCK", 40)
    shuffled_rows = np.random.default_rng(0).permutation(len(histories))
    sum_of_parts = evaluator.empty()
    for start in range(0, 120, cut):
        sum_of_parts.add(evaluator(histories.take(shuffled_rows[start : start + cut])))
    _assert_same(sum_of_parts, full)
    sum_of_ranges = evaluator.empty()
    ranges = cell_ranges(1, 200)
    assert len(ranges) == 6
    for number, cells in enumerate(ranges):
        sum_of_ranges.add(evaluator(histories, cells), first_cell=number * cells.count)
    for name in ("metrics", "queries", "curve_sums", "pairs", "slice_metrics", "list_sums"):
        np.testing.assert_allclose(getattr(sum_of_ranges, name).sum(axis=0), getattr(full, name).sum(axis=0), atol=1e-9)
    assert (sum_of_ranges.users == full.users).all()
    assert (sum_of_ranges.listed == full.listed).all()


@pytest.mark.parametrize("buckets", [1, 16, 5_000])
def test_what_a_worker_returns_is_below_1_mb_whatever_the_number_of_songs_models_and_buckets(buckets: int) -> None:
    models = [PopularityRecommender(np.ones(4), name=f"model-{number}") for number in range(16)]
    models += [ItemKnnRecommender(random_vectors(4)) for _ in range(8)]
    histories = random_histories(200, 4, longest=60, seed=1)
    split = Split(id="s", dataset="d", validation_from=1, test_from=2)
    song_plays, contexts = np.ones(2_000_000), ["a"] * 10
    evaluator = Evaluator(models, split=split, song_plays=song_plays, config=EvaluateConfig(), contexts=contexts)
    cells = cell_ranges(buckets, evaluator.cells_at_once)[0]
    data = pickle.dumps(evaluator(histories, cells))
    assert 50_000 < len(data) < 1_000_000


def test_whether_a_query_is_drawn_depends_only_on_its_user_and_play() -> None:
    histories = random_histories(400, 25, longest=60, seed=3)
    split = Split(id="s", dataset="d", validation_from=1, test_from=600_000)

    def draw_queries(subset: Histories, share: float) -> set[tuple[str, int]]:
        return {
            query
            for block, plays in blocks(subset, split, 50, share)
            for queries in [Queries.before_plays(block, plays)]
            for query in zip(block.user_ids[queries.rows], queries.plays_before.tolist(), strict=True)
        }

    all_queries, tenth, third = (draw_queries(histories, share) for share in (1.0, 0.1, 0.3))
    assert len(tenth) == pytest.approx(len(all_queries) / 10, rel=0.1)
    assert len(third) == pytest.approx(len(all_queries) * 0.3, rel=0.1)
    assert tenth < third < all_queries
    subset = histories.take(np.arange(0, 400, 7))
    assert draw_queries(subset, 0.3) == {query for query in third if query[0] in set(subset.user_ids)}


def test_a_part_of_the_queries_gives_figures_near_those_of_all_with_wider_intervals() -> None:
    histories = random_histories(400, 25, longest=60, seed=3)
    split = Split(id="s", dataset="d", validation_from=1, test_from=600_000)
    models, config = _models(histories)[:2], EvaluateConfig(ks=(5,), bootstrap_samples=200, offsets=0)
    statistics = []
    for share in (1.0, 0.1):
        evaluator = Evaluator(models, split=split, song_plays=np.ones(25), config=config)
        evaluator.query_share = share
        statistics.append(Statistics(evaluator(histories), models, config))
    full, partial = (
        {(row["model"], row["metric"]): row for row in sample.results(["next"]) if row["users"] == "all"}
        for sample in statistics
    )
    for key, row in full.items():
        partial_width, full_width = (sample[key]["high"] - sample[key]["low"] for sample in (partial, full))
        assert partial[key]["plays"] == pytest.approx(0.1 * row["plays"], rel=0.1)
        assert abs(partial[key]["value"] - row["value"]) < partial_width
        assert partial_width > 2 * full_width
    activity = {row["slice"]: row["plays"] for row in statistics[1].breakdowns([]) if row["by"] == "activity"}
    # plays that were not drawn count in a user's activity too
    assert activity.get("1", 0) + activity.get("2-4", 0) < activity["20-99"]


def test_only_the_drawn_users_are_in_the_curves() -> None:
    histories = random_histories(300, 25, longest=4, seed=2)
    recommender = ItemKnnRecommender(random_vectors(25))
    config = EvaluateConfig(bootstrap_samples=0, offsets=1)

    def curve_plays(share: float) -> float:
        evaluator = Evaluator([recommender], split=SPLIT, song_plays=np.ones(25), config=config, curve_share=share)
        return float(evaluator(histories).curve_counts.sum())

    assert curve_plays(0.0) == 0
    assert curve_plays(0.3) == pytest.approx(0.3 * curve_plays(1.0), rel=0.25)


def test_curves_are_listed_with_their_plays(world: Histories) -> None:
    recommender = ItemKnnRecommender(random_vectors(4))
    evaluator = _evaluator([PopularityRecommender(np.ones(4)), recommender])
    (curve,) = Statistics(evaluator(world), evaluator.recommenders, evaluator.config).cosine_by_offset(evaluator.curves)
    assert (curve["model"], curve["horizon"], curve["offset"]) == ("item-knn", "short", [1, 2])
    assert curve["plays"] == [4, 2]
    vectors = recommender.song_vectors
    expected = (
        vectors[0] @ vectors[1] + vectors[1] @ vectors[2] + vectors[1] @ vectors[1] + vectors[1] @ vectors[0]
    ) / 4
    assert curve["value"][0] == pytest.approx(expected, abs=1e-5)
    assert all(
        low <= value <= high for low, value, high in zip(curve["low"], curve["value"], curve["high"], strict=True)
    )


def test_users_without_test_plays_are_not_scored() -> None:
    class NeverScored(PopularityRecommender):
        def score_chunks(self, *_: object) -> Iterator[tuple[slice, np.ndarray]]:
            raise AssertionError("nothing was to be scored")

    evaluator = _evaluator([NeverScored(np.ones(4))])
    _assert_same(evaluator(Histories.from_lists([[0, 1], [2]], [[1, 2], [3]])), evaluator.empty())
    sums = evaluator(Histories.from_lists([[0, 1], [2]], [[1, 2], [500]]))
    assert (sums.queries.sum(), sums.slice_queries.sum()) == (0, 1)  # no model scores a user without earlier plays


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": ()}, "ks is"),
        ({"ks": (0, 10)}, "ks is"),
        ({"ks": (10, 10)}, "ks is"),
        ({"confidence": 1.0}, "confidence is 1.0"),
        ({"bootstrap_samples": -1}, "bootstrap_samples is -1"),
        ({"offsets": -1}, "offsets is -1"),
        ({"queries": -1}, "queries is -1"),
        ({"models": ()}, "models is empty"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluateConfig(**settings)


def test_headlines_are_at_20_or_at_the_deepest_cut_off() -> None:
    assert [usual_k(ks) for ks in ((10, 20, 100), (1, 10), (50,))] == [20, 10, 50]
