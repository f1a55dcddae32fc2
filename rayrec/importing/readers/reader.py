"""Code shared by all readers of outside formats: files, units of work, column lookup, batches, rejected rows.

A file is a local path or an s3:// or gs:// URI, uncompressed, .gz or .bz2. Text files are read by byte ranges, in
blocks of whole lines; a block knows its line numbers.
"""

import bz2
import gzip
import posixpath
import re
import shlex
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher, get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, NamedTuple, Protocol, cast
from urllib.parse import quote, unquote

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from rayrec.data import columns
from rayrec.data.spelling import Problems, clean
from rayrec.errors import DamagedInputError, InputError, first_line
from rayrec.storage.artifacts import SKIP_BELOW
from rayrec.storage.object_storage import open_uri

SHOWN_COLUMNS, SHOWN_NAME = 20, 40  # column names of a header in a message, and characters of each name
TEXT_LIMIT = 1_000  # characters of a rejected row that are stored
NO_USER = "no user"
IN_FUTURE = "time is more than a day in the future"
STREAM_MS = 30_000  # minimum length that services count as a stream; a shorter play counts as skipped
DAY_SECONDS = 86_400  # a play may be this far in the future, since clocks and time zones may be wrong
NO_SONG = "no song"
NO_PLAYLIST = "no playlist"
# Role -> column names that exports and public data sets use for it, best first; only letters and digits, lower case.
NAMES = {
    "user": ("user", "userid", "username", "uid", "listener", "listenerid", "account", "accountid", "profile"),
    "song": (
        *("songid", "song", "trackid", "track", "itemid", "item", "trackuri", "spotifytrackuri", "recordingmbid"),
        *("recordingid", "recording", "isrc", "videoid", "episodeid", "articleid", "productid", "gameid", "contentid"),
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
    "title": ("title", "trackname", "songname", "songtitle", "tracktitle", "name", "song"),  # song: beside songid
    "artist": ("artist", "artistname", "artists", "albumartistname", "performer", "masterartist"),
    "playlist": ("playlist", "playlistid", "pid", "playlistname"),
    "position": ("position", "pos", "index", "order", "rank"),
}
ONE_USER = ", or if all plays belong to one person, pass --user NAME instead of a user column"
MIN_NAME_SIMILARITY = 0.7  # minimum similarity of a column name to suggest it; 1: equal


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of one file, read by one task.

    In a text file, `start` and `stop` are byte offsets: the unit is the lines that begin between them. In a Parquet
    file they are numbers of row groups. A file that cannot be split is one unit without a `stop`.
    """

    source: str  # path or URI of the file
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """The settings of a reader."""

    playlists: bool = False  # rows are entries of playlists, not plays
    columns: dict[str, str] = field(default_factory=dict)  # role -> name of its column in the file
    delimiter: str = ","  # between the values of a csv file
    timezone: str = "UTC"  # IANA name of the time zone of times without one in a csv or Parquet file
    skip_below: float = SKIP_BELOW  # a play of less than this share of the song counts as skipped
    user: str = ""  # user id of all plays; empty: the file names the users, or its folder does
    user_separator: str = ""  # between the user and the songs in a line of a sequence file; empty: lines name no user
    song_separator: str = " "  # between the songs in a line of a sequence file


class Batch(NamedTuple):
    """Consecutive rows of a unit. Line numbers count from the start of the unit; the first line is 1."""

    rows: pa.Table  # columns.PLAYS or columns.PLAYLIST_ENTRIES
    rejected: pa.Table  # columns.REJECTED
    read: int  # rows read, good and bad
    lines: int  # lines (or records) read, including empty ones and the header


class SourceRows(Protocol):
    """R rows of a unit, with the values as they are in the file."""

    @property
    def values(self) -> dict[str, pa.Array]:
        """The requested columns: name -> array (R,)."""
        ...

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): line or record number of each row, counted from the start of the unit."""
        ...

    @property
    def covered(self) -> int:
        """Number of lines (or records) that were read for these rows."""
        ...

    @property
    def rejected(self) -> pa.Table:
        """columns.REJECTED: lines that could not be parsed into rows."""
        ...

    def texts(self, positions: np.ndarray) -> list[str]:
        """The text in the file of the rows at `positions`."""
        ...


class Reader(Protocol):
    """Reads one outside format."""

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split a file of `size` bytes into units of about `unit_bytes`.

        Raises `InputError` if the file is visibly of another format or lacks a column.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield the rows of a unit in batches, in the order of the file."""
        ...


def rejected(source: str, lines: Sequence[int] | np.ndarray, reasons: Sequence[str], texts: Sequence[str]) -> pa.Table:
    """Return a columns.REJECTED table with one row per item of `lines`, `reasons` and `texts`."""
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
    """Return a batch: the good rows as a table with `schema`, the bad ones as rejected rows with reason and text.

    `values` may lack nullable columns. `lines`, int64 (R,), are the line numbers of the rows. `texts` returns the text
    of the rows at given positions. `covered` is the number of lines read. `also` are lines that were rejected earlier.
    """
    if columns.PLAYED_AT in values:
        # A play dated 2090 would be the end of the data, from which splits and taste vectors count back.
        problems.mark(np.asarray(values[columns.PLAYED_AT]) > (time.time() + DAY_SECONDS) * 1000, IN_FUTURE)
    is_bad = problems.bad
    positions = np.flatnonzero(is_bad)
    rejected_rows = rejected(source, lines[positions], problems.reasons(), texts(positions))
    if also is not None and also.num_rows:
        rejected_rows = pa.concat_tables([also, rejected_rows]).sort_by("line")
    is_good = pa.array(~is_bad)
    data = {**values, "line": pa.array(lines)}
    arrays = []
    for item in schema:
        if item.name == "source":
            arrays.append(_repeat(source, len(lines) - len(positions)))
        elif item.name not in data:
            arrays.append(pa.nulls(len(lines) - len(positions), item.type))
        else:
            arrays.append(data[item.name].filter(is_good) if len(positions) else data[item.name])
    rows = pa.table(arrays, schema=schema)
    return Batch(rows, rejected_rows, rows.num_rows + rejected_rows.num_rows, covered)


def to_batch(
    rows: SourceRows, data: dict[str, pa.Array], problems: Problems, source: str, schema: pa.Schema = columns.PLAYS
) -> Batch:
    """Return the batch of `rows`: `data` are their columns, named as in `schema`; rows in `problems` are rejected."""
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
    """Context manager that puts the name of the file before the message of an `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _repeat(text: str, count: int) -> pa.Array:
    encoded = text.encode()
    offsets = np.arange(count + 1, dtype=np.int32) * len(encoded)
    return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(encoded * count))


def required_columns(
    source: str, header: Sequence[str], needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, int]:
    """Return column name -> position in the header, for all `needed` columns and the `optional` ones that exist.

    Raises `InputError` that names all missing columns, and for a column name that occurs twice.
    """
    missing_names = [repr(name) for name in needed if name not in header]
    if missing_names:
        raise InputError(
            f"{source} has no column {' or '.join(missing_names)}; it has {shown_columns(header)}; check the format"
        )
    existing_names = [*needed, *(name for name in dict.fromkeys(optional) if name in header and name not in needed)]
    return {name: _position(source, header, name) for name in existing_names}


def mapped_columns(
    source: str, header: Sequence[str], names: Mapping[str, str], roles: Sequence[str], needed: Sequence[str]
) -> dict[str, int]:
    """Return role -> position of its column: the column that `names` gives, else the column with the role's name.

    A role for which `names` gives an empty name has no column. Raises `InputError` for an unknown role, for an empty
    name of a role in `needed`, for missing columns of roles in `needed` or `names` (the message names all of them, and
    similar columns of the file), and for a column name that occurs twice.
    """
    unknown_roles = [role for role in names if role not in roles]
    if unknown_roles:
        raise InputError(f"cannot map a column to {unknown_roles[0]!r}; expected one of {', '.join(roles)}")
    column_of = {role: names.get(role, role) for role in roles if role in needed or names.get(role) != ""}
    other_columns = [name for name in header if name not in column_of.values()]
    unmapped = {role: "" for role, name in column_of.items() if not name}
    if unmapped:
        raise InputError(
            f"{source}: {next(iter(unmapped))} needs a column; the file has {shown_columns(header)}; "
            f"{mapping_advice(unmapped, other_columns)}"
        )
    missing_columns = {
        role: name for role, name in column_of.items() if name not in header and (role in names or role in needed)
    }
    if missing_columns:
        missing_text = " or ".join(f"{name!r} for {role}" for role, name in missing_columns.items())
        raise InputError(
            f"{source} has no column {missing_text}; it has {shown_columns(header)}; "
            f"{mapping_advice(missing_columns, other_columns)}"
        )
    return {role: _position(source, header, name) for role, name in column_of.items() if name in header}


def mapping_advice(missing: Mapping[str, str], header: Sequence[str], times: Collection[str] | None = None) -> str:
    """Return advice for a message: how to map the roles in `missing` (role -> missing name) to columns of `header`.

    `times` are the columns of `header` that hold times, if known: only they are suggested for `played_at`.
    """
    nearest = _nearest_columns(missing, header, header if times is None else times)
    mapping = shlex.quote(",".join(f"{role}={nearest.get(role, 'NAME')}" for role in missing))
    advice = f"map {'it' if len(missing) == 1 else 'them'}{', for example' if nearest else ''} with --columns {mapping}"
    return advice + (ONE_USER if "user" in missing and "user" not in nearest else "")


def _nearest_columns(missing: Mapping[str, str], header: Sequence[str], times: Collection[str]) -> dict[str, str]:
    """Return role -> the column whose name is most similar to the names that exports use for the role.

    No column is used twice, and roles without a similar column are left out. Only columns in `times` are `played_at`.
    """
    column_of_plain = {plain_letters(name): name for name in reversed(header)}
    column_of_plain.pop("", None)  # names without any ASCII letter or digit
    similarity: dict[tuple[str, str], float] = {}
    for role, missing_name in missing.items():
        for candidate in (plain_letters(missing_name), *NAMES.get(role, ())):
            for plain_column in get_close_matches(candidate, column_of_plain, cutoff=MIN_NAME_SIMILARITY):
                pair = role, column_of_plain[plain_column]
                similarity[pair] = max(
                    similarity.get(pair, 0.0), SequenceMatcher(None, plain_column, candidate).ratio()
                )
    nearest: dict[str, str] = {}
    for role, name in sorted(similarity, key=lambda pair: -similarity[pair]):
        if role == "played_at" and name not in times:
            continue
        if role not in nearest and name not in nearest.values():
            nearest[role] = name
    return nearest


def plain_letters(name: str) -> str:
    """The ASCII letters and digits of a column's name, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _position(source: str, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise InputError(f"{source} has {header.count(name)} columns named {name!r}; rename all but one")
    return header.index(name)


def shown_columns(names: Sequence[str]) -> str:
    """Column names for a message, at most 20 of them."""
    short_names = [name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…" for name in names[:SHOWN_COLUMNS]]
    more_text = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(short_names) + more_text


COMPRESSED = (".gz", ".bz2")
HEAD_BYTES = 64 << 10
BLOCK_BYTES = 16 << 20
TAIL_BYTES = 64 << 10  # bytes per read while looking for a line end
LINE_LIMIT = 64 << 20  # bytes of a line; a file with a longer one is not a text file
NEWLINE, RETURN = 10, 13
URI_CHARACTERS = "%/:@!$&'()*+,;="  # these, letters, digits and -._~ stay as they are in a URI
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# First bytes of files that are not UTF-8 text, whatever their name.
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
    changed: int  # time of the last change, ns since 1970


def find_files(paths: Sequence[str], patterns: Sequence[str]) -> list[SourceFile]:
    """Return the files at `paths`: for a folder, all files below it that match a pattern, sorted by path.

    Files and folders below it whose names begin with `.` or `_`, such as `_delta_log`, are left out.

    Raises `InputError` for an empty path, a path that does not exist, and a folder without a matching file.
    """
    files: dict[str, SourceFile] = {}
    for path in paths:
        for item in _files_of(path, patterns):
            files.setdefault(item.source, item)
    return list(files.values())


def is_file(source: str) -> bool:
    """True if `source` is an existing file. Raises `InputError` if the path cannot be read."""
    filesystem, path = _filesystem(source)
    try:
        return bool(filesystem.get_file_info(path).type == pafs.FileType.File)
    except OSError as error:
        raise _unreadable_error(source, error) from error


def _unreadable_error(path: str, error: OSError) -> InputError:
    return InputError(f"the path {path} cannot be read: {first_line(error)}; check the path and its permissions")


def split_options(source: str) -> tuple[str, str]:
    """Return a path or URI without the options of a URI, and the options with their question mark."""
    location, mark, options = source.partition("?") if "://" in source else (source, "", "")
    return location, mark + options


def plain_path(source: str) -> str:
    """The path of a file; that of a URI without its options, and with the characters that the URI quotes."""
    return unquote(split_options(source)[0]) if "://" in source else source


def file_name(source: str) -> str:
    """The name of a file without its folder."""
    return posixpath.basename(plain_path(source))


def path_below(folder: str, relative_path: str) -> str:
    """Return the path or URI of a file below a folder; a URI keeps its options."""
    location, options = split_options(folder)
    return posixpath.join(location, quote(relative_path) if "://" in folder else relative_path) + options


def is_compressed(source: str) -> bool:
    """True for .gz and .bz2 files, which can only be read from the start."""
    return plain_path(source).endswith(COMPRESSED)


def plain_name(source: str) -> str:
    """A file's path, see `plain_path`, without .gz or .bz2."""
    path = plain_path(source)
    return path[: path.rindex(".")] if is_compressed(source) else path


@contextmanager
def open_source(source: str) -> Iterator[pa.NativeFile]:
    """Open a file for random access, without decompression. Raises `InputError` if it cannot be opened."""
    filesystem, path = _filesystem(source)
    try:
        stream = filesystem.open_input_file(path)
    except OSError as error:
        raise InputError(
            f"{source} cannot be opened: {first_line(error)}; check the path and its permissions"
        ) from error
    with stream:
        yield stream


@contextmanager
def open_plain(source: str) -> Iterator[IO[bytes]]:
    """Open a file at its start; .gz and .bz2 files are decompressed.

    Raises `InputError` if it cannot be opened, and `DamagedInputError` if a compressed file is damaged or incomplete.
    """
    with open_source(source) as stream:
        if not is_compressed(source):
            yield cast(IO[bytes], stream)
            return
        compressed = cast(IO[bytes], stream)
        is_bzip2 = plain_path(source).endswith(".bz2")
        try:
            with bz2.BZ2File(compressed) if is_bzip2 else gzip.GzipFile(fileobj=compressed) as decompressed:
                yield cast(IO[bytes], decompressed)
        except (OSError, EOFError, zlib.error) as error:  # BZ2File raises a bare OSError
            compression = "bzip2" if is_bzip2 else "gzip"
            raise DamagedInputError(
                f"{source} is not a valid {compression} file: {first_line(error)}; fetch it again"
            ) from error


def ends_with_line(file: SourceFile) -> bool:
    """True if the last byte of a file is a line end.

    Also true for an empty file, and for a compressed one: decompression fails if it was cut.
    """
    if is_compressed(file.source) or not file.size:
        return True
    with open_source(file.source) as stream:
        stream.seek(file.size - 1)
        return bool(stream.read(1) == b"\n")


def unterminated_file_warnings(files: Sequence[SourceFile]) -> list[str]:
    """Return a note if the last line of some text files has no line end, the only sign that a file was cut."""
    unterminated_files = [file.source for file in files if not ends_with_line(file)]
    if not unterminated_files:
        return []
    more_text = f" and {len(unterminated_files) - 1:,} more files" if len(unterminated_files) > 1 else ""
    return [f"The last line of {unterminated_files[0]}{more_text} has no line end: the file may be incomplete."]


def read_head(source: str) -> bytes:
    """The first 64 KiB of a file, decompressed."""
    with open_plain(source) as stream:
        return stream.read(HEAD_BYTES)


def require_text(source: str) -> bytes:
    """Same as `read_head`. Raises `DamagedInputError` if the file is empty or clearly of another format."""
    head = read_head(source)
    if not head:
        raise DamagedInputError(f"{source} is empty; fetch it again")
    for prefix, description in OTHER_FORMATS.items():
        if head.startswith(prefix):
            raise DamagedInputError(f"{source} is {description}")
    return head


def _files_of(path: str, patterns: Sequence[str]) -> list[SourceFile]:
    if not path:  # would be the current folder
        raise InputError("a path is empty; give a file or folder, such as . for the current folder")
    filesystem, inner_path = _filesystem(path)
    location = _quoted(path) if "://" in path else inner_path
    try:
        info = filesystem.get_file_info(inner_path)
        if info.type == pafs.FileType.NotFound:
            raise InputError(f"file or folder {path} does not exist; give an existing one")
        if info.type == pafs.FileType.File:
            return [SourceFile(location, info.size, info.mtime_ns or 0)]
        entries = filesystem.get_file_info(pafs.FileSelector(inner_path, recursive=True))
    except OSError as error:
        raise _unreadable_error(path, error) from error
    relative_paths = {posixpath.relpath(item.path, inner_path): item for item in entries}
    files = [
        SourceFile(path_below(location, relative_path), item.size, item.mtime_ns or 0)
        for relative_path, item in sorted(relative_paths.items())
        if item.type == pafs.FileType.File and _matches(relative_path, patterns)
    ]
    if not files:
        raise InputError(
            f"folder {path} contains no file named {' or '.join(patterns)} (or .gz, .bz2); pass the file paths instead"
        )
    return files


def _matches(relative_path: str, patterns: Sequence[str]) -> bool:
    """True for a file whose name matches a pattern, unless it or a folder around it is hidden (`.` or `_`)."""
    names = relative_path.split("/")
    plain_file_name = plain_name(names[-1].lower())
    is_hidden = any(name.startswith((".", "_")) for name in names)
    return not is_hidden and any(fnmatch(plain_file_name, pattern) for pattern in patterns)


def _quoted(uri: str) -> str:
    """Return a URI with the characters that a URI cannot hold quoted; consoles of storage services show them plain."""
    location, options = split_options(uri)
    return quote(location, safe=URI_CHARACTERS) + options


def _filesystem(source: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in source:
        # The path must be absolute, because each worker has its own working folder.
        return pafs.LocalFileSystem(), str(Path(source).expanduser().absolute())
    return open_uri(_quoted(source), "source")


class Block:
    """L whole lines. Line i of the block is data[starts[i]:ends[i]], without its line end."""

    def __init__(self, data: bytes, first: int) -> None:
        self.data = data
        self.first = first  # number of the first line, counted from the start of the unit
        self.bytes = np.frombuffer(data, dtype=np.uint8)
        line_ends = np.flatnonzero(self.bytes == NEWLINE)
        if len(data) and data[-1] != NEWLINE:
            line_ends = np.append(line_ends, len(data))
        self.starts = np.concatenate([[0], line_ends[:-1] + 1]).astype(np.int64)[: len(line_ends)]
        has_return = (
            (line_ends > self.starts) & (self.bytes[np.maximum(line_ends, 1) - 1] == RETURN)
            if len(line_ends)
            else line_ends
        )
        self.ends = line_ends - has_return

    def __len__(self) -> int:
        return len(self.starts)

    def line(self, index: int | np.integer) -> bytes:
        """The bytes of one line."""
        return self.data[self.starts[index] : self.ends[index]]

    def texts(self, indices: Iterable[int | np.integer]) -> list[str]:
        """The lines at `indices` as text; bytes that are not UTF-8 are replaced."""
        return [self.line(index).decode("utf-8", errors="replace") for index in indices]

    def numbers(self, indices: np.ndarray) -> np.ndarray:
        """int64: the numbers of the lines at `indices`, counted from the start of the unit."""
        return indices + self.first


def byte_ranges(source: str, size: int, unit_bytes: int) -> list[Unit]:
    """Split a text file into units of at most `unit_bytes`; a compressed file is one unit."""
    if is_compressed(source):
        return [Unit(source=source)]
    starts = range(0, size, unit_bytes)
    return [Unit(source=source, start=start, stop=min(start + unit_bytes, size)) for start in starts]


def read_blocks(unit: Unit, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Yield the lines that begin within the unit's byte range, in blocks of whole lines of about `block_bytes`.

    Raises `DamagedInputError` for a line longer than 64 MiB.
    """
    line_number, remainder = 1, b""
    with _open_at(unit) as stream:
        remaining = None if unit.stop is None else unit.stop - unit.start
        if unit.start and remaining is not None:
            remaining -= _skip_line(stream, remaining)
        while remaining is None or remaining > 0:
            chunk = stream.read(block_bytes if remaining is None else min(block_bytes, remaining))
            if not chunk:
                break
            remaining = None if remaining is None else remaining - len(chunk)
            end = chunk.rfind(b"\n") + 1
            if remaining == 0 and end < len(chunk):
                chunk += _rest_of_line(stream, unit)
                end = len(chunk)
            if not end:
                remainder += chunk
                _check_length(remainder, unit)
                continue
            block = Block(_remove_mark(remainder + chunk[:end], unit, line_number), line_number)
            remainder, line_number = chunk[end:], line_number + len(block)
            yield block
        if remainder:
            yield Block(_remove_mark(remainder, unit, line_number), line_number)


def _remove_mark(data: bytes, unit: Unit, line_number: int) -> bytes:
    """Return `data` without the byte order mark that may precede the first line of a file."""
    return data.removeprefix(BYTE_ORDER_MARK) if line_number == 1 and not unit.start else data


def header_line(source: str) -> bytes:
    """A file's first line, without line end and byte order mark; empty for an empty file."""
    with open_plain(source) as stream:
        line = stream.read(TAIL_BYTES)
        while line and b"\n" not in line and len(line) < LINE_LIMIT and (chunk := stream.read(TAIL_BYTES)):
            line += chunk
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


def _skip_line(stream: IO[bytes], range_bytes: int) -> int:
    """Move the stream to the first line that begins in the range; return how many bytes of the range were skipped.

    The stream is one byte before the range: if that byte is a line break, the range begins with a new line.
    """
    skipped = -1
    while skipped < range_bytes:
        chunk = stream.read(TAIL_BYTES)
        if not chunk:
            return range_bytes
        end = chunk.find(b"\n") + 1
        if end:
            stream.seek(end - len(chunk), 1)
            return skipped + end
        skipped += len(chunk)
    return range_bytes


def _rest_of_line(stream: IO[bytes], unit: Unit) -> bytes:
    remainder = b""
    while chunk := stream.read(TAIL_BYTES):
        end = chunk.find(b"\n") + 1
        if end:
            return remainder + chunk[:end]
        remainder += chunk
        _check_length(remainder, unit)
    return remainder


def _check_length(line: bytes, unit: Unit) -> None:
    if len(line) > LINE_LIMIT:
        raise DamagedInputError(
            f"{unit.source} has a line longer than {LINE_LIMIT >> 20} MiB; check that it is a text file of plays"
        )
