"""How the stages scale: time with workers on one machine and with plays, memory with users and with songs."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from rayrec.bench import rounds
from rayrec.bench.bench_config import MemoryBenchConfig, ScaleBenchConfig
from rayrec.bench.rounds import RATE_OF, Measured, MemoryWatch, PlainProcess, growth
from rayrec.bench.stage_benches import bench_dataset, count_window_plays, untrained_model, word2vec_scaling
from rayrec.data.dataset import Dataset
from rayrec.display import progress
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.embed import embed
from rayrec.jobs.import_data import import_data
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

EXTRAPOLATED_PLAYS = 1e9
MICROSECONDS = 1e6
CHAIN = "chain"  # folder of the workspace in which the stages run
# Few buckets, so that batches and pools are full in the smaller data set too: further growth comes from the users.
MEMORY_BUCKETS = 4
SONGS_WORKERS = 4  # on one node, which share a table of songs


@dataclass(frozen=True, kw_only=True)
class ChainRun:
    """Times and memory of one run of the stages."""

    stages: dict[str, Measured]  # plays and seconds; of embed in all epochs, of train in the steady part of one epoch
    peaks_mb: dict[str, float]  # role -> MiB of the driver and of the largest worker


def run_chain(
    plays_folder: str, workspace: Workspace, workers: int, embed_epochs: int, batch: int, seed: int
) -> ChainRun:
    """Run the stages on the Parquet files in `plays_folder`, on a new cluster of `workers` CPUs.

    Must be called in a separate process, which has no connection to Ray. Leaves the workspace empty.
    """
    os.environ.pop("RAY_ADDRESS", None)
    settings = EmbedConfig(source="histories", epochs=embed_epochs, workers=workers, seed=seed)
    with ray_cluster(num_cpus=workers), MemoryWatch() as watch:
        started = time.perf_counter()
        dataset = import_data(workspace, ImportConfig(format="parquet", paths=(plays_folder,)))
        stages = {"import": Measured(dataset.plays, time.perf_counter() - started)}
        stages["embed"] = _measure_stage(
            lambda: embed(workspace, settings), lambda artifact: float(artifact.metrics["tokens"])
        )
        model = train(workspace, TrainConfig(epochs=1, workers=workers, batch=batch, seed=seed))
        stages["train"] = Measured(model.metrics["plays"], model.metrics["plays"] / model.metrics["plays_per_second"])
        stages["taste"] = _measure_stage(
            lambda: compute_tastes(workspace, TasteConfig()), lambda artifact: float(artifact.metrics["plays"])
        )
    workspace.delete("")
    return ChainRun(stages=stages, peaks_mb=watch.peaks_mb)


def _measure_stage(stage: Callable[[], Manifest], count_work: Callable[[Manifest], float]) -> Measured:
    started = time.perf_counter()
    artifact = stage()
    return Measured(count_work(artifact), time.perf_counter() - started)


Stages = dict[str, Measured]  # stage -> plays and seconds


def further(smaller: Measured, larger: Measured) -> float:
    """Return the seconds per further play: the additional seconds of the larger run over its additional plays."""
    return (larger.seconds - smaller.seconds) / (larger.work - smaller.work)


def speedups(by_workers: dict[int, tuple[Stages, Stages]]) -> dict[str, float | None]:
    """Return stage -> further plays per second of two workers, as a multiple of those of one worker.

    `by_workers` has a smaller and a larger run for each number of workers. None if there is no run with two workers, or
    if the larger run took no longer than the smaller, because both ended soon after their start.
    """

    def cost(stage: str, workers: int) -> float:
        return further(*(stages[stage] for stages in by_workers[workers])) if workers in by_workers else 0.0

    cost_pairs = {stage: (cost(stage, 1), cost(stage, 2)) for stage in by_workers[1][0]}
    return {
        stage: one_worker / two_workers if min(one_worker, two_workers) > 0 else None
        for stage, (one_worker, two_workers) in cost_pairs.items()
    }


def costs(by_size: list[Stages]) -> dict[str, dict[str, Any]]:
    """Return stage -> its cost per play in runs of growing size, `by_size`, smallest first.

    `plays` and `microseconds_per_play` are of each run, `microseconds_per_further_play` is between each run and the
    next. `growth` is by which share the last of these differences is above the one before, None with two sizes.
    """
    by_stage = {}
    for stage in by_size[0]:
        runs = [run[stage] for run in by_size]
        further_costs = [MICROSECONDS * further(smaller, larger) for smaller, larger in pairwise(runs)]
        by_stage[stage] = {
            "plays": [run.work for run in runs],
            "microseconds_per_play": [MICROSECONDS / run.per_second for run in runs],
            "microseconds_per_further_play": further_costs,
            "growth": further_costs[-1] / further_costs[-2] - 1 if len(further_costs) > 1 else None,
        }
    return by_stage


def extrapolate_hours(by_stage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the hours of one CPU for a billion plays, extrapolated from the cost of the last further play."""
    hours = {
        stage: EXTRAPOLATED_PLAYS * cost["microseconds_per_further_play"][-1] / MICROSECONDS / 3600
        for stage, cost in by_stage.items()
    }
    return {"extrapolated": True, "plays": EXTRAPOLATED_PLAYS, "cpu_hours": hours}


