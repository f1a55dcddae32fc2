"""TIDAL: streaming.csv, which TIDAL sends to a user on request. Written from public samples.

Columns: artist_name, track_title, entry_date (day/month/year hour:minute, in the zone of the column time_zone, else
UTC), stream_duration_ms, product_type, time_zone. The file has no song ids; the id is `artist – title`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.moments import local_to_ms
from rayrec.data.spelling import Problems, name_songs, spell_ids, spell_texts
from rayrec.importing.readers.accounts import AccountCsvReader
from rayrec.importing.readers.delimited import DelimitedRows, flags_below, same
from rayrec.importing.readers.reader import NO_SONG, STREAM_MS, Batch, required_columns, to_batch

ARTIST, TITLE, TIME, ZONE = "artist_name", "track_title", "entry_date", "time_zone"
DURATION, TYPE = "stream_duration_ms", "product_type"
TIME_FORM = "%d/%m/%Y %H:%M"
NOT_A_TRACK = "not a track"


class TidalReader(AccountCsvReader):
    """Reads streaming.csv. A play of under 30 seconds counts as skipped."""

    def find(self, source: str, header: list[str]) -> dict[str, int]:
        """See `AccountCsvReader`."""
        return required_columns(source, header, (ARTIST, TITLE, TIME), (ZONE, DURATION, TYPE))

    def batch(self, rows: DelimitedRows, user: str, source: str) -> Batch:
        """See `AccountCsvReader`."""
        values, count = rows.values, len(rows.indices)
        problems = Problems(count)
        if TYPE in values:
            problems.mark(~same(values[TYPE], "TRACK"), NOT_A_TRACK)
        artist = spell_texts(values[ARTIST], problems, column=ARTIST)
        title = spell_texts(values[TITLE], problems, column=TITLE)
        song_names = name_songs(pa.nulls(count, pa.string()), artist, title)
        zones = values.get(ZONE, pa.nulls(count, pa.string()))
        zones = pc.if_else(pc.is_in(zones, value_set=pa.array(["null", "NULL", ""])), None, zones)
        data = {
            columns.USER: pa.array(np.full(count, user, dtype=object), pa.string()),
            columns.SONG_ID: spell_ids(song_names, problems, column=TITLE, reason=NO_SONG),
            columns.PLAYED_AT: pa.array(local_to_ms(values[TIME], zones, problems, form=TIME_FORM)),
            columns.TITLE: title,
            columns.ARTIST: artist,
        }
        if DURATION in values:
            data[columns.SKIPPED] = flags_below(values[DURATION], STREAM_MS)
        return to_batch(rows, data, problems, source)
