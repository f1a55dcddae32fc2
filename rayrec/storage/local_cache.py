"""Files that the processes of a node share, memory-mapped: copies of object storage, and what is made of a release.

Each is made once, by the process that comes first, while the others wait. Copies that nobody has used for
some days go when the next one is made.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
from filelock import FileLock

from rayrec.errors import DamagedArtifactError

FOLDER_VARIABLE = "RAYREC_CACHE"  # names the folder
UNUSED_DAYS = 3.0
BLOCK = 1 << 22
SMALL = 1 << 20  # bytes of files that are read again sooner than looked up


def cache_folder() -> Path:
    """RAYREC_CACHE, else a folder of this user among the temporary files."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"rayrec-cache-{os.getuid()}"


def cached(filesystem: pafs.FileSystem, info: pafs.FileInfo, sha256: str | None = None) -> Path:
    """The local copy of a file of a file system, made where there is none of this version.

    Raises `DamagedArtifactError` where the file is not what `sha256` says; the checksum is taken while it is copied.
    """

    def copy(target: Path) -> None:
        digest = _copy(filesystem, info.path, target)
        made_once(_version(filesystem, info), f"{info.base_name}.sha256", lambda beside: beside.write_text(digest))

    path = made_once(_version(filesystem, info), info.base_name, copy)
    if sha256 is not None and _digest(filesystem, info) != sha256:
        path.unlink(missing_ok=True)
        raise DamagedArtifactError(f"{info.path} does not match its checksum; make it again")
    return path


def checksum(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    """The sha256 of a file of a file system. Of each version of a large file one process of the node reads it."""
    return _copy(filesystem, info.path, None) if info.size < SMALL else _digest(filesystem, info)


def _digest(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    def read(target: Path) -> None:
        target.write_text(_copy(filesystem, info.path, None))

    return made_once(_version(filesystem, info), f"{info.base_name}.sha256", read).read_text()


def mapped_table(version: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table of a version, in memory that the processes of this node share; `make` makes it where there is none."""

    def write(target: Path) -> None:
        table = make().combine_chunks()
        with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)

    path = made_once(version, "table.arrow", write)
    pa.default_memory_pool().release_unused()  # where it was made here
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def made_once(version: str, name: str, make: Callable[[Path], object]) -> Path:
    """The file of a version that `make` writes to the path it is given, where there is none on this node yet."""
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}-{name}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            os.utime(target)
            return target
        _delete_unused(folder)
        part = target.with_name(f"{target.name}.part")
        make(part)
        part.replace(target)
    return target


def _version(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> str:
    return f"{filesystem.type_name}:{info.path}:{info.size}:{info.mtime_ns}"


def _copy(filesystem: pafs.FileSystem, path: str, target: Path | None) -> str:
    """The sha256 of a file, which is copied where there is a target."""
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as source, (target or Path(os.devnull)).open("wb") as copy:
        while block := source.read(BLOCK):
            digest.update(block)
            copy.write(block)
    return digest.hexdigest()


def _delete_unused(folder: Path) -> None:
    limit = time.time() - UNUSED_DAYS * 86_400
    for path in folder.iterdir():
        try:
            if path.stat().st_mtime < limit:
                path.unlink()  # those who have it open keep it
        except FileNotFoundError:
            continue
