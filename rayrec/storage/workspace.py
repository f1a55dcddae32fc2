"""The workspace: the folder or bucket prefix that holds every artifact. Paths are made here only."""

import errno
import io
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.errors import InputError, NotFoundError, StorageError
from rayrec.storage.object_storage import patient, upload

DATASET = "dataset"
DATASET_MANIFEST = "dataset/dataset.json"
GENERATING = "dataset/.generating.json"  # the config that unfinished generated buckets belong to
SONGS_TABLE = "dataset/songs.parquet"
HISTORIES = "dataset/histories"
PLAYLISTS = "dataset/playlists"
REJECTED_ROWS = "dataset/rejected"
STATES_FILE = "serving/states.sqlite"  # the embedded store of user states
IMPORT_STAGING = "dataset/.staging"  # what an unfinished import has done so far

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says
LOCK = ".lock"  # held by the run that writes, on a local disk
LOCK_HOLDER = ".lock-holder.json"  # who that is
LEASE = ".lease.json"  # the same on object storage


def histories_file(part: int, bucket: int) -> str:
    """The Parquet file of one bucket of users in one part of the histories."""
    return f"{HISTORIES}/part={part:04d}/bucket={bucket:05d}/histories.parquet"


def earlier_manifest(dataset_id: str) -> str:
    """The manifest of a data set to which more was appended since."""
    return f"{DATASET}/earlier/{dataset_id}.json"


def playlists_file(bucket: int) -> str:
    """The Parquet file of one bucket of imported playlists."""
    return f"{PLAYLISTS}/playlists-{bucket:05d}.parquet"


def rejected_rows_file(kind: str, part: int, name: str) -> str:
    """The Parquet file of some rows of plays or playlists that an import could not use."""
    return f"{REJECTED_ROWS}/{kind}-{f'part{part:04d}-' if part else ''}{name}.parquet"


def split_file(split_id: str) -> str:
    """The file of one split."""
    return f"splits/{split_id}.json"


def artifact_dir(kind: str, artifact_id: str) -> str:
    """The folder of one artifact; `kind` is one of those of `Manifest`."""
    return f"{kind}/{artifact_id}"


