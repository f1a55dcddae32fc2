"""The workspace: the folder or bucket prefix that holds every artifact. Only this module defines its paths."""

import hashlib
import io
import json
import os
import posixpath
import re
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

from rayrec.errors import DamagedArtifactError, InputError, NotFoundError, StorageError, first_line
from rayrec.storage.object_storage import (
    DISK_FULL_ERRORS,
    SMALL,
    cached,
    checksum,
    open_uri,
    patient,
    storage_error,
    upload,
    without_secrets,
)

DATASET = "dataset"
DATASET_MANIFEST = "dataset/dataset.json"
GENERATING = "dataset/.generating.json"  # config of generated buckets that are not complete yet
SONGS_TABLE = "dataset/songs.parquet"
LATER_SONGS = "dataset/songs"
HISTORIES = "dataset/histories"
USERS = "dataset/users"
PLAYLISTS = "dataset/playlists"
REJECTED_ROWS = "dataset/rejected"
STATES_FILE = "serving/states.sqlite"  # the embedded store of user states
REPLICAS = "serving/replicas"  # reports of each replica of a server
IMPRESSIONS = "serving/impressions"  # answers of a server, and the later events of users
FORGOTTEN = "forgotten"  # digests of deleted users
LINEAGES = "lineages"  # one empty file per lineage of the data sets so far, under which stores may hold users
IMPORT_STAGING = "dataset/.staging"  # completed work of an unfinished import
SENT_PLAYS = ".inputs"  # tables of plays from Python, until they are imported

CURRENT_FILE = "current.json"  # kind -> ids, in the order of their last request
LOCK = ".lock"  # file lock of the run that writes, on a local disk
LOCK_HOLDER = ".lock-holder.json"  # the run that holds the lock; on object storage this is the lock itself

ID = re.compile(r"[\w-][\w.-]{0,63}", re.ASCII)  # an id of an artifact or split names one folder or file


def histories_file(part: int, bucket: int, last_part: int | None = None) -> str:
    """Return the path of the histories of a bucket of users in one part, or in joined parts up to `last_part`."""
    parts = f"{part:04d}" if last_part in (None, part) else f"{part:04d}-{last_part:04d}"
    return f"{HISTORIES}/part={parts}/bucket={bucket:05d}/histories.parquet"


def later_songs_file(first: int) -> str:
    """Return the path of songs from row `first` on that were added without plays, after those in songs.parquet."""
    return f"{LATER_SONGS}/{first:010d}.parquet"


def users_file(part: int, bucket: int) -> str:
    """Return the path of the ids of all users of a bucket; `part` is the last part that has new users."""
    return f"{USERS}/bucket={bucket:05d}/part={part:04d}.parquet"


def earlier_manifest(dataset_id: str) -> str:
    """Return the path of the manifest of an earlier data set, to which data was appended."""
    return f"{DATASET}/earlier/{dataset_id}.json"


def playlists_file(bucket: int) -> str:
    """Return the path of one bucket of imported playlists, a Parquet file."""
    return f"{PLAYLISTS}/playlists-{bucket:05d}.parquet"


def rejected_rows_file(kind: str, part: int, name: str) -> str:
    """Return the path of a Parquet file with rejected rows; `kind` is plays or playlists."""
    return f"{REJECTED_ROWS}/{kind}-{f'part{part:04d}-' if part else ''}{name}.parquet"


def split_file(split_id: str) -> str:
    """Return the path of one split, a JSON file."""
    return f"splits/{split_id}.json"


def artifact_dir(kind: str, artifact_id: str) -> str:
    """Return the folder of one artifact; `kind` is that of its `Manifest`."""
    return f"{kind}/{artifact_id}"


