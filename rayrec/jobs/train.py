"""The train stage: Ray Data streams windows of histories into Ray Train."""

import json
import time
from dataclasses import asdict, replace
from typing import Any, Literal

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, fit_range_of, split_flag
from rayrec.display import progress
from rayrec.embeddings.word2vec import PLAYLIST_WARNING
from rayrec.errors import DivergedError, InputError, LeakError, MismatchError, RayrecError
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import cluster_cpus, is_private_cluster, ray_cluster
from rayrec.jobs.trainer import (
    EMBEDDINGS_FILE,
    LocalBoard,
    TrainPlan,
    WorkerRequest,
    diverged_file,
    has_checkpoint,
    has_counts_of,
    new_board,
    plan_training,
    run_workers,
    shown,
    table_dim,
    train_worker,
)
from rayrec.model.epochs import Phase
from rayrec.model.train_config import MODEL_CONFIG, PLAY_COUNTS, ModelConfig, TrainConfig
from rayrec.model.training_windows import Sequences
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace, artifact_dir

Unfinished = Literal["ask", "resume", "restart"]
RANDOM_START = "the workspace has no song embeddings (`rayrec embed`): the song tables started at random"


@writes("train")
def train(
    workspace: Workspace,
    config: TrainConfig,
    *,
    songs_id: str | None = None,
    split: Split | None = None,
    from_id: str | None = None,
    unfinished: Unfinished = "ask",
    repeat: bool = False,
) -> Manifest:
    """Train the taste network; return the models artifact.

    The song tables start from the song embeddings `songs_id`, by default those requested last. In a workspace without
    song embeddings they start at random, with `config.dim` dimensions, and the metrics hold a `note` that says so.

    With `from_id`, training starts from the weights of that model, with its song embeddings; new songs start at random.
    This data set must be the model's or descend from it. If that model was fit on the validation range, no epoch can be
    chosen there: training then takes a quarter of the epochs of that model, at most `config.epochs`.

    `unfinished` says what to do if a training of the same settings was stopped: "resume" continues from its last
    checkpoint, "restart" starts over, "ask" raises `InputError`, so that a second start does not lose hours of work.

    Raises `MismatchError` for song embeddings or a start model of another data set, split or shape; `LeakError` for a
    start model that was fit on the test range; `InputError` for a horizon in days on data without times, for a
    dimension other than that of the embeddings, and without embeddings for a `song_table` other than "trained";
    `DivergedError` if the loss or a weight is not finite; `RayrecError` if Ray Train gives up.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    if config.long_days and dataset.manifest.times != "real":
        raise InputError("the data set has no times, which a horizon in days needs; use --long instead of --long-days")
    start = None if from_id is None else artifacts.load_manifest(workspace, "models", from_id)
    if start is not None:
        if songs_id is not None:
            raise InputError("--from uses the song embeddings of its model; omit --songs")
        _require_start(dataset, start, split)
        songs_id = start.inputs.get("songs")
    songs = artifacts.load_manifest(workspace, "songs", songs_id) if songs_id is not None else None
    if songs is None and start is None:
        songs = artifacts.latest(workspace, "songs")
    input_artifacts: dict[str, Manifest | Split | None] = {"songs": songs, "split": split}
    inputs = {"dataset": dataset.manifest.id} | {
        role: artifact.id for role, artifact in input_artifacts.items() if artifact is not None
    }
    if start is not None:
        inputs["from"] = start.id
    elif songs is not None:
        _require_same_inputs(dataset, songs, inputs)
    dim = table_dim(workspace, config, songs)
    # Compaction and described songs change the id of the data set, but not the plays.
    fingerprint_inputs = {**inputs, "dataset": dataset.manifest.plays_id}
    fingerprint_id = artifacts.fingerprint("train", _learning_settings(config), fingerprint_inputs)
    model_id, complete = artifacts.new_id(workspace, "models", fingerprint_id, repeat=repeat)
    if complete:
        workspace.delete(f"{artifact_dir('models', model_id)}/run")  # left by a run killed just after it was published
        return artifacts.reuse(workspace, "models", model_id)
    manifest = Manifest(kind="models", id=model_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.monotonic()
    if (
        unfinished == "restart"
        or not has_checkpoint(workspace, manifest.folder)
        or not has_counts_of(workspace, manifest.folder, dataset.num_songs)  # songs were described since
    ):
        workspace.delete(manifest.folder)
    elif unfinished == "ask":
        raise InputError(
            f"a training of the same settings was stopped and left a checkpoint ({manifest.folder}); continue it "
            "with --resume, or delete it and start over with --restart"
        )
    elif not config.workers:
        raise InputError("--workers 0 cannot resume a checkpoint; give --workers 1 or more, or --restart")
    with ray_cluster():
        plan = plan_training(dataset, config, songs, split, manifest, start, dim=dim)
        if start is not None:
            _require_shape(plan, start)
            if plan.validation is None:
                quarter_epochs = -(-int(start.metrics["epochs"]) // 4)
                plan = replace(plan, config=config.replace(epochs=min(config.epochs, quarter_epochs)))
        fit_metrics = _fit(plan)
    metrics = {
        "seconds": round(time.monotonic() - started, 1),
        **fit_metrics,
        **_source_metrics(dataset, config, split),
    }
    if songs is None and start is None:
        metrics["note"] = RANDOM_START
    if plan.vectors:  # for `--from`
        last_phase: Phase = "final" if config.refit or plan.validation is None else "selection"
        metrics[EMBEDDINGS_FILE] = plan.vectors[last_phase].rpartition("/")[2]
    # For popular songs for users without a taste vector. A copy, because a resumed training needs the counts in run/.
    workspace.write_array(manifest.path(PLAY_COUNTS), workspace.read_array(plan.counts["final"]))
    all_names = [name.removeprefix(manifest.folder + "/") for name in workspace.files(manifest.folder)]
    file_names = [name for name in all_names if not name.startswith("run/")]
    model = artifacts.publish(workspace, Manifest(**{**asdict(manifest), "metrics": metrics}), file_names)
    workspace.delete(manifest.path("run"))  # last, because a killed run is continued from the checkpoints in it
    return model


def _require_start(dataset: Dataset, start: Manifest, split: Split | None) -> None:
    """Raise `MismatchError` for a start model of other data, `LeakError` for one that was fit on the test range."""
    if not dataset.descends_from(start.inputs["dataset"]):
        raise MismatchError(
            f"model {start.id} was trained on data set {start.inputs['dataset']}; data set {dataset.manifest.id} "
            "does not extend it; train without --from"
        )
    if split is None or not split.has_test:
        return
    has_test_range_moved = split.protocol == "last-fraction" and dataset.manifest.id != start.inputs["dataset"]
    if has_test_range_moved or not fit_range_of(dataset, start).is_within(split.final):
        raise LeakError(
            f"model {start.id} was fit on plays of the test range of split {split.id}; start from a model that was fit "
            "before that range, or train without --from"
        )


def _require_shape(plan: TrainPlan, start: Manifest) -> None:
    """Raise `MismatchError` if the settings or the data need a network of another shape than the start model."""
    start_shape = ModelConfig.from_json(plan.workspace.read_json(start.path(MODEL_CONFIG)))
    new_shape, old_shape = asdict(plan.model), asdict(start_shape)
    for name, value in new_shape.items():
        if name not in ("num_songs", "logit_scales") and old_shape[name] != value:
            raise MismatchError(
                f"model {start.id} has {name} {old_shape[name]}, but this training has {value}; use the settings of "
                "the model, or train without --from"
            )


def _source_metrics(dataset: Dataset, config: TrainConfig, split: Split | None) -> dict[str, Any]:
    """Return the kind of the training sequences, and a warning if a split cannot cut them."""
    kind = Sequences(dataset, config.source).kind
    return {"source": kind} | ({"warning": PLAYLIST_WARNING} if split is not None and kind == "playlists" else {})


def _require_same_inputs(dataset: Dataset, songs: Manifest, inputs: dict[str, str]) -> None:
    has_same_plays = dataset.plays_id_of(songs.inputs.get("dataset", "")) == dataset.manifest.plays_id
    for role, is_same in (("dataset", has_same_plays), ("split", songs.inputs.get("split") == inputs.get("split"))):
        if not is_same:
            raise MismatchError(
                f"song embeddings {songs.id} were made from {role} {songs.inputs.get(role)}, not from "
                f"{inputs.get(role)}; run `rayrec embed{split_flag(inputs.get('split'))}` first"
            )


def _learning_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that change what is learned. The others may differ when a training is resumed."""
    excluded_names = ("workers", "gpu", "compiled", "checkpoint_minutes", "wait_minutes")
    return {name: value for name, value in to_mapping(config).items() if name not in excluded_names}


