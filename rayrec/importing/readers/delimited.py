"""Delimited text (csv, tsv): reads the header, and blocks of lines as columns of strings.

All csv files of the project are read here. A line is one row or is rejected; a value must not contain a line break.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from pydantic import AfterValidator

from rayrec.data.spelling import NOT_UTF8
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers.reader import (
    NEWLINE,
    RETURN,
    Block,
    Unit,
    header_line,
    read_blocks,
    rejected,
    require_text,
    shown_columns,
)

OPEN_QUOTE = "a quote is not closed on its line"
AFTER_QUOTE = "text after a closing quote"
STRAY_RETURN = "a carriage return within the line"
QUOTE = ord('"')
NULL = r"\N"  # a missing value in dumps of MySQL and Postgres
USUAL_DELIMITERS = (",", ";", "\t", "|")


def _unescape_tabs(text: str) -> str:
    return text.replace("\\t", "\t")


def _require_one_character(text: str) -> str:
    if len(text) != 1 or not text.isascii() or text in '"\r\n':
        raise ValueError("expected one character such as , or ;")
    return text


Separator = Annotated[str, AfterValidator(_unescape_tabs)]  # a flag or a TOML file may write a tab as \\t
Delimiter = Annotated[Separator, AfterValidator(_require_one_character)]


class DelimitedRows(NamedTuple):
    """R rows of a block; implements `SourceRows`."""

    block: Block
    values: dict[str, pa.Array]  # strings, null if empty or \N; one array (R,) per wanted column
    indices: np.ndarray  # int64 (R,), index within the block of the line of each row
    rejected: pa.Table  # columns.REJECTED: lines that could not be parsed into rows

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): line numbers, counted from the start of the unit."""
        return self.block.numbers(self.indices)

    @property
    def covered(self) -> int:
        """Number of lines of the block."""
        return len(self.block)

    def texts(self, positions: np.ndarray) -> list[str]:
        """The lines of the rows at `positions`, as text."""
        return self.block.texts(self.indices[positions])


def read_header(source: str, delimiter: str) -> list[str]:
    """Return the column names of a file. Raises `InputError` if it has no header or is not delimited text.

    A header of quoted names that has another delimiter is one name, for `other_delimiter`.
    """
    head = require_text(source)
    if head.lstrip(b"\xef\xbb\xbf \r\n\t")[:2] in (b"[{", b'{"', b"[\n", b"{\n", b"[\r", b"{\r"):
        raise DamagedInputError(f"{source} is JSON, not csv; pass the format of the file, see `rayrec import --help`")
    line = header_line(source)
    if not line.strip():
        raise InputError(f"{source} begins with an empty line; expected a header with column names")
    if b"\r" in line:
        raise InputError(
            f"{source} has carriage returns without line feeds as line ends; "
            "convert them to line feeds, for example with `tr '\\r' '\\n'`"
        )
    try:
        values = split_line(line, delimiter)
        if isinstance(values, str):
            if not any(_has_several_values(line, candidate) for candidate in USUAL_DELIMITERS):
                raise InputError(f"the header of {source} cannot be read: {values}; correct the column names")
            values = [line]
        return [value.decode("utf-8").strip() for value in values]
    except UnicodeDecodeError as error:
        raise InputError(f"the header of {source} is {NOT_UTF8}; save the file as UTF-8") from error


def _has_several_values(line: bytes, delimiter: str) -> bool:
    values = split_line(line, delimiter)
    return not isinstance(values, str) and len(values) > 1


def other_delimiter(header: Sequence[str], delimiter: str) -> str | None:
    """Return the delimiter that a header of a single column seems to have instead of `delimiter`, or None."""
    counts = {candidate: header[0].count(candidate) for candidate in USUAL_DELIMITERS if candidate != delimiter}
    best = max(counts, key=lambda candidate: counts[candidate])
    return best if len(header) == 1 and counts[best] else None


def require_delimiter(source: str, header: Sequence[str], delimiter: str) -> None:
    """Raise `InputError` if the header seems to have another delimiter."""
    other = other_delimiter(header, delimiter)
    if other:
        raise InputError(
            f"{source} has only one column, {shown_columns(header)!r}, but its delimiter seems to be {other!r}; "
            f"pass --delimiter {spelled_delimiter(other)}"
        )


