"""Yambda, Yandex's public data set of plays (2025): listens.parquet in a `flat` folder. Written from its description.

Columns: uid, timestamp (seconds since the start of the data), item_id, is_organic, played_ratio_pct,
track_length_seconds. Contexts are organic and recommended. A play of less than half of the track counts as skipped,
because the authors of the data set count listens in this way; a setting gives another share.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, spell_ids
from rayrec.errors import InputError
from rayrec.importing.readers import tabular
from rayrec.importing.readers.reader import (
    NO_SONG,
    NO_USER,
    Batch,
    ReadOptions,
    Unit,
    naming,
    required_columns,
    to_batch,
)
from rayrec.importing.readers.tabular import ParquetRows, read_flags

NEEDED = USER, SONG, TIME = "uid", "item_id", "timestamp"
OPTIONAL = ORGANIC, PERCENT = "is_organic", "played_ratio_pct"


class YambdaReader:
    """Reads listens.parquet; the likes and dislikes of the data set are not plays and are not read."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into runs of row groups."""
        return tabular.plan_groups(source, unit_bytes, partial(_find_columns, source))

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield batches of 262,144 rows; line numbers are record numbers."""
        for rows in tabular.read_row_groups(unit, partial(_find_columns, unit.source)):
            yield _to_batch(rows, unit.source, self.options.skip_below)


def _find_columns(source: str, names: list[str]) -> dict[str, int]:
    return required_columns(source, names, NEEDED, OPTIONAL)


def _to_batch(rows: ParquetRows, source: str, skip_below: float) -> Batch:
    values, count = rows.values, rows.covered
    problems = Problems(count)
    with naming(source):
        data = {
            columns.USER: spell_ids(values[USER], problems, column=USER, reason=NO_USER),
            columns.SONG_ID: spell_ids(values[SONG], problems, column=SONG, reason=NO_SONG),
            columns.PLAYED_AT: pa.array(to_ms(values[TIME], problems, column=TIME)),
        }
        if ORGANIC in values:
            is_organic = pc.fill_null(read_flags(values[ORGANIC], problems, ORGANIC), True)
            context_names = pc.if_else(is_organic, "organic", "recommended")
            data[columns.CONTEXTS] = pa.ListArray.from_arrays(
                pa.array(np.arange(count + 1, dtype=np.int32)), context_names
            )
        if PERCENT in values:
            data[columns.SKIPPED] = pc.less(_require_numbers(values[PERCENT], PERCENT), 100 * skip_below)
    return to_batch(rows, data, problems, source)


def _require_numbers(values: pa.Array, column: str) -> pa.Array:
    if not any(is_kind(values.type) for is_kind in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)):
        raise InputError(f"column {column!r} holds {values.type}; expected numbers")
    return values
