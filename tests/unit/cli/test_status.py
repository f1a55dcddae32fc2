"""`rayrec status` shows which inputs each artifact was made from, and which artifacts are current or live."""

import io
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayrec.data.lineage import status
from rayrec.data.split import Split, save_split
from rayrec.storage.artifacts import DatasetManifest, Manifest, make_current, publish, write_dataset_manifest
from rayrec.storage.releases import write_active
from rayrec.storage.workspace import Workspace
from rayrec_cli.app import age
from rayrec_cli.main import main
from rayrec_cli.operations_commands import lineage_tree


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path)
    write_dataset_manifest(
        workspace, DatasetManifest(id="d1", source="csv", buckets=1, parts=1, users=1, plays=2, songs=2)
    )
    return workspace


def publish_artifact(workspace: Workspace, kind: str, name: str, **inputs: str) -> None:
    publish(workspace, Manifest(kind=kind, id=name, inputs=inputs), [])


def lines(workspace: Workspace) -> list[tuple[int, str]]:
    """Return depth and text of each line of the tree."""
    console = Console(file=io.StringIO(), width=200)
    console.print(lineage_tree(status(workspace)))
    tree_lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [((len(line) - len(line.lstrip("│├└─ "))) // 4, line.lstrip("│├└─ ").rstrip()) for line in tree_lines]


def find_line(tree: list[tuple[int, str]], start: str) -> tuple[int, str, str]:
    """Return depth, text and the parent's text of the one line that begins with `start`."""
    (position,) = [number for number, (_, text) in enumerate(tree) if text.startswith(start)]
    depth, text = tree[position]
    return depth, text, next(parent for level, parent in reversed(tree[:position]) if level == depth - 1)


def test_every_artifact_stands_below_what_it_was_made_from(workspace: Workspace) -> None:
    publish_artifact(workspace, "songs", "s1", dataset="d1")
    for model in ("m1", "m2"):
        publish_artifact(workspace, "models", model, dataset="d1", songs="s1")
    publish_artifact(workspace, "tastes", "t1", dataset="d1", models="m1")
    publish_artifact(workspace, "releases", "r1", dataset="d1", songs="s1", models="m1", tastes="t1")
    tree = lines(workspace)
    assert find_line(tree, "song embeddings s1")[2].startswith("data set d1  2 plays, 1 users, 2 songs")
    assert find_line(tree, "model m2")[2].startswith("song embeddings s1")
    assert find_line(tree, "taste vectors t1")[2].startswith("model m1")
    assert find_line(tree, "release r1")[2].startswith("model m1")


def test_current_and_live_artifacts_are_marked(workspace: Workspace) -> None:
    for model in ("m1", "m2"):
        publish_artifact(workspace, "models", model, dataset="d1")
        publish_artifact(workspace, "releases", f"r-{model}", dataset="d1", models=model)
    make_current(workspace, "models", "m1")
    write_active(workspace, "r-m2", [], [])
    marked_artifacts = [text.split("  ")[0] for _, text in lines(workspace) if text.endswith("]")]
    assert marked_artifacts == ["model m1", "release r-m2"]


def test_an_artifact_of_a_data_set_that_no_longer_exists_says_so(workspace: Workspace) -> None:
    publish_artifact(workspace, "songs", "s0", dataset="d0")
    assert find_line(lines(workspace), "song embeddings s0")[1].startswith("song embeddings s0  of data set d0")


def test_after_an_append_a_continued_model_names_the_inputs_that_are_not_in_the_lines_above(tmp_path: Path) -> None:
    """After a fit and an append, a continued training uses the song embeddings of the first fit."""
    workspace, created_at = Workspace(tmp_path), (datetime.now(timezone.utc) - timedelta(days=2, hours=1)).isoformat()
    counts: dict[str, Any] = {"source": "csv", "buckets": 1, "users": 1, "plays": 2, "songs": 2}
    manifest = DatasetManifest(id="d2", ancestors=["d1"], parts=2, created_at=created_at, **counts)
    write_dataset_manifest(workspace, manifest)
    for name, dataset in (("x1", "d1"), ("x2", "d2")):
        save_split(workspace, Split(id=name, dataset=dataset, validation_from=1, test_from=2))
    first_inputs, second_inputs = {"dataset": "d1", "split": "x1"}, {"dataset": "d2", "split": "x2"}
    publish_artifact(workspace, "songs", "s1", **first_inputs)
    publish_artifact(workspace, "models", "m1", songs="s1", **first_inputs)
    publish_artifact(workspace, "models", "m2", songs="s1", **second_inputs, **{"from": "m1"})
    publish_artifact(workspace, "models", "m3", songs="s1", dataset="d2")
    for model, inputs, retrieval in (("m1", first_inputs, "k1"), ("m2", second_inputs, "k2")):
        publish_artifact(workspace, "retrieval", retrieval, **inputs)
        publish_artifact(workspace, "rankers", f"r-{model}", models=model, retrieval=retrieval, **inputs)
        publish_artifact(workspace, "tastes", f"t-{model}", models=model, dataset=inputs["dataset"])
    publish_artifact(workspace, "tastes", "t-new", models="m1", dataset="d2")
    tree = lines(workspace)
    for line, parent_start, expected in (
        ("data set d2", "Workspace", "2 plays, 1 users, 2 songs"),
        ("split x1", "data set d2", "of earlier data set d1  in time"),
        ("split x2", "data set d2", "in time"),
        ("song embeddings s1", "split x1", ""),
        ("model m1", "song embeddings s1", ""),
        ("model m2", "song embeddings s1", "of data set d2  split x2  from model m1"),
        ("model m3", "song embeddings s1", "of data set d2  no split"),
        ("retrievers k2", "split x2", ""),
        ("rankers r-m1", "model m1", "retrievers k1"),
        ("rankers r-m2", "model m2", "retrievers k2"),
        ("taste vectors t-m1", "model m1", ""),
        ("taste vectors t-m2", "model m2", ""),
        ("taste vectors t-new", "model m1", "of data set d2"),
    ):
        _, text, parent = find_line(tree, line)
        assert parent.startswith(parent_start)
        facts = [fact for fact in text.split("  ")[1:] if not fact.startswith("[")]
        *input_facts, bytes_shown, age_shown = facts
        assert "  ".join(input_facts) == expected
        assert bytes_shown.endswith(" B")
        assert age_shown == ("2 d ago" if line == "data set d2" else "just now")


def test_an_artifact_made_before_parts_were_joined_belongs_to_the_same_plays(workspace: Workspace) -> None:
    counts: dict[str, Any] = {"source": "csv", "buckets": 1, "users": 1, "plays": 2, "songs": 2}
    manifest = DatasetManifest(id="d2", ancestors=["d1"], joined_from="d1", parts=2, **counts)
    write_dataset_manifest(workspace, manifest)
    publish_artifact(workspace, "songs", "s1", dataset="d1")
    _, text, parent = find_line(lines(workspace), "song embeddings s1")
    assert (parent.split("  ")[0], "data set" in text) == ("data set d2", False)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-5, "just now"), (59, "just now"), (60, "1 min ago"), (7_199, "1 h ago"), (2 * 86_400, "2 d ago")],
)
def test_ages_are_in_the_largest_unit_that_has_passed(seconds: int, expected: str) -> None:
    now = datetime(2026, 1, 20, tzinfo=timezone.utc)
    assert age((now - timedelta(seconds=seconds)).isoformat(), now) == expected


def test_in_a_pipe_each_artifact_is_one_line_with_its_mark(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "m" * 120
    publish_artifact(workspace, "models", name, dataset="d1")
    make_current(workspace, "models", name)
    assert main(["--workspace", workspace.uri, "status"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "[current]" in line]
    assert f"model {name}  " in line


def test_an_empty_workspace_says_how_to_start(tmp_path: Path) -> None:
    assert lines(Workspace(tmp_path))[1][1] == "No data set; see rayrec import --help"
