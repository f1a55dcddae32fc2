"""Artifacts: found again by their settings and inputs, absent until complete, and verified by checksums."""

from dataclasses import asdict
from pathlib import Path

import pytest
from planted_reports import plant_report

from rayrec.errors import DamagedArtifactError, NotFoundError
from rayrec.storage.artifacts import (
    COMMANDS,
    FORMAT_VERSION,
    NOUNS,
    Manifest,
    fingerprint,
    ids_of_other_versions,
    listing,
    load_manifest,
    new_id,
    newest,
    publish,
    verify,
)
from rayrec.storage.workspace import Workspace


def put(workspace: Workspace, artifact_id: str, content: bytes = b"1") -> Manifest:
    manifest = Manifest(kind="models", id=artifact_id, config={"a": 1}, inputs={"dataset": "d"}, seed=3)
    workspace.write_bytes(manifest.path("weights"), content)
    return publish(workspace, manifest, ["weights"])


def test_the_fingerprint_follows_stage_config_and_inputs() -> None:
    first = fingerprint("train", {"a": 1, "b": [2]}, {"dataset": "d"})
    assert len(first) == 12
    assert fingerprint("train", {"b": [2], "a": 1}, {"dataset": "d"}) == first
    others = {
        fingerprint("embed", {"a": 1, "b": [2]}, {"dataset": "d"}),
        fingerprint("train", {"a": 2, "b": [2]}, {"dataset": "d"}),
        fingerprint("train", {"a": 1, "b": [2]}, {"dataset": "e"}),
    }
    assert len(others | {first}) == 4


def test_what_is_published_is_loaded(workspace: Workspace) -> None:
    manifest = put(workspace, "m")
    assert load_manifest(workspace, "models", "m") == manifest
    assert manifest.created_at
    assert len(manifest.files["weights"]) == 64
    verify(workspace, manifest)


def test_leftover_files_of_killed_writers_are_deleted_once_an_artifact_is_complete(workspace: Workspace) -> None:
    leftover = Path(workspace.full("models/m/part/.weights.0123456789abcdef"))
    other_leftover = Path(workspace.full("models/other/.weights.0123456789abcdef"))
    for file in (leftover, other_leftover):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"half")
    put(workspace, "m")
    assert not leftover.exists()
    assert other_leftover.exists()


def test_without_its_manifest_an_artifact_is_not_there(workspace: Workspace) -> None:
    put(workspace, "whole")
    workspace.write_bytes("models/half/weights", b"1")
    assert [manifest.id for manifest in listing(workspace, "models")] == ["whole"]
    with pytest.raises(NotFoundError, match=r"model 'half' not found in workspace .*; existing: whole"):
        load_manifest(workspace, "models", "half")


def test_the_newest_is_the_one_published_last(workspace: Workspace) -> None:
    for name in ("z", "a", "m"):
        put(workspace, name)
    assert [manifest.id for manifest in listing(workspace, "models")] == ["z", "a", "m"]
    assert newest(workspace, "models").id == "m"
    with pytest.raises(NotFoundError, match=r"has no index; run `rayrec index` first"):
        newest(workspace, "indexes")


def test_damage_is_found(workspace: Workspace) -> None:
    manifest = put(workspace, "m")
    workspace.write_bytes(manifest.path("weights"), b"2")
    with pytest.raises(DamagedArtifactError, match="weights does not match the checksum"):
        verify(workspace, manifest)
    workspace.delete(manifest.path("weights"))
    with pytest.raises(DamagedArtifactError, match="weights is missing; delete the folder models/m and run `rayrec"):
        verify(workspace, manifest)


@pytest.mark.parametrize("version", [FORMAT_VERSION - 1, FORMAT_VERSION + 1])
def test_another_format_version_is_refused_with_the_command_that_makes_the_artifact(
    workspace: Workspace, version: int
) -> None:
    manifest = put(workspace, "m")
    workspace.write_json(manifest.path("manifest.json"), {**asdict(manifest), "format_version": version})
    message = (
        f"has format version {version}, but this version of rayrec reads {FORMAT_VERSION}; "
        "run `rayrec fit`, which makes a release with all its parts, or `rayrec train` for this model alone"
    )
    with pytest.raises(DamagedArtifactError, match=message):
        load_manifest(workspace, "models", "m")


