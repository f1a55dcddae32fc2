"""The workspace: the folder or bucket prefix that holds every artifact. Paths are made here only."""

import errno
import hashlib
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
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.errors import DamagedArtifactError, InputError, NotFoundError, StorageError
from rayrec.storage.object_storage import SMALL, cached, checksum, patient, require_no_credentials, upload

DATASET = "dataset"
DATASET_MANIFEST = "dataset/dataset.json"
GENERATING = "dataset/.generating.json"  # the config that unfinished generated buckets belong to
SONGS_TABLE = "dataset/songs.parquet"
LATER_SONGS = "dataset/songs"
HISTORIES = "dataset/histories"
USERS = "dataset/users"
PLAYLISTS = "dataset/playlists"
REJECTED_ROWS = "dataset/rejected"
STATES_FILE = "serving/states.sqlite"  # the embedded store of user states
REPLICAS = "serving/replicas"  # what each replica of a server reports
IMPRESSIONS = "serving/impressions"  # what a server answered, and what users then did
FORGOTTEN = "forgotten"  # who was deleted
IMPORT_STAGING = "dataset/.staging"  # what an unfinished import has done so far
SENT_PLAYS = ".inputs"  # tables of plays from Python on their way into the data set

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk without room says
CURRENT = "current.json"  # kind -> ids, in the order in which they were requested last
LOCK = ".lock"  # held by the run that writes, on a local disk
LOCK_HOLDER = ".lock-holder.json"  # who that is; on object storage the lock itself


def histories_file(part: int, bucket: int, last_part: int | None = None) -> str:
    """The Parquet file of one bucket of users in one part of the histories, or in parts joined up to `last_part`."""
    parts = f"{part:04d}" if last_part in (None, part) else f"{part:04d}-{last_part:04d}"
    return f"{HISTORIES}/part={parts}/bucket={bucket:05d}/histories.parquet"


def later_songs_file(first: int) -> str:
    """The Parquet file of songs that came behind those of songs.parquet without plays, from row `first` on."""
    return f"{LATER_SONGS}/{first:010d}.parquet"


def users_file(part: int, bucket: int) -> str:
    """The Parquet file of the ids of all users of a bucket up to a part, the last one that brought new users."""
    return f"{USERS}/bucket={bucket:05d}/part={part:04d}.parquet"


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


