"""A training worker that logs the windows of each step, and can be killed at a given step.

Workers cannot import test modules: a test that uses it calls `ship` first.
"""

import json
import os
import signal
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.cloudpickle
import ray.train
from torch import Tensor

from rayrec.data.windows import Windows
from rayrec.jobs.trainer import LOOK_INTERVAL
from rayrec.model.training import TrainingStep

STEPS_BETWEEN_READS = 2  # small, for frequent checkpoints: with checkpoint_minutes=0 there is one each time

Step = tuple[str, int, int]  # phase, epoch, step


@dataclass(frozen=True)
class Death:
    """A planned kill of a process by SIGKILL, as by the out-of-memory killer; it happens only once."""

    at: Step  # the kill comes before this step
    driver: int = 0  # the process to kill; 0: the training worker itself
    rank: int = 0  # rank of the worker that does the kill
    marker: str = ""  # file that exists once the kill was done


def ship() -> None:
    """Make pickled objects of this module carry its code."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def watch(monkeypatch: pytest.MonkeyPatch, log: Path, death: Death | None = None, pause: float = 0.0) -> None:
    """Make trainings from now on log to the folder `log`, with each step `pause` seconds longer."""
    from rayrec.jobs import train as job

    ship()
    log.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv(LOOK_INTERVAL, "1")  # several checkpoints come between two checks
    if not hasattr(job, "_undisturbed"):  # a training in this process finds the module already patched
        monkeypatch.setattr(job, "_undisturbed", job.train_worker, raising=False)
    monkeypatch.setattr(job, "train_worker", partial(train_worker, str(log), death, pause))


def train_worker(log: str, death: Death | None, pause: float, arguments: dict[str, Any]) -> None:
    """Run the original training worker, with logging and the planned kill."""
    from rayrec.jobs import train as job
    from rayrec.jobs.trainer import WorkerHost
    from rayrec.model import epochs as fitting
    from rayrec.model.training import Training

    phases: list[str] = []
    epochs: list[int] = []
    original_windows, original_take, original_interval = WorkerHost.windows, Training.take, fitting.STEPS_BETWEEN_READS
    original_checkpoint = WorkerHost.checkpoint

    def write_line(line: dict[str, Any]) -> None:
        with Path(log, f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def checkpoint(host: Any, progress: Any, save: Any) -> bool:
        is_saved = original_checkpoint(host, progress, save)
        if is_saved:
            write_line({"saved": (progress.phase, progress.epoch, progress.step), "time": time.time()})
        return is_saved

    def windows(host: Any, phase: Any, epoch: int) -> Iterator[Windows]:
        phases.append(phase)
        epochs.append(epoch)
        return original_windows(host, phase, epoch)

    def take(training: Training, step: TrainingStep) -> Tensor:
        step_key = (phases[-1], epochs[-1], step.number)
        if death is not None and death.at == step_key and training.share.rank == death.rank:
            die(death)
        loss = original_take(training, step)
        time.sleep(pause)
        line = {
            "at": step_key,
            "rank": training.share.rank,
            "of": training.share.workers,
            "windows": window_fingerprints(step.windows),
        }
        line["node"] = ray.get_runtime_context().get_node_id()
        write_line(line)
        return loss

    WorkerHost.windows, WorkerHost.checkpoint = windows, checkpoint  # type: ignore[method-assign]
    Training.take = take  # type: ignore[method-assign]
    fitting.STEPS_BETWEEN_READS = STEPS_BETWEEN_READS
    try:
        getattr(job, "_undisturbed", job.train_worker)(arguments)
    finally:
        WorkerHost.windows, WorkerHost.checkpoint = original_windows, original_checkpoint  # type: ignore[method-assign]
        Training.take = original_take  # type: ignore[method-assign]
        fitting.STEPS_BETWEEN_READS = original_interval


def wait_for_checkpoint() -> None:
    """Wait, in a training worker, until Ray Train has stored a checkpoint; at most about 30 seconds."""
    committed = ray.train.CheckpointConsistencyMode.COMMITTED
    for _ in range(300):
        if ray.train.get_all_reported_checkpoints(committed, timeout_s=0.0):
            return
        time.sleep(0.1)


def die(death: Death) -> None:
    """Do the kill once Ray Train has stored a checkpoint; return at once if it was done before."""
    marker = Path(death.marker)
    if marker.exists():
        return
    wait_for_checkpoint()
    time.sleep(0.5)  # a later checkpoint may be in progress
    marker.write_text("killed")
    os.kill(death.driver or os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until this process ends with the cluster of the driver


def window_fingerprints(windows: Windows) -> list[int]:
    """Return a fingerprint of the input plays of each window that has any."""
    plays, fingerprints = windows.plays, []
    for start, count in zip(plays.offsets[:-1].tolist(), windows.inputs.tolist(), strict=True):
        if count:
            window = slice(start, start + count)
            fingerprints.append(zlib.crc32(np.concatenate([plays.songs[window], plays.played_at[window]]).tobytes()))
    return fingerprints


@dataclass(frozen=True)
class Seen:
    """The logs of all workers of a training, its restarts included."""

    windows: dict[Step, list[int]]  # sorted, of all workers, for the last time that a step was taken
    times: dict[Step, int]  # how often each step was taken
    workers: dict[Step, set[int]]  # the numbers of workers that took each step
    saved: list[Step]  # the next step of each checkpoint of the process that saved first, in order of time

    @property
    def again(self) -> list[Step]:
        """The steps that were taken more than once."""
        return [step for step, count in self.times.items() if count > 1]

    @property
    def may_be_taken_again(self) -> set[Step]:
        """The steps since the last checkpoint but one: Ray Train stores the last one while the next steps run."""
        order = {"selection": 0, "final": 1}
        phase, epoch, number = self.saved[-2]
        return {step for step in self.times if (order[step[0]], *step[1:]) >= (order[phase], epoch, number)}


def read_log(log: Path) -> Seen:
    """Read the logs in a folder."""
    files = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(log.glob("*.jsonl"))]
    saves = [saves for lines in files if (saves := [line for line in lines if "saved" in line])]
    first_saves = min(saves, key=lambda lines: lines[0]["time"], default=[])
    lines = [line for lines in files for line in lines if "at" in line]
    by_rank: dict[Step, dict[tuple[int, int], list[list[int]]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        by_rank[tuple(line["at"])][line["of"], line["rank"]].append(line["windows"])
    windows, times, workers = {}, {}, {}
    for step, parts in by_rank.items():
        num_workers = {num_workers for num_workers, _ in parts}
        complete_counts = [number for number in num_workers if all((number, rank) in parts for rank in range(number))]
        windows[step] = sorted(
            fingerprint for rank in range(complete_counts[0]) for fingerprint in parts[complete_counts[0], rank][-1]
        )
        times[step] = sum(max(len(parts.get((number, rank), [])) for rank in range(number)) for number in num_workers)
        workers[step] = num_workers
    saved = [tuple(line["saved"]) for line in first_saves]
    return Seen(windows=windows, times=times, workers=workers, saved=saved)
