"""The split in time: which plays a fit may see, and that it refuses all others."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.histories import Histories
from rayrec.data.moments import DAY_MS
from rayrec.data.split import (
    FitRange,
    Split,
    SplitConfig,
    describe_training_plays,
    fit_range,
    load_split,
    make_split,
    save_split,
)
from rayrec.errors import InputError, LeakError, NotFoundError
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

USERS = [f"user-{number}" for number in range(2_000)]


@pytest.fixture
def histories() -> Histories:
    return Histories.from_lists([[0, 1], [2], [3, 4]], [[10, 20], [20], [5, 6]], user_ids=["a", "b", "c"])


def test_a_fit_sees_the_plays_before_the_cut_only(histories: Histories) -> None:
    selected = FitRange(before=20).select(histories)
    assert selected.user_ids.tolist() == ["a", "c"]
    assert selected.songs.tolist() == [0, 3, 4]
    FitRange(before=20).require(selected)


def test_a_play_at_the_cut_is_refused(histories: Histories) -> None:
    with pytest.raises(LeakError, match=r"2 plays at or after its cut 20 .*report this bug"):
        FitRange(before=20).require(histories)
    FitRange(before=21).require(histories)


def test_a_held_out_user_is_refused() -> None:
    allowed = FitRange(held_out_share=0.5)
    plays = Histories.from_lists([[1]] * 20, [[1]] * 20, user_ids=USERS[:20])
    with pytest.raises(LeakError, match="held out"):
        allowed.require(plays)
    allowed.require(allowed.select(plays))


def test_without_a_split_everything_may_be_seen(histories: Histories) -> None:
    assert fit_range(None) == FitRange()
    FitRange().require(histories)
    assert FitRange().select(histories).num_plays == histories.num_plays


def test_the_share_of_held_out_users_is_about_right_and_the_seed_picks_others() -> None:
    users = np.array(USERS, dtype=object)
    first = FitRange(held_out_share=0.2, held_out_seed=1).allowed_users(users)
    second = FitRange(held_out_share=0.2, held_out_seed=2).allowed_users(users)
    assert 0.17 < (~first).mean() < 0.23
    assert (first != second).any()
    np.testing.assert_array_equal(first[::-1], FitRange(held_out_share=0.2, held_out_seed=1).allowed_users(users[::-1]))


def test_users_held_out_at_a_share_are_held_out_at_a_larger_one_too() -> None:
    users = np.array(USERS, dtype=object)
    allowed_at_10_percent, allowed_at_30_percent = (
        FitRange(held_out_share=share).allowed_users(users) for share in (0.1, 0.3)
    )
    assert not (allowed_at_30_percent & ~allowed_at_10_percent).any()


def test_train_validation_and_test_follow_each_other() -> None:
    split = make_split(SplitConfig(), dataset="d", first_play=0, last_play=100 * DAY_MS - 1)
    assert split.test_from == 70 * DAY_MS
    assert split.validation_from == 63 * DAY_MS
    assert split.selection.before == split.validation_from
    assert split.final.before == split.test_from
    assert split.held_out.before is None
    assert split.has_validation


def test_without_validation_days_there_is_no_validation_range() -> None:
    config = SplitConfig(validation_days=0)
    split = make_split(config, dataset="d", first_play=0, last_play=100 * DAY_MS)
    assert not split.has_validation
    assert split.selection == split.final


@given(last=st.integers(10**6, 10**13), days=st.floats(0, 50), validation=st.floats(0, 20))
def test_every_play_falls_in_one_range_and_the_last_into_test_where_there_are_test_days(
    last: int, days: float, validation: float
) -> None:
    config = SplitConfig(test_days=days, validation_days=validation)
    try:
        split = make_split(config, dataset="d", first_play=0, last_play=last)
    except InputError:
        assert last + 1 <= round(days * DAY_MS) + round(validation * DAY_MS)
        return
    assert 0 < split.validation_from <= split.test_from <= last + 1
    assert (split.test_from <= last) == (round(days * DAY_MS) > 0)


def test_a_split_that_leaves_nothing_is_refused_with_the_span() -> None:
    with pytest.raises(InputError, match=r"the plays span 10.0 days; use fewer --test-days or"):
        make_split(SplitConfig(), dataset="d", first_play=0, last_play=10 * DAY_MS)


@pytest.mark.parametrize("bad", [{"test_days": -1}, {"validation_days": -0.5}, {"held_out_users": 1.0}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected a number of at least 0"):
        SplitConfig(**bad)


def test_the_id_follows_config_and_data_set() -> None:
    def split_of(dataset: str, **settings: float) -> Split:
        return make_split(SplitConfig(**settings), dataset=dataset, first_play=0, last_play=10**11)

    assert split_of("d") == split_of("d")
    assert len({split_of("d").id, split_of("e").id, split_of("d", test_days=20).id, split_of("d", seed=3).id}) == 4


def test_a_split_is_stored_and_found_again(workspace: Workspace) -> None:
    split = make_split(SplitConfig(held_out_users=0.1, seed=4), dataset="d", first_play=0, last_play=10**11)
    save_split(workspace, split)
    assert load_split(workspace, split.id) == split
    for text in ("other", f"../splits/{split.id}", "a" * 300):
        with pytest.raises(NotFoundError, match=r"not found .*rayrec split"):
            load_split(workspace, text)


def test_a_range_is_within_another_where_the_other_covers_all_of_it() -> None:
    early, late = FitRange(before=10), FitRange(before=20)
    assert early.is_within(late)
    assert not late.is_within(early)
    assert late.is_within(FitRange())
    assert not FitRange().is_within(late)
    assert FitRange(share=0.5).is_within(FitRange(share=0.7))
    assert not FitRange(share=0.7).is_within(FitRange(share=0.5))
    held_out = FitRange(held_out_share=0.1, held_out_seed=1)
    assert not FitRange().is_within(held_out)
    assert held_out.is_within(held_out)
    assert not FitRange(held_out_share=0.1, held_out_seed=2).is_within(held_out)


def test_which_plays_an_artifact_was_trained_on_is_said_in_words(workspace: Workspace) -> None:
    cuts = {"validation_from": 10 * DAY_MS, "test_from": 20 * DAY_MS}
    for split in (
        Split(id="tested", dataset="d", **cuts),
        Split(id="all", dataset="d", has_test=False, **cuts),
        Split(id="parts", dataset="d", protocol="last-fraction", last_fraction=0.2, validation_fraction=0.1),
    ):
        save_split(workspace, split)

    def describe(kind: str, split: str = "", files: Sequence[str] = (), **config: bool) -> str:
        inputs, hashes = {"split": split} if split else {}, dict.fromkeys(files, "")
        return describe_training_plays(
            workspace, Manifest(kind=kind, id="x", config=config, inputs=inputs, files=hashes)
        )

    assert describe("models") == "all plays"
    assert describe("songs", "tested") == "all plays except the plays from 1970-01-21 on, UTC (split tested)"
    selection_files, expected = ["selection/model.safetensors"], "all plays except the plays from 1970-01-21 on"
    assert describe("models", "tested", selection_files, refit=False).startswith(
        "all plays except the plays from 1970-01-11 on"
    )
    assert describe("models", "tested", selection_files, refit=True).startswith(expected)
    assert describe("models", "tested", refit=False).startswith(expected)  # fitted on validation plays too
    assert (
        describe("rankers", "tested")
        == "the plays from 1970-01-11 up to but not including 1970-01-21, UTC (split tested)"
    )
    assert (
        describe("models", "all") == "all plays, with settings chosen on the plays from 1970-01-11 on, UTC (split all)"
    )
    assert describe("retrieval", "parts").startswith("all plays except the last 0.2 of each user's plays (weaker")
    assert describe("rankers", "parts") == "the last 0.1 of each user's plays before the last 0.2 (split parts)"
