"""Run training workers under Ray Train: replaced when they are lost, and never waited for in silence."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table

from rayrec.errors import RayrecError
from rayrec.storage.workspace import Workspace

LOGGER = logging.getLogger(__name__)
WORKER_FAILURES = 3  # lost training workers that are replaced before the job gives up
START_TRIES = 4  # times that Ray Train asks for the workers' resources in the minutes that it is given
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # environment variable: seconds of each try
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of the checkpoints that are whole
SECONDS_BEFORE_TELLING = 10.0  # that workers are waited for


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers that a training asks for."""

    workers: int
    cpus: float  # of each
    gpus: int = 0  # of each
    wait_minutes: float  # for room in the cluster

    @property
    def resources(self) -> dict[str, float]:
        """Of each worker, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def wanted(self) -> str:
        """What they need against what the cluster has, in words."""
        have, free = ray.cluster_resources(), ray.available_resources()
        parts = [
            f"{amount:g} {name} each (the cluster has {have.get(name, 0):g}, free {free.get(name, 0):g})"
            for name, amount in self.resources.items()
        ]
        return f"{self.workers} training worker{'s' * (self.workers > 1)} of {' and '.join(parts)}"


def run_workers(
    work: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    crew: Crew,
    workspace: Workspace,
    folder: str,
) -> None:
    """Run `work(arguments)` in every worker of the crew to its end; a lost worker makes all of them go on
    from the last checkpoint, which Ray Train keeps in `folder`/run.

    Raises `RayrecError` where workers fail more than `WORKER_FAILURES` times, and where the cluster
    has no room for them in time: Ray Train alone would ask for ever.
    """
    os.environ[START_TIMEOUT] = str(crew.wait_minutes * 60 / START_TRIES)
    trainer = TorchTrainer(
        work,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=crew.workers, use_gpu=bool(crew.gpus), resources_per_worker=crew.resources
        ),
        run_config=RunConfig(
            name="run",
            storage_path=workspace.full(folder),
            storage_filesystem=workspace.filesystem,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=WORKER_FAILURES, controller_failure_limit=START_TRIES - 1),
        ),
    )
    try:
        with _told_of_waiting(crew):
            trainer.fit()
    except ControllerError as error:
        raise RayrecError(
            f"training did not start within {crew.wait_minutes:g} minutes: it needs {crew.wanted()}; free some, "
            "use fewer --workers or more --wait-minutes, and run `rayrec train --resume`"
        ) from error
    except TrainingFailedError as error:
        cause = str(error).strip().splitlines()[-1]
        raise RayrecError(
            f"training failed: {cause}; `rayrec train --resume` continues from the last checkpoint"
        ) from error


@contextmanager
def _told_of_waiting(crew: Crew) -> Iterator[None]:
    """Say what the crew needs, once each time that it does not get it at once."""
    ended = threading.Event()

    def look() -> None:
        told = False
        while not ended.wait(SECONDS_BEFORE_TELLING):
            waits = _waits(crew)
            if waits and not told:
                LOGGER.warning("training waits at most %g minutes for resources: %s", crew.wait_minutes, crew.wanted())
            told = waits

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _waits(crew: Crew) -> bool:
    """True while Ray has found no room for workers like these."""
    bundles = [crew.resources] * crew.workers
    return any(
        group["state"] in ("PENDING", "RESCHEDULING") and list(group["bundles"].values()) == bundles
        for group in placement_group_table().values()
    )