def spelled_delimiter(delimiter: str) -> str:
    """Return a delimiter, quoted for a shell."""
    return "'\\t'" if delimiter == "\t" else repr(delimiter)


def split_line(line: bytes, delimiter: str) -> list[bytes] | str:
    """Return the values of one line, or the reason why it cannot be split.

    A quote opens a quoted value only if it is the first character of the value.
    """
    values: list[bytes] = []
    separator, position = delimiter.encode(), 0
    while True:
        if line[position : position + 1] == b'"':
            value, position = b"", position + 1
            while True:
                end = line.find(b'"', position)
                if end < 0:
                    return OPEN_QUOTE
                value += line[position:end]
                position = end + 1
                if line[position : position + 1] != b'"':
                    break
                value, position = value + b'"', position + 1
            if position < len(line) and not line.startswith(separator, position):
                return AFTER_QUOTE
        else:
            end = line.find(separator, position)
            end = len(line) if end < 0 else end
            value, position = line[position:end], end
        values.append(value)
        if position >= len(line):
            return values
        position += len(separator)


def read_delimited(
    unit: Unit, delimiter: str, find_positions: Callable[[list[str]], Mapping[str, int]]
) -> Iterator[DelimitedRows]:
    """Yield the rows of a unit of a file with a header, in blocks of 16 MiB.

    `find_positions` returns the wanted columns of a header: name -> position.
    """
    header = read_header(unit.source, delimiter)
    positions = find_positions(header)
    for block in read_blocks(unit):
        has_header = block.first == 1 and not unit.start
        yield parse(
            block,
            positions,
            num_columns=len(header),
            delimiter=delimiter,
            quoted=True,
            source=unit.source,
            skip=1 if has_header else 0,
        )


def same(values: pa.Array, text: str | None) -> np.ndarray:
    """bool (R,): True for strings equal to `text`, or for null if `text` is None."""
    is_equal = values.is_null() if text is None else pc.fill_null(pc.equal(values, text), False)
    return np.asarray(is_equal.to_numpy(zero_copy_only=False))


def flags_below(values: pa.Array, limit: float) -> pa.Array:
    """bool (R,): True for strings that are numbers below `limit`; null for strings that are not numbers from 0 up."""
    is_number = pc.fill_null(pc.match_substring_regex(values, r"^\d{1,15}(\.\d*)?$"), False)
    numbers = pc.if_else(is_number, values, None).cast(pa.float64())
    return pc.less(numbers, limit)


def parse(
    block: Block,
    positions: Mapping[str, int],
    *,
    num_columns: int,
    delimiter: str,
    quoted: bool,
    source: str,
    skip: int = 0,
) -> DelimitedRows:
    """Return the columns at `positions` of all lines except the first `skip`.

    Empty lines are ignored. A line is rejected if it is not UTF-8, has an unclosed quote (if `quoted`), or has another
    number of values than `num_columns`. A bad line never affects the next one.
    """
    faults = line_faults(block)
    repaired_lines: dict[int, bytes] = {}
    for index in _unusual_quotes(block, delimiter) if quoted else ():
        if index in faults:
            continue
        values = split_line(block.line(index), delimiter)
        if isinstance(values, str):
            faults[index] = values
        else:
            repaired_lines[index] = delimiter.encode().join(
                b'"' + value.replace(b'"', b'""') + b'"' for value in values
            )
    is_filled = block.ends > block.starts
    is_usable = is_filled.copy()
    is_usable[list(faults)] = False
    faults = {index: reason for index, reason in faults.items() if index >= skip and is_filled[index]}
    is_usable[:skip] = False
    indices = np.flatnonzero(is_usable)
    if len(indices) == len(block) and not repaired_lines:
        data = block.data
    else:
        data = b"\n".join(repaired_lines.get(index) or block.line(index) for index in indices.tolist())
    bad_rows: list[int] = []

    def skip_row(row: pacsv.InvalidRow) -> str:
        line_index = indices[row.number - 1]
        bad_rows.append(row.number - 1)
        faults[int(line_index)] = f"{row.actual_columns} values, but the file has {row.expected_columns} columns"
        return "skip"

    parsed_columns = _parse_columns(data, positions, num_columns, delimiter, quoted, skip_row)
    rejected_lines = sorted(faults)
    line_numbers = block.numbers(np.array(rejected_lines, dtype=np.int64))
    rejected_table = rejected(
        source, line_numbers, [faults[index] for index in rejected_lines], block.texts(rejected_lines)
    )
    good_lines = np.delete(indices, bad_rows)
    assert all(len(column) == len(good_lines) for column in parsed_columns.values()), (
        f"{source}: rows and lines do not agree"
    )
    return DelimitedRows(block, parsed_columns, good_lines, rejected_table)


