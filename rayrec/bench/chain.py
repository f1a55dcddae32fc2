"""Import, embed, train and taste one after another on a cluster of so many CPUs, each timed."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from rayrec.bench.private_memory import MemoryWatch
from rayrec.bench.rounds import Measured
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.importing.import_plan import ImportConfig
from rayrec.jobs.cluster import ray_cluster
from rayrec.jobs.embed import embed
from rayrec.jobs.import_data import import_data
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace


@dataclass(frozen=True, kw_only=True)
class ChainRun:
    """What came of it."""

    stages: dict[str, Measured]  # import, embed (tokens of all epochs), train (steady, in one epoch) and taste
    peaks_mb: dict[str, float]  # of the driver and of the largest worker, by role


def run_chain(plays: str, place: Workspace, workers: int, embed_epochs: int, seed: int) -> ChainRun:
    """Run the stages on the Parquet files of the folder `plays`, on a cluster of `workers` CPUs of its own.

    For a process of its own, which has no connection to Ray. The workspace is left empty.
    """
    os.environ.pop("RAY_ADDRESS", None)
    settings = EmbedConfig(source="histories", epochs=embed_epochs, workers=workers, seed=seed)
    with ray_cluster(num_cpus=workers), MemoryWatch() as watch:
        began = time.perf_counter()
        dataset = import_data(place, ImportConfig(format="parquet", paths=(plays,)))
        stages = {"import": Measured(dataset.plays, time.perf_counter() - began)}
        stages["embed"] = _timed(lambda: embed(place, settings), lambda made: made.metrics["tokens"] * embed_epochs)
        made = train(place, TrainConfig(epochs=1, workers=workers, memory=False, seed=seed))
        stages["train"] = Measured(made.metrics["plays"], made.metrics["plays"] / made.metrics["plays_per_second"])
        stages["taste"] = _timed(
            lambda: compute_tastes(place, TasteConfig()), lambda made: float(made.metrics["plays"])
        )
    place.delete("")
    return ChainRun(stages=stages, peaks_mb=watch.peaks_mb)


def _timed(stage: Callable[[], Manifest], work: Callable[[Manifest], float]) -> Measured:
    began = time.perf_counter()
    made = stage()
    return Measured(work(made), time.perf_counter() - began)
