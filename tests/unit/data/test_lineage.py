"""Cleaning: artifacts that no kept release needs are listed with their sizes, and only these are deleted."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from killed_jobs import killed_before_manifest

from rayrec.data.lineage import CleanConfig, delete_garbage, find_garbage
from rayrec.errors import InputError, StorageError
from rayrec.importing.staging import Staging, finish_publishing
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import DatasetManifest, Manifest, read_dataset_manifest, write_dataset_manifest
from rayrec.storage.workspace import Workspace, histories_file, users_file


def publish_artifact(workspace: Workspace, kind: str, name: str, **inputs: str) -> Manifest:
    workspace.write_bytes(f"{kind}/{name}/payload", b"x" * 100)
    return artifacts.publish(workspace, Manifest(kind=kind, id=name, inputs=inputs), ["payload"])


def make_release(workspace: Workspace, night: int, *, activate: bool = True) -> Manifest:
    """A release of one night: new taste vectors of the same model."""
    tastes = publish_artifact(workspace, "tastes", f"t{night}", dataset="d", models="m")
    return releases.create_release(workspace, model_id="m", tastes_id=tastes.id, index_id="i", activate=activate)


@pytest.fixture
def nights(workspace: Workspace) -> Workspace:
    """Five releases of one model, and an old model that none of them uses."""
    write_dataset_manifest(workspace, DatasetManifest(id="d", source="", buckets=1, parts=1, users=0, plays=0, songs=0))
    workspace.write_bytes(histories_file(0, 0), b"parquet")
    workspace.write_bytes(users_file(0, 0), b"parquet")
    for name in ("old", "s"):
        publish_artifact(workspace, "songs", name, dataset="d")
    publish_artifact(workspace, "models", "unused", dataset="d", songs="old")
    publish_artifact(workspace, "models", "m", dataset="d", songs="s")
    publish_artifact(workspace, "indexes", "i", models="m")
    for night in range(5):
        make_release(workspace, night)
    return workspace


def test_what_only_old_releases_refer_to_is_listed_with_its_size(nights: Workspace) -> None:
    release_ids = [release.id for release in releases.list_releases(nights)]
    garbage = {item.path: item for item in find_garbage(nights, CleanConfig(keep=2, hours=0))}
    assert set(garbage) == {
        *(f"releases/{name}" for name in release_ids[:3]),
        *(f"tastes/t{night}" for night in range(3)),
        "models/unused",
        "songs/old",
    }
    assert garbage["tastes/t0"].bytes == nights.size("tastes/t0") > 100
    assert find_garbage(nights, CleanConfig(keep=2, hours=1)) == []  # everything is younger


def test_the_last_recommendations_of_each_model_in_use_stay(nights: Workspace) -> None:
    for name, model in (("r1", "m"), ("r2", "m"), ("r3", "unused")):
        publish_artifact(nights, "recommendations", name, dataset="d", models=model)
    make_release(nights, 5)
    paths = [item.path for item in find_garbage(nights, CleanConfig(keep=2, hours=0))]
    assert {path for path in paths if path.startswith("recommendations/")} == {
        "recommendations/r1",
        "recommendations/r3",
    }


def test_a_release_that_was_asked_for_again_is_the_newest(nights: Workspace) -> None:
    release_ids = [release.id for release in releases.list_releases(nights)]
    reused_release = releases.create_release(nights, model_id="m", tastes_id="t1", index_id="i", activate=False)
    assert reused_release.id == release_ids[1]
    assert artifacts.current_ids(nights)["releases"] == release_ids[1]
    paths = {item.path for item in find_garbage(nights, CleanConfig(keep=2, hours=0))}
    assert paths >= {"releases/" + release_ids[0], "releases/" + release_ids[2], "tastes/t0", "tastes/t2"}
    assert not paths & {"releases/" + release_ids[1], "releases/" + release_ids[4], "tastes/t1", "tastes/t4"}


def test_recommendations_that_were_asked_for_again_stay(nights: Workspace) -> None:
    for name in ("r1", "r2"):
        publish_artifact(nights, "recommendations", name, dataset="d", models="m")
    make_release(nights, 5)
    artifacts.reuse(nights, "recommendations", "r1")
    paths = [item.path for item in find_garbage(nights, CleanConfig(keep=2, hours=0))]
    assert "recommendations/r1" not in paths
    assert "recommendations/r2" in paths


def test_what_later_commands_start_from_stays(nights: Workspace) -> None:
    artifacts.reuse(nights, "models", "unused")  # `rayrec train` with earlier settings
    paths = [item.path for item in find_garbage(nights, CleanConfig(keep=2, hours=0))]
    assert not {"models/unused", "songs/old"} & set(paths)


def test_after_cleaning_what_is_kept_verifies_and_rolls_back(nights: Workspace) -> None:
    config = CleanConfig(keep=2, hours=0)
    garbage = find_garbage(nights, config)
    assert delete_garbage(nights, garbage, config) == garbage
    assert not [item.path for item in garbage if nights.exists(item.path)]
    kept_releases = releases.list_releases(nights)
    assert len(kept_releases) == 2
    for release in kept_releases:
        releases.verify_release(nights, release)
    assert releases.rollback(nights).id == kept_releases[0].id
    with pytest.raises(InputError, match="No earlier release"):
        releases.rollback(nights)
    assert find_garbage(nights, CleanConfig(keep=2, hours=0)) == []


def test_the_live_release_stays_however_old_it_is(nights: Workspace) -> None:
    first_release = releases.list_releases(nights)[0]
    releases.activate_release(nights, first_release.id)
    paths = [item.path for item in find_garbage(nights, CleanConfig(keep=1, hours=0))]
    assert f"releases/{first_release.id}" not in paths
    assert "tastes/t0" not in paths
    assert "tastes/t1" in paths


def test_the_release_before_the_live_one_stays_for_a_rollback(nights: Workspace) -> None:
    active_id = releases.read_active(nights)["active"]
    for night in (5, 6):
        make_release(nights, night, activate=False)
    make_release(nights, 7)
    config = CleanConfig(keep=3, hours=0)
    delete_garbage(nights, find_garbage(nights, config), config)
    restored = releases.rollback(nights)
    assert restored.id == active_id
    releases.verify_release(nights, restored)


def test_artifacts_that_no_release_uses_yet_stay_and_old_unfinished_ones_go(nights: Workspace) -> None:
    publish_artifact(nights, "models", "next", dataset="d", songs="s")
    nights.write_bytes("models/half/weights", b"x")
    paths = [item.path for item in find_garbage(nights, CleanConfig(keep=5, hours=0))]
    assert paths == ["songs/old", "models/unused"]
    os.utime(Path(nights.full("models/half/weights")), (0, 0))
    os.utime(Path(nights.full("models/half")), (0, 0))
    reasons = {item.path: item.reason for item in find_garbage(nights, CleanConfig(keep=5, hours=0))}
    assert reasons["models/half"] == "unfinished"


def test_what_a_young_release_was_made_of_stays_however_old_it_is(nights: Workspace) -> None:
    for name in ("of_young", "of_none"):
        tastes = publish_artifact(nights, "tastes", name, dataset="d", models="m")
        nights.write_json(tastes.path("manifest.json"), asdict(replace(tastes, created_at="2020-01-01T00:00:00+00:00")))
    young_release = releases.create_release(nights, model_id="m", tastes_id="of_young", index_id="i", activate=False)
    make_release(nights, 5)
    config = CleanConfig(keep=1, hours=24)
    garbage = find_garbage(nights, config)
    assert [item.path for item in garbage] == ["tastes/of_none"]
    delete_garbage(nights, garbage, config)
    releases.verify_release(nights, young_release)


def test_what_replicas_answer_with_or_load_stays(nights: Workspace) -> None:
    release_ids = [release.id for release in releases.list_releases(nights)]
    nights.write_json("serving/replicas/one.json", {"release": release_ids[0], "loading": None, "arms": []})
    nights.write_json(
        "serving/replicas/two.json", {"release": release_ids[4], "loading": release_ids[3], "arms": [release_ids[1]]}
    )
    nights.write_bytes("serving/replicas/junk.json", b"{")
    config = CleanConfig(keep=2, hours=0)
    delete_garbage(nights, find_garbage(nights, config), config)
    kept_releases = releases.list_releases(nights)
    assert [release.id for release in kept_releases] == [release_ids[0], release_ids[1], release_ids[3], release_ids[4]]
    for release in kept_releases:
        releases.verify_release(nights, release)


def test_artifacts_of_another_version_go_once_no_replica_answers_with_them(nights: Workspace) -> None:
    old_manifest = {"kind": "", "id": "", "format_version": artifacts.FORMAT_VERSION - 1}
    old_folders = ["releases/r0", "models/m0", "reports/e0"]
    for folder in old_folders:
        nights.write_json(f"{folder}/manifest.json", old_manifest)
    make_release(nights, 5)
    config = CleanConfig(keep=6, hours=0)
    nights.write_json("serving/replicas/one.json", {"release": "r0", "loading": None, "arms": []})
    assert not {item.path for item in find_garbage(nights, config)} & set(old_folders)
    nights.delete("serving/replicas/one.json")
    reasons = {item.path: item.reason for item in find_garbage(nights, config)}
    assert [reasons.get(folder) for folder in old_folders] == ["made by another version of rayrec"] * 3
    assert find_garbage(nights, CleanConfig(keep=6, hours=1)) == []


def test_a_release_that_went_live_since_it_was_found_is_not_deleted(nights: Workspace) -> None:
    config = CleanConfig(keep=2, hours=0)
    garbage = find_garbage(nights, config)
    first_release = releases.list_releases(nights)[0]
    assert {f"releases/{first_release.id}", "tastes/t0"} <= {item.path for item in garbage}
    releases.activate_release(nights, first_release.id)
    make_release(nights, 5, activate=False)
    assert "tastes/t3" in {item.path for item in find_garbage(nights, config)}
    deleted_items = delete_garbage(nights, garbage, config)
    assert {item.path for item in garbage} - {item.path for item in deleted_items} == {
        f"releases/{first_release.id}",
        "tastes/t0",
    }
    live_release = releases.active_release(nights)
    assert live_release is not None
    releases.verify_release(nights, live_release)
    assert nights.exists("tastes/t3")  # garbage by now, but not in the list `garbage`


def test_joined_parts_stay_for_their_readers_for_some_hours(nights: Workspace) -> None:
    nights.write_bytes(histories_file(1, 0), b"parquet")
    nights.write_bytes(histories_file(0, 0, 1), b"joined")
    nights.write_bytes(users_file(1, 0), b"parquet")
    manifest = replace(read_dataset_manifest(nights), parts=2, joined_parts=[(0, 1)], users_parts=[1])
    for joined_at, expected in (("2999-01-01T00:00:00+00:00", 0), ("2020-01-01T00:00:00+00:00", 2)):
        write_dataset_manifest(nights, replace(manifest, joined_at=joined_at))
        garbage = [
            item for item in find_garbage(nights, CleanConfig(keep=5, hours=0)) if item.path.startswith("dataset/")
        ]
        assert [item.path for item in garbage if "histories" in item.path] == (
            [histories_file(0, 0), histories_file(1, 0)][:expected]
        )
        assert users_file(0, 0) in [item.path for item in garbage]
        assert users_file(1, 0) not in [item.path for item in garbage]


@pytest.mark.parametrize("job", ["append", "compaction"])
def test_files_that_a_killed_job_has_moved_into_place_stay(
    nights: Workspace, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    old = replace(read_dataset_manifest(nights), joined_at="2020-01-01T00:00:00+00:00")
    write_dataset_manifest(nights, old)
    new = replace(old, id="e", ancestors=["d"], parts=2, users_parts=[1])
    paths = [histories_file(1, 0), users_file(1, 0)]
    if job == "compaction":
        new, paths = replace(new, joined_parts=[(0, 1)]), [histories_file(0, 0, 1), users_file(1, 0)]
    staging = Staging(nights, job)
    files = {path.removeprefix("dataset/"): nights.write_bytes(staging.out(path), b"new") for path in paths}
    with killed_before_manifest(monkeypatch):
        staging.publish(replace(new, files=files))
    config = CleanConfig(keep=5, hours=0)
    delete_garbage(nights, find_garbage(nights, config), config)
    finish_publishing(nights)
    assert read_dataset_manifest(nights).id == "e"
    assert [path for path in paths if not nights.exists(path)] == []


@pytest.mark.parametrize("all_in_releases", [False, True])
def test_a_full_disk_can_be_cleaned(nights: Workspace, monkeypatch: pytest.MonkeyPatch, all_in_releases: bool) -> None:
    if all_in_releases:
        nights.delete("models/unused")
        nights.delete("songs/old")
    config, open_output, delete = CleanConfig(keep=2, hours=0), Workspace.open_output, Workspace.delete
    garbage = find_garbage(nights, config)
    deleted_paths: list[str] = []

    def delete_and_note(workspace: Workspace, path: str) -> None:
        if workspace.exists(path):
            deleted_paths.append(path)
        delete(workspace, path)

    def open_unless_full(workspace: Workspace, path: str) -> Any:
        if not deleted_paths:
            raise StorageError("no space left")
        return open_output(workspace, path)

    monkeypatch.setattr(Workspace, "delete", delete_and_note)
    monkeypatch.setattr(Workspace, "open_output", open_unless_full)
    assert delete_garbage(nights, garbage, config) == garbage
    assert len(releases.list_releases(nights)) == 2
    assert deleted_paths.index(garbage[0].path) < deleted_paths.index("tastes/t0")  # which the release was made of


def test_the_clean_after_one_that_was_killed_removes_deleted_releases_from_the_history(
    nights: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write_json = CleanConfig(keep=2, hours=0), Workspace.write_json
    release_ids = [release.id for release in releases.list_releases(nights)]

    def write_or_kill(workspace: Workspace, path: str, content: Any) -> str:
        if path == releases.ACTIVE:
            raise KeyboardInterrupt
        return write_json(workspace, path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(Workspace, "write_json", write_or_kill)
        delete_garbage(nights, find_garbage(nights, config), config)
    assert [release.id for release in releases.list_releases(nights)] == release_ids[3:]
    delete_garbage(nights, find_garbage(nights, config), config)
    assert releases.read_active(nights)["history"] == release_ids[3:4]
    assert find_garbage(nights, config) == []
    releases.verify_release(nights, releases.rollback(nights))


def test_without_a_release_cleaning_is_refused(workspace: Workspace) -> None:
    publish_artifact(workspace, "models", "m")
    with pytest.raises(InputError, match="no release"):
        find_garbage(workspace, CleanConfig())