def _parse_columns(
    data: bytes, positions: Mapping[str, int], num_columns: int, delimiter: str, quoted: bool, skip_row: object
) -> dict[str, pa.Array]:
    if not data:
        return {name: pa.array([], pa.string()) for name in positions}
    names = [str(position) for position in range(num_columns)]
    column_names = [names[position] for position in positions.values()]
    table = pacsv.read_csv(
        pa.BufferReader(data),
        # pyarrow gives the row numbers of bad rows only with one thread; other tasks use the other cores.
        read_options=pacsv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter, quote_char='"' if quoted else False, invalid_row_handler=skip_row
        ),
        convert_options=pacsv.ConvertOptions(
            column_types=dict.fromkeys(column_names, pa.string()),
            include_columns=list(dict.fromkeys(column_names)),
            strings_can_be_null=True,
            null_values=["", NULL],
            check_utf8=False,
        ),
    ).combine_chunks()
    columns = {name: table.column(names[position]) for name, position in positions.items()}
    return {
        name: column.chunk(0) if column.num_chunks else pa.array([], pa.string()) for name, column in columns.items()
    }


def line_faults(block: Block) -> dict[int, str]:
    """Return line index -> reason, for the lines of a block that must not reach a parser.

    Single lines are checked only if a check of the whole block shows such a fault.
    """
    faults: dict[int, str] = {}
    if not _is_utf8(block.data):
        faults |= {index: NOT_UTF8 for index in range(len(block)) if not _is_utf8(block.line(index))}
    if block.data.count(b"\r") != block.data.count(b"\r\n"):
        return_positions = np.flatnonzero(block.bytes == RETURN)
        next_bytes = block.bytes[np.minimum(return_positions + 1, len(block.bytes) - 1)]
        has_stray = _count_per_line(block, return_positions[next_bytes != NEWLINE]) > 0
        faults |= {int(index): STRAY_RETURN for index in np.flatnonzero(has_stray)}
    return faults


def _unusual_quotes(block: Block, delimiter: str) -> list[int]:
    """Return the indices of lines with a quote that neither opens a value, nor closes it, nor is doubled within it.

    In a line the first quote opens a value, the second closes it, and so on; a doubled quote closes and opens again.
    """
    positions = np.flatnonzero(block.bytes == QUOTE)
    if not len(positions):
        return []
    lines = np.searchsorted(block.starts, positions, side="right") - 1
    counts = np.bincount(lines, minlength=len(block))
    ranks = np.arange(len(positions)) - (np.cumsum(counts) - counts)[lines]
    is_opening = ranks % 2 == 0
    allowed_neighbors = np.array([QUOTE, ord(delimiter)], dtype=np.uint8)
    previous_bytes = block.bytes[np.maximum(positions - 1, 0)]
    next_bytes = block.bytes[np.minimum(positions + 1, len(block.bytes) - 1)]
    is_usual = np.where(
        is_opening,
        (positions == block.starts[lines]) | np.isin(previous_bytes, allowed_neighbors),
        (positions + 1 == block.ends[lines]) | np.isin(next_bytes, allowed_neighbors),
    )
    is_unusual = (np.bincount(lines, weights=~is_usual, minlength=len(block)) > 0) | (counts % 2 == 1)
    return [int(index) for index in np.flatnonzero(is_unusual)]


def _count_per_line(block: Block, positions: np.ndarray) -> np.ndarray:
    """int64 (L,): number of byte `positions` in each line."""
    return np.bincount(np.searchsorted(block.starts, positions, side="right") - 1, minlength=len(block))


def _is_utf8(data: bytes) -> bool:
    if data.isascii():
        return True
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
