"""The data that retrievers look up: independent of buckets, with each song's newest sessions and exact counts."""

from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rankings import retrieval_of
from worlds import random_histories, with_opinions

from rayrec.data.histories import Histories
from rayrec.data.moments import DAY_MS
from rayrec.data.split import FitRange
from rayrec.errors import LeakError
from rayrec.recommend.range_join import join_ranges
from rayrec.recommend.stored_retrieval import (
    DIRECT_WEIGHT,
    NOT_PLAYED,
    Retrieval,
    RetrievalCounts,
    RuleCounts,
    SessionPostings,
)
from rayrec.storage.workspace import Workspace

NUM_SONGS = 50
MINUTE = 60_000


def _arrays(value: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(value, np.ndarray):
        return {prefix: value}
    if not hasattr(value, "__dataclass_fields__"):
        return {prefix: np.array(value)}
    parts = [_arrays(getattr(value, field.name), f"{prefix}.{field.name}") for field in fields(value)]
    return {name: array for part in parts for name, array in part.items()}


def _assert_same(actual: Any, expected: Any) -> None:
    actual_arrays, expected_arrays = _arrays(actual), _arrays(expected)
    assert actual_arrays.keys() == expected_arrays.keys()
    for name, array in actual_arrays.items():
        np.testing.assert_array_equal(array, expected_arrays[name], err_msg=name)
        assert array.dtype == expected_arrays[name].dtype, name


def _histories(users: int = 90, seed: int = 0) -> Histories:
    histories = random_histories(users, NUM_SONGS, longest=60, seed=seed)
    has_pause = np.random.default_rng(seed).random(histories.num_plays) < 0.15
    delays = np.cumsum(has_pause) * 2 * 3600_000  # some plays begin a session of their own
    delays -= np.repeat(delays[np.minimum(histories.offsets[:-1], histories.num_plays - 1)], histories.lengths)
    return with_opinions(replace(histories, played_at=histories.played_at + delays), NUM_SONGS)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_any_number_of_shards_in_any_order_gives_the_same_arrays(shards: int) -> None:
    histories = _histories()
    full = RetrievalCounts.fit(histories, num_songs=NUM_SONGS, newest=5)
    shard_of_user = np.random.default_rng(shards).integers(0, shards, size=len(histories))
    parts = [
        RetrievalCounts.fit(histories.take(shard_of_user == shard), num_songs=NUM_SONGS, newest=5)
        for shard in range(shards)
    ]
    _assert_same(RetrievalCounts.merge(parts), full)
    _assert_same(RetrievalCounts.merge(parts[::-1]), full)


def test_merging_is_associative_and_commutative() -> None:
    parts = [RetrievalCounts.fit(_histories(30, seed), num_songs=NUM_SONGS, newest=4) for seed in range(3)]
    expected = RetrievalCounts.merge(parts)
    for first, second, third in permutations(parts):
        _assert_same(RetrievalCounts.merge([RetrievalCounts.merge([first, second]), third]), expected)
        _assert_same(RetrievalCounts.merge([first, RetrievalCounts.merge([second, third])]), expected)


def test_parts_of_song_ranges_can_be_reduced_one_by_one(tmp_path: Path) -> None:
    histories = _histories()
    buckets = [histories.take(np.arange(len(histories)) % 4 == bucket) for bucket in range(4)]
    counts = [RetrievalCounts.fit(bucket, num_songs=NUM_SONGS, newest=5) for bucket in buckets]
    range_counts = [
        RetrievalCounts.merge([part.of_songs(first, last) for part in counts])
        for first, last in ((0, 20), (20, 21), (21, NUM_SONGS))
    ]
    _assert_same(join_ranges(range_counts, tmp_path), RetrievalCounts.fit(histories, num_songs=NUM_SONGS, newest=5))


def test_a_range_of_songs_that_came_after_the_counts_is_empty() -> None:
    full = RetrievalCounts.fit(_histories(), num_songs=NUM_SONGS)
    range_counts = full.of_songs(NUM_SONGS - 1, NUM_SONGS + 4)
    assert range_counts.plays.plays.tolist() == [full.plays.plays[-1], 0, 0, 0, 0]
    assert range_counts.plays.first_days[1:].tolist() == [NOT_PLAYED] * 4
    assert range_counts.sessions.song_offsets[1:].tolist() == [len(range_counts.sessions)] * 5
    assert range_counts.rules.offsets[1:].tolist() == [len(range_counts.rules.followers)] * 5
    _assert_same(RetrievalCounts.merge([range_counts, range_counts.of_songs(5, 5)]).plays, range_counts.plays)


def test_counts_of_a_catalog_before_and_after_it_grew_can_be_merged() -> None:
    old_histories, new_histories = _histories(20, 1), _histories(20, 2)
    merged = RetrievalCounts.merge(
        [
            RetrievalCounts.fit(old_histories, num_songs=NUM_SONGS),
            RetrievalCounts.fit(new_histories, num_songs=NUM_SONGS + 9),
        ]
    )
    assert merged.plays.num_songs == merged.rules.num_songs == merged.sessions.num_songs == NUM_SONGS + 9
    np.testing.assert_array_equal(
        merged.plays.plays[:NUM_SONGS],
        np.bincount(old_histories.songs, minlength=NUM_SONGS) + np.bincount(new_histories.songs, minlength=NUM_SONGS),
    )


def test_each_song_keeps_its_newest_sessions() -> None:
    # Song 0 is in ten sessions, one per day, each with a second song that is in no other session.
    histories = Histories.from_lists(
        [[0, 1 + day] for day in range(10)],
        [[day * DAY_MS, day * DAY_MS + MINUTE] for day in range(10)],
    )
    sessions = SessionPostings.fit(histories, num_songs=11, newest=3)
    first_song_sessions = sessions.song_sessions[sessions.song_offsets[0] : sessions.song_offsets[1]]
    assert (sessions.ended_at[first_song_sessions] // DAY_MS).tolist() == [9, 8, 7]
    for song in range(1, 11):  # an old session stays if it is among the newest of its other song
        (session,) = sessions.song_sessions[sessions.song_offsets[song] : sessions.song_offsets[song + 1]]
        assert sessions.songs[sessions.offsets[session] : sessions.offsets[session + 1]].tolist() == [0, song]


def test_a_session_that_comes_twice_counts_once() -> None:
    part = SessionPostings.fit(_histories(), num_songs=NUM_SONGS)
    _assert_same(SessionPostings.merge([part, part]), part)


def test_rules_add_up_one_over_distance_and_keep_the_strongest() -> None:
    histories = Histories.from_lists([[1, 2, 3], [1, 2], [1, 3]], [[0, 1, 2], [0, 1], [0, 1]])
    rules = RuleCounts.fit(histories, num_songs=4)
    followers = slice(int(rules.offsets[1]), int(rules.offsets[2]))
    assert rules.followers[followers].tolist() == [2, 3]
    assert (rules.weights[followers] / DIRECT_WEIGHT).tolist() == [2.0, 1.5]
    strongest = rules.strongest(1)
    assert strongest.followers[strongest.offsets[1] : strongest.offsets[2]].tolist() == [2]


def test_only_the_last_weeks_count_as_recent() -> None:
    histories = Histories.from_lists([[0, 1, 2]], [[0, 90 * DAY_MS, 100 * DAY_MS]])
    retrieval = retrieval_of([histories], num_songs=4)
    assert retrieval.recent_plays.tolist() == [0, 1, 1, 0]
    assert retrieval.popular.tolist() == [2, 0, 1]  # the last week first, then plays in all; song 3 was never played


def test_the_first_day_of_a_song_is_that_of_its_first_play_whatever_the_order_of_the_parts() -> None:
    day = DAY_MS
    parts = [
        Histories.from_lists([[0, 1]], [[5 * day, 9 * day]]),
        Histories.from_lists([[1, 0]], [[3 * day + 7, 8 * day]]),
    ]
    for ordered_parts in (parts, parts[::-1]):
        first_days = retrieval_of(ordered_parts, num_songs=3).plays.first_days
        assert first_days.tolist() == [5, 3, NOT_PLAYED]


def test_a_saved_retrieval_loads_memory_mapped_and_equal(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    artists = np.random.default_rng(0).integers(-1, 5, size=NUM_SONGS)
    retrieval = retrieval_of([_histories()], num_songs=NUM_SONGS, artist_of_song=artists)
    file_names = retrieval.save(workspace, "retrieval/one")
    assert sorted(f"retrieval/one/{name}" for name in file_names) == workspace.files("retrieval/one")
    loaded = Retrieval.load(workspace, "retrieval/one")
    _assert_same(loaded, retrieval)
    assert isinstance(loaded.sessions.songs, np.memmap)
    assert loaded.artists
    assert not loaded.albums


def test_the_songs_of_an_artist_are_ordered_by_plays() -> None:
    histories = Histories.from_lists([[0, 1, 1, 2, 2, 2, 3]], [list(range(7))])
    retrieval = retrieval_of([histories], num_songs=4, artist_of_song=np.array([5, 5, -1, 5]))
    artists = retrieval.artists
    assert artists.songs[artists.offsets[5] : artists.offsets[6]].tolist() == [1, 0, 3]


def test_a_song_without_a_play_has_an_artist_that_does_not_list_it_until_it_is_played() -> None:
    artist_of_song = np.array([0, 0, 0, 0])
    histories = Histories.from_lists([[0, 1, 1, 2]], [list(range(4))])
    counts = RetrievalCounts.fit(histories, num_songs=4)
    artists = Retrieval.build(counts, artist_of_song=artist_of_song).artists
    assert (artists.songs.tolist(), artists.of_song[3]) == ([1, 0, 2], 0)
    later_histories = Histories.from_lists([[3, 3, 3]], [list(range(3))], user_ids=["later"])
    counts = RetrievalCounts.merge([counts, RetrievalCounts.fit(later_histories, num_songs=4)])
    assert Retrieval.build(counts, artist_of_song=artist_of_song).artists.songs.tolist() == [3, 1, 0, 2]


def test_plays_after_the_cut_are_refused() -> None:
    histories = Histories.from_lists([[0, 1]], [[0, 2 * DAY_MS]])
    with pytest.raises(LeakError):
        retrieval_of([histories], num_songs=2, allowed=FitRange(before=DAY_MS))
