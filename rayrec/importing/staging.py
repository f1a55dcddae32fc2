"""The scratch folder of an import or a compaction, and the step that makes its result the data set.

Everything is written here first. What was read of a unit of input stays of use to an import of other
files in which the unit is the same, such as one that leaves a damaged file out. Publishing takes the
old manifest away, moves the files into place and puts the new manifest last; if it is killed, the next
import finishes it.
"""

import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow.parquet as pq

from rayrec.data.histories import Histories
from rayrec.importing.fragments import FragmentStore
from rayrec.storage.dataset_manifest import DatasetManifest, read_manifest
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    GENERATING,
    IMPORT_STAGING,
    SONGS_TABLE,
    Workspace,
    earlier_manifest,
)

PLAYS_PER_ROW_GROUP = 500_000
PIECES = "pieces"  # folder of the scratch folders in which every import reads


class Staging:
    """The scratch folder of one import or compaction: a killed one with the same inputs goes on in it."""

    def __init__(self, workspace: Workspace, print_id: str, pieces: Sequence[str] = ()) -> None:
        """`pieces` are the names of the pieces of input, as `piece_names` gives them."""
        self.workspace = workspace
        self.folder = f"{IMPORT_STAGING}/{print_id}"
        self.fragments = FragmentStore(workspace, f"{IMPORT_STAGING}/{PIECES}", pieces)

    def out(self, path: str) -> str:
        """Where the file that will be `path` waits for being published."""
        return f"{self.folder}/out/{path.removeprefix(f'{DATASET}/')}"

    def counts_file(self, bucket: int) -> str:
        """Plays of each song in one bucket, Parquet."""
        return f"{self.folder}/counts/{bucket:05d}.parquet"

    def songs_file(self, key_range: int) -> str:
        """Distinct songs in a range of keys, Parquet."""
        return f"{self.folder}/songs/{key_range:05d}.parquet"

    def bucket_file(self, bucket: int) -> str:
        """The result of one bucket, JSON; where it is there, the bucket is done."""
        return f"{self.folder}/buckets/{bucket:05d}.json"

    def bucket_results(self) -> dict[int, Any]:
        """What the buckets came to that are done, by one listing and a small file each."""
        paths = self.workspace.files(f"{self.folder}/buckets")
        return {int(posixpath.basename(path).split(".")[0]): self.workspace.read_json(path) for path in paths}

    def keep_manifest(self, dataset: DatasetManifest) -> dict[str, str]:
        """Put the present manifest among the files of the next: its name below dataset/, and its checksum."""
        path = earlier_manifest(dataset.id)
        return {path.removeprefix(f"{DATASET}/"): self.workspace.write_json(self.out(path), asdict(dataset))}

    def publish(self, manifest: DatasetManifest) -> None:
        """Make the staged files and those that the manifest keeps the data set; nothing else stays."""
        self.workspace.write_json(self.out(DATASET_MANIFEST), asdict(manifest))
        finish_publishing(self.workspace)


def write_histories(workspace: Workspace, path: str, batches: Iterable[Histories]) -> str:
    """Write a bucket of histories, none where there are no users, in row groups of about 500,000 plays; its sha256."""
    with workspace.open_output(path) as stream:
        writer: pq.ParquetWriter | None = None
        try:
            for histories in batches:
                table = histories.to_arrow()
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                groups = histories.offsets[:-1] // PLAYS_PER_ROW_GROUP
                starts = [row for row in range(len(groups)) if row == 0 or groups[row] != groups[row - 1]]
                for start, stop in zip(starts, [*starts[1:], len(groups)], strict=False):
                    writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            pq.write_table(Histories.from_lists([], []).to_arrow(), stream)
    return stream.sha256


def piece_names(pieces: Sequence[str], buckets: int) -> list[str]:
    """Names of pieces of a plan that are read into so many buckets."""
    return [f"{buckets:04d}-{unit}" for unit in pieces]


def buckets_read(workspace: Workspace, pieces: Sequence[str]) -> int:
    """Into how many buckets an unfinished import has read some of the pieces of a plan; 0 where none has."""
    read = [name.split("-") for name in workspace.folders(f"{IMPORT_STAGING}/{PIECES}")]
    known = set(pieces)
    return max((int(buckets) for buckets, unit in read if unit in known), default=0)


def discard_others(workspace: Workspace, staging: Staging) -> None:
    """Delete what imports of other inputs have left, but for the pieces that this one reads too."""
    kept = {f"{IMPORT_STAGING}/{PIECES}", staging.folder}
    kept |= {f"{staging.fragments.folder}/{unit}" for unit in staging.fragments.names}
    for folder in (IMPORT_STAGING, f"{IMPORT_STAGING}/{PIECES}"):
        for name in workspace.folders(folder):
            if f"{folder}/{name}" not in kept:
                workspace.delete(f"{folder}/{name}")


def finish_publishing(workspace: Workspace) -> None:
    """Publish an import whose files are complete; does nothing where none waits. May be repeated at any point.

    Where the new data set begins with the one that is there, that is there for readers all the while; any other
    is gone from before its first file is touched until the new one is whole.
    """
    for name in workspace.folders(IMPORT_STAGING):
        staging = Staging(workspace, name)
        staged_manifest = staging.out(DATASET_MANIFEST)
        if not workspace.exists(staged_manifest):
            continue
        made = read_manifest(workspace, staged_manifest)
        if not _stays_whole(workspace, made):
            workspace.delete(DATASET_MANIFEST)
            workspace.delete(GENERATING)
            for path in workspace.files(DATASET):
                if not path.startswith(f"{IMPORT_STAGING}/") and path.removeprefix(f"{DATASET}/") not in made.files:
                    workspace.delete(path)
        waiting = set(workspace.files(f"{staging.folder}/out"))
        for path in made.files:
            if staging.out(path) in waiting:
                workspace.move(staging.out(path), f"{DATASET}/{path}")
        workspace.move(staged_manifest, DATASET_MANIFEST)
        workspace.delete(IMPORT_STAGING)


def _stays_whole(workspace: Workspace, made: DatasetManifest) -> bool:
    """True where all files of the data set that is there stay as they are, but for the song table, which grows.

    Histories and users that the new manifest leaves out stay for those who read the old one.
    """
    if not workspace.exists(DATASET_MANIFEST):
        return False
    there = read_manifest(workspace)
    songs = SONGS_TABLE.removeprefix(f"{DATASET}/")
    left_out = ("histories/", "users/")
    return there.id in made.ancestors and all(
        made.files.get(path) == digest or (path not in made.files and path.startswith(left_out))
        for path, digest in there.files.items()
        if path != songs
    )
