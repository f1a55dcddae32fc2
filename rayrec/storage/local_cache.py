"""Files of object storage that the processes of a node share: one memory-mapped copy on the local disk.

The copy is made once, by the process that comes first, while the others wait. Copies that nobody has used for
some days go when the next one is made.
"""

import hashlib
import os
import tempfile
import time
from pathlib import Path

import pyarrow.fs as pafs
from filelock import FileLock

from rayrec.errors import DamagedArtifactError

FOLDER_VARIABLE = "RAYREC_CACHE"  # names the folder
UNUSED_DAYS = 3.0
BLOCK = 1 << 22


def cache_folder() -> Path:
    """RAYREC_CACHE, else a folder of this user among the temporary files."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"rayrec-cache-{os.getuid()}"


def cached(filesystem: pafs.FileSystem, info: pafs.FileInfo, sha256: str | None = None) -> Path:
    """The local copy of a file of a file system, made where there is none of this version.

    Raises `DamagedArtifactError` where the file is not what `sha256` says; the checksum is taken while it is copied.
    """
    version = f"{filesystem.type_name}:{info.path}:{info.size}:{info.mtime_ns}:{sha256 or ''}"
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}-{info.base_name}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            os.utime(target)
            return target
        _delete_unused(folder)
        part = target.with_name(f"{target.name}.part")
        found = _copy(filesystem, info.path, part)
        if sha256 is not None and found != sha256:
            part.unlink()
            raise DamagedArtifactError(f"{info.path} does not match its checksum; make it again")
        part.replace(target)
    return target


def _copy(filesystem: pafs.FileSystem, path: str, target: Path) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as source, target.open("wb") as copy:
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