def _fit(plan: TrainPlan) -> dict[str, Any]:
    config, play_count = plan.config, float(plan.workspace.read_array(plan.counts["final"]).sum())
    if config.workers:
        board = new_board()
        request = WorkerRequest(
            workers=config.workers,
            cpus=worker_cpus(config.workers),
            gpus=int(config.gpu),
            wait_minutes=config.wait_minutes,
        )
        with shown(board, play_count):
            run_workers(train_worker, {"plan": plan, "board": board}, request, plan.workspace, plan.folder)
    else:
        with progress("Training", play_count) as bar:
            train_worker({"plan": plan, "board": LocalBoard(bar)})
    if plan.workspace.exists(diverged_file(plan)):
        message = plan.workspace.read_json(diverged_file(plan))
        plan.workspace.delete(plan.folder)  # its checkpoints would diverge again
        raise DivergedError(message)
    metrics = dict(json.loads(plan.workspace.read_bytes(f"{plan.folder}/figures.json")))
    if not metrics.pop("targets"):
        raise RayrecError(
            f"no training sequence (source: {config.source}) is long enough for a horizon of "
            f"{' or '.join(map(str, config.horizons.values()))}; use smaller offsets in --short, --long or "
            "--long-days"
        )
    return metrics


def worker_cpus(workers: int) -> float:
    """Return the CPUs per training worker: 1, or less if a private cluster has fewer CPUs than workers.

    A cluster that was joined adds nodes for workers that find no CPU.
    """
    return min(1.0, int(100 * cluster_cpus() / max(1, workers)) / 100) if is_private_cluster() else 1.0
