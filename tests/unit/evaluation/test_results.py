"""Every figure against plain loops over users and plays, and the paired bootstrap against a case worked out by hand."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange, Split
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.results import statistics_of
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.base import BaseRecommender, HorizonName
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender, SequentialRulesRecommender

CUT = 1_500_000
NUM_SONGS = 25
SPLIT = Split(id="s", dataset="d", validation_from=1, test_from=CUT, held_out_share=0.2)
CONFIG = EvaluateConfig(ks=(3, 20), bootstrap_samples=30, offsets=2)
CONTEXTS = ("radio", "album")
LONG_TERM = ("25_50", "days0_1")  # endings of the names of targets that the long horizon answers


class TwoHorizons(ItemKnnRecommender):
    """Item kNN whose taste vector for the long horizon is the opposite of the last song's vector."""

    name = "taste"
    kind = "network"  # type: ignore[misc]
    horizons = ("short", "long")
    long_days = DaysHorizon(first_day=0, last_day=1)

    def vectors(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        vectors = super().vectors(histories, queries)
        return vectors if horizon == "short" else -vectors


@pytest.fixture(scope="module")
def histories() -> Histories:
    made = random_histories(60, NUM_SONGS, longest=70, seed=4)
    contexts = np.random.default_rng(0).integers(0, 4, size=made.num_plays).astype(np.int32)
    return Histories(
        user_ids=made.user_ids, offsets=made.offsets, songs=made.songs, played_at=made.played_at, contexts=contexts
    )


@pytest.fixture(scope="module")
def evaluator(histories: Histories) -> Evaluator:
    allowed = FitRange(before=CUT)
    fit_on = [allowed.select(histories)]
    popularity = PopularityRecommender.fit(fit_on, num_songs=NUM_SONGS, allowed=allowed)
    rules = SequentialRulesRecommender.fit(fit_on, num_songs=NUM_SONGS, allowed=allowed, rules_per_song=6)
    plays = np.array(popularity.plays)
    plays[3] = 0  # as if no fit had seen song 3
    recommenders: Sequence[BaseRecommender] = [TwoHorizons(random_vectors(NUM_SONGS)), popularity, rules]
    recommenders[0].added_songs = np.array([3])
    return Evaluator(recommenders, split=SPLIT, song_plays=plays, config=CONFIG, contexts=CONTEXTS)


@pytest.fixture(scope="module")
def figures(histories: Histories, evaluator: Evaluator) -> dict[str, list[dict[str, Any]]]:
    return statistics_of(evaluator(histories), evaluator, "taste")


class Asked:
    """One query, ranked by sorting all songs in plain Python."""

    def __init__(self, evaluator: Evaluator, histories: Histories, model: int, user: int, seen: int) -> None:
        start, end = histories.offsets[user], histories.offsets[user + 1]
        songs = histories.songs[start:end].tolist()
        self.past, self.future = songs[:seen], songs[seen:]
        self.context = int(histories.contexts[start + seen])  # type: ignore[index]
        self.held_out = not SPLIT.held_out.allowed_users(histories.user_ids[user : user + 1])[0]
        self.seen_before = histories.played_at[start] < CUT
        at = histories.played_at[start + seen]
        query = Queries(rows=np.array([user]), seen=np.array([seen]), at=np.array([at]))
        recommender = evaluator.recommenders[model]
        self.scores = {name: recommender.score(histories, query, name)[0] for name in recommender.horizons}
        self.known, self.added = evaluator.known_songs, recommender.added_songs.tolist()
        self.targets = self._targets()

    @functools.cache  # noqa: B019, the queries live as long as this module
    def figures(self, target: str, k: int) -> tuple[float, float, float]:
        """Recall, MRR and NDCG."""
        scores = np.array(self.scores.get("long" if target.endswith(LONG_TERM) else "short", self.scores["short"]))
        if target.startswith(("served", "cold")):
            scores[self.past] = -np.inf
        if target == "cold_among_cold":
            scores[self.known] = -np.inf
        right = list(dict.fromkeys(self.targets[target]))
        findable = [song for song in right if self.known[song] or song in self.added]
        ranks = [int((scores >= scores[song]).sum()) for song in findable]
        within = sorted(rank for rank in ranks if rank <= k)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(k, len(right))))
        gain = sum(1 / math.log2(rank + 1) for rank in within)
        return len(within) / len(right), 1 / within[0] if within else 0.0, gain / ideal

    def _targets(self) -> dict[str, list[int]]:
        past = set(self.past)
        new = [song for song in self.future if song not in past]
        next_new = [song for song in self.future[:1] if song not in past]
        cold = [song for song in next_new if not self.known[song]]
        return {
            "served": next_new,
            "served25_50": [song for song in self.future[24:50] if song not in past],
            "next": self.future[:1],
            "next_new": next_new,
            "next_repeat": [song for song in self.future[:1] if song in past],
            "next10": self.future[:10],
            "offsets25_50": self.future[24:50],
            "days0_1": self.future,  # all plays lie within one day
            "served_days0_1": new,
            "cold_songs": cold,
            "cold_among_cold": cold,
        }


