"""Windows hold every input once, and a batch holds windows of similar length."""

import numpy as np
import pytest
from worlds import random_histories

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER, Windows, batch_rows, batches_in_memory, count_inputs, cut_windows

WINDOW, LOOKAHEAD = 4, 3


@pytest.fixture(scope="module")
def histories() -> Histories:
    """Users of 0 to 30 plays; every song number is unique, so that it identifies a play."""
    source = random_histories(40, 10, seed=5)
    return Histories(
        user_ids=source.user_ids,
        offsets=source.offsets,
        songs=np.arange(source.num_plays, dtype=np.int32),
        played_at=source.played_at,
        contexts=np.arange(source.num_plays, dtype=np.int32) * 2,
        skipped=np.arange(source.num_plays) % 3 == 0,
    )


def inputs_of(windows: Windows) -> list[list[int]]:
    """The songs of each window's input plays."""
    starts = windows.plays.offsets[:-1]
    return [
        windows.plays.songs[start : start + count].tolist() for start, count in zip(starts, windows.inputs, strict=True)
    ]


def test_a_history_by_hand_is_cut_where_it_should_be() -> None:
    history = Histories.from_lists([[0, 1, 2, 3, 4, 5]], [[10, 20, 30, 40, 50, 60]])
    windows = cut_windows(history, window=2, lookahead=1)
    assert inputs_of(windows) == [[0, 1], [2, 3], [4]]
    assert [songs.tolist() for songs in np.split(windows.plays.songs, windows.plays.offsets[1:-1])] == [
        [0, 1, 2],
        [2, 3, 4],
        [4, 5],
    ]
    assert windows.previous_at.tolist() == [NEVER, 20, 40]


def test_every_play_but_a_users_last_is_an_input_of_exactly_one_window(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    inputs = sorted(song for window in inputs_of(windows) for song in window)
    last_plays = histories.offsets[1:][histories.lengths > 0] - 1
    assert inputs == np.delete(histories.songs, last_plays).tolist()
    assert windows.inputs.max() == WINDOW
    assert windows.inputs.min() >= 1


def test_targets_reach_into_the_lookahead_and_never_past_the_history(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    rows = histories.rows
    for start, end, count in zip(windows.plays.offsets, windows.plays.offsets[1:], windows.inputs, strict=False):
        songs = windows.plays.songs[start:end]
        user = rows[songs[0]]
        expected_end = min(songs[0] + count + LOOKAHEAD, histories.offsets[user + 1])
        assert songs.tolist() == list(range(songs[0], expected_end))


def test_the_play_before_a_window_gives_its_time(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    first_songs = windows.plays.songs[windows.plays.offsets[:-1]]
    starts = set(histories.offsets[:-1].tolist())
    expected = [NEVER if song in starts else histories.played_at[song - 1] for song in first_songs.tolist()]
    assert windows.previous_at.tolist() == expected


def test_contexts_and_skips_stay_with_their_plays(histories: Histories) -> None:
    plays = cut_windows(histories, WINDOW, LOOKAHEAD).plays
    assert plays.contexts is not None
    assert plays.skipped is not None
    np.testing.assert_array_equal(plays.contexts, plays.songs * 2)
    np.testing.assert_array_equal(plays.skipped, plays.songs % 3 == 0)
    np.testing.assert_array_equal(plays.played_at, histories.played_at[plays.songs])


@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 1, 0]])
def test_histories_without_a_pair_of_plays_give_no_window(lengths: list[int]) -> None:
    histories = Histories.from_lists([[1] * length for length in lengths], [[5] * length for length in lengths])
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    assert len(windows) == 0
    assert count_inputs(histories.lengths, WINDOW).tolist() == []
    assert list(batches_in_memory(windows, 4, np.random.default_rng(0))) == []


def test_windows_are_counted_without_being_cut(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    assert count_inputs(histories.lengths, WINDOW).tolist() == windows.inputs.tolist()


@pytest.mark.parametrize("count", [1, 15, 16, 33, 130])
def test_every_window_is_in_one_batch_with_a_place_of_its_own(histories: Histories, count: int) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD).take(np.arange(count))
    batches = list(batches_in_memory(windows, 16, np.random.default_rng(7)))
    assert len(batches) == max(1, count // 16)
    assert all(batch.places.tolist() == list(range(len(batch))) for batch in batches)
    assert sorted(songs for batch in batches for songs in inputs_of(batch)) == sorted(inputs_of(windows))


def test_joined_windows_are_one_batch(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    joined = Windows.concatenate(
        [windows.take(np.arange(10)), Windows.concatenate([]), windows.take(np.arange(10, 30))]
    )
    assert inputs_of(joined) == inputs_of(windows)[:30]
    assert joined.previous_at.tolist() == windows.previous_at[:30].tolist()
    assert joined.places.tolist() == list(range(30))
    assert len(Windows.concatenate([])) == 0


def test_a_batch_holds_windows_of_similar_length() -> None:
    lengths = np.random.default_rng(1).permutation(np.repeat([3, 50, 100], 32))
    batches = batch_rows(lengths, 32, np.random.default_rng(0))
    assert sorted(set(lengths[rows].tolist()) == {lengths[rows[0]]} for rows in batches) == [True] * 3


def test_the_order_is_a_function_of_the_seed(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)

    def batches(seed: int) -> list[list[list[int]]]:
        rng = np.random.default_rng(seed)
        return [inputs_of(batch) for batch in batches_in_memory(windows, 8, rng)]

    assert batches(3) == batches(3)
    assert batches(3) != batches(4)


def test_windows_survive_arrow(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    restored = Windows.from_arrow(windows.to_arrow().slice(5, 20))
    expected = windows.take(np.arange(5, 25))
    assert inputs_of(restored) == inputs_of(expected)
    np.testing.assert_array_equal(restored.previous_at, expected.previous_at)
    np.testing.assert_array_equal(restored.plays.played_at, expected.plays.played_at)
    assert restored.plays.skipped is not None
