"""Parquet files from outside: every one that the project is given is opened and read here."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.errors import DamagedInputError

ROWS_PER_BATCH = 1 << 18
# A damaged footer may also hold names that are not UTF-8, which pyarrow raises as a ValueError.
UNREADABLE = (pa.ArrowException, OSError, ValueError)


def open_parquet(source: str, stream: pa.NativeFile) -> pq.ParquetFile:
    """A Parquet file. Raises `DamagedInputError` where it is none or its footer is not whole."""
    try:
        file = pq.ParquetFile(stream, page_checksum_verification=True)
        _ = file.schema_arrow.names
    except UNREADABLE as error:
        raise DamagedInputError(
            f"{source} is not a Parquet file: {_first_line(error)}; fetch it again or check the format"
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


def row_texts(rows: pa.RecordBatch, positions: np.ndarray) -> list[str]:
    """The rows at some positions as JSON, for the file of rejected rows."""
    cells = [[_cell(column[row]) for column in rows.columns] for row in positions.tolist()]
    return [
        json.dumps(dict(zip(rows.schema.names, row, strict=True)), default=str, ensure_ascii=False) for row in cells
    ]


def _cell(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return f"<{value.type}>"


def _damaged(source: str, error: Exception) -> DamagedInputError:
    return DamagedInputError(f"{source} is damaged: {_first_line(error)}; restore it")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
