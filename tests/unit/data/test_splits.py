"""Which split a command uses."""

import os

import pytest
from worlds import write_dataset

from rayrec.data import split as split_module
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS, SplitConfig, choose_split, list_splits, split_dataset
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


def make(workspace: Workspace, test_days: float, moment: int) -> str:
    split = split_dataset(workspace, SplitConfig(test_days=test_days))
    os.utime(workspace.full(split_file(split.id)), (moment, moment))
    return split.id


def test_the_newest_split_of_the_data_set_is_the_default(filled: Workspace) -> None:
    older, newer = make(filled, 10, moment=100), make(filled, 20, moment=200)
    assert [split.id for split in list_splits(filled)] == [older, newer]
    chosen = choose_split(filled)
    assert chosen is not None
    assert chosen.id == newer
    assert chosen.test_from == 80 * DAY_MS + 1


def test_without_a_split_of_this_data_set_there_is_none(filled: Workspace) -> None:
    assert choose_split(filled) is None
    old = make(filled, 10, moment=100)
    put_dataset(filled, "data2")
    assert choose_split(filled) is None
    with pytest.raises(MismatchError, match=r"data1.*data2"):
        choose_split(filled, old)


def test_a_split_can_be_named_or_refused(filled: Workspace) -> None:
    older, _ = make(filled, 10, moment=100), make(filled, 20, moment=200)
    chosen = choose_split(filled, older)
    assert chosen is not None
    assert chosen.id == older
    assert choose_split(filled, no_split=True) is None


def test_the_split_requested_last_is_the_default_whatever_the_time_of_its_file(filled: Workspace) -> None:
    newer, older = make(filled, 10, moment=200), make(filled, 20, moment=100)
    chosen = choose_split(filled)
    assert chosen is not None
    assert chosen.id == older
    make(filled, 10, moment=200)
    chosen = choose_split(filled)
    assert chosen is not None
    assert chosen.id == newer


def test_naming_a_split_and_none_at_once_is_refused(filled: Workspace) -> None:
    with pytest.raises(InputError, match="--split a and --no-split cannot be combined"):
        choose_split(filled, "a", no_split=True)
    with pytest.raises(NotFoundError, match="'a'"):
        choose_split(filled, "a")


def test_data_without_times_is_cut_by_places_only(workspace: Workspace) -> None:
    put_dataset(workspace, "data1", times="positions")
    with pytest.raises(InputError, match=r"has no times.*--last-fraction"):
        split_dataset(workspace, SplitConfig())
    made = split_dataset(workspace, SplitConfig(last_fraction=0.2))
    assert choose_split(workspace) == made


@pytest.mark.parametrize(("wanted", "days"), [(30, 7), (120, 12), (121, 13), (10_000, 16)])
def test_the_validation_range_grows_until_it_holds_enough_plays_up_to_a_tenth_of_the_time(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, wanted: int, days: int
) -> None:
    monkeypatch.setattr(split_module, "VALIDATION_PLAYS", wanted)
    # Ten users with one play per day on 200 days. The last 30 days are for the test; 16 days are a tenth of the others.
    moments = [day * DAY_MS + DAY_MS // 2 for day in range(200)]
    write_dataset(workspace, Histories.from_lists([[1] * 200] * 10, [moments] * 10), num_songs=2)
    made = split_dataset(workspace, SplitConfig(test_days=30))
    assert made.test_from is not None
    assert made.validation_from is not None
    assert made.test_from - made.validation_from == days * DAY_MS
    assert split_dataset(workspace, SplitConfig(test_days=30, validation_days=days)) == made
    fewer = split_dataset(workspace, SplitConfig(test_days=30, validation_days=3))
    assert fewer.validation_from == made.test_from - 3 * DAY_MS


def test_a_data_set_of_before_there_were_positions_has_real_times(workspace: Workspace) -> None:
    put_dataset(workspace, "data1")
    stored = workspace.read_json(DATASET_MANIFEST)
    del stored["times"]
    workspace.write_json(DATASET_MANIFEST, stored)
    assert Dataset(workspace).manifest.times == "real"
