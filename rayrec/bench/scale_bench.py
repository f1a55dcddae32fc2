"""How the stages scale: with workers on one machine, with the number of plays, and memory with the number of users."""

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
CHAIN = "chain"  # folder of the workspace that a run works in
# Few, so that batches and pools are full in the smaller data too: what still grows, grows with the users.
MEMORY_BUCKETS = 4
SONGS_WORKERS = 4  # of a node, which share a table of songs


@dataclass(frozen=True, kw_only=True)
class ChainRun:
    """What came of it."""

    stages: dict[str, Measured]  # plays of import, embed (all epochs), train (steady, in one epoch) and taste
    peaks_mb: dict[str, float]  # of the driver and of the largest worker, by role


def run_chain(plays: str, place: Workspace, workers: int, embed_epochs: int, batch: int, seed: int) -> ChainRun:
    """Run the stages on the Parquet files of the folder `plays`, on a cluster of `workers` CPUs of its own.

    For a process of its own, which has no connection to Ray. The workspace is left empty.
    """
    os.environ.pop("RAY_ADDRESS", None)
    settings = EmbedConfig(source="histories", epochs=embed_epochs, workers=workers, seed=seed)
    with ray_cluster(num_cpus=workers), MemoryWatch() as watch:
        began = time.perf_counter()
        dataset = import_data(place, ImportConfig(format="parquet", paths=(plays,)))
        stages = {"import": Measured(dataset.plays, time.perf_counter() - began)}
        stages["embed"] = _timed(lambda: embed(place, settings), lambda artifact: float(artifact.metrics["tokens"]))
        model = train(place, TrainConfig(epochs=1, workers=workers, batch=batch, seed=seed))
        stages["train"] = Measured(model.metrics["plays"], model.metrics["plays"] / model.metrics["plays_per_second"])
        stages["taste"] = _timed(
            lambda: compute_tastes(place, TasteConfig()), lambda artifact: float(artifact.metrics["plays"])
        )
    place.delete("")
    return ChainRun(stages=stages, peaks_mb=watch.peaks_mb)


def _timed(stage: Callable[[], Manifest], work: Callable[[Manifest], float]) -> Measured:
    began = time.perf_counter()
    artifact = stage()
    return Measured(work(artifact), time.perf_counter() - began)


Stages = dict[str, Measured]  # stage -> plays and seconds


def further(smaller: Measured, larger: Measured) -> float:
    """Seconds of a further play."""
    return (larger.seconds - smaller.seconds) / (larger.work - smaller.work)


def speedups(by_workers: dict[int, tuple[Stages, Stages]]) -> dict[str, float | None]:
    """Stage -> further plays a second of two workers, as a multiple of those of one.

    From a smaller and a larger run with each number of workers. None where nobody ran two, or the larger took no
    longer: both were over as soon as they had started.
    """

    def cost(stage: str, workers: int) -> float:
        return further(*(stages[stage] for stages in by_workers[workers])) if workers in by_workers else 0.0

    pairs = {stage: (cost(stage, 1), cost(stage, 2)) for stage in by_workers[1][0]}
    return {stage: one / two if min(one, two) > 0 else None for stage, (one, two) in pairs.items()}


def costs(by_size: list[Stages]) -> dict[str, dict[str, Any]]:
    """Stage -> plays and microseconds_per_play of each run, smallest first, microseconds_per_further_play between
    one and the next, and growth: by which share the last of these is above the one before (None with two sizes).
    """
    by_stage = {}
    for stage in by_size[0]:
        runs = [run[stage] for run in by_size]
        each = [MICROSECONDS * further(smaller, larger) for smaller, larger in pairwise(runs)]
        by_stage[stage] = {
            "plays": [run.work for run in runs],
            "microseconds_per_play": [MICROSECONDS / run.per_second for run in runs],
            "microseconds_per_further_play": each,
            "growth": each[-1] / each[-2] - 1 if len(each) > 1 else None,
        }
    return by_stage


