"""Detects from the names and first rows of files how to import them: format, columns, form of the times."""

import posixpath
import re
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data.moments import (
    DATE_ALONE,
    FIRST_MICROSECONDS,
    FIRST_MILLISECONDS,
    FIRST_NANOSECONDS,
    LOCAL,
    NOT_A_TIME,
    WRITTEN,
    WRITTEN_DATE,
    to_ms,
)
from rayrec.data.spelling import Problems, missing, plain, spell_artists, spell_lists, spell_texts
from rayrec.errors import InputError
from rayrec.importing.import_plan import ImportConfig, file_notes
from rayrec.importing.readers import FORMATS, Format, delimited
from rayrec.importing.readers.delimited import spelled_delimiter
from rayrec.importing.readers.reader import (
    NAMES,
    ONE_USER,
    Batch,
    ReadOptions,
    SourceFile,
    byte_ranges,
    find_files,
    mapping_advice,
    open_source,
    plain_letters,
    plain_name,
    read_blocks,
    read_head,
    shown_columns,
)
from rayrec.importing.readers.spotify_history import ACCOUNT_DATA, is_account_data
from rayrec.importing.readers.tabular import (
    FLAGS,
    NAMES_OF_SONG,
    OPTIONAL_ROLES,
    SONG_FROM_NAMES,
    cell_value,
    open_parquet,
    read_batches,
    read_events,
    read_flags,
    read_numbers,
    roles,
)
from rayrec.importing.readers.youtube_takeout import is_watch_history

SAMPLE_FILES = 5
SAMPLE_BYTES = 1 << 20  # read from each file
SHOWN_EVENTS = 5  # event types in a message
VALUE_SHOWN = 40  # characters of an example value
# Role -> pattern for names that NAMES lacks, such as `Artist Name(s)`, as `plain_letters`; used if one column matches.
PATTERNS = {"title": r"(title|trackname|songname)s?$", "artist": r"artist(?!.*(id|ids|uri|uris|count)$)"}
EARLIEST = 631_152_000_000  # ms UTC, the year 1990; numbers that are read as earlier times are likely none
TITLE_OR_ID = ("song", "track", "recording")  # with a column of artists and none of titles, these may hold titles
# Optional role -> function that reads a column as an import does.
OPTIONAL_READERS: dict[str, Callable[..., pa.Array]] = {
    "contexts": spell_lists,
    "skipped": read_flags,
    "share_listened": partial(read_numbers, most=1),
    "ms_played": read_numbers,
    "duration_ms": read_numbers,
    "event_type": read_events,
    "liked": read_flags,
    "title": spell_texts,
    "artist": spell_artists,
}
SONG_ID = (
    r"(song|track|recording|(?<!playlist)item)(spotify|deezer|tidal|musicbrainz|mb)?(id|uri)$"
    r"|isrc$|^(spotify(id|uri)|uri|mbid)$"
)

