"""Ranks and lists of an evaluation equal those that recommend serves; baselines are tuned on the validation range."""

import tracemalloc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.split import FitRange, Split
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig, HeardSongs, plays_to_predict, target_songs
from rayrec.evaluation.ranks import BASELINE_CHOICES, NOT_FOUND, Ranked, TuningMetric, rank_targets, tune_baseline
from rayrec.evaluation.results import Statistics
from rayrec.recommend.base import BaseRecommender, CandidateRecommender, HorizonName, ScoredCandidates
from rayrec.recommend.baselines import (
    AverageRecommender,
    PopularityRecommender,
    Selection,
    SequentialRulesRecommender,
    fit_baselines,
    make_selection,
)
from rayrec.storage.workspace import Workspace

ALL_IN_TEST = Split(id="s", dataset="d", validation_from=0, test_from=0)


def _ranked(recommender: BaseRecommender, histories: Histories, queries: Queries, known: np.ndarray) -> Ranked:
    heard_songs = HeardSongs(histories)
    names = ("served", "next", "next10", "cold_songs", "cold_among_cold")
    targets = {name: target_songs(histories, queries, name, heard_songs, known) for name in names}
    is_listed = np.arange(len(queries)) % 3 == 0
    return rank_targets(recommender, histories, queries, targets, known, depth=100, listed=is_listed)


def test_a_song_that_no_fit_has_seen_is_a_miss_however_well_it_scores() -> None:
    popularity = PopularityRecommender(np.array([0, 0, 0, 9]))
    histories = Histories.from_lists([[0, 3, 0, 7]], [[100, 101, 102, 103]])
    queries = Queries.before_plays(histories, np.array([1, 2, 3]))
    ranks = _ranked(popularity, histories, queries, np.array([True, True, True, False])).ranks
    assert ranks["next"].tolist() == [NOT_FOUND, 4, NOT_FOUND]  # song 7 is not even in the catalog
    assert ranks["next10"].tolist() == [
        4,
        NOT_FOUND,
        NOT_FOUND,
        4,
        NOT_FOUND,
        NOT_FOUND,
    ]  # ranks of the songs 0, 3, 7, then of 0, 7, then of 7


def test_ranks_and_lists_are_those_that_recommend_serves() -> None:
    histories = random_histories(20, 30, seed=8)
    rules = SequentialRulesRecommender.fit([histories], num_songs=30, allowed=FitRange(), rules_per_song=4)
    plays = plays_to_predict(histories, ALL_IN_TEST)
    queries = Queries.before_plays(histories, plays)
    for recommender in (AverageRecommender(random_vectors(30), 0.5), rules):
        ranked = _ranked(recommender, histories, queries, np.ones(30, bool))
        for query in range(0, len(queries), 21):
            row, plays_before = queries.rows[query], queries.plays_before[query]
            past = histories.take(np.array([row])).keep(np.arange(histories.lengths[row]) < plays_before)
            songs, scores = recommender.recommend_one(past, int(queries.at[query]), 30)
            target = histories.songs[plays[query]]
            target_score = scores[songs == target][0]
            assert ranked.ranks["next"][query] == (scores >= target_score).sum()
            listed_songs = ranked.listed_songs[ranked.listed_rows == query]
            assert sorted(listed_songs.tolist()) == sorted(songs[:20].tolist())
        assert set(ranked.listed_rows.tolist()) == set(range(0, len(queries), 3))


def test_chunks_of_queries_change_nothing(monkeypatch: object) -> None:
    histories = random_histories(20, 30, seed=8)
    recommender = AverageRecommender(random_vectors(30), 0.5)
    queries = Queries.before_plays(histories, plays_to_predict(histories, ALL_IN_TEST))
    full = _ranked(recommender, histories, queries, np.ones(30, bool))
    from rayrec.recommend import base as base

    monkeypatch.setattr(base, "SCORES_IN_CACHE", 30 * 7)  # type: ignore[attr-defined]
    monkeypatch.setattr(base, "QUERIES_PER_PASS", 1)  # type: ignore[attr-defined]
    chunked = _ranked(recommender, histories, queries, np.ones(30, bool))
    np.testing.assert_array_equal(chunked.listed_songs, full.listed_songs)
    np.testing.assert_array_equal(chunked.ranks["next10"], full.ranks["next10"])