def bench_scale(bench_workspace: Workspace, config: ScaleBenchConfig) -> dict[str, Any]:
    """Run import, embed, train and taste: with one worker at each size of `users`, with more at the first and middle.

    `throughput`, by stage and number of workers: plays per second of the whole run at the middle size. `speedups`, by
    stage: further plays per second of two workers over those of one. `cost`, by stage: microseconds per play and per
    further play with one worker, and the growth of the latter; for embed they include all its epochs. `word2vec`:
    tokens per second of word2vec alone by number of threads. `memory`: MiB of the driver and of the largest worker by
    size. `rates`: those of the largest size; that of embed counts the tokens of all epochs. `extrapolated`: hours for a
    billion plays. Each run has its own process and cluster. Training is timed within its epoch, the other stages from
    start to end.
    """
    with ray_cluster():
        datasets = [
            bench_dataset(bench_workspace, users=users, songs=config.songs, plays=config.plays, seed=config.seed)
            for users in config.users
        ]
        plays_folders = [write_plays(dataset) for dataset in datasets]
    middle = len(plays_folders) // 2
    worker_counts = [workers for workers in config.workers if workers <= (os.cpu_count() or 1)]
    with progress("bench scale", len(plays_folders) + 2 * len(worker_counts) - 1) as bar:

        def measure_chain(plays_folder: str, workers: int) -> ChainRun:
            bar.advance()
            return _measure_chain(plays_folder, bench_workspace, workers, config)

        by_size = [measure_chain(plays_folder, 1) for plays_folder in plays_folders]
        by_workers = {1: (by_size[0], by_size[middle])}
        for workers in worker_counts[1:]:
            by_workers[workers] = (
                measure_chain(plays_folders[0], workers),
                measure_chain(plays_folders[middle], workers),
            )
        bar.advance()
        word2vec_rates = word2vec_scaling(
            datasets[middle], worker_counts, epochs=config.word2vec_epochs, seed=config.seed
        )
    return scale_figures(config, by_workers, by_size) | {"word2vec": word2vec_rates}


def scale_figures(
    config: ScaleBenchConfig, by_workers: dict[int, tuple[ChainRun, ChainRun]], by_size: list[ChainRun]
) -> dict[str, Any]:
    """Return the figures of the benchmark, except those of word2vec alone.

    `by_workers` has the runs on the first and the middle size for each number of workers, `by_size` those of one worker
    on each size.
    """
    stage_costs = costs([run.stages for run in by_size])
    largest = by_size[-1]
    rate_names = {**RATE_OF, "import": "import_plays_per_second_per_cpu"}
    return {
        "name": "scale",
        "unit": "plays",
        "per_second": largest.stages["taste"].per_second,
        "users": list(config.users),
        "workers": sorted(by_workers),
        "throughput": {
            stage: {str(workers): run.stages[stage].per_second for workers, (_, run) in sorted(by_workers.items())}
            for stage in largest.stages
        },
        "speedups": speedups({workers: (small.stages, large.stages) for workers, (small, large) in by_workers.items()}),
        "cost": stage_costs,
        "growth": max(
            (stage_cost["growth"] for stage_cost in stage_costs.values() if stage_cost["growth"] is not None),
            default=None,
        ),
        "memory": {
            "peaks_mb": [run.peaks_mb for run in by_size],
            "growth": growth(by_size[0].peaks_mb, largest.peaks_mb),
        },
        "rates": {
            rate_names[stage]: measured.per_second * (config.embed_epochs if stage == "embed" else 1)
            for stage, measured in largest.stages.items()
        },
        "extrapolated": extrapolate_hours(stage_costs),
    }


def _measure_chain(plays_folder: str, bench_workspace: Workspace, workers: int, config: ScaleBenchConfig) -> ChainRun:
    chain_workspace = Workspace(f"{bench_workspace.uri}/{CHAIN}")
    chain_workspace.delete("")
    with PlainProcess(0) as driver:
        return driver.run(
            run_chain, plays_folder, chain_workspace, workers, config.embed_epochs, config.batch, config.seed
        )


