"""Descriptions of songs: a table of titles, artists, albums, release days and markets, by song id.

A csv file with a header line, or a Parquet file. Roles of its columns: song, and any of title, artist, album,
released (YYYY-MM-DD, YYYY-MM or YYYY) and markets (names separated by `|`); in Parquet dates and lists will do.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.errors import InputError
from rayrec.importing.readers.files import COMPRESSED, open_plain

ROLES = {
    "song": columns.SONG_ID,
    "title": columns.TITLE,
    "artist": columns.ARTIST,
    "album": columns.ALBUM,
    "released": columns.RELEASED,
    "markets": columns.MARKETS,
}
MARKET_SEPARATOR = "|"
DAY = r"^\d{4}(-(0[1-9]|1[0-2])(-(0[1-9]|[12]\d|3[01]))?)?$"


def read_descriptions(source: str, names: Mapping[str, str] | None = None, delimiter: str = ",") -> pa.Table:
    """columns.DESCRIPTIONS of a file, local or on a bucket; `names` maps roles to its columns.

    The first row of a song counts. Raises `InputError` for a file that is neither csv nor Parquet, a role or
    column that there is not, and a release day that is none.
    """
    table = _read(source, delimiter)
    found = _columns(source, table.column_names, names or {})
    ids = _text(table.column(found["song"]))
    kept = _first_of_each(ids)
    table, ids = table.take(pa.array(kept)), ids.take(pa.array(kept))
    values = {columns.SONG_ID: ids}
    for role in ("title", "artist", "album"):
        if role in found:
            values[ROLES[role]] = _text(table.column(found[role]))
    if "released" in found:
        values[columns.RELEASED] = _days(source, one_array(table.column(found["released"])))
    if "markets" in found:
        values[columns.MARKETS] = _markets(one_array(table.column(found["markets"])))
    rows = [values.get(field.name, pa.nulls(len(ids), field.type)) for field in columns.DESCRIPTIONS]
    return pa.table(rows, schema=columns.DESCRIPTIONS)


def _read(source: str, delimiter: str) -> pa.Table:
    """All columns of the file, those of csv as strings."""
    with open_plain(source) as stream:
        data = stream.read()
    path = source.removesuffix(COMPRESSED)
    try:
        if path.endswith(".parquet"):
            return pq.read_table(pa.BufferReader(data))
        if path.endswith(".csv"):
            parse = pacsv.ParseOptions(delimiter=delimiter)
            names = pacsv.open_csv(pa.BufferReader(data), parse_options=parse).schema.names
            strings = pacsv.ConvertOptions(column_types={name: pa.string() for name in names})
            return pacsv.read_csv(pa.BufferReader(data), parse_options=parse, convert_options=strings)
    except pa.ArrowInvalid as error:
        raise InputError(f"{source} cannot be read: {str(error).splitlines()[0]}") from error
    raise InputError(f"{source} is neither .csv nor .parquet; give a table of songs as one of them")


def _columns(source: str, there: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Role -> column of the file."""
    unknown = [role for role in names if role not in ROLES]
    if unknown:
        raise InputError(f"cannot map a column to {unknown[0]!r}; expected some of {', '.join(ROLES)}")
    found = {role: names.get(role, role) for role in ROLES if names.get(role, role) in there}
    missing = [role for role in ("song", *names) if role not in found]
    if missing:
        raise InputError(
            f"{source} has no column {names.get(missing[0], missing[0])!r} for {missing[0]}; it has "
            f"{', '.join(there)}; map it with --columns {missing[0]}=NAME"
        )
    if len(found) == 1:
        raise InputError(f"{source} has no metadata column; expected one of {', '.join(list(ROLES)[1:])} in it")
    return found


def _first_of_each(ids: pa.Array) -> np.ndarray:
    """int64: the row of the first of each id, in order; rows without one are left out."""
    codes = np.asarray(pc.fill_null(ids.dictionary_encode().indices, -1))
    found, first = np.unique(codes, return_index=True)
    return np.sort(first[found >= 0])


def _text(values: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Strings without space around them; null where nothing is left."""
    texts = pc.utf8_trim_whitespace(one_array(values.cast(pa.string())))
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _days(source: str, values: pa.Array) -> pa.Array:
    """date32; of a month or a year its first day."""
    if pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
        return values.cast(pa.date32(), safe=False)
    texts = _text(values)
    fits = pc.fill_null(pc.match_substring_regex(texts, DAY), True)
    whole = pc.binary_join_element_wise(texts, "-01-01", "")
    whole = pc.utf8_slice_codeunits(whole, 0, 10)
    try:
        if not pc.all(fits).as_py():
            raise pa.ArrowInvalid(texts.filter(pc.invert(fits))[0].as_py())
        return whole.cast(pa.date32())
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{source} has a release day that is none: {error}; expected YYYY-MM-DD, YYYY-MM or YYYY"
        ) from error


def _markets(values: pa.Array) -> pa.Array:
    if pa.types.is_list(values.type):
        return values.cast(pa.list_(pa.string()))
    return pc.split_pattern(_text(values), MARKET_SEPARATOR).cast(pa.list_(pa.string()))
