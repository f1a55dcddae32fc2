"""Apple Music: Apple Music Play Activity.csv of Apple Media Services. Written from public descriptions and samples.

The file has one event per row, in over a hundred columns that change from year to year; only plays are imported. It has
no song ids, and exports since about 2021 rarely name the artist: the song id is `artist – title` if the row names an
artist, else `album – title`.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.moments import to_ms
from rayrec.data.spelling import Problems, name_songs, spell_ids, spell_texts, valid_text
from rayrec.importing.readers.accounts import AccountCsvReader
from rayrec.importing.readers.delimited import DelimitedRows, flags_below, same
from rayrec.importing.readers.reader import NO_SONG, STREAM_MS, Batch, required_columns, to_batch

# Column names of current exports, then those of older ones; the first column with a value in a row is used.
TITLES = ("Song Name", "Content Name")
ARTISTS = ("Artist Name", "Container Artist Name")
ALBUMS = ("Album Name", "Container Album Name")
TIMES = ("Event Start Timestamp", "Event End Timestamp")
DURATION, REASON, EVENT = "Play Duration Milliseconds", "End Reason Type", "Event Type"
ITEM, MEDIA = "Item Type", "Media Type"
SHOWS, VIDEO = "ORIGINAL_CONTENT_SHOWS", "VIDEO"  # values of these two columns for rows that are not songs
FAILED = "FAILED_TO_LOAD"
# End reasons of interrupted plays, which the user may continue or not: none of them means that the song was skipped.
PARTS = ("PLAYBACK_MANUALLY_PAUSED", "PLAYBACK_SUSPENDED", "SCRUB_BEGIN", "SCRUB_END", "EXITED_APPLICATION")
PLAYS = ("PLAY_END", "PLAY", None)  # event types of plays; PLAY_START would count a play twice
OTHER_EVENT = "event is not a play"
NOT_A_SONG = "video or show"


class AppleMusicReader(AccountCsvReader):
    """Reads Apple Music Play Activity.csv. A play counts as skipped if a skip ended it or it lasted under 30 seconds.

    A play that ended because the user paused it, moved within the song or left the application is never skipped.
    """

    def find(self, source: str, header: list[str]) -> dict[str, int]:
        """See `AccountCsvReader`."""
        title = next((name for name in TITLES if name in header), TITLES[0])
        time = next((name for name in TIMES if name in header), TIMES[0])
        optional = (*TITLES, *ARTISTS, *ALBUMS, *TIMES, DURATION, REASON, EVENT, ITEM, MEDIA)
        return required_columns(source, header, (title, time), optional)

    def batch(self, rows: DelimitedRows, user: str, source: str) -> Batch:
        """See `AccountCsvReader`."""
        values, count = rows.values, len(rows.indices)
        problems = Problems(count)

        def first_texts(names: tuple[str, ...]) -> pa.Array:
            texts = [spell_texts(values[name], problems, column=name) for name in names if name in values]
            return pc.coalesce(*texts, pa.nulls(count, pa.string()))

        if EVENT in values:
            event_masks = [same(values[EVENT], event) for event in PLAYS]
            problems.mark(~np.logical_or.reduce(event_masks), OTHER_EVENT)
        for name, value in ((ITEM, SHOWS), (ITEM, VIDEO), (MEDIA, VIDEO)):
            if name in values:
                problems.mark(same(values[name], value), NOT_A_SONG)
        if REASON in values:
            problems.mark(same(values[REASON], FAILED), OTHER_EVENT)
        title, artist = first_texts(TITLES), first_texts(ARTISTS)
        song_names = name_songs(pa.nulls(count, pa.string()), pc.coalesce(artist, first_texts(ALBUMS)), title)
        times = [valid_text(values[name], problems) for name in TIMES if name in values]
        data = {
            columns.USER: pa.array(np.full(count, user, dtype=object), pa.string()),
            columns.SONG_ID: spell_ids(song_names, problems, column=TITLES[0], reason=NO_SONG),
            columns.PLAYED_AT: pa.array(to_ms(pc.coalesce(*times), problems, column=TIMES[0])),
            columns.TITLE: title,
            columns.ARTIST: artist,
        }
        is_skipped = flags_below(values[DURATION], STREAM_MS) if DURATION in values else pa.nulls(count, pa.bool_())
        if REASON in values:
            is_skip_reason = pc.fill_null(pc.match_substring(values[REASON], "SKIPPED"), False)
            is_part = pc.is_in(values[REASON], value_set=pa.array(PARTS))
            is_skipped = pc.if_else(is_part, False, pc.if_else(is_skip_reason, True, is_skipped))
        data[columns.SKIPPED] = is_skipped
        return to_batch(rows, data, problems, source)