class Workspace:
    """Reads and writes files under one root, a local path or an s3:// or gs:// prefix.

    All paths are relative to the root, with forward slashes. Every write appears whole or not at
    all: a temporary name and a rename on a local disk, one object put on a bucket. A workspace
    pickles as its URI, so it travels to Ray workers.

    Raises `InputError` for a URI that pyarrow cannot open.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        try:
            if "://" in self.uri:
                filesystem, root = pafs.FileSystem.from_uri(self.uri)
                self.filesystem = patient(filesystem)
            else:
                self.filesystem = pafs.LocalFileSystem()
                root = str(Path(self.uri).expanduser().resolve())
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"workspace {self.uri!r} cannot be opened: {error}; "
                "give a local path, s3://bucket/prefix or gs://bucket/prefix"
            ) from error
        self.root = root.rstrip("/")
        if self.is_local and Path(self.root).exists() and not Path(self.root).is_dir():
            raise InputError(f"workspace {self.uri!r} is a file; give a folder")

    def __reduce__(self) -> tuple[type["Workspace"], tuple[str]]:
        return Workspace, (self.root if self.is_local else self.uri,)

    def __repr__(self) -> str:
        return f"Workspace({self.uri!r})"

    @property
    def is_local(self) -> bool:
        """True where the root is on a local disk."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def full(self, path: str) -> str:
        """The path as the file system of pyarrow spells it."""
        return posixpath.join(self.root, path)

    def exists(self, path: str) -> bool:
        """True if a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.full(path)).type != pafs.FileType.NotFound)

    def size(self, path: str) -> int:
        """Bytes of all files at or below `path`; 0 where there is nothing."""
        info = self.filesystem.get_file_info(self.full(path))
        if info.type == pafs.FileType.File:
            return int(info.size)
        return sum(self.filesystem.get_file_info(self.full(name)).size for name in self.files(path))

    def modified(self, path: str) -> float:
        """Seconds since 1970 by the clock of the storage when a file was written; 0 where there is none."""
        return float(self.filesystem.get_file_info(self.full(path)).mtime_ns or 0) / 1e9

    def files(self, path: str) -> list[str]:
        """All files below a folder, as sorted paths relative to the root; hidden and temporary ones left out."""
        selector = pafs.FileSelector(self.full(path), allow_not_found=True, recursive=True)
        found = (
            posixpath.relpath(info.path, self.root)
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File
        )
        return sorted(name for name in found if not posixpath.basename(name).startswith("."))

    def folders(self, path: str) -> list[str]:
        """The names of the folders directly in a folder, sorted."""
        selector = pafs.FileSelector(self.full(path), allow_not_found=True)
        infos = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in infos if info.type == pafs.FileType.Directory)

    def delete(self, path: str) -> None:
        """Remove a file, or a folder and all below it; nothing happens where there is none."""
        info = self.filesystem.get_file_info(self.full(path))
        if info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(self.full(path))
        elif info.type == pafs.FileType.File:
            self.filesystem.delete_file(self.full(path))

    def move(self, source: str, target: str) -> None:
        """Rename a file, over one that may be there."""
        if self.is_local:
            Path(self.full(target)).parent.mkdir(parents=True, exist_ok=True)
        self.filesystem.move(self.full(source), self.full(target))

    def open_input(self, path: str) -> pa.NativeFile:
        """A random access file. Raises `NotFoundError` where there is none."""
        try:
            return self.filesystem.open_input_file(self.full(path))
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} is not in workspace {self.uri}") from error

    @contextmanager
    def open_output(self, path: str) -> Iterator[pa.NativeFile]:
        """A stream that becomes the file `path` when the block ends without an error.

        Raises `StorageError` where the disk is full or the storage goes on failing.
        """
        target = self.full(path)
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            written = Path(target).parent / f".{posixpath.basename(target)}.{uuid.uuid4().hex}"
        else:
            # First on a local disk: pyarrow closes a stream that is let go of, and half a file would be there.
            descriptor, name = tempfile.mkstemp(prefix="rayrec-")
            os.close(descriptor)
            written = Path(name)
        try:
            with pa.OSFile(str(written), "wb") as stream:
                yield stream
            if self.is_local:
                written.replace(target)
            else:
                upload(self.filesystem, written, target)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StorageError(
                f"there is no room to write {path} in {self.uri if self.is_local else written.parent}: {error}; "
                "make room and run again: what is done is kept"
            ) from error
        finally:
            written.unlink(missing_ok=True)

    def read_bytes(self, path: str) -> bytes:
        """A file's content."""
        with self.open_input(path) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file whole."""
        with self.open_output(path) as stream:
            stream.write(data)

    def read_json(self, path: str) -> Any:
        """A JSON file's content."""
        return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Any) -> None:
        """Write a JSON file, indented, for people to read."""
        self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_array(self, path: str) -> np.ndarray:
        """A .npy file as an array; memory-mapped, read-only, on a local disk. Never unpickles."""
        if self.is_local:
            if not self.exists(path):
                raise NotFoundError(f"{path} is not in workspace {self.uri}")
            return np.load(self.full(path), mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]
        return np.load(io.BytesIO(self.read_bytes(path)), allow_pickle=False)  # type: ignore[no-any-return]

    def write_array(self, path: str, array: np.ndarray) -> None:
        """Write a .npy file, without pickle."""
        with self.open_output(path) as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table."""
        with self.open_input(path) as stream:
            return pq.read_table(stream, columns=columns)

    def write_table(self, path: str, table: pa.Table, row_group_rows: int = 100_000) -> None:
        """Write a table as a Parquet file, zstd-compressed."""
        with self.open_output(path) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=row_group_rows)

    @contextmanager
    def local_copy(self, path: str) -> Iterator[Path]:
        """The file under a local path, for libraries that read nothing else; a download on a bucket."""
        if self.is_local:
            if not self.exists(path):
                raise NotFoundError(f"{path} is not in workspace {self.uri}")
            yield Path(self.full(path))
            return
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            target = Path(folder) / posixpath.basename(path)
            with self.open_input(path) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
            yield target

    def put_file(self, local: Path, path: str) -> None:
        """Copy a local file into the workspace, whole."""
        with local.open("rb") as source, self.open_output(path) as stream:
            shutil.copyfileobj(source, stream)
