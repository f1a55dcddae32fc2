"""Songs held out of every fit: a fit sees none of their plays, and the cuts of all other plays do not move."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, SplitConfig, make_split
from rayrec.embeddings.word2vec import without_held_out
from rayrec.errors import LeakError


def random_histories(*lengths: int, seed: int = 0) -> Histories:
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


@pytest.mark.parametrize("seed", [2**32 - 1, 2**32 + 7, 2**63 - 1])
def test_any_seed_that_a_split_takes_selects_held_out_songs(seed: int) -> None:
    split = make_split(SplitConfig(held_out_songs=0.1, seed=seed), dataset="d", first_play=0, last_play=10**12)
    assert 0.09 < (~split.final.allowed_songs(np.arange(20_000, dtype=np.int32))).mean() < 0.11


def test_no_play_of_a_held_out_song_is_left_for_a_fit_and_one_that_is_there_is_refused() -> None:
    allowed, histories = FitRange(before=30, held_out_songs=0.3), random_histories(40, 40)
    selected = allowed.select(histories)
    assert allowed.allowed_songs(selected.songs).all()
    expected = [
        song
        for song, moment in zip(histories.songs.tolist(), histories.played_at.tolist(), strict=True)
        if moment < 30 and allowed.allowed_songs(np.array([song]))[0]
    ]
    assert selected.songs.tolist() == expected
    allowed.require(selected)
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
    histories, split = random_histories(*lengths, seed=seed), make_split(config, dataset="d", first_play=0, last_play=0)
    is_kept = split.final.allowed_songs(histories.songs)
    selected = split.final.select(histories)
    expected = histories.keep(is_kept & ~split.is_test(histories))
    expected = expected.take(expected.lengths > 0)
    np.testing.assert_array_equal(selected.songs, expected.songs)
    # The dropped plays do not move the validation range.
    validation = histories.keep(is_kept & split.is_validation(histories)).songs
    np.testing.assert_array_equal(selected.songs[split.is_validation(selected)], validation)
    selection_plays = split.selection.select(histories)
    split.selection.require(selection_plays)
    np.testing.assert_array_equal(split.selection.select(selection_plays).songs, selection_plays.songs)
    np.testing.assert_array_equal(split.selection.select(selected).songs, selection_plays.songs)
    assert (np.diff(split.is_test(histories))[np.diff(histories.rows) == 0] >= 0).all()


def test_held_out_songs_are_in_the_test_range_from_its_start_on_and_not_before() -> None:
    split = make_split(SplitConfig(test_days=1, held_out_songs=0.5), dataset="d", first_play=0, last_play=10**10)
    songs = np.arange(40)
    histories = Histories.from_lists([songs, songs], [[10**9] * 40, [10**10] * 40])  # type: ignore[list-item]
    assert split.is_test(histories).tolist() == [False] * 40 + [True] * 40


def test_a_fit_range_is_not_within_one_with_other_held_out_songs() -> None:
    held_out, other = FitRange(held_out_songs=0.1), FitRange(held_out_songs=0.1, held_out_seed=1)
    assert held_out.is_within(FitRange())
    assert held_out.is_within(held_out)
    assert not held_out.is_within(other)
    assert not FitRange().is_within(held_out)


def test_playlists_lose_only_the_held_out_songs() -> None:
    allowed = FitRange(held_out_songs=0.4)
    songs, offsets = without_held_out((np.arange(30, dtype=np.int32), np.array([0, 10, 10, 30])), allowed)
    kept_songs = np.flatnonzero(allowed.allowed_songs(np.arange(30)))
    np.testing.assert_array_equal(songs, kept_songs)
    assert offsets.tolist() == [0, int((kept_songs < 10).sum()), int((kept_songs < 10).sum()), len(kept_songs)]
