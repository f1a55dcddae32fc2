"""Spotify's extended streaming history, the JSON that a person can ask Spotify for.

`ts` is the moment at which the play ended, in UTC; it is taken as the time of the play. Contexts
are `reason_start` (trackdone, clickrow, fwdbtn, backbtn, playbtn, remote, appload ...) and shuffle.
Where `skipped` is not filled in, as in older files, a play counts as skipped if a forward or back
button ended it or if it lasted under 30 seconds, from where on Spotify counts a stream.
"""

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rayrec.data import columns
from rayrec.importing.readers.json_rows import NOT_JSON, RowCollector, load_json, text
from rayrec.importing.readers.reader import NO_SONG, Batch, ReadOptions, Unit

NOT_A_HISTORY = "not a history: expected a list of plays"
NOT_A_PLAY = "not a play"
PODCAST = "podcast or audiobook"
STREAM_MS = 30_000
SKIP_REASONS = ("fwdbtn", "backbtn")


class SpotifyHistoryReader:
    """Reads Streaming_History_*.json and endsong_*.json. The line is the number of the record.

    The user is `username` where the file has it, else the `user` setting, else the file's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """One unit per file: Spotify cuts them at some ten megabytes, and their JSON cannot be cut."""
        return [Unit(source=source)]

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch with the whole file."""
        rows = RowCollector(columns.PLAYS, unit.source)
        user = self.options.user or _folder(unit.source)
        records: list[Any] = []
        try:
            content = load_json(unit.source)
        except ValueError as error:
            rows.refuse(1, NOT_JSON, str(error))
        else:
            if isinstance(content, list):
                records = content
            else:
                rows.refuse(1, NOT_A_HISTORY, unit.source)
        for number, record in enumerate(records, start=1):
            _add(record, number, user, rows)
        yield rows.batch(len(records))


def _add(record: Any, number: int, user: str, rows: RowCollector) -> None:
    if not isinstance(record, dict):
        rows.refuse(number, NOT_A_PLAY, record)
        return
    song = text(record.get("spotify_track_uri"))
    if song is None:
        spoken = any(text(record.get(name)) for name in ("spotify_episode_uri", "episode_name", "audiobook_uri"))
        rows.refuse(number, PODCAST if spoken else NO_SONG, record)
        return
    row = {
        columns.USER: text(record.get("username")) or user,
        columns.SONG_ID: song,
        columns.PLAYED_AT: text(record.get("ts")),
        columns.CONTEXTS: _contexts(record),
        columns.SKIPPED: _skipped(record),
        columns.TITLE: text(record.get("master_metadata_track_name")),
        columns.ARTIST: text(record.get("master_metadata_album_artist_name")),
    }
    rows.add(row, number, record)


def _contexts(record: dict[str, Any]) -> list[str]:
    reason = text(record.get("reason_start"))
    names = [] if reason in (None, "unknown") else [str(reason)]
    return [*names, "shuffle"] if record.get("shuffle") is True else names


def _skipped(record: dict[str, Any]) -> bool | None:
    skipped, played = record.get("skipped"), record.get("ms_played")
    if isinstance(skipped, bool):
        return skipped
    if record.get("reason_end") in SKIP_REASONS:
        return True
    return played < STREAM_MS if isinstance(played, (int, float)) else None


def _folder(source: str) -> str:
    if "://" in source:
        return posixpath.basename(posixpath.dirname(source))
    return Path(source).expanduser().resolve().parent.name
