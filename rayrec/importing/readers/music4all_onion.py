"""Music4All-Onion (Moscati et al. 2022): userid_trackid_timestamp.tsv.bz2, plays of Last.fm users.

Columns: user_id, track_id, timestamp. Times have no zone and are in UTC, like those of Last.fm. Written from the
description of the data set.
"""

from collections.abc import Iterator

import pyarrow as pa

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, spell_ids
from rayrec.importing.readers import delimited
from rayrec.importing.readers.reader import (
    NO_SONG,
    NO_USER,
    Batch,
    ReadOptions,
    Unit,
    byte_ranges,
    required_columns,
    to_batch,
)

COLUMNS = USER, SONG, TIME = "user_id", "track_id", "timestamp"


class Music4AllOnionReader:
    """Reads userid_trackid_timestamp.tsv. Only an uncompressed file can be read by many tasks."""

    def __init__(self, options: ReadOptions) -> None:
        pass

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into byte ranges."""
        required_columns(source, delimited.read_header(source, "\t"), COLUMNS)
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 16 MiB."""
        for rows in delimited.read_delimited(unit, "\t", lambda header: required_columns(unit.source, header, COLUMNS)):
            problems = Problems(len(rows.indices))
            data = {
                columns.USER: spell_ids(rows.values[USER], problems, column=USER, reason=NO_USER),
                columns.SONG_ID: spell_ids(rows.values[SONG], problems, column=SONG, reason=NO_SONG),
            }
            data[columns.PLAYED_AT] = pa.array(to_ms(rows.values[TIME], problems, column=TIME))
            yield to_batch(rows, data, problems, unit.source)
