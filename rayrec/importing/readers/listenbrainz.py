"""ListenBrainz dumps: one listen per line, as JSON.

The song is the MusicBrainz recording that the listen was mapped to, else the one the player named,
else ListenBrainz's own id of the recording (msid), else `artist – track`.
"""

import json
from collections.abc import Iterator
from typing import Any

from rayrec.data import columns
from rayrec.importing.readers.json_rows import NOT_JSON, ROWS_PER_BATCH, RowCollector, text
from rayrec.importing.readers.lines import byte_ranges, read_blocks
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit

NOT_A_LISTEN = "not a listen: no track_metadata"


class ListenBrainzReader:
    """Reads listens of a dump, and what a user can export."""

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Byte ranges."""
        return byte_ranges(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Batches of at most 131,072 listens."""
        rows = RowCollector(columns.PLAYS, unit.source)
        done = 0
        for block in read_blocks(unit):
            for index in range(len(block)):
                self._add(block.line(index), block.first + index, rows)
                if len(rows) == ROWS_PER_BATCH:
                    yield rows.batch(block.first + index - done)
                    done = block.first + index
            yield rows.batch(block.first + len(block) - 1 - done)
            done = block.first + len(block) - 1

    def _add(self, line: bytes, number: int, rows: RowCollector) -> None:
        if not line.strip():
            return
        shown = line.decode("utf-8", errors="replace")
        try:
            listen = json.loads(line)
        except ValueError:
            rows.refuse(number, NOT_JSON, shown)
            return
        if not isinstance(listen, dict) or not isinstance(listen.get("track_metadata"), dict):
            rows.refuse(number, NOT_A_LISTEN, shown)
            return
        rows.add(self._play(listen), number, shown)

    def _play(self, listen: dict[str, Any]) -> dict[str, Any]:
        track = listen["track_metadata"]
        artist, title = text(track.get("artist_name")), text(track.get("track_name"))
        played_at = listen.get("listened_at", listen.get("timestamp"))
        return {
            columns.USER: text(listen.get("user_name")) or text(listen.get("user_id")) or self.options.user,
            columns.SONG_ID: _recording(listen, track) or (f"{artist or ''} – {title}" if title else None),
            columns.PLAYED_AT: text(played_at),
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
