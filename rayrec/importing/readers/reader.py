"""What readers of outside formats share: files, units of work, columns by name, batches of rows, rejected rows.

Files are local paths and s3:// or gs:// URIs, plain, .gz or .bz2. Files of lines are read by byte ranges, in blocks of
whole lines that know their numbers.
"""

import bz2
import gzip
import posixpath
import re
import shlex
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.data import columns
from rayrec.data.spelling import Problems, clean
from rayrec.errors import DamagedInputError, InputError, first_line
from rayrec.storage.artifacts import SKIP_BELOW
from rayrec.storage.object_storage import require_no_credentials

SHOWN_COLUMNS, SHOWN_NAME = 20, 40  # of a header, in a message
TEXT_LIMIT = 1_000  # characters kept of a rejected row
NO_USER = "no user"
IN_FUTURE = "time is more than a day from now"
STREAM_MS = 30_000  # from where on services count a stream; a shorter play counts as skipped
DAY_SECONDS = 86_400  # that clocks and zones may be wrong
NO_SONG = "no song"
NO_PLAYLIST = "no playlist"
# Names of columns as exports and public data sets spell them, best first; letters and digits alone, in lower case.
NAMES = {
    "user": ("user", "userid", "username", "uid", "listener", "listenerid", "account", "accountid", "profile"),
    "song": (
        *("song", "songid", "trackid", "track", "itemid", "item", "trackuri", "spotifytrackuri", "recordingmbid"),
        *("recordingid", "recording", "isrc", "sid", "tid"),
    ),
    "played_at": (
        *("uts", "playedat", "listenedat", "timestamp", "ts", "unixtimestamp", "datetime", "time", "utctime"),
        *("startedat", "endtime", "date", "played", "createdat", "eventtime"),
    ),
    "contexts": ("contexts", "context", "source", "reasonstart"),
    "skipped": ("skipped", "isskipped", "skip", "wasskipped"),
    "share_listened": ("sharelistened", "listenedshare", "playedratio", "playratio", "completion", "completionrate"),
    "ms_played": ("msplayed", "playedms", "mslistened", "listenedms", "playdurationms"),
    "duration_ms": ("durationms", "trackdurationms", "songdurationms", "tracklengthms", "lengthms"),
    "event_type": ("eventtype", "event", "action", "interaction", "interactiontype"),
    "liked": ("liked", "isliked", "like", "loved", "favorite"),
    "title": ("title", "trackname", "songname", "songtitle", "tracktitle", "name"),
    "artist": ("artist", "artistname", "artists", "albumartistname", "performer", "masterartist"),
    "playlist": ("playlist", "playlistid", "pid", "playlistname"),
    "position": ("position", "pos", "index", "order", "rank"),
}
ONE_USER = ", or for plays of one person give --user NAME in place of the user column"
ALIKE = 0.7  # likeness of names, 1: equal, from which on one may be meant for the other


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of one file, read by one task.

    `start` and `stop` are bytes of a line-based file (the lines that begin there) and row groups
    of a Parquet file; a file that cannot be split is one unit without a `stop`.
    """

    source: str  # path or URI of the file
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a reader may need to know besides the file."""

    playlists: bool = False  # rows are entries of playlists, not plays
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column -> its name in the file
    delimiter: str = ","  # between the values of a csv file
    timezone: str = "UTC"  # IANA name, of times without a zone in a csv or Parquet file
    skip_below: float = SKIP_BELOW  # share of a song: a play of which less was listened to counts as skipped
    user: str = ""  # whose plays they are, where the format does not say
    user_separator: str = ""  # between user and songs of a line of a sequence file; empty: lines name no user
    song_separator: str = " "  # between the songs of such a line


class Batch(NamedTuple):
    """Some rows of a unit. Line numbers count from the start of the unit, the first line is 1."""

    rows: pa.Table  # columns.PLAYS or columns.PLAYLIST_ENTRIES
    rejected: pa.Table  # columns.REJECTED
    read: int  # rows read, good and bad
    lines: int  # lines (or records) covered, empty ones and the header included


