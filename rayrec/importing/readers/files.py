"""Find and open the files that an import reads: local paths and s3:// or gs:// URIs, plain or .gz."""

import gzip
import posixpath
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.errors import InputError

COMPRESSED = ".gz"


class SourceFile(NamedTuple):
    """A file to read."""

    source: str  # path or URI
    size: int  # bytes
    changed: int  # ns since 1970


def find_files(paths: Sequence[str], patterns: Sequence[str]) -> list[SourceFile]:
    """The files that `paths` name: a file as it is, of a folder all files below that match a pattern, by name.

    Raises `InputError` for a path that is not there and for a folder without a matching file.
    """
    found: dict[str, SourceFile] = {}
    for path in paths:
        for item in _files_of(path, patterns):
            found.setdefault(item.source, item)
    return list(found.values())


def is_compressed(source: str) -> bool:
    """True for .gz files, which are read from the start only."""
    return source.endswith(COMPRESSED)


@contextmanager
def open_source(source: str) -> Iterator[pa.NativeFile]:
    """The bytes of a file as they are, random access. Raises `InputError` where it cannot be opened."""
    filesystem, path = _filesystem(source)
    try:
        stream = filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(f"{source} cannot be opened: {_first_line(error)}; check the path and the rights") from error
    with stream:
        yield stream


@contextmanager
def open_plain(source: str) -> Iterator[IO[bytes]]:
    """The content of a file from its start, unpacked where it is .gz."""
    with open_source(source) as stream:
        if not is_compressed(source):
            yield cast(IO[bytes], stream)
            return
        try:
            with gzip.GzipFile(fileobj=cast(IO[bytes], stream)) as unpacked:
                yield cast(IO[bytes], unpacked)
        except (gzip.BadGzipFile, EOFError) as error:
            raise InputError(f"{source} is not a whole gzip file: {_first_line(error)}; fetch it again") from error


def _files_of(path: str, patterns: Sequence[str]) -> list[SourceFile]:
    filesystem, inner = _filesystem(path)
    place = path if "://" in path else inner
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"{path} does not exist; give a file or a folder to import")
        if info.type == pafs.FileType.File:
            return [SourceFile(place, info.size, info.mtime_ns or 0)]
        below = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_first_line(error)}; check the path and the rights") from error
    files = [
        SourceFile(posixpath.join(place, posixpath.relpath(item.path, inner)), item.size, item.mtime_ns or 0)
        for item in sorted(below, key=lambda item: str(item.path))
        if item.type == pafs.FileType.File and _matches(item.base_name, patterns)
    ]
    if not files:
        raise InputError(f"folder {path} holds no file named {' or '.join(patterns)} (or .gz); name the files instead")
    return files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    plain = name.lower().removesuffix(COMPRESSED)
    return not name.startswith((".", "_")) and any(fnmatch(plain, pattern) for pattern in patterns)


def _filesystem(source: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in source:
        # Absolute, because workers have their own working folder.
        return pafs.LocalFileSystem(), str(Path(source).expanduser().absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{source} cannot be opened: {_first_line(error)}; give a local path, s3://bucket/key or gs://bucket/key"
        ) from error
    return filesystem, path


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
