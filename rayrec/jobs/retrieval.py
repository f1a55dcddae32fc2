"""The retrieval stage: sessions, rules, play counts and song groups, counted by bucket and merged by range of songs.

Where a retrieval of the same settings holds earlier parts of the plays already, the later ones alone are read and added
to it.
"""

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
from rayrec.data.split import FitRange, Split, fit_range, load_split, require_split_of
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import ray_cluster, run_buckets, run_on_node
from rayrec.progress import progress
from rayrec.recommend.retrieval.stored_retrieval import (
    SELECTION_RETRIEVAL,
    SETTINGS_FILE,
    Retrieval,
    RetrievalCounts,
    pack_counts,
    unpack_counts,
)
from rayrec.recommend.two_step_config import RetrievalConfig
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

    Unless `config.full` or `repeat` ask for all plays, those of new parts are added to the newest retrieval of the same
    settings and split. Play counts and the newest sessions are then those of all plays; a follower that was not among
    the strongest rules of its song begins at 0, and rules and sessions across the end of a part are not counted.
    With a validation range a second one, fitted before it, lies in the folder `selection`: rankers learn on the range
    that it has not seen.

    Metrics: seconds, plays, sessions, rules, artists, albums and base ("": none), the retrieval that was added to. A
    killed job goes on with the buckets left.
    Raises `MismatchError` for a split of another data set.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    inputs = {"dataset": dataset.manifest.id}
    if split is not None:
        require_split_of(dataset, split)
        inputs["split"] = split.id
    described = dataset.descriptions()
    if described:
        inputs["descriptions"] = described[-1].id
    print_id = artifacts.fingerprint(KIND, to_mapping(config), inputs)
    retrieval_id, complete = artifacts.new_id(workspace, KIND, print_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, retrieval_id)
    manifest = Manifest(kind=KIND, id=retrieval_id, config=to_mapping(config), inputs=inputs)
    first_part, base = 0, None
    if not (config.full or repeat):
        first_part, base = dataset.newest_base(KIND, lambda made: _is_like(workspace, made, manifest))
    started = time.monotonic()
    names: list[str] = []
    with ray_cluster():
        if split is not None and split.has_validation:
            folder = manifest.path(SELECTION_RETRIEVAL)
            if not workspace.exists(f"{folder}/{SETTINGS_FILE}"):
                before = _selection_base(dataset, split, base)
                from_part = first_part if before else 0
                write_retrieval(dataset, config, split.selection, folder, base=before, first_part=from_part)
            names = [path.removeprefix(f"{manifest.folder}/") for path in workspace.files(folder)]
        base_folder = base.folder if base else ""
        written, figures = write_retrieval(
            dataset, config, fit_range(split), manifest.folder, base=base_folder, first_part=first_part
        )
        names += written
    metrics = {**figures, "seconds": round(time.monotonic() - started, 1), "base": base.id if base else ""}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), names)


def _is_like(workspace: Workspace, earlier: Manifest, new: Manifest) -> bool:
    """True where two retrievals keep as much, and saw the same plays of those that both could see."""
    settings = [{**each.config, "full": False} for each in (earlier, new)]
    splits = [each.inputs.get("split") for each in (earlier, new)]
    if settings[0] != settings[1]:
        return False
    return splits[0] == splits[1] or all(
        fit_range(load_split(workspace, split) if split else None) == FitRange() for split in splits
    )


def _selection_base(dataset: Dataset, split: Split, base: Manifest | None) -> str:
    """The folder of what the retrieval before the validation range may start from, or "": all plays are counted."""
    if base is None:
        return ""
    if base.inputs.get("split") == split.id:
        return base.path(SELECTION_RETRIEVAL)
    before_range = dataset.earlier(base.inputs["dataset"]).last_play < (split.validation_from or 0)
    return base.folder if before_range else ""


def write_retrieval(
    dataset: Dataset,
    config: RetrievalConfig,
    allowed: FitRange,
    folder: str,
    *,
    base: str = "",
    first_part: int = 0,
) -> tuple[list[str], dict[str, Any]]:
    """Fit on the plays that `allowed` lets through and write into a folder; the names of the files, and figures.

    With `base` the plays of `first_part` and later ones are added to the retrieval in that folder. Needs a running
    cluster. Pieces lie in `folder`/run until the end, so a killed job goes on.
    """
    workspace, run = dataset.workspace, f"{folder}/run"
    buckets = range(dataset.manifest.buckets)
    pieces = f"{run}/{base.replace('/', '-') or 'all'}"
    task = _Task(dataset, config, allowed, pieces, _song_ranges(dataset), base, first_part)
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
    pieces: str  # their folder
    song_ranges: list[tuple[int, int]]  # first row, and the row after the last
    base: str  # folder of the retrieval that plays are added to, or ""
    first_part: int  # of the plays to count

    def piece(self, bucket: int, song_range: int) -> str:
        """The file of what one bucket says of one range of songs."""
        return f"{self.pieces}/bucket={bucket:05d}/range={song_range:05d}.safetensors"

    def merged(self, song_range: int) -> str:
        """The file of what all buckets say of one range of songs."""
        return f"{self.pieces}/merged/range={song_range:05d}.safetensors"


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
        for histories in dataset.read_bucket(bucket, first_part=task.first_part):
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
        merged = unpack_counts(workspace.read_bytes(task.piece(0, number)))
        for bucket in range(1, task.dataset.manifest.buckets):
            part = unpack_counts(workspace.read_bytes(task.piece(bucket, number)))
            merged = RetrievalCounts.merge([merged, part])
        if task.base:
            earlier = Retrieval.load(workspace, task.base).counts.of_songs(*task.song_ranges[number])
            merged = RetrievalCounts.merge([merged, earlier])
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
