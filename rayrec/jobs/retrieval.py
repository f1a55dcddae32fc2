"""The retrieval stage: sessions, rules, play counts and song groups, counted by bucket and merged by range of songs."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange, Split, fit_range, require_split_of
from rayrec.jobs.runtime import ray_cluster, run_buckets, run_on_node
from rayrec.progress import progress
from rayrec.recommend.retrieval.count_files import pack_counts, unpack_counts
from rayrec.recommend.retrieval.retrieval import SELECTION_RETRIEVAL, SETTINGS_FILE, Retrieval, RetrievalCounts
from rayrec.recommend.retrieval.retrieval_config import RetrievalConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "retrieval"
PLAYS_PER_RANGE = 20_000_000  # of one range of songs, so that the counts of a range fit into a task's memory


@writes("retrieval")
def fit_retrieval(
    workspace: Workspace, config: RetrievalConfig, *, split: Split | None = None, repeat: bool = False
) -> Manifest:
    """Fit what retrievers look up on all plays that a final fit may see; the retrieval artifact.

    With a validation range a second one, fitted before it, lies in the folder `selection`: rankers learn on the range
    that it has not seen. Metrics: seconds, plays, sessions, rules, artists and albums. A killed job goes on with the
    buckets left. Raises `MismatchError` for a split of another data set.
    """
    dataset = Dataset(workspace)
    inputs = {"dataset": dataset.manifest.id}
    if split is not None:
        require_split_of(dataset, split)
        inputs["split"] = split.id
    described = dataset.descriptions()
    if described is not None:
        inputs["descriptions"] = described.id
    print_id = artifacts.fingerprint(KIND, to_mapping(config), inputs)
    retrieval_id, complete = artifacts.new_id(workspace, KIND, print_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, retrieval_id)
    manifest = Manifest(kind=KIND, id=retrieval_id, config=to_mapping(config), inputs=inputs)
    started = time.monotonic()
    names: list[str] = []
    with ray_cluster():
        if split is not None and split.has_validation:
            folder = manifest.path(SELECTION_RETRIEVAL)
            if not workspace.exists(f"{folder}/{SETTINGS_FILE}"):
                write_retrieval(dataset, config, split.selection, folder)
            names = [path.removeprefix(f"{manifest.folder}/") for path in workspace.files(folder)]
        written, figures = write_retrieval(dataset, config, fit_range(split), manifest.folder)
        names += written
    metrics = {**figures, "seconds": round(time.monotonic() - started, 1)}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), names)


def write_retrieval(
    dataset: Dataset, config: RetrievalConfig, allowed: FitRange, folder: str
) -> tuple[list[str], dict[str, Any]]:
    """Fit on the plays that `allowed` lets through and write into a folder; the names of the files, and figures.

    Needs a running cluster. Pieces lie in `folder`/run until the end, so a killed job goes on.
    """
    workspace, run = dataset.workspace, f"{folder}/run"
    buckets = range(dataset.manifest.buckets)
    task = _Task(dataset, config, allowed, run, _song_ranges(dataset))
    with progress("Retrieval", len(buckets) + len(task.song_ranges)) as bar:
        for worker, units in ((BucketCounter, buckets), (RangeMerger, range(len(task.song_ranges)))):
            for _ in run_buckets(worker, units, arguments={"task": task}, called="unit"):
                bar.advance()
    (names, figures), *_ = run_on_node(_build, task, folder, cpus=1)
    workspace.delete(run)
    return names, figures


@dataclass(frozen=True)
class _Task:
    """What all workers of one fit know."""

    dataset: Dataset
    config: RetrievalConfig
    allowed: FitRange
    run: str  # folder of the pieces
    song_ranges: list[tuple[int, int]]  # first row, and the row after the last

    def piece(self, bucket: int, song_range: int) -> str:
        """The file of what one bucket says of one range of songs."""
        return f"{self.run}/bucket={bucket:05d}/range={song_range:05d}.safetensors"

    def merged(self, song_range: int) -> str:
        """The file of what all buckets say of one range of songs."""
        return f"{self.run}/merged/range={song_range:05d}.safetensors"


class BucketCounter:
    """Counts the plays of one bucket and writes a piece for each range of songs."""

    def __init__(self, task: _Task) -> None:
        self._task = task

    def __call__(self, bucket: int) -> int:
        """Write the pieces that are not there; the last one is written last."""
        task, dataset = self._task, self._task.dataset
        if dataset.workspace.exists(task.piece(bucket, len(task.song_ranges) - 1)):
            return 0
        counts = self._count(Histories.from_lists([], []))
        for histories in dataset.read_bucket(bucket):
            counts = RetrievalCounts.merge([counts, self._count(task.allowed.select(histories))])
        for number, (first, last) in enumerate(task.song_ranges):
            data = pack_counts(counts.of_songs(first, last), first, last)
            dataset.workspace.write_bytes(task.piece(bucket, number), data)
        return 1

    def _count(self, histories: Histories) -> RetrievalCounts:
        task = self._task
        return RetrievalCounts.fit(
            histories,
            num_songs=task.dataset.num_songs,
            allowed=task.allowed,
            newest=task.config.sessions_per_song,
        )


class RangeMerger:
    """Merges what all buckets say of one range of songs."""

    def __init__(self, task: _Task) -> None:
        self._task = task

    def __call__(self, number: int) -> int:
        """Write the merged counts of one range of songs, with the strongest rules of each song."""
        task, workspace = self._task, self._task.dataset.workspace
        if workspace.exists(task.merged(number)):
            return 0
        merged: RetrievalCounts | None = None
        for bucket in range(task.dataset.manifest.buckets):
            part = unpack_counts(workspace.read_bytes(task.piece(bucket, number)))
            merged = part if merged is None else RetrievalCounts.merge([merged, part])
        if merged is None:
            raise AssertionError("a data set has at least one bucket")
        merged = replace(merged, rules=merged.rules.strongest(task.config.rules_per_song))
        workspace.write_bytes(task.merged(number), pack_counts(merged, *task.song_ranges[number]))
        return 1


def _song_ranges(dataset: Dataset) -> list[tuple[int, int]]:
    count = max(1, min(dataset.num_songs, -(-dataset.manifest.plays // PLAYS_PER_RANGE)))
    bounds = np.linspace(0, dataset.num_songs, count + 1).astype(int).tolist()
    return list(pairwise(bounds))


def _build(task: _Task, folder: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Join the ranges, add the groups of songs, write the artifact's files; yields their names and figures."""
    workspace, catalog = task.dataset.workspace, task.dataset.catalog()
    ranges = [unpack_counts(workspace.read_bytes(task.merged(number))) for number in range(len(task.song_ranges))]
    retrieval = Retrieval.build(
        RetrievalCounts.merge(ranges),
        artist_of_song=catalog.codes(columns.ARTIST),
        album_of_song=catalog.codes(columns.ALBUM),
        rules_per_song=task.config.rules_per_song,
    )
    figures = {
        "plays": int(retrieval.plays.plays.sum()),
        "sessions": len(retrieval.sessions),
        "rules": len(retrieval.rules.followers),
        "artists": len(retrieval.artists.offsets) - 1,
        "albums": len(retrieval.albums.offsets) - 1,
    }
    yield retrieval.save(workspace, folder), figures
