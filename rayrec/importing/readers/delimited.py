"""Blocks of delimited lines (csv, tsv) to columns of strings; every line is one row or is rejected."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from pydantic import AfterValidator

from rayrec.importing.readers.lines import NEWLINE, RETURN, Block
from rayrec.importing.readers.reader import rejected

NOT_UTF8 = "not UTF-8"
OPEN_QUOTE = "a quote is not closed on its line"
STRAY_RETURN = "a carriage return within the line"
QUOTE = ord('"')


def _unescaped(text: str) -> str:
    return text.replace("\\t", "\t")


def _one_character(text: str) -> str:
    if len(text) != 1 or text in '"\r\n':
        raise ValueError("expected one character such as , or ;")
    return text


Separator = Annotated[str, AfterValidator(_unescaped)]  # a flag or a TOML file may write a tab as \\t
Delimiter = Annotated[Separator, AfterValidator(_one_character)]


class Rows(NamedTuple):
    """R rows out of a block."""

    block: Block
    values: dict[str, pa.Array]  # strings, null where empty; one array (R,) for each wanted column
    indices: np.ndarray  # int64 (R,), the line of the block that each row stands on
    rejected: pa.Table  # columns.REJECTED: lines that are no rows

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): line numbers, counted from the start of the unit."""
        return self.block.numbers(self.indices)

    def texts(self, found: np.ndarray) -> list[str]:
        """The lines of the rows at some positions."""
        return self.block.texts(self.indices[found])


def parse(
    block: Block,
    wanted: Mapping[str, int],
    *,
    num_columns: int,
    delimiter: str,
    quoted: bool,
    source: str,
    skip: int = 0,
) -> Rows:
    """The columns at the positions `wanted` of every line but the first `skip`.

    Empty lines are passed over. Lines that are not UTF-8, do not close a quote (where `quoted`) or
    have another number of values than `num_columns` are rejected, each by itself: one bad line
    never swallows the next.
    """
    faults = line_faults(block, quoted)
    filled = block.ends > block.starts
    usable = filled.copy()
    usable[list(faults)] = False
    faults = {index: reason for index, reason in faults.items() if index >= skip and filled[index]}
    usable[:skip] = False
    indices = np.flatnonzero(usable)
    data = block.data if len(indices) == len(block) else b"\n".join(block.line(index) for index in indices)
    bad_rows: list[int] = []

    def skip_row(row: pacsv.InvalidRow) -> str:
        position = indices[row.number - 1]
        bad_rows.append(row.number - 1)
        faults[position] = f"{row.actual_columns} values where the file has {row.expected_columns}"
        return "skip"

    values = _columns(data, wanted, num_columns, delimiter, quoted, skip_row)
    refused = sorted(faults)
    numbers = block.numbers(np.array(refused, dtype=np.int64))
    table = rejected(source, numbers, [faults[index] for index in refused], block.texts(refused))
    kept = np.delete(indices, bad_rows)
    assert all(len(column) == len(kept) for column in values.values()), f"{source}: rows and lines do not agree"
    return Rows(block, values, kept, table)


def _columns(
    data: bytes, wanted: Mapping[str, int], num_columns: int, delimiter: str, quoted: bool, skip_row: object
) -> dict[str, pa.Array]:
    if not data:
        return {name: pa.array([], pa.string()) for name in wanted}
    names = [str(position) for position in range(num_columns)]
    taken = [names[position] for position in wanted.values()]
    table = pacsv.read_csv(
        pa.BufferReader(data),
        # One thread: row numbers of bad rows are known only then, and other tasks use the other cores.
        read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, invalid_row_handler=skip_row
        ),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(taken, pa.string()),
            include_columns=list(dict.fromkeys(taken)),
            strings_can_be_null=True,
            null_values=[""],
            check_utf8=False,
        ),
    ).combine_chunks()
    found = {name: table.column(names[position]) for name, position in wanted.items()}
    return {name: column.chunk(0) if column.num_chunks else pa.array([], pa.string()) for name, column in found.items()}


def line_faults(block: Block, quoted: bool) -> dict[int, str]:
    """Lines that must not reach a parser, with the reason; looked for only where a block has any."""
    faults: dict[int, str] = {}
    if not _is_utf8(block.data):
        faults |= {index: NOT_UTF8 for index in range(len(block)) if not _is_utf8(block.line(index))}
    if quoted and b'"' in block.data:
        odd = _per_line(block, np.flatnonzero(block.bytes == QUOTE)) % 2 == 1
        faults |= {int(index): OPEN_QUOTE for index in np.flatnonzero(odd)}
    if block.data.count(b"\r") != block.data.count(b"\r\n"):
        returns = np.flatnonzero(block.bytes == RETURN)
        followed = block.bytes[np.minimum(returns + 1, len(block.bytes) - 1)]
        stray = _per_line(block, returns[followed != NEWLINE]) > 0
        faults |= {int(index): STRAY_RETURN for index in np.flatnonzero(stray)}
    return faults


def _per_line(block: Block, positions: np.ndarray) -> np.ndarray:
    """int64 (L,): how many byte positions lie in each line."""
    return np.bincount(np.searchsorted(block.starts, positions, side="right") - 1, minlength=len(block))


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
