"""Run training workers under Ray Train: replaced when they are lost, and never waited for in silence."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrec.errors import RayrecError
from rayrec.progress import Progress, progress
from rayrec.storage.workspace import Workspace

LOGGER = logging.getLogger(__name__)
WORKER_FAILURES = 3  # lost training workers that are replaced before the job gives up
START_TRIES = 4  # times that Ray Train asks for the workers' resources in the minutes that it is given
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # environment variable: seconds of each try
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of the checkpoints that are whole
SECONDS_BEFORE_TELLING = 10.0  # that workers are waited for


@ray.remote
class Board:
    """An actor that a worker writes to and the driver looks at."""

    def __init__(self) -> None:
        self._plays, self._note, self._judged = 0.0, "", ""

    def show(self, plays: float, note: str) -> None:
        """Plays done in the epoch under way, and a few words on it."""
        self._plays, self._note = plays, note

    def judge(self, text: str) -> None:
        """What the last validation said."""
        self._judged = text

    def look(self) -> tuple[float, str]:
        """Plays done, and what to show behind the bar."""
        return self._plays, f"{self._note} {self._judged}".strip()


class LocalBoard:
    """What a training in this process writes to: it draws at once on a bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._drawn, self._judged = bar, 0.0, ""

    def show(self, plays: float, note: str) -> None:
        """As in `Board`."""
        self._bar.advance(plays - self._drawn, f"{note} {self._judged}".strip())
        self._drawn = plays

    def judge(self, text: str) -> None:
        """As in `Board`."""
        self._judged = text


def new_board() -> Any:
    """A board on the driver's node: another node may be lost while the job goes on."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Board.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextmanager
def shown(board: Any, title: str, total: float) -> Iterator[None]:
    """Draw the board as a bar on stderr while the block runs; `total` is what is shown as all of it."""
    stop = threading.Event()

    def draw() -> None:
        with progress(title, total) as bar:
            drawn = 0.0
            while not stop.wait(0.5):
                try:
                    plays, note = ray.get(board.look.remote())
                except RayActorError:
                    return  # a bar is no reason to fail
                bar.advance(plays - drawn, note)
                drawn = plays

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


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
