"""The taste stage: computes the taste vectors of all users, bucket by bucket; a killed job continues where it stopped.

If taste vectors of the same model exist, for this data set or for one that it descends from, only the plays since then
go through the network.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.display import progress
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import ray_cluster, require_gpu, run_buckets
from rayrec.model.taste_table import PLAYS, tastes_file
from rayrec.model.train_config import TasteConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import BUCKET_COUNTS, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace, artifact_dir


@writes("taste")
def compute_tastes(
    workspace: Workspace, config: TasteConfig, *, model_id: str | None = None, repeat: bool = False
) -> Manifest:
    """Compute the taste vectors of all users, one row per user; return the tastes artifact.

    Continues from the newest taste vectors of the model, unless `config.full` or `repeat` requests all plays; the rows
    are the same either way. Metrics: seconds, users, plays, plays_per_second, buckets_computed, base (the id of the
    artifact that was continued, "" if none) and the fields of `Counts`.

    Raises `MismatchError` for a model of a data set that this one does not descend from, and `InputError` for
    `config.gpu` if a private Ray cluster finds no GPU.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    model = dataset.model(model_id)
    inputs = {"dataset": dataset.manifest.plays_id, "models": model.id}
    added_songs = artifacts.latest(workspace, "added_songs", lambda candidate: candidate.inputs["models"] == model.id)
    if added_songs is not None:
        inputs["added_songs"] = added_songs.id
    at = dataset.manifest.last_play if config.at is None else int(config.at)
    fingerprint_id = artifacts.fingerprint("taste", {"at": at}, inputs)
    tastes_id, complete = artifacts.new_id(workspace, "tastes", fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, "tastes", tastes_id)
    base = None if config.full or repeat else tastes_before(dataset, model, added_songs)
    manifest = Manifest(kind="tastes", id=tastes_id, config={**to_mapping(config), "at": at}, inputs=inputs)
    started = time.monotonic()
    buckets = range(dataset.manifest.buckets)
    files = set(workspace.files(manifest.folder))
    done_buckets = {bucket for bucket in buckets if tastes_file(manifest.folder, bucket) in files}
    checksums: dict[str, str] = {}
    counts: Counter[str] = Counter()
    computed_plays = 0
    with ray_cluster(), progress("Taste vectors", len(buckets)) as bar:
        if config.gpu:
            require_gpu()
        arguments = {
            "workspace": workspace,
            "model": model,
            "folder": manifest.folder,
            "at": at,
            "config": config,
            "base": base,
            "added": added_songs,
            "done": done_buckets,
        }
        results = run_buckets(
            BucketTastes, buckets, arguments=arguments, num_gpus=float(config.gpu), concurrency=config.concurrency
        )
        for result in results:
            path = tastes_file(manifest.folder, result.bucket)
            checksums[path.removeprefix(f"{manifest.folder}/")] = result.sha256
            counts.update(result.counts)
            computed_plays += 0 if result.bucket in done_buckets else result.counts["plays_computed"]
            bar.advance()
    seconds = time.monotonic() - started
    metrics = {
        "seconds": round(seconds, 1),
        **counts,
        "plays_per_second": round(computed_plays / seconds),
        "buckets_computed": len(buckets) - len(done_buckets),
        "base": base.id if base else "",
    }
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), checksums, checksums)


def tastes_before(dataset: Dataset, model: Manifest, added_songs: Manifest | None = None) -> Manifest | None:
    """Return the taste vectors of the model to continue from, as in `Dataset.newest_base`; None if there are none.

    Taste vectors are not continued if the network, with `added_songs`, would now read their plays in another way.
    """
    _, base = dataset.newest_base(
        "tastes",
        lambda candidate: (
            candidate.inputs["models"] == model.id and _reads_plays_the_same(dataset, candidate, added_songs)
        ),
    )
    return base


def _reads_plays_the_same(dataset: Dataset, tastes: Manifest, added_songs: Manifest | None) -> bool:
    """Return True if the network, with `added_songs`, still reads the plays of `tastes` in the same way."""
    old_id = tastes.inputs.get("added_songs")
    if old_id == (added_songs.id if added_songs else None):
        return True
    if added_songs is None:
        return False
    from rayrec.model.added_songs import AddedSongs

    new_songs, old_songs = (
        None if artifact_id is None else AddedSongs.load(dataset.workspace, artifact_dir("added_songs", artifact_id))
        for artifact_id in (added_songs.id, old_id)
    )
    return new_songs is not None and new_songs.fits(old_songs, dataset.earlier(tastes.inputs["dataset"]).songs)


