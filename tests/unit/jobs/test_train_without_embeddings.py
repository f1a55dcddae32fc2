"""A network that was trained without song embeddings, and all later stages."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rings import BEGIN, DAY, ring_plays, write_rows

from rayrec.errors import InputError
from rayrec.jobs.train import train
from rayrec.model.train_config import TrainConfig
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

pytestmark = pytest.mark.usefixtures("commands_without_ray")

SONGS = 60
PLAIN: dict[str, Any] = {"workers": 0, "hidden_dim": 16, "epochs": 1, "negatives": 32}


def run(workspace: Workspace, line: str, *words: str) -> tuple[dict[str, Any], str]:
    """Run a command twice, and return its JSON and its text. The second time most commands find their result."""
    printed = []
    for flags in (["--json"], []):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["--workspace", workspace.uri, *flags, *line.split(), *words])
        assert code == 0, err.getvalue()
        printed.append(out.getvalue())
    return json.loads(printed[0]), " ".join(printed[1].split())


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with plays of a ring and a split."""
    folder = tmp_path_factory.mktemp("ring")
    workspace = Workspace(folder / "workspace")
    path = write_rows(folder / "plays.csv", ring_plays(range(150), songs=SONGS, follow=0.95))
    run(workspace, "import csv", path, "--columns", "user=user_id,song=track,played_at=timestamp", "--buckets", "2")
    run(workspace, "split --test-days 4 --validation-days 4")
    return workspace


@pytest.fixture(scope="module")
def trained(imported: Workspace, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, dict[str, Any], str]:
    """A copy of `imported` with a trained model, and the JSON and the text that the training printed."""
    workspace = Workspace(shutil.copytree(imported.root, tmp_path_factory.mktemp("trained") / "workspace"))
    settings = "--workers 0 --hidden-dim 16 --epochs 8 --negatives 32 --batch 8 --learning-rate 0.01"
    return workspace, *run(workspace, f"train --dim 24 --table-learning-rate 0.02 {settings}")


def test_a_training_without_embeddings_says_that_it_starts_at_random(
    trained: tuple[Workspace, dict[str, Any], str],
) -> None:
    workspace, data, text = trained
    assert "songs" not in data["inputs"]
    assert data["note"] == "the workspace has no song embeddings (`rayrec embed`): the song tables started at random"
    assert f"Note: {data['note']}" in text
    assert workspace.read_array(f"models/{data['id']}/song_vectors.npy").shape == (SONGS, 24)


def test_it_learns_what_follows_a_song_and_every_later_stage_works(
    trained: tuple[Workspace, dict[str, Any], str],
) -> None:
    workspace, model, _ = trained
    for line in ("songs add", "retrieval", "rank --trees 5", "taste", "index"):
        run(workspace, line)
    report, _ = run(workspace, "evaluate --bootstrap-samples 0 --offsets 0 --max-curve-users 5")
    assert "songs" not in report["inputs"]
    compared = {row["model"] for row in report["results"]}
    assert {"two-step", "taste", "popularity", "vstan"} <= compared
    assert not {"item-knn", "average-0.9"} & compared
    release, _ = run(workspace, "release create")
    assert release["models"] == model["id"]
    assert "songs" not in release
    successors = 0
    for last in range(5, SONGS, 6):
        history = f"s{last - 2},s{last - 1},s{last}"
        answer, _ = run(workspace, "recommend -k 3 --at", str(BEGIN + 21 * DAY), "--songs", history)
        successors += f"s{(last + 1) % SONGS}" in {song["song_id"] for song in answer["songs"]}
    assert successors >= 8  # of ten; fewer than one by chance
    assert run(workspace, "verify")[0]["problems"] == []
    status, _ = run(workspace, "status")
    assert (status["songs"], status["active"]) == ([], release["id"])


def test_a_baseline_that_needs_embeddings_names_the_command_that_makes_them(
    trained: tuple[Workspace, dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--workspace", trained[0].uri, "evaluate", "--models", "item-knn"]) == 2
    assert "run `rayrec embed` first" in capsys.readouterr().err


def test_a_training_can_start_from_a_model_without_embeddings_though_there_are_some_now(
    trained: tuple[Workspace, dict[str, Any], str], tmp_path: Path
) -> None:
    workspace = Workspace(shutil.copytree(trained[0].root, tmp_path / "workspace"))
    run(workspace, "embed --dim 8 --epochs 1 --workers 1")
    settings = "--workers 0 --hidden-dim 16 --epochs 8 --negatives 32 --batch 8 --learning-rate 0.01 --dim 24"
    again, _ = run(workspace, f"train {settings} --from", trained[1]["id"])
    assert again["inputs"]["from"] == trained[1]["id"]
    assert "songs" not in again["inputs"]
    assert "note" not in again
    assert again["loss"] < 1.1 * trained[1]["loss"]


def test_the_dimension_is_that_of_the_embeddings_and_64_without(imported: Workspace, tmp_path: Path) -> None:
    without, given = (Workspace(shutil.copytree(imported.root, tmp_path / name)) for name in ("without", "given"))
    run(given, "embed --no-split --dim 8 --epochs 1 --workers 1")
    dims = {
        workspace.uri: workspace.read_array(train(workspace, TrainConfig(**PLAIN)).path("song_vectors.npy")).shape[1]
        for workspace in (without, given)
    }
    assert dims == {without.uri: 64, given.uri: 8}
    assert train(given, TrainConfig(**PLAIN, dim=8)).metrics["plays"] > 0
    with pytest.raises(InputError, match=r"dim is 16, and song embeddings .* have 8 dimensions; omit dim, or run"):
        train(given, TrainConfig(**PLAIN, dim=16))


@pytest.mark.parametrize("song_table", ["mapped", "frozen"])
def test_a_song_table_that_keeps_its_embeddings_is_refused_without_any(imported: Workspace, song_table: str) -> None:
    with pytest.raises(InputError, match=f"song_table {song_table} needs song embeddings, .* run `rayrec embed` first"):
        train(imported, TrainConfig(**PLAIN, song_table=song_table))


def test_a_table_that_starts_at_random_is_the_same_for_the_same_seed(imported: Workspace, tmp_path: Path) -> None:
    vectors = []
    for name in ("one", "two"):
        workspace = Workspace(shutil.copytree(imported.root, tmp_path / name))
        made = train(workspace, TrainConfig(**PLAIN))
        vectors.append(np.array(workspace.read_array(made.path("song_vectors.npy"))))
    np.testing.assert_array_equal(*vectors)