class OutputFile(io.RawIOBase):
    """A file that is written sequentially, and whose checksum is computed during the writing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, data: Any, /) -> int:
        """Append bytes and return their number."""
        self._digest.update(data)
        num_bytes = self._file.write(data)
        self._size += num_bytes
        return num_bytes

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._size

    @property
    def sha256(self) -> str:
        """The checksum of the bytes written so far."""
        return self._digest.hexdigest()


class Workspace:
    """Reads and writes files under one root, a local path or an s3:// or gs:// prefix.

    All paths are relative to the root, with forward slashes. Every write appears completely or not at all: a temporary
    file that is renamed on a local disk, a single put on a bucket. A workspace pickles as its URI, so it can be sent to
    Ray workers. If object storage fails or refuses access, methods raise `StorageError`.

    Raises `InputError` for a URI without a bucket, one that pyarrow cannot open and one that contains a key or
    password, for an empty path, and for a path that is a file or cannot be read.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        if "://" in self.uri:
            filesystem, root = open_uri(self.uri, "workspace")
            self.filesystem = patient(filesystem)
        else:
            self.filesystem = pafs.LocalFileSystem()
            root = _local_root(self.uri)
        self.root = root.rstrip("/")
        if self.is_local:
            _require_folder(self.root)
        elif "" in self.root.split("/"):
            raise InputError(
                f"workspace {without_secrets(self.uri)} has an empty name between slashes or no bucket; expected "
                "s3://bucket/prefix or gs://bucket/prefix"
            )

    def __reduce__(self) -> tuple[type["Workspace"], tuple[str]]:
        return Workspace, (self.root if self.is_local else self.uri,)

    def __repr__(self) -> str:
        return f"Workspace({self.uri!r})"

    @property
    def is_local(self) -> bool:
        """True if the root is on a local disk."""
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def full(self, path: str) -> str:
        """Return the path as the file system of pyarrow expects it."""
        return posixpath.join(self.root, path)

    def uri_of(self, path: str) -> str:
        """Return the local path or the URI of a file, for code that reads files outside of workspaces.

        The options of the workspace's URI are kept.
        """
        if self.is_local:
            return self.full(path)
        prefix, separator, options = self.uri.partition("?")
        return f"{prefix.rstrip('/')}/{path}{separator}{options}"

    @contextmanager
    def _requests(self, path: str) -> Iterator[None]:
        """Raise `StorageError` if object storage fails in a with block, such as without rights."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if self.is_local:
                raise
            raise storage_error(self.full(path), error) from error

    def _info(self, path: str) -> pafs.FileInfo:
        with self._requests(path):
            return self.filesystem.get_file_info(self.full(path))

    def _infos_in(self, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        """Return what is in a folder; nothing if it does not exist."""
        with self._requests(folder):
            selector = pafs.FileSelector(self.full(folder), allow_not_found=True, recursive=recursive)
            return list(self.filesystem.get_file_info(selector))

    def exists(self, path: str) -> bool:
        """Return True if a file or folder exists."""
        return bool(self._info(path).type != pafs.FileType.NotFound)

    def size(self, path: str) -> int:
        """Return the bytes of all files at or below `path`; 0 if there are none."""
        info = self._info(path)
        return int(info.size) if info.type == pafs.FileType.File else sum(self.sizes(path).values())

    def files(self, path: str) -> list[str]:
        """Return all files below a folder, as sorted paths relative to the root, without hidden and temporary files."""
        return sorted(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        """Return path -> bytes of all files below a folder, from one listing, without hidden and temporary files."""
        return {file: size for file, (_, size) in self.versions(path).items()}

    def versions(self, path: str) -> dict[str, tuple[int, int]]:
        """Return path -> (time of the last change in ns, bytes) of the same files as `sizes`, from one listing.

        Object storage may give the time in whole seconds, by its own clock.
        """
        return {
            posixpath.relpath(info.path, self.root): (int(info.mtime_ns), int(info.size))
            for info in self._infos_in(path, recursive=True)
            if info.type == pafs.FileType.File and not info.base_name.startswith(".")
        }

    @property
    def is_empty(self) -> bool:
        """True if the root does not exist, or contains no file and no folder."""
        return not self._infos_in("")

    def folders(self, path: str) -> list[str]:
        """Return the sorted names of the folders directly in a folder."""
        return sorted(info.base_name for info in self._infos_in(path) if info.type == pafs.FileType.Directory)

    def delete(self, path: str) -> None:
        """Delete a file, or a folder with its contents; do nothing if it does not exist."""
        info = self._info(path)
        with self._requests(path):
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.full(path))
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(self.full(path))

    def delete_unfinished(self, path: str) -> None:
        """Delete the temporary files of killed writers below a folder; there are none on object storage.

        No run may write to the folder at the same time.
        """
        if self.is_local:
            for temporary_file in Path(self.full(path)).rglob(".*"):
                if temporary_file.is_file():
                    temporary_file.unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        """Rename a file; an existing target is replaced."""
        if self.is_local:
            _make_folder(Path(self.full(target)).parent)
        with self._requests(source):
            self.filesystem.move(self.full(source), self.full(target))
        if self.is_local:
            _sync(Path(self.full(target)).parent)

    def open_input(self, path: str) -> pa.NativeFile:
        """Open a random access file. Raises `NotFoundError` if it does not exist."""
        try:
            with self._requests(path):
                return self.filesystem.open_input_file(self.full(path))
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{path} not found in workspace {self.uri}; `rayrec verify` lists damaged parts"
            ) from error

    @contextmanager
    def open_output(self, path: str) -> Iterator[OutputFile]:
        """Open a stream in a with block; it becomes the file `path` when the block ends without an error.

        On a local disk the file survives a power cut once the block has ended.
        Raises `StorageError` if the disk is full or the storage keeps failing.
        """
        target = self.full(path)
        if self.is_local:
            _make_folder(Path(target).parent)
            temporary_file = Path(target).parent / f".{posixpath.basename(target)}.{uuid.uuid4().hex}"
        else:
            # Write to a local disk first: pyarrow closes an abandoned stream, which would store an incomplete object.
            descriptor, name = tempfile.mkstemp(prefix="rayrec-")
            os.close(descriptor)
            temporary_file = Path(name)
        try:
            with temporary_file.open("wb") as file:
                yield OutputFile(file)
                file.flush()
                if self.is_local:
                    os.fsync(file.fileno())
            if self.is_local:
                temporary_file.replace(target)
                _sync(temporary_file.parent)
            else:
                upload(self.filesystem, temporary_file, target)
        except OSError as error:
            if error.errno not in DISK_FULL_ERRORS:
                raise
            raise StorageError(
                f"no space left to write {path} in {self.uri if self.is_local else temporary_file.parent}: {error}; "
                "free some space and run the command again: completed work is kept"
            ) from error
        finally:
            temporary_file.unlink(missing_ok=True)

    def read_bytes(self, path: str) -> bytes:
        """Return the content of a file."""
        with self._requests(path), self.open_input(path) as stream:
            return bytes(stream.read())

    def write_bytes(self, path: str, data: bytes) -> str:
        """Write a file and return its sha256."""
        with self.open_output(path) as stream:
            stream.write(data)
        return stream.sha256

    def read_json(self, path: str) -> Any:
        """Return the content of a JSON file. Raises `DamagedArtifactError` if it is cut off or not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise DamagedArtifactError(
                f"{path} is not JSON ({error}); restore it from a backup, or delete it and rerun the command that "
                "created it"
            ) from error

    def write_json(self, path: str, value: Any) -> str:
        """Write an indented JSON file and return its sha256."""
        return self.write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_array(self, path: str, sha256: str | None = None) -> np.ndarray:
        """Return a .npy file as a read-only, memory-mapped array, whose memory the processes of a node share.

        Pickled data is refused. A file on a bucket is copied to the local disk, and the copy is compared with `sha256`.
        """
        array: np.ndarray = np.load(self.local_file(path, sha256), mmap_mode="r", allow_pickle=False)
        array.location_of = self, path  # type: ignore[attr-defined]  # for `location_of`
        return array

    def write_array(self, path: str, array: np.ndarray) -> str:
        """Write a .npy file without pickle and return its sha256."""
        with self.open_output(path) as stream:
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
        return stream.sha256

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        """Return a Parquet file as a table."""
        with self._requests(path), self.open_input(path) as stream:
            return pq.read_table(stream, columns=columns)

    def write_table(self, path: str, table: pa.Table, row_group_rows: int = 100_000) -> str:
        """Write a table as a Parquet file with zstd compression and return its sha256."""
        with self.open_output(path) as stream:
            pq.write_table(table, stream, compression="zstd", row_group_size=row_group_rows)
        return stream.sha256

    def local_file(self, path: str, sha256: str | None = None) -> Path:
        """Return a local path of the file, for libraries that need one.

        For a file on a bucket this is a copy that the processes of a node share; see `cached` for `sha256`.
        Raises `NotFoundError` if the file does not exist.
        """
        info = self._info(path)
        if info.type != pafs.FileType.File:
            raise NotFoundError(f"{path} not found in workspace {self.uri}; `rayrec verify` lists damaged parts")
        return Path(info.path) if self.is_local else cached(self.filesystem, info, sha256)

    def sha256_on_node(self, path: str) -> str:
        """Return the sha256 of a file. Only one process of this node reads a large file, or copies it from a bucket."""
        info = self._info(path)
        if not self.is_local and info.size >= SMALL:
            cached(self.filesystem, info)
        return checksum(self.filesystem, info)

    def put_file(self, local: Path, path: str) -> str:
        """Copy a local file into the workspace and return its sha256."""
        with local.open("rb") as source, self.open_output(path) as stream:
            shutil.copyfileobj(source, stream, 1 << 22)
        return stream.sha256


