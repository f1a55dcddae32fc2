"""Ranges of songs joined in files: the artifact has the same bytes as one fit of all plays in memory."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from worlds import random_histories, with_opinions

from rayrec.data.histories import Histories
from rayrec.data.moments import DAY_MS
from rayrec.recommend import range_join
from rayrec.recommend.range_join import join_ranges
from rayrec.recommend.stored_retrieval import RECENT_DAYS, Retrieval, RetrievalCounts, pack_counts, unpack_counts
from rayrec.storage.workspace import Workspace

NUM_SONGS, NEWEST, RULES = 60, 4, 3
MINUTE = 60_000


def sample_histories() -> Histories:
    """Sessions of 300 users in 40 days, many with the same end; songs from 40 on are not played after day 35."""
    random = np.random.default_rng(5)
    histories = random_histories(300, NUM_SONGS, longest=60)
    days = random.integers(0, 40, size=len(histories))
    pauses = np.cumsum(random.random(histories.num_plays) < 0.2) * 60 * MINUTE
    pauses -= np.repeat(pauses[np.minimum(histories.offsets[:-1], histories.num_plays - 1)], histories.lengths)
    played_at = np.repeat(days * DAY_MS, histories.lengths) + pauses  # all plays of a session have the same time
    is_late = (played_at > 35 * DAY_MS) & (histories.songs >= 40)
    return with_opinions(replace(histories, played_at=np.where(is_late, played_at - 20 * DAY_MS, played_at)), NUM_SONGS)


def sorted_by_time(histories: Histories) -> Histories:
    """`histories` with the plays of each user ordered by time."""
    order = np.lexsort((histories.played_at, histories.rows))
    skipped = None if histories.skipped is None else histories.skipped[order]
    return replace(histories, songs=histories.songs[order], played_at=histories.played_at[order], skipped=skipped)


def file_bytes(counts: RetrievalCounts, folder: Path) -> dict[str, bytes]:
    """The contents of the artifact's files, by name."""
    workspace = Workspace(folder)
    artists = np.random.default_rng(0).integers(-1, 5, size=NUM_SONGS)
    names = Retrieval.build(counts, artist_of_song=artists).save(workspace, "retrieval")
    return {name: workspace.read_bytes(f"retrieval/{name}") for name in names}


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
@pytest.mark.parametrize("bounds", [[0, 60], [0, 1, 59, 60], [0, 7, 20, 40, 45, 60], list(range(61))])
@pytest.mark.parametrize("opinions", [False, True])
def test_any_ranges_and_any_order_of_merging_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, bounds: list[int], opinions: bool
) -> None:
    monkeypatch.setattr(range_join, "SESSIONS_AT_ONCE", at_once)
    histories = sorted_by_time(sample_histories())
    histories = histories if opinions else replace(histories, skipped=None)
    full = RetrievalCounts.fit(histories, num_songs=NUM_SONGS, newest=NEWEST)
    assert len(np.unique(full.sessions.ended_at)) < len(full.sessions) / 2
    assert np.ptp(full.plays.days) == RECENT_DAYS - 1
    random = np.random.default_rng(at_once)
    shard_of_user = random.integers(0, 5, size=len(histories))
    parts = [
        RetrievalCounts.fit(histories.take(shard_of_user == shard), num_songs=NUM_SONGS, newest=NEWEST)
        for shard in range(5)
    ]

    def merge_range(first: int, last: int) -> RetrievalCounts:
        range_parts = [parts[shard].of_songs(first, last) for shard in random.permutation(5)]
        first_two = RetrievalCounts.merge(range_parts[:2])
        merged = RetrievalCounts.merge([RetrievalCounts.merge(range_parts[2:]), first_two])
        return unpack_counts(pack_counts(merged.strongest(RULES)))

    (tmp_path / "joined").mkdir()
    joined = join_ranges((merge_range(first, last) for first, last in pairwise(bounds)), tmp_path / "joined")
    joined_files = file_bytes(joined, tmp_path / "ours")
    expected_files = file_bytes(full.strongest(RULES), tmp_path / "theirs")
    assert ("plays.skips.npy" in expected_files) == opinions
    assert joined_files.keys() == expected_files.keys()
    for name, content in expected_files.items():
        assert joined_files[name] == content, name


def test_songs_that_nobody_played_join_to_an_empty_retrieval(tmp_path: Path) -> None:
    empty_counts = RetrievalCounts.fit(Histories.from_lists([], []), num_songs=NUM_SONGS)
    (tmp_path / "joined").mkdir()
    joined = join_ranges((empty_counts.of_songs(first, first + 20) for first in (0, 20, 40)), tmp_path / "joined")
    assert file_bytes(joined, tmp_path / "ours") == file_bytes(empty_counts, tmp_path / "theirs")


def test_a_retrieval_that_plays_are_added_to_may_have_fewer_songs_than_there_are_ranges(tmp_path: Path) -> None:
    histories = sorted_by_time(sample_histories())
    even_users = histories.take(np.arange(len(histories)) % 2 == 0)
    earlier_histories = replace(even_users, songs=even_users.songs % 25)
    later_histories = histories.take(np.arange(len(histories)) % 2 == 1)
    earlier = RetrievalCounts.fit(earlier_histories, num_songs=25, newest=NEWEST)
    later = RetrievalCounts.fit(later_histories, num_songs=NUM_SONGS, newest=NEWEST)
    parts = (
        RetrievalCounts.merge([later.of_songs(first, last), earlier.of_songs(first, last)])
        for first, last in pairwise([0, 20, 30, 50, NUM_SONGS])
    )
    (tmp_path / "joined").mkdir()
    joined = join_ranges(parts, tmp_path / "joined")
    expected = RetrievalCounts.merge([earlier, later])
    assert file_bytes(joined, tmp_path / "ours") == file_bytes(expected, tmp_path / "theirs")