@pytest.fixture(scope="module")
def asked(evaluator: Evaluator, histories: Histories) -> dict[str, list[Asked]]:
    queries = [
        (user, seen)
        for user in range(len(histories))
        for seen in range(1, histories.lengths[user])
        if histories.played_at[histories.offsets[user] + seen] >= CUT
    ]
    return {
        recommender.name: [Asked(evaluator, histories, model, user, seen) for user, seen in queries]
        for model, recommender in enumerate(evaluator.recommenders)
    }


def _mean(asked: list[Asked], target: str, metric: str, k: int) -> float:
    place = ("recall", "mrr", "ndcg").index(metric)
    return float(np.mean([one.figures(target, k)[place] for one in asked if one.targets[target]]))


def test_results_equal_plain_loops(figures: dict[str, Any], asked: dict[str, list[Asked]]) -> None:
    users = {
        "all": lambda one: True,
        "seen": lambda one: one.seen_before and not one.held_out,
        "new": lambda one: not one.seen_before and not one.held_out,
        "held_out": lambda one: one.held_out,
    }
    keys = {(row["model"], row["users"], row["target"], row["metric"], row["k"]) for row in figures["results"]}
    assert len(keys) == len(figures["results"]) == 3 * 4 * 11 * 3 * 2
    for row in figures["results"]:
        some = [one for one in asked[row["model"]] if users[row["users"]](one)]
        assert row["value"] == pytest.approx(_mean(some, row["target"], row["metric"], row["k"]), abs=1e-5), row
        assert row["plays"] == sum(bool(one.targets[row["target"]]) for one in some)
        assert row["low"] <= row["value"] <= row["high"]


def test_leave_one_out_asks_for_the_last_play_of_each_user(
    figures: dict[str, Any], asked: dict[str, list[Asked]]
) -> None:
    assert {row["model"] for row in figures["leave_one_out"]} == set(asked)
    for row in figures["leave_one_out"]:
        if row["users"] == "all":
            last = [one for one in asked[row["model"]] if len(one.future) == 1]
            assert row["target"] == "next"
            assert row["plays"] == row["users_count"] == len(last)
            assert row["value"] == pytest.approx(_mean(last, "next", row["metric"], row["k"]), abs=1e-5)


