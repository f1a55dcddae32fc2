"""Later stages start from the artifact that was requested last, whatever the order in which artifacts were made."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.errors import NotFoundError
from rayrec.storage.artifacts import (
    DatasetManifest,
    Manifest,
    current_ids,
    fingerprint,
    load_manifest,
    new_id,
    newest,
    publish,
    reuse,
    write_dataset_manifest,
)
from rayrec.storage.releases import active_release, create_release, default_parts, rollback
from rayrec.storage.workspace import Workspace

COMMANDS = {"songs": "embed", "models": "train", "tastes": "taste", "indexes": "index"}
SOURCE = {"songs": None, "models": "songs", "tastes": "models", "indexes": "models"}
STEPS = st.tuples(st.sampled_from([*COMMANDS, "release", "rollback"]), st.integers(0, 1), st.booleans())


def stage(workspace: Workspace, kind: str, setting: int, repeat: bool = False) -> Manifest:
    """A stage that works like the jobs: its input is the current artifact, and a result that exists is found again."""
    inputs = {"dataset": "d1"}
    source = SOURCE[kind]
    if source is not None:
        input_artifact = newest(workspace, source)
        inputs |= {source: input_artifact.id} | (
            {"songs": input_artifact.inputs["songs"]} if source == "models" else {}
        )
    artifact_id, complete = new_id(workspace, kind, fingerprint(kind, {"setting": setting}, inputs), repeat=repeat)
    if complete:
        return reuse(workspace, kind, artifact_id)
    return publish(workspace, Manifest(kind=kind, id=artifact_id, inputs=inputs), [])


def advised_command(action: Callable[[], Any]) -> str | None:
    """The command that an error advises; None where the action works."""
    try:
        action()
    except NotFoundError as error:
        return str(error).split("run `rayrec ")[1].split("`")[0].split()[0]
    return None


@given(st.lists(STEPS, max_size=14))
@settings(max_examples=40)
def test_in_any_order_of_commands_each_starts_from_the_last_result_and_advice_helps(
    steps: list[tuple[str, int, bool]],
) -> None:
    with TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        write_dataset_manifest(
            workspace, DatasetManifest(id="d1", source="csv", buckets=1, parts=1, users=1, plays=1, songs=1)
        )
        last_ids: dict[str, str] = {}  # the expected state: kind -> id of the artifact that was requested last
        release_ids: list[str] = []
        for kind, setting, repeat in steps:
            if kind == "rollback":
                if len(release_ids) > 1:
                    release_ids.pop()
                    assert rollback(workspace).id == release_ids[-1]
            elif kind == "release":
                for _ in COMMANDS:  # each advice leads to one more part of the release
                    advice = advised_command(lambda: create_release(workspace))
                    if advice is None:
                        break
                    part = next(artifact_kind for artifact_kind, command in COMMANDS.items() if command == advice)
                    while (source_command := advised_command(lambda part=part: stage(workspace, part, 0))) is not None:  # type: ignore[misc]
                        source_kind = next(
                            artifact_kind for artifact_kind, command in COMMANDS.items() if command == source_command
                        )
                        last_ids[source_kind] = stage(workspace, source_kind, 0).id
                    last_ids[part] = newest(workspace, part).id
                artifact = create_release(workspace)
                assert active_release(workspace) == artifact
                if not release_ids or release_ids[-1] != artifact.id:
                    release_ids.append(artifact.id)
            elif SOURCE[kind] is None or SOURCE[kind] in last_ids:
                artifact = stage(workspace, kind, setting, repeat)
                source = SOURCE[kind]
                assert source is None or artifact.inputs[source] == last_ids[source]
                last_ids[kind] = artifact.id
            else:
                assert advised_command(lambda kind=kind: stage(workspace, kind, 0)) == COMMANDS[SOURCE[kind]]  # type: ignore[misc, index]
            assert current_ids(workspace).items() >= last_ids.items()
            for artifact_kind in COMMANDS:
                assert artifact_kind not in last_ids or newest(workspace, artifact_kind).id == last_ids[artifact_kind]


def test_a_result_found_again_is_what_the_next_stage_starts_from(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    write_dataset_manifest(
        workspace, DatasetManifest(id="d1", source="csv", buckets=1, parts=1, users=1, plays=1, songs=1)
    )
    stage(workspace, "songs", 0)
    first, second = stage(workspace, "models", 0), stage(workspace, "models", 1)
    assert newest(workspace, "models") == second
    assert stage(workspace, "models", 0) == first
    assert stage(workspace, "tastes", 0).inputs["models"] == first.id
    assert default_parts(workspace)["models"] == first.id


def test_a_release_takes_the_part_of_its_model_that_was_requested_last_whatever_was_requested_for_another(
    tmp_path: Path,
) -> None:
    workspace = Workspace(tmp_path)
    write_dataset_manifest(
        workspace, DatasetManifest(id="d1", source="csv", buckets=1, parts=1, users=1, plays=1, songs=1)
    )
    stage(workspace, "songs", 0)
    first_model = stage(workspace, "models", 0)
    first_index, second_index = stage(workspace, "indexes", 0), stage(workspace, "indexes", 1)
    assert stage(workspace, "indexes", 0) == first_index != second_index
    stage(workspace, "tastes", 0)
    stage(workspace, "models", 1)
    stage(workspace, "indexes", 1)
    assert stage(workspace, "models", 0) == first_model
    assert create_release(workspace).inputs["indexes"] == first_index.id


def test_the_last_published_artifact_replaces_a_deleted_current_one(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ("a", "b", "c"):
        publish(workspace, Manifest(kind="models", id=name), [])
    reuse(workspace, "models", "b")
    workspace.delete(load_manifest(workspace, "models", "b").folder)
    assert newest(workspace, "models").id == "c"
    with pytest.raises(NotFoundError, match="run `rayrec embed` first"):
        newest(workspace, "songs")
