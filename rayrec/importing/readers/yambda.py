"""Yambda, Yandex's public data set of listens (2025): listens.parquet of a `flat` folder. Written from its description.

Columns: uid, timestamp (seconds since the start of the data), item_id, is_organic, played_ratio_pct,
track_length_seconds. Contexts are organic and recommended; a track of which less than half was played counts as
skipped, as the data set's authors count listens.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, spell_ids
from rayrec.importing.readers import reader
from rayrec.importing.readers.files import open_source
from rayrec.importing.readers.parquet import open_parquet, read_batches, row_texts
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit
from rayrec.importing.readers.tabular import ParquetReader

LISTENED_PERCENT = 50
COLUMNS = {"user": "uid", "song": "item_id", "played_at": "timestamp"}
ORGANIC, PERCENT = "is_organic", "played_ratio_pct"


class YambdaReader:
    """Reads listens.parquet; likes and dislikes are no plays."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = ReadOptions(columns=COLUMNS)

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Runs of row groups."""
        return ParquetReader(self.options).plan(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Batches of 262,144 rows; the line is the number of the record."""
        with open_source(unit.source) as stream:
            file = open_parquet(unit.source, stream)
            names = file.schema_arrow.names
            wanted = [*COLUMNS.values(), *(name for name in (ORGANIC, PERCENT) if name in names)]
            groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
            first = 1
            for part in read_batches(unit.source, file, groups, wanted):
                yield _batch(unit.source, part, first)
                first += part.num_rows


def _batch(source: str, part: pa.RecordBatch, first: int) -> Batch:
    problems = Problems(part.num_rows)
    data = {
        columns.USER: spell_ids(part.column("uid"), problems, column="uid", reason=reader.NO_USER),
        columns.SONG_ID: spell_ids(part.column("item_id"), problems, column="item_id", reason=reader.NO_SONG),
        columns.PLAYED_AT: pa.array(to_ms(part.column("timestamp"), problems, column="timestamp")),
    }
    if ORGANIC in part.schema.names:
        organic = pc.fill_null(part.column(ORGANIC).cast(pa.bool_()), True)
        names = pc.if_else(organic, "organic", "recommended")
        data[columns.CONTEXTS] = pa.ListArray.from_arrays(pa.array(np.arange(part.num_rows + 1, dtype=np.int32)), names)
    if PERCENT in part.schema.names:
        data[columns.SKIPPED] = pc.less(part.column(PERCENT), LISTENED_PERCENT)
    return reader.batch(
        columns.PLAYS,
        data,
        source=source,
        lines=np.arange(first, first + part.num_rows),
        problems=problems,
        texts=lambda positions: row_texts(part, positions),
        covered=part.num_rows,
    )
