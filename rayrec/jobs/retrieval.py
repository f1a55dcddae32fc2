"""The retrieval stage: sessions, rules, play counts and song groups, counted by bucket and merged by range of songs.

One task joins the ranges.

Buckets are counted in groups, which bounds the reads of object storage: one per group and range.

If a retrieval with the same settings already covers earlier parts of the plays, only the later parts are read and added
to it, unless a user was deleted since: nobody's plays can be taken out of its counts.
"""

import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset, read_forgotten
from rayrec.data.histories import Histories
from rayrec.data.split import SELECTION_FOLDER, FitRange, Split, fit_range, load_split, require_split_of
from rayrec.display import progress
from rayrec.importing.import_plan import bucket_groups
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import ray_cluster, run_buckets, run_on_node
from rayrec.recommend.range_join import join_ranges
from rayrec.recommend.stored_retrieval import (
    SETTINGS_FILE,
    Retrieval,
    RetrievalCounts,
    pack_counts,
    song_ranges,
    unpack_counts,
)
from rayrec.recommend.two_step_config import RetrievalConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "retrieval"
LENGTH = struct.Struct("<q")  # precedes a bucket's counts in a piece: their length in bytes
MEMORY_PER_PACKED_BYTE = 6  # bytes of memory per packed byte of a range that is merged: a rule of 20 bytes takes 120


@writes("retrieval")
def fit_retrieval(
    workspace: Workspace, config: RetrievalConfig, *, split: Split | None = None, repeat: bool = False
) -> Manifest:
    """Fit the data that retrievers look up, on all plays that a final fit may see; return the retrieval artifact.

    Unless `config.full` or `repeat` requests all plays, or a user was deleted since, only the plays of new parts are
    read and added to the newest retrieval with the same settings and split. Play counts are then those of all plays.
    Sessions and rules are too, with these exceptions: a user's first session in a new part starts in that part, no rule
    leads from earlier plays to plays of the part, and a follower that was not among the strongest rules of its song
    starts at 0.
    With a validation range, the folder `selection` holds a second retrieval, fitted before that range: rankers learn on
    the range, which it has not seen.

    Metrics: seconds, plays, sessions, rules, artists, albums, base, the id of the retrieval that was added to ("" if
    all plays were read), and last_deletion, the moment of the last deletion of a user before the fit (ms UTC, 0 if
    there was none). A killed job continues with the missing work.
    Raises `MismatchError` for a split of another data set.
    """
    # Read before the erasure: plays of a user who is deleted later may be counted.
    last_deletion = max(read_forgotten(workspace).moments.values(), default=0)
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    inputs = {"dataset": dataset.manifest.id}
    if split is not None:
        require_split_of(dataset, split)
        inputs["split"] = split.id
    descriptions = dataset.descriptions()
    if descriptions:
        inputs["descriptions"] = descriptions[-1].id
    # Compaction changes the id of the data set, but not the plays.
    fingerprint_inputs = {**inputs, "dataset": dataset.manifest.plays_id, "num_songs": str(dataset.num_songs)}
    fingerprint_id = artifacts.fingerprint(KIND, to_mapping(config), fingerprint_inputs)
    retrieval_id, complete = artifacts.new_id(workspace, KIND, fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, retrieval_id)
    metrics: dict[str, Any] = {"last_deletion": last_deletion}
    manifest = Manifest(kind=KIND, id=retrieval_id, config=to_mapping(config), inputs=inputs, metrics=metrics)
    first_part, base = 0, None
    if not (config.full or repeat):
        first_part, base = dataset.newest_base(KIND, lambda candidate: _is_continuable(workspace, candidate, manifest))
    started = time.monotonic()
    file_names: list[str] = []
    with ray_cluster():
        if split is not None and split.has_validation:
            folder = manifest.path(SELECTION_FOLDER)
            if not workspace.exists(f"{folder}/{SETTINGS_FILE}"):
                selection_base = _selection_base(dataset, split, base)
                selection_part = first_part if selection_base else 0
                write_retrieval(
                    dataset, config, split.selection, folder, base=selection_base, first_part=selection_part
                )
            workspace.delete(f"{folder}/run")  # of a job that was killed after it had written the settings
            file_names = [path.removeprefix(f"{manifest.folder}/") for path in workspace.files(folder)]
        base_folder = base.folder if base else ""
        final_names, fit_metrics = write_retrieval(
            dataset, config, fit_range(split), manifest.folder, base=base_folder, first_part=first_part
        )
        file_names += final_names
    metrics |= {**fit_metrics, "seconds": round(time.monotonic() - started, 1), "base": base.id if base else ""}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), file_names)


