"""csv and Parquet files of plays or of playlist entries, with a mapping of their columns to ours.

Roles of a play: user, song, played_at, and where there are any contexts (names separated by `|`),
skipped (true, false, 1 or 0), title, artist. Roles of a playlist entry: playlist, position, song,
and where there are any title, artist. A role that is not mapped has the column of its own name.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.errors import InputError
from rayrec.importing.readers import delimited, reader
from rayrec.importing.readers.files import open_source
from rayrec.importing.readers.lines import byte_ranges, first_line, read_blocks
from rayrec.importing.readers.reader import Batch, Problems, ReadOptions, Unit, missing
from rayrec.importing.readers.times import to_ms

PLAY_ROLES = ("user", "song", "played_at", "contexts", "skipped", "title", "artist")
PLAYLIST_ROLES = ("playlist", "position", "song", "title", "artist")
NOT_A_POSITION = "position is not a whole number"
NOT_A_FLAG = "skipped is none of true, false, 1, 0"
CONTEXT_SEPARATOR = "|"
FLAGS = {"true": True, "1": True, "t": True, "yes": True, "false": False, "0": False, "f": False, "no": False}
ROWS_PER_BATCH = 1 << 18


def roles(playlists: bool) -> tuple[str, ...]:
    """What a column of a table can be mapped to."""
    return PLAYLIST_ROLES if playlists else PLAY_ROLES


class CsvReader:
    """Reads csv files with a header line. A value must not hold a line break."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges. Raises `InputError` for a file without a header or a mapped column."""
        self._positions(source, self._header(source))
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch per block of 16 MiB."""
        header = self._header(unit.source)
        wanted = self._positions(unit.source, header)
        for block in read_blocks(unit):
            rows = delimited.parse(
                block,
                wanted,
                num_columns=len(header),
                delimiter=self.options.delimiter,
                quoted=True,
                source=unit.source,
                skip=1 if block.first == 1 and not unit.start else 0,
            )

            yield convert(
                rows.values,
                self.options.playlists,
                source=unit.source,
                lines=rows.lines,
                texts=rows.texts,
                covered=len(block),
                also=rows.rejected,
            )

    def _header(self, source: str) -> list[str]:
        line = first_line(source).decode("utf-8", errors="replace")
        if not line.strip():
            raise InputError(f"{source} is empty or begins with an empty line; expected a header with column names")
        return next(csv.reader([line], delimiter=self.options.delimiter))

    def _positions(self, source: str, header: list[str]) -> dict[str, int]:
        return find_columns(source, header, self.options)


class ParquetReader:
    """Reads Parquet files."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Runs of row groups. Raises `InputError` for another format or a missing column."""
        with open_source(source) as stream:
            file = _parquet(source, stream)
            find_columns(source, file.schema_arrow.names, self.options)
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        numbers = (np.cumsum(sizes) - sizes) // unit_bytes if sizes else np.zeros(0)
        starts = [group for group in range(len(sizes)) if group == 0 or numbers[group] != numbers[group - 1]]
        stops = [*starts[1:], len(sizes)]
        return [Unit(source=source, start=start, stop=stop) for start, stop in zip(starts, stops, strict=False)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Batches of 262,144 rows; the line is the number of the record."""
        with open_source(unit.source) as stream:
            file = _parquet(unit.source, stream)
            names = file.schema_arrow.names
            wanted = {role: names[place] for role, place in find_columns(unit.source, names, self.options).items()}
            groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
            first = 1
            for part in _batches(unit.source, file, groups, list(set(wanted.values()))):

                def texts(found: np.ndarray, part: pa.RecordBatch = part) -> list[str]:
                    return [json.dumps(row, default=str, ensure_ascii=False) for row in part.take(found).to_pylist()]

                yield convert(
                    {role: _untangle(part.column(name)) for role, name in wanted.items()},
                    self.options.playlists,
                    source=unit.source,
                    lines=np.arange(first, first + part.num_rows),
                    texts=texts,
                    covered=part.num_rows,
                )
                first += part.num_rows


def find_columns(source: str, names: Sequence[str], options: ReadOptions) -> dict[str, int]:
    """Role -> position of its column in the file.

    Raises `InputError` for an unknown role, a column that is not there or one that is there twice.
    """
    known = roles(options.playlists)
    optional = ("contexts", "skipped", "title", "artist")
    unknown = [role for role in options.columns if role not in known]
    if unknown:
        raise InputError(f"cannot map a column to {unknown[0]!r}; expected some of {', '.join(known)}")
    found: dict[str, int] = {}
    for role in known:
        name = options.columns.get(role, role)
        if names.count(name) > 1:
            raise InputError(f"{source} has {names.count(name)} columns named {name!r}; rename all but one")
        if name in names:
            found[role] = names.index(name)
        elif role in options.columns or role not in optional:
            raise InputError(
                f"{source} has no column {name!r} for {role}; it has {', '.join(names)}; "
                f"map it with --columns {role}=NAME"
            )
    return found


def convert(
    values: dict[str, pa.Array],
    playlists: bool,
    *,
    source: str,
    lines: np.ndarray,
    texts: Callable[[np.ndarray], Sequence[str]],
    covered: int,
    also: pa.Table | None = None,
) -> Batch:
    """Columns by role, of strings or of the types of a Parquet file, to plays or playlist entries."""
    problems = Problems(len(lines))
    owner, no_owner = ("playlist", reader.NO_PLAYLIST) if playlists else ("user", reader.NO_USER)
    data = {
        columns.PLAYLIST if playlists else columns.USER: _names(values[owner], problems, no_owner),
        columns.SONG_ID: _names(values["song"], problems, reader.NO_SONG),
    }
    if playlists:
        data["position"] = _positions(values["position"], problems)
    else:
        data[columns.PLAYED_AT] = pa.array(to_ms(values["played_at"], problems))
        if "skipped" in values:
            data[columns.SKIPPED] = _flags(values["skipped"], problems)
        if "contexts" in values:
            data[columns.CONTEXTS] = _contexts(values["contexts"])
    for role in ("title", "artist"):
        if role in values:
            data[role] = _text(values[role])
    schema = columns.PLAYLIST_ENTRIES if playlists else columns.PLAYS
    return reader.batch(
        schema, data, source=source, lines=lines, problems=problems, texts=texts, covered=covered, also=also
    )


def _parquet(source: str, stream: pa.NativeFile) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(stream, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{source} is not a Parquet file: {str(error).splitlines()[0]}") from error


def _batches(source: str, file: pq.ParquetFile, groups: list[int], names: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{source} is damaged: {str(error).splitlines()[0]}; restore it or remove it from the import"
        ) from error


def _untangle(values: pa.Array) -> pa.Array:
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values


def _text(values: pa.Array) -> pa.Array:
    if pa.types.is_floating(values.type):
        # Whole numbers with gaps come as floats out of pandas: 16.0 means song 16.
        whole = bool(pc.all(pc.fill_null(pc.equal(pc.floor(values), values), True)).as_py())
        values = pc.cast(values, pa.int64(), safe=False) if whole else values
    return one_array(values.cast(pa.string()))


def _names(values: pa.Array, problems: Problems, reason: str) -> pa.Array:
    texts = _text(values)
    problems.mark(missing(texts), reason)
    return texts


def _positions(values: pa.Array, problems: Problems) -> pa.Array:
    if not pa.types.is_integer(values.type):
        texts = _text(values)
        valid = np.asarray(
            pc.fill_null(pc.match_substring_regex(texts, r"^\d{1,18}$"), False).to_numpy(zero_copy_only=False)
        )
        problems.mark(~valid, NOT_A_POSITION)
        values = pc.if_else(pa.array(valid), texts, "0")
    problems.mark(np.asarray(values.is_null().to_numpy(zero_copy_only=False)), NOT_A_POSITION)
    return one_array(pc.fill_null(values.cast(pa.int64()), 0))


def _flags(values: pa.Array, problems: Problems) -> pa.Array:
    if pa.types.is_boolean(values.type):
        return values
    texts = pc.utf8_lower(pc.utf8_trim_whitespace(_text(values)))
    found = pc.index_in(texts, value_set=pa.array(list(FLAGS)))
    unknown = pc.and_(found.is_null(), pc.fill_null(pc.not_equal(texts, ""), False))
    problems.mark(np.asarray(unknown.to_numpy(zero_copy_only=False)), NOT_A_FLAG)
    return pa.array(list(FLAGS.values())).take(found)


def _contexts(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type):
        return values.cast(pa.list_(pa.string()))
    return pc.split_pattern(_text(values), CONTEXT_SEPARATOR)
