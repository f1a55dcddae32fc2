"""How memory grows with the number of users."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from rayrec.bench import private_memory
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import bench_dataset, untrained_model
from rayrec.bench.job_benches import count_window_plays
from rayrec.bench.private_memory import MemoryWatch
from rayrec.bench.rounds import PlainProcess
from rayrec.data.dataset import Dataset
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

# Few, so that batches and pools are full in the smaller data too: what still grows, grows with the users.
MEMORY_BUCKETS = 4


def bench_memory(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Peak private memory of the driver and of the largest worker at two numbers of users.

    Of the taste job and of the training data path, each in a driver and a cluster of its own, so
    that no run inherits what another has grown to. `growth` is the largest share by which any of the
    four figures grew. Sees the processes of this machine.
    """
    with ray_cluster():
        sizes = {"plays": config.memory_plays, "buckets": MEMORY_BUCKETS}
        datasets = [bench_dataset(place, config, users=users, **sizes) for users in config.memory_users]
        models = [untrained_model(dataset, config.seed) for dataset in datasets]
    peaks: list[dict[str, float]] = [{}, {}]
    totals, seconds = [], 0.0
    with progress("bench memory", 2 * len(datasets)) as bar:
        for size, (dataset, model) in enumerate(zip(datasets, models, strict=True)):
            passes = {
                "taste": partial(taste_memory, dataset.workspace, model),
                "data": partial(data_memory, dataset.workspace),
            }
            for name, job in passes.items():
                with PlainProcess(0) as driver:
                    found = driver.run(job)
                peaks[size] |= {
                    f"{name} {role}": found.peaks_mb[role] for role in (private_memory.DRIVER, private_memory.WORKER)
                }
                totals.append(found.total_mb)
                seconds = found.seconds if name == "taste" else seconds
                bar.advance()
    grown = private_memory.growth(*peaks)
    return {
        "name": "memory",
        "unit": "users",
        "growth": max(grown.values()),
        "growth_by_role": grown,
        "users": list(config.memory_users),
        "peaks_mb": peaks,
        "per_second": config.memory_users[1] / max(seconds, 1e-9),
        "peak_mb": max(totals),
    }


@dataclass(frozen=True, kw_only=True)
class MemoryPass:
    """What one job needed on one size of data."""

    peaks_mb: dict[str, float]  # by role
    total_mb: float
    seconds: float


def taste_memory(workspace: Workspace, model: Manifest) -> MemoryPass:
    """What the taste job needs."""

    def job() -> None:
        made = compute_tastes(workspace, TasteConfig(), model_id=model.id, repeat=True)
        workspace.delete(made.folder)

    return _watched(job)


def data_memory(workspace: Workspace) -> MemoryPass:
    """What the data path of training needs."""
    return _watched(lambda: ray.get(ray.remote(count_window_plays).remote(Dataset(workspace), TrainConfig())))


def _watched(job: Callable[[], Any]) -> MemoryPass:
    with ray_cluster(), MemoryWatch() as watch:
        began = time.perf_counter()
        job()
        seconds = time.perf_counter() - began
    return MemoryPass(peaks_mb=watch.peaks_mb, total_mb=watch.total_mb, seconds=seconds)
