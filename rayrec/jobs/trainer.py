"""The workers of a training: their plan, the code that each of them runs, and how Ray Train runs and replaces them.

Each worker has its own stream of Ray Data over its shards of the data. If one stream were shared and split by Ray, each
worker would get the rows that arrive first. A resumed run could not repeat that order, and workers with fewer rows
would wait for others at the end (ray issues 63285 and 66085).
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import ExecutionResources
from ray.exceptions import RayActorError
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.util import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries, uniform_draws, user_hash
from rayrec.data.split import SELECTION_FOLDER, FitRange, Split, fit_range, fit_range_of, validation_histories
from rayrec.data.windows import WindowLengths, Windows
from rayrec.display import Progress, progress
from rayrec.errors import DivergedError, InputError, RayrecError
from rayrec.jobs.runtime import quiet_data, run_buckets
from rayrec.model.checkpoint import load_model, save_model, write_epochs, write_tensorboard
from rayrec.model.epochs import RECALL_AT, VALIDATION_METRICS, Fit, FitData, FitProgress, Phase, Validation
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import (
    DIM_WITHOUT_EMBEDDINGS,
    NEXT_PLAY,
    AnyHorizon,
    FeatureSpec,
    ModelConfig,
    TrainConfig,
)
from rayrec.model.training import StepReport
from rayrec.model.training_windows import Sequences, ShardReader, WindowCounter, split_batches, stream_batches
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

LOGGER = logging.getLogger(__name__)
EMBEDDINGS_FILE = "embeddings_file"  # metric: name of the file with the song embeddings that the network learned on
BLOCK_BYTES = 4 << 20  # bytes of windows in a block of the stream
AHEAD_BYTES = 64 << 20  # bytes of windows that may wait in the object store per worker
NODE_LABEL = "ray.io/node-id"  # label that Ray gives each node
EPOCH = "epoch"  # column: the epoch of a window
WORKER_FAILURES = 3  # lost training workers that are replaced before the job gives up
START_TRIES = 4  # times that Ray Train requests the workers' resources within `wait_minutes`
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # environment variable: seconds of each try
LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"  # environment variable: seconds between two checks of the workers
LOOK_SECONDS = "0.5"  # Ray Train's default is 2; it records checkpoints and notices the end of a training at a check
# Names of Ray Train's errors where the cluster has no room for the workers; Ray 2.60 has no public classes for them.
RESOURCE_ERRORS = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")
SECONDS_BEFORE_WARNING = 10.0  # of waiting for workers before a warning is logged


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """All that a training worker needs: plain values and paths."""

    workspace: Workspace
    folder: str  # folder of the model artifact
    config: TrainConfig
    model: ModelConfig
    ranges: dict[Phase, FitRange]  # the plays that each phase may see
    vectors: dict[Phase, str]  # path of the song embeddings of each phase; empty without embeddings
    counts: dict[Phase, str]  # path of the play counts of each phase
    windows: dict[Phase, tuple[str, str]]  # paths of the two arrays of `WindowLengths` of each phase
    validation: str | None  # path of the plays to predict; None without a selection phase
    start: str | None  # folder of the model to start from, or None


def plan_training(
    dataset: Dataset,
    config: TrainConfig,
    songs: Manifest | None,
    split: Split | None,
    manifest: Manifest,
    start: Manifest | None = None,
    *,
    dim: int,
) -> TrainPlan:
    """Return the plan of a training, and write what its workers read: play counts, window lengths, validation plays.

    The song tables, of `dim` dimensions, start from the song embeddings `songs`, or at random if `songs` is None. The
    start model `start` must not have seen the validation range, otherwise there is no selection phase. Raises
    `RayrecError` if the split leaves no plays to train on.
    """
    workspace = dataset.workspace
    ranges: dict[Phase, FitRange] = {"final": fit_range(split)}
    vectors: dict[Phase, str] = {} if songs is None else {"final": songs.path(_embeddings_file(songs, "final", start))}
    is_unseen = split is not None and (start is None or fit_range_of(dataset, start).is_within(split.selection))
    if split is not None and is_unseen and split.has_validation and config.validation_plays:
        ranges["selection"] = split.selection
        if songs is not None:
            vectors["selection"] = songs.path(_embeddings_file(songs, "selection", start))
    counts: dict[Phase, str] = {phase: _counts_file(manifest.folder, phase) for phase in ranges}
    windows: dict[Phase, tuple[str, str]] = {
        phase: (manifest.path(f"run/{phase}_inputs.npy"), manifest.path(f"run/{phase}_offsets.npy")) for phase in ranges
    }
    if not all(workspace.exists(path) for path in counts.values()):
        range_counts = _count_plays(dataset, config, list(ranges.values()))
        for phase, (plays, lengths) in zip(ranges, range_counts, strict=True):
            inputs_path, offsets_path = windows[phase]
            workspace.write_array(inputs_path, lengths.inputs)
            workspace.write_array(offsets_path, lengths.offsets)
            workspace.write_array(counts[phase], plays)
    validation_path = None
    if split is not None and "selection" in ranges:
        validation_path = manifest.path("run/validation.parquet")
        if not workspace.exists(validation_path):
            table = validation_histories(dataset, split, config.validation_plays).to_arrow()
            workspace.write_table(validation_path, table)
        table, horizon = workspace.read_table(validation_path), first_horizon(config)
        if not len(load_validation(table, ranges["selection"], 1, horizon).plays):
            validation_path = None  # nothing to choose by: train for the epochs of the config
    return TrainPlan(
        workspace=workspace,
        folder=manifest.folder,
        config=config,
        model=model_config(dataset, config, dim),
        ranges=ranges,
        vectors=vectors,
        counts=counts,
        windows=windows,
        validation=validation_path,
        start=None if start is None else start.folder,
    )


def _embeddings_file(songs: Manifest, phase: Phase, start: Manifest | None) -> str:
    """Return the name of the file in `songs` that holds the embeddings of a phase.

    The weights of `start` read only the embeddings that they were trained with: those of the other file come from
    another run of word2vec, whose dimensions mean something else.
    """
    if start is not None:
        return str(start.metrics.get(EMBEDDINGS_FILE, "vectors.npy"))
    return "selection_vectors.npy" if phase == "selection" and "selection_vectors.npy" in songs.files else "vectors.npy"


def table_dim(workspace: Workspace, config: TrainConfig, songs: Manifest | None) -> int:
    """Return the dimension of the song tables: that of the embeddings `songs`, or of the settings if `songs` is None.

    Raises `InputError` if `config.dim` is another dimension, or if `config.song_table` needs embeddings.
    """
    if songs is None:
        if config.song_table != "trained":
            raise InputError(
                f"--song-table {config.song_table} needs song embeddings, and the workspace has none; run `rayrec "
                "embed` first, or use --song-table trained"
            )
        return config.dim or DIM_WITHOUT_EMBEDDINGS
    dim = int(workspace.read_array(songs.path("vectors.npy")).shape[1])
    if config.dim not in (None, dim):
        raise InputError(
            f"--dim is {config.dim}, but song embeddings {songs.id} have {dim} dimensions; omit --dim, or run "
            f"`rayrec embed --dim {config.dim}` first"
        )
    return dim


def read_vectors(plan: TrainPlan, phase: Phase) -> np.ndarray:
    """Return float32 (M, D), memory-mapped: the song embeddings of a phase, of the first M songs of the catalog."""
    if phase not in plan.vectors:
        return np.zeros((0, plan.model.embedding_dim), dtype=np.float32)
    return np.asarray(plan.workspace.read_array(plan.vectors[phase]))


def model_config(dataset: Dataset, config: TrainConfig, embedding_dim: int) -> ModelConfig:
    """Return the shape of the network for a data set, without the features that the data set does not have."""
    has_context = config.source == "histories"  # playlists hold only songs in order
    has_times = has_context and dataset.manifest.times == "real"  # positions as times have no gaps or hours
    features = FeatureSpec(
        contexts=tuple(dataset.manifest.contexts) if config.contexts and has_context else (),
        gap=config.gaps and has_times,
        request_gap=config.gaps and has_times,
        hour=config.hours and has_times,
        weekday=config.hours and has_times,
        skipped=config.skips and has_context and dataset.manifest.has_skipped,
        pause_hours=config.pause_hours if config.gaps and has_times else 0.0,
    )
    return config.network_shape(num_songs=dataset.num_songs, embedding_dim=embedding_dim, features=features)


def read_windows(plan: TrainPlan, phase: Phase) -> WindowLengths:
    """Return the lengths of the windows of a phase."""
    inputs, offsets = (np.asarray(plan.workspace.read_array(path)) for path in plan.windows[phase])
    return WindowLengths(inputs=inputs, offsets=offsets)


def _count_plays(
    dataset: Dataset, config: TrainConfig, ranges: list[FitRange]
) -> list[tuple[np.ndarray, WindowLengths]]:
    """Return for each range the plays of each song, int64 (N,), and the window lengths.

    Raises `RayrecError` if the first range has no plays.
    """
    unit_count = Sequences(dataset, config.source).units
    totals = [np.zeros(dataset.num_songs, dtype=np.int64) for _ in ranges]
    input_lengths = [[np.zeros(0, dtype=np.int64)] * unit_count for _ in ranges]
    arguments = {"dataset": dataset, "config": config, "ranges": ranges}
    with progress("Counting plays", unit_count) as bar:
        for unit, counts in run_buckets(WindowCounter, range(unit_count), arguments=arguments):
            for range_index, (songs, plays, windows) in enumerate(counts):
                totals[range_index][songs] += plays
                input_lengths[range_index][unit] = windows
            bar.advance()
    if not totals[0].any():
        raise RayrecError(
            "the split leaves no plays to train on; run `rayrec split` with fewer --test-days and --validation-days"
        )
    return [
        (total, WindowLengths.of_units(unit_lengths)) for total, unit_lengths in zip(totals, input_lengths, strict=True)
    ]


def first_horizon(config: TrainConfig) -> AnyHorizon:
    """Return the horizon by which the best epoch is chosen: the short one, if there is one."""
    return next(iter(config.horizons.values()))


def load_validation(table: pa.Table, selection: FitRange, limit: int, horizon: AnyHorizon = NEXT_PLAY) -> Validation:
    """Return at most `limit` plays outside `selection` whose user has an earlier play, and a play in the horizon.

    They are drawn from all users of the table, with equal chances for each play; a lower limit draws some of the same.
    """
    histories = Histories.from_arrow(table)
    is_first = np.zeros(histories.num_plays, dtype=bool)
    is_first[histories.offsets[:-1]] = True
    plays = np.flatnonzero(~selection.covers(histories) & ~is_first)
    starts, ends = horizon.spans(histories, Queries.before_plays(histories, plays))
    plays = plays[starts < ends]
    rows = histories.rows[plays]
    draws = uniform_draws(user_hash(histories.user_ids, salt="epochs ")[rows], plays - histories.offsets[rows])
    drawn_plays = np.sort(plays[np.argsort(draws, kind="stable")[:limit]])
    return Validation(histories=histories, plays=drawn_plays, horizon=horizon)


def read_validation(plan: TrainPlan) -> Validation:
    """Return the plays by which the best epoch is chosen."""
    table = plan.workspace.read_table(plan.validation or "")
    return load_validation(table, plan.ranges["selection"], plan.config.validation_plays, first_horizon(plan.config))


def selected_folder(plan: TrainPlan) -> str:
    """Return the folder of the best network of the selection phase, for rankers: it has not seen the validation range.

    It is where the model holds it: a move of a file above 5 GiB fails on S3.
    """
    return f"{plan.folder}/{SELECTION_FOLDER}"


def diverged_file(plan: TrainPlan) -> str:
    """Return the path where the first worker writes the message of a training that diverged."""
    return f"{plan.folder}/run/diverged.json"


def train_worker(arguments: dict[str, Any]) -> None:
    """Run one training worker; without workers this process runs it, without Ray Train and Ray Data.

    `arguments` holds the plan and the board: a `Board` actor, or without workers a `LocalBoard`.
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
        # Return instead of raising: otherwise Ray Train would repeat the steps, which diverge again.
        if share.rank == 0:
            plan.workspace.write_json(diverged_file(plan), str(error))
        return
    save_model(plan.workspace, plan.folder, model, fit.known, share)
    if share.rank == 0:
        metrics = fit_metrics(fit.progress)
        plan.workspace.write_json(f"{plan.folder}/figures.json", metrics)
        write_epochs(plan.workspace, plan.folder, fit.progress.epochs)
        write_tensorboard(plan.workspace, plan.folder, fit.progress.epochs)


