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
        self.made: dict[str, Any] = {}

    def bring_in(self) -> None:
        self.made["import"] = import_data(self.workspace, import_config(self.plays))

    def embed(self) -> None:
        self.split = split_dataset(self.workspace, SplitConfig(test_days=10, validation_days=5))
        config = EmbedConfig(dim=8, epochs=2, workers=1, source="histories", session_gap_minutes=2_000)
        self.made["embed"] = embed(self.workspace, config, split=self.split)

    def train(self) -> None:
        self.made["train"] = train(self.workspace, TRAIN, split=self.split)

    def taste(self) -> None:
        self.made["taste"] = compute_tastes(self.workspace, TasteConfig())

    def finish(self) -> None:
        self.made["index"] = build_index(self.workspace, IndexConfig())
        assert self.split is not None
        config = EvaluateConfig(bootstrap_samples=20, max_curve_users=20, models=("taste", "popularity"))
        self.made["evaluate"] = evaluate(self.workspace, config, split=self.split)


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


def note(kind: str, unit: int, event: str) -> None:
    """Append an event of a unit to the log file of this process."""
    line = [kind, unit, event, ray.get_runtime_context().get_node_id(), time.time()]
    with Path(os.environ[LOG], f"units-{os.getpid()}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def notes(kind: str) -> list[tuple[int, str, str, float]]:
    """Return (unit, event, node id, time) of all events of a kind, in order of time."""
    files = Path(os.environ[LOG]).glob("units-*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted(((unit, *rest) for found, unit, *rest in lines if found == kind), key=lambda line: line[-1])


def noted(worker: type[Any], kind: str) -> type[Any]:
    """Return a slower version of a bucket worker, which logs the begin and the end of each unit."""

    class Noted(worker):  # type: ignore[misc]
        def __call__(self, unit: Any) -> Any:
            number = unit[0] if isinstance(unit, tuple) else unit  # the bucket of a group; each group has one here
            note(kind, number, "begin")
            time.sleep(PAUSE)
            result = super().__call__(unit)
            note(kind, number, "end")
            return result

    return Noted


def remove_when(cluster: Cluster, ready: Callable[[], str | None], removed: list[tuple[str, float]]) -> None:
    """Start a thread that removes the node whose id `ready` returns, once it returns one, and adds it to `removed`."""

    def wait() -> None:
        while True:
            if (victim := ready()) is not None:
                break
            time.sleep(0.05)
        (node,) = [node for node in cluster.worker_nodes if node.node_id == victim]
        removed.append((victim, time.time()))
        cluster.remove_node(node, allow_graceful=False)

    threading.Thread(target=wait, daemon=True).start()


def busy_node(cluster: Cluster, kind: str, done: int) -> str | None:
    """Return a node, not the head, that works on a unit, once `done` units have ended; otherwise None."""
    lines = notes(kind)
    if sum(event == "end" for _, event, _, _ in lines) < done:
        return None
    ended = {(unit, node) for unit, event, node, _ in lines if event == "end"}
    busy = [node for unit, event, node, _ in lines if event == "begin" and (unit, node) not in ended]
    others = {node.node_id for node in cluster.worker_nodes}
    return next((node for node in busy if node in others), None)


def repeated(kind: str, units: int, removed: tuple[str, float]) -> dict[str, Any]:
    """Return the units begun more than once (`again`), and the unfinished units of the removed node (`held`)."""
    lines, (node, at) = notes(kind), removed
    begun = Counter(unit for unit, event, _, _ in lines if event == "begin")
    ended = {unit for unit, event, _, when in lines if event == "end" and when <= at}
    held = {unit for unit, event, where, when in lines if event == "begin" and where == node and unit not in ended}
    assert set(begun) == set(range(units))
    return {"again": sorted(unit for unit, times in begun.items() if times > 1), "held": sorted(held)}


def lose_nodes(plays: str, folder: str, log: str) -> dict[str, Any]:
    """Run all stages; a node is lost during import, training and tastes, and a new node joins after each of them."""
    patch, found = pytest.MonkeyPatch(), dict[str, Any]()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    patch.setattr(import_run, "PieceImporter", noted(PieceImporter, "read"))
    patch.setattr(import_run, "BucketMerger", noted(BucketMerger, "merge"))
    patch.setattr(taste_job, "BucketTastes", noted(BucketTastes, "taste"))
    stages = Stages(Path(plays), Workspace(folder))
    with three_nodes(Path(log)) as cluster:

        def lose_one(kind: str, stage: Callable[[], None], ready: Callable[[], str | None]) -> tuple[str, float]:
            removed: list[tuple[str, float]] = []
            remove_when(cluster, ready, removed)
            stage()
            assert removed, f"{kind} was over before a node could be removed"
            cluster.add_node(num_cpus=1, object_store_memory=150 << 20)
            return removed[0]

        gone = lose_one("import", stages.bring_in, lambda: busy_node(cluster, "merge", 3))
        found["import"] = repeated("merge", BUCKETS, gone)
        stages.embed()
        steps = Path(log) / "steps"
        witness.watch(patch, steps, pause=0.2)
        lose_one("train", stages.train, lambda: training_node(cluster, steps))
        seen = read_log(steps)
        needless = sorted(set(seen.again) - seen.may_be_taken_again)
        found["train"] = {"again": len(seen.again), "needless": needless, "steps": len(seen.times)}
        gone = lose_one("taste", stages.taste, lambda: busy_node(cluster, "taste", 3))
        found["taste"] = repeated("taste", BUCKETS, gone)
        stages.finish()
    return {**found, "made": {name: _plain(made) for name, made in stages.made.items()}}


def training_node(cluster: Cluster, steps: Path) -> str | None:
    """Return a node, not the head, whose training worker has taken step 3 of the second epoch; otherwise None."""
    others = {node.node_id for node in cluster.worker_nodes}
    for file in steps.glob("*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            if line.get("node") in others and line["at"][1:] == [1, 3]:
                return str(line["node"])
    return None


def undisturbed(plays: str, folder: str) -> dict[str, Any]:
    """Run the same stages on one node with two CPUs, without a loss."""
    stages = Stages(Path(plays), Workspace(folder))
    with ray_cluster(num_cpus=2):
        for stage in (stages.bring_in, stages.embed, stages.train, stages.taste, stages.finish):
            stage()
    return {name: _plain(made) for name, made in stages.made.items()}


def _plain(made: Any) -> dict[str, Any]:
    if isinstance(made, Manifest):
        return {"id": made.id, "folder": made.folder, "metrics": made.metrics}
    return {"id": made.id, "users": made.users, "plays": made.plays}
