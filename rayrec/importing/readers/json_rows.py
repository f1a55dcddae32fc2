"""JSON files: reads their records, from one document or from one line each, and collects the rows made of them."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import NOT_UTF8, Problems, mark_long, missing, spell_id, spell_text
from rayrec.errors import DamagedInputError
from rayrec.importing.readers import reader
from rayrec.importing.readers.reader import (
    BYTE_ORDER_MARK,
    Batch,
    Unit,
    byte_ranges,
    open_plain,
    read_blocks,
    rejected,
    require_text,
)

NOT_JSON = "not JSON"
FIRST_LINE_BYTES = 1 << 20  # longest first line of a file of JSON lines; a longer one is part of a document
BAD_BYTE = re.compile("[\udc80-\udcff]")  # the characters to which bytes that are not UTF-8 are decoded


class Record(NamedTuple):
    """One value of a JSON file."""

    number: int  # line number, or position in the document, from 1
    value: Any
    reason: str = ""  # why the record is not valid; `value` is then its text


class Records(NamedTuple):
    """Consecutive records of a unit."""

    records: list[Record]
    covered: int  # lines or positions read, including empty ones


def plan_json(source: str, size: int, unit_bytes: int, *lists: str) -> list[Unit]:
    """Split a file of JSON lines into byte ranges; a document cannot be split and is one unit.

    `lists` are as in `read_records`. Raises `DamagedInputError` if the beginning of the file is not JSON.
    """
    return byte_ranges(source, size, unit_bytes) if _is_json_lines(source, lists) else [Unit(source=source)]


def read_records(unit: Unit, *lists: str) -> Iterator[Records]:
    """Yield the records of a unit: JSON lines in blocks of 16 MiB, a document at once.

    A document is a list of records, or an object with such a list at one of the paths `lists`, such as
    `payload.listens`. Bytes that are not UTF-8 affect only their own record. Raises `DamagedInputError` for a document
    that is incomplete or has no such list.
    """
    if unit.stop is not None or _is_json_lines(unit.source, lists):
        for block in read_blocks(unit):
            lines = ((block.first + index, block.line(index)) for index in range(len(block)))
            yield Records([_parse_line(number, line) for number, line in lines if line.strip()], len(block))
        return
    content = load_json(unit.source)
    values = content if isinstance(content, list) else _find_list(content, lists)
    if values is None:
        locations = " or ".join(["at the top level", *(f"at {path!r}" for path in lists)])
        raise DamagedInputError(f"{unit.source} is JSON, but has no list of records {locations}; check the format")
    yield Records([Record(number, value) for number, value in enumerate(values, start=1)], len(values))


def load_json(source: str) -> Any:
    """Return the content of a JSON document; bytes that are not UTF-8 become lone surrogate characters.

    Raises `DamagedInputError` if the document is incomplete or not JSON.
    """
    require_text(source)
    with open_plain(source) as stream:
        data = stream.read().removeprefix(BYTE_ORDER_MARK)
    try:
        return json.loads(data.decode("utf-8", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DamagedInputError(
            f"{source} cannot be read completely ({len(data):,} bytes): {str(error)[:200] or type(error).__name__}; "
            "fetch it again"
        ) from error


def _is_json_lines(source: str, lists: tuple[str, ...]) -> bool:
    """True for a file with one record per line: its first line is a whole record, or its second line begins like one.

    `lists` are as in `read_records`: a first line that is an object with such a list is a document.
    """
    head = require_text(source).removeprefix(BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return False
    with open_plain(source) as stream:
        beginning = stream.read(FIRST_LINE_BYTES).removeprefix(BYTE_ORDER_MARK).lstrip()
    line, _, remainder = beginning.partition(b"\n")
    first_record = _parse_line(1, line)
    if not first_record.reason and isinstance(first_record.value, dict):
        return _find_list(first_record.value, lists) is None
    if remainder.lstrip().startswith(b"{"):
        return True
    if head.startswith(b"{"):
        return False
    raise DamagedInputError(f"{source} is not JSON: it begins with {head[:40]!r}; check the format")


def _find_list(content: Any, lists: tuple[str, ...]) -> list[Any] | None:
    for path in lists:
        value = content
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, list):
            return value
    return None


def _parse_line(number: int, line: bytes) -> Record:
    try:
        return Record(number, json.loads(line.decode("utf-8", errors="surrogateescape")))
    except (ValueError, RecursionError):
        return Record(number, line.decode("utf-8", errors="replace"), NOT_JSON)


def text(value: Any) -> str | None:
    """Return a string or number from JSON as text; None for other values and for the empty string."""
    return (value.strip() or None) if isinstance(value, str) else spell_id(value)


class RowCollector:
    """Collects rows of one schema and returns them as batches.

    A row is a dict of column -> JSON value; missing columns are null. played_at may have any form that `to_ms` reads.
    """

    def __init__(self, schema: pa.Schema, source: str) -> None:
        self._schema, self._source = schema, source
        self._clear()

    def _clear(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._lines: list[int] = []
        self._origins: list[Any] = []
        self._rejected: list[tuple[int, str, str]] = []

    def add(self, row: dict[str, Any], record: Record, origin: Any = None) -> None:
        """Add a row made of a record, or of the value `origin` within it."""
        if any(isinstance(value, str) and not value.isascii() and BAD_BYTE.search(value) for value in row.values()):
            self.refuse(record, NOT_UTF8, origin)
            return
        self._rows.append(row)
        self._lines.append(record.number)
        self._origins.append(record.value if origin is None else origin)

    def refuse(self, record: Record, reason: str, origin: Any = None) -> None:
        """Reject a record, or the value `origin` within it, for `reason`."""
        self._rejected.append((record.number, reason, _dump(record.value if origin is None else origin)))

    def batch(self, covered: int) -> Batch:
        """Return all rows since the last batch; `covered` is the number of lines or records read for them."""
        problems = Problems(len(self._rows))
        data = {item.name: self._column(item) for item in self._schema if item.name not in ("source", "line")}
        owner, reason = (
            (columns.USER, reader.NO_USER) if columns.USER in data else (columns.PLAYLIST, reader.NO_PLAYLIST)
        )
        problems.mark(missing(data[owner]), reason)
        problems.mark(missing(data[columns.SONG_ID]), reader.NO_SONG)
        mark_long(data[owner], problems)
        mark_long(data[columns.SONG_ID], problems)
        if columns.PLAYED_AT in data:
            data[columns.PLAYED_AT] = pa.array(to_ms(data[columns.PLAYED_AT], problems))
        lines, reasons, texts = zip(*self._rejected, strict=True) if self._rejected else ((), (), ())
        result = reader.batch(
            self._schema,
            data,
            source=self._source,
            lines=np.array(self._lines, dtype=np.int64),
            problems=problems,
            texts=self._texts_at,
            covered=covered,
            also=rejected(self._source, lines, reasons, texts),
        )
        self._clear()
        return result

    def _column(self, item: pa.Field) -> pa.Array:
        values = [row.get(item.name) for row in self._rows]
        if item.name in (columns.USER, columns.PLAYLIST, columns.SONG_ID):
            return pa.array(map(spell_id, values), pa.string())
        if item.name == columns.PLAYED_AT or item.type == pa.string():
            return pa.array(map(spell_text, values), pa.string())
        if pa.types.is_list(item.type):
            values = [value and [name for name in map(spell_text, value) if name] for value in values]
        return pa.array(values, item.type)

    def _texts_at(self, positions: np.ndarray) -> list[str]:
        return [_dump(self._origins[row]) for row in positions]


def _dump(value: Any) -> str:
    """Return a JSON value as one line, for the file of rejected rows."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