def test_artifacts_of_another_format_version_are_not_listed_with_those_that_can_be_used(workspace: Workspace) -> None:
    put(workspace, "usable")
    manifest = put(workspace, "old")
    old_manifest = {"kind": "models", "id": "old", "format_version": FORMAT_VERSION - 1, "a field of then": 1}
    workspace.write_json(manifest.path("manifest.json"), old_manifest)
    assert [item.id for item in listing(workspace, "models")] == ["usable"]
    assert newest(workspace, "models").id == "usable"
    assert ids_of_other_versions(workspace, "models") == ["old"]


def test_every_kind_of_artifact_has_a_command() -> None:
    assert {*COMMANDS, "dataset"} == set(NOUNS)


def test_the_same_work_finds_its_result_or_its_unfinished_files(workspace: Workspace) -> None:
    assert new_id(workspace, "models", "p", repeat=False) == ("p", False)
    workspace.write_bytes("models/p/weights", b"half done")
    assert new_id(workspace, "models", "p", repeat=False) == ("p", False)
    assert new_id(workspace, "models", "p", repeat=True) == ("p", False)
    put(workspace, "p")
    assert new_id(workspace, "models", "p", repeat=False) == ("p", True)


def test_repeating_makes_the_next_attempt_and_later_work_finds_the_last(workspace: Workspace) -> None:
    put(workspace, "p")
    assert new_id(workspace, "models", "p", repeat=True) == ("p.2", False)
    assert new_id(workspace, "models", "p", repeat=False) == ("p", True)  # an unfinished attempt does not count
    put(workspace, "p.2")
    assert new_id(workspace, "models", "p", repeat=False) == ("p.2", True)
    assert new_id(workspace, "models", "p", repeat=True) == ("p.3", False)


def test_after_earlier_attempts_were_deleted_the_last_is_found_and_the_next_comes_after_it(
    workspace: Workspace,
) -> None:
    for artifact_id in ("p", "p.2", "p.10", "p1.11", "q.12"):
        put(workspace, artifact_id)
    workspace.delete("models/p")
    assert new_id(workspace, "models", "p", repeat=False) == ("p.10", True)
    assert new_id(workspace, "models", "p", repeat=True) == ("p.11", False)
    workspace.write_bytes("models/p.11/weights", b"half done")
    workspace.delete("models/p.2")
    workspace.delete("models/p.10")
    for repeat in (False, True):
        assert new_id(workspace, "models", "p", repeat=repeat) == ("p.11", False)


def test_publishing_checksums_the_named_files_and_stamps_the_time(workspace: Workspace) -> None:
    first, second = put(workspace, "a", b"same"), put(workspace, "b", b"same")
    assert first.files == second.files
    assert first.created_at < second.created_at
    assert put(workspace, "c", b"other").files != first.files


def test_a_notebook_shows_what_an_artifact_is_and_its_tables() -> None:
    trials = [{"trial": 1, "loss": 0.25, "settings": {"dim": 4}}, {"trial": 2, "loss": None, "settings": {"dim": 8}}]
    metrics = {"seconds": 1234, "best_loss": 0.25, "trials": trials, "best": {"dim": 4}}
    html = Manifest(kind="tunings", id="t1", inputs={"dataset": "d<1>", "songs": "s1"}, metrics=metrics)._repr_html_()
    for text in ("Tuning", "t1", "from data set", "d&lt;1&gt;", "from song embeddings", "s1", "1,234", "best loss"):
        assert text in html
    assert "<th>trial</th><th>loss</th></tr>" in html
    assert html.count("<tr>") == 1 + 2 + 2 + 3  # id, inputs, figures, and the table with its head
    assert "settings" not in html
    assert "verdict" not in html


def test_a_notebook_shows_the_verdict_of_a_report_first(workspace: Workspace) -> None:
    plant_report(workspace, {"models": "m1"}, recall=0.37)
    html = load_manifest(workspace, "reports", "planted")._repr_html_()
    first_row = html[: html.index("</tr>")]
    assert "verdict" in first_row
    assert "two-step finds 37 of 100 next new songs in its first 20." in first_row
    assert "<th>model</th><th>served_recall@20</th>" in html
    assert "the test range leaked" in html
