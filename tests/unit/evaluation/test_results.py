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
LONG_TERM_ENDINGS = ("25_50", "days0_1")  # endings of the names of targets that the long horizon answers


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
    source = random_histories(60, NUM_SONGS, longest=70, seed=4)
    contexts = np.random.default_rng(0).integers(0, 4, size=source.num_plays).astype(np.int32)
    return Histories(
        user_ids=source.user_ids,
        offsets=source.offsets,
        songs=source.songs,
        played_at=source.played_at,
        contexts=contexts,
    )


@pytest.fixture(scope="module")
def evaluator(histories: Histories) -> Evaluator:
    allowed = FitRange(before=CUT)
    fit_histories = [allowed.select(histories)]
    popularity = PopularityRecommender.fit(fit_histories, num_songs=NUM_SONGS, allowed=allowed)
    rules = SequentialRulesRecommender.fit(fit_histories, num_songs=NUM_SONGS, allowed=allowed, rules_per_song=6)
    plays = np.array(popularity.plays)
    plays[3] = 0  # as if no fit had seen song 3
    recommenders: Sequence[BaseRecommender] = [TwoHorizons(random_vectors(NUM_SONGS)), popularity, rules]
    recommenders[0].added_songs = np.array([3])
    return Evaluator(recommenders, split=SPLIT, song_plays=plays, config=CONFIG, contexts=CONTEXTS)


@pytest.fixture(scope="module")
def figures(histories: Histories, evaluator: Evaluator) -> dict[str, list[dict[str, Any]]]:
    return statistics_of(evaluator(histories), evaluator, "taste")


class RankedQuery:
    """One query, ranked by sorting all songs in plain Python."""

    def __init__(self, evaluator: Evaluator, histories: Histories, model: int, user: int, plays_before: int) -> None:
        start, end = histories.offsets[user], histories.offsets[user + 1]
        songs = histories.songs[start:end].tolist()
        self.past, self.future = songs[:plays_before], songs[plays_before:]
        self.context = int(histories.contexts[start + plays_before])  # type: ignore[index]
        self.held_out = not SPLIT.held_out.allowed_users(histories.user_ids[user : user + 1])[0]
        self.seen_before = histories.played_at[start] < CUT
        at = histories.played_at[start + plays_before]
        query = Queries(rows=np.array([user]), plays_before=np.array([plays_before]), at=np.array([at]))
        recommender = evaluator.recommenders[model]
        self.scores = {name: recommender.score(histories, query, name)[0] for name in recommender.horizons}
        self.known, self.added = evaluator.known_songs, recommender.added_songs.tolist()
        self.targets = self._targets()

    @functools.cache  # noqa: B019, the queries live as long as this module
    def metrics(self, target: str, k: int) -> tuple[float, float, float]:
        """Recall, MRR and NDCG."""
        scores = np.array(
            self.scores.get("long" if target.endswith(LONG_TERM_ENDINGS) else "short", self.scores["short"])
        )
        if target.startswith(("served", "cold")):
            scores[self.past] = -np.inf
        if target == "cold_among_cold":
            scores[self.known] = -np.inf
        targets = list(dict.fromkeys(self.targets[target]))
        findable_songs = [song for song in targets if self.known[song] or song in self.added]
        ranks = [int((scores >= scores[song]).sum()) for song in findable_songs]
        hits = sorted(rank for rank in ranks if rank <= k)
        ideal = sum(1 / math.log2(position + 2) for position in range(min(k, len(targets))))
        gain = sum(1 / math.log2(rank + 1) for rank in hits)
        return len(hits) / len(targets), 1 / hits[0] if hits else 0.0, gain / ideal

    def _targets(self) -> dict[str, list[int]]:
        heard_songs = set(self.past)
        new_songs = [song for song in self.future if song not in heard_songs]
        next_new = [song for song in self.future[:1] if song not in heard_songs]
        cold_songs = [song for song in next_new if not self.known[song]]
        return {
            "served": next_new,
            "served25_50": [song for song in self.future[24:50] if song not in heard_songs],
            "next": self.future[:1],
            "next_new": next_new,
            "next_repeat": [song for song in self.future[:1] if song in heard_songs],
            "next10": self.future[:10],
            "offsets25_50": self.future[24:50],
            "days0_1": self.future,  # all plays lie within one day
            "served_days0_1": new_songs,
            "cold_songs": cold_songs,
            "cold_among_cold": cold_songs,
        }


@pytest.fixture(scope="module")
def ranked_queries(evaluator: Evaluator, histories: Histories) -> dict[str, list[RankedQuery]]:
    queries = [
        (user, plays_before)
        for user in range(len(histories))
        for plays_before in range(1, histories.lengths[user])
        if histories.played_at[histories.offsets[user] + plays_before] >= CUT
    ]
    return {
        recommender.name: [RankedQuery(evaluator, histories, model, *query) for query in queries]
        for model, recommender in enumerate(evaluator.recommenders)
    }


def _mean(queries: list[RankedQuery], target: str, metric: str, k: int) -> float:
    position = ("recall", "mrr", "ndcg").index(metric)
    return float(np.mean([query.metrics(target, k)[position] for query in queries if query.targets[target]]))


