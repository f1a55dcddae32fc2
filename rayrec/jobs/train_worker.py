"""What each training worker runs: the fit, its windows from Ray Data, its checkpoints to Ray Train.

Each worker runs a stream of its own over its shards of the data. A shared one, split by Ray as it
flows, would give each worker whichever rows come first: an order that no resumed run could repeat,
and uneven ends at which workers wait for each other (ray issues 63285 and 66085).
"""

import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train

from rayrec.data.dataset import Dataset
from rayrec.data.windows import Windows
from rayrec.errors import DivergedError, InputError
from rayrec.jobs.runtime import quiet_data
from rayrec.jobs.train_plan import (
    TrainPlan,
    diverged_file,
    read_validation,
    read_vectors,
    read_windows,
    selected_folder,
)
from rayrec.model.checkpoint import load_model, save_model, write_epochs, write_tensorboard
from rayrec.model.epochs import RECALL_AT, VALIDATION_FIGURES, Fit, FitData, FitProgress, Phase
from rayrec.model.network import TasteModel
from rayrec.model.training import StepReport
from rayrec.model.training_windows import ShardReader, plain_stream, split_batches
from rayrec.model.workers import Share

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt in malloc.h
KEPT_BYTES = 1 << 30
BLOCK_BYTES = 4 << 20  # of windows handed on at a time


def train_worker(arguments: dict[str, Any]) -> None:
    """What every training worker runs, and without workers this process, which needs neither Ray Train nor Ray Data.

    `arguments` holds the plan and the board: an actor, without workers a `LocalBoard`.
    """
    import torch

    torch.set_num_threads(1)
    plan: TrainPlan = arguments["plan"]
    share, device, checkpoint = Share(), "cuda" if plan.config.gpu else "cpu", None
    if plan.config.gpu and not plan.config.workers and not torch.cuda.is_available():
        raise InputError(
            "torch finds no GPU on this machine; omit --gpu, or train with --workers on a cluster that has one"
        )
    if plan.config.workers:
        quiet_data()
        keep_freed_memory()
        context = ray.train.get_context()
        share = Share(rank=context.get_world_rank(), workers=context.get_world_size())
        device, checkpoint = str(ray.train.torch.get_device()), ray.train.get_checkpoint()
    validation = None if plan.validation is None else read_validation(plan)
    data: dict[Phase, FitData] = {
        phase: FitData(
            vectors=read_vectors(plan, phase),
            counts=np.asarray(plan.workspace.read_array(plan.counts[phase])),
        )
        for phase in plan.ranges
    }
    host = WorkerHost(plan, share, board=arguments["board"])
    start = None if plan.start is None else load_model(plan.workspace, plan.start)
    fit = Fit(plan.model, plan.config, data, host, validation=validation, start=start, device=device, share=share)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            fit.resume(Path(folder))
    try:
        model = fit.run()
    except DivergedError as error:
        # Ends this worker in good order, or Ray Train would repeat steps that lead to the same end.
        if share.rank == 0:
            plan.workspace.write_json(diverged_file(plan), str(error))
        return
    save_model(plan.workspace, plan.folder, model, fit.known, share)
    if share.rank == 0:
        figures = summary(fit.progress)
        plan.workspace.write_json(f"{plan.folder}/figures.json", figures)
        write_epochs(plan.workspace, plan.folder, fit.progress.epochs)
        write_tensorboard(plan.workspace, plan.folder, fit.progress.epochs)


def keep_freed_memory() -> None:
    """Let the allocator of this process keep what is freed for the next step; does nothing where it is not glibc's.

    Each step frees hundreds of MB that the next one needs again. Handed back in between, they cost 10 of 70 CPU seconds
    per million plays at 256 windows a step, in the kernel, where the workers of a node wait for each other.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Where glibc refuses this one, the other alone would end glibc's own adjusting and cost more than both save.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def summary(done: FitProgress) -> dict[str, Any]:
    """The figures of a finished fit."""
    selected = [line for line in done.epochs if line["phase"] == "selection"]
    last = done.epochs[-1]
    return {
        "epochs": done.best_epoch + 1 if done.best_epoch >= 0 else last["epoch"] + 1,
        "loss": last["loss"],
        "plays": last["plays"],
        "plays_per_second": round(last["plays_per_second"]),
        **{name: selected[done.best_epoch].get(name) if selected else None for name in VALIDATION_FIGURES},
    }


class WorkerHost:
    """Gives a fit its windows and its checkpoints to Ray Train, where there are workers."""

    def __init__(self, plan: TrainPlan, share: Share, *, board: Any) -> None:
        self._plan, self._share = plan, share
        in_ray = bool(plan.config.workers)
        self._show, self._judge = (board.show.remote, board.judge.remote) if in_ray else (board.show, board.judge)
        self._plays, self._shown_at, self._began = 0, 0.0, time.monotonic()

    def windows(self, phase: Phase, epoch: int) -> Iterator[Windows]:
        """This worker's share of each batch."""
        plan = self._plan
        self._plays, self._began = 0, time.monotonic()
        reader = ShardReader(
            Dataset(plan.workspace), plan.ranges[phase], plan.config, read_windows(plan, phase), self._share, epoch
        )
        return window_stream(reader) if plan.config.workers else plain_stream(reader)

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        """Tell the driver, a few times a second."""
        self._plays += report.plays
        now = time.monotonic()
        if self._share.rank == 0 and now - self._shown_at > 0.3:
            rate = self._plays * self._share.workers / (now - self._began)
            note = f"{phase} epoch {report.epoch + 1} loss {loss:.3f} {rate:,.0f} plays/s"
            self._show(self._plays * self._share.workers, note)
            self._shown_at = now

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """Keep the network on which rankers learn."""
        save_model(self._plan.workspace, selected_folder(self._plan), model, known, self._share)

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> None:
        """Report to Ray Train, which copies the parts of all workers into one folder while the training goes on."""
        figures = progress.epochs[-1] if progress.epochs else {"epoch": progress.epoch}
        if self._plan.config.workers:
            folder = tempfile.mkdtemp(prefix="rayrec-")
            save(Path(folder))
            part = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(figures, checkpoint=part, checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC)
        if self._share.rank:
            return
        write_epochs(self._plan.workspace, self._plan.folder, progress.epochs)
        recall = figures.get(f"validation_recall@{RECALL_AT}")
        if recall is not None:
            self._judge(f"recall@{RECALL_AT} {recall:.3f}")


def window_stream(reader: ShardReader) -> Iterator[Windows]:
    """One worker's share of the batches of an epoch, read and cut by a Ray Data task, in order."""

    def tables(rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        return reader.tables()

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES  # else Ray gathers up to 128 MiB before it hands on
    # The task asks for no CPU: it is far cheaper than the training that it feeds, and would else wait for ever where
    # the workers hold all CPUs, after the loss of a node say.
    stream = ray.data.from_items([{"worker": 0}]).map_batches(tables, batch_size=1, num_cpus=0)
    arriving = stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1)
    yield from split_batches(arriving, reader.batches.steps)
