"""ListenBrainz: dumps with one listen a line, and what a user can export, a list of listens.

The song is the MusicBrainz recording that the listen was mapped to, else the one the player named,
else ListenBrainz's own id of the recording (msid), else `artist – track`.
"""

from collections.abc import Iterator
from typing import Any

from rayrec.data import columns
from rayrec.data.spelling import name_song
from rayrec.importing.readers.accounts import Users
from rayrec.importing.readers.json_rows import RowCollector, plan_json, read_records, text
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit

NOT_A_LISTEN = "not a listen: no track_metadata"
LISTS = ("payload.listens", "listens")


class ListenBrainzReader:
    """Reads listens: JSON lines, a list, or what the API answers.

    The user is the `user` setting where there is one, else the one that the listen names.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges of lines; a document whole."""
        return plan_json(source, size, unit_bytes, *LISTS)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch per block of 16 MiB. Raises `InputError` where --user would merge several users."""
        rows = RowCollector(columns.PLAYS, unit.source)
        users = Users(unit.source, self.options.user)
        for block in read_records(unit, *LISTS):
            for record in block.records:
                listen = record.value
                if record.reason:
                    rows.refuse(record, record.reason)
                elif not isinstance(listen, dict) or not isinstance(listen.get("track_metadata"), dict):
                    rows.refuse(record, NOT_A_LISTEN)
                else:
                    rows.add(_play(listen, users), record)
            yield rows.batch(block.covered)


def _play(listen: dict[str, Any], users: Users) -> dict[str, Any]:
    track = listen["track_metadata"]
    artist, title = text(track.get("artist_name")), text(track.get("track_name"))
    user = text(listen.get("user_name")) or text(listen.get("user_id"))
    return {
        columns.USER: users.of(user),
        columns.SONG_ID: _recording(listen, track) or name_song(artist, title),
        columns.PLAYED_AT: text(listen.get("listened_at", listen.get("timestamp"))),
        columns.TITLE: title,
        columns.ARTIST: artist,
    }


def _recording(listen: dict[str, Any], track: dict[str, Any]) -> str | None:
    mapped, more = track.get("mbid_mapping"), track.get("additional_info")
    mapped = mapped if isinstance(mapped, dict) else {}
    more = more if isinstance(more, dict) else {}
    return (
        text(mapped.get("recording_mbid"))
        or text(more.get("recording_mbid"))
        or text(listen.get("recording_msid"))
        or text(more.get("recording_msid"))
    )
