"""What every reader of an outside format shares: units of work, columns by name, batches of rows, rejected rows."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.spelling import Problems, clean
from rayrec.errors import InputError

SHOWN_COLUMNS, SHOWN_NAME = 20, 40  # of a header, in a message
TEXT_LIMIT = 1_000  # characters kept of a rejected row
NO_USER = "no user"
IN_FUTURE = "time is more than a day from now"
STREAM_MS = 30_000  # from where on services count a stream; a shorter play counts as skipped
DAY_SECONDS = 86_400  # that clocks and zones may be wrong
NO_SONG = "no song"
NO_PLAYLIST = "no playlist"


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
    skip_below: float = 0.5  # share of a song: a play of which less was listened to counts as skipped
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

    Raises `InputError` for a column that is not there or is there twice.
    """
    present = [*needed, *(name for name in dict.fromkeys(optional) if name in header and name not in needed)]
    for name in present:
        if name not in header:
            raise InputError(f"{source} has no column {name!r}; it has {shown_columns(header)}; is it of this format?")
    return {name: _position(source, header, name) for name in present}


def mapped_columns(
    source: str, header: Sequence[str], names: Mapping[str, str], roles: Sequence[str], needed: Sequence[str]
) -> dict[str, int]:
    """Role -> position of its column: the one that `names` gives, else the one of the role's own name.

    Raises `InputError` for an unknown role, for a column of a role that is `needed` or in `names` and is not there,
    and for one that is there twice.
    """
    unknown = [role for role in names if role not in roles]
    if unknown:
        raise InputError(f"cannot map a column to {unknown[0]!r}; expected some of {', '.join(roles)}")
    column_of = {role: names.get(role, role) for role in roles}
    for role, name in column_of.items():
        if name not in header and (role in names or role in needed):
            raise InputError(
                f"{source} has no column {name!r} for {role}; it has {shown_columns(header)}; "
                f"map it with --columns {role}=NAME"
            )
    return {role: _position(source, header, name) for role, name in column_of.items() if name in header}


def _position(source: str, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise InputError(f"{source} has {header.count(name)} columns named {name!r}; rename all but one")
    return header.index(name)


def shown_columns(names: Sequence[str]) -> str:
    """Column names for a message, at most 20 of them."""
    shown = [name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}…" for name in names[:SHOWN_COLUMNS]]
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(shown) + more