@dataclass(frozen=True, kw_only=True)
class BucketResult:
    """The result of a bucket; the driver receives nothing else of it."""

    bucket: int
    sha256: str  # sha256 of its file
    counts: dict[str, int]  # users, plays and the fields of `Counts`


class BucketTastes:
    """A bucket worker: reads a bucket's histories and writes the taste vectors of its users."""

    def __init__(
        self,
        workspace: Workspace,
        model: Manifest,
        folder: str,
        at: int,
        config: TasteConfig,
        base: Manifest | None = None,
        added: Manifest | None = None,
        done: Set[int] = frozenset(),
    ) -> None:
        """`done` are the buckets that an earlier run has written: they are read for checksums and counts only."""
        import torch

        from rayrec.model.added_songs import AddedSongs
        from rayrec.model.checkpoint import load_model
        from rayrec.model.inference import TasteEncoder

        torch.set_num_threads(1)
        network = load_model(workspace, model.folder, model.files)
        if added is not None:
            songs = AddedSongs.load(workspace, added.folder)
            network.add_songs(*map(torch.from_numpy, (songs.rows, songs.averaged, songs.inputs)))
        self._encoder = TasteEncoder(network, "cuda" if config.gpu else "cpu")
        self._dataset, self._folder, self._at, self._config, self._base = Dataset(workspace), folder, at, config, base
        self._done_buckets = done

    def __call__(self, bucket: int) -> BucketResult:
        """Write the bucket's file, unless an earlier run has written it."""
        from rayrec.model.taste_table import Counts, taste_writer

        path = tastes_file(self._folder, bucket)
        if bucket in self._done_buckets:
            return self._read_result(bucket, path)
        counts = Counts()
        users = plays = 0
        with self._dataset.workspace.open_output(path) as stream:
            writer = None
            for table in self._tables(bucket, counts):
                writer = writer or taste_writer(stream, table.schema)
                writer.write_table(table)
                users, plays = users + table.num_rows, plays + int(table.column(PLAYS).to_numpy().sum())
                # Return freed memory to the system at once: otherwise the heap grows by a tenth over a long bucket.
                pa.default_memory_pool().release_unused()
            totals = {"users": users, "plays": plays, **asdict(counts)}
            if writer is not None:
                writer.add_key_value_metadata({BUCKET_COUNTS.decode(): json.dumps(totals)})
                writer.close()
        return BucketResult(bucket=bucket, sha256=stream.sha256, counts=totals)

    def _read_result(self, bucket: int, path: str) -> BucketResult:
        """Return the result of a bucket whose file exists."""
        with self._dataset.workspace.open_input(path) as stream:
            counts = json.loads(pq.ParquetFile(stream).metadata.metadata[BUCKET_COUNTS])
        return BucketResult(bucket=bucket, sha256=artifacts.sha256(self._dataset.workspace, path), counts=counts)

    def _tables(self, bucket: int, counts: Any) -> Iterator[pa.Table]:
        from rayrec.data.histories import Histories
        from rayrec.model.taste_table import continued_tables, full_tables, taste_table

        options = {"at": self._at, "users": self._config.users, "counts": counts}
        if self._base is None:
            tables = full_tables(self._encoder, self._dataset, bucket, **options)
        else:
            first_part = self._dataset.earlier(self._base.inputs["dataset"]).parts
            tables = continued_tables(
                self._encoder, self._dataset, bucket, self._base_tables(bucket), first_part=first_part, **options
            )
        is_empty = True
        for table in tables:
            is_empty = False
            yield table
        if is_empty:
            yield taste_table(self._encoder, Histories.from_lists([], []), self._at)

    def _base_tables(self, bucket: int) -> Iterator[pa.Table]:
        """Yield the rows of the earlier taste vectors in batches of users."""
        assert self._base is not None
        with self._dataset.workspace.open_input(tastes_file(self._base.folder, bucket)) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=self._config.users):
                yield pa.Table.from_batches([batch])
