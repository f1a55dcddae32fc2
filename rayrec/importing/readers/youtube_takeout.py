"""YouTube Music in Google Takeout: watch-history.json, a list of watched videos. Written from public samples.

In other languages the file has other names. The song id is the video id, the only id in the file. Videos watched on
YouTube itself do not count as plays.
"""

import posixpath
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

from rayrec.data import columns
from rayrec.errors import InputError
from rayrec.importing.readers.accounts import Users, account_of, check_accounts
from rayrec.importing.readers.json_rows import Record, RowCollector, plan_json, read_records, text
from rayrec.importing.readers.reader import NO_SONG, Batch, ReadOptions, Unit, plain_name, read_head

NOT_MUSIC = "not a YouTube Music play"
AD = "From Google Ads"  # name of a detail of an entry that is an advertisement
SEARCH = "a search"
NOT_WATCHED = "not an entry of a watch history"
MUSIC = "YouTube Music"
FILE = "watch-history.json"
SEARCHES = ("/results", "/search")  # paths of links to searches
TOPIC = " - Topic"  # end of the name of a channel that YouTube generates for an artist


class YoutubeTakeoutReader:
    """Reads watch histories; other JSON files of Takeout are ignored.

    In languages other than English, titles keep the verb that Takeout puts before them (in English, "Watched").

    The user is the `user` setting if given, else the name of the file's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Return one unit for a watch history, none for another file."""
        return plan_json(source, size, unit_bytes) if is_watch_history(source) else []

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch with the whole file."""
        rows = RowCollector(columns.PLAYS, unit.source)
        user = Users(unit.source, self.options.user, account_of(unit.source)).of(None)
        for block in read_records(unit):
            for record in block.records:
                _add(record, user, rows)
            yield rows.batch(block.covered)


def is_watch_history(source: str) -> bool:
    """True if a file has the English name or, since Takeout translates names, begins like a watch history."""
    if posixpath.basename(plain_name(source)).lower() == FILE:
        return True
    head = read_head(source)
    return b'"header"' in head and (b'"titleUrl"' in head or b'"activityControls"' in head)


def check_watchers(sources: Sequence[str], user: str) -> list[str]:
    """Same as `check_accounts`, for the watch histories only. Raises `InputError` if no file is a watch history."""
    histories = [source for source in sources if is_watch_history(source)]
    if sources and not histories:
        raise InputError(
            f"{sources[0]} is not a JSON watch history; in Google Takeout, choose JSON as the format of the history"
        )
    return check_accounts(histories, user)


def _add(record: Record, user: str, rows: RowCollector) -> None:
    entry = record.value
    if record.reason or not isinstance(entry, dict) or "title" not in entry:
        rows.refuse(record, record.reason or NOT_WATCHED)
        return
    link = text(entry.get("titleUrl")) or ""
    if entry.get("header") != MUSIC and not link.startswith("https://music.youtube.com/"):
        rows.refuse(record, NOT_MUSIC)
        return
    if _is_ad(entry.get("details")):
        rows.refuse(record, NOT_MUSIC)
        return
    if _is_search(link):
        rows.refuse(record, SEARCH)
        return
    song_id = _video_id(link)
    if song_id is None:
        rows.refuse(record, NO_SONG)
        return
    title = (text(entry.get("title")) or "").removeprefix("Watched ")
    row = {
        columns.USER: user,
        columns.SONG_ID: song_id,
        columns.PLAYED_AT: text(entry.get("time")),
        columns.TITLE: None if link and link in title else title,  # a removed video has its link in place of its title
        columns.ARTIST: _channel_name(entry.get("subtitles")),
    }
    rows.add(row, record)


def _video_id(link: str) -> str | None:
    try:
        return next(iter(parse_qs(urlsplit(link).query).get("v", [])), None)
    except ValueError:
        return None


def _is_ad(details: Any) -> bool:
    return isinstance(details, list) and any(isinstance(item, dict) and item.get("name") == AD for item in details)


def _is_search(link: str) -> bool:
    try:
        return urlsplit(link).path in SEARCHES
    except ValueError:
        return False


def _channel_name(subtitles: Any) -> str | None:
    channel = subtitles[0] if isinstance(subtitles, list) and subtitles else None
    name = text(channel.get("name")) if isinstance(channel, dict) else None
    return name.removesuffix(TOPIC) if name else None
