"""Counts of a range of songs as bytes: what comes back is what went in, and its size follows the range."""

from itertools import pairwise

import numpy as np
import pytest
from worlds import random_histories, with_opinions

from rayrec.recommend.stored_retrieval import RetrievalCounts, pack_counts, unpack_counts

NUM_SONGS = 50


def counts(num_songs: int = NUM_SONGS) -> RetrievalCounts:
    histories = with_opinions(random_histories(40, NUM_SONGS, seed=2), NUM_SONGS)
    return RetrievalCounts.fit(histories, num_songs=num_songs)


@pytest.mark.parametrize("bounds", [[0, 50], [0, 17, 50], [0, 1, 2, 49, 50]])
def test_the_pieces_of_all_ranges_merge_into_the_whole(bounds: list[int]) -> None:
    whole = counts()
    pieces = [unpack_counts(pack_counts(whole.of_songs(first, last), first, last)) for first, last in pairwise(bounds)]
    merged = RetrievalCounts.merge(pieces)
    for part in ("sessions", "rules", "plays"):
        ours, theirs = getattr(merged, part), getattr(whole, part)
        for name, value in vars(theirs).items():
            np.testing.assert_array_equal(getattr(ours, name), value, err_msg=f"{part}.{name}")


def test_a_piece_does_not_grow_with_the_catalog() -> None:
    small, large = (len(pack_counts(counts(size).of_songs(5, 10), 5, 10)) for size in (NUM_SONGS, 1_000_000))
    assert large <= small + 100
