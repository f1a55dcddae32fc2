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
TRAIN_SETTINGS: dict[str, Any] = {"workers": 0, "hidden_dim": 16, "epochs": 1, "negatives": 32}


def run(workspace: Workspace, command: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a command twice, and return its JSON and its text. The second time most commands find their result."""
    outputs = []
    for flags in (["--json"], []):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["--workspace", workspace.uri, *flags, *command.split(), *arguments])
        assert code == 0, err.getvalue()
        outputs.append(out.getvalue())
    return json.loads(outputs[0]), " ".join(outputs[1].split())


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


def test_a_model_without_embeddings_learns_what_follows_a_song_and_every_later_stage_works(
    trained: tuple[Workspace, dict[str, Any], str],
) -> None:
    workspace, model, _ = trained
    for command in ("songs add", "retrieval", "rank --trees 5", "taste", "index"):
        run(workspace, command)
    report, _ = run(workspace, "evaluate --bootstrap-samples 0 --offsets 0 --max-curve-users 5")
    assert "songs" not in report["inputs"]
    models = {row["model"] for row in report["results"]}
    assert {"two-step", "taste", "popularity", "vstan"} <= models
    assert not {"item-knn", "average-0.9"} & models
    release, _ = run(workspace, "release create")
    assert release["models"] == model["id"]
    assert "songs" not in release
    hits = 0
    for last_song in range(5, SONGS, 6):
        history = f"s{last_song - 2},s{last_song - 1},s{last_song}"
        answer, _ = run(workspace, "recommend -k 3 --at", str(BEGIN + 21 * DAY), "--songs", history)
        hits += f"s{(last_song + 1) % SONGS}" in {song["song_id"] for song in answer["songs"]}
    assert hits >= 8  # of ten; fewer than one by chance
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
    continued, _ = run(workspace, f"train {settings} --from", trained[1]["id"])
    assert continued["inputs"]["from"] == trained[1]["id"]
    assert "songs" not in continued["inputs"]
    assert "note" not in continued
    assert continued["loss"] < 1.1 * trained[1]["loss"]


def test_the_dimension_is_that_of_the_embeddings_and_64_without(imported: Workspace, tmp_path: Path) -> None:
    without_embeddings, with_embeddings = (
        Workspace(shutil.copytree(imported.root, tmp_path / name)) for name in ("without", "given")
    )
    run(with_embeddings, "embed --no-split --dim 8 --epochs 1 --workers 1")
    dims = {
        workspace.uri: workspace.read_array(
            train(workspace, TrainConfig(**TRAIN_SETTINGS)).path("song_vectors.npy")
        ).shape[1]
        for workspace in (without_embeddings, with_embeddings)
    }
    assert dims == {without_embeddings.uri: 64, with_embeddings.uri: 8}
    assert train(with_embeddings, TrainConfig(**TRAIN_SETTINGS, dim=8)).metrics["plays"] > 0
    with pytest.raises(InputError, match=r"--dim is 16, but song embeddings .* have 8 dimensions; omit --dim, or run"):
        train(with_embeddings, TrainConfig(**TRAIN_SETTINGS, dim=16))


@pytest.mark.parametrize("song_table", ["mapped", "frozen"])
def test_a_song_table_that_keeps_its_embeddings_is_refused_without_any(imported: Workspace, song_table: str) -> None:
    with pytest.raises(InputError, match=f"--song-table {song_table} needs song embeddings, .*; run `rayrec embed`"):
        train(imported, TrainConfig(**TRAIN_SETTINGS, song_table=song_table))


def test_a_table_that_starts_at_random_is_the_same_for_the_same_seed(imported: Workspace, tmp_path: Path) -> None:
    vectors = []
    for name in ("one", "two"):
        workspace = Workspace(shutil.copytree(imported.root, tmp_path / name))
        model = train(workspace, TrainConfig(**TRAIN_SETTINGS))
        vectors.append(np.array(workspace.read_array(model.path("song_vectors.npy"))))
    np.testing.assert_array_equal(*vectors)
