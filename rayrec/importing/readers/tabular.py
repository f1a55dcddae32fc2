"""csv and Parquet files of plays or of playlist entries, whose columns are mapped to roles.

Roles of a play: user, song, played_at, and optionally contexts (a list, or names separated by `|`), skipped (true,
false, 1 or 0), share_listened (0 to 1), ms_played, duration_ms, event_type (play, skip or like), liked (true, false, 1
or 0), title, artist. Roles of a playlist entry: playlist, position, song, and optionally title, artist. A role that is
not mapped uses the column with its own name. If song is mapped to `artist+title`, the file has no song ids, and
`name_song` makes the id of a song from the columns of these two roles.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.moments import to_ms
from rayrec.data.spelling import (
    Problems,
    as_strings,
    name_songs,
    plain,
    spell_artists,
    spell_ids,
    spell_lists,
    spell_texts,
    spell_values,
)
from rayrec.errors import DamagedInputError, InputError, first_line
from rayrec.importing.readers import delimited, reader
from rayrec.importing.readers.reader import (
    Batch,
    ReadOptions,
    SourceRows,
    Unit,
    byte_ranges,
    naming,
    open_source,
    to_batch,
)

ROWS_PER_BATCH = 1 << 18
# A damaged footer may contain names that are not UTF-8, for which pyarrow raises a ValueError.
UNREADABLE = (pa.ArrowException, OSError, ValueError)


class ParquetRows(NamedTuple):
    """R rows of a unit; implements `SourceRows`."""

    part: pa.RecordBatch
    names: Mapping[str, str]  # wanted name -> column of the file
    first: int  # number of the first record, counted from the start of the unit

    @property
    def values(self) -> dict[str, pa.Array]:
        """The wanted columns: name -> array (R,)."""
        return {name: self.part.column(column) for name, column in self.names.items()}

    @property
    def lines(self) -> np.ndarray:
        """int64 (R,): numbers of the records, counted from the start of the unit."""
        return np.arange(self.first, self.first + self.covered)

    @property
    def covered(self) -> int:
        """Number of rows, R."""
        return int(self.part.num_rows)

    @property
    def rejected(self) -> pa.Table:
        """An empty columns.REJECTED table, since every record is a row."""
        return columns.REJECTED.empty_table()

    def texts(self, positions: np.ndarray) -> list[str]:
        """The rows at `positions` as JSON, for the file of rejected rows."""
        cells = [[cell_value(column[row]) for column in self.part.columns] for row in positions.tolist()]
        return [
            json.dumps(dict(zip(self.part.schema.names, row, strict=True)), default=str, ensure_ascii=False)
            for row in cells
        ]


def plan_groups(source: str, unit_bytes: int, find_positions: Callable[[list[str]], Mapping[str, int]]) -> list[Unit]:
    """Split a file into units of row groups, of about `unit_bytes`.

    `find_positions`, as in `read_row_groups`, is called with the columns of the file first, and raises if one is
    missing.
    """
    with open_source(source) as stream:
        file = open_parquet(source, stream)
        find_positions(file.schema_arrow.names)
        sizes = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    unit_numbers = (np.cumsum(sizes) - sizes) // unit_bytes if sizes else np.zeros(0)
    starts = [group for group in range(len(sizes)) if group == 0 or unit_numbers[group] != unit_numbers[group - 1]]
    stops = [*starts[1:], len(sizes)]
    return [Unit(source=source, start=start, stop=stop) for start, stop in zip(starts, stops, strict=False)]


def read_row_groups(unit: Unit, find_positions: Callable[[list[str]], Mapping[str, int]]) -> Iterator[ParquetRows]:
    """Yield the rows of a unit of row groups in batches of 262,144.

    `find_positions` returns the wanted columns among the columns of the file: name -> position.
    """
    with open_source(unit.source) as stream:
        file = open_parquet(unit.source, stream)
        names = file.schema_arrow.names
        column_of = {name: names[position] for name, position in find_positions(names).items()}
        groups = list(range(unit.start, file.num_row_groups if unit.stop is None else unit.stop))
        first_record = 1
        for part in read_batches(unit.source, file, groups, list(set(column_of.values()))):
            yield ParquetRows(part, column_of, first_record)
            first_record += part.num_rows


def open_parquet(source: str, stream: pa.NativeFile) -> pq.ParquetFile:
    """Open a Parquet file. Raises `DamagedInputError` if it is not a Parquet file or its footer is damaged."""
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
    """Yield the columns `names` of the row groups `groups` in batches; None means all of them.

    Raises `DamagedInputError` if a page is damaged.
    """
    try:
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=groups, columns=names):
            batch.validate()
            yield batch
    except UNREADABLE as error:
        raise _damaged_error(source, error) from error


def read_columns(source: str, file: pq.ParquetFile, names: Sequence[str]) -> pa.Table:
    """Return the columns `names` of all rows. Raises the same errors as `read_batches`."""
    try:
        table = file.read(columns=list(names))
        table.validate()
    except UNREADABLE as error:
        raise _damaged_error(source, error) from error
    return table


def cell_value(value: pa.Scalar) -> Any:
    """Return a value as a Python object, or `<type>` if Python has none for it, such as a date after the year 9999."""
    try:
        return value.as_py()
    except (ValueError, OverflowError):
        return f"<{value.type}>"


def _damaged_error(source: str, error: Exception) -> DamagedInputError:
    return DamagedInputError(f"{source} is damaged: {first_line(error)}; restore it")


EVENT_ROLES = ("skipped", "share_listened", "ms_played", "duration_ms", "event_type", "liked")
PLAY_ROLES = ("user", "song", "played_at", "contexts", *EVENT_ROLES, "title", "artist")
OPTIONAL_ROLES = ("contexts", *EVENT_ROLES, "title", "artist")
NAMES_OF_SONG = {"title": spell_texts, "artist": spell_artists}  # role -> function that reads its column
SONG_FROM_NAMES = "artist+title"  # given in place of a column of song ids
PLAYLIST_ROLES = ("playlist", "position", "song", "title", "artist")
NOT_A_POSITION = "position is not a whole number"
OTHER_EVENT = "event is not a play, skip or like"
EVENTS = {"play": "play", "listen": "play", "skip": "skip", "like": "like"}  # event type in a file -> its meaning
NUMBER = r"^(\d{1,15}(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?$"
FLAGS = {"true": True, "1": True, "t": True, "yes": True, "false": False, "0": False, "f": False, "no": False}


def roles(playlists: bool) -> tuple[str, ...]:
    """The roles that columns of a table can have."""
    return PLAYLIST_ROLES if playlists else PLAY_ROLES


class CsvReader:
    """Reads csv files with a header line. A value must not contain a line break."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into byte ranges. Raises `InputError` if it lacks a header or a mapped column."""
        self._find_columns(source, delimited.read_header(source, self.options.delimiter))
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 16 MiB."""
        for rows in delimited.read_delimited(unit, self.options.delimiter, partial(self._find_columns, unit.source)):
            yield convert(rows, self.options, unit.source)

    def _find_columns(self, source: str, header: list[str]) -> dict[str, int]:
        delimited.require_delimiter(source, header, self.options.delimiter)
        return find_columns(source, header, self.options)


class ParquetReader:
    """Reads Parquet files."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into runs of row groups. Raises `InputError` for another format or a missing column."""
        return plan_groups(source, unit_bytes, lambda names: find_columns(source, names, self.options))

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield batches of 262,144 rows; line numbers are record numbers."""
        for rows in read_row_groups(unit, lambda names: find_columns(unit.source, names, self.options)):
            yield convert(rows, self.options, unit.source, rows.names)


def find_columns(source: str, names: Sequence[str], options: ReadOptions) -> dict[str, int]:
    """Return role -> position of its column in the file; the role user is not needed if the options name a user.

    Raises `InputError` as `reader.mapped_columns` does, and if the options name a user but the file has a user column.
    """
    known_roles, mapping = list(roles(options.playlists)), dict(options.columns)
    needed_roles = [
        role for role in known_roles if role not in OPTIONAL_ROLES and not (role == "user" and options.user)
    ]
    if mapping.get("song") == SONG_FROM_NAMES:
        del mapping["song"]
        known_roles.remove("song")
        needed_roles = [role for role in needed_roles if role != "song"] + [*NAMES_OF_SONG]
    position_of = reader.mapped_columns(source, names, mapping, known_roles, needed_roles)
    if options.user and "user" in position_of:
        raise InputError(
            f"{source} has users in column {names[position_of['user']]!r}; --user would merge them; "
            "import without --user"
        )
    return position_of


def convert(rows: SourceRows, options: ReadOptions, source: str, names: Mapping[str, str] | None = None) -> Batch:
    """Convert columns, given by role, to plays or playlist entries.

    The columns are strings, or of any type that a Parquet file may have. `names` maps roles to column names of the
    file, for messages. If there are columns of artist and title, a row without a song id gets the id that `name_song`
    makes of them. Raises `InputError` for a column of a type that is not valid for its role.
    """
    values, is_playlists = rows.values, options.playlists
    problems = Problems(len(rows.lines))

    def read_ids(role: str, reason: str) -> pa.Array:
        return spell_ids(values[role], problems, column=column_name(role), reason=reason)

    def column_name(role: str) -> str:
        return (names or {}).get(role, role)

    with naming(source):
        owner_role, no_owner_reason = ("playlist", reader.NO_PLAYLIST) if is_playlists else ("user", reader.NO_USER)
        owner_ids = (
            read_ids(owner_role, no_owner_reason) if owner_role in values else pa.repeat(options.user, len(rows.lines))
        )
        data = {columns.PLAYLIST if is_playlists else columns.USER: owner_ids}
        names_of_song = {
            role: spell_names(values[role], problems, column=column_name(role))
            for role, spell_names in NAMES_OF_SONG.items()
            if role in values
        }
        if len(names_of_song) == len(NAMES_OF_SONG):  # a file may have ids for only some of its songs
            given_ids = values.get("song", pa.nulls(len(rows.lines), pa.string()))
            song_ids = as_strings(given_ids, problems, column=column_name("song"))
            values = {**values, "song": name_songs(song_ids, names_of_song["artist"], names_of_song["title"])}
        data[columns.SONG_ID] = read_ids("song", reader.NO_SONG)
        if is_playlists:
            data["position"] = _read_positions(values["position"], problems, column_name("position"))
        else:
            times = to_ms(values["played_at"], problems, column=column_name("played_at"), timezone=options.timezone)
            data[columns.PLAYED_AT] = pa.array(times)
            data |= _events(values, column_name, problems, options.skip_below)
            if "contexts" in values:
                data[columns.CONTEXTS] = spell_lists(values["contexts"], problems, column=column_name("contexts"))
        data |= names_of_song
    schema = columns.PLAYLIST_ENTRIES if is_playlists else columns.PLAYS
    return to_batch(rows, data, problems, source, schema)


def _events(
    values: Mapping[str, pa.Array], column_name: Callable[[str], str], problems: Problems, skip_below: float
) -> dict[str, pa.Array]:
    """Return columns.SKIPPED, LIKED and IS_PLAY of the rows, each only if the file has such data.

    The first of these columns with a value in a row decides whether a play was skipped: `skipped`; `share_listened`
    (skipped below `skip_below`); `ms_played` (skipped below that share of `duration_ms` or, without a duration, below
    30 seconds, the minimum length that services count as a stream). An event of type skip is skipped in any case.
    """
    count, data = len(problems.bad), {}
    skip_columns: list[pa.Array] = []
    if "skipped" in values:
        skip_columns.append(read_flags(values["skipped"], problems, column_name("skipped")))
    if "share_listened" in values:
        share_listened = read_numbers(values["share_listened"], problems, column_name("share_listened"), most=1)
        skip_columns.append(pc.less(share_listened, skip_below))
    if "ms_played" in values:
        ms_played = read_numbers(values["ms_played"], problems, column_name("ms_played"))
        if "duration_ms" in values:
            duration = read_numbers(values["duration_ms"], problems, column_name("duration_ms"))
            known_duration = pc.if_else(pc.greater(duration, 0), duration, None)
            skip_columns.append(pc.less(ms_played, pc.multiply(known_duration, skip_below)))
        skip_columns.append(pc.less(ms_played, reader.STREAM_MS))
    likes = read_flags(values["liked"], problems, column_name("liked")) if "liked" in values else None
    if "event_type" in values:
        event_types = read_events(values["event_type"], problems, column_name("event_type"))
        skip_columns.insert(
            0, pc.if_else(pc.fill_null(pc.equal(event_types, "skip"), False), True, pa.scalar(None, pa.bool_()))
        )
        is_like = pc.fill_null(pc.equal(event_types, "like"), False)
        if pc.any(is_like).as_py():
            data[columns.IS_PLAY] = pc.invert(is_like)
            likes = is_like if likes is None else pc.or_(pc.fill_null(likes, False), is_like)
    if skip_columns:
        data[columns.SKIPPED] = pc.coalesce(*skip_columns, pa.nulls(count, pa.bool_()))
    if likes is not None and pc.any(likes).as_py():
        data[columns.LIKED] = likes
    return data


def read_numbers(values: pa.Array, problems: Problems, column: str, *, most: float | None = None) -> pa.Array:
    """float64 (R,): a column of numbers of at least 0; null if there is no value.

    Values that are not such numbers, or are above `most`, are marked in `problems`.
    """
    values = plain(values)
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        numbers = values.cast(pa.float64(), safe=False)
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
        is_valid = pc.and_(pc.greater_equal(numbers, 0), pc.is_finite(numbers))
    else:
        texts = spell_values(values, problems, column=column)
        is_valid = pc.match_substring_regex(texts, NUMBER)
        numbers = pc.if_else(is_valid, texts, None).cast(pa.float64())
    if most is not None:
        is_valid = pc.and_kleene(is_valid, pc.less_equal(numbers, most))
    is_wrong = pc.invert(pc.fill_null(is_valid, True))
    limit = "of at least 0" if most is None else f"from 0 to {most:g}"
    problems.mark(np.asarray(is_wrong.to_numpy(zero_copy_only=False)), f"{column} is not a number {limit}")
    return numbers


def _read_positions(values: pa.Array, problems: Problems, column: str) -> pa.Array:
    texts = spell_values(values, problems, column=column)
    is_valid = pc.fill_null(pc.match_substring_regex(texts, r"^\d{1,18}$"), False)
    problems.mark(~np.asarray(is_valid.to_numpy(zero_copy_only=False)), NOT_A_POSITION)
    return one_array(pc.if_else(is_valid, texts, "0").cast(pa.int64()))


def read_events(values: pa.Array, problems: Problems, column: str) -> pa.Array:
    """Strings (R,): a column of event types as play, skip or like; null if there is no value.

    Other values are marked in `problems`.
    """
    texts = pc.utf8_lower(spell_texts(values, problems, column=column))
    positions = pc.index_in(texts, value_set=pa.array(list(EVENTS)))
    is_unknown = pc.and_(positions.is_null(), texts.is_valid())
    problems.mark(np.asarray(is_unknown.to_numpy(zero_copy_only=False)), OTHER_EVENT)
    return pa.array(list(EVENTS.values())).take(positions)


def read_flags(values: pa.Array, problems: Problems, column: str) -> pa.Array:
    """bool (R,): a column of truth values in any of the spellings of `FLAGS`; null if there is no value.

    Other values are marked in `problems`.
    """
    values = plain(values)
    if pa.types.is_boolean(values.type):
        return values
    texts = pc.utf8_lower(spell_values(values, problems, column=column))
    positions = pc.index_in(texts, value_set=pa.array(list(FLAGS)))
    is_unknown = pc.and_(positions.is_null(), texts.is_valid())
    problems.mark(np.asarray(is_unknown.to_numpy(zero_copy_only=False)), f"{column} is not true, false, 1 or 0")
    return pa.array(list(FLAGS.values())).take(positions)
