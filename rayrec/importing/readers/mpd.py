"""Spotify's Million Playlist Dataset (Chen et al. 2018): slices of a thousand playlists, as JSON."""

from collections.abc import Iterator

from rayrec.data import columns
from rayrec.importing.readers.json_rows import Record, RowCollector, plan_json, read_records, text
from rayrec.importing.readers.reader import NO_PLAYLIST, Batch, ReadOptions, Unit

NOT_A_TRACK = "not a track"
LAST_POSITION = 1 << 31


class MpdReader:
    """Reads mpd.slice.*.json. The line number of a row is the number of its playlist in the slice."""

    def __init__(self, options: ReadOptions) -> None:
        pass

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Return one unit per slice: it is small, and a JSON document cannot be split."""
        return plan_json(source, size, unit_bytes, "playlists")

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch with all playlists of the slice."""
        rows = RowCollector(columns.PLAYLIST_ENTRIES, unit.source)
        for block in read_records(unit, "playlists"):
            for record in block.records:
                _add(record, rows)
            yield rows.batch(block.covered)


def _add(record: Record, rows: RowCollector) -> None:
    playlist = record.value
    tracks = playlist.get("tracks") if isinstance(playlist, dict) else None
    playlist_id = text(playlist.get("pid")) if isinstance(playlist, dict) else None
    if playlist_id is None or not isinstance(tracks, list):
        rows.refuse(record, record.reason or NO_PLAYLIST)
        return
    for index, track in enumerate(tracks):
        if not isinstance(track, dict):
            rows.refuse(record, NOT_A_TRACK, track)
            continue
        position = track.get("pos")
        row = {
            columns.PLAYLIST: playlist_id,
            "position": position if type(position) is int and 0 <= position < LAST_POSITION else index,
            columns.SONG_ID: text(track.get("track_uri")),
            columns.TITLE: text(track.get("track_name")),
            columns.ARTIST: text(track.get("artist_name")),
        }
        rows.add(row, record, track)
