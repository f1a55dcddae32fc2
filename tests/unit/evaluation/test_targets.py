"""Which songs are the targets of a query, and which queries have targets new to the user."""

from dataclasses import replace

import numpy as np
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.evaluation.protocol import (
    COLD_TARGETS,
    OFFSETS,
    SERVED_TARGETS,
    HeardSongs,
    TargetSongs,
    day_targets,
    horizon_of,
    plays_ahead,
    target_songs,
)
from rayrec.model.train_config import DaysHorizon
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import ItemKnnRecommender


class TwoHorizons(ItemKnnRecommender):
    horizons = ("short", "long")


class DaysRecommender(TwoHorizons):
    """A recommender whose long horizon covers the days from `first` to `last`."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(random_vectors(3))
        self.long_days = DaysHorizon(first_day=first, last_day=last)


def _targets(histories: Histories, queries: Queries, target: str, known: np.ndarray | None = None) -> TargetSongs:
    known = np.ones(200, dtype=bool) if known is None else known
    return target_songs(histories, queries, target, HeardSongs(histories), known)


def _all_queries(histories: Histories) -> Queries:
    return Queries.before_plays(histories, np.flatnonzero(histories.places > 0))


def test_target_songs_are_the_distinct_songs_at_the_offsets() -> None:
    histories = Histories.from_lists([[9, 5, 6, 5, 7], [1, 2]], [range(5), range(2)])
    queries = _all_queries(histories)
    next_targets, next10_targets = _targets(histories, queries, "next"), _targets(histories, queries, "next10")
    assert next_targets.songs.tolist() == [5, 6, 5, 7, 2]
    assert next_targets.sizes.tolist() == [1] * 5
    assert list(zip(next10_targets.rows.tolist(), next10_targets.songs.tolist(), strict=True)) == [
        *((0, 5), (0, 6), (0, 7)),
        *((1, 5), (1, 6), (1, 7)),
        *((2, 5), (2, 7)),
        (3, 7),
        (4, 2),
    ]
    assert next10_targets.sizes.tolist() == [3, 3, 2, 1, 1]


def test_the_long_term_is_offsets_25_to_50_of_those_who_play_so_long() -> None:
    histories = Histories.from_lists([np.arange(60), np.arange(25)], [range(60), range(25)])  # type: ignore[list-item]
    queries = Queries(rows=np.array([0, 0, 1]), plays_before=np.array([1, 30, 1]), at=np.zeros(3, int))
    targets = _targets(histories, queries, "offsets25_50")
    assert targets.songs[targets.rows == 0].tolist() == list(range(25, 51))  # the next song, offset 1, is song 1
    assert targets.songs[targets.rows == 1].tolist() == list(range(54, 60))
    assert targets.sizes.tolist() == [26, 6, 0]


def test_target_songs_equal_a_plain_loop() -> None:
    histories = random_histories(30, 9, longest=60, seed=3)
    queries, is_known = _all_queries(histories), np.arange(9) % 3 > 0
    for target, (first, last) in OFFSETS.items():
        targets = _targets(histories, queries, target, is_known)
        for query in range(0, len(queries), 7):
            start = histories.offsets[queries.rows[query]] + queries.plays_before[query]
            end = histories.offsets[queries.rows[query] + 1]
            expected = set(histories.songs[start + first - 1 : min(end, start + last)].tolist())
            if target in SERVED_TARGETS:
                expected -= set(histories.songs[histories.offsets[queries.rows[query]] : start].tolist())
            if target in COLD_TARGETS:
                expected -= set(np.flatnonzero(is_known).tolist())
            assert sorted(expected) == sorted(targets.songs[targets.rows == query].tolist())
            assert targets.sizes[query] == len(expected)


def test_targets_in_days_equal_a_plain_loop() -> None:
    histories = random_histories(30, 9, longest=60, seed=3)
    gaps = np.random.default_rng(0).choice([0, 1, 7, 9], size=histories.num_plays) * (DAY_MS // 7)
    histories = replace(histories, played_at=np.cumsum(gaps))
    queries = _all_queries(histories)
    for target, horizon in day_targets([DaysRecommender(1, 3), DaysRecommender(0, 7)]).items():
        targets = target_songs(histories, queries, target, HeardSongs(histories), days=horizon)
        assert targets.served is target.startswith("served")
        for query in range(0, len(queries), 7):
            user_start, end = histories.offsets[queries.rows[query] :][:2].tolist()
            start = user_start + int(queries.plays_before[query])
            days_passed = (histories.played_at[start:end] - histories.played_at[start]) / DAY_MS
            is_inside = (days_passed >= horizon.first_day) & (days_passed < horizon.last_day)
            expected = set(histories.songs[start:end][is_inside].tolist())
            expected -= set(histories.songs[user_start:start].tolist()) if targets.served else set()
            assert sorted(expected) == sorted(targets.songs[targets.rows == query].tolist())
            assert targets.sizes[query] == len(expected)


def test_each_range_of_days_is_a_target_as_served_too_and_the_long_horizon_answers_it() -> None:
    models = [
        DaysRecommender(0, 28),
        DaysRecommender(0, 7),
        DaysRecommender(0, 7),
        ItemKnnRecommender(random_vectors(3)),
    ]
    targets = ["days0_7", "served_days0_7", "days0_28", "served_days0_28"]
    assert list(day_targets(models)) == targets
    assert {horizon_of(models[0], target) for target in targets} == {"long"}
    assert {horizon_of(models[-1], target) for target in targets} == {"short"}


def test_as_served_the_targets_are_songs_new_to_the_user_at_the_query() -> None:
    histories = Histories.from_lists([[9, 5, 9, 6, 5]], [range(5)])
    targets = _targets(histories, _all_queries(histories), "served")
    assert targets.served
    assert (targets.rows.tolist(), targets.songs.tolist()) == ([0, 2], [5, 6])  # the plays of 9 and 5 are repeats
    assert targets.sizes.tolist() == [1, 0, 1, 0]
    long_history = Histories.from_lists([[0, *range(100, 130), 0, 7, 7]], [range(34)])
    later_targets = _targets(
        long_history, Queries(rows=np.array([0]), plays_before=np.array([3]), at=np.zeros(1, int)), "served25_50"
    )
    assert later_targets.songs.tolist() == [7, 126, 127, 128, 129]  # without song 0, which the user had heard


def test_cold_targets_are_next_songs_new_to_the_user_that_no_fit_has_seen() -> None:
    histories = Histories.from_lists([[0, 1, 2, 1, 3, 9]], [range(6)])
    is_known = np.array([True, False, True, False])  # song 9 is newer than the fitted catalog
    queries = _all_queries(histories)
    for target in COLD_TARGETS:
        targets = _targets(histories, queries, target, is_known)
        # The second play of 1 is a repeat.
        assert (targets.rows.tolist(), targets.songs.tolist()) == ([0, 3, 4], [1, 3, 9])
        assert (targets.served, targets.among_cold) == (True, target == "cold_among_cold")


def test_plays_ahead_stay_within_the_history() -> None:
    histories = Histories.from_lists([[1, 2, 3], [4]], [range(3), range(1)])
    rows, plays = plays_ahead(histories, Queries.at_end(histories, 0), 1, 5)
    assert (len(rows), len(plays)) == (0, 0)


def test_a_song_is_heard_once_it_was_played_before_the_query() -> None:
    histories = Histories.from_lists([[1, 2, 1], [3, 1]], [range(3), range(2)])
    heard_songs = HeardSongs(histories)
    rows, songs = np.array([0, 0, 0, 1, 1, 0]), np.array([1, 2, 2, 1, 1, 99])
    plays_before = np.array([1, 2, 1, 1, 2, 3])
    assert heard_songs(rows, plays_before, songs).tolist() == [True, True, False, False, True, False]
    no_heard_songs = HeardSongs(Histories.from_lists([], []))
    assert no_heard_songs(np.zeros(1, int), np.zeros(1, int), np.zeros(1, int)).tolist() == [False]


def test_the_long_horizon_answers_the_long_term_where_there_is_one() -> None:
    one_horizon: BaseRecommender = ItemKnnRecommender(random_vectors(3))
    two_horizons = TwoHorizons(random_vectors(3))
    assert {horizon_of(one_horizon, target) for target in OFFSETS} == {"short"}
    assert [target for target in OFFSETS if horizon_of(two_horizons, target) == "long"] == [
        "offsets25_50",
        "served25_50",
    ]
