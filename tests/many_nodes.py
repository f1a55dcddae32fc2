"""All stages on a cluster of three nodes, from which a node is removed while a stage runs.

A test process can have only one connection to Ray, and the fixture `cluster` uses it: so these functions run in
a `PlainProcess`. Each node is started by `ray.cluster_utils` and has one CPU; all nodes see the workspace's folder.
"""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.cloudpickle
import witness
from ray.cluster_utils import Cluster
from trainings import CONFIG
from witness import read_log

from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.importing import import_run
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.merging import BucketMerger, PieceImporter
from rayrec.jobs import taste as taste_job
from rayrec.jobs.build_index import build_index
from rayrec.jobs.embed import embed
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.import_data import import_data
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import BucketTastes, compute_tastes
from rayrec.jobs.train import train
from rayrec.model.train_config import TasteConfig
from rayrec.recommend.index import IndexConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

LOG = "RAYREC_TEST_LOG"  # environment variable with the folder in which the workers of all nodes log their units
PAUSE = 0.4  # seconds added to each unit, so that a node can be removed meanwhile
BUCKETS = 12
TRAIN = CONFIG.replace(workers=2)


def write_plays(folder: Path, files: int = 8) -> None:
    """Write CSV files with the plays of 20 users each."""
    for file in range(files):
        lines = ["user,song,played_at"]
        for user in range(20):
            start = 1_420_000_000 + 86_400 * (user % 40)
            lines += [f"u{file}-{user},s{(user * 7 + step * step) % 60},{start + step * 90_000}" for step in range(30)]
        (folder / f"plays-{file}.csv").write_text("\n".join(lines) + "\n")


def import_config(folder: Path) -> ImportConfig:
    return ImportConfig(format="csv", paths=(str(folder),), buckets=BUCKETS)


class Stages:
    """Runs the stages on one workspace; the methods are called in the order below."""

    def __init__(self, plays: Path, workspace: Workspace) -> None:
        self.plays, self.workspace = plays, workspace
        self.split: Split | None = None
        self.results: dict[str, Any] = {}

    def import_plays(self) -> None:
        self.results["import"] = import_data(self.workspace, import_config(self.plays))

    def embed(self) -> None:
        self.split = split_dataset(self.workspace, SplitConfig(test_days=10, validation_days=5))
        config = EmbedConfig(dim=8, epochs=2, workers=1, source="histories", session_gap_minutes=2_000)
        self.results["embed"] = embed(self.workspace, config, split=self.split)

    def train(self) -> None:
        self.results["train"] = train(self.workspace, TRAIN, split=self.split)

    def taste(self) -> None:
        self.results["taste"] = compute_tastes(self.workspace, TasteConfig())

    def finish(self) -> None:
        self.results["index"] = build_index(self.workspace, IndexConfig())
        assert self.split is not None
        config = EvaluateConfig(bootstrap_samples=20, max_curve_users=20, models=("taste", "popularity"))
        self.results["evaluate"] = evaluate(self.workspace, config, split=self.split)


@contextmanager
def three_nodes(log: Path) -> Iterator[Cluster]:
    """Connect Ray to a new cluster of three nodes, whose workers log to the folder `log`."""
    log.mkdir(parents=True, exist_ok=True)
    os.environ[LOG] = str(log)
    sizes = {"num_cpus": 1, "object_store_memory": 150 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=sizes)
    try:
        for _ in range(2):
            cluster.add_node(**sizes)
        with ray_cluster(cluster.address):
            yield cluster
    finally:
        cluster.shutdown()


