"""Which split a command uses."""

import os

import pytest
from worlds import write_dataset

from rayrec.data import split as split_module
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.moments import DAY_MS
from rayrec.data.split import SplitConfig, choose_split, list_splits, split_dataset
from rayrec.errors import InputError, MismatchError, NotFoundError
from rayrec.storage.artifacts import DatasetManifest, Times, write_dataset_manifest
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace, split_file


def put_dataset(workspace: Workspace, dataset_id: str, times: Times = "real") -> None:
    write_dataset_manifest(
        workspace,
        DatasetManifest(
            id=dataset_id,
            source="csv",
            buckets=0,
            parts=1,
            users=1,
            plays=1,
            songs=1,
            last_play=100 * DAY_MS,
            times=times,
        ),
    )


@pytest.fixture
def filled(workspace: Workspace) -> Workspace:
    put_dataset(workspace, "data1")
    return workspace


def create_split(workspace: Workspace, test_days: float, moment: int) -> str:
    split = split_dataset(workspace, SplitConfig(test_days=test_days))
    os.utime(workspace.full(split_file(split.id)), (moment, moment))
    return split.id


def test_the_newest_split_of_the_data_set_is_the_default(filled: Workspace) -> None:
    older_id, newer_id = create_split(filled, 10, moment=100), create_split(filled, 20, moment=200)
    assert [split.id for split in list_splits(filled)] == [older_id, newer_id]
    default_split = choose_split(filled)
    assert default_split is not None
    assert default_split.id == newer_id
    assert default_split.test_from == 80 * DAY_MS + 1


def test_without_a_split_of_this_data_set_there_is_none(filled: Workspace) -> None:
    assert choose_split(filled) is None
    old_id = create_split(filled, 10, moment=100)
    put_dataset(filled, "data2")
    assert choose_split(filled) is None
    with pytest.raises(MismatchError, match=r"data1.*data2"):
        choose_split(filled, old_id)


def test_a_split_can_be_named_or_refused(filled: Workspace) -> None:
    older_id, _ = create_split(filled, 10, moment=100), create_split(filled, 20, moment=200)
    named_split = choose_split(filled, older_id)
    assert named_split is not None
    assert named_split.id == older_id
    assert choose_split(filled, no_split=True) is None


def test_the_split_requested_last_is_the_default_whatever_the_time_of_its_file(filled: Workspace) -> None:
    newer_id, older_id = create_split(filled, 10, moment=200), create_split(filled, 20, moment=100)
    default_split = choose_split(filled)
    assert default_split is not None
    assert default_split.id == older_id
    create_split(filled, 10, moment=200)
    default_split = choose_split(filled)
    assert default_split is not None
    assert default_split.id == newer_id


def test_naming_a_split_and_none_at_once_is_refused(filled: Workspace) -> None:
    with pytest.raises(InputError, match="--split a and --no-split cannot be combined"):
        choose_split(filled, "a", no_split=True)
    with pytest.raises(NotFoundError, match="'a'"):
        choose_split(filled, "a")


def test_data_without_times_is_cut_by_positions_only(workspace: Workspace) -> None:
    put_dataset(workspace, "data1", times="positions")
    with pytest.raises(InputError, match=r"has no times.*--last-fraction"):
        split_dataset(workspace, SplitConfig())
    split = split_dataset(workspace, SplitConfig(last_fraction=0.2))
    assert choose_split(workspace) == split


@pytest.mark.parametrize(("min_plays", "days"), [(30, 7), (120, 12), (121, 13), (10_000, 16)])
def test_the_validation_range_grows_until_it_holds_enough_plays_up_to_a_tenth_of_the_time(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, min_plays: int, days: int
) -> None:
    monkeypatch.setattr(split_module, "VALIDATION_PLAYS", min_plays)
    # Ten users with one play per day on 200 days. The last 30 days are for the test; 16 days are a tenth of the others.
    moments = [day * DAY_MS + DAY_MS // 2 for day in range(200)]
    write_dataset(workspace, Histories.from_lists([[1] * 200] * 10, [moments] * 10), num_songs=2)
    split = split_dataset(workspace, SplitConfig(test_days=30))
    assert split.test_from is not None
    assert split.validation_from is not None
    assert split.test_from - split.validation_from == days * DAY_MS
    assert split_dataset(workspace, SplitConfig(test_days=30, validation_days=days)) == split
    shorter_split = split_dataset(workspace, SplitConfig(test_days=30, validation_days=3))
    assert shorter_split.validation_from == split.test_from - 3 * DAY_MS


def test_an_old_data_set_without_the_field_times_has_real_times(workspace: Workspace) -> None:
    put_dataset(workspace, "data1")
    manifest = workspace.read_json(DATASET_MANIFEST)
    del manifest["times"]
    workspace.write_json(DATASET_MANIFEST, manifest)
    assert Dataset(workspace).manifest.times == "real"