def _is_continuable(workspace: Workspace, earlier_retrieval: Manifest, new_retrieval: Manifest) -> bool:
    """Return True if two retrievals have the same settings, and have the same split or may both see all plays.

    False if a user was deleted between them: the earlier one may hold the user's plays.
    """
    settings = [{**manifest.config, "full": False} for manifest in (earlier_retrieval, new_retrieval)]
    splits = [manifest.inputs.get("split") for manifest in (earlier_retrieval, new_retrieval)]
    deletions = [manifest.metrics.get("last_deletion") for manifest in (earlier_retrieval, new_retrieval)]
    if settings[0] != settings[1] or deletions[0] != deletions[1]:
        return False
    return splits[0] == splits[1] or all(
        fit_range(load_split(workspace, split) if split else None) == FitRange() for split in splits
    )


def _selection_base(dataset: Dataset, split: Split, base: Manifest | None) -> str:
    """Return the folder of the retrieval that the selection retrieval is added to; "" if it reads all plays."""
    if base is None:
        return ""
    if base.inputs.get("split") == split.id:
        return base.path(SELECTION_FOLDER)
    ends_before_range = dataset.earlier(base.inputs["dataset"]).last_play < (split.validation_from or 0)
    return base.folder if ends_before_range else ""


def write_retrieval(
    dataset: Dataset,
    config: RetrievalConfig,
    allowed: FitRange,
    folder: str,
    *,
    base: str = "",
    first_part: int = 0,
) -> tuple[list[str], dict[str, Any]]:
    """Fit a retrieval on the plays that `allowed` permits and write it into `folder`; return file names and figures.

    With `base`, the plays of part `first_part` and later parts are added to the retrieval in that folder. Needs a
    running cluster. Intermediate files stay in `folder`/run until the end, so that a killed job can continue.
    """
    workspace, run = dataset.workspace, f"{folder}/run"
    ranges = song_ranges(dataset.num_songs, dataset.manifest.plays)
    groups = bucket_groups(len(ranges), dataset.manifest.buckets)
    pieces_folder = f"{run}/{base.replace('/', '-') or 'all'}"
    task = _Task(dataset, config, allowed, pieces_folder, ranges, groups, base, first_part)
    with progress("Retrieval", len(groups) + len(ranges)) as bar:
        offsets = np.zeros((len(groups), len(ranges) + 1), dtype=np.int64)
        for counted_group in run_buckets(GroupCounter, range(len(groups)), arguments={"task": task}, called="group"):
            offsets[counted_group.group] = counted_group.offsets
            bar.advance()
        arguments = {"task": task, "offsets": offsets}
        largest_range_bytes = int(np.diff(offsets, axis=1).sum(axis=0).max())
        merged_ranges = run_buckets(
            RangeMerger,
            range(len(ranges)),
            arguments=arguments,
            memory=MEMORY_PER_PACKED_BYTE * largest_range_bytes,
            called="range",
        )
        for _ in merged_ranges:
            bar.advance()
    (file_names, metrics), *_ = run_on_node(build_retrieval, task, folder, cpus=1)
    workspace.delete(run)
    return file_names, metrics


@dataclass(frozen=True)
class _Task:
    """The data that all workers of one fit share."""

    dataset: Dataset
    config: RetrievalConfig
    allowed: FitRange
    pieces_folder: str  # folder of the intermediate files
    song_ranges: list[tuple[int, int]]  # first row, and the row after the last
    groups: list[tuple[int, int]]  # first and last bucket of each group
    base_folder: str  # folder of the retrieval that plays are added to, or ""
    first_part: int  # first part of the plays to count

    def piece_path(self, group: int) -> str:
        """Return the path of the piece of a group: its counts, ordered by range of songs and then by bucket."""
        return f"{self.pieces_folder}/group={group:05d}.counts"

    def merged_path(self, song_range: int) -> str:
        """Return the path of the counts of all buckets for one range of songs."""
        return f"{self.pieces_folder}/merged/range={song_range:05d}.safetensors"


@dataclass(frozen=True)
class CountedGroup:
    """A group of buckets whose piece is written."""

    group: int
    offsets: np.ndarray  # int64 (ranges + 1,): byte in the piece where each range begins, and the end of the last