def fit_metrics(fit_progress: FitProgress) -> dict[str, Any]:
    """Return the figures of a finished fit."""
    selection_epochs = [epoch for epoch in fit_progress.epochs if epoch["phase"] == "selection"]
    last_epoch = fit_progress.epochs[-1]
    return {
        "epochs": fit_progress.best_epoch + 1 if fit_progress.best_epoch >= 0 else last_epoch["epoch"] + 1,
        "loss": last_epoch["loss"],
        "plays": last_epoch["plays"],
        "targets": last_epoch["targets"],
        "plays_per_second": round(last_epoch["plays_per_second"]),
        **{
            name: selection_epochs[fit_progress.best_epoch].get(name) if selection_epochs else None
            for name in VALIDATION_METRICS
        },
    }


class WorkerHost:
    """Provides a fit with windows, shows its progress, and gives its checkpoints to Ray Train if there are workers."""

    def __init__(self, plan: TrainPlan, share: Share, *, board: Any) -> None:
        self._plan, self._share = plan, share
        has_workers = bool(plan.config.workers)
        self._show, self._show_validation = board.show, board.show_validation
        if has_workers:
            self._show, self._show_validation = self._show.remote, self._show_validation.remote
        self._plays, self._shown_at, self._started = 0, 0.0, time.monotonic()
        self._stream: WindowStream | None = None
        self._stream_phase: Phase | None = None  # phase of the stream
        self._checkpoint = ""  # name of the last checkpoint given to Ray Train

    def windows(self, phase: Phase, epoch: int) -> Iterator[Windows]:
        """Return this worker's share of each batch of an epoch."""
        config = self._plan.config
        self._plays, self._started = 0, time.monotonic()
        if not config.workers:
            return stream_batches(self._reader(phase), epoch)
        if self._stream is None or self._stream_phase != phase:
            if self._stream is not None:
                self._stream.close()
            self._stream, self._stream_phase = WindowStream(self._reader(phase), range(epoch, config.epochs)), phase
        return self._stream.epoch(epoch)

    def _reader(self, phase: Phase) -> ShardReader:
        plan = self._plan
        dataset, lengths = Dataset(plan.workspace), read_windows(plan, phase)
        return ShardReader(dataset, plan.ranges[phase], plan.config, lengths, self._share)

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        """Send the progress to the board, a few times per second."""
        self._plays += report.plays
        now = time.monotonic()
        if self._share.rank == 0 and now - self._shown_at > 0.3:
            rate = self._plays * self._share.workers / (now - self._started)
            status_line = f"{phase} epoch {report.epoch + 1} loss {loss:.3f} {rate:,.0f} plays/s"
            self._show(self._plays * self._share.workers, status_line)
            self._shown_at = now

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """Save the network with which rankers are trained."""
        save_model(self._plan.workspace, selected_folder(self._plan), model, known, self._share)

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> bool:
        """Give a checkpoint to Ray Train, which copies the parts of all workers into one folder during the training.

        Return False if there are no workers, or if Ray Train is still storing the previous checkpoint.
        """
        metrics = progress.epochs[-1] if progress.epochs else {"epoch": progress.epoch}
        if not self._share.rank:
            write_epochs(self._plan.workspace, self._plan.folder, progress.epochs)
            recall = metrics.get(f"validation_recall@{RECALL_AT}")
            if recall is not None:
                self._show_validation(f"recall@{RECALL_AT} {recall:.3f}")
        if not self._plan.config.workers:
            return False
        # Ray Train records one checkpoint at each check of the workers. Others would wait in a queue, and the loss of a
        # worker would lose all of them.
        if self._share.total(float(self._is_storing())):
            return False
        self._checkpoint = f"checkpoint-{uuid4().hex}"
        folder = tempfile.mkdtemp(prefix="rayrec-")
        save(Path(folder))
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=self._checkpoint,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )
        return True

    def _is_storing(self) -> bool:
        """Return True until Ray Train has recorded the last checkpoint.

        Only the first worker checks, because Ray Train uses its name of the checkpoint.
        """
        if self._share.rank or not self._checkpoint:
            return False
        reported_checkpoints = ray.train.get_all_reported_checkpoints(
            ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=0.0
        )
        return all(Path(reported.checkpoint.path).name != self._checkpoint for reported in reported_checkpoints)


