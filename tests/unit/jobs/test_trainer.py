"""What a training requests of Ray Train, and that the error says why Ray Train gave up."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import ray.data
from ray.train import ControllerError

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.errors import RayrecError
from rayrec.jobs import trainer
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.train import worker_cpus
from rayrec.jobs.trainer import LOOK_INTERVAL, START_TIMEOUT, WindowStream, WorkerRequest, load_validation, run_workers
from rayrec.storage.workspace import Workspace


class RecordingTrainer:
    """Stands for Ray Train; keeps what the last training requested."""

    requested: dict[str, Any]

    def __init__(self, *_: Any, **requested: Any) -> None:
        RecordingTrainer.requested = requested

    def fit(self) -> None:
        pass


class FailingTrainer:
    """Stands for Ray Train whose controller cannot write to the object storage."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def fit(self) -> None:
        raise ControllerError(OSError("Access Denied"))


@pytest.fixture
def recording_trainer(monkeypatch: pytest.MonkeyPatch) -> type[RecordingTrainer]:
    monkeypatch.setattr(trainer, "TorchTrainer", RecordingTrainer)
    for name in (LOOK_INTERVAL, START_TIMEOUT):
        monkeypatch.setenv(name, "1")  # `run_workers` sets them for the process
    return RecordingTrainer


@pytest.mark.parametrize(("gpus", "placement"), [(0, "SPREAD"), (1, "PACK")])
def test_workers_on_cpus_are_spread_over_the_nodes_whose_memory_they_need(
    workspace: Workspace, recording_trainer: type[RecordingTrainer], gpus: int, placement: str
) -> None:
    request = WorkerRequest(workers=4, cpus=1.0, gpus=gpus, wait_minutes=15)
    run_workers(lambda _: None, {}, request, workspace, "model")
    assert recording_trainer.requested["scaling_config"].placement_strategy == placement


@pytest.mark.parametrize(("address", "cpus"), [("auto", 1.0), ("local", 0.25)])
def test_workers_share_cpus_only_on_a_cluster_of_their_own_which_does_not_grow(
    monkeypatch: pytest.MonkeyPatch, address: str, cpus: float
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0})
    with ray_cluster(address):
        assert worker_cpus(64) == cpus
        assert worker_cpus(8) == 1.0


class RecordingRows:
    """Stands for a data set of Ray Data; keeps what its tasks request."""

    requested: dict[str, Any]

    def map_batches(self, *_: Any, **requested: Any) -> "RecordingRows":
        self.requested = requested
        return self

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        return iter(())


def test_windows_are_read_on_the_node_of_their_worker_and_not_on_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RecordingRows()
    monkeypatch.setattr(ray.data, "from_items", lambda *_, **__: rows)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node of the worker"))
    WindowStream(Mock(), range(2))
    assert rows.requested["label_selector"] == {"ray.io/node-id": "node of the worker"}


def test_epochs_are_chosen_by_plays_of_all_users_and_fewer_plays_are_some_of_them() -> None:
    moments = [0, *range(10, 60)]  # ms; one play to learn from, then 50 of the validation range
    user_ids = [f"user {number:03d}" for number in range(100)]
    table = Histories.from_lists([range(51)] * 100, [moments] * 100, user_ids=user_ids).to_arrow()
    fit_range = FitRange(before=10)
    validation = load_validation(table, fit_range, 1_000)
    play_counts = np.bincount(validation.histories.rows[validation.plays], minlength=100)
    assert play_counts.sum() == 1_000
    assert 400 < play_counts[50:].sum() < 600
    fewer_plays = load_validation(table, fit_range, 200).plays
    assert len(fewer_plays) == 200
    assert set(fewer_plays.tolist()) <= set(validation.plays.tolist())


def test_an_error_of_the_storage_is_not_reported_as_a_lack_of_resources(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "TorchTrainer", FailingTrainer)
    monkeypatch.setattr(WorkerRequest, "describe", lambda _: "2 CPUs")
    for name in (LOOK_INTERVAL, START_TIMEOUT):
        monkeypatch.setenv(name, "1")  # `run_workers` sets them for the process
    request = WorkerRequest(workers=2, cpus=1.0, wait_minutes=15)
    with pytest.raises(RayrecError, match="training failed: Access Denied; `rayrec train --resume`") as error_info:
        run_workers(lambda _: None, {}, request, workspace, "model")
    assert "did not start" not in str(error_info.value)