class SourceRows(Protocol):
    """R rows of a table as they stand in a unit."""

    @property
    def values(self) -> dict[str, pa.Array]:
        """Columns (R,) by the names that were asked for."""
        ...

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): line or record of each row, counted from the start of the unit."""
        ...

    @property
    def covered(self) -> int:
        """Lines (or records) that were read for them."""
        ...

    @property
    def rejected(self) -> pa.Table:
        """columns.REJECTED: lines that are no rows."""
        ...

    def texts(self, positions: np.ndarray) -> list[str]:
        """What stands in the file at some rows."""
        ...


class Reader(Protocol):
    """Reads one outside format."""

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Units of about `unit_bytes` that cover a file of `size` bytes.

        Raises `InputError` where the file can be seen to be of another format or lacks a column.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Batch]:
        """The rows of a unit, in the order of the file."""
        ...


def rejected(source: str, lines: Sequence[int] | np.ndarray, reasons: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """Rows of columns.REJECTED."""
    data = [
        pa.array([source] * len(reasons), pa.string()),
        pa.array(np.asarray(lines, dtype=np.int64)),
        pa.array(reasons, pa.string()),
        pa.array([clean(text[:TEXT_LIMIT]) for text in texts], pa.string()),
    ]
    return pa.table(data, schema=columns.REJECTED)


def batch(
    schema: pa.Schema,
    values: dict[str, pa.Array],
    *,
    source: str,
    lines: np.ndarray,
    problems: Problems,
    texts: Callable[[np.ndarray], Sequence[str]],
    covered: int,
    also: pa.Table | None = None,
) -> Batch:
    """The good rows under `schema`, the bad ones with reason and text.

    `values` may lack nullable columns; `lines` is int64 (R,); `texts` gives the text of the rows at
    some positions; `also` holds rows that were rejected before.
    """
    if columns.PLAYED_AT in values:
        # One play of 2090 would be the last of the data: splits and tastes count back from that.
        problems.mark(np.asarray(values[columns.PLAYED_AT]) > (time.time() + DAY_SECONDS) * 1000, IN_FUTURE)
    bad = problems.bad
    positions = np.flatnonzero(bad)
    refused = rejected(source, lines[positions], problems.reasons(), texts(positions))
    if also is not None and also.num_rows:
        refused = pa.concat_tables([also, refused]).sort_by("line")
    good = pa.array(~bad)
    data = {**values, "line": pa.array(lines)}
    arrays = []
    for item in schema:
        if item.name == "source":
            arrays.append(_repeated(source, len(lines) - len(positions)))
        elif item.name not in data:
            arrays.append(pa.nulls(len(lines) - len(positions), item.type))
        else:
            arrays.append(data[item.name].filter(good) if len(positions) else data[item.name])
    rows = pa.table(arrays, schema=schema)
    return Batch(rows, refused, rows.num_rows + refused.num_rows, covered)


def to_batch(
    rows: SourceRows, data: dict[str, pa.Array], problems: Problems, source: str, schema: pa.Schema = columns.PLAYS
) -> Batch:
    """What was made of some rows: `data` by the names of `schema`, with what is wrong with them."""
    return batch(
        schema,
        data,
        source=source,
        lines=rows.lines,
        problems=problems,
        texts=rows.texts,
        covered=rows.covered,
        also=rows.rejected,
    )


@contextmanager
def naming(source: str) -> Iterator[None]:
    """A with block whose `InputError` names the file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _repeated(text: str, count: int) -> pa.Array:
    encoded = text.encode()
    offsets = np.arange(count + 1, dtype=np.int32) * len(encoded)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(encoded * count))


def required_columns(
    source: str, header: Sequence[str], needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, int]:
    """Position of each column that a format names; optional ones where they are there.

    Raises `InputError` for columns that are not there, all at once, and for one that is there twice.
    """
    missing = [repr(name) for name in needed if name not in header]
    if missing:
        raise InputError(
            f"{source} has no column {' or '.join(missing)}; it has {shown_columns(header)}; is it of this format?"
        )
    present = [*needed, *(name for name in dict.fromkeys(optional) if name in header and name not in needed)]
    return {name: _position(source, header, name) for name in present}


def mapped_columns(
    source: str, header: Sequence[str], names: Mapping[str, str], roles: Sequence[str], needed: Sequence[str]
) -> dict[str, int]:
    """Role -> position of its column: the one that `names` gives, else the one of the role's own name.

    Raises `InputError` for an unknown role, for columns of roles that are `needed` or in `names` and are not there, all
    at once with the nearest ones, and for one that is there twice.
    """
    unknown = [role for role in names if role not in roles]
    if unknown:
        raise InputError(f"cannot map a column to {unknown[0]!r}; expected some of {', '.join(roles)}")
    column_of = {role: names.get(role, role) for role in roles}
    missing = {
        role: name for role, name in column_of.items() if name not in header and (role in names or role in needed)
    }
    if missing:
        wanted = " or ".join(f"{name!r} for {role}" for role, name in missing.items())
        raise InputError(
            f"{source} has no column {wanted}; it has {shown_columns(header)}; "
            f"{mapping_advice(missing, [name for name in header if name not in column_of.values()])}"
        )
    return {role: _position(source, header, name) for role, name in column_of.items() if name in header}