def test_breakdowns_equal_plain_loops(figures: dict[str, Any], asked: dict[str, list[Asked]]) -> None:
    bounds = {"1": (1, 1), "2-4": (2, 4), "5-19": (5, 19), "20-99": (20, 99), "100+": (100, math.inf)}
    shown = {(row["by"], row["slice"]) for row in figures["breakdowns"]}
    assert shown >= {("history", "2-4"), ("history", "20-99"), ("context", "radio"), ("context", "album")}
    for row in figures["breakdowns"]:
        if row["by"] == "history":
            low, high = bounds[row["slice"]]
            some = [one for one in asked[row["model"]] if low <= len(one.past) <= high]
        elif row["by"] == "context":
            some = [one for one in asked[row["model"]] if one.context >> CONTEXTS.index(row["slice"]) & 1]
        else:
            continue
        assert row["plays"] == len(some)
        assert row["value"] == pytest.approx(_mean(some, "next", row["metric"], 20), abs=1e-5)
    activity = {row["slice"]: row["plays"] for row in figures["breakdowns"] if row["by"] == "activity"}
    assert sum(activity.values()) == len(asked["taste"])


def test_what_is_recommended_equals_plain_loops(
    figures: dict[str, Any], asked: dict[str, list[Asked]], evaluator: Evaluator, histories: Histories
) -> None:
    counts = np.bincount(FitRange(before=CUT).select(histories).songs, minlength=NUM_SONGS)
    counts[3] = 0
    by_plays = sorted(np.flatnonzero(counts), key=lambda song: (-counts[song], song))
    assert {row["model"] for row in figures["recommended"]} == set(asked)
    for row in figures["recommended"]:
        lists = [np.argsort(-one.scores["short"], kind="stable")[:20].tolist() for one in asked[row["model"]]]
        ranks = [by_plays.index(song) + 1 if counts[song] else len(by_plays) + 1 for songs in lists for song in songs]
        again = [song in one.past for one, songs in zip(asked[row["model"]], lists, strict=True) for song in songs]
        assert row["lists"] == len(lists)
        assert row["coverage"] == pytest.approx(len({song for songs in lists for song in songs}) / NUM_SONGS)
        assert row["popularity_rank"] == pytest.approx(np.mean(ranks), abs=1e-4)
        assert row["repeats"] == pytest.approx(np.mean(again), abs=1e-5)


def test_differences_are_those_of_the_means_and_their_intervals_are_paired(
    figures: dict[str, Any], evaluator: Evaluator, histories: Histories
) -> None:
    values = {(row["model"], row["users"], row["target"], row["metric"], row["k"]): row for row in figures["results"]}
    assert len(figures["comparisons"]) == 2 * 8 * 2  # models, targets, metrics
    for row in figures["comparisons"]:
        key = (row["users"], row["target"], row["metric"], row["k"])
        assert (row["model"], row["k"]) == ("taste", 20)
        difference = values[("taste", *key)]["value"] - values[(row["other"], *key)]["value"]
        assert row["difference"] == pytest.approx(difference, abs=3e-6)
    # A model compared with itself under another name differs by 0 in every sample, however wide its intervals are.
    twin = ItemKnnRecommender(random_vectors(NUM_SONGS))
    both = Evaluator([evaluator.recommenders[0], twin], split=SPLIT, song_plays=np.ones(NUM_SONGS), config=CONFIG)
    compared = statistics_of(both(histories), both, "taste")["comparisons"]
    short = [row for row in compared if not row["target"].endswith(LONG_TERM)]  # the twin has no long horizon
    assert [(row["difference"], row["low"], row["high"]) for row in short] == [(0, 0, 0)] * 6
    assert statistics_of(both(histories), both, "nobody")["comparisons"] == []


def test_an_ablation_is_a_model_of_its_own_kind_that_the_default_is_compared_with(
    evaluator: Evaluator, histories: Histories
) -> None:
    without = PopularityRecommender(np.arange(NUM_SONGS))
    without.name, without.without = "without network", "network"
    models = [evaluator.recommenders[0], without]
    both = Evaluator(models, split=SPLIT, song_plays=np.ones(NUM_SONGS), config=CONFIG)
    figures = statistics_of(both(histories), both, "taste")
    assert {row["kind"] for row in figures["results"] if row["model"] == "without network"} == {"ablation"}
    assert {row["kind"] for row in figures["results"] if row["model"] == "taste"} == {"network"}
    assert {row["other"] for row in figures["comparisons"]} == {"without network"}
