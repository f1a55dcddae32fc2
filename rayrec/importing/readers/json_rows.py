"""Plays and playlist entries gathered one by one out of JSON, whose shape no columnar parser follows."""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.importing.readers import reader
from rayrec.importing.readers.files import open_plain
from rayrec.importing.readers.reader import Batch, Problems, clean, missing, rejected
from rayrec.importing.readers.times import to_ms

NOT_JSON = "not JSON"
ROWS_PER_BATCH = 1 << 17


def text(value: Any) -> str | None:
    """A string or number out of JSON as text; None for all else and for the empty string."""
    if isinstance(value, str):
        return clean(value) or None
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def load_json(source: str) -> Any:
    """The content of a JSON file. Raises `ValueError` where it is none."""
    with open_plain(source) as stream:
        return json.loads(stream.read())


def dump(value: Any) -> str:
    """A JSON value as one line, for the file of rejected rows."""
    return json.dumps(value, ensure_ascii=False)


class RowCollector:
    """Collects rows of one schema and hands them over as a batch.

    A row is a dict from columns to values as JSON holds them (missing ones are null); played_at is
    in any form that `to_ms` reads.
    """

    def __init__(self, schema: pa.Schema, source: str) -> None:
        self._schema, self._source = schema, source
        self._clear()

    def _clear(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._lines: list[int] = []
        self._texts: list[Any] = []  # a str, or a value to dump only if the row is bad
        self._refused: list[tuple[int, str, str]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, row: dict[str, Any], line: int, origin: Any) -> None:
        """A row; `origin` is its text or the JSON value that it came from."""
        self._rows.append(row)
        self._lines.append(line)
        self._texts.append(origin)

    def refuse(self, line: int, reason: str, origin: Any) -> None:
        """A row that is known to be of no use."""
        self._refused.append((line, reason, origin if isinstance(origin, str) else dump(origin)))

    def batch(self, covered: int) -> Batch:
        """Everything since the last batch; `covered` is how many lines or records that is."""
        problems = Problems(len(self._rows))
        data = {
            item.name: pa.array([row.get(item.name) for row in self._rows], _loose(item))
            for item in self._schema
            if item.name not in ("source", "line")
        }
        owner, reason = (
            (columns.USER, reader.NO_USER) if columns.USER in data else (columns.PLAYLIST, reader.NO_PLAYLIST)
        )
        problems.mark(missing(data[owner]), reason)
        problems.mark(missing(data[columns.SONG_ID]), reader.NO_SONG)
        if columns.PLAYED_AT in data:
            data[columns.PLAYED_AT] = pa.array(to_ms(data[columns.PLAYED_AT], problems))
        lines, reasons, refused = zip(*self._refused, strict=True) if self._refused else ((), (), ())
        result = reader.batch(
            self._schema,
            data,
            source=self._source,
            lines=np.array(self._lines, dtype=np.int64),
            problems=problems,
            texts=self._texts_at,
            covered=covered,
            also=rejected(self._source, lines, reasons, refused),
        )
        self._clear()
        return result

    def _texts_at(self, found: np.ndarray) -> list[str]:
        origins = [self._texts[row] for row in found]
        return [origin if isinstance(origin, str) else dump(origin) for origin in origins]


def _loose(item: pa.Field) -> pa.DataType:
    return pa.string() if item.name == columns.PLAYED_AT else item.type
