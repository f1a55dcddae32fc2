"""What a training's workers need to know, and how it is made ready: shape, ranges, counts, validation plays."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange, Split, load_split, validation_histories
from rayrec.data.windows import WindowLengths
from rayrec.errors import RayrecError
from rayrec.jobs.runtime import run_buckets
from rayrec.model.epochs import Phase, Validation
from rayrec.model.train_config import NEXT_PLAY, AnyHorizon, FeatureSpec, ModelConfig, TrainConfig
from rayrec.model.training_windows import Sequences, WindowCounter
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace


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
    windows: dict[Phase, tuple[str, str]]  # paths of the arrays of its `WindowLengths`
    validation: str | None  # path of the plays to predict
    start: str | None  # folder of the model to start from


def plan_training(
    dataset: Dataset,
    config: TrainConfig,
    songs: Manifest,
    split: Split | None,
    manifest: Manifest,
    start: Manifest | None = None,
) -> TrainPlan:
    """The plan of a training, with what its workers read prepared: play counts, and the plays to choose by.

    Nothing is chosen by plays that the model to start from, `start`, was fit on. Raises `RayrecError` where the
    split leaves no plays to train on.
    """
    workspace = dataset.workspace
    ranges: dict[Phase, FitRange] = {"final": FitRange() if split is None else split.final}
    vectors: dict[Phase, str] = {"final": songs.path("vectors.npy")}
    unseen = split is not None and (start is None or fit_range_of(workspace, start).is_within(split.selection))
    if split is not None and unseen and split.has_validation and config.validation_plays:
        ranges["selection"] = split.selection
        chosen = "selection_vectors.npy" if "selection_vectors.npy" in songs.files else "vectors.npy"
        vectors["selection"] = songs.path(chosen)
    counts: dict[Phase, str] = {phase: manifest.path(f"run/{phase}_counts.npy") for phase in ranges}
    windows: dict[Phase, tuple[str, str]] = {
        phase: (manifest.path(f"run/{phase}_inputs.npy"), manifest.path(f"run/{phase}_offsets.npy")) for phase in ranges
    }
    if not all(workspace.exists(path) for path in counts.values()):
        counted = _count(dataset, config, list(ranges.values()))
        for phase, (plays, lengths) in zip(ranges, counted, strict=True):
            inputs, offsets = windows[phase]
            workspace.write_array(inputs, lengths.inputs)
            workspace.write_array(offsets, lengths.offsets)
            workspace.write_array(counts[phase], plays)
    validation = None
    if split is not None and "selection" in ranges:
        validation = manifest.path("run/validation.parquet")
        if not workspace.exists(validation):
            table = validation_histories(dataset, split, config.validation_plays).to_arrow()
            workspace.write_table(validation, table)
        table, horizon = workspace.read_table(validation), first_horizon(config)
        if not len(load_validation(table, ranges["selection"], 1, horizon).plays):
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
        windows=windows,
        validation=validation,
        start=None if start is None else start.folder,
    )


def fit_range_of(workspace: Workspace, model: Manifest) -> FitRange:
    """The plays that a model was fit on."""
    if "split" not in model.inputs:
        return FitRange()
    split = load_split(workspace, model.inputs["split"])
    return split.final if model.config["refit"] else split.selection


def read_vectors(plan: TrainPlan, phase: Phase) -> np.ndarray:
    """float32 (M, D): the song vectors of a phase, memory-mapped; songs that are newer than they are have none."""
    return np.asarray(plan.workspace.read_array(plan.vectors[phase]))


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
        input_table=config.has_input_table,
    )


def read_windows(plan: TrainPlan, phase: Phase) -> WindowLengths:
    """The lengths of the windows of a phase."""
    inputs, offsets = (np.asarray(plan.workspace.read_array(path)) for path in plan.windows[phase])
    return WindowLengths(inputs=inputs, offsets=offsets)


def _count(dataset: Dataset, config: TrainConfig, ranges: list[FitRange]) -> list[tuple[np.ndarray, WindowLengths]]:
    """For each range the plays of each song, int64 (N,), and the windows. Raises `RayrecError` where all are empty."""
    units = Sequences(dataset, config.source).units
    totals = [np.zeros(dataset.num_songs, dtype=np.int64) for _ in ranges]
    inputs = [[np.zeros(0, dtype=np.int64)] * units for _ in ranges]
    arguments = {"dataset": dataset, "config": config, "ranges": ranges}
    with progress("Counting plays", units) as bar:
        for unit, counts in run_buckets(WindowCounter, range(units), arguments=arguments):
            for number, (songs, plays, windows) in enumerate(counts):
                totals[number][songs] += plays
                inputs[number][unit] = windows
            bar.advance()
    if not totals[0].any():
        raise RayrecError("the split leaves no plays to train on; use fewer test and validation days")
    return [(total, WindowLengths.of_units(each)) for total, each in zip(totals, inputs, strict=True)]


def first_horizon(config: TrainConfig) -> AnyHorizon:
    """The horizon that epochs are chosen by: the short one, where there is one."""
    return next(iter(config.horizons.values()))


def load_validation(table: pa.Table, selection: FitRange, limit: int, horizon: AnyHorizon = NEXT_PLAY) -> Validation:
    """At most `limit` plays outside `selection`, with an earlier play by the same user and one in the horizon."""
    histories = Histories.from_arrow(table)
    first = np.zeros(histories.num_plays, dtype=bool)
    first[histories.offsets[:-1]] = True
    plays = np.flatnonzero(~selection.covers(histories) & ~first)
    begin, end = horizon.spans(histories, Queries.before_plays(histories, plays))
    return Validation(histories=histories, plays=plays[begin < end][:limit], horizon=horizon)


def read_validation(plan: TrainPlan) -> Validation:
    """The plays to choose the best epoch by."""
    table = plan.workspace.read_table(plan.validation or "")
    return load_validation(table, plan.ranges["selection"], plan.config.validation_plays, first_horizon(plan.config))


def selected_folder(plan: TrainPlan) -> str:
    """Where the best network of the selection phase lies while the training runs."""
    return f"{plan.folder}/run/selected"


def diverged_file(plan: TrainPlan) -> str:
    """Where the first worker leaves the message of a training that diverged."""
    return f"{plan.folder}/run/diverged.json"
