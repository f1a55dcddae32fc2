"""Spotify's extended streaming history."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.data import columns
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions


def record(**changes: Any) -> dict[str, Any]:
    """A play as Spotify writes it."""
    return {
        "ts": "2023-04-01T10:20:30Z",
        "username": "ann",
        "platform": "ios",
        "ms_played": 204000,
        "conn_country": "BE",
        "master_metadata_track_name": "Dreams",
        "master_metadata_album_artist_name": "Fleetwood Mac",
        "master_metadata_album_album_name": "Rumours",
        "spotify_track_uri": "spotify:track:0ofHAoxe9vBkTCp2UQIavz",
        "episode_name": None,
        "episode_show_name": None,
        "spotify_episode_uri": None,
        "reason_start": "trackdone",
        "reason_end": "trackdone",
        "shuffle": False,
        "skipped": False,
        "offline": False,
        "offline_timestamp": None,
        "incognito_mode": False,
        **changes,
    }


def read(path: Path, content: Any, user: str = "") -> Batch:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    reader = FORMATS["spotify-history"].make(ReadOptions(user=user))
    (unit,) = reader.plan(str(path), path.stat().st_size, 10)
    (batch,) = reader.read(unit)
    return batch


def test_a_play_keeps_its_song_time_context_and_names(tmp_path: Path) -> None:
    batch = read(tmp_path / "Streaming_History_Audio_2023_0.json", [record()])
    assert batch.rows.schema == columns.PLAYS
    row = batch.rows.to_pylist()[0]
    assert (row["user_id"], row["song_id"]) == ("ann", "spotify:track:0ofHAoxe9vBkTCp2UQIavz")
    assert (row["played_at"], row["contexts"], row["skipped"]) == (1680344430000, ["trackdone"], False)
    assert (row["title"], row["artist"], row["line"]) == ("Dreams", "Fleetwood Mac", 1)


def test_podcasts_and_rows_without_song_or_time_are_rejected(tmp_path: Path) -> None:
    rows = [
        record(spotify_track_uri=None, spotify_episode_uri="spotify:episode:1", episode_name="Talk"),
        record(spotify_track_uri=None),
        record(ts=None),
        "junk",
        record(),
    ]
    batch = read(tmp_path / "endsong_0.json", rows)
    assert batch.rows.column("line").to_pylist() == [5]
    assert [(row["line"], row["reason"]) for row in batch.rejected.to_pylist()] == [
        (1, "podcast or audiobook"),
        (2, "no song"),
        (3, "no time"),
        (4, "not a play"),
    ]
    assert batch.read == 5


@pytest.mark.parametrize(
    ("changes", "skipped"),
    [
        ({"skipped": True}, True),
        ({"skipped": None, "reason_end": "fwdbtn"}, True),
        ({"skipped": None, "ms_played": 29_999}, True),
        ({"skipped": None}, False),
        ({"skipped": None, "ms_played": None}, None),
    ],
)
def test_skips_are_told_where_the_file_is_silent(tmp_path: Path, changes: dict[str, Any], skipped: bool | None) -> None:
    batch = read(tmp_path / "endsong_0.json", [record(**changes)])
    assert batch.rows.column("skipped").to_pylist() == [skipped]


def test_contexts_are_how_the_play_started_and_shuffle(tmp_path: Path) -> None:
    rows = [record(reason_start="clickrow", shuffle=True), record(reason_start="unknown"), record(reason_start=None)]
    assert read(tmp_path / "endsong_0.json", rows).rows.column("contexts").to_pylist() == [
        ["clickrow", "shuffle"],
        [],
        [],
    ]


def test_the_user_is_in_the_file_or_the_setting_or_the_folder(tmp_path: Path) -> None:
    rows = [record(), record(username=None)]
    assert read(tmp_path / "bob" / "endsong_0.json", rows).rows.column("user_id").to_pylist() == ["ann", "bob"]
    named = read(tmp_path / "bob" / "endsong_0.json", rows, user="carl").rows
    assert named.column("user_id").to_pylist() == ["ann", "carl"]


def test_a_file_that_is_no_history_is_one_bad_row(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", "[{").rejected.column("reason").to_pylist() == ["not JSON"]
    assert "not a history" in read(tmp_path / "b.json", {"a": 1}).rejected.column("reason").to_pylist()[0]
