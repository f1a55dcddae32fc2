"""Counts of a range of songs as bytes: they are equal after unpacking, and their size grows with the range only."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from worlds import random_histories, with_opinions

from rayrec.recommend.range_join import join_ranges
from rayrec.recommend.stored_retrieval import RetrievalCounts, pack_counts, unpack_counts

NUM_SONGS = 50


def counts(num_songs: int = NUM_SONGS) -> RetrievalCounts:
    histories = with_opinions(random_histories(40, NUM_SONGS, seed=2), NUM_SONGS)
    return RetrievalCounts.fit(histories, num_songs=num_songs)


@pytest.mark.parametrize("bounds", [[0, 50], [0, 17, 50], [0, 1, 2, 49, 50]])
def test_the_pieces_of_all_ranges_join_to_the_whole(bounds: list[int], tmp_path: Path) -> None:
    full = counts()
    pieces = (unpack_counts(pack_counts(full.of_songs(first, last))) for first, last in pairwise(bounds))
    joined = join_ranges(pieces, tmp_path)
    for part in ("sessions", "rules", "plays"):
        actual, expected = getattr(joined, part), getattr(full, part)
        for name, value in vars(expected).items():
            np.testing.assert_array_equal(getattr(actual, name), value, err_msg=f"{part}.{name}")


def test_a_piece_does_not_grow_with_the_catalog() -> None:
    small_size, large_size = (len(pack_counts(counts(size).of_songs(5, 10))) for size in (NUM_SONGS, 1_000_000))
    assert large_size <= small_size + 100


def test_the_arrays_of_a_range_are_as_long_as_the_range() -> None:
    part = counts(1_000_000).of_songs(5, 10)
    assert part.sessions.num_songs == part.rules.num_songs == part.plays.num_songs == 5
    assert len(part.sessions.song_offsets) == len(part.rules.offsets) == 6
    assert len(part.plays.first_days) == 5
    assert part.plays.day_songs.max() < 5
