"""Training workers without free resources: a message names the resources, and the wait has a time limit."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
import ray.cloudpickle
import ray.train

from rayrec.errors import RayrecError
from rayrec.jobs import trainer
from rayrec.jobs.trainer import WorkerRequest, run_workers
from rayrec.storage.workspace import Workspace

pytestmark = pytest.mark.usefixtures("cluster")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


@ray.remote
class Holder:
    """Occupies CPUs of the cluster."""

    def ready(self) -> bool:
        return True


@contextmanager
def occupied_cpus(cpus: int, seconds: float = 600.0) -> Iterator[None]:
    """Occupy `cpus` CPUs of the cluster during a block, for at most `seconds`."""
    holder: Any = Holder.options(num_cpus=cpus).remote()  # type: ignore[attr-defined]
    ray.get(holder.ready.remote())
    timer = threading.Timer(seconds, ray.kill, [holder])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        ray.kill(holder)


def work(arguments: dict[str, Any]) -> None:
    Workspace(arguments["folder"]).write_json("done.json", ray.train.get_context().get_world_size())


def run(workspace: Workspace, request: WorkerRequest) -> None:
    run_workers(work, {"folder": workspace.root}, request, workspace, "model")


@pytest.mark.slow  # waits for CPUs
def test_workers_without_a_free_cpu_fail_with_a_message_of_what_they_need(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "SECONDS_BEFORE_WARNING", 1.0)
    started = time.monotonic()
    with occupied_cpus(2), caplog.at_level(logging.WARNING), pytest.raises(RayrecError) as error_info:
        run(workspace, WorkerRequest(workers=2, cpus=1.0, wait_minutes=0.1))
    assert time.monotonic() - started < 240  # Ray Train alone would wait without limit
    need = "2 training workers with 1 CPU each (0 of 2 in the cluster are free)"
    assert f"did not start within 0.1 minutes: it needs {need}; free resources" in str(error_info.value)
    messages = [record.getMessage() for record in caplog.records if record.name == trainer.__name__]
    assert messages[0] == f"training waits at most 0.1 minutes for resources: {need}"
    assert not workspace.exists("done.json")


def test_a_gpu_that_no_node_has_is_named(workspace: Workspace) -> None:
    with pytest.raises(
        RayrecError, match=r"1 training worker with 1 CPU each .* and 1 GPU each \(0 of 0 in the cluster"
    ):
        run(workspace, WorkerRequest(workers=1, cpus=1.0, gpus=1, wait_minutes=0.05))


@pytest.mark.slow
def test_workers_start_once_there_is_room(workspace: Workspace) -> None:
    with occupied_cpus(2, seconds=8.0):
        run(workspace, WorkerRequest(workers=2, cpus=1.0, wait_minutes=2.0))
    assert workspace.read_json("done.json") == 2
