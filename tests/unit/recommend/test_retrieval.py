"""The data that retrievers look up: independent of buckets, with each song's newest sessions and exact counts."""

from dataclasses import fields, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import random_histories, with_opinions

from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS, FitRange
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


def _same(one: Any, other: Any) -> None:
    left, right = _arrays(one), _arrays(other)
    assert left.keys() == right.keys()
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)
        assert array.dtype == right[name].dtype, name


def _world(users: int = 90, seed: int = 0) -> Histories:
    histories = random_histories(users, NUM_SONGS, longest=60, seed=seed)
    pauses = np.random.default_rng(seed).random(histories.num_plays) < 0.15
    later = np.cumsum(pauses) * 2 * 3600_000  # some plays begin a session of their own
    later -= np.repeat(later[np.minimum(histories.offsets[:-1], histories.num_plays - 1)], histories.lengths)
    return with_opinions(replace(histories, played_at=histories.played_at + later), NUM_SONGS)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_any_number_of_shards_in_any_order_gives_the_same_arrays(shards: int) -> None:
    histories = _world()
    whole = RetrievalCounts.fit(histories, num_songs=NUM_SONGS, newest=5)
    rows = np.random.default_rng(shards).integers(0, shards, size=len(histories))
    parts = [
        RetrievalCounts.fit(histories.take(rows == shard), num_songs=NUM_SONGS, newest=5) for shard in range(shards)
    ]
    _same(RetrievalCounts.merge(parts), whole)
    _same(RetrievalCounts.merge(parts[::-1]), whole)


def test_merging_is_associative_and_commutative() -> None:
    parts = [RetrievalCounts.fit(_world(30, seed), num_songs=NUM_SONGS, newest=4) for seed in range(3)]
    expected = RetrievalCounts.merge(parts)
    for first, second, third in permutations(parts):
        _same(RetrievalCounts.merge([RetrievalCounts.merge([first, second]), third]), expected)
        _same(RetrievalCounts.merge([first, RetrievalCounts.merge([second, third])]), expected)


def test_parts_of_song_ranges_can_be_reduced_one_by_one(tmp_path: Path) -> None:
    histories = _world()
    buckets = [histories.take(np.arange(len(histories)) % 4 == bucket) for bucket in range(4)]
    counts = [RetrievalCounts.fit(bucket, num_songs=NUM_SONGS, newest=5) for bucket in buckets]
    reduced = [
        RetrievalCounts.merge([part.of_songs(first, last) for part in counts])
        for first, last in ((0, 20), (20, 21), (21, NUM_SONGS))
    ]
    _same(join_ranges(reduced, tmp_path), RetrievalCounts.fit(histories, num_songs=NUM_SONGS, newest=5))


def test_a_range_of_songs_that_came_after_the_counts_is_empty() -> None:
    whole = RetrievalCounts.fit(_world(), num_songs=NUM_SONGS)
    later = whole.of_songs(NUM_SONGS - 1, NUM_SONGS + 4)
    assert later.plays.plays.tolist() == [whole.plays.plays[-1], 0, 0, 0, 0]
    assert later.plays.first_days[1:].tolist() == [NOT_PLAYED] * 4
    assert later.sessions.song_offsets[1:].tolist() == [len(later.sessions)] * 5
    assert later.rules.offsets[1:].tolist() == [len(later.rules.followers)] * 5
    _same(RetrievalCounts.merge([later, later.of_songs(5, 5)]).plays, later.plays)


def test_a_part_of_a_grown_catalog_merges_into_the_last() -> None:
    old, new = _world(20, 1), _world(20, 2)
    merged = RetrievalCounts.merge(
        [RetrievalCounts.fit(old, num_songs=NUM_SONGS), RetrievalCounts.fit(new, num_songs=NUM_SONGS + 9)]
    )
    assert merged.plays.num_songs == merged.rules.num_songs == merged.sessions.num_songs == NUM_SONGS + 9
    np.testing.assert_array_equal(
        merged.plays.plays[:NUM_SONGS],
        np.bincount(old.songs, minlength=NUM_SONGS) + np.bincount(new.songs, minlength=NUM_SONGS),
    )


