"""Last.fm-1k, the public data set of plays of a thousand users (Celma 2010).

Tab-separated, without header and quotes: user, time (ISO 8601 in UTC), artist id, artist name,
track id (MusicBrainz, often empty), track name. A track without an id gets the id `artist – title`.
"""

from collections.abc import Iterator

import pyarrow as pa

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, name_songs, spell_ids, spell_texts
from rayrec.importing.readers import delimited, reader
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit, byte_ranges, read_blocks, require_text, to_batch

COLUMNS = ("user", "played_at", "artist_id", "artist", "song", "title")
COLUMN_POSITIONS = {name: position for position, name in enumerate(COLUMNS) if name != "artist_id"}


class LastfmReader:
    """Reads userid-timestamp-artid-artname-traid-traname.tsv."""

    def __init__(self, options: ReadOptions) -> None:
        pass

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split the file into byte ranges."""
        require_text(source)
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 16 MiB."""
        for block in read_blocks(unit):
            rows = delimited.parse(
                block, COLUMN_POSITIONS, num_columns=len(COLUMNS), delimiter="\t", quoted=False, source=unit.source
            )
            values = rows.values
            problems = Problems(len(rows.indices))
            user_ids = spell_ids(values["user"], problems, column="user", reason=reader.NO_USER)
            artist = spell_texts(values["artist"], problems, column="artist")
            title = spell_texts(values["title"], problems, column="title")
            song_names = name_songs(values["song"], artist, title)
            data = {
                columns.USER: user_ids,
                columns.SONG_ID: spell_ids(song_names, problems, column="song", reason=reader.NO_SONG),
                columns.PLAYED_AT: pa.array(to_ms(values["played_at"], problems)),
                columns.TITLE: title,
                columns.ARTIST: artist,
            }
            yield to_batch(rows, data, problems, unit.source)
