"""The train stage: Ray Data streams windows of histories into Ray Train."""

import json
import time
from dataclasses import asdict
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.embeddings.sessions import UNCUT
from rayrec.errors import InputError, MismatchError, RayrecError
from rayrec.jobs.board import new_board, shown
from rayrec.jobs.cluster import cluster_cpus, ray_cluster
from rayrec.jobs.node import run_on_node
from rayrec.jobs.train_plan import TrainPlan, make_plan, read_validation, selected_folder
from rayrec.jobs.train_worker import train_worker
from rayrec.jobs.trainer import Crew, run_workers
from rayrec.model.fit import Phase
from rayrec.model.popularity_prior import log_prior
from rayrec.model.train_config import PLAY_COUNTS, TrainConfig
from rayrec.model.training_sequences import Sequences
from rayrec.recommend.hybrid import MEMBERS
from rayrec.recommend.mixing import write_memory
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace


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
        return artifacts.reuse(workspace, "models", model_id)
    manifest = Manifest(kind="models", id=model_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    began = time.monotonic()
    if resume and not config.workers:
        raise InputError("Training without workers writes no checkpoints; omit --resume or use --workers 1")
    if not resume:
        workspace.delete(manifest.folder)
    with ray_cluster():
        plan = make_plan(dataset, config, songs, split, manifest)
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
                f"song embeddings {songs.id} were made from {role} {songs.inputs.get(role)}, not from "
                f"{inputs.get(role)}; run `rayrec embed` first"
            )


def _fingerprinted(config: TrainConfig) -> dict[str, Any]:
    """The settings that change what is learned; a resumed run may have other workers."""
    placement = ("workers", "gpu", "checkpoint_minutes", "wait_minutes")
    return {name: value for name, value in to_mapping(config).items() if name not in placement}


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
        run_workers(train_worker, {"plan": plan, "board": board}, crew, plan.workspace, plan.folder)
    figures = dict(json.loads(plan.workspace.read_bytes(f"{plan.folder}/figures.json")))
    if not figures["loss"]:
        raise RayrecError(
            f"no training example: no sequence of the {config.source} holds a play and one {_offsets(config)} plays "
            "later; use horizons with smaller offsets"
        )
    return figures


def _offsets(config: TrainConfig) -> str:
    return " or ".join(f"{horizon.min_offset} to {horizon.max_offset}" for horizon in config.horizons.values())


def _remember(dataset: Dataset, plan: TrainPlan) -> dict[str, Any]:
    """Write the memory that the recommender mixes in; its weights as figures."""
    phase: Phase = "final" if plan.config.refit or plan.validation is None else "selection"
    validation = None if plan.validation is None else read_validation(plan)
    ranges = (plan.ranges[phase], plan.ranges.get("selection"))
    prior = log_prior(plan.workspace.read_array(plan.counts[phase]), plan.config.long_correction)
    (mix,) = run_on_node(write_memory, dataset, plan.folder, *ranges, validation, selected_folder(plan), prior, cpus=1)
    weights = {"heard": mix.heard, "new": mix.new}
    return {"weights": {songs: dict(zip(MEMBERS, values, strict=True)) for songs, values in weights.items()}}


def worker_cpus(workers: int) -> float:
    """CPUs of a training worker: one, or less where there are more workers than CPUs."""
    return min(1.0, int(100 * cluster_cpus() / max(1, workers)) / 100)
