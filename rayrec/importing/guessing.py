"""Guess how files of plays are to be imported: their format by name and first bytes, their columns by name."""

import posixpath
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

import pyarrow.parquet as pq

from rayrec.errors import InputError
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.inspection import Inspection, inspect_files
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.files import HEAD_BYTES, SourceFile, find_files, open_plain, open_source, plain_name
from rayrec.importing.readers.tabular import OPTIONAL_ROLES, roles

# Formats whose files have names of their own come before those that are known by an ending.
ORDER = (
    *("spotify-history", "apple-music", "deezer", "tidal", "youtube-takeout"),
    *("yambda", "lastfm-1k", "music4all-onion"),
    *("csv", "parquet", "mpd", "listenbrainz", "sequences"),
)
YAMBDA_COLUMN = "played_ratio_pct"
MARKS = {"mpd": b'"playlists"', "tidal": b"entry_date"}  # in the first bytes of a file of the format


def guess_import(
    paths: Sequence[str],
    *,
    format_name: str | None = None,
    columns: Mapping[str, str] | None = None,
    timezone: str = "UTC",
) -> ImportConfig:
    """The settings that import files of plays; `format_name` and `columns`, role -> name, override what is guessed.

    `timezone` is the IANA name of the zone of times without one. Raises `InputError` for files of no known format, of
    playlists, and where a column is not to be found.
    """
    chosen = format_name or guess_format(paths)
    given = dict(columns or {})
    if chosen in FORMATS and not FORMATS[chosen].mapped:
        if FORMATS[chosen].playlists:
            raise InputError(f"{paths[0]} holds playlists, not plays; see rayrec import --help")
        return ImportConfig(format=chosen, paths=tuple(paths), columns=given, timezone=timezone)
    inspection = inspect_files(chosen, paths, timezone)
    by_role = {column.role: column.name for column in inspection.columns if column.role in roles(False)}
    by_role = {role: name for role, name in by_role.items() if name not in given.values()} | given
    config = ImportConfig(
        format=chosen,
        paths=tuple(paths),
        columns=by_role,
        delimiter=inspection.delimiter or ",",
        timezone=timezone,
    )
    _require_columns(inspection, paths[0], by_role)
    return config


def describe_import(config: ImportConfig) -> str:
    """Format, columns and time zone in one line."""
    columns = ", ".join(f"{role} = {name}" for role, name in config.columns.items())
    return f"{config.format}: {columns}; times without a zone are {config.timezone}" if columns else config.format


def guess_format(paths: Sequence[str]) -> str:
    """The format of files, or of all files in folders. Raises `InputError` for none."""
    for name in ORDER:
        files = _matching(paths, FORMATS[name].patterns)
        if files and _looks_like(name, files[0]):
            return name
    find_files(paths, ("*",))  # a path that is not there, or an empty folder, is the better message
    raise InputError(f"the format of {paths[0]} is not known; pass --format, one of {', '.join(FORMATS)}")


def _matching(paths: Sequence[str], patterns: Sequence[str]) -> list[SourceFile]:
    """The files of all paths, if every file that is named and at least one of each folder matches a pattern."""
    try:
        files = find_files(paths, patterns)
    except InputError:
        return []
    names = [posixpath.basename(plain_name(file.source)).lower() for file in files]
    return files if all(any(fnmatch(name, pattern) for pattern in patterns) for name in names) else []


def _looks_like(name: str, file: SourceFile) -> bool:
    """False for a file whose content is of another format with such names."""
    if name == "yambda":
        with open_source(file.source) as stream:
            return YAMBDA_COLUMN in pq.read_schema(stream).names
    if name in MARKS:
        with open_plain(file.source) as stream:
            return MARKS[name] in stream.read(HEAD_BYTES)
    return True


def _require_columns(inspection: Inspection, path: str, by_role: Mapping[str, str]) -> None:
    """Raise `InputError` that names all roles without a column, and the columns that there are."""
    missing = [role for role in roles(False) if role not in OPTIONAL_ROLES and role not in by_role]
    if missing:
        mapping = ",".join(f"{role}=NAME" for role in missing)
        names = ", ".join(column.name for column in inspection.columns)
        raise InputError(
            f"{path} has no column that looks like {' or '.join(missing)}; pass --columns {mapping}, with names from: "
            f"{names}"
        )
