"""The split at a fraction of each user's plays: which plays are in which range, and that a fit refuses the others."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.histories import Histories, concatenate
from rayrec.data.split import FitRange, Split, SplitConfig, load_split, make_split, save_split
from rayrec.errors import InputError, LeakError
from rayrec.storage.workspace import Workspace, split_file


def sequences(*lengths: int) -> Histories:
    """Users u0, u1 ... whose i-th play is of song i at time i."""
    return Histories.from_lists(
        [list(range(length)) for length in lengths],
        [list(range(length)) for length in lengths],
        user_ids=[f"u{row}" for row in range(len(lengths))],
    )


def new_split(last: float = 0.2, validation: float = 0.1, **settings: float) -> Split:
    config = SplitConfig(last_fraction=last, validation_fraction=validation, **settings)
    return make_split(config, dataset="d", first_play=0, last_play=0)


def mask_by_user(histories: Histories, mask: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(mask.astype(int), histories.offsets[1:-1])]


def test_each_user_is_cut_by_their_own_number_of_plays() -> None:
    histories, split = sequences(10, 5, 3, 1), new_split()
    # Test begins at play floor(0.8 n + 1/2), validation at floor(0.7 n + 1/2): 8 and 7, 4 and 4, 2 and 2, 1 and 1.
    assert mask_by_user(histories, split.is_test(histories)) == [[0] * 8 + [1, 1], [0, 0, 0, 0, 1], [0, 0, 1], [0]]
    assert mask_by_user(histories, split.is_validation(histories)) == [[0] * 7 + [1, 0, 0], [0] * 5, [0] * 3, [0]]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    last=st.floats(0.01, 0.6),
    validation=st.floats(0, 0.39),
)
def test_train_validation_and_test_share_all_plays_between_them_in_order(
    lengths: list[int], last: float, validation: float
) -> None:
    histories, split = sequences(*lengths), new_split(last, validation)
    train = split.selection.covers(histories)
    stage = np.select([train, split.is_validation(histories), split.is_test(histories)], [0, 1, 2], default=9)
    assert stage.max(initial=0) <= 2
    assert (np.diff(stage)[np.diff(histories.rows) == 0] >= 0).all()
    test_counts = np.bincount(histories.rows[split.is_test(histories)], minlength=len(histories))
    assert (np.abs(test_counts - histories.lengths * last) <= 0.5 + 1e-6).all()


def test_selecting_twice_selects_the_same_and_the_ranges_nest() -> None:
    histories, split = sequences(10, 20, 1), new_split()
    selected = split.final.select(histories)
    assert selected.lengths.tolist() == [8, 16, 1]
    assert selected.totals is not None
    assert selected.totals.tolist() == [10, 20, 1]
    np.testing.assert_array_equal(split.final.select(selected).songs, selected.songs)
    assert split.selection.select(selected).lengths.tolist() == [7, 14, 1]
    assert mask_by_user(selected, split.is_validation(selected)) == [[0] * 7 + [1], [0] * 14 + [1, 1], [0]]


def test_the_total_number_of_plays_survives_joining_taking_and_storing() -> None:
    split = new_split()
    selected = concatenate([split.final.select(sequences(10)), split.final.select(sequences(4, 20))])
    restored = Histories.from_arrow(selected.take(np.array([2, 0])).to_arrow())
    assert restored.totals is not None
    assert restored.totals.tolist() == [20, 10]
    split.final.require(restored)
    with pytest.raises(LeakError):
        split.selection.require(restored)
    assert "total" not in sequences(3).to_arrow().column_names


def test_a_fit_refuses_plays_behind_the_cut() -> None:
    histories, split = sequences(10, 10), new_split()
    split.final.require(split.final.select(histories))
    with pytest.raises(LeakError, match=r"lacks the total number of plays per user.*report this bug"):
        split.final.require(histories)
    with pytest.raises(LeakError, match=r"2 plays at or after its cut 0.7 .of each user's plays"):
        split.selection.require(split.final.select(histories))
    FitRange(share=0.8).require(Histories.from_lists([], []))


def test_held_out_users_are_tested_and_never_fitted() -> None:
    histories = sequences(*[10] * 30)
    split = new_split(held_out_users=0.5)
    assert 0 < len(split.final.select(histories)) < 30
    assert split.is_test(histories).sum() == 60
    assert len(split.held_out.select(histories)) == len(split.final.select(histories))
    all_users = Histories.from_lists([[1]] * 30, [[1]] * 30)
    with pytest.raises(LeakError, match="held out"):
        split.final.require(Histories(**{**vars(all_users), "totals": np.full(30, 10)}))


def test_without_a_validation_fraction_there_is_no_validation_range() -> None:
    split, histories = new_split(validation=0), sequences(10)
    assert not split.has_validation
    assert split.selection == split.final
    assert not split.is_validation(histories).any()
    assert new_split().has_validation


def test_the_split_says_that_it_is_the_weaker_one_and_can_be_loaded(workspace: Workspace) -> None:
    split = new_split()
    assert "the last 0.2 of each user's plays (weaker than a split in time" in split.test_range
    assert split.figures() == {"protocol": "last-fraction", "last_fraction": 0.2, "validation_fraction": 0.1}
    save_split(workspace, split)
    assert load_split(workspace, split.id) == split


def test_a_split_stored_before_there_were_fractions_is_a_cut_in_time(workspace: Workspace) -> None:
    old_split = {"id": "old", "dataset": "d", "validation_from": 5, "test_from": 9}
    workspace.write_bytes(split_file("old"), json.dumps(old_split).encode())
    split = load_split(workspace, "old")
    assert (split.protocol, split.final.before, split.final.share) == ("time", 9, None)
    assert mask_by_user(sequences(12), split.is_test(sequences(12))) == [[0] * 9 + [1] * 3]
    assert split.test_range == "the plays from 1970-01-01 on, UTC"


def test_the_id_follows_the_settings_of_its_own_protocol() -> None:
    assert len({new_split().id, new_split(last=0.3).id, new_split(validation=0.2).id, new_split(seed=1).id}) == 4
    assert new_split(test_days=3).id == new_split().id
    time_configs = SplitConfig(test_days=1), SplitConfig(test_days=1, validation_fraction=0.3)
    assert len({make_split(config, dataset="d", first_play=0, last_play=10**11).id for config in time_configs}) == 1


@pytest.mark.parametrize("bad", [{"last_fraction": 1.0}, {"last_fraction": -0.1}, {"validation_fraction": 1.5}])
def test_fractions_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected a number of at least 0 and below 1"):
        SplitConfig(**bad)


def test_fractions_that_leave_no_play_to_train_on_are_refused() -> None:
    with pytest.raises(InputError, match=r"--last-fraction 0.6 and --validation-fraction 0.4 leave nothing to"):
        SplitConfig(last_fraction=0.6, validation_fraction=0.4)