def test_results_equal_plain_loops(figures: dict[str, Any], ranked_queries: dict[str, list[RankedQuery]]) -> None:
    is_in_group = {
        "all": lambda query: True,
        "seen": lambda query: query.seen_before and not query.held_out,
        "new": lambda query: not query.seen_before and not query.held_out,
        "held_out": lambda query: query.held_out,
    }
    keys = {(row["model"], row["users"], row["target"], row["metric"], row["k"]) for row in figures["results"]}
    assert len(keys) == len(figures["results"]) == 3 * 4 * 11 * 3 * 2
    for row in figures["results"]:
        queries = [query for query in ranked_queries[row["model"]] if is_in_group[row["users"]](query)]
        assert row["value"] == pytest.approx(_mean(queries, row["target"], row["metric"], row["k"]), abs=1e-5), row
        assert row["plays"] == sum(bool(query.targets[row["target"]]) for query in queries)
        assert row["low"] <= row["value"] <= row["high"]


def test_leave_one_out_asks_for_the_last_play_of_each_user(
    figures: dict[str, Any], ranked_queries: dict[str, list[RankedQuery]]
) -> None:
    assert {row["model"] for row in figures["leave_one_out"]} == set(ranked_queries)
    for row in figures["leave_one_out"]:
        if row["users"] == "all":
            last_queries = [query for query in ranked_queries[row["model"]] if len(query.future) == 1]
            assert row["target"] == "next"
            assert row["plays"] == row["users_count"] == len(last_queries)
            assert row["value"] == pytest.approx(_mean(last_queries, "next", row["metric"], row["k"]), abs=1e-5)


def test_breakdowns_equal_plain_loops(figures: dict[str, Any], ranked_queries: dict[str, list[RankedQuery]]) -> None:
    bounds = {"1": (1, 1), "2-4": (2, 4), "5-19": (5, 19), "20-99": (20, 99), "100+": (100, math.inf)}
    slices = {(row["by"], row["slice"]) for row in figures["breakdowns"]}
    assert slices >= {("history", "2-4"), ("history", "20-99"), ("context", "radio"), ("context", "album")}
    for row in figures["breakdowns"]:
        if row["by"] == "history":
            low, high = bounds[row["slice"]]
            queries = [query for query in ranked_queries[row["model"]] if low <= len(query.past) <= high]
        elif row["by"] == "context":
            queries = [
                query for query in ranked_queries[row["model"]] if query.context >> CONTEXTS.index(row["slice"]) & 1
            ]
        else:
            continue
        assert row["plays"] == len(queries)
        assert row["value"] == pytest.approx(_mean(queries, "next", row["metric"], 20), abs=1e-5)
    activity = {row["slice"]: row["plays"] for row in figures["breakdowns"] if row["by"] == "activity"}
    assert sum(activity.values()) == len(ranked_queries["taste"])


def test_what_is_recommended_equals_plain_loops(
    figures: dict[str, Any], ranked_queries: dict[str, list[RankedQuery]], evaluator: Evaluator, histories: Histories
) -> None:
    counts = np.bincount(FitRange(before=CUT).select(histories).songs, minlength=NUM_SONGS)
    counts[3] = 0
    songs_by_plays = sorted(np.flatnonzero(counts), key=lambda song: (-counts[song], song))
    assert {row["model"] for row in figures["recommended"]} == set(ranked_queries)
    for row in figures["recommended"]:
        lists = [
            np.argsort(-query.scores["short"], kind="stable")[:20].tolist() for query in ranked_queries[row["model"]]
        ]
        ranks = [
            songs_by_plays.index(song) + 1 if counts[song] else len(songs_by_plays) + 1
            for songs in lists
            for song in songs
        ]
        is_repeat = [
            song in query.past
            for query, songs in zip(ranked_queries[row["model"]], lists, strict=True)
            for song in songs
        ]
        assert row["lists"] == len(lists)
        assert row["coverage"] == pytest.approx(len({song for songs in lists for song in songs}) / NUM_SONGS)
        assert row["popularity_rank"] == pytest.approx(np.mean(ranks), abs=1e-4)
        assert row["repeats"] == pytest.approx(np.mean(is_repeat), abs=1e-5)


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
    twin_evaluator = Evaluator(
        [evaluator.recommenders[0], twin], split=SPLIT, song_plays=np.ones(NUM_SONGS), config=CONFIG
    )
    comparisons = statistics_of(twin_evaluator(histories), twin_evaluator, "taste")["comparisons"]
    # The twin has no long horizon.
    short_rows = [row for row in comparisons if not row["target"].endswith(LONG_TERM_ENDINGS)]
    assert [(row["difference"], row["low"], row["high"]) for row in short_rows] == [(0, 0, 0)] * 6
    assert statistics_of(twin_evaluator(histories), twin_evaluator, "nobody")["comparisons"] == []


def test_an_ablation_is_a_model_of_its_own_kind_that_the_default_is_compared_with(
    evaluator: Evaluator, histories: Histories
) -> None:
    ablation = PopularityRecommender(np.arange(NUM_SONGS))
    ablation.name, ablation.without = "without network", "network"
    models = [evaluator.recommenders[0], ablation]
    ablation_evaluator = Evaluator(models, split=SPLIT, song_plays=np.ones(NUM_SONGS), config=CONFIG)
    statistics = statistics_of(ablation_evaluator(histories), ablation_evaluator, "taste")
    assert {row["kind"] for row in statistics["results"] if row["model"] == "without network"} == {"ablation"}
    assert {row["kind"] for row in statistics["results"] if row["model"] == "taste"} == {"network"}
    assert {row["other"] for row in statistics["comparisons"]} == {"without network"}
