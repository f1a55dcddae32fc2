"""Music4All-Onion (Moscati et al. 2022): userid_trackid_timestamp.tsv.bz2, listens of Last.fm users.

Columns: user_id, track_id, timestamp. Times are written without a zone and are UTC, as those of Last.fm. Written from
its description.
"""

from collections.abc import Iterator

import pyarrow as pa

from rayrec.data import columns
from rayrec.data.moments import in_utc, to_ms
from rayrec.data.spelling import Problems, spell_ids, valid_text
from rayrec.importing.readers import delimited
from rayrec.importing.readers.reader import NO_SONG, NO_USER, Batch, ReadOptions, Unit
from rayrec.importing.readers.tabular import CsvReader, find_columns

COLUMNS = ReadOptions(columns={"user": "user_id", "song": "track_id", "played_at": "timestamp"}, delimiter="\t")


class Music4AllOnionReader:
    """Reads userid_trackid_timestamp.tsv. Unpacked, it is read by many tasks."""

    def __init__(self, options: ReadOptions) -> None:
        pass

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges."""
        return CsvReader(COLUMNS).plan(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch per block of 16 MiB."""
        for rows in delimited.read_rows(unit, "\t", lambda header: find_columns(unit.source, header, COLUMNS)):
            problems = Problems(len(rows.indices))
            data = {
                columns.USER: spell_ids(rows.values["user"], problems, column="user_id", reason=NO_USER),
                columns.SONG_ID: spell_ids(rows.values["song"], problems, column="track_id", reason=NO_SONG),
            }
            times = in_utc(valid_text(rows.values["played_at"], problems))
            data[columns.PLAYED_AT] = pa.array(to_ms(times, problems, column="timestamp"))
            yield delimited.to_batch(rows, data, problems, unit.source)
