"""YouTube Music out of Google Takeout: watch-history.json, a list of what was watched. Written from public samples.

The song is the video's id, since the file has no other. What was watched on YouTube itself is no play of a song.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rayrec.data import columns
from rayrec.importing.readers.accounts import Users, account_of
from rayrec.importing.readers.json_rows import Record, RowCollector, plan_json, read_records, text
from rayrec.importing.readers.reader import NO_SONG, Batch, ReadOptions, Unit

NOT_MUSIC = "not of YouTube Music"
NOT_WATCHED = "not an entry of a watch history"
MUSIC = "YouTube Music"
TOPIC = " - Topic"  # ends the name of the channel that YouTube makes of an artist


class YoutubeTakeoutReader:
    """Reads watch-history.json. In a language other than English, titles keep the verb that Takeout adds.

    The user is the `user` setting where there is one, else the file's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """One unit per file."""
        return plan_json(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """One batch with the whole file."""
        rows = RowCollector(columns.PLAYS, unit.source)
        user = Users(unit.source, self.options.user, account_of(unit.source)).of(None)
        for block in read_records(unit):
            for record in block.records:
                _add(record, user, rows)
            yield rows.batch(block.covered)


def _add(record: Record, user: str, rows: RowCollector) -> None:
    entry = record.value
    if record.reason or not isinstance(entry, dict) or "title" not in entry:
        rows.refuse(record, record.reason or NOT_WATCHED)
        return
    link = text(entry.get("titleUrl")) or ""
    if entry.get("header") != MUSIC and not link.startswith("https://music.youtube.com/"):
        rows.refuse(record, NOT_MUSIC)
        return
    song = _video(link)
    if song is None:
        rows.refuse(record, NO_SONG)
        return
    row = {
        columns.USER: user,
        columns.SONG_ID: song,
        columns.PLAYED_AT: text(entry.get("time")),
        columns.TITLE: (text(entry.get("title")) or "").removeprefix("Watched "),
        columns.ARTIST: _channel(entry.get("subtitles")),
    }
    rows.add(row, record)


def _video(link: str) -> str | None:
    try:
        return next(iter(parse_qs(urlsplit(link).query).get("v", [])), None)
    except ValueError:
        return None


def _channel(subtitles: Any) -> str | None:
    first = subtitles[0] if isinstance(subtitles, list) and subtitles else None
    name = text(first.get("name")) if isinstance(first, dict) else None
    return name.removesuffix(TOPIC) if name else None
