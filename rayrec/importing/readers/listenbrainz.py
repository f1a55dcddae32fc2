"""ListenBrainz: dumps with one listen per line, and exports of a user: a list of listens, or a folder.

The folder contains user.json, feedback.jsonl, pinned_recording.jsonl and listens/YEAR/MONTH.jsonl, whose listens name
no user. The song id is the MusicBrainz recording that ListenBrainz mapped the listen to, else the recording that the
player named, else ListenBrainz's own id of the recording (msid), else `artist – track`.
"""

import posixpath
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rayrec.data import columns
from rayrec.data.spelling import name_song
from rayrec.importing.readers.accounts import Users, account_folder, account_of, check_accounts
from rayrec.importing.readers.json_rows import RowCollector, load_json, plan_json, read_records, text
from rayrec.importing.readers.reader import Batch, ReadOptions, Unit, is_file, path_below, plain_name, require_text

NOT_A_LISTEN = "not a listen: no track_metadata"
NOT_A_LISTEN_FILE = "not a listen: user, feedback or pinned recording"
LISTS = ("payload.listens", "listens")
USER_FILE = "user.json"
FILES_WITHOUT_LISTENS = (USER_FILE, "feedback.jsonl", "pinned_recording.jsonl")
USER_NAME = re.compile(rb'"user_name"\s*:\s*(?:"([^"]*)")?')


class ListenBrainzReader:
    """Reads listens from JSON lines, a JSON list, or a response of the API.

    The user is the `user` setting if given, else the user that the listen names. If the listens of a file have no
    user_name, it is the user in the export's user.json, else the name of the export's folder.
    """

    def __init__(self, options: ReadOptions) -> None:
        self.options = options

    def plan(self, source: str, size: int, unit_bytes: int) -> list[Unit]:
        """Split a file of JSON lines into byte ranges; a JSON document is one unit."""
        return plan_json(source, size, unit_bytes, *LISTS)

    def read(self, unit: Unit) -> Iterator[Batch]:
        """Yield one batch per block of 16 MiB. Raises `InputError` if --user would merge several users."""
        rows = RowCollector(columns.PLAYS, unit.source)
        users = Users(unit.source, self.options.user, "" if self.options.user else _default_user(unit.source))
        no_listen_reason = NOT_A_LISTEN_FILE if _has_no_listens(unit.source) else NOT_A_LISTEN
        for block in read_records(unit, *LISTS):
            for record in block.records:
                listen = record.value
                if record.reason:
                    rows.refuse(record, record.reason)
                elif not isinstance(listen, dict) or not isinstance(listen.get("track_metadata"), dict):
                    rows.refuse(record, no_listen_reason)
                else:
                    rows.add(_to_row(listen, users), record)
            yield rows.batch(block.covered)


def check_listeners(sources: Sequence[str], user: str) -> list[str]:
    """Same as `check_accounts`, for files that may name the user; files without listens are left out."""
    return check_accounts([source for source in sources if not _has_no_listens(source)], user, _username)


def _has_no_listens(source: str) -> bool:
    return posixpath.basename(plain_name(source)).lower() in FILES_WITHOUT_LISTENS


def _default_user(source: str) -> str:
    """Return the user of listens that name none; empty for a file whose listens have a user_name."""
    return "" if USER_NAME.search(require_text(source)) else _user_of_export(source) or account_of(source)


def _username(source: str) -> str | None:
    """Return the first user that a file names, else the user that its export names, or None."""
    match = USER_NAME.search(require_text(source))
    return (match[1] or b"").decode("utf-8", errors="replace") if match else _user_of_export(source)


def _user_of_export(source: str) -> str | None:
    """Return the user in the user.json of the export that a file belongs to, or None."""
    path = path_below(account_folder(source), USER_FILE)
    content = load_json(path) if is_file(path) else None
    return text(content.get("username")) if isinstance(content, dict) else None


def _to_row(listen: dict[str, Any], users: Users) -> dict[str, Any]:
    track = listen["track_metadata"]
    artist, title = text(track.get("artist_name")), text(track.get("track_name"))
    user = text(listen.get("user_name")) or text(listen.get("user_id"))
    return {
        columns.USER: users.of(user),
        columns.SONG_ID: _recording_id(listen, track) or name_song(artist, title),
        columns.PLAYED_AT: text(listen.get("listened_at", listen.get("timestamp"))),
        columns.TITLE: title,
        columns.ARTIST: artist,
    }


def _recording_id(listen: dict[str, Any], track: dict[str, Any]) -> str | None:
    mapping, additional_info = track.get("mbid_mapping"), track.get("additional_info")
    mapping = mapping if isinstance(mapping, dict) else {}
    additional_info = additional_info if isinstance(additional_info, dict) else {}
    return (
        text(mapping.get("recording_mbid"))
        or text(additional_info.get("recording_mbid"))
        or text(listen.get("recording_msid"))
        or text(track.get("recording_msid"))
        or text(additional_info.get("recording_msid"))
    )