class PlannedScores(BaseRecommender):
    """Gives every query the same scores."""

    name = "planned"

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores, dtype=np.float32)
        self.num_songs = len(scores)

    def score(self, histories: Histories, queries: Queries, horizon: HorizonName = "short") -> np.ndarray:
        return np.broadcast_to(self.scores, (len(queries), self.num_songs))


class PlannedCandidates(CandidateRecommender):
    """Proposes the songs with a score as candidates, in chunks of `queries_at_once` queries."""

    name = "planned-candidates"
    queries_at_once = 2
    retrievers = ("even", "small")

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores, dtype=np.float32)
        self.num_songs = len(scores)

    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        candidates = np.flatnonzero(~(self.scores == -np.inf))[::-1]  # in no order of songs
        for start in range(0, len(queries), self.queries_at_once):
            size = min(self.queries_at_once, len(queries) - start)
            scores = np.tile(self.scores[candidates], size)
            yield (
                slice(start, start + size),
                ScoredCandidates(
                    rows=np.repeat(np.arange(size), len(candidates)),
                    songs=np.tile(candidates, size),
                    scores=lambda horizon, exclude_heard, scores=scores: scores,
                    retrievers={
                        "even": np.flatnonzero(np.tile(candidates % 2 == 0, size)),
                        "small": np.flatnonzero(np.tile(candidates < 3, size)),
                    },
                ),
            )


INF, NAN = np.inf, np.nan


@pytest.mark.parametrize("kind", [PlannedScores, PlannedCandidates])
def test_as_served_songs_that_the_user_has_heard_are_not_in_the_ranking(kind: type[BaseRecommender]) -> None:
    recommender = kind([5, 4, 3, 3, 2, -INF])  # type: ignore[call-arg]
    # Queries for 3 (after 0), for 1 (after 0, 3), for 0 (a repeat), for 4 (after 0, 3, 1, 0), for 5.
    histories = Histories.from_lists([[0, 3, 1, 0, 4, 5]], [range(6)])
    queries = Queries.before_plays(histories, np.arange(1, 6))
    ranks = _ranked(recommender, histories, queries, np.ones(6, bool)).ranks
    assert ranks["next"].tolist() == [4, 2, 1, 5, NOT_FOUND]  # 3 ties with 2, and ties count against
    # The ranking leaves out 0, then 0 and 3, then 0, 3 and 1 (there song 2 ranks before 4).
    assert ranks["served"].tolist() == [3, 1, 2, NOT_FOUND]


@pytest.mark.parametrize("kind", [PlannedScores, PlannedCandidates])
def test_an_added_song_is_ranked_and_among_cold_songs_only_added_ones_count(
    kind: type[BaseRecommender],
) -> None:
    recommender = kind([0.0, 0.9, 0.8, 0.7, 0.6, 0.5, -INF])  # type: ignore[call-arg]
    recommender.added_songs = np.array([2, 4])  # 5 and 6 have no play either, and were not added
    histories = Histories.from_lists([[0, 4, 4], [0, 5], [2, 4]], [[1, 2, 3], [1, 2], [1, 2]])
    queries = Queries.before_plays(histories, np.array([1, 2, 4, 6]))
    known = np.array([True, True, False, True, False, False, False])
    ranks = _ranked(recommender, histories, queries, known).ranks
    assert ranks["next"].tolist() == [4, 4, NOT_FOUND, 4]
    assert ranks["cold_songs"].tolist() == [4, NOT_FOUND, 3]  # the third user has heard song 2
    assert ranks["cold_among_cold"].tolist() == [2, NOT_FOUND, 1]


