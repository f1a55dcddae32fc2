"""The taste job against the plain loop over the same files."""

import time
from functools import partial
from typing import Any

from rayrec.bench import loops
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import bench_dataset, plain_process, untrained_model
from rayrec.bench.rounds import Measured, measure
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.model.train_config import TasteConfig
from rayrec.storage.workspace import Workspace

PLAIN_TASTES = "plain-tastes"  # folder that the plain loop writes to


def bench_taste(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Plays a second of the taste job with one worker; the worker's start and the artifact's checksums count."""
    with ray_cluster():
        dataset = bench_dataset(place, config, users=config.taste_users)
        workspace, model = dataset.workspace, untrained_model(dataset, config.seed)
        settings = TasteConfig(concurrency=1)

        def ours() -> Measured:
            began = time.perf_counter()
            made = compute_tastes(workspace, settings, model_id=model.id, repeat=True)
            seconds = time.perf_counter() - began
            workspace.delete(made.folder)
            return Measured(made.metrics["plays"], seconds)

        arguments = (workspace, model, PLAIN_TASTES, dataset.manifest.last_play, settings.users)
        with plain_process() as plain:
            plays = partial(plain.run, loops.taste_loop, *arguments)
            result = measure("taste", "plays", ours, plays, config, users=config.taste_users)
        workspace.delete(PLAIN_TASTES)
    return result.to_json()
