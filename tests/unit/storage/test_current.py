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
        above = newest(workspace, source)
        inputs |= {source: above.id} | ({"songs": above.inputs["songs"]} if source == "models" else {})
    artifact_id, complete = new_id(workspace, kind, fingerprint(kind, {"setting": setting}, inputs), repeat=repeat)
    if complete:
        return reuse(workspace, kind, artifact_id)
    return publish(workspace, Manifest(kind=kind, id=artifact_id, inputs=inputs), [])


def advised(action: Callable[[], Any]) -> str | None:
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
        last: dict[str, str] = {}  # the expected state: kind -> id of the artifact that was requested last
        live: list[str] = []
        for kind, setting, repeat in steps:
            if kind == "rollback":
                if len(live) > 1:
                    live.pop()
                    assert rollback(workspace).id == live[-1]
            elif kind == "release":
                for _ in COMMANDS:  # each advice leads to one more part of the release
                    advice = advised(lambda: create_release(workspace))
                    if advice is None:
                        break
                    wanted = next(each for each, command in COMMANDS.items() if command == advice)
                    while (first := advised(lambda wanted=wanted: stage(workspace, wanted, 0))) is not None:  # type: ignore[misc]
                        above = next(each for each, command in COMMANDS.items() if command == first)
                        last[above] = stage(workspace, above, 0).id
                    last[wanted] = newest(workspace, wanted).id
                made = create_release(workspace)
                assert active_release(workspace) == made
                if not live or live[-1] != made.id:
                    live.append(made.id)
            elif SOURCE[kind] is None or SOURCE[kind] in last:
                made = stage(workspace, kind, setting, repeat)
                source = SOURCE[kind]
                assert source is None or made.inputs[source] == last[source]
                last[kind] = made.id
            else:
                assert advised(lambda kind=kind: stage(workspace, kind, 0)) == COMMANDS[SOURCE[kind]]  # type: ignore[misc, index]
            assert current_ids(workspace).items() >= last.items()
            for each in COMMANDS:
                assert each not in last or newest(workspace, each).id == last[each]


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
    first = stage(workspace, "models", 0)
    one, two = stage(workspace, "indexes", 0), stage(workspace, "indexes", 1)
    assert stage(workspace, "indexes", 0) == one != two
    stage(workspace, "tastes", 0)
    stage(workspace, "models", 1)
    stage(workspace, "indexes", 1)
    assert stage(workspace, "models", 0) == first
    assert create_release(workspace).inputs["indexes"] == one.id


def test_where_the_current_one_was_deleted_the_last_made_takes_its_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name in ("a", "b", "c"):
        publish(workspace, Manifest(kind="models", id=name), [])
    reuse(workspace, "models", "b")
    workspace.delete(load_manifest(workspace, "models", "b").folder)
    assert newest(workspace, "models").id == "c"
    with pytest.raises(NotFoundError, match="run `rayrec embed` first"):
        newest(workspace, "songs")