# 18:24, 9:05:00, 6:24 pm; not 3:45, which may be the length of a song.
TIME_OF_DAY = r"([01]\d|2[0-3]):[0-5]\d|\d{1,2}:\d{2}:\d{2}(\.\d+)?|\d{1,2}:\d{2}(:\d{2})?\s*[AaPp][Mm]"
TITLE = r".*[^!-~].*"  # has a space or a character outside ASCII, which ids rarely have
# Roles whose column is used only if nearly all of its values can be read: if many cannot, it holds something else, such
# as percent in place of shares, and each of their plays would be rejected.
NUMBERS_AND_FLAGS = ("skipped", "share_listened", "ms_played", "duration_ms", "liked")
MAX_UNREADABLE_SHARE, MAX_OTHER_SHARE = 0.01, 0.5  # of the values of such a column, and of other optional columns
MIN_TITLE_SHARE = 0.1  # minimum share of values like TITLE in a column of titles; low, since many titles are one word
FIRST_LINE_NOTE = (
    "The first line looks like data, not column names. Add a header line, such as artist,album,title,played_at, "
    "above it."
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a csv or Parquet file."""

    name: str
    role: str  # role that an import would give it; empty: none
    type: str
    example: str


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """How files can be imported, according to their first rows."""

    format: str
    kind: str  # plays or playlists
    files: int
    bytes: int
    delimiter: str = ""  # csv only
    columns: list[Column] = field(default_factory=list)  # csv and parquet only
    # Role -> column for an import; an empty name: the column with the role's name is not read.
    mapping: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)  # roles without a column
    time: str = ""  # how times are written
    rows: int = 0  # inspected rows
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    examples: dict[str, str] = field(default_factory=dict)  # reason -> file, line and text of the first such row
    doubts: dict[str, str] = field(default_factory=dict)  # role -> why the column guessed for it may be wrong
    # Optional role -> why a column that seems to hold it is not used.
    left_out: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)  # column -> the first inspected file that lacks it
    notes: list[str] = field(default_factory=list)
    command: str = ""  # the command that imports the files

    def to_mapping(self) -> dict[str, Any]:
        """Return the inspection as a dict for JSON."""
        return asdict(self)


def inspect_files(format_name: str, paths: Sequence[str], timezone: str = "UTC") -> Inspection:
    """Inspect the first MiB of each of the first five files. Raises `InputError` for the same reasons as an import.

    `timezone` is the IANA name of the time zone of times without one in csv and Parquet files.
    """
    return _inspect(format_name, paths, timezone)[0]


def _inspect(format_name: str, paths: Sequence[str], timezone: str) -> tuple[Inspection, dict[str, pa.Array]]:
    """Return the inspection of `inspect_files`, and the first values of each column of csv and Parquet files."""
    config = ImportConfig(format=format_name, paths=tuple(paths), timezone=timezone)  # checks the arguments
    file_format = FORMATS[format_name]
    files = find_files(paths, file_format.patterns)
    size = sum(file.size for file in files)
    notes = file_notes(config, files)
    if not file_format.mapped:
        batches = _sample_batches(file_format, files, ReadOptions(playlists=file_format.playlists))
        row_kind = "playlists" if file_format.playlists else "plays"
        command = _command_fields(format_name, row_kind, paths, {}, "")
        return Inspection(**_row_fields(batches), **command, files=len(files), bytes=size, notes=notes), {}
    delimiter = _guess_delimiter(files[0].source) if format_name == "csv" else ""
    samples = {
        file.source: _csv_sample(file, delimiter) if delimiter else _parquet_sample(file)
        for file in files[:SAMPLE_FILES]
    }
    column_names, sample = _join_samples(list(samples.values()))
    lacking = {
        name: source
        for source, (names_in_file, _) in reversed(samples.items())
        for name in sample.keys() - set(names_in_file)
    }
    repeated_names = {name: count for name, count in Counter(column_names).items() if count > 1}
    row_kind, column_of_role, left_out = _guess_roles_of_files(sample, lacking)
    is_playlists = row_kind == "playlists"
    # An import uses a column that has the name of a role, unless another or none is given.
    mapping = column_of_role | {role: "" for role in left_out if _guess_misfit(role, role, sample)}
    required_roles = [role for role in roles(is_playlists) if role not in OPTIONAL_ROLES]
    missing_roles = [role for role in required_roles if role not in column_of_role]
    options = ReadOptions(playlists=is_playlists, columns=mapping, delimiter=delimiter or ",", timezone=timezone)
    batches = (
        []
        if missing_roles or repeated_names.keys() & set(column_of_role.values())
        else _sample_batches(file_format, files, options)
    )
    role_of_column = {name: role for role, name in column_of_role.items()}
    columns = [
        Column(name=name, role=role_of_column.get(name, ""), type=_type_name(values), example=_example(values))
        for name, values in sample.items()
    ]
    if missing_roles:
        one_user_advice = ONE_USER if "user" in missing_roles else ""
        notes.append(
            f"No column looks like {' or '.join(missing_roles)}: map it with --columns "
            f"{missing_roles[0]}=NAME{one_user_advice}."
        )
    if column_of_role.get("song") == SONG_FROM_NAMES:
        notes.append("No column looks like song IDs: they are made from artist and title.")
    notes += [f"{count} columns are named {name!r}: rename all but one." for name, count in repeated_names.items()]
    notes += _early_time_notes(column_of_role, sample)
    if _looks_like_data(column_names):
        notes.append(FIRST_LINE_NOTE)
    command_columns = {
        role: mapping.get(role, "NAME") for role in roles(is_playlists) if role in [*mapping, *missing_roles]
    }
    inspection = Inspection(
        **_row_fields(batches),
        **_command_fields(format_name, row_kind, paths, command_columns, delimiter, timezone),
        files=len(files),
        bytes=size,
        delimiter=delimiter,
        columns=columns,
        mapping=mapping,
        missing=missing_roles,
        time=time_form(sample[column_of_role["played_at"]], timezone) if "played_at" in column_of_role else "",
        doubts=_doubts(column_of_role, sample),
        left_out=left_out,
        lacking=lacking,
        notes=notes,
    )
    return inspection, sample


def guess_roles(sample: dict[str, pa.Array]) -> tuple[str, dict[str, str]]:
    """Return `plays` or `playlists`, and role -> column, guessed from names; for times and titles from values too."""
    plain_names = {plain_letters(name): name for name in reversed(sample)}
    column_of_role: dict[str, str] = {}
    for role in NAMES:
        column = next((name for name in _named_columns(role, sample) if not _guess_misfit(role, name, sample)), None)
        if column is not None and column not in column_of_role.values():
            column_of_role[role] = column
    for role, pattern in PATTERNS.items():
        matching_columns = [name for plain_column, name in plain_names.items() if re.search(pattern, plain_column)]
        if (
            role not in column_of_role
            and len(matching_columns) == 1
            and matching_columns[0] not in column_of_role.values()
            and not _misfit(role, matching_columns[0], sample)
        ):
            column_of_role[role] = matching_columns[0]
    if "playlist" not in column_of_role and (time_column := _guess_time(column_of_role, sample)):
        column_of_role["played_at"] = time_column
    if _may_be_title(column_of_role, sample):
        candidates = (name for name in (*NAMES["song"], *map(plain_letters, sample)) if name in plain_names)
        id_column = next((plain_names[name] for name in candidates if re.search(SONG_ID, name)), None)
        if id_column is not None:
            column_of_role |= {"title": column_of_role["song"], "song": id_column}
        elif _share_of_matches(sample[column_of_role["song"]], TITLE) >= MIN_TITLE_SHARE:
            column_of_role["title"] = column_of_role.pop("song")
    if plain_letters(column_of_role.get("title", "")) == "name" and _has_other_names(column_of_role, sample):
        del column_of_role["title"]
    if "song" not in column_of_role and all(role in column_of_role for role in NAMES_OF_SONG):
        column_of_role["song"] = SONG_FROM_NAMES
    row_kind = "playlists" if "playlist" in column_of_role and "played_at" not in column_of_role else "plays"
    return row_kind, {role: column_of_role[role] for role in roles(row_kind == "playlists") if role in column_of_role}


def _guess_roles_of_files(
    sample: dict[str, pa.Array], lacking: Mapping[str, str]
) -> tuple[str, dict[str, str], dict[str, str]]:
    """Return `plays` or `playlists`, role -> column, and optional role -> why its column is not used.

    `sample` has the columns of all files, `lacking` those that a file lacks. Only columns of all files are used, unless
    a required one is among the others: an import then names the file that lacks it.
    """
    row_kind, column_of_role = guess_roles({name: values for name, values in sample.items() if name not in lacking})
    kind_of_any, any_column_of_role = guess_roles(sample)
    required_roles = any_column_of_role.keys() - set(OPTIONAL_ROLES)
    time_names = [plain_letters(guess.get("played_at", "")) for guess in (column_of_role, any_column_of_role)]
    is_other_time = time_names[0] not in NAMES["played_at"] and time_names[1] in NAMES["played_at"]
    if required_roles - column_of_role.keys() or is_other_time:
        row_kind, column_of_role = kind_of_any, any_column_of_role
    left_out = _left_out(column_of_role, sample, row_kind == "playlists")
    for role, name in any_column_of_role.items():
        if role not in column_of_role and name in lacking:
            effect = f"{role} is read from the other files only" if role == name else f"no column is used as {role}"
            left_out[role] = f"{lacking[name]} has no column {name!r}: {effect}."
    return row_kind, column_of_role, left_out


def _named_columns(role: str, sample: Mapping[str, pa.Array]) -> list[str]:
    """Return the columns with a name that exports use for a role, best first."""
    plain_names = {plain_letters(name): name for name in reversed(list(sample))}
    return [plain_names[name] for name in NAMES[role] if name in plain_names]


def _misfit(role: str, column: str, sample: Mapping[str, pa.Array]) -> str:
    """Return why a column cannot have an optional role: its type, or too many values that cannot be read.

    Empty if it can, and if no such column exists.
    """
    if role not in OPTIONAL_READERS or column not in sample:
        return ""
    values = sample[column][:1000]
    problems = Problems(len(values))
    try:
        OPTIONAL_READERS[role](values, problems, column=column)
    except InputError as error:
        return str(error)
    reasons, known_count = problems.reasons(), len(values) - values.null_count
    max_share = MAX_UNREADABLE_SHARE if role in NUMBERS_AND_FLAGS else MAX_OTHER_SHARE
    return (
        f"{reasons[0]} in {len(reasons):,} of {known_count:,} values" if len(reasons) > max_share * known_count else ""
    )


def _guess_misfit(role: str, column: str, sample: Mapping[str, pa.Array]) -> str:
    """Return why a role is not guessed for a column: it cannot have the role, or no event is a play."""
    reason = _misfit(role, column, sample)
    if reason or role != "event_type" or column not in sample or not len(sample[column]):
        return reason
    events = read_events(sample[column], Problems(len(sample[column])), column)
    is_play = pc.not_equal(pc.fill_null(events, "like"), "like")
    is_empty = pa.array(missing(spell_texts(sample[column], Problems(len(events)), column=column)))  # is a play, too
    return "" if pc.any(pc.or_(is_play, is_empty)).as_py() else f"no value of column {column!r} is a play"


def _left_out(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array], is_playlists: bool) -> dict[str, str]:
    """Return optional role -> why the column with a name for it is not used."""
    left_out: dict[str, str] = {}
    for role in roles(is_playlists):
        text = next((_guess_misfit(role, name, sample) for name in _named_columns(role, sample)), "")
        if text and role not in column_of_role:
            left_out[role] = f"No column is used as {role}: {text}."
    return left_out


def _guess_time(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> str:
    """Return the column of the times of plays, guessed from names and values; empty if no column looks like one."""
    taken_columns = {name for role, name in column_of_role.items() if role != "played_at"}
    named_columns = _named_columns("played_at", sample)
    named_times = [name for name in named_columns if name not in taken_columns and _share_of_times(sample[name]) > 0.5]
    times_of_plays = [name for name in named_times if not _is_of_song(name, column_of_role, sample)]
    if times_of_plays:
        return times_of_plays[0]
    time_columns = [
        name
        for name in _time_columns(column_of_role, sample)
        if not (named_times and _is_of_song(name, column_of_role, sample))
    ]
    if named_columns or len(time_columns) > 1:  # a column of dates is then likely a release date
        time_columns = [name for name in time_columns if not _are_dates(sample[name])]
    if len(time_columns) == 1:
        return time_columns[0]
    return named_times[0] if named_times else column_of_role.get("played_at", "")


def _time_columns(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> list[str]:
    """Return the columns without another role of which more than 90% of the values are times."""
    taken_columns = {name for role, name in column_of_role.items() if role != "played_at"}
    return [name for name in sample if name not in taken_columns and _share_of_times(sample[name]) > 0.9]


def _is_of_song(column: str, column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> bool:
    """True if a column belongs to songs, not plays, as a date of release: it has one value in all rows of a song.

    False if the sample cannot tell, because fewer than two songs occur twice, or all rows have the same value.
    """
    counts = _values_per_song(column, column_of_role, sample)
    return len(counts) > 1 and bool((counts == 1).all()) and len(set(_first_texts(sample[column]))) > 1


def _has_other_names(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> bool:
    """True if most songs that occur at least twice have several titles: the names may be those of users."""
    counts = _values_per_song(column_of_role["title"], column_of_role, sample)
    return len(counts) > 0 and bool((counts > 1).mean() > 0.5)


def _values_per_song(column: str, column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> np.ndarray:
    """int64: the number of different values that a column has in the rows of each song that occurs at least twice.

    The first 1,000 rows are counted, without those that lack a value. Empty if no column of songs is known.
    """
    if column_of_role.get("song") not in sample:
        return np.zeros(0, dtype=np.int64)
    cells = [[str(cell_value(value)) for value in sample[name][:1000]] for name in (column_of_role["song"], column)]
    rows = [(song, text) for song, text in zip(*cells, strict=False) if song and text and "None" not in (song, text)]
    row_counts = Counter(song for song, _ in rows)
    value_counts = Counter(song for song, _ in set(rows))
    return np.array([count for song, count in value_counts.items() if row_counts[song] > 1], dtype=np.int64)


def _find_time_of_day(time_column: str, sample: Mapping[str, pa.Array]) -> str:
    """Return the column of times of day, if `time_column` holds dates alone or no times; empty if there is none."""
    if _share_of_times(sample[time_column]) > 0.5 and not _are_dates(sample[time_column]):
        return ""
    named_columns = (name for name in sample if plain_letters(name) in NAMES["played_at"])
    return next((name for name in named_columns if _share_of_matches(sample[name], TIME_OF_DAY) > 0.9), "")


def _may_be_title(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> bool:
    """True if the column used for song ids may hold titles, which songs of different artists can share."""
    song_column = column_of_role.get("song", "")
    has_title_name = plain_letters(song_column) in TITLE_OR_ID and _type_name(sample[song_column]) == "text"
    return has_title_name and "artist" in column_of_role and "title" not in column_of_role


def _doubts(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> dict[str, str]:
    """Return role -> why the column guessed for it may be wrong."""
    doubts: dict[str, str] = {}
    if _may_be_title(column_of_role, sample):
        doubts["song"] = (
            f"Song IDs come from column {column_of_role['song']!r}, which may contain titles: songs of different "
            "artists with the same title become one song. Select a column of IDs with --columns song=NAME."
        )
    event_column = column_of_role.get("event_type", "")
    if event_column and (other_events := _other_events(sample[event_column])):
        doubts["event_type"] = (
            f"Rows whose {event_column!r} is {' or '.join(other_events)} are rejected: only play, listen, skip and "
            "like are known events. If they are plays, pass --columns event_type= to ignore the column."
        )
    time_column = column_of_role.get("played_at", "")
    if time_column and (time_of_day := _find_time_of_day(time_column, sample)):
        doubts["played_at"] = (
            f"Column {time_of_day!r} contains the time of day without the date: combine date and time in one column, "
            "such as 2026-01-20 18:24:00."
        )
    elif time_column and _is_of_song(time_column, column_of_role, sample):
        other_names = [name for name in _time_columns(column_of_role, sample) if name != time_column]
        other_text = f", such as {' or '.join(other_names)}," if other_names else ""
        doubts["played_at"] = (
            f"Column {time_column!r} has the same time in all rows of a song, as a date of release has. If it is not "
            f"the time of the plays, select another column{other_text} with --columns played_at=NAME."
        )
    return doubts


def _other_events(values: pa.Array) -> list[str]:
    """Return the most frequent event types of a column that an import rejects, at most `SHOWN_EVENTS`."""
    problems = Problems(len(values))
    read_events(values, problems, "event_type")
    counts = Counter(str(cell_value(value)) for value in values.filter(pa.array(problems.bad)))
    return [text[:VALUE_SHOWN] for text, _ in counts.most_common(SHOWN_EVENTS)]


def time_form(values: pa.Array, timezone: str = "UTC") -> str:
    """Describe how the times of a column are written; `timezone` is the zone of times without one."""
    if pa.types.is_timestamp(values.type):
        return f"timestamps in {values.type.tz}" if values.type.tz else f"timestamps without a zone, read as {timezone}"
    if _are_dates(values):
        return f"dates without times, read as midnight in {timezone}"
    texts = _first_texts(values)
    numbers = [float(text) for text in texts if re.fullmatch(r"[+-]?\d+(\.\d*)?", text)]
    if texts and len(numbers) * 2 > len(texts):
        median = float(np.median(np.abs(numbers)))
        units = (
            (FIRST_MILLISECONDS, "unix seconds"),
            (FIRST_MICROSECONDS, "unix milliseconds"),
            (FIRST_NANOSECONDS, "unix microseconds, which are rejected"),
        )
        return next((unit for limit, unit in units if median < limit), "unix nanoseconds, which are rejected")
    problems = Problems(len(texts))
    to_ms(pa.array(texts, pa.string()), problems)
    reasons = problems.reasons()
    if not reasons:
        local_count = sum(re.match(f"{LOCAL}|{WRITTEN}", text) is not None for text in texts)
        share_text = "" if local_count == len(texts) else f" in {local_count:,} of {len(texts):,} values"
        if any(re.match(WRITTEN, text) for text in texts):
            return f"day, month name and year without a zone{share_text}, read as {timezone}"
        return f"ISO 8601 without a zone{share_text}, read as {timezone}" if local_count else "ISO 8601 with a zone"
    most_frequent = max(set(reasons), key=reasons.count)
    return f"{most_frequent} in {reasons.count(most_frequent):,} of {len(texts):,} values"


def _are_dates(values: pa.Array) -> bool:
    """True for a column of dates without a time of day."""
    if pa.types.is_date(values.type):
        return True
    known_values = _in_plain_strings(values).drop_null()
    return (
        known_values.type == pa.string()
        and len(known_values) > 0
        and pc.all(pc.match_substring_regex(known_values, f"{DATE_ALONE}|{WRITTEN_DATE}")).as_py()
    )


def _share_of_times(values: pa.Array) -> float:
    """Share of values that are times after 1990: small numbers are not times, though an import reads them as 1970."""
    return float(np.sum(_read_times(values) > EARLIEST)) / max(1, len(values))


def _read_times(values: pa.Array) -> np.ndarray:
    """Return the values that are times, ms UTC."""
    problems = Problems(len(values))
    try:
        times = to_ms(values, problems)
    except InputError:
        return np.zeros(0, dtype=np.int64)
    readable_times: np.ndarray = times[~problems.bad]
    return readable_times


def _early_time_notes(column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]) -> list[str]:
    """Return a note if most times are numbers before 1990: a day such as 20240120 is read as seconds since 1970."""
    time_column = column_of_role.get("played_at", "")
    times = _read_times(sample[time_column]) if time_column in sample else np.zeros(0)
    if not len(times) or np.median(times) > EARLIEST or "unix" not in (form := time_form(sample[time_column])):
        return []
    year = str(np.datetime64(int(np.median(times)), "ms"))[:4]
    return [
        f"Column {time_column!r} is read as {form.replace('unix', 'Unix')} of {year}. If that is wrong, write dates as "
        "2024-01-20."
    ]


def _first_texts(values: pa.Array) -> list[str]:
    """Return the first 1,000 non-null values as text, without spaces around it."""
    return [str(cell_value(value)).strip() for value in values.drop_null()[:1000]]


def _share_of_matches(values: pa.Array, pattern: str) -> float:
    """Share of the non-null values, of the first 1,000, that match a pattern as a whole."""
    texts = _first_texts(values)
    return sum(re.fullmatch(pattern, text) is not None for text in texts) / max(1, len(texts))


def _sample_batches(file_format: Format, files: Sequence[SourceFile], options: ReadOptions) -> list[Batch]:
    """Return the first batch of each of the first five files."""
    reader = file_format.make(options)
    units = [reader.plan(file.source, file.size, SAMPLE_BYTES)[:1] for file in files[:SAMPLE_FILES]]
    return [batch for file_units in units for unit in file_units for batch in _first_batch(reader.read(unit))]


def _first_batch(batches: Any) -> list[Batch]:
    batch = next(iter(batches), None)
    return [] if batch is None else [batch]


def _row_fields(batches: Sequence[Batch]) -> dict[str, Any]:
    rejected: dict[str, int] = {}
    examples: dict[str, str] = {}
    for batch in batches:
        for row in batch.rejected.to_pylist():
            rejected[row["reason"]] = rejected.get(row["reason"], 0) + 1
            text = row["text"][: 3 * VALUE_SHOWN]
            examples.setdefault(row["reason"], f"{row['source']}, line {row['line']}: {text}")
    return {"rows": sum(batch.read for batch in batches), "rejected": rejected, "examples": examples}


def _command_fields(
    format_name: str,
    row_kind: str,
    paths: Sequence[str],
    column_of_role: dict[str, str],
    delimiter: str,
    timezone: str = "UTC",
) -> dict[str, Any]:
    command_words = ["rayrec", "import", format_name, *map(shlex.quote, paths)]
    if row_kind == "playlists" and FORMATS[format_name].mapped:
        command_words += ["--kind", "playlists"]
    renamed_columns = {role: name for role, name in column_of_role.items() if role != name}
    if renamed_columns:
        command_words += [
            "--columns",
            shlex.quote(",".join(f"{role}={name}" for role, name in renamed_columns.items())),
        ]
    if delimiter not in ("", ","):
        command_words += ["--delimiter", spelled_delimiter(delimiter)]
    if timezone != "UTC":
        command_words += ["--timezone", timezone]
    return {"format": format_name, "kind": row_kind, "command": " ".join(command_words)}


def _guess_delimiter(source: str) -> str:
    header = delimited.read_header(source, ",")
    return delimited.other_delimiter(header, ",") or ","


Sample = tuple[list[str], dict[str, pa.Array]]  # names of the columns of a file, and the first values of each


def _join_samples(samples: Sequence[Sample]) -> Sample:
    """Return the names of the first file, and the first values of each column from the first file that has some."""
    joined_sample: dict[str, pa.Array] = {}
    for _, sample in samples:
        joined_sample |= {name: values for name, values in sample.items() if not len(joined_sample.get(name, ()))}
    return samples[0][0], joined_sample


def _csv_sample(file: SourceFile, delimiter: str) -> Sample:
    header = delimited.read_header(file.source, delimiter)
    first_unit = byte_ranges(file.source, file.size, SAMPLE_BYTES)[0]
    block = next(iter(read_blocks(first_unit, SAMPLE_BYTES)))
    positions = {name: position for position, name in reversed(list(enumerate(header)))}
    rows = delimited.parse(
        block, positions, num_columns=len(header), delimiter=delimiter, quoted=True, source=file.source, skip=1
    )
    return header, {name: rows.values[name] for name in dict.fromkeys(header)}


def _parquet_sample(file: SourceFile) -> Sample:
    with open_source(file.source) as stream:
        parquet_file = open_parquet(file.source, stream)
        batch = next(read_batches(file.source, parquet_file, None, None), None)
        if batch is None:
            return parquet_file.schema_arrow.names, {
                item.name: pa.nulls(0, item.type) for item in parquet_file.schema_arrow
            }
    return batch.schema.names, dict(zip(batch.schema.names, batch.columns, strict=True))


def _in_plain_strings(values: pa.Array) -> pa.Array:
    """Return the values as pa.string() if they are text of another type, or categories, of pandas or polars."""
    values = plain(values)
    is_other_text = pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    return values.cast(pa.string()) if is_other_text else values


def _type_name(values: pa.Array) -> str:
    values = _in_plain_strings(values)
    if values.type != pa.string():
        return str(values.type)
    known_values = values.drop_null()
    if not len(known_values):
        return "empty"
    is_number = pc.match_substring_regex(known_values, r"^\s*[+-]?\d+(\.\d*)?\s*$")
    if pc.all(is_number).as_py():
        return "numbers"
    is_flag = pc.is_in(pc.utf8_lower(known_values), value_set=pa.array(list(FLAGS)))
    return "true or false" if pc.all(is_flag).as_py() else "text"


def _example(values: pa.Array) -> str:
    known_values = values.drop_null()
    text = str(cell_value(known_values[0])) if len(known_values) else ""
    return text if len(text) <= VALUE_SHOWN else f"{text[:VALUE_SHOWN]}…"


def _looks_like_data(header: Sequence[str]) -> bool:
    problems = Problems(len(header))
    to_ms(pa.array(header, pa.string()), problems)
    return NOT_A_TIME in problems.reasons() and len(problems.reasons()) < len(header)


# Formats with specific file names come before formats that only have an ending.
ORDER = (
    *("spotify-history", "apple-music", "deezer", "tidal", "youtube-takeout"),
    *("yambda", "lastfm-1k", "music4all-onion"),
    *("csv", "parquet", "mpd", "listenbrainz", "sequences"),
)
YAMBDA_COLUMN = "played_ratio_pct"
# Format -> pattern that occurs in the first bytes of its files.
MARKS = {"mpd": rb'"playlists"', "tidal": rb"entry_date", "listenbrainz": rb'"(track_metadata|listened_at)"'}
MAX_FILES_OPENED = 100  # maximum number of files that are opened to detect a format


def guess_import(
    paths: Sequence[str],
    *,
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    earlier_columns: Mapping[str, str] | None = None,
    user: str = "",
    timezone: str = "UTC",
    on_note: Callable[[str], None] = lambda text: None,
) -> ImportConfig:
    """Guess the settings that import files of plays; `format_name` and `columns`, role -> name, override the guesses.

    `earlier_columns` are the columns of an earlier import; they override a guess if the files have them and their
    values fit. Optional roles that it did not use, other than title and artist, are then not guessed, unless a column
    has the role's own name, and song ids are made of artist and title only if that import did so. `user`, if not empty,
    is the user of all plays of files that name no users. `timezone` is the IANA name of the time zone of times without
    one. `on_note` is called with warnings: the column guessed for song ids may hold titles, a column that seems to hold
    an optional role is not used, most times are numbers before 1990.

    Raises `InputError` for files of an unknown format or of playlists, if a required column is not found, and if date
    and time seem to be in two columns.
    """
    selected_format = format_name or guess_format(paths)
    given_columns = dict(columns or {})
    if selected_format in FORMATS and not FORMATS[selected_format].mapped:
        if FORMATS[selected_format].playlists:
            raise InputError(f"{paths[0]} contains playlists, not plays; see `rayrec import --help`")
        return ImportConfig(
            format=selected_format, paths=tuple(paths), columns=given_columns, timezone=timezone, user=user
        )
    inspection, sample = _inspect(selected_format, paths, timezone)
    misfits = {
        role: f"No column is used as {role}: {text}."
        for role, name in (earlier_columns or {}).items()
        if (text := _misfit(role, name, sample))
    }
    earlier_columns_used = {
        role: name
        for role, name in (earlier_columns or {}).items()
        if not name
        or (
            name in {SONG_FROM_NAMES, *sample} - set(given_columns.values())
            and not (role in OPTIONAL_ROLES and name in inspection.lacking)
            and role not in misfits
        )
    }
    given_columns = earlier_columns_used | given_columns
    # An update must not count likes that the import counted as plays. Titles and artists change no play.
    unused_roles = {
        role
        for role in OPTIONAL_ROLES
        if earlier_columns and role not in NAMES_OF_SONG and earlier_columns.get(role) not in sample
    }
    column_of_role = {
        role: name
        for role, name in inspection.mapping.items()
        if role in roles(False) and not (name and role in unused_roles)
    }
    # Song ids made of names would differ from those of the earlier import.
    if earlier_columns is not None and column_of_role.get("song") == SONG_FROM_NAMES:
        del column_of_role["song"]
    column_of_role = {
        role: name for role, name in column_of_role.items() if not name or name not in given_columns.values()
    } | given_columns
    config = ImportConfig(
        format=selected_format,
        paths=tuple(paths),
        columns=column_of_role,
        delimiter=inspection.delimiter or ",",
        timezone=timezone,
        user=user,
    )
    _require_columns(inspection, paths[0], column_of_role if not user else {"user": "", **column_of_role}, sample)
    doubts = {
        role: text for role, text in inspection.doubts.items() if role not in given_columns and column_of_role.get(role)
    }
    if "played_at" in doubts and _find_time_of_day(column_of_role["played_at"], sample):
        raise InputError(f"{paths[0]}: {doubts['played_at'].removesuffix('.')}")
    left_out = {
        role: text
        for role, text in (misfits | inspection.left_out).items()
        if role not in {*given_columns, *unused_roles} and not column_of_role.get(role)
    }
    for text in [*doubts.values(), *left_out.values(), *_early_time_notes(column_of_role, sample)]:
        on_note(f"Warning: {text}")
    return config


def describe_import(config: ImportConfig) -> str:
    """Describe in one line the format, the columns, the time zone and, if one was given, the user."""
    columns = ", ".join(f"{role} = {name}" for role, name in config.columns.items() if name)
    description = (
        f"{config.format}: {columns}; times without a zone are read as {config.timezone}" if columns else config.format
    )
    return f"{description}; all plays belong to user {config.user!r}" if config.user else description


def guess_format(paths: Sequence[str]) -> str:
    """Return the format of files or folders. Raises `InputError` if it is unknown, and for Spotify's account data."""
    for name in ORDER:
        files = _find_matching_files(paths, FORMATS[name].patterns)
        if files and _looks_like(name, files):
            if name == "spotify-history" and all(is_account_data(file.source) for file in files):
                raise InputError(f"{files[0].source}: {ACCOUNT_DATA}")
            return name
    find_files(paths, ("*",))  # raises a clearer error for a missing path or an empty folder
    raise InputError(f"the format of {paths[0]} is unknown; pass --format with one of {', '.join(FORMATS)}")


def _find_matching_files(paths: Sequence[str], patterns: Sequence[str]) -> list[SourceFile]:
    """Return the files of all paths if each named file and a file in each folder match a pattern; else []."""
    try:
        files = find_files(paths, patterns)
    except InputError:
        return []
    names = [posixpath.basename(plain_name(file.source)).lower() for file in files]
    return files if all(any(fnmatch(name, pattern) for pattern in patterns) for name in names) else []


def _looks_like(format_name: str, files: Sequence[SourceFile]) -> bool:
    """False if the content of the files is of another format that uses the same names."""
    if format_name == "yambda":
        with open_source(files[0].source) as stream:
            return YAMBDA_COLUMN in pq.read_schema(stream).names
    if format_name == "youtube-takeout":
        return any(is_watch_history(file.source) for file in files[:MAX_FILES_OPENED])
    if format_name == "listenbrainz":  # other formats also use .json, but not its other endings
        is_json = all(plain_name(file.source).lower().endswith(".json") for file in files)
        return not is_json or any(_has_mark(format_name, file) for file in files[:MAX_FILES_OPENED])
    return format_name not in MARKS or _has_mark(format_name, files[0])


def _has_mark(format_name: str, file: SourceFile) -> bool:
    return re.search(MARKS[format_name], read_head(file.source)) is not None


def _require_columns(
    inspection: Inspection, path: str, column_of_role: Mapping[str, str], sample: Mapping[str, pa.Array]
) -> None:
    """Raise `InputError` if roles lack a column; it names them, the columns of the file, and similar columns."""
    missing_roles = {role: role for role in roles(False) if role not in OPTIONAL_ROLES and role not in column_of_role}
    if missing_roles:
        column_names = [column.name for column in inspection.columns]
        remaining_columns = [name for name in column_names if name not in column_of_role.values()]
        first_line_note = f". {FIRST_LINE_NOTE[:-1]}" if FIRST_LINE_NOTE in inspection.notes else ""
        raise InputError(
            f"{path} has no column that looks like {' or '.join(missing_roles)}; it has {shown_columns(column_names)}; "
            + mapping_advice(missing_roles, remaining_columns, _time_columns(column_of_role, sample))
            + first_line_note
        )