def _local_root(path: str) -> str:
    """Return the absolute path of a local workspace. Raises `InputError` for text that is no path of a folder."""
    if not path.strip():
        raise InputError(
            "the workspace is an empty text, perhaps of a variable that is not set; give a folder, s3://bucket/prefix "
            "or gs://bucket/prefix"
        )
    if path.startswith(("s3:", "gs:", "file:")):
        scheme = path.partition(":")[0]
        raise InputError(
            f"the workspace begins with {scheme}: but not with {scheme}://; expected s3://bucket/prefix or "
            "gs://bucket/prefix as text (a Path joins the slashes), or a local path"
        )
    try:
        return str(Path(path).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: an unknown user after ~
        raise _unreadable_error(path, error) from error


def _require_folder(root: str) -> None:
    try:
        is_file = Path(root).exists() and not Path(root).is_dir()
    except OSError as error:
        raise _unreadable_error(root, error) from error
    if is_file:
        raise InputError(f"workspace {root!r} is a file; expected a folder")


def _unreadable_error(path: str, error: Exception) -> InputError:
    return InputError(f"workspace {path!r} cannot be opened: {first_line(error)}; expected the path of a folder")


def location_of(array: np.ndarray) -> tuple[Workspace, str] | None:
    """Return the workspace and the path of an array from `read_array`, or of a view of all of it; None for others."""
    base_array = array
    while isinstance(base_array.base, np.ndarray):
        base_array = base_array.base
    location: tuple[Workspace, str] | None = getattr(base_array, "location_of", None)
    return location if array.__array_interface__ == base_array.__array_interface__ else None


def _make_folder(folder: Path) -> None:
    """Create a local folder and its parents, and flush the entry of each new folder to disk."""
    new_folders = [folder, *folder.parents]
    new_folders = new_folders[: next(index for index, ancestor in enumerate(new_folders) if ancestor.exists())]
    folder.mkdir(parents=True, exist_ok=True)
    for new_folder in new_folders:
        _sync(new_folder.parent)


def _sync(folder: Path) -> None:
    """Flush the entries of a local folder to disk; without this, a power cut may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
