"""Why Ray Train gave up is what the error says."""

from typing import Any

import pytest
from ray.train import ControllerError

from rayrec.errors import RayrecError
from rayrec.jobs import trainer
from rayrec.jobs.trainer import LOOK_INTERVAL, START_TIMEOUT, WorkerRequest, run_workers
from rayrec.storage.workspace import Workspace


class FailingTrainer:
    """Stands for Ray Train whose controller cannot write to the object storage."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def fit(self) -> None:
        raise ControllerError(OSError("Access Denied"))


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
