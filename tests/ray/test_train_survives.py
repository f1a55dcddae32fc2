"""A killed training learns from the same plays as an undisturbed one, and ends with the same network."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import witness
from trainings import CONFIG, make_world, only_split, weights
from witness import Death, Seen, read_log

from rayrec.data.split import Split
from rayrec.jobs.train import train
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

TOLERANCE = 1e-4  # of weights: another number of workers adds gradients in another order
PAUSE = 0.2  # seconds added to each step, so that checkpoints are stored meanwhile


@dataclass(frozen=True)
class World:
    """A data set, and the model and the logged windows of an undisturbed training."""

    workspace: Workspace
    split: Split
    model: Manifest
    training_log: Seen


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> World:
    folder = tmp_path_factory.mktemp("survive")
    workspace, split = make_world(folder / "workspace")
    with pytest.MonkeyPatch.context() as patch:
        witness.watch(patch, folder / "undisturbed")
        model = train(workspace, CONFIG.replace(workers=0), split=split)
    return World(workspace, split, model, read_log(folder / "undisturbed"))


def difference(world: World, workspace: Workspace, manifest: Manifest) -> float:
    """Return the largest difference of any weight from the undisturbed training."""
    expected, actual = weights(world.workspace, world.model), weights(workspace, manifest)
    assert actual.keys() == expected.keys()
    return max(float(np.abs(actual[name] - expected[name]).max()) for name in expected)


def test_an_epoch_sees_every_window_once(world: World) -> None:
    windows = {
        step: fingerprints for step, fingerprints in world.training_log.windows.items() if step[:2] == ("selection", 0)
    }
    first_epoch = [fingerprint for fingerprints in windows.values() for fingerprint in fingerprints]
    assert len(first_epoch) == len(set(first_epoch)) > 100
    second_epoch = [
        fingerprint
        for step, fingerprints in world.training_log.windows.items()
        if step[:2] == ("selection", 1)
        for fingerprint in fingerprints
    ]
    assert sorted(first_epoch) == sorted(second_epoch)
    assert set(world.training_log.times.values()) == {1}


def check_training_log(world: World, training_log: Seen, died_at: tuple[str, int, int]) -> None:
    """Fail unless all steps saw the undisturbed windows, and only steps since the last checkpoint but one repeat."""
    assert training_log.windows == world.training_log.windows
    assert len(training_log.saved) >= 2
    assert set(training_log.again) <= training_log.may_be_taken_again
    assert died_at not in training_log.again


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_training_worker_killed_within_an_epoch_is_replaced(
    world: World, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    death = Death(at=("selection", 1, 5), rank=workers - 1, marker=str(tmp_path / "killed"))
    witness.watch(monkeypatch, tmp_path / "log", death, pause=PAUSE)
    model = train(world.workspace, CONFIG.replace(workers=workers), split=world.split, repeat=True)
    assert (tmp_path / "killed").exists()
    check_training_log(world, read_log(tmp_path / "log"), death.at)
    assert difference(world, world.workspace, model) <= (0.0 if workers == 1 else TOLERANCE)
    recall = "validation_recall@20"
    assert model.metrics[recall] == world.model.metrics[recall]


DRIVER = """
import os, sys
import pytest, witness
from pathlib import Path
from dataclasses import replace
from trainings import CONFIG, only_split
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.train import train
from rayrec.storage.workspace import Workspace

workspace = Workspace(sys.argv[1])
death = witness.Death(at=("selection", 1, 5), driver=os.getpid(), marker=sys.argv[3])
witness.watch(pytest.MonkeyPatch(), Path(sys.argv[2]), death, pause=float(sys.argv[4]))
with ray_cluster(num_cpus=2):
    train(workspace, CONFIG, split=only_split(workspace), repeat=True)
"""


@pytest.mark.slow
def test_a_killed_job_is_resumed_with_as_many_or_other_workers(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("RAY_ADDRESS", None)
    paths = [world.workspace.root, str(tmp_path / "log"), str(tmp_path / "killed")]
    command = [sys.executable, "-c", DRIVER, *paths, str(PAUSE)]
    with subprocess.Popen(command, env=environment) as driver:
        driver.wait(timeout=300)
    assert driver.returncode == -signal.SIGKILL
    for workers in (1, 2):
        folder = tmp_path / f"resumed-{workers}"
        shutil.copytree(world.workspace.root, folder)
        log = tmp_path / f"log-{workers}"
        shutil.copytree(tmp_path / "log", log)
        workspace = Workspace(folder)
        witness.watch(monkeypatch, log)
        model = train(
            workspace,
            CONFIG.replace(workers=workers),
            split=only_split(workspace),
            unfinished="resume",
            repeat=True,
        )
        training_log = read_log(log)
        check_training_log(world, training_log, ("selection", 1, 5))
        assert training_log.workers[("selection", 0, 0)] == {1}
        assert training_log.workers[("selection", 1, 5)] == {workers}
        assert difference(world, workspace, model) <= (0.0 if workers == 1 else TOLERANCE)
        assert model.metrics["validation_recall@20"] == world.model.metrics["validation_recall@20"]