def log_event(kind: str, unit: int, event: str) -> None:
    """Append an event of a unit to the log file of this process."""
    line = [kind, unit, event, ray.get_runtime_context().get_node_id(), time.time()]
    with Path(os.environ[LOG], f"units-{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def logged_events(kind: str) -> list[tuple[int, str, str, float]]:
    """Return (unit, event, node id, time) of all events of a kind, in order of time."""
    files = Path(os.environ[LOG]).glob("units-*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(((unit, *rest) for line_kind, unit, *rest in lines if line_kind == kind), key=lambda line: line[-1])


def logging_worker(worker: type[Any], kind: str) -> type[Any]:
    """Return a slower version of a bucket worker, which logs the begin and the end of each unit."""

    class LoggingWorker(worker):  # type: ignore[misc]
        def __call__(self, unit: Any) -> Any:
            number = unit[0] if isinstance(unit, tuple) else unit  # the bucket of a group; each group has one here
            log_event(kind, number, "begin")
            time.sleep(PAUSE)
            result = super().__call__(unit)
            log_event(kind, number, "end")
            return result

    return LoggingWorker


def remove_when(cluster: Cluster, find_node: Callable[[], str | None], removals: list[tuple[str, float]]) -> None:
    """Start a thread that waits for a node id from `find_node`, removes that node, and adds it to `removals`."""

    def wait_and_remove() -> None:
        while True:
            if (node_id := find_node()) is not None:
                break
            time.sleep(0.05)
        (node,) = [node for node in cluster.worker_nodes if node.node_id == node_id]
        removals.append((node_id, time.time()))
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=wait_and_remove, daemon=True).start()


def busy_node(cluster: Cluster, kind: str, min_ended: int) -> str | None:
    """Return a node, not the head, that works on a unit, once `min_ended` units have ended; otherwise None."""
    lines = logged_events(kind)
    if sum(event == "end" for _, event, _, _ in lines) < min_ended:
        return None
    ended_units = {(unit, node) for unit, event, node, _ in lines if event == "end"}
    busy_nodes = [node for unit, event, node, _ in lines if event == "begin" and (unit, node) not in ended_units]
    worker_ids = {node.node_id for node in cluster.worker_nodes}
    return next((node for node in busy_nodes if node in worker_ids), None)


def repeated_units(kind: str, units: int, removal: tuple[str, float]) -> dict[str, Any]:
    """Return the units begun more than once (`again`), and the unfinished units of the removed node (`held`)."""
    lines, (node, removed_at) = logged_events(kind), removal
    begin_counts = Counter(unit for unit, event, _, _ in lines if event == "begin")
    ended_units = {unit for unit, event, _, event_time in lines if event == "end" and event_time <= removed_at}
    unfinished = {
        unit
        for unit, event, event_node, event_time in lines
        if event == "begin" and event_node == node and unit not in ended_units
    }
    assert set(begin_counts) == set(range(units))
    return {"again": sorted(unit for unit, count in begin_counts.items() if count > 1), "held": sorted(unfinished)}


def lose_nodes(plays: str, folder: str, log: str) -> dict[str, Any]:
    """Run all stages; a node is lost during import, training and tastes, and a new node joins after each of them."""
    patch, report = pytest.MonkeyPatch(), dict[str, Any]()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    patch.setattr(import_run, "PieceImporter", logging_worker(PieceImporter, "read"))
    patch.setattr(import_run, "BucketMerger", logging_worker(BucketMerger, "merge"))
    patch.setattr(taste_job, "BucketTastes", logging_worker(BucketTastes, "taste"))
    stages = Stages(Path(plays), Workspace(folder))
    with three_nodes(Path(log)) as cluster:

        def lose_node_during(
            kind: str, stage: Callable[[], None], find_node: Callable[[], str | None]
        ) -> tuple[str, float]:
            removals: list[tuple[str, float]] = []
            remove_when(cluster, find_node, removals)
            stage()
            assert removals, f"{kind} was over before a node could be removed"
            cluster.add_node(num_cpus=1, object_store_memory=150 << 20)
            return removals[0]

        removal = lose_node_during("import", stages.import_plays, lambda: busy_node(cluster, "merge", 3))
        report["import"] = repeated_units("merge", BUCKETS, removal)
        stages.embed()
        steps = Path(log) / "steps"
        witness.watch(patch, steps, pause=0.2)
        lose_node_during("train", stages.train, lambda: training_node(cluster, steps))
        training_log = read_log(steps)
        needless_repeats = sorted(set(training_log.again) - training_log.may_be_taken_again)
        report["train"] = {
            "again": len(training_log.again),
            "needless": needless_repeats,
            "steps": len(training_log.times),
        }
        removal = lose_node_during("taste", stages.taste, lambda: busy_node(cluster, "taste", 3))
        report["taste"] = repeated_units("taste", BUCKETS, removal)
        stages.finish()
    return {**report, "made": {name: _plain(result) for name, result in stages.results.items()}}


def training_node(cluster: Cluster, steps: Path) -> str | None:
    """Return a node, not the head, whose training worker has taken step 3 of the second epoch; otherwise None."""
    worker_ids = {node.node_id for node in cluster.worker_nodes}
    for file in steps.glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            if line.get("node") in worker_ids and line["at"][1:] == [1, 3]:
                return str(line["node"])
    return None


def undisturbed(plays: str, folder: str) -> dict[str, Any]:
    """Run the same stages on one node with two CPUs, without a loss."""
    stages = Stages(Path(plays), Workspace(folder))
    with ray_cluster(num_cpus=2):
        for stage in (stages.import_plays, stages.embed, stages.train, stages.taste, stages.finish):
            stage()
    return {name: _plain(result) for name, result in stages.results.items()}


def _plain(result: Any) -> dict[str, Any]:
    if isinstance(result, Manifest):
        return {"id": result.id, "folder": result.folder, "metrics": result.metrics}
    return {"id": result.id, "users": result.users, "plays": result.plays}
