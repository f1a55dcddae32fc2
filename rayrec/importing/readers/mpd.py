"""Spotify's Million Playlist Dataset (Chen et al. 2018): slices of a thousand playlists, as JSON."""

from collections.abc import Iterator
from typing import Any

from rayrec.data import columns
from rayrec.importing.readers.json_rows import NOT_JSON, RowCollector, load_json, text
from rayrec.importing.readers.reader import NO_PLAYLIST, Batch, ReadOptions, Unit

NOT_A_SLICE = 'not a slice: expected {"playlists": [...]}'
NOT_A_TRACK = "not a track"
LAST_POSITION = 1 << 31


class MpdReader:
    """Reads mpd.slice.*.json. The line of a row is the number of its playlist in the slice."""

    def __init__(self, options: ReadOptions) -> None:
        pass

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """One unit per file: a slice is small, and its JSON cannot be cut."""
        return [Unit(source=source)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch with all playlists of the slice."""
        rows = RowCollector(columns.PLAYLIST_ENTRIES, unit.source)
        playlists: list[Any] = []
        try:
            content = load_json(unit.source)
        except ValueError as error:
            rows.refuse(1, NOT_JSON, str(error))
        else:
            found = content.get("playlists") if isinstance(content, dict) else None
            if isinstance(found, list):
                playlists = found
            else:
                rows.refuse(1, NOT_A_SLICE, unit.source)
        for number, playlist in enumerate(playlists, start=1):
            _add(playlist, number, rows)
        yield rows.batch(len(playlists))


def _add(playlist: Any, number: int, rows: RowCollector) -> None:
    tracks = playlist.get("tracks") if isinstance(playlist, dict) else None
    name = text(playlist.get("pid")) if isinstance(playlist, dict) else None
    if name is None or not isinstance(tracks, list):
        rows.refuse(number, NO_PLAYLIST, playlist)
        return
    for place, track in enumerate(tracks):
        if not isinstance(track, dict):
            rows.refuse(number, NOT_A_TRACK, track)
            continue
        position = track.get("pos")
        row = {
            columns.PLAYLIST: name,
            "position": position if isinstance(position, int) and 0 <= position < LAST_POSITION else place,
            columns.SONG_ID: text(track.get("track_uri")),
            columns.TITLE: text(track.get("track_name")),
            columns.ARTIST: text(track.get("artist_name")),
        }
        rows.add(row, number, track)
