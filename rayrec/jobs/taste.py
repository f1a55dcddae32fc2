"""The taste stage: one row per user for all users, bucket by bucket; a killed job goes on with the buckets left."""

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec import artifacts
from rayrec.artifacts import Manifest
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.errors import MismatchError
from rayrec.jobs.buckets import run_buckets
from rayrec.jobs.cluster import ray_cluster
from rayrec.progress import progress
from rayrec.taste.config import TasteConfig
from rayrec.taste.tastes import PLAYS, tastes_file
from rayrec.workspace import Workspace


def compute_tastes(
    workspace: Workspace, config: TasteConfig, *, model_id: str | None = None, repeat: bool = False
) -> Manifest:
    """Compute the taste vectors of all users; the tastes artifact.

    Raises `MismatchError` for a model of a data set that this one does not descend from.
    """
    dataset = Dataset(workspace)
    model = (
        artifacts.load(workspace, "models", model_id) if model_id else artifacts.newest(workspace, "models", "train")
    )
    if not dataset.descends_from(model.inputs["dataset"]):
        raise MismatchError(
            f"model {model.id} was trained on data set {model.inputs['dataset']}, the workspace holds "
            f"{dataset.manifest.id}; train a model on it first"
        )
    inputs = {"dataset": dataset.manifest.id, "models": model.id}
    at = dataset.manifest.last_play if config.at is None else config.at
    print_id = artifacts.fingerprint("taste", {"at": at}, inputs)
    tastes_id, complete = artifacts.new_id(workspace, "tastes", print_id, repeat=repeat)
    if complete:
        return artifacts.load(workspace, "tastes", tastes_id)
    manifest = Manifest(kind="tastes", id=tastes_id, config={**to_mapping(config), "at": at}, inputs=inputs)
    began = time.monotonic()
    buckets = range(dataset.manifest.buckets)
    left = [bucket for bucket in buckets if not workspace.exists(tastes_file(manifest.folder, bucket))]
    with ray_cluster(), progress("Taste vectors", len(buckets)) as bar:
        bar.advance(len(buckets) - len(left))
        arguments = {"workspace": workspace, "model": model, "folder": manifest.folder, "at": at, "config": config}
        results = run_buckets(
            BucketTastes, left, arguments=arguments, num_gpus=float(config.gpu), concurrency=config.concurrency
        )
        computed = 0
        for plays in results:
            computed += plays
            bar.advance()
    seconds = time.monotonic() - began
    users, plays = _count_rows(workspace, manifest, buckets)
    metrics = {
        "seconds": round(seconds, 1),
        "users": users,
        "plays": plays,
        "plays_per_second": round(computed / seconds),
        "buckets_computed": len(left),
    }
    names = [tastes_file(manifest.folder, bucket).removeprefix(manifest.folder + "/") for bucket in buckets]
    return artifacts.publish(workspace, Manifest(**{**asdict(manifest), "metrics": metrics}), names)


class BucketTastes:
    """A bucket worker: reads a bucket's histories, writes its rows of tastes."""

    def __init__(self, workspace: Workspace, model: Manifest, folder: str, at: int, config: TasteConfig) -> None:
        import torch

        from rayrec.taste.checkpoint import load_model
        from rayrec.taste.encoding import TasteEncoder

        torch.set_num_threads(1)
        self._encoder = TasteEncoder(load_model(workspace, model.folder), "cuda" if config.gpu else "cpu")
        self._dataset, self._folder, self._at, self._config = Dataset(workspace), folder, at, config

    def __call__(self, bucket: int) -> int:
        """Write the bucket's file; the number of plays that it took."""
        plays = 0
        with self._dataset.workspace.open_output(tastes_file(self._folder, int(bucket))) as stream:
            writer = None
            for table in self._tables(int(bucket)):
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                writer.write_table(table)
                plays += int(pc.sum(table.column(PLAYS)).as_py() or 0)
            if writer is not None:
                writer.close()
        return plays

    def _tables(self, bucket: int) -> Iterator[pa.Table]:
        from rayrec.data.histories import Histories
        from rayrec.taste.tastes import taste_table

        empty = True
        for histories in self._dataset.read_bucket(bucket, self._config.users):
            empty = False
            yield taste_table(self._encoder, histories, self._at)
            # Freed memory goes back at once: left to itself the heap grows by a tenth over a long bucket.
            pa.default_memory_pool().release_unused()
        if empty:
            yield taste_table(self._encoder, Histories.from_lists([], []), self._at)


def _count_rows(workspace: Workspace, manifest: Manifest, buckets: Any) -> tuple[int, int]:
    """Users and plays over all files of the artifact, those of an earlier run too."""
    users, plays = 0, 0
    for bucket in buckets:
        table = workspace.read_table(tastes_file(manifest.folder, bucket), columns=[PLAYS])
        users += table.num_rows
        plays += int(pc.sum(table.column(PLAYS)).as_py() or 0)
    return users, plays