def mapping_advice(missing: Mapping[str, str], header: Sequence[str]) -> str:
    """How to map roles to columns: role -> name that was not found, and the columns that may be meant."""
    nearest = _nearest(missing, header)
    mapping = shlex.quote(",".join(f"{role}={nearest.get(role, 'NAME')}" for role in missing))
    advice = f"map {'it' if len(missing) == 1 else 'them'}{', perhaps' if nearest else ''} with --columns {mapping}"
    return advice + (ONE_USER if "user" in missing and "user" not in nearest else "")


def _nearest(missing: Mapping[str, str], header: Sequence[str]) -> dict[str, str]:
    """Role -> the column whose name is most like one that exports use for it; no column twice, unlike ones left out."""
    names = {plain_letters(name): name for name in reversed(header)}
    names.pop("", None)  # of other letters alone
    likeness: dict[tuple[str, str], float] = {}
    for role, wanted in missing.items():
        for spelled in (plain_letters(wanted), *NAMES.get(role, ())):
            for plain in get_close_matches(spelled, names, cutoff=ALIKE):
                pair = role, names[plain]
                likeness[pair] = max(likeness.get(pair, 0.0), SequenceMatcher(None, plain, spelled).ratio())
    nearest: dict[str, str] = {}
    for role, name in sorted(likeness, key=lambda pair: -likeness[pair]):
        if role not in nearest and name not in nearest.values():
            nearest[role] = name
    return nearest


def plain_letters(name: str) -> str:
    """The letters and digits of a column's name, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _position(source: str, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise InputError(f"{source} has {header.count(name)} columns named {name!r}; rename all but one")
    return header.index(name)


def shown_columns(names: Sequence[str]) -> str:
    """Column names for a message, at most 20 of them."""
    shown = [name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…" for name in names[:SHOWN_COLUMNS]]
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(shown) + more


COMPRESSED = (".gz", ".bz2")
HEAD_BYTES = 64 << 10
BLOCK_BYTES = 16 << 20
TAIL_BYTES = 64 << 10  # read at a time to find the end of a range's last line
LINE_LIMIT = 64 << 20  # a longer line says that this is no text file
NEWLINE, RETURN = 10, 13
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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
    files: dict[str, SourceFile] = {}
    for path in paths:
        for item in _files_of(path, patterns):
            files.setdefault(item.source, item)
    return list(files.values())


def is_file(source: str) -> bool:
    """True where there is a file. Raises `InputError` where that cannot be read."""
    filesystem, path = _filesystem(source)
    try:
        return bool(filesystem.get_file_info(path).type == pafs.FileType.File)
    except OSError as error:
        raise _unreadable(source, error) from error


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"the path {path} cannot be read: {first_line(error)}; check it and its rights")


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
        raise InputError(f"{source} cannot be opened: {first_line(error)}; check the path and the rights") from error
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
                f"{source} is not a whole {kind} file: {first_line(error)}; fetch it again"
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


def head_of(source: str) -> bytes:
    """The first 64 KiB of a file, uncompressed."""
    with open_plain(source) as stream:
        return stream.read(HEAD_BYTES)


def require_text(source: str) -> bytes:
    """As `head_of`. Raises `DamagedInputError` where the file is empty or plainly of another format."""
    head = head_of(source)
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
            raise InputError(f"there is no file or folder {path}; give one to import")
        if info.type == pafs.FileType.File:
            return [SourceFile(place, info.size, info.mtime_ns or 0)]
        below = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    except OSError as error:
        raise _unreadable(path, error) from error
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
    require_no_credentials(source)
    try:
        filesystem, path = pafs.FileSystem.from_uri(source)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{source} cannot be opened: {first_line(error)}; give a local path, s3://bucket/key or gs://bucket/key"
        ) from error
    return filesystem, path


class Block:
    """L whole lines. Line i of the block is data[starts[i]:ends[i]], without its line end."""

    def __init__(self, data: bytes, first: int) -> None:
        self.data = data
        self.first = first  # number of the first line, from the start of the unit
        self.bytes = np.frombuffer(data, dtype=np.uint8)
        breaks = np.flatnonzero(self.bytes == NEWLINE)
        if len(data) and data[-1] != NEWLINE:
            breaks = np.append(breaks, len(data))
        self.starts = np.concatenate([[0], breaks[:-1] + 1]).astype(np.int64)[: len(breaks)]
        returned = (breaks > self.starts) & (self.bytes[np.maximum(breaks, 1) - 1] == RETURN) if len(breaks) else breaks
        self.ends = breaks - returned

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int | np.integer) -> bytes:
        """The bytes of one line."""
        return self.data[self.starts[index] : self.ends[index]]

    def texts(self, indices: Iterable[int | np.integer]) -> list[str]:
        """Lines as text; bytes that are not UTF-8 are replaced."""
        return [self.line(index).decode("utf-8", errors="replace") for index in indices]

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """int64: line numbers, counted from the start of the unit."""
        return indices + self.first


def byte_ranges(source: str, size: int, unit_bytes: int) -> list[Unit]:
    """A line-based file in units of at most `unit_bytes`; a compressed one whole."""
    if is_compressed(source):
        return [Unit(source=source)]
    starts = range(0, size, unit_bytes)
    return [Unit(source=source, start=start, stop=min(start + unit_bytes, size)) for start in starts]


def read_blocks(unit: Unit, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The lines that begin within the unit's byte range, whole, in blocks of about `block_bytes`.

    Raises `DamagedInputError` for a line longer than 64 MiB.
    """
    first, rest = 1, b""
    with _open_at(unit) as stream:
        left = None if unit.stop is None else unit.stop - unit.start
        if unit.start and left is not None:
            left -= _skip_line(stream, left)
        while left is None or left > 0:
            piece = stream.read(block_bytes if left is None else min(block_bytes, left))
            if not piece:
                break
            left = None if left is None else left - len(piece)
            end = piece.rfind(b"\n") + 1
            if left == 0 and end < len(piece):
                piece += _rest_of_line(stream, unit)
                end = len(piece)
            if not end:
                rest += piece
                _check_length(rest, unit)
                continue
            block = Block(_without_mark(rest + piece[:end], unit, first), first)
            rest, first = piece[end:], first + len(block)
            yield block
        if rest:
            yield Block(_without_mark(rest, unit, first), first)