class OutputFile(io.RawIOBase):
    """A file that is being written from its start to its end; its checksum is taken on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any, /) -> int:
        """Append bytes."""
        self._digest.update(data)
        written = self._file.write(data)
        self._size += written
        return written

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """The checksum of what was written so far."""
        return self._digest.hexdigest()


class Workspace:
    """Reads and writes files under one root, a local path or an s3:// or gs:// prefix.

    All paths are relative to the root, with forward slashes. Every write appears whole or not at
    all: a temporary name and a rename on a local disk, one object put on a bucket. A workspace
    pickles as its URI, so it travels to Ray workers.

    Raises `InputError` for a URI that pyarrow cannot open, and for one with a key or password in it.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        try:
            if "://" in self.uri:
                require_no_credentials(self.uri)
                filesystem, root = pafs.FileSystem.from_uri(self.uri)
                self.filesystem = patient(filesystem)
            else:
                self.filesystem = pafs.LocalFileSystem()
                root = str(Path(self.uri).expanduser().resolve())
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(
                f"workspace {self.uri!r} cannot be opened: {error}; "
                "expected a local path, s3://bucket/prefix or gs://bucket/prefix"
            ) from error
        self.root = root.rstrip("/")
        if self.is_local and Path(self.root).exists() and not Path(self.root).is_dir():
            raise InputError(f"workspace {self.uri!r} is a file; expected a folder")

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

    def uri_of(self, path: str) -> str:
        """The local path or the URI of a file, for what reads files outside of workspaces; the URI's options stay."""
        if self.is_local:
            return self.full(path)
        place, mark, options = self.uri.partition("?")
        return f"{place.rstrip('/')}/{path}{mark}{options}"

    def exists(self, path: str) -> bool:
        """True if a file or folder is there."""
        return bool(self.filesystem.get_file_info(self.full(path)).type != pafs.FileType.NotFound)

    def size(self, path: str) -> int:
        """Bytes of all files at or below `path`; 0 where there is nothing."""
        info = self.filesystem.get_file_info(self.full(path))
        return int(info.size) if info.type == pafs.FileType.File else sum(self.sizes(path).values())

    def files(self, path: str) -> list[str]:
        """All files below a folder, as sorted paths relative to the root; hidden and temporary ones left out."""
        return sorted(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        """The bytes of all files below a folder, of one listing; hidden and temporary ones left out."""
        selector = pafs.FileSelector(self.full(path), allow_not_found=True, recursive=True)
        return {
            posixpath.relpath(info.path, self.root): int(info.size)
            for info in self.filesystem.get_file_info(selector)
            if info.type == pafs.FileType.File and not info.base_name.startswith(".")
        }

    @property
    def is_empty(self) -> bool:
        """True where the root is not there, or has no file and no folder."""
        selector = pafs.FileSelector(self.full(""), allow_not_found=True)
        return not self.filesystem.get_file_info(selector)

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

    def delete_unfinished(self, path: str) -> None:
        """Remove the temporary files of killed writers below a folder that nobody writes to; buckets have none."""
        if self.is_local:
            for left in Path(self.full(path)).rglob(".*"):
                if left.is_file():
                    left.unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        """Rename a file, over one that may be there."""
        if self.is_local:
            _make_folder(Path(self.full(target)).parent)
        self.filesystem.move(self.full(source), self.full(target))
        if self.is_local:
            _sync(Path(self.full(target)).parent)

    def open_input(self, path: str) -> pa.NativeFile:
        """A random access file. Raises `NotFoundError` where there is none."""
        try:
            return self.filesystem.open_input_file(self.full(path))
        except FileNotFoundError as error:
            raise NotFoundError(f"{path} not found in workspace {self.uri}") from error

    @contextmanager
    def open_output(self, path: str) -> Iterator[OutputFile]:
        """A stream that becomes the file `path` when the block ends without an error; it knows its checksum.

        On a local disk the file survives a power cut once the block has ended.
        Raises `StorageError` where the disk is full or the storage goes on failing.
        """
        target = self.full(path)
        if self.is_local:
            _make_folder(Path(target).parent)
            written = Path(target).parent / f".{posixpath.basename(target)}.{uuid.uuid4().hex}"
        else:
            # First on a local disk: pyarrow closes a stream that is let go of, and half a file would be there.
            descriptor, name = tempfile.mkstemp(prefix="rayrec-")
            os.close(descriptor)
            written = Path(name)
        try:
            with written.open("wb") as file:
                yield OutputFile(file)
                file.flush()
                if self.is_local:
                    os.fsync(file.fileno())
            if self.is_local:
                written.replace(target)
                _sync(written.parent)
            else:
                upload(self.filesystem, written, target)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StorageError(
                f"no space left to write {path} in {self.uri if self.is_local else written.parent}: {error}; "
                "free some space and run the command again: completed work is kept"
            ) from error
        finally:
            written.unlink(missing_ok=True)

    def read_bytes(self, path: str) -> bytes:
        """A file's content."""
        with self.open_input(path) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> str:
        """Write a file whole; its sha256."""
        with self.open_output(path) as stream:
            stream.write(data)
        return stream.sha256

    def read_json(self, path: str) -> Any:
        """A JSON file's content. Raises `DamagedArtifactError` for a file that is cut off or holds something else."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DamagedArtifactError(
                f"{path} is not JSON ({error}); restore it from a backup, or delete it and run its command again"
            ) from error

    def write_json(self, path: str, value: Any) -> str:
        """Write a JSON file, indented, for people to read; its sha256."""
        return self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_array(self, path: str, sha256: str | None = None) -> np.ndarray:
        """A .npy file as an array, memory-mapped and read-only: the processes of a node share its pages.

        Never unpickles. On a bucket it is a copy on the local disk, which is compared with `sha256` while it is made.
        """
        array: np.ndarray = np.load(self.local_file(path, sha256), mmap_mode="r", allow_pickle=False)
        array.stored_at = self, path  # type: ignore[attr-defined]  # for `stored_at`
        return array

    def write_array(self, path: str, array: np.ndarray) -> str:
        """Write a .npy file, without pickle; its sha256."""
        with self.open_output(path) as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
        return stream.sha256

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table."""
        with self.open_input(path) as stream:
            return pq.read_table(stream, columns=columns)

    def write_table(self, path: str, table: pa.Table, row_group_rows: int = 100_000) -> str:
        """Write a table as a Parquet file, zstd-compressed; its sha256."""
        with self.open_output(path) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=row_group_rows)
        return stream.sha256

    def local_file(self, path: str, sha256: str | None = None) -> Path:
        """The file under a local path, for libraries that read nothing else; on a bucket the one copy of this node."""
        info = self.filesystem.get_file_info(self.full(path))
        if info.type != pafs.FileType.File:
            raise NotFoundError(f"{path} not found in workspace {self.uri}")
        return Path(info.path) if self.is_local else cached(self.filesystem, info, sha256)

    def sha256_on_node(self, path: str) -> str:
        """The checksum of a file. One process of this node reads a large file, on a bucket copies it, for all."""
        info = self.filesystem.get_file_info(self.full(path))
        if not self.is_local and info.size >= SMALL:
            cached(self.filesystem, info)
        return checksum(self.filesystem, info)

    def put_file(self, local: Path, path: str) -> str:
        """Copy a local file into the workspace, whole; its sha256."""
        with local.open("rb") as source, self.open_output(path) as stream:
            shutil.copyfileobj(source, stream, 1 << 22)
        return stream.sha256


def stored_at(array: np.ndarray) -> tuple[Workspace, str] | None:
    """The file that an array is whole, as `read_array` gave it or a view of that; None for any other array."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    place: tuple[Workspace, str] | None = getattr(whole, "stored_at", None)
    return place if array.__array_interface__ == whole.__array_interface__ else None


def _make_folder(folder: Path) -> None:
    """Make a local folder and those above it, each written to disk in the one that holds it."""
    missing = [folder, *folder.parents]
    missing = missing[: next(place for place, above in enumerate(missing) if above.exists())]
    folder.mkdir(parents=True, exist_ok=True)
    for new_folder in missing:
        _sync(new_folder.parent)


def _sync(folder: Path) -> None:
    """Write what a local folder holds to disk: without it a rename may be lost in a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