def write_plays(dataset: Dataset) -> str:
    """Return the folder with the data set's plays as Parquet files, one row per play; write the missing files."""
    folder = "plays"
    workspace = dataset.workspace
    for bucket in range(dataset.manifest.buckets):
        path = f"{folder}/{bucket:05d}.parquet"
        if workspace.exists(path):
            continue
        parts = [
            pa.table(
                {
                    "user": pa.array(np.repeat(histories.user_ids, histories.lengths)),
                    "song": pa.array(histories.songs).cast(pa.string()),
                    "played_at": pa.array(histories.played_at),
                }
            )
            for histories in dataset.read_bucket(bucket)
        ]
        workspace.write_table(path, pa.concat_tables(parts))
    return workspace.full(folder)


def bench_memory(bench_workspace: Workspace, config: MemoryBenchConfig) -> dict[str, Any]:
    """Measure the peak private memory of the driver and of the largest worker at two numbers of users.

    The taste job and the data path of training have a driver and a cluster of their own in each run, so that no run
    starts with the memory of another. `growth` is the largest share by which the driver or worker of a job grew.
    `songs_growth_mb` is by how many MiB the largest of four taste workers of a node is larger with the second number of
    `songs` than with the first; the workers share one memory-mapped copy of the table of songs. Only processes on this
    machine are measured.
    """

    def dataset_of(users: int, songs: int) -> Dataset:
        return bench_dataset(
            bench_workspace, users=users, songs=songs, plays=config.plays, seed=config.seed, buckets=MEMORY_BUCKETS
        )

    with ray_cluster():
        datasets = [dataset_of(users, config.songs[0]) for users in config.users]
        models = [untrained_model(dataset, config.seed) for dataset in datasets]
    peaks_mb: list[dict[str, float]] = [{}, {}]
    totals_mb, taste_seconds = [], 0.0
    catalog_peaks_mb: list[float] = []
    with progress("bench memory", 2 * len(datasets) + len(config.songs)) as bar:
        for size_index, (dataset, model) in enumerate(zip(datasets, models, strict=True)):
            jobs = {
                "taste": partial(taste_memory, dataset.workspace, model),
                "data": partial(data_memory, dataset.workspace),
            }
            for name, job in jobs.items():
                with PlainProcess(0) as driver:
                    memory_pass = driver.run(job)
                peaks_mb[size_index] |= {
                    f"{name} {role}": memory_pass.peaks_mb[role] for role in (rounds.DRIVER, rounds.WORKER)
                }
                totals_mb.append(memory_pass.total_mb)
                taste_seconds = memory_pass.seconds if name == "taste" else taste_seconds
                bar.advance()
        for songs in config.songs:
            with ray_cluster():
                dataset = dataset_of(config.users[0], songs)
                model = untrained_model(dataset, config.seed)
            with PlainProcess(0) as driver:
                memory_pass = driver.run(partial(taste_memory, dataset.workspace, model, workers=SONGS_WORKERS))
            catalog_peaks_mb.append(memory_pass.peaks_mb[rounds.WORKER])
            bar.advance()
    growth_by_role = rounds.growth(*peaks_mb)
    return {
        "name": "memory",
        "unit": "users",
        "growth": max(growth_by_role.values()),
        "growth_by_role": growth_by_role,
        "users": list(config.users),
        "peaks_mb": peaks_mb,
        "songs": list(config.songs),
        "songs_peaks_mb": catalog_peaks_mb,
        "songs_growth_mb": catalog_peaks_mb[1] - catalog_peaks_mb[0],
        "per_second": config.users[1] / max(taste_seconds, 1e-9),
        "peak_mb": max(totals_mb),
    }


@dataclass(frozen=True, kw_only=True)
class MemoryPass:
    """Memory and time of one job on one data set."""

    peaks_mb: dict[str, float]  # role -> MiB
    total_mb: float
    seconds: float


def taste_memory(workspace: Workspace, model: Manifest, workers: int | None = None) -> MemoryPass:
    """Run the taste job with `workers` workers, by default one per CPU, and return its memory and time."""

    def job() -> None:
        artifact = compute_tastes(workspace, TasteConfig(), model_id=model.id, repeat=True)
        workspace.delete(artifact.folder)

    return _measure_job(job, workers)


def data_memory(workspace: Workspace) -> MemoryPass:
    """Run the data path of training without a network, and return its memory and time."""
    return _measure_job(lambda: ray.get(ray.remote(count_window_plays).remote(Dataset(workspace), TrainConfig())))


def _measure_job(job: Callable[[], Any], workers: int | None = None) -> MemoryPass:
    with ray_cluster(num_cpus=workers), MemoryWatch() as watch:
        started = time.perf_counter()
        job()
        seconds = time.perf_counter() - started
    return MemoryPass(peaks_mb=watch.peaks_mb, total_mb=watch.total_mb, seconds=seconds)
