"""Parquet files from outside: every one that the project is given is opened and read here."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.errors import DamagedInputError, first_line
from rayrec.importing.readers.files import open_source
from rayrec.importing.readers.reader import Unit

ROWS_PER_BATCH = 1 << 18
# A damaged footer may also hold names that are not UTF-8, which pyarrow raises as a ValueError.
UNREADABLE = (pa.ArrowException, OSError, ValueError)


class ParquetRows(NamedTuple):
    """R rows of a unit, as `SourceRows`."""

    part: pa.RecordBatch
    names: Mapping[str, str]  # wanted name -> column of the file
    first: int  # number of the first record, from the start of the unit

    @property
    def values(self) -> dict[str, pa.Array]:
        """Columns (R,) by their wanted names."""
        return {name: self.part.column(column) for name, column in self.names.items()}

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): numbers of the records, counted from the start of the unit."""
        return np.arange(self.first, self.first + self.covered)

    @property
    def covered(self) -> int:
        """R."""
        return int(self.part.num_rows)

    @property
    def rejected(self) -> pa.Table:
        """columns.REJECTED, none."""
        return columns.REJECTED.empty_table()

    def texts(self, positions: np.ndarray) -> list[str]:
        """The rows at some positions as JSON, for the file of rejected rows."""
        cells = [[_cell(column[row]) for column in self.part.columns] for row in positions.tolist()]
        return [
            json.dumps(dict(zip(self.part.schema.names, row, strict=True)), default=str, ensure_ascii=False)
            for row in cells
        ]


def plan_groups(source: str, unit_bytes: int, find: Callable[[list[str]], Mapping[str, int]]) -> list[Unit]:
    """A file in units of row groups of about `unit_bytes`; `find`, as in `read_row_groups`, sees its columns first."""
    with open_source(source) as stream:
        file = open_parquet(source, stream)
        find(file.schema_arrow.names)
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    numbers = (np.cumsum(sizes) - sizes) // unit_bytes if sizes else np.zeros(0)
    starts = [group for group in range(len(sizes)) if group == 0 or numbers[group] != numbers[group - 1]]
    stops = [*starts[1:], len(sizes)]
    return [Unit(source=source, start=start, stop=stop) for start, stop in zip(starts, stops, strict=False)]


def read_row_groups(unit: Unit, find: Callable[[list[str]], Mapping[str, int]]) -> Iterator[ParquetRows]:
    """The rows of a unit, which is some row groups, in batches of 262,144.

    `find` says which columns are wanted: name -> position among those of the file.
    """
    with open_source(unit.source) as stream:
        file = open_parquet(unit.source, stream)
        names = file.schema_arrow.names
        column_of = {name: names[place] for name, place in find(names).items()}
        groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
        first = 1
        for part in read_batches(unit.source, file, groups, list(set(column_of.values()))):
            yield ParquetRows(part, column_of, first)
            first += part.num_rows


def open_parquet(source: str, stream: pa.NativeFile) -> pq.ParquetFile:
    """A Parquet file. Raises `DamagedInputError` where it is none or its footer is not whole."""
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        _ = file.schema_arrow.names
    except UNREADABLE as error:
        raise DamagedInputError(
            f"{source} is not a Parquet file: {first_line(error)}; fetch it again or check the format"
        ) from error
    return file


def read_batches(
    source: str, file: pq.ParquetFile, groups: list[int] | None, names: list[str] | None
) -> Iterator[pa.RecordBatch]:
    """Some columns of some row groups, or all. Raises `DamagedInputError` where a page is not whole."""
    try:
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=names):
            batch.validate()
            yield batch
    except UNREADABLE as error:
        raise _damaged(source, error) from error


def read_columns(source: str, file: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    """Some columns of all rows. Raises as `read_batches` does."""
    try:
        table = file.read(columns=list(names))
        table.validate()
    except UNREADABLE as error:
        raise _damaged(source, error) from error
    return table


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return f"<{value.type}>"


def _damaged(source: str, error: Exception) -> DamagedInputError:
    return DamagedInputError(f"{source} is damaged: {first_line(error)}; restore it")