def _without_mark(data: bytes, unit: Unit, first: int) -> bytes:
    """Lines without the byte order mark that the first of a file may begin with."""
    return data.removeprefix(BYTE_ORDER_MARK) if first == 1 and not unit.start else data


def header_line(source: str) -> bytes:
    """A file's first line, without line end and byte order mark; empty for an empty file."""
    with open_plain(source) as stream:
        line = stream.read(TAIL_BYTES)
        while line and b"\n" not in line and len(line) < LINE_LIMIT and (more := stream.read(TAIL_BYTES)):
            line += more
    return line.split(b"\n", 1)[0].removesuffix(b"\r").removeprefix(BYTE_ORDER_MARK)


@contextmanager
def _open_at(unit: Unit) -> Iterator[IO[bytes]]:
    if not unit.start:
        with open_plain(unit.source) as stream:
            yield stream
        return
    with open_source(unit.source) as raw:
        raw.seek(unit.start - 1)
        yield cast(IO[bytes], raw)


def _skip_line(stream: IO[bytes], left: int) -> int:
    """Go to the first line that begins in the range; return how many of its bytes were skipped.

    The stream stands one byte before the range: a line break there means that the range begins with a line.
    """
    skipped = -1
    while skipped < left:
        piece = stream.read(TAIL_BYTES)
        if not piece:
            return left
        end = piece.find(b"\n") + 1
        if end:
            stream.seek(end - len(piece), 1)
            return skipped + end
        skipped += len(piece)
    return left


def _rest_of_line(stream: IO[bytes], unit: Unit) -> bytes:
    rest = b""
    while piece := stream.read(TAIL_BYTES):
        end = piece.find(b"\n") + 1
        if end:
            return rest + piece[:end]
        rest += piece
        _check_length(rest, unit)
    return rest


def _check_length(rest: bytes, unit: Unit) -> None:
    if len(rest) > LINE_LIMIT:
        raise DamagedInputError(
            f"{unit.source} has a line longer than {LINE_LIMIT >> 20} MiB; check that it is a text file of plays"
        )
