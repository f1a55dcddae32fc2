"""The train stage: Ray Data streams windows of histories into Ray Train.

Each worker runs a stream of its own over its share of every batch. A shared one, split by Ray as it
flows, would give each worker whichever rows come first: an order that no resumed run could repeat,
and uneven ends at which workers wait for each other (ray issues 63285 and 66085).
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
from ray.data import TaskPoolStrategy

from rayrec import artifacts
from rayrec.artifacts import Manifest
from rayrec.config import to_mapping
from rayrec.data.counting import SongCounter
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, Split
from rayrec.data.splits import validation_histories
from rayrec.data.windows import Windows, epoch_units
from rayrec.errors import InputError, MismatchError, RayrecError
from rayrec.jobs.board import new_board, shown
from rayrec.jobs.buckets import run_buckets
from rayrec.jobs.cluster import cluster_cpus, quiet_data, ray_cluster
from rayrec.jobs.node import run_on_node
from rayrec.jobs.trainer import Crew, run_workers
from rayrec.locking import writes
from rayrec.progress import progress
from rayrec.recommend.hybrid import MEMBERS
from rayrec.recommend.mixing import write_memory
from rayrec.songs.sessions import UNCUT
from rayrec.taste.checkpoint import save_model
from rayrec.taste.config import PLAY_COUNTS, FeatureSpec, ModelConfig, TrainConfig
from rayrec.taste.curves import write_epochs, write_tensorboard
from rayrec.taste.fitting import RECALL_AT, Fit, FitData, Phase, Progress, Validation
from rayrec.taste.model import TasteModel
from rayrec.taste.sequences import Sequences
from rayrec.taste.stream import UnitReader, split_batches
from rayrec.taste.training import Share, StepReport
from rayrec.workspace import Workspace

PLAYS_PER_UNIT = 200_000  # small buckets are read together until they hold about as many
# Tasks that read and cut windows for one worker at once. They ask for no CPU: they are far cheaper than the
# training that they feed, and would else wait for ever where the workers hold all CPUs, after the loss of a node say.
READERS = 2
BLOCK_BYTES = 4 << 20  # of windows handed on at a time


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """All that a training worker needs to know; plain values and paths."""

    workspace: Workspace
    folder: str  # of the model artifact
    config: TrainConfig
    model: ModelConfig
    ranges: dict[Phase, FitRange]
    vectors: dict[Phase, str]  # path of the song vectors of each phase
    counts: dict[Phase, str]  # path of the play counts of each phase
    validation: str | None  # path of the plays to predict


@writes("train")
def train(
    workspace: Workspace,
    config: TrainConfig,
    *,
    songs_id: str | None = None,
    split: Split | None = None,
    resume: bool = False,
    repeat: bool = False,
) -> Manifest:
    """Train the taste network; the models artifact. With `resume` a killed training goes on.

    Raises `MismatchError` for song vectors of another data set or split, `RayrecError` where Ray Train gives up.
    """
    dataset = Dataset(workspace)
    songs = artifacts.load(workspace, "songs", songs_id) if songs_id else artifacts.newest(workspace, "songs", "embed")
    inputs = {"dataset": dataset.manifest.id, "songs": songs.id} | ({"split": split.id} if split else {})
    _require_fit(songs, inputs)
    print_id = artifacts.fingerprint("train", _fingerprinted(config), inputs)
    model_id, complete = artifacts.new_id(workspace, "models", print_id, repeat=repeat)
    if complete:
        return artifacts.load(workspace, "models", model_id)
    manifest = Manifest(kind="models", id=model_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    began = time.monotonic()
    if resume and not config.workers:
        raise InputError("a training without workers keeps no checkpoint to go on from; leave out --resume")
    if not resume:
        workspace.delete(manifest.folder)
    with ray_cluster():
        plan = _prepare(dataset, config, songs, split, manifest)
        figures = _fit(plan) | (_remember(dataset, plan) if config.memory else {})
    metrics = {"seconds": round(time.monotonic() - began, 1), **figures, **_source_figures(dataset, config, split)}
    workspace.move(plan.counts["final"], manifest.path(PLAY_COUNTS))  # popular songs answer where no taste is known
    workspace.delete(manifest.path("run"))
    names = [name.removeprefix(manifest.folder + "/") for name in workspace.files(manifest.folder)]
    return artifacts.publish(workspace, Manifest(**{**asdict(manifest), "metrics": metrics}), names)


def _source_figures(dataset: Dataset, config: TrainConfig, split: Split | None) -> dict[str, Any]:
    """What the sequences were, and a warning where a split could not cut them."""
    kind = Sequences(dataset, config.source).kind
    return {"source": kind} | ({"warning": UNCUT} if split is not None and kind == "playlists" else {})


def _require_fit(songs: Manifest, inputs: dict[str, str]) -> None:
    for role in ("dataset", "split"):
        if songs.inputs.get(role) != inputs.get(role):
            raise MismatchError(
                f"song vectors {songs.id} were made from {role} {songs.inputs.get(role)}, the training is for "
                f"{inputs.get(role)}; run `rayrec embed` for it first"
            )


def _fingerprinted(config: TrainConfig) -> dict[str, Any]:
    """The settings that change what is learned; a resumed run may have other workers."""
    placement = ("workers", "gpu", "checkpoint_minutes", "wait_minutes")
    return {name: value for name, value in to_mapping(config).items() if name not in placement}


def model_config(dataset: Dataset, config: TrainConfig, embedding_dim: int) -> ModelConfig:
    """The shape of the network for a data set: features that it does not have are left out."""
    told = config.source == "histories"  # playlists are songs in their order and nothing else
    timed = told and dataset.manifest.times == "real"  # where times are positions, gaps and hours say nothing
    features = FeatureSpec(
        contexts=tuple(dataset.manifest.contexts) if config.contexts and told else (),
        gap=config.gaps and timed,
        request_gap=config.gaps and timed,
        hour=config.hours and timed,
        weekday=config.hours and timed,
        skipped=config.skips and told and dataset.manifest.has_skipped,
    )
    return ModelConfig(
        num_songs=dataset.num_songs,
        embedding_dim=embedding_dim,
        hidden_dim=config.hidden_dim,
        num_layers=config.num_layers,
        cell=config.cell,
        dropout=config.dropout,
        features=features,
        horizons=config.horizons,
        song_table=config.song_table,
        averages=config.averages,
    )


def _prepare(
    dataset: Dataset, config: TrainConfig, songs: Manifest, split: Split | None, manifest: Manifest
) -> TrainPlan:
    workspace = dataset.workspace
    ranges: dict[Phase, FitRange] = {"final": FitRange() if split is None else split.final}
    vectors: dict[Phase, str] = {"final": songs.path("vectors.npy")}
    if split is not None and split.has_validation and config.validation_plays:
        ranges["selection"] = split.selection
        chosen = "selection_vectors.npy" if "selection_vectors.npy" in songs.files else "vectors.npy"
        vectors["selection"] = songs.path(chosen)
    counts: dict[Phase, str] = {phase: manifest.path(f"run/{phase}_counts.npy") for phase in ranges}
    if not all(workspace.exists(path) for path in counts.values()):
        for phase, counted in zip(counts, _count_songs(dataset, config, list(ranges.values())), strict=True):
            workspace.write_array(counts[phase], counted)
    validation = None
    if split is not None and "selection" in ranges:
        validation = manifest.path("run/validation.parquet")
        if not workspace.exists(validation):
            table = validation_histories(dataset, split, config.validation_plays).to_arrow()
            workspace.write_table(validation, table)
        if not len(load_validation(workspace.read_table(validation), ranges["selection"], 1).plays):
            validation = None  # nothing to choose by: train for the epochs of the config
    dim = int(workspace.read_array(vectors["final"]).shape[1])
    return TrainPlan(
        workspace=workspace,
        folder=manifest.folder,
        config=config,
        model=model_config(dataset, config, dim),
        ranges=ranges,
        vectors=vectors,
        counts=counts,
        validation=validation,
    )


def _count_songs(dataset: Dataset, config: TrainConfig, ranges: list[FitRange]) -> list[np.ndarray]:
    if Sequences(dataset, config.source).kind == "playlists":
        entries = np.zeros(dataset.num_songs, dtype=np.int64)
        for songs, _ in dataset.read_playlists():
            entries += np.bincount(songs, minlength=dataset.num_songs)
        return [entries for _ in ranges]
    totals = [np.zeros(dataset.num_songs, dtype=np.int64) for _ in ranges]
    buckets = range(dataset.manifest.buckets)
    with progress("Counting plays", len(buckets)) as bar:
        for counts in run_buckets(SongCounter, buckets, arguments={"dataset": dataset, "ranges": ranges}):
            for total, (songs, plays) in zip(totals, counts, strict=True):
                # an empty bucket's arrays come back through Arrow as float64
                total[np.asarray(songs, dtype=np.int64)] += np.asarray(plays, dtype=np.int64)
            bar.advance()
    if not totals[0].any():
        raise RayrecError("the split leaves no plays to train on; make a split with fewer test and validation days")
    return totals


def load_validation(table: pa.Table, selection: FitRange, limit: int) -> Validation:
    """The plays outside `selection` that have an earlier play by the same user, at most `limit`."""
    histories = Histories.from_arrow(table)
    first = np.zeros(histories.num_plays, dtype=bool)
    first[histories.offsets[:-1]] = True
    plays = np.flatnonzero(~selection.covers(histories) & ~first)[:limit]
    return Validation(histories=histories, plays=plays)


def _fit(plan: TrainPlan) -> dict[str, Any]:
    board = new_board()
    config = plan.config
    crew = Crew(
        workers=config.workers,
        cpus=worker_cpus(config.workers),
        gpus=int(config.gpu),
        wait_minutes=config.wait_minutes,
    )
    with shown(board, "Training", float(plan.workspace.read_array(plan.counts["final"]).sum())):
        run_workers(_train_worker, {"plan": plan, "board": board}, crew, plan.workspace, plan.folder)
    figures = dict(json.loads(plan.workspace.read_bytes(f"{plan.folder}/figures.json")))
    if not figures["loss"]:
        raise RayrecError(
            f"nothing was learned: no sequence of the {config.source} holds a play and one {_offsets(config)} after "
            "it; give horizons with smaller offsets"
        )
    return figures


def _offsets(config: TrainConfig) -> str:
    return " or ".join(f"{horizon.min_offset} to {horizon.max_offset}" for horizon in config.horizons.values())


def selected_folder(plan: TrainPlan) -> str:
    """Where the best network of the selection phase lies while the training runs."""
    return f"{plan.folder}/run/selected"


def _remember(dataset: Dataset, plan: TrainPlan) -> dict[str, Any]:
    """Write the memory that the recommender mixes in; the weights as figures."""
    phase: Phase = "final" if plan.config.refit or plan.validation is None else "selection"
    validation = None if plan.validation is None else _read_validation(plan)
    ranges = (plan.ranges[phase], plan.ranges.get("selection"))
    (weights,) = run_on_node(write_memory, dataset, plan.folder, *ranges, validation, selected_folder(plan), cpus=1)
    return {"weights": dict(zip(MEMBERS, weights, strict=True))}


def _read_validation(plan: TrainPlan) -> Validation:
    table = plan.workspace.read_table(plan.validation or "")
    return load_validation(table, plan.ranges["selection"], plan.config.validation_plays)


def worker_cpus(workers: int) -> float:
    """CPUs of a training worker: one, or less where there are more workers than CPUs."""
    return min(1.0, int(100 * cluster_cpus() / max(1, workers)) / 100)


def _train_worker(arguments: dict[str, Any]) -> None:
    """What every training worker runs."""
    import torch

    torch.set_num_threads(1)
    quiet_data()
    plan: TrainPlan = arguments["plan"]
    context = ray.train.get_context()
    share = Share(rank=context.get_world_rank(), workers=context.get_world_size())
    validation = None if plan.validation is None else _read_validation(plan)
    data: dict[Phase, FitData] = {
        phase: FitData(
            vectors=np.asarray(plan.workspace.read_array(plan.vectors[phase])),
            counts=np.asarray(plan.workspace.read_array(plan.counts[phase])),
        )
        for phase in plan.ranges
    }
    host = _RayHost(plan, arguments["board"], share)
    device = str(ray.train.torch.get_device())
    fit = Fit(plan.model, plan.config, data, host, validation=validation, device=device, share=share)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            fit.resume(Path(folder))
    model = fit.run()
    if share.rank == 0:
        save_model(plan.workspace, plan.folder, model, fit.known)
        figures = summary(fit.progress)
        plan.workspace.write_json(f"{plan.folder}/figures.json", figures)
        write_epochs(plan.workspace, plan.folder, fit.progress.epochs)
        write_tensorboard(plan.workspace, plan.folder, fit.progress.epochs)


def summary(done: Progress) -> dict[str, Any]:
    """The figures of a finished fit."""
    selected = [line for line in done.epochs if line["phase"] == "selection"]
    last = done.epochs[-1]
    return {
        "epochs": done.best_epoch + 1 if done.best_epoch >= 0 else last["epoch"] + 1,
        "loss": last["loss"],
        "plays": last["plays"],
        "plays_per_second": round(last["plays_per_second"]),
        f"validation_recall@{RECALL_AT}": done.best_recall if selected else None,
    }


class _RayHost:
    """Gives a fit its windows from Ray Data and its checkpoints to Ray Train."""

    def __init__(self, plan: TrainPlan, board: Any, share: Share) -> None:
        self._plan, self._board, self._share = plan, board, share
        self._plays, self._shown_at, self._began = 0, 0.0, time.monotonic()

    def windows(self, phase: Phase, epoch: int) -> Iterator[Windows]:
        """A stream over all buckets in the order of the epoch, this worker's share of each batch."""
        config, dataset = self._plan.config, Dataset(self._plan.workspace)
        self._plays, self._began = 0, time.monotonic()
        stream = window_stream(dataset, self._plan.ranges[phase], config, self._share, epoch)
        return iter(stream)

    def stepped(self, phase: Phase, report: StepReport) -> None:
        """Tell the driver, a few times a second."""
        self._plays += report.plays
        now = time.monotonic()
        if self._share.rank == 0 and now - self._shown_at > 0.3:
            rate = self._plays * self._share.workers / (now - self._began)
            note = f"{phase} epoch {report.epoch + 1} loss {report.loss:.3f} {rate:,.0f} plays/s"
            self._board.show.remote(self._plays * self._share.workers, note)
            self._shown_at = now

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """Keep the network on which the weights of the memory are chosen."""
        if self._share.rank == 0:
            save_model(self._plan.workspace, selected_folder(self._plan), model, known)

    def checkpoint(self, progress: Progress, save: Callable[[Path], None]) -> None:
        """Report to Ray Train; the first worker's files are the checkpoint."""
        figures = progress.epochs[-1] if progress.epochs else {"epoch": progress.epoch}
        if self._share.rank:
            ray.train.report(figures)
            return
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            save(Path(folder))
            ray.train.report(figures, checkpoint=ray.train.Checkpoint.from_directory(folder))
        write_epochs(self._plan.workspace, self._plan.folder, progress.epochs)
        recall = figures.get(f"validation_recall@{RECALL_AT}")
        if recall is not None:
            self._board.judge.remote(f"recall@{RECALL_AT} {recall:.3f}")


def window_stream(
    dataset: Dataset, allowed: FitRange, config: TrainConfig, share: Share, epoch: int
) -> Iterator[Windows]:
    """One worker's share of the batches of an epoch, read and cut by Ray Data tasks, in order."""
    sequences = Sequences(dataset, config.source)
    per_unit = max(1.0, sequences.plays / sequences.units)
    units = epoch_units(sequences.units, max(1, round(PLAYS_PER_UNIT / per_unit)), seed=config.seed, epoch=epoch)
    reader = UnitReader(dataset, allowed, config, share, epoch)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES  # else Ray gathers up to 128 MiB in each task before it hands on
    rows = [{"unit": json.dumps(unit)} for unit in units]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        reader.tables, batch_size=1, num_cpus=0, compute=TaskPoolStrategy(size=min(READERS, len(rows)))
    )
    yield from split_batches(stream.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