def test_candidates_rank_like_the_same_scores_of_all_songs() -> None:
    histories = random_histories(20, 30, seed=8)
    queries = Queries.before_plays(histories, plays_to_predict(histories, ALL_IN_TEST))
    random = np.random.default_rng(0)
    scores = random.integers(0, 9, size=30).astype(float)
    scores[random.random(30) < 0.3] = -INF
    scores[3] = NAN
    dense, candidates = (
        _ranked(recommender, histories, queries, np.ones(30, bool))
        for recommender in (PlannedScores(scores.tolist()), PlannedCandidates(scores.tolist()))
    )
    for target in ("served", "next", "next10"):
        np.testing.assert_array_equal(candidates.ranks[target], dense.ranks[target])
        assert (dense.ranks[target] == NOT_FOUND).any()
    lists = [sorted(zip(ranked.listed_rows, ranked.listed_songs, strict=True)) for ranked in (dense, candidates)]
    assert lists[0] == lists[1]
    assert len(lists[0]) > 100
    np.testing.assert_array_equal(
        PlannedCandidates(scores.tolist()).score(histories, queries)[7], scores.astype(np.float32)
    )


@pytest.mark.parametrize("kind", [PlannedScores, PlannedCandidates])
def test_the_memory_of_ranks_does_not_grow_with_the_queries_times_the_plays_of_a_user(
    kind: type[BaseRecommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlannedCandidates, "queries_at_once", 200)
    num_plays, num_songs = 100_000, 150
    songs = np.random.default_rng(0).integers(0, 50, size=num_plays)
    songs[-200:] = np.arange(200) % 100 + 50  # new songs, which the user plays twice
    histories = Histories.from_lists([songs.tolist()], [range(num_plays)])
    queries = Queries.before_plays(histories, np.arange(num_plays - 200, num_plays))
    recommender = kind(np.random.default_rng(1).random(num_songs).tolist())  # type: ignore[call-arg]
    known, heard_songs = np.ones(num_songs, bool), HeardSongs(histories)

    def ranks_of(asked: Queries) -> dict[str, np.ndarray]:
        targets = {name: target_songs(histories, asked, name, heard_songs, known) for name in ("served", "next")}
        return rank_targets(recommender, histories, asked, targets, known, depth=150, heard_songs=heard_songs).ranks

    tracemalloc.start()
    ranks = ranks_of(queries)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000  # bytes; one number per query and play would be 80 MB
    assert len(ranks["served"]) == 100
    single_ranks = [ranks_of(queries.take(slice(row, row + 1))) for row in range(len(queries))]
    for name, values in ranks.items():
        np.testing.assert_array_equal(np.concatenate([single[name] for single in single_ranks]), values)


def test_a_candidate_without_a_number_is_never_found() -> None:
    histories = Histories.from_lists([[0, 1, 2]], [range(3)])
    queries = Queries.before_plays(histories, np.array([1, 2]))
    ranks = _ranked(PlannedCandidates([0, NAN, 1]), histories, queries, np.ones(3, bool)).ranks
    assert ranks["next"].tolist() == [NOT_FOUND, 1]


def test_recall_of_retrievers_is_the_share_of_targets_that_each_proposes() -> None:
    # Candidates are the songs 0 to 4; retriever "even" proposes 0, 2 and 4, retriever "small" 0, 1 and 2.
    recommender = PlannedCandidates([5, 4, 3, 2, 1, -INF])
    histories = Histories.from_lists([[0, 1, 3, 4, 5, 0]], [range(6)])
    config = EvaluateConfig(ks=(1,), bootstrap_samples=20, offsets=0)
    evaluator = Evaluator([recommender], split=ALL_IN_TEST, song_plays=np.ones(6), config=config)
    entries = Statistics(evaluator(histories), [recommender], config).retrieval(evaluator.retrievers)
    results = {(entry["target"], entry["retriever"]): (entry["value"], entry["candidates"]) for entry in entries}
    # The next plays are 1, 3, 4, 5 and 0; the next plays of songs new to the user are 1, 3, 4 and 5.
    assert results["next", "all"] == (4 / 5, 5)
    assert results["next", "even"] == (2 / 5, 3)
    assert results["next", "small"] == (2 / 5, 3)
    assert results["served", "all"] == (3 / 4, 5)
    assert results["served", "even"] == results["served", "small"] == (1 / 4, 3)


NUM_SONGS = 400
MINUTE = 60_000
VALIDATION, TEST, END = 100 * DAY_MS, 110 * DAY_MS, 120 * DAY_MS
SPLIT = Split(id="s", dataset="by-hand", validation_from=VALIDATION, test_from=TEST)


def _selection(workspace: Workspace, make_session: Callable[[np.random.Generator, int], list[int]]) -> Selection:
    """A selection on one session per user, on a day from 0 to 119; `make_session` returns the songs for a day."""
    random = np.random.default_rng(0)
    days = random.integers(0, 120, size=600)
    songs = [make_session(random, int(day)) for day in days]
    times = [day * DAY_MS + MINUTE * np.arange(len(session)) for day, session in zip(days, songs, strict=True)]
    histories = Histories.from_lists(songs, times, user_ids=[f"user-{row}" for row in range(600)])  # type: ignore[arg-type]
    selection = make_selection(write_dataset(workspace, histories, NUM_SONGS), SPLIT, None)
    assert selection is not None
    return selection


def _fortnight_session(random: np.random.Generator, day: int) -> list[int]:
    """One of the first ten songs, then the four songs that follow it in this fortnight only."""
    first = int(random.integers(10))
    return [first, *(10 + 39 * first + 4 * (day // 14) + random.permutation(4)).tolist()]


def test_sessions_are_tuned_to_fade_fast_if_the_next_songs_change_every_fortnight(workspace: Workspace) -> None:
    selection = _selection(workspace, _fortnight_session)
    settings = tune_baseline("vstan", selection)
    assert settings["days_decay"] <= 30
    metric = TuningMetric(selection)
    default_score, tuned_score = (
        metric(
            fit_baselines(["vstan"], selection.dataset, None, selection.allowed, settings={"vstan": vstan_settings})[0]
        )
        for vstan_settings in ({"days_decay": 1825.0}, settings)
    )
    assert tuned_score > default_score


def test_popularity_is_tuned_to_count_the_last_week_if_each_week_has_its_own_songs(workspace: Workspace) -> None:
    def weekly_session(random: np.random.Generator, day: int) -> list[int]:
        return (20 * (day // 7) + random.integers(0, 20, size=6)).tolist()

    assert tune_baseline("popularity-recent", _selection(workspace, weekly_session))["days"] <= 7


def test_rules_are_tuned_to_fade_fast_if_a_frequent_later_song_hides_the_next_one(workspace: Workspace) -> None:
    def session_with_repeats(random: np.random.Generator, day: int) -> list[int]:
        first = 3 * int(random.integers(20))
        return [first, first + 1, *[first + 2] * 7]

    # With weights 1/distance, the third song outweighs the second as a follower of the first: 1/2 + ... + 1/8 > 1.
    assert tune_baseline("sequential-rules", _selection(workspace, session_with_repeats)) == {"decay": 2.0}


def test_every_baseline_with_choices_is_tuned_on_plays_before_the_test_range(workspace: Workspace) -> None:
    selection = _selection(workspace, _fortnight_session)
    assert selection.histories.played_at.max() < TEST
    for name, choices in BASELINE_CHOICES.items():
        settings = tune_baseline(name, selection)
        assert choices.keys() <= settings.keys()
        (recommender,) = fit_baselines([name], selection.dataset, None, SPLIT.final, settings={name: settings})
        assert recommender.settings == settings