def test_each_song_keeps_its_newest_sessions() -> None:
    # Song 0 is in ten sessions, one per day, each with a second song that is in no other session.
    histories = Histories.from_lists(
        [[0, 1 + day] for day in range(10)],
        [[day * DAY_MS, day * DAY_MS + MINUTE] for day in range(10)],
    )
    sessions = SessionPostings.fit(histories, num_songs=11, newest=3)
    of_first = sessions.song_sessions[sessions.song_offsets[0] : sessions.song_offsets[1]]
    assert (sessions.ended_at[of_first] // DAY_MS).tolist() == [9, 8, 7]
    for song in range(1, 11):  # an old session stays if it is among the newest of its other song
        (session,) = sessions.song_sessions[sessions.song_offsets[song] : sessions.song_offsets[song + 1]]
        assert sessions.songs[sessions.offsets[session] : sessions.offsets[session + 1]].tolist() == [0, song]


def test_a_session_that_comes_twice_counts_once() -> None:
    part = SessionPostings.fit(_world(), num_songs=NUM_SONGS)
    _same(SessionPostings.merge([part, part]), part)


def test_rules_add_up_one_over_distance_and_keep_the_strongest() -> None:
    histories = Histories.from_lists([[1, 2, 3], [1, 2], [1, 3]], [[0, 1, 2], [0, 1], [0, 1]])
    rules = RuleCounts.fit(histories, num_songs=4)
    followers = slice(int(rules.offsets[1]), int(rules.offsets[2]))
    assert rules.followers[followers].tolist() == [2, 3]
    assert (rules.weights[followers] / DIRECT_WEIGHT).tolist() == [2.0, 1.5]
    best = rules.strongest(1)
    assert best.followers[best.offsets[1] : best.offsets[2]].tolist() == [2]


def test_only_the_last_weeks_count_as_of_late() -> None:
    histories = Histories.from_lists([[0, 1, 2]], [[0, 90 * DAY_MS, 100 * DAY_MS]])
    retrieval = Retrieval.fit([histories], num_songs=4)
    assert retrieval.recent_plays.tolist() == [0, 1, 1, 0]
    assert retrieval.popular.tolist() == [2, 0, 1]  # the last week first, then plays in all; song 3 was never played


def test_the_first_day_of_a_song_is_that_of_its_first_play_whatever_the_order_of_the_parts() -> None:
    day = DAY_MS
    parts = [
        Histories.from_lists([[0, 1]], [[5 * day, 9 * day]]),
        Histories.from_lists([[1, 0]], [[3 * day + 7, 8 * day]]),
    ]
    for some in (parts, parts[::-1]):
        first = Retrieval.fit(some, num_songs=3).plays.first_days
        assert first.tolist() == [5, 3, NOT_PLAYED]


def test_what_was_saved_opens_memory_mapped_and_equal(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    groups = np.random.default_rng(0).integers(-1, 5, size=NUM_SONGS)
    retrieval = Retrieval.fit([_world()], num_songs=NUM_SONGS, artist_of_song=groups)
    names = retrieval.save(workspace, "retrieval/one")
    assert sorted(f"retrieval/one/{name}" for name in names) == workspace.files("retrieval/one")
    loaded = Retrieval.load(workspace, "retrieval/one")
    _same(loaded, retrieval)
    assert isinstance(loaded.sessions.songs, np.memmap)
    assert loaded.artists
    assert not loaded.albums


def test_the_songs_of_an_artist_come_by_plays() -> None:
    histories = Histories.from_lists([[0, 1, 1, 2, 2, 2, 3]], [list(range(7))])
    retrieval = Retrieval.fit([histories], num_songs=4, artist_of_song=np.array([5, 5, -1, 5]))
    artists = retrieval.artists
    assert artists.songs[artists.offsets[5] : artists.offsets[6]].tolist() == [1, 0, 3]


def test_plays_after_the_cut_are_refused() -> None:
    histories = Histories.from_lists([[0, 1]], [[0, 2 * DAY_MS]])
    with pytest.raises(LeakError):
        Retrieval.fit([histories], num_songs=2, allowed=FitRange(before=DAY_MS))
