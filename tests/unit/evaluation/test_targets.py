"""Which songs are the targets of a query, and which queries have targets new to the user."""

from dataclasses import replace

import numpy as np
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import DAY_MS
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


class Both(ItemKnnRecommender):
    horizons = ("short", "long")


class InDays(Both):
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
    next_song, ten = _targets(histories, queries, "next"), _targets(histories, queries, "next10")
    assert next_song.songs.tolist() == [5, 6, 5, 7, 2]
    assert next_song.sizes.tolist() == [1] * 5
    assert list(zip(ten.rows.tolist(), ten.songs.tolist(), strict=True)) == [
        *((0, 5), (0, 6), (0, 7)),
        *((1, 5), (1, 6), (1, 7)),
        *((2, 5), (2, 7)),
        (3, 7),
        (4, 2),
    ]
    assert ten.sizes.tolist() == [3, 3, 2, 1, 1]


def test_the_long_term_is_offsets_25_to_50_of_those_who_play_so_long() -> None:
    histories = Histories.from_lists([np.arange(60), np.arange(25)], [range(60), range(25)])  # type: ignore[list-item]
    queries = Queries(rows=np.array([0, 0, 1]), seen=np.array([1, 30, 1]), at=np.zeros(3, int))
    found = _targets(histories, queries, "offsets25_50")
    assert found.songs[found.rows == 0].tolist() == list(range(25, 51))  # the next song, offset 1, is song 1
    assert found.songs[found.rows == 1].tolist() == list(range(54, 60))
    assert found.sizes.tolist() == [26, 6, 0]


def test_target_songs_equal_a_plain_loop() -> None:
    histories = random_histories(30, 9, longest=60, seed=3)
    queries, known = _all_queries(histories), np.arange(9) % 3 > 0
    for target, (first, last) in OFFSETS.items():
        found = _targets(histories, queries, target, known)
        for query in range(0, len(queries), 7):
            start = histories.offsets[queries.rows[query]] + queries.seen[query]
            end = histories.offsets[queries.rows[query] + 1]
            expected = set(histories.songs[start + first - 1 : min(end, start + last)].tolist())
            if target in SERVED_TARGETS:
                expected -= set(histories.songs[histories.offsets[queries.rows[query]] : start].tolist())
            if target in COLD_TARGETS:
                expected -= set(np.flatnonzero(known).tolist())
            assert sorted(expected) == sorted(found.songs[found.rows == query].tolist())
            assert found.sizes[query] == len(expected)


def test_targets_in_days_equal_a_plain_loop() -> None:
    histories = random_histories(30, 9, longest=60, seed=3)
    days = np.random.default_rng(0).choice([0, 1, 7, 9], size=histories.num_plays) * (DAY_MS // 7)
    histories = replace(histories, played_at=np.cumsum(days))
    queries = _all_queries(histories)
    for target, horizon in day_targets([InDays(1, 3), InDays(0, 7)]).items():
        found = target_songs(histories, queries, target, HeardSongs(histories), days=horizon)
        assert found.served is target.startswith("served")
        for query in range(0, len(queries), 7):
            begin, end = histories.offsets[queries.rows[query] :][:2].tolist()
            start = begin + int(queries.seen[query])
            passed = (histories.played_at[start:end] - histories.played_at[start]) / DAY_MS
            inside = (passed >= horizon.first_day) & (passed < horizon.last_day)
            expected = set(histories.songs[start:end][inside].tolist())
            expected -= set(histories.songs[begin:start].tolist()) if found.served else set()
            assert sorted(expected) == sorted(found.songs[found.rows == query].tolist())
            assert found.sizes[query] == len(expected)


def test_each_range_of_days_is_a_target_as_served_too_and_the_long_horizon_answers_it() -> None:
    models = [InDays(0, 28), InDays(0, 7), InDays(0, 7), ItemKnnRecommender(random_vectors(3))]
    targets = ["days0_7", "served_days0_7", "days0_28", "served_days0_28"]
    assert list(day_targets(models)) == targets
    assert {horizon_of(models[0], target) for target in targets} == {"long"}
    assert {horizon_of(models[-1], target) for target in targets} == {"short"}


def test_as_served_the_targets_are_songs_new_to_the_user_at_the_query() -> None:
    histories = Histories.from_lists([[9, 5, 9, 6, 5]], [range(5)])
    served = _targets(histories, _all_queries(histories), "served")
    assert served.served
    assert (served.rows.tolist(), served.songs.tolist()) == ([0, 2], [5, 6])  # the plays of 9 and 5 are repeats
    assert served.sizes.tolist() == [1, 0, 1, 0]
    long = Histories.from_lists([[0, *range(100, 130), 0, 7, 7]], [range(34)])
    later = _targets(long, Queries(rows=np.array([0]), seen=np.array([3]), at=np.zeros(1, int)), "served25_50")
    assert later.songs.tolist() == [7, 126, 127, 128, 129]  # without song 0, which the user had heard


def test_cold_targets_are_next_songs_new_to_the_user_that_no_fit_has_seen() -> None:
    histories = Histories.from_lists([[0, 1, 2, 1, 3, 9]], [range(6)])
    known = np.array([True, False, True, False])  # song 9 is newer than the fitted catalog
    queries = _all_queries(histories)
    for target in COLD_TARGETS:
        cold = _targets(histories, queries, target, known)
        assert (cold.rows.tolist(), cold.songs.tolist()) == ([0, 3, 4], [1, 3, 9])  # the second play of 1 is a repeat
        assert (cold.served, cold.among_cold) == (True, target == "cold_among_cold")


def test_plays_ahead_stay_within_the_history() -> None:
    histories = Histories.from_lists([[1, 2, 3], [4]], [range(3), range(1)])
    rows, plays = plays_ahead(histories, Queries.at_end(histories, 0), 1, 5)
    assert (len(rows), len(plays)) == (0, 0)


def test_a_song_is_heard_once_it_was_played_before_the_query() -> None:
    histories = Histories.from_lists([[1, 2, 1], [3, 1]], [range(3), range(2)])
    heard = HeardSongs(histories)
    rows, seen, songs = np.array([0, 0, 0, 1, 1, 0]), np.array([1, 2, 1, 1, 2, 3]), np.array([1, 2, 2, 1, 1, 99])
    assert heard(rows, seen, songs).tolist() == [True, True, False, False, True, False]
    nobody = HeardSongs(Histories.from_lists([], []))
    assert nobody(np.zeros(1, int), np.zeros(1, int), np.zeros(1, int)).tolist() == [False]


def test_the_long_horizon_answers_the_long_term_where_there_is_one() -> None:
    short: BaseRecommender = ItemKnnRecommender(random_vectors(3))
    both = Both(random_vectors(3))
    assert {horizon_of(short, target) for target in OFFSETS} == {"short"}
    assert [target for target in OFFSETS if horizon_of(both, target) == "long"] == ["offsets25_50", "served25_50"]
