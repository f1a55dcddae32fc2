"""`rayrec status` shows what was made from what, what is current and what is live."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from rayrec.data.lineage import status
from rayrec.storage.artifacts import DatasetManifest, Manifest, make_current, publish, write_dataset_manifest
from rayrec.storage.releases import write_active
from rayrec.storage.workspace import Workspace
from rayrec_cli.operations_commands import lineage_tree


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    write_dataset_manifest(made, DatasetManifest(id="d1", source="csv", buckets=1, parts=1, users=1, plays=2, songs=2))
    return made


def put(workspace: Workspace, kind: str, name: str, **inputs: str) -> None:
    publish(workspace, Manifest(kind=kind, id=name, inputs=inputs), [])


def lines(workspace: Workspace) -> list[tuple[int, str]]:
    """Depth and text of each line of the tree."""
    console = Console(file=io.StringIO(), width=200)
    console.print(lineage_tree(status(workspace)))
    drawn = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return [((len(line) - len(line.lstrip("│├└─ "))) // 4, line.lstrip("│├└─ ").rstrip()) for line in drawn]


def find(shown: list[tuple[int, str]], start: str) -> tuple[int, str, str]:
    """Depth, text and parent's text of the line that begins so."""
    (at,) = [number for number, (_, text) in enumerate(shown) if text.startswith(start)]
    depth, text = shown[at]
    return depth, text, next(above for level, above in reversed(shown[:at]) if level == depth - 1)


def test_every_artifact_stands_below_what_it_was_made_from(workspace: Workspace) -> None:
    put(workspace, "songs", "s1", dataset="d1")
    for model in ("m1", "m2"):
        put(workspace, "models", model, dataset="d1", songs="s1")
    put(workspace, "tastes", "t1", dataset="d1", models="m1")
    put(workspace, "releases", "r1", dataset="d1", songs="s1", models="m1", tastes="t1")
    shown = lines(workspace)
    assert find(shown, "song embeddings s1")[2].startswith("data set d1  2 plays, 1 users, 2 songs")
    assert find(shown, "model m2")[2].startswith("song embeddings s1")
    assert find(shown, "taste vectors t1")[2].startswith("model m1")
    assert find(shown, "release r1")[2].startswith("model m1")


def test_the_current_and_the_live_ones_are_marked(workspace: Workspace) -> None:
    for model in ("m1", "m2"):
        put(workspace, "models", model, dataset="d1")
        put(workspace, "releases", f"r-{model}", dataset="d1", models=model)
    make_current(workspace, "models", "m1")
    write_active(workspace, "r-m2", [])
    marked = [text.split("  ")[0] for _, text in lines(workspace) if text.endswith("]")]
    assert marked == ["model m1", "release r-m2"]


def test_what_was_made_from_a_data_set_that_is_gone_says_so(workspace: Workspace) -> None:
    put(workspace, "songs", "s0", dataset="d0")
    assert find(lines(workspace), "song embeddings s0")[1].startswith("song embeddings s0  of data set d0")


def test_an_empty_workspace_says_how_to_begin(tmp_path: Path) -> None:
    assert lines(Workspace(tmp_path))[1][1] == "No data set; see rayrec import --help"
