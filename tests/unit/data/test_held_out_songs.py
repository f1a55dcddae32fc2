"""Songs held out of every fit: a fit sees none of their plays, and the cuts of all other plays do not move."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, SplitConfig, make_split
from rayrec.embeddings.word2vec import without_held_out
from rayrec.errors import LeakError


def plays(*lengths: int, seed: int = 0) -> Histories:
    random = np.random.default_rng(seed)
    return Histories.from_lists(
        [random.integers(0, 50, size=length) for length in lengths],  # type: ignore[misc]
        [list(range(length)) for length in lengths],
        user_ids=[f"u{row}" for row in range(len(lengths))],
    )


def test_the_share_of_held_out_songs_is_about_right_and_the_seed_picks_others() -> None:
    songs = np.arange(20_000, dtype=np.int32)
    first = FitRange(held_out_songs=0.1, held_out_seed=1).allowed_songs(songs)
    second = FitRange(held_out_songs=0.1, held_out_seed=2).allowed_songs(songs)
    assert 0.09 < (~first).mean() < 0.11
    assert 0.005 < (~first & ~second).mean() < 0.015
    np.testing.assert_array_equal(first[5:], FitRange(held_out_songs=0.1, held_out_seed=1).allowed_songs(songs[5:]))


def test_no_play_of_a_held_out_song_is_left_for_a_fit_and_one_that_is_there_is_refused() -> None:
    allowed, histories = FitRange(before=30, held_out_songs=0.3), plays(40, 40)
    seen = allowed.select(histories)
    assert allowed.allowed_songs(seen.songs).all()
    expected = [
        song
        for song, at in zip(histories.songs.tolist(), histories.played_at.tolist(), strict=True)
        if at < 30 and allowed.allowed_songs(np.array([song]))[0]
    ]
    assert seen.songs.tolist() == expected
    allowed.require(seen)
    with pytest.raises(LeakError, match="songs that are held out"):
        allowed.require(histories.before(30))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    last=st.floats(0.05, 0.6),
    share=st.floats(0, 0.9),
    seed=st.integers(0, 5),
)
def test_a_cut_of_each_users_plays_is_the_same_before_and_after_held_out_songs_are_dropped(
    lengths: list[int], last: float, share: float, seed: int
) -> None:
    config = SplitConfig(last_fraction=last, validation_fraction=0.2, held_out_songs=share, seed=seed)
    histories, split = plays(*lengths, seed=seed), make_split(config, dataset="d", first_play=0, last_play=0)
    kept = split.final.allowed_songs(histories.songs)
    seen = split.final.select(histories)
    whole = histories.keep(kept & ~split.is_test(histories))
    whole = whole.take(whole.lengths > 0)
    np.testing.assert_array_equal(seen.songs, whole.songs)
    # The dropped plays do not move the validation range.
    validation = histories.keep(kept & split.is_validation(histories)).songs
    np.testing.assert_array_equal(seen.songs[split.is_validation(seen)], validation)
    earlier = split.selection.select(histories)
    split.selection.require(earlier)
    np.testing.assert_array_equal(split.selection.select(earlier).songs, earlier.songs)
    np.testing.assert_array_equal(split.selection.select(seen).songs, earlier.songs)
    assert (np.diff(split.is_test(histories))[np.diff(histories.rows) == 0] >= 0).all()


def test_held_out_songs_are_neither_of_the_test_range_before_its_start_nor_left_out_of_it() -> None:
    split = make_split(SplitConfig(test_days=1, held_out_songs=0.5), dataset="d", first_play=0, last_play=10**10)
    songs = np.arange(40)
    histories = Histories.from_lists([songs, songs], [[10**9] * 40, [10**10] * 40])  # type: ignore[list-item]
    assert split.is_test(histories).tolist() == [False] * 40 + [True] * 40


def test_a_fit_without_the_held_out_songs_is_not_within_one_of_others() -> None:
    held_out, other = FitRange(held_out_songs=0.1), FitRange(held_out_songs=0.1, held_out_seed=1)
    assert held_out.is_within(FitRange())
    assert held_out.is_within(held_out)
    assert not held_out.is_within(other)
    assert not FitRange().is_within(held_out)


def test_playlists_lose_the_held_out_songs_alone() -> None:
    allowed = FitRange(held_out_songs=0.4)
    songs, offsets = without_held_out((np.arange(30, dtype=np.int32), np.array([0, 10, 10, 30])), allowed)
    kept = np.flatnonzero(allowed.allowed_songs(np.arange(30)))
    np.testing.assert_array_equal(songs, kept)
    assert offsets.tolist() == [0, int((kept < 10).sum()), int((kept < 10).sum()), len(kept)]
