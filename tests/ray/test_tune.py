"""A sweep finds the settings that the planted world rewards, and continues after it was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rayrec.config import from_mapping
from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.errors import InputError
from rayrec.jobs.generate import generate
from rayrec.jobs.job_config import TuneConfig
from rayrec.jobs.tune import tune
from rayrec.model.epochs import SELECTION_METRIC
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import listing, load_manifest
from rayrec.storage.workspace import Workspace

SPACE = """
[embed]
dim = [8, 16]
epochs = 2
workers = 1

[train]
learning_rate = [1e-9, 0.02]
hidden_dim = 16
negatives = 50
long = []
epochs = 2
workers = 0
"""
TRIALS = 4
DEADLINE = 240  # seconds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Workspace:
    """A small generated data set with a split."""
    folder = tmp_path_factory.mktemp("tune")
    workspace = Workspace(folder / "workspace")
    generate(workspace, GenerateConfig(users=150, songs=80, artists=12, genres=4, plays=25, days=60, buckets=2))
    split_dataset(workspace, SplitConfig(test_days=15, validation_days=10))
    return workspace


@pytest.fixture(scope="module")
def space(world: Workspace) -> str:
    path = Path(world.uri).parent / "space.toml"
    path.write_text(SPACE)
    return str(path)


def _split(workspace: Workspace) -> Split:
    return split_dataset(workspace, SplitConfig(test_days=15, validation_days=10))


def _trial_rows(workspace: Workspace) -> list[dict[str, object]]:
    paths = [path for path in workspace.files("tunings") if path.endswith("trials.json")]
    rows: list[dict[str, object]] = workspace.read_json(paths[0]) if paths else []
    return rows


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_finds_the_network_that_learns(world: Workspace, space: str) -> None:
    split = _split(world)
    command = [sys.executable, "-m", "rayrec_cli.main", "--workspace", world.uri, "tune", space]
    with open(f"{space}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            started = time.monotonic()
            while len(_trial_rows(world)) < 1 and process.poll() is None and time.monotonic() - started < DEADLINE:
                time.sleep(0.05)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    kept_rows = _trial_rows(world)
    assert 1 <= len(kept_rows) < TRIALS, Path(f"{space}.log").read_text()
    reported_trials: list[int] = []
    tuning = tune(world, TuneConfig(), space, split=split, on_trial=lambda row, _: reported_trials.append(row["trial"]))
    assert reported_trials == list(range(len(kept_rows) + 1, TRIALS + 1))
    assert tuning.metrics["trials"][: len(kept_rows)] == kept_rows  # the seconds too, so they were not repeated
    recalls = {
        (row["embed.dim"], row["train.learning_rate"]): row[SELECTION_METRIC] for row in tuning.metrics["trials"]
    }
    assert len(recalls) == TRIALS
    assert min(recalls[dim, 0.02] for dim in (8, 16)) > max(recalls[dim, 1e-9] for dim in (8, 16))
    assert tuning.metrics["best"]["train"]["learning_rate"] == 0.02
    assert tuning.metrics["best_ndcg"] == max(recalls.values())


@pytest.mark.slow
def test_a_sweep_leaves_a_table_the_best_settings_and_no_models(world: Workspace, space: str) -> None:
    tuning = tune(world, TuneConfig(), space, split=_split(world))  # the sweep of the test before
    assert load_manifest(world, "tunings", tuning.id) == tuning
    assert set(tuning.files) == {"trials.json", "trials.csv", "best.toml"}
    lines = world.read_bytes(tuning.path("trials.csv")).decode().splitlines()
    assert lines[0] == f"trial,embed.dim,train.learning_rate,{SELECTION_METRIC},epochs,seconds,songs"
    assert len(lines) == 1 + TRIALS
    from rayrec.config import read_toml

    best = read_toml(world.full(tuning.path("best.toml")))
    assert best == tuning.metrics["best"]
    from_mapping(TrainConfig, best["train"], "best.toml")
    assert listing(world, "models") == []
    assert [songs.config["dim"] for songs in listing(world, "songs")] == [best["embed"]["dim"]]


def test_a_sweep_without_a_validation_range_is_refused(world: Workspace, space: str) -> None:
    with pytest.raises(InputError, match="tune needs a validation range"):
        tune(world, TuneConfig(), space, split=None)