def extrapolated(by_stage: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Hours of one CPU for a billion plays at the cost of the last further play; nobody has measured them."""
    hours = {
        stage: EXTRAPOLATED_PLAYS * cost["microseconds_per_further_play"][-1] / MICROSECONDS / 3600
        for stage, cost in by_stage.items()
    }
    return {"extrapolated": True, "plays": EXTRAPOLATED_PLAYS, "cpu_hours": hours}


def bench_scale(place: Workspace, config: ScaleBenchConfig) -> dict[str, Any]:
    """Import, embed, train and taste at each of `users` with one worker, and at the first and middle with more.

    By stage and number of workers: `throughput`, plays a second at the middle size, all told. By stage: `speedups`,
    further plays a second of two workers against one; `cost`, microseconds a play, and a further play, of one worker,
    and the growth of the latter. Embed makes all its epochs for each play. `word2vec`: its tokens a second alone by
    threads; `memory` of the driver and of the largest worker by size; `rates` of the largest size, embed's of tokens
    of all epochs; and what is `extrapolated`, marked so. Each run has a process and a cluster of its own. Training is
    timed in its epoch, the others from start to end.
    """
    with ray_cluster():
        datasets = [
            bench_dataset(place, users=users, songs=config.songs, plays=config.plays, seed=config.seed)
            for users in config.users
        ]
        sizes = [write_plays(dataset) for dataset in datasets]
    middle = len(sizes) // 2
    worker_counts = [workers for workers in config.workers if workers <= (os.cpu_count() or 1)]
    with progress("bench scale", len(sizes) + 2 * len(worker_counts) - 1) as bar:

        def chain(plays: str, workers: int) -> ChainRun:
            bar.advance()
            return _chain(plays, place, workers, config)

        by_size = [chain(plays, 1) for plays in sizes]
        by_workers = {1: (by_size[0], by_size[middle])}
        for workers in worker_counts[1:]:
            by_workers[workers] = (chain(sizes[0], workers), chain(sizes[middle], workers))
        bar.advance()
        words = word2vec_scaling(datasets[middle], worker_counts, epochs=config.word2vec_epochs, seed=config.seed)
    return scale_figures(config, by_workers, by_size) | {"word2vec": words}


def scale_figures(
    config: ScaleBenchConfig, by_workers: dict[int, tuple[ChainRun, ChainRun]], by_size: list[ChainRun]
) -> dict[str, Any]:
    """The object that the benchmark tells, but for word2vec alone; by workers the runs on the first and middle size."""
    cost = costs([run.stages for run in by_size])
    largest = by_size[-1]
    names = {**RATE_OF, "import": "import_plays_per_second_per_cpu"}
    return {
        "name": "scale",
        "unit": "plays",
        "per_second": largest.stages["taste"].per_second,
        "users": list(config.users),
        "workers": sorted(by_workers),
        "throughput": {
            stage: {str(number): run.stages[stage].per_second for number, (_, run) in sorted(by_workers.items())}
            for stage in largest.stages
        },
        "speedups": speedups({number: (small.stages, large.stages) for number, (small, large) in by_workers.items()}),
        "cost": cost,
        "growth": max((each["growth"] for each in cost.values() if each["growth"] is not None), default=None),
        "memory": {
            "peaks_mb": [run.peaks_mb for run in by_size],
            "growth": growth(by_size[0].peaks_mb, largest.peaks_mb),
        },
        "rates": {
            names[stage]: measured.per_second * (config.embed_epochs if stage == "embed" else 1)
            for stage, measured in largest.stages.items()
        },
        "extrapolated": extrapolated(cost),
    }


def _chain(plays: str, place: Workspace, workers: int, config: ScaleBenchConfig) -> ChainRun:
    folder = Workspace(f"{place.uri}/{CHAIN}")
    folder.delete("")
    with PlainProcess(0) as driver:
        return driver.run(run_chain, plays, folder, workers, config.embed_epochs, config.batch, config.seed)


def write_plays(dataset: Dataset) -> str:
    """The folder in which the data set's plays lie as Parquet files, a row a play; written where it is not there."""
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


def bench_memory(place: Workspace, config: MemoryBenchConfig) -> dict[str, Any]:
    """Peak private memory of the driver and of the largest worker at two numbers of users.

    Of the taste job and of the training data path, each in a driver and a cluster of its own, so
    that no run inherits what another has grown to. `growth` is the largest share by which any of the
    four figures grew. `songs_growth_mb`: MiB by which the largest of four taste workers of a node is larger with the
    second of `songs` than with the first: the table of songs is one memory-mapped copy. Sees the processes of
    this machine.
    """

    def dataset_of(users: int, songs: int) -> Dataset:
        return bench_dataset(
            place, users=users, songs=songs, plays=config.plays, seed=config.seed, buckets=MEMORY_BUCKETS
        )

    with ray_cluster():
        datasets = [dataset_of(users, config.songs[0]) for users in config.users]
        models = [untrained_model(dataset, config.seed) for dataset in datasets]
    peaks: list[dict[str, float]] = [{}, {}]
    totals, seconds = [], 0.0
    catalogs: list[float] = []
    with progress("bench memory", 2 * len(datasets) + len(config.songs)) as bar:
        for size, (dataset, model) in enumerate(zip(datasets, models, strict=True)):
            passes = {
                "taste": partial(taste_memory, dataset.workspace, model),
                "data": partial(data_memory, dataset.workspace),
            }
            for name, job in passes.items():
                with PlainProcess(0) as driver:
                    needs = driver.run(job)
                peaks[size] |= {f"{name} {role}": needs.peaks_mb[role] for role in (rounds.DRIVER, rounds.WORKER)}
                totals.append(needs.total_mb)
                seconds = needs.seconds if name == "taste" else seconds
                bar.advance()
        for songs in config.songs:
            with ray_cluster():
                dataset = dataset_of(config.users[0], songs)
                model = untrained_model(dataset, config.seed)
            with PlainProcess(0) as driver:
                needs = driver.run(partial(taste_memory, dataset.workspace, model, workers=SONGS_WORKERS))
            catalogs.append(needs.peaks_mb[rounds.WORKER])
            bar.advance()
    grown = rounds.growth(*peaks)
    return {
        "name": "memory",
        "unit": "users",
        "growth": max(grown.values()),
        "growth_by_role": grown,
        "users": list(config.users),
        "peaks_mb": peaks,
        "songs": list(config.songs),
        "songs_peaks_mb": catalogs,
        "songs_growth_mb": catalogs[1] - catalogs[0],
        "per_second": config.users[1] / max(seconds, 1e-9),
        "peak_mb": max(totals),
    }


@dataclass(frozen=True, kw_only=True)
class MemoryPass:
    """What one job needed on one size of data."""

    peaks_mb: dict[str, float]  # by role
    total_mb: float
    seconds: float


def taste_memory(workspace: Workspace, model: Manifest, workers: int | None = None) -> MemoryPass:
    """What the taste job needs, with so many workers or one a CPU."""

    def job() -> None:
        tastes = compute_tastes(workspace, TasteConfig(), model_id=model.id, repeat=True)
        workspace.delete(tastes.folder)

    return _watched(job, workers)


def data_memory(workspace: Workspace) -> MemoryPass:
    """What the data path of training needs."""
    return _watched(lambda: ray.get(ray.remote(count_window_plays).remote(Dataset(workspace), TrainConfig())))


def _watched(job: Callable[[], Any], workers: int | None = None) -> MemoryPass:
    with ray_cluster(num_cpus=workers), MemoryWatch() as watch:
        began = time.perf_counter()
        job()
        seconds = time.perf_counter() - began
    return MemoryPass(peaks_mb=watch.peaks_mb, total_mb=watch.total_mb, seconds=seconds)
