"""How the stages scale: with workers on one machine, and with the number of plays."""

import os
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import bench_dataset
from rayrec.bench.chain import ChainRun, run_chain
from rayrec.bench.plain import PlainProcess
from rayrec.bench.private_memory import growth
from rayrec.bench.rates import RATE_OF
from rayrec.bench.scaling import costs, extrapolated, speedups
from rayrec.bench.word2vec_scaling import word2vec_scaling
from rayrec.data.dataset import Dataset
from rayrec.jobs.cluster import ray_cluster
from rayrec.progress import progress
from rayrec.storage.workspace import Workspace

CHAIN = "chain"  # folder of the workspace that a run works in


def bench_scale(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Import, embed, train and taste at each of `scale_users` with one worker, and at the first and middle with more.

    By stage and number of workers: `throughput` at the middle size, all told, and `speedup` of further plays. `cost`
    by stage: microseconds a play, and a further play, of one worker, and the growth of the latter; `word2vec`: its
    tokens a second alone by threads; `memory` of the driver and of the largest worker by size; `rates` of the
    largest size; and what is `extrapolated`, marked so. Each run has a process and a cluster of its own. Training is
    timed in its epoch, the others from start to end.
    """
    with ray_cluster():
        datasets = [bench_dataset(place, config, users=users) for users in config.scale_users]
        sizes = [write_plays(dataset) for dataset in datasets]
    middle = len(sizes) // 2
    crews = [workers for workers in config.scale_workers if workers <= (os.cpu_count() or 1)]
    with progress("bench scale", len(sizes) + 2 * len(crews) - 1) as bar:

        def chain(plays: str, workers: int) -> ChainRun:
            bar.advance()
            return _chain(plays, place, workers, config)

        by_size = [chain(plays, 1) for plays in sizes]
        by_workers = {1: (by_size[0], by_size[middle])}
        for workers in crews[1:]:
            by_workers[workers] = (chain(sizes[0], workers), chain(sizes[middle], workers))
        bar.advance()
        words = word2vec_scaling(datasets[middle], config, crews)
    return scale_figures(config, by_workers, by_size) | {"word2vec": words}


def scale_figures(
    config: BenchConfig, by_workers: dict[int, tuple[ChainRun, ChainRun]], by_size: list[ChainRun]
) -> dict[str, Any]:
    """The object that the benchmark tells, but for word2vec alone; by workers the runs on the first and middle size."""
    cost = costs([run.stages for run in by_size])
    largest = by_size[-1]
    names = {**RATE_OF, "import": "import_plays_per_second_per_cpu"}
    return {
        "name": "scale",
        "unit": "plays",
        "per_second": largest.stages["taste"].per_second,
        "users": list(config.scale_users),
        "workers": sorted(by_workers),
        "throughput": {
            stage: {str(number): run.stages[stage].per_second for number, (_, run) in sorted(by_workers.items())}
            for stage in largest.stages
        },
        "speedup": speedups({number: (small.stages, large.stages) for number, (small, large) in by_workers.items()}),
        "cost": cost,
        "growth": max((each["growth"] for each in cost.values() if each["growth"] is not None), default=None),
        "memory": {
            "peaks_mb": [run.peaks_mb for run in by_size],
            "growth": growth(by_size[0].peaks_mb, largest.peaks_mb),
        },
        "rates": {names[stage]: measured.per_second for stage, measured in largest.stages.items()},
        "extrapolated": extrapolated(cost),
    }


def _chain(plays: str, place: Workspace, workers: int, config: BenchConfig) -> ChainRun:
    folder = Workspace(f"{place.uri}/{CHAIN}")
    folder.delete("")
    with PlainProcess(0) as driver:
        return driver.run(run_chain, plays, folder, workers, config.scale_embed_epochs, config.seed)


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
