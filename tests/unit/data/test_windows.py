"""Windows hold every input once, and any number of workers share the same batches."""

import numpy as np
import pytest
from worlds import random_histories

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER, Windows, batch_rows, cut_windows, epoch_units, worker_batches

WINDOW, LOOKAHEAD = 4, 3


@pytest.fixture(scope="module")
def histories() -> Histories:
    """Users of 0 to 30 plays; every song number is unique, so that plays can be told apart."""
    made = random_histories(40, 10, seed=5)
    return Histories(
        user_ids=made.user_ids,
        offsets=made.offsets,
        songs=np.arange(made.num_plays, dtype=np.int32),
        played_at=made.played_at,
        contexts=np.arange(made.num_plays, dtype=np.int32) * 2,
        skipped=np.arange(made.num_plays) % 3 == 0,
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
    found = sorted(song for window in inputs_of(windows) for song in window)
    last = histories.offsets[1:][histories.lengths > 0] - 1
    assert found == np.delete(histories.songs, last).tolist()
    assert windows.inputs.max() == WINDOW
    assert windows.inputs.min() >= 1


def test_targets_reach_into_the_lookahead_and_never_past_the_history(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    rows = histories.rows
    for begin, end, count in zip(windows.plays.offsets, windows.plays.offsets[1:], windows.inputs, strict=False):
        held = windows.plays.songs[begin:end]
        user = rows[held[0]]
        wanted = min(held[0] + count + LOOKAHEAD, histories.offsets[user + 1])
        assert held.tolist() == list(range(held[0], wanted))


def test_the_play_before_a_window_gives_its_time(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    first = windows.plays.songs[windows.plays.offsets[:-1]]
    starts = set(histories.offsets[:-1].tolist())
    expected = [NEVER if song in starts else histories.played_at[song - 1] for song in first.tolist()]
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
    histories = Histories.from_lists([[1] * n for n in lengths], [[5] * n for n in lengths])
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    assert len(windows) == 0
    assert list(worker_batches(windows, batch=4, rank=0, workers=2, rng=np.random.default_rng(0))) == []


@pytest.mark.parametrize("windows", [1, 2, 3, 16, 17, 31, 32, 33, 63, 64, 65, 130])
@pytest.mark.parametrize("workers", [2, 3, 5])
def test_workers_share_the_batches_of_one_worker_and_make_as_many_steps(windows: int, workers: int) -> None:
    lengths = np.random.default_rng(1).integers(2, 9, size=windows)
    songs = np.split(np.arange(lengths.sum()), np.cumsum(lengths)[:-1])
    cut = cut_windows(Histories.from_lists([list(part) for part in songs], [list(part) for part in songs]), 8, 1)

    def share(rank: int, of: int) -> list[Windows]:
        return list(worker_batches(cut, batch=16, rank=rank, workers=of, rng=np.random.default_rng(7)))

    alone, shares = share(0, 1), [share(rank, workers) for rank in range(workers)]
    assert {len(batches) for batches in shares} == {len(alone)} == {max(1, windows // 16)}
    for step, batch in enumerate(alone):
        together = [inputs for rank in range(workers) for inputs in inputs_of(shares[rank][step]) if inputs]
        assert sorted(together) == sorted(inputs_of(batch))
    assert sum(len(batch) for batch in alone) == windows


def test_a_worker_without_a_window_gets_one_of_the_batch_without_inputs(histories: Histories) -> None:
    cut = cut_windows(histories, WINDOW, LOOKAHEAD).take(np.arange(2))
    parts = [
        next(worker_batches(cut, batch=16, rank=rank, workers=3, rng=np.random.default_rng(0))) for rank in range(3)
    ]
    assert [part.inputs.min() > 0 for part in parts] == [True, True, False]
    assert parts[2].inputs.tolist() == [0]
    np.testing.assert_array_equal(parts[2].plays.songs, parts[0].plays.songs)


def test_a_batch_holds_windows_of_like_length() -> None:
    lengths = np.random.default_rng(1).permutation(np.repeat([3, 50, 100], 32))
    batches = batch_rows(lengths, 32, np.random.default_rng(0))
    assert sorted(set(lengths[rows].tolist()) == {lengths[rows[0]]} for rows in batches) == [True] * 3


def test_the_order_is_a_function_of_the_seed(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)

    def batches(seed: int) -> list[list[list[int]]]:
        rng = np.random.default_rng(seed)
        return [inputs_of(batch) for batch in worker_batches(windows, batch=8, rank=0, workers=1, rng=rng)]

    assert batches(3) == batches(3)
    assert batches(3) != batches(4)


def test_an_epoch_visits_every_bucket_once_in_an_order_of_its_own() -> None:
    first, again, second = (epoch_units(10, 3, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert first == again != second
    assert [len(unit) for unit in first] == [3, 3, 3, 1]
    for units in (first, second):
        assert sorted(bucket for unit in units for bucket in unit) == list(range(10))


def test_windows_survive_arrow(histories: Histories) -> None:
    windows = cut_windows(histories, WINDOW, LOOKAHEAD)
    back = Windows.from_arrow(windows.to_arrow().slice(5, 20))
    wanted = windows.take(np.arange(5, 25))
    assert inputs_of(back) == inputs_of(wanted)
    np.testing.assert_array_equal(back.previous_at, wanted.previous_at)
    np.testing.assert_array_equal(back.plays.played_at, wanted.plays.played_at)
    assert back.plays.skipped is not None
