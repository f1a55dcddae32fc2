"""Releases: parts that belong together, one id, activation and rollback, and finding damage."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from local_import import in_this_process

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, save_split
from rayrec.errors import DamagedArtifactError, InputError, MismatchError, NotFoundError
from rayrec.importing.descriptions import DescribeConfig, add_described_songs, describe
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.import_data import append_plays, import_data
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import DatasetManifest, Manifest, publish, write_dataset_manifest
from rayrec.storage.workspace import DATASET_MANIFEST, SONGS_TABLE, Workspace, earlier_manifest, histories_file

HISTORIES_FILE = histories_file(0, 0)
SERVED_KINDS = ("models", "indexes")  # kinds of parts that a replica loads


def put_dataset(workspace: Workspace, dataset_id: str = "data1") -> None:
    for path in (SONGS_TABLE, HISTORIES_FILE):
        workspace.write_bytes(path, path.encode())
    files = {path.removeprefix("dataset/"): artifacts.sha256(workspace, path) for path in (SONGS_TABLE, HISTORIES_FILE)}
    write_dataset_manifest(
        workspace,
        DatasetManifest(id=dataset_id, source="csv", buckets=1, parts=1, users=1, plays=1, songs=1, files=files),
    )


def put(workspace: Workspace, kind: str, part_id: str, **inputs: str) -> Manifest:
    manifest = Manifest(kind=kind, id=part_id, inputs=inputs)
    workspace.write_bytes(manifest.path("payload"), f"{kind} {part_id}".encode())
    return publish(workspace, manifest, ["payload"])


def put_model(workspace: Workspace, number: int, dataset: str = "data1") -> None:
    """Write song embeddings, a model, its taste vectors and its index, with ids that end in `number`."""
    put(workspace, "songs", f"songs{number}", dataset=dataset)
    put(workspace, "models", f"model{number}", dataset=dataset, songs=f"songs{number}", split="split1")
    put(workspace, "tastes", f"tastes{number}", dataset=dataset, models=f"model{number}")
    put(workspace, "indexes", f"index{number}", models=f"model{number}")


@pytest.fixture
def full(workspace: Workspace) -> Workspace:
    """A workspace with one of everything that a release needs."""
    put_dataset(workspace)
    save_split(workspace, Split(id="split1", dataset="data1", validation_from=1, test_from=2))
    put_model(workspace, 1)
    return workspace


def test_a_release_names_all_its_parts_and_goes_live(full: Workspace) -> None:
    release = releases.create_release(full)
    assert release.inputs == {
        "dataset": "data1",
        "split": "split1",
        "songs": "songs1",
        "models": "model1",
        "tastes": "tastes1",
        "indexes": "index1",
    }
    assert releases.active_release(full) == release
    assert releases.list_releases(full) == [release]


def test_the_same_parts_make_the_same_release_and_keep_the_history_short(full: Workspace) -> None:
    first = releases.create_release(full)
    assert releases.create_release(full).id == first.id
    with pytest.raises(InputError, match="No earlier release to roll back to"):
        releases.rollback(full)


def test_the_current_model_is_taken_and_no_older_one_in_the_place_of_its_missing_parts(full: Workspace) -> None:
    put_model(full, 2)
    put(full, "models", "model3", dataset="data1", songs="songs2")
    with pytest.raises(NotFoundError, match="model model3 has no taste vectors; run `rayrec taste --model model3`"):
        releases.create_release(full)
    artifacts.make_current(full, "models", "model2")
    release = releases.create_release(full)
    assert (release.inputs["models"], release.inputs["indexes"]) == ("model2", "index2")


def test_naming_an_index_brings_its_model(full: Workspace) -> None:
    put_model(full, 2)
    assert releases.create_release(full, index_id="index1").inputs["models"] == "model1"


@pytest.mark.parametrize("named", [{"tastes_id": "tastes2"}, {"index_id": "index2"}])
def test_parts_of_another_model_are_refused_by_both_names(full: Workspace, named: dict[str, str]) -> None:
    put_model(full, 2)
    with pytest.raises(MismatchError, match=r"model2.*model1"):
        releases.create_release(full, model_id="model1", **named)


def test_tastes_and_index_of_two_models_are_refused(full: Workspace) -> None:
    put_model(full, 2)
    with pytest.raises(MismatchError, match="model"):
        releases.create_release(full, tastes_id="tastes1", index_id="index2")


def test_a_model_of_another_data_set_is_refused_by_both_names(full: Workspace) -> None:
    put_dataset(full, "data2")
    with pytest.raises(MismatchError, match=r"data1.*data2"):
        releases.create_release(full, model_id="model1")
    with pytest.raises(NotFoundError, match="Data set data2 has no model"):
        releases.create_release(full)


def test_a_missing_part_says_which_command_makes_it(full: Workspace) -> None:
    put(full, "models", "model9", dataset="data1", songs="songs1")
    with pytest.raises(NotFoundError, match="rayrec taste --model model9"):
        releases.create_release(full, model_id="model9")
    artifacts.make_current(full, "models", "model1")
    full.delete("indexes")
    with pytest.raises(NotFoundError, match="rayrec index --model model1"):
        releases.create_release(full)


def test_rollback_returns_step_by_step_to_what_was_live_before(full: Workspace) -> None:
    live_releases = [releases.create_release(full)]
    for number in (2, 3):
        put_model(full, number)
        live_releases.append(releases.create_release(full))
    assert releases.rollback(full).id == live_releases[1].id
    assert releases.rollback(full).id == live_releases[0].id
    assert releases.active_release(full) == live_releases[0]
    with pytest.raises(InputError, match="No earlier release to roll back to"):
        releases.rollback(full)


def test_a_release_counts_as_rolled_back_until_it_is_activated_by_name(full: Workspace) -> None:
    first = releases.create_release(full)
    put_model(full, 2)
    second = releases.create_release(full)
    releases.rollback(full)
    assert releases.read_active(full)["rolled_back"] == [second.id]
    releases.activate_release(full, first.id)
    assert releases.read_active(full)["rolled_back"] == [second.id]
    releases.activate_release(full, second.id)
    assert releases.read_active(full)["rolled_back"] == []


def test_a_release_whose_data_set_was_replaced_does_not_go_live_again(full: Workspace) -> None:
    first = releases.create_release(full)
    put_dataset(full, "data2")
    put_model(full, 2, dataset="data2")
    second = releases.create_release(full)
    message = "release .* was made from data set data1, which data set data2 has replaced; .* `rayrec fit`"
    with pytest.raises(MismatchError, match=message):
        releases.rollback(full)
    with pytest.raises(MismatchError, match=message):
        releases.activate_release(full, first.id)
    state = releases.read_active(full)
    assert (state["active"], state["history"]) == (second.id, [first.id])


def test_a_release_can_be_made_without_going_live(full: Workspace) -> None:
    release = releases.create_release(full, activate=False)
    assert releases.active_release(full) is None
    releases.activate_release(full, release.id)
    assert releases.active_release(full) == release


def test_an_unknown_release_cannot_be_activated(full: Workspace) -> None:
    releases.create_release(full)
    with pytest.raises(NotFoundError, match="nope"):
        releases.activate_release(full, "nope")


@pytest.mark.parametrize("text", ["{}/", "../releases/{}", "./{}", "{}/../{}", "", "..", "active", "a" * 300])
def test_a_path_or_a_text_too_long_is_no_id_of_an_artifact(full: Workspace, text: str) -> None:
    release = releases.create_release(full, activate=False)
    with pytest.raises(NotFoundError, match=f"not found in workspace .*; existing: {release.id}"):
        releases.activate_release(full, text.format(release.id, release.id))
    assert releases.active_release(full) is None


def test_an_untouched_release_verifies(full: Workspace) -> None:
    releases.verify_release(full, releases.create_release(full))


def change(workspace: Workspace, path: str) -> None:
    """Change a file by a byte, the manifest of the data set in a field."""
    content = workspace.read_bytes(path)
    is_manifest = path == DATASET_MANIFEST
    workspace.write_bytes(path, content.replace(b'"buckets": 1', b'"buckets": 3') if is_manifest else content + b" ")
    assert workspace.read_bytes(path) != content


@pytest.mark.parametrize(
    "path",
    [
        SONGS_TABLE,
        HISTORIES_FILE,
        "dataset/dataset.json",
        "splits/split1.json",
        "models/model1/payload",
        "models/model1/manifest.json",
        "indexes/index1/payload",
        "tastes/tastes1/payload",
        "songs/songs1/payload",
    ],
)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_damage_to_any_part_is_found(full: Workspace, path: str, damage: str) -> None:
    release = releases.create_release(full)
    if damage == "changed":
        change(full, path)
    else:
        full.delete(path)
    with pytest.raises((DamagedArtifactError, NotFoundError), match=path.split("/")[1]):
        releases.verify_release(full, release)


@pytest.mark.parametrize(
    ("path", "is_checked"),
    [
        (SONGS_TABLE, True),
        ("dataset/dataset.json", True),
        ("models/model1/payload", True),
        ("indexes/index1/payload", True),
        ("tastes/tastes1/manifest.json", True),
        (HISTORIES_FILE, False),
        ("tastes/tastes1/payload", False),
        ("songs/songs1/payload", False),
    ],
)
def test_a_replica_without_tastes_and_plays_finds_damage_to_all_other_parts(
    full: Workspace, path: str, is_checked: bool
) -> None:
    release = releases.create_release(full)
    change(full, path)
    with pytest.raises(DamagedArtifactError, match=path.split("/")[1]) if is_checked else nullcontext():
        releases.verify_release(full, release, SERVED_KINDS, plays=False)


def test_a_release_stays_valid_where_the_playlists_of_its_dataset_are_replaced(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)

    def import_csv(name: str, rows: str, **settings: Any) -> DatasetManifest:
        (tmp_path / name).write_text(rows)
        config = ImportConfig(format="csv", paths=(str(tmp_path / name),), buckets=4, **settings)
        return import_data(workspace, config, repeat=name == "second.csv")

    import_csv("plays.csv", "user,song,played_at\nu,a,1\nu,b,2\n")
    import_csv("first.csv", "playlist,position,song\np,0,a\nq,0,b\nr,0,a\n,0,b\n", kind="playlists")
    (tmp_path / "songs.csv").write_text("song,title\na,First\nc,Third\n")
    describe(workspace, DescribeConfig(), str(tmp_path / "songs.csv"))
    assert add_described_songs(Dataset(workspace)) == 1
    first = Dataset(workspace).manifest
    put_model(workspace, 1, dataset=first.id)
    workspace.write_json("splits/split1.json", {})
    release = releases.create_release(workspace)
    releases.verify_release(workspace, release)
    second = import_csv("second.csv", "playlist,position,song\np,0,b\n", kind="playlists")
    removed_paths = [path for path in first.files if path not in second.files]
    assert {path.partition("/")[0] for path in removed_paths} == {"playlists", "rejected", "songs"}
    releases.verify_release(workspace, release)


def test_a_release_stays_valid_where_the_same_plays_are_imported_again(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_this_process(monkeypatch)
    plays_path, day_path = tmp_path / "plays.csv", tmp_path / "day.csv"
    plays_path.write_text("user,song,played_at\nu,a,1\nu,b,2\n")
    day_path.write_text("user,song,played_at\nu,a,3\n")
    config = ImportConfig(format="csv", paths=(str(plays_path),), buckets=4)
    day_config = config.replace(paths=(str(day_path),), buckets=0)
    save_split(workspace, Split(id="split1", dataset="data1", validation_from=1, test_from=2))
    dataset_ids = [import_data(workspace, config).id]
    put_model(workspace, 1, dataset=dataset_ids[0])
    first_release = releases.create_release(workspace)
    dataset_ids.append(append_plays(workspace, day_config).dataset.id)
    second_release = releases.create_release(workspace)
    os.utime(plays_path, (0, 0))
    first_bytes = workspace.read_bytes(earlier_manifest(dataset_ids[0]))
    assert import_data(workspace, config, repeat=True).id == dataset_ids[0]
    assert workspace.read_bytes(DATASET_MANIFEST) != first_bytes  # another moment
    assert releases.rollback(workspace) == first_release
    releases.verify_release(workspace, first_release)
    assert releases.create_release(workspace) == first_release
    assert append_plays(workspace, day_config).dataset.id == dataset_ids[1]
    for release in (first_release, second_release):
        releases.verify_release(workspace, release)


def test_commands_default_to_the_live_release_not_to_what_is_newer(full: Workspace) -> None:
    releases.create_release(full)
    put_model(full, 2)
    assert releases.default_parts(full)["models"] == "model1"
    assert releases.default_parts(full, "model2")["indexes"] == "index2"


def test_commands_default_to_the_newest_model_and_its_own_index_without_a_release(full: Workspace) -> None:
    put(full, "models", "model2", dataset="data1", songs="songs1")
    assert releases.default_parts(full) == {"dataset": "data1", "songs": "songs1", "models": "model2"}


def test_the_split_of_a_model_is_optional(full: Workspace) -> None:
    put(full, "models", "model4", dataset="data1", songs="songs1")
    put(full, "tastes", "tastes4", models="model4")
    put(full, "indexes", "index4", models="model4")
    assert "split" not in releases.create_release(full).inputs