class WindowStream:
    """One worker's share of the batches of all epochs, read and cut into windows by Ray Data tasks, in order.

    There is one task per epoch, one task at a time. One stream for all epochs keeps one process busy. With a stream per
    epoch, Ray ends the idle process and starts another, whose imports take 3 CPU seconds from the training.
    """

    def __init__(self, reader: ShardReader, epochs: range) -> None:
        """Nothing is read before the first batch of an epoch is requested."""

        def read_tables(rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
            epoch = int(rows[EPOCH][0])
            for table in reader.tables(reader.batches(epoch)):
                yield table.append_column(EPOCH, pa.array(np.full(len(table), epoch, dtype=np.int32)))

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=AHEAD_BYTES)
        context.target_max_block_size = BLOCK_BYTES  # otherwise Ray collects up to 128 MiB per block
        # The task requests no CPU: it is far cheaper than the training that it feeds, and would otherwise wait forever
        # if the workers hold all CPUs, for example after the loss of a node. Without a CPU it would run on any node,
        # the head too, so it is kept on that of its worker, with which it ends.
        own_node = {NODE_LABEL: ray.get_runtime_context().get_node_id()}
        stream = ray.data.from_items([{EPOCH: epoch} for epoch in epochs], override_num_blocks=len(epochs)).map_batches(
            read_tables, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=1), label_selector=own_node
        )
        self._reader = reader
        self._incoming_tables = iter(stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        self._pending_table: pa.Table | None = None  # arrived, but not used yet

    def epoch(self, epoch: int) -> Iterator[Windows]:
        """Yield the batches of an epoch. Call it in ascending order of epochs; unread earlier batches are skipped."""
        return split_batches(self._epoch_tables(epoch), self._reader.batches(epoch).steps)

    def close(self) -> None:
        """Stop the tasks that read ahead."""
        self._incoming_tables.close()

    def _epoch_tables(self, epoch: int) -> Iterator[pa.Table]:
        while (table := self._next_table()) is not None:
            table_epoch = table.column(EPOCH)[0].as_py()  # all rows of a table have the same epoch
            if table_epoch > epoch:
                return
            self._pending_table = None
            if table_epoch == epoch:
                yield table

    def _next_table(self) -> pa.Table | None:
        if self._pending_table is None:
            self._pending_table = next((table for table in self._incoming_tables if len(table)), None)
        return self._pending_table


@ray.remote
class Board:
    """An actor that a worker writes its progress to and that the driver reads."""

    def __init__(self) -> None:
        self._plays, self._status_line, self._validation = 0.0, "", ""

    def show(self, plays: float, status_line: str) -> None:
        """Set the number of plays done in the current epoch, and a short status line."""
        self._plays, self._status_line = plays, status_line

    def show_validation(self, text: str) -> None:
        """Set the text about the last validation."""
        self._validation = text

    def read(self) -> tuple[float, str]:
        """Return the plays done, and the text to show next to the progress bar."""
        return self._plays, f"{self._status_line} {self._validation}".strip()


class LocalBoard:
    """The board of a training in this process: it updates a progress bar at once."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._shown_plays, self._validation = bar, 0.0, ""

    def show(self, plays: float, status_line: str) -> None:
        """As in `Board`."""
        self._bar.advance(plays - self._shown_plays, f"{status_line} {self._validation}".strip())
        self._shown_plays = plays

    def show_validation(self, text: str) -> None:
        """As in `Board`."""
        self._validation = text


def new_board() -> Any:
    """Return a board on the driver's node, because another node may be lost during the job."""
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Board.options(num_cpus=0, scheduling_strategy=driver_node).remote()  # type: ignore[attr-defined]


@contextmanager
def shown(board: Any, total: float) -> Iterator[None]:
    """Draw the board as a progress bar on stderr during a block; `total` is the number of plays of a full bar."""
    stop = threading.Event()

    def draw() -> None:
        with progress("Training", total) as bar:
            shown_plays = 0.0
            while not stop.wait(0.5):
                try:
                    plays, status_line = ray.get(board.read.remote())
                except RayActorError:
                    return  # a lost board must not fail the training
                bar.advance(plays - shown_plays, status_line)
                shown_plays = plays

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


@dataclass(frozen=True, kw_only=True)
class WorkerRequest:
    """The workers that a training requests."""

    workers: int
    cpus: float  # CPUs per worker
    gpus: int = 0  # GPUs per worker
    wait_minutes: float  # minutes to wait until the cluster has free resources

    @property
    def resources(self) -> dict[str, float]:
        """The resources of each worker, by Ray's names."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def describe(self) -> str:
        """Return the resources that the workers need, and those of the cluster, in words."""
        total, available = ray.cluster_resources(), ray.available_resources()
        parts = [
            f"{amount:g} {name} each ({available.get(name, 0):g} of {total.get(name, 0):g} in the cluster are free)"
            for name, amount in self.resources.items()
        ]
        return f"{self.workers} training worker{'s' * (self.workers > 1)} with {' and '.join(parts)}"


def run_workers(
    work: Callable[[dict[str, Any]], None],
    arguments: dict[str, Any],
    request: WorkerRequest,
    workspace: Workspace,
    folder: str,
) -> None:
    """Run `work(arguments)` in every worker until it returns.

    If a worker is lost, all workers continue from the last checkpoint, which Ray Train keeps in `folder`/run.

    Raises `RayrecError` if workers fail more than `WORKER_FAILURES` times, if Ray Train's controller fails, and if the
    cluster has no room for the workers within `request.wait_minutes`: Ray Train itself would try forever.
    """
    os.environ.setdefault(LOOK_INTERVAL, LOOK_SECONDS)
    os.environ[START_TIMEOUT] = str(request.wait_minutes * 60 / START_TRIES)
    trainer = TorchTrainer(
        work,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=request.workers,
            use_gpu=bool(request.gpus),
            resources_per_worker=request.resources,
            placement_strategy="PACK" if request.gpus else "SPREAD",  # workers on CPUs share a node's memory
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
        with _report_waiting(request):
            trainer.fit()
    except TrainingFailedError as error:
        if isinstance(error, ControllerError) and type(error.controller_failure).__name__ in RESOURCE_ERRORS:
            raise RayrecError(
                f"training did not start within {request.wait_minutes:g} minutes: it needs {request.describe()}; free "
                "resources, use fewer --workers or more --wait-minutes, and run `rayrec train --resume`"
            ) from error
        cause = str(error).strip().splitlines()[-1]
        raise RayrecError(
            f"training failed: {cause}; `rayrec train --resume` continues from the last checkpoint"
        ) from error


def _counts_file(folder: str, phase: Phase) -> str:
    return f"{folder}/run/{phase}_counts.npy"


def has_counts_of(workspace: Workspace, folder: str, num_songs: int) -> bool:
    """Return True if the unfinished training in `folder` has counted the plays of `num_songs` songs."""
    path = _counts_file(folder, "final")
    return workspace.exists(path) and len(workspace.read_array(path)) == num_songs


def has_checkpoint(workspace: Workspace, folder: str) -> bool:
    """Return True if Ray Train has recorded a checkpoint of the training that `run_workers` runs in `folder`."""
    try:
        ray.train.Result.from_path(f"{workspace.full(folder)}/run", storage_filesystem=workspace.filesystem)
    except RuntimeError:  # Ray Train has no record in the folder
        return False
    return True


@contextmanager
def _report_waiting(request: WorkerRequest) -> Iterator[None]:
    """Log the resources that the workers need, once each time that they have to wait for them.

    Ray Train has no public callback for this: `UserCallback` runs only after reports and errors of running workers.
    """
    ended = threading.Event()

    def warn_if_waiting() -> None:
        was_waiting = False
        while not ended.wait(SECONDS_BEFORE_WARNING):
            is_waiting = _is_waiting(request)
            if is_waiting and not was_waiting:
                LOGGER.warning(
                    "training waits at most %g minutes for resources: %s", request.wait_minutes, request.describe()
                )
            was_waiting = is_waiting

    thread = threading.Thread(target=warn_if_waiting, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _is_waiting(request: WorkerRequest) -> bool:
    """Return True while Ray has found no room for workers with these resources."""
    bundles = [request.resources] * request.workers
    return any(
        group["state"] in ("PENDING", "RESCHEDULING") and list(group["bundles"].values()) == bundles
        for group in placement_group_table().values()
    )
