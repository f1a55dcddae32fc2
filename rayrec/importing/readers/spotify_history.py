"""Spotify's extended streaming history: JSON files that Spotify sends to a user on request.

`ts` is the moment at which the play ended, in UTC; the time of the play is `ts` less `ms_played`, about its start. With
the end, the pause before a play would hold its length, which a model must not know before the play. Contexts are the
value of `reason_start` (trackdone, clickrow, fwdbtn, backbtn, playbtn, remote, appload ...) and shuffle. If `skipped`
is empty, as in older files, a play counts as skipped if the forward or back button ended it, or if it lasted under 30
seconds, the minimum length that Spotify counts as a stream.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rayrec.data import columns
from rayrec.data.moments import DAY_MS, format_iso, parse_timestamp
from rayrec.errors import InputError
from rayrec.importing.readers.accounts import Users, account_of, check_accounts
from rayrec.importing.readers.json_rows import Record, RowCollector, plan_json, read_records, text
from rayrec.importing.readers.reader import (
    NO_SONG,
    STREAM_MS,
    Batch,
    ReadOptions,
    Unit,
    read_head,
    require_text,
)

NOT_A_PLAY = "not a play"
PODCAST = "podcast or audiobook"
ACCOUNT_DATA = (
    "Spotify's account data has no song IDs and no exact times; ask Spotify for the extended streaming history"
)
SKIP_REASONS = ("fwdbtn", "backbtn")
SHORT_RECORD = re.compile(rb'"endTime"\s*:')
USERNAME = re.compile(rb'"username"\s*:\s*"([^"]+)"')


class SpotifyHistoryReader:
    """Reads Streaming_History_*.json and endsong_*.json. Line numbers are record numbers.

    The user is the `user` setting if given, else the `username` of the record, else the name of the file's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Return one unit per file: files have about ten megabytes, and a JSON document cannot be split."""
        return plan_json(source, size, unit_bytes)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch with the whole file."""
        rows = RowCollector(columns.PLAYS, unit.source)
        users = Users(unit.source, self.options.user, account_of(unit.source))
        for block in read_records(unit):
            for record in block.records:
                _add(record, users, rows)
            yield rows.batch(block.covered)


def check_usernames(sources: Sequence[str], user: str) -> list[str]:
    """Same as `check_accounts`, for files that may name the user; files of Spotify's account data are left out."""
    return check_accounts([source for source in sources if not is_account_data(source)], user, _username)


def is_account_data(source: str) -> bool:
    """True for a StreamingHistory file of Spotify's account data, whose records have no exact times and no song ids."""
    return SHORT_RECORD.search(read_head(source)) is not None


def _username(source: str) -> str | None:
    """Return the first user that a file names, or None."""
    match = USERNAME.search(require_text(source))
    return match[1].decode("utf-8", errors="replace") if match else None


def _add(record: Record, users: Users, rows: RowCollector) -> None:
    play = record.value
    if record.reason or not isinstance(play, dict):
        rows.refuse(record, record.reason or NOT_A_PLAY)
        return
    if "endTime" in play and "ts" not in play:
        rows.refuse(record, ACCOUNT_DATA)
        return
    song_id = text(play.get("spotify_track_uri"))
    if song_id is None:
        is_spoken = any(text(play.get(name)) for name in ("spotify_episode_uri", "episode_name", "audiobook_uri"))
        rows.refuse(record, PODCAST if is_spoken else NO_SONG)
        return
    row = {
        columns.USER: users.of(text(play.get("username"))),
        columns.SONG_ID: song_id,
        columns.PLAYED_AT: _start(play),
        columns.CONTEXTS: _contexts(play),
        columns.SKIPPED: _is_skipped(play),
        columns.TITLE: text(play.get("master_metadata_track_name")),
        columns.ARTIST: text(play.get("master_metadata_album_artist_name")),
    }
    rows.add(row, record)


def _start(play: dict[str, Any]) -> str | None:
    """Return when a play began; `ts` as it is if it is not a time or if it is unknown how long the play lasted."""
    end, ms_played = text(play.get("ts")), play.get("ms_played")
    if end is None or not isinstance(ms_played, (int, float)) or not 0 <= ms_played <= DAY_MS:
        return end
    try:
        return format_iso(parse_timestamp(end) - round(ms_played))
    except InputError:
        return end  # rejected with a reason, like unreadable times of other formats


def _contexts(record: dict[str, Any]) -> list[str]:
    reason = text(record.get("reason_start"))
    names = [] if reason in (None, "unknown") else [str(reason)]
    return [*names, "shuffle"] if record.get("shuffle") is True else names


def _is_skipped(record: dict[str, Any]) -> bool | None:
    skipped, ms_played = record.get("skipped"), record.get("ms_played")
    if isinstance(skipped, bool):
        return skipped
    if record.get("reason_end") in SKIP_REASONS:
        return True
    return ms_played < STREAM_MS if isinstance(ms_played, (int, float)) else None