class GroupCounter:
    """Counts the plays of a group of buckets and writes its piece."""

    def __init__(self, task: _Task) -> None:
        self._task = task

    def __call__(self, group: int) -> CountedGroup:
        """Write the piece of a group, unless it exists."""
        task, workspace = self._task, self._task.dataset.workspace
        path = task.piece_path(group)
        offsets = np.zeros(len(task.song_ranges) + 1, dtype="<i8")
        if workspace.exists(path):
            with workspace.open_input(path) as stream:
                return CountedGroup(group, np.frombuffer(stream.read(offsets.nbytes), dtype=offsets.dtype))
        first, last = task.groups[group]
        with tempfile.TemporaryFile() as spool:  # the piece is ordered by range, memory holds one bucket
            bucket_spans = [self._spool(bucket, spool) for bucket in range(first, last + 1)]
            sizes = [
                sum(spans[range_index][1] for spans in bucket_spans) for range_index in range(len(task.song_ranges))
            ]
            offsets[:] = offsets.nbytes + np.concatenate([[0], np.cumsum(sizes)])
            with workspace.open_output(path) as stream:
                stream.write(offsets.tobytes())
                for range_index in range(len(task.song_ranges)):
                    for spans in bucket_spans:
                        spool.seek(spans[range_index][0])
                        stream.write(spool.read(spans[range_index][1]))
        return CountedGroup(group, offsets)

    def _spool(self, bucket: int, spool: IO[bytes]) -> list[tuple[int, int]]:
        """Write a bucket's counts into `spool`; return the position and the number of bytes of each range."""
        task, spans = self._task, []
        counts = self._count(Histories.from_lists([], []))
        for histories in task.dataset.read_bucket(bucket, first_part=task.first_part):
            counts = RetrievalCounts.merge([counts, self._count(task.allowed.select(histories))])
        for first, last in task.song_ranges:
            data = pack_counts(counts.of_songs(first, last))
            spans.append((spool.tell(), LENGTH.size + len(data)))
            spool.write(LENGTH.pack(len(data)) + data)
        return spans

    def _count(self, histories: Histories) -> RetrievalCounts:
        task = self._task
        return RetrievalCounts.fit(
            histories,
            num_songs=task.dataset.num_songs,
            allowed=task.allowed,
            newest=task.config.sessions_per_song,
            real_times=task.dataset.manifest.times == "real",
        )


class RangeMerger:
    """Merges the counts of all buckets for one range of songs.

    `offsets`, int64 (groups, ranges + 1), are the `CountedGroup.offsets` of all groups.
    """

    def __init__(self, task: _Task, offsets: np.ndarray) -> None:
        self._task, self._offsets = task, offsets

    def __call__(self, range_index: int) -> int:
        """Write one range's merged counts with each song's strongest rules; return 1, or 0 if the file exists."""
        task, workspace = self._task, self._task.dataset.workspace
        if workspace.exists(task.merged_path(range_index)):
            return 0
        counts = merge_counts(self._parts(range_index))
        if task.base_folder:
            base_counts = Retrieval.load(workspace, task.base_folder).counts.of_songs(*task.song_ranges[range_index])
            counts = RetrievalCounts.merge([counts, base_counts])
        workspace.write_bytes(task.merged_path(range_index), pack_counts(counts.strongest(task.config.rules_per_song)))
        return 1

    def _parts(self, range_index: int) -> Iterator[RetrievalCounts]:
        task = self._task
        for group in range(len(task.groups)):
            start, end = self._offsets[group, range_index : range_index + 2].tolist()
            with task.dataset.workspace.open_input(task.piece_path(group)) as stream:
                stream.seek(start)
                data = stream.read(end - start)
            position = 0
            while position < len(data):
                (size,) = LENGTH.unpack_from(data, position)
                yield unpack_counts(data[position + LENGTH.size : position + LENGTH.size + size])
                position += LENGTH.size + size


def merge_counts(parts: Iterable[RetrievalCounts]) -> RetrievalCounts:
    """Merge one or more parts, two of the same size at a time: each is merged about log2(number of parts) times."""
    pending: list[tuple[int, RetrievalCounts]] = []  # number of parts merged into it, largest first
    for part in parts:
        pending.append((1, part))
        while len(pending) > 1 and pending[-2][0] == pending[-1][0]:
            (count, newer), (_, older) = pending.pop(), pending.pop()
            pending.append((2 * count, RetrievalCounts.merge([older, newer])))
    return RetrievalCounts.merge([part for _, part in pending])


def build_retrieval(task: _Task, folder: str) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Join the ranges, add the groups of songs, write the artifact's files; yield file names and figures."""
    workspace = task.dataset.workspace
    ranges = (
        unpack_counts(workspace.read_bytes(task.merged_path(range_index)))
        for range_index in range(len(task.song_ranges))
    )
    with tempfile.TemporaryDirectory(prefix="rayrec-") as joined_folder:
        counts, catalog = join_ranges(ranges, Path(joined_folder)), task.dataset.catalog()
        retrieval = Retrieval.build(
            counts,
            artist_of_song=catalog.codes(columns.ARTIST),
            album_of_song=catalog.codes(columns.ALBUM),
            has_likes=task.dataset.manifest.has_likes,
        )
        metrics = {
            "plays": int(retrieval.plays.plays.sum()),
            "sessions": len(retrieval.sessions),
            "rules": len(retrieval.rules.followers),
            "artists": len(retrieval.artists.offsets) - 1,
            "albums": len(retrieval.albums.offsets) - 1,
        }
        yield retrieval.save(workspace, folder), metrics
