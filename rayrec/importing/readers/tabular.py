"""csv and Parquet files of plays or of playlist entries, with a mapping of their columns to ours.

Roles of a play: user, song, played_at, and where there are any contexts (a list, or names separated by `|`),
skipped (true, false, 1 or 0), title, artist. Roles of a playlist entry: playlist, position, song,
and where there are any title, artist. A role that is not mapped has the column of its own name.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, plain, spell_ids, spell_lists, spell_texts
from rayrec.errors import InputError
from rayrec.importing.readers import delimited, reader
from rayrec.importing.readers.files import open_source
from rayrec.importing.readers.lines import byte_ranges
from rayrec.importing.readers.parquet import open_parquet, read_batches, row_texts
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit

PLAY_ROLES = ("user", "song", "played_at", "contexts", "skipped", "title", "artist")
OPTIONAL_ROLES = ("contexts", "skipped", "title", "artist")
PLAYLIST_ROLES = ("playlist", "position", "song", "title", "artist")
NOT_A_POSITION = "position is not a whole number"
NOT_A_FLAG = "skipped is none of true, false, 1, 0"
FLAGS = {"true": True, "1": True, "t": True, "yes": True, "false": False, "0": False, "f": False, "no": False}


def roles(playlists: bool) -> tuple[str, ...]:
    """What a column of a table can be mapped to."""
    return PLAYLIST_ROLES if playlists else PLAY_ROLES


class CsvReader:
    """Reads csv files with a header line. A value must not hold a line break."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges. Raises `InputError` for a file without a header or a mapped column."""
        self._positions(source, delimited.read_header(source, self.options.delimiter))
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch per block of 16 MiB."""
        for rows in delimited.read_rows(unit, self.options.delimiter, partial(self._positions, unit.source)):
            yield convert(
                rows.values,
                self.options.playlists,
                source=unit.source,
                lines=rows.lines,
                texts=rows.texts,
                covered=len(rows.block),
                also=rows.rejected,
            )

    def _positions(self, source: str, header: list[str]) -> dict[str, int]:
        delimited.require_delimiter(source, header, self.options.delimiter)
        return find_columns(source, header, self.options)


class ParquetReader:
    """Reads Parquet files."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Runs of row groups. Raises `InputError` for another format or a missing column."""
        with open_source(source) as stream:
            file = open_parquet(source, stream)
            find_columns(source, file.schema_arrow.names, self.options)
            sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
        numbers = (np.cumsum(sizes) - sizes) // unit_bytes if sizes else np.zeros(0)
        starts = [group for group in range(len(sizes)) if group == 0 or numbers[group] != numbers[group - 1]]
        stops = [*starts[1:], len(sizes)]
        return [Unit(source=source, start=start, stop=stop) for start, stop in zip(starts, stops, strict=False)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Batches of 262,144 rows; the line is the number of the record."""
        with open_source(unit.source) as stream:
            file = open_parquet(unit.source, stream)
            names = file.schema_arrow.names
            wanted = {role: names[place] for role, place in find_columns(unit.source, names, self.options).items()}
            groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
            first = 1
            for part in read_batches(unit.source, file, groups, list(set(wanted.values()))):

                def texts(positions: np.ndarray, part: pa.RecordBatch = part) -> list[str]:
                    return row_texts(part, positions)

                yield convert(
                    {role: part.column(name) for role, name in wanted.items()},
                    self.options.playlists,
                    source=unit.source,
                    names=wanted,
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
        elif role in options.columns or role not in OPTIONAL_ROLES:
            raise InputError(
                f"{source} has no column {name!r} for {role}; it has {delimited.shown_columns(names)}; "
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
    names: Mapping[str, str] | None = None,
) -> Batch:
    """Columns by role, of strings or of the types of a Parquet file, to plays or playlist entries.

    `names` are those of the columns in the file. Raises `InputError` for a column of a type that cannot hold its role.
    """
    problems = Problems(len(lines))

    def ids(role: str, reason: str) -> pa.Array:
        return spell_ids(values[role], problems, column=name(role), reason=reason)

    def name(role: str) -> str:
        return (names or {}).get(role, role)

    try:
        owner, no_owner = ("playlist", reader.NO_PLAYLIST) if playlists else ("user", reader.NO_USER)
        data = {columns.PLAYLIST if playlists else columns.USER: ids(owner, no_owner)}
        data[columns.SONG_ID] = ids("song", reader.NO_SONG)
        if playlists:
            data["position"] = _positions(values["position"], problems, name("position"))
        else:
            data[columns.PLAYED_AT] = pa.array(to_ms(values["played_at"], problems, column=name("played_at")))
            if "skipped" in values:
                data[columns.SKIPPED] = _flags(values["skipped"], problems, name("skipped"))
            if "contexts" in values:
                data[columns.CONTEXTS] = spell_lists(values["contexts"], problems, column=name("contexts"))
        for role in ("title", "artist"):
            if role in values:
                data[role] = spell_texts(values[role], problems, column=name(role))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    schema = columns.PLAYLIST_ENTRIES if playlists else columns.PLAYS
    return reader.batch(
        schema, data, source=source, lines=lines, problems=problems, texts=texts, covered=covered, also=also
    )


def _positions(values: pa.Array, problems: Problems, column: str) -> pa.Array:
    texts = spell_texts(values, problems, column=column)
    valid = pc.fill_null(pc.match_substring_regex(texts, r"^\d{1,18}$"), False)
    problems.mark(~np.asarray(valid.to_numpy(zero_copy_only=False)), NOT_A_POSITION)
    return one_array(pc.if_else(valid, texts, "0").cast(pa.int64()))


def _flags(values: pa.Array, problems: Problems, column: str) -> pa.Array:
    values = plain(values)
    if pa.types.is_boolean(values.type):
        return values
    texts = pc.utf8_lower(spell_texts(values, problems, column=column))
    found = pc.index_in(texts, value_set=pa.array(list(FLAGS)))
    unknown = pc.and_(found.is_null(), texts.is_valid())
    problems.mark(np.asarray(unknown.to_numpy(zero_copy_only=False)), NOT_A_FLAG)
    return pa.array(list(FLAGS.values())).take(found)
