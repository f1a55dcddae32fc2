"""Find and open the files that an import reads: local paths and s3:// or gs:// URIs, plain, .gz or .bz2."""

import bz2
import gzip
import posixpath
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple, cast

import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.errors import DamagedInputError, InputError

COMPRESSED = (".gz", ".bz2")
HEAD_BYTES = 64 << 10
# How files begin that are no text in UTF-8, whatever their name.
OTHER_FORMATS = {
    b"\x1f\x8b": "a gzip file; give it a name that ends in .gz",
    b"BZh": "a bzip2 file; give it a name that ends in .bz2",
    b"PK\x03\x04": "a zip archive; unpack it and import the folder",
    b"PAR1": "a Parquet file; import it as parquet",
    b"\xff\xfe": "text in UTF-16; save it as UTF-8",
    b"\xfe\xff": "text in UTF-16; save it as UTF-8",
    b"SQLite format 3": "an SQLite database; export its plays as csv",
    b"%PDF": "a PDF document; export the plays as csv",
    b"<!DOCTYPE": "an HTML page; fetch the file again",
    b"<html": "an HTML page; fetch the file again",
}


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
    """True for .gz and .bz2 files, which are read from the start only."""
    return source.endswith(COMPRESSED)


def plain_name(source: str) -> str:
    """A file's name without .gz or .bz2."""
    return source[: source.rindex(".")] if is_compressed(source) else source


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
    """The content of a file from its start, unpacked where it is .gz or .bz2."""
    with open_source(source) as stream:
        if not is_compressed(source):
            yield cast(IO[bytes], stream)
            return
        packed = cast(IO[bytes], stream)
        by_bzip2 = source.endswith(".bz2")
        try:
            with bz2.BZ2File(packed) if by_bzip2 else gzip.GzipFile(fileobj=packed) as unpacked:
                yield cast(IO[bytes], unpacked)
        except (OSError, EOFError, zlib.error) as error:  # BZ2File raises a bare OSError
            kind = "bzip2" if by_bzip2 else "gzip"
            raise DamagedInputError(
                f"{source} is not a whole {kind} file: {_first_line(error)}; fetch it again"
            ) from error


def ends_with_line(file: SourceFile) -> bool:
    """True where the last byte of a file is a line end; a compressed file knows its own end."""
    if is_compressed(file.source) or not file.size:
        return True
    with open_source(file.source) as stream:
        stream.seek(file.size - 1)
        return bool(stream.read(1) == b"\n")


def cut_note(files: Sequence[SourceFile]) -> list[str]:
    """A note where the last line of text files has no end: nothing else says that one was cut."""
    open_ended = [file.source for file in files if not ends_with_line(file)]
    if not open_ended:
        return []
    more = f" and {len(open_ended) - 1:,} more files" if len(open_ended) > 1 else ""
    return [f"The last line of {open_ended[0]}{more} has no line end: the file may have been cut."]


def require_text(source: str) -> bytes:
    """A file's first 64 KiB. Raises `DamagedInputError` where it is empty or plainly of another format."""
    with open_plain(source) as stream:
        head = stream.read(HEAD_BYTES)
    if not head:
        raise DamagedInputError(f"{source} is empty; fetch it again")
    for beginning, what in OTHER_FORMATS.items():
        if head.startswith(beginning):
            raise DamagedInputError(f"{source} is {what}")
    return head


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
        raise InputError(
            f"folder {path} holds no file named {' or '.join(patterns)} (or .gz, .bz2); name the files instead"
        )
    return files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    plain = plain_name(name.lower())
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
