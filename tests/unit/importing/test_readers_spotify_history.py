"""Spotify's extended streaming history."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.data import columns
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions
from rayrec.importing.readers.spotify_history import check_usernames


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
    assert (row["played_at"], row["contexts"], row["skipped"]) == (1680344430000 - 204000, ["trackdone"], False)
    assert (row["title"], row["artist"], row["line"]) == ("Dreams", "Fleetwood Mac", 1)


def test_the_pause_before_a_play_does_not_hold_how_long_that_play_lasts(tmp_path: Path) -> None:
    first = record(ts="2023-04-01T10:03:00Z", ms_played=180_000)
    second = record(ts="2023-04-01T10:08:00Z", ms_played=300_000)  # began as the first one ended
    batch = read(tmp_path / "Streaming_History_Audio_2023_0.json", [first, second])
    first_start, second_start = batch.rows.column("played_at").to_pylist()
    assert second_start - first_start == first["ms_played"]


@pytest.mark.parametrize("ms_played", [None, -1, "204000"])
def test_a_play_of_unknown_length_keeps_the_time_of_its_end(tmp_path: Path, ms_played: Any) -> None:
    batch = read(tmp_path / "Streaming_History_Audio_2023_0.json", [record(ms_played=ms_played)])
    assert batch.rows.column("played_at").to_pylist() == [1680344430000]


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
def test_skips_are_derived_where_the_file_does_not_state_them(
    tmp_path: Path, changes: dict[str, Any], skipped: bool | None
) -> None:
    batch = read(tmp_path / "endsong_0.json", [record(**changes)])
    assert batch.rows.column("skipped").to_pylist() == [skipped]


def test_contexts_are_how_the_play_started_and_shuffle(tmp_path: Path) -> None:
    rows = [record(reason_start="clickrow", shuffle=True), record(reason_start="unknown"), record(reason_start=None)]
    assert read(tmp_path / "endsong_0.json", rows).rows.column("contexts").to_pylist() == [
        ["clickrow", "shuffle"],
        [],
        [],
    ]


def test_the_user_is_the_setting_or_in_the_file_or_the_folder(tmp_path: Path) -> None:
    rows = [record(), record(username=None)]
    assert read(tmp_path / "bob" / "endsong_0.json", rows).rows.column("user_id").to_pylist() == ["ann", "bob"]
    plays = read(tmp_path / "bob" / "endsong_0.json", rows, user="carl").rows
    assert plays.column("user_id").to_pylist() == ["carl", "carl"]


def test_a_user_setting_never_merges_two_named_users(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plays of several users, such as ann and bea; --user would merge them"):
        read(tmp_path / "endsong_0.json", [record(), record(username="bea")], user="carl")


def test_a_user_setting_never_merges_the_users_of_two_files(tmp_path: Path) -> None:
    files = [tmp_path / f"endsong_{number}.json" for number in range(3)]
    for file, name in zip(files, ("ann", "ann", "bea"), strict=True):
        read(file, [record(username=name)])
    assert check_users(*files) == check_users(*files[:2], user="carl") == []
    with pytest.raises(
        InputError, match=r"endsong_0.json contains .* 'ann' and .*endsong_2.json of user 'bea'; --user would merge"
    ):
        check_users(*files, user="carl")


@pytest.mark.parametrize("name", ["Spotify Extended Streaming History", "my_spotify_data (1)", "MyData"])
def test_a_folder_that_spotify_names_is_no_user(tmp_path: Path, name: str) -> None:
    batch = read(tmp_path / "bob" / name / "endsong_0.json", [record(username=None)])
    assert batch.rows.column("user_id").to_pylist() == ["bob"]


def check_users(*files: Path, user: str = "") -> list[str]:
    return check_usernames([str(file) for file in files], user)


def test_two_people_with_the_default_folder_are_two_users_and_a_note_says_so(tmp_path: Path) -> None:
    files = [tmp_path / user / "Spotify Extended Streaming History" / "a.json" for user in ("ann", "bob")]
    users = [read(file, [record(username=None)]).rows.column("user_id").to_pylist() for file in files]
    assert users == [["ann"], ["bob"]]
    assert check_users(*files) == [
        "No user in the files: using the folder names as user IDs ('ann', 'bob'). Pass --user NAME to override."
    ]


def test_two_folders_that_would_be_one_user_are_refused(tmp_path: Path) -> None:
    files = [tmp_path / "data" / name / "a.json" for name in ("my_spotify_data (1)", "my_spotify_data (2)")]
    files += [tmp_path / folder / "ann" / "a.json" for folder in ("x", "y")]
    for file in files:
        read(file, [record(username=None)])
    for pair in (files[:2], files[2:]):
        with pytest.raises(InputError, match="would both be imported as user"):
            check_users(*pair)
        assert check_users(*pair, user="me") == []


def test_a_folder_of_files_with_and_without_a_user_name_is_refused(tmp_path: Path) -> None:
    files = [tmp_path / "ann" / name for name in ("endsong_0.json", "Streaming_History_Audio_2022_0.json")]
    read(files[0], [record(username="31abcdefg")])
    read(files[1], [record(username=None)])
    with pytest.raises(InputError, match="files that name the user, such as '31abcdefg', and files that do not"):
        check_users(*files)
    assert check_users(*files, user="ann") == check_users(files[0]) == []


def test_a_file_that_is_no_history_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DamagedInputError, match=r"a\.json cannot be read completely"):
        read(tmp_path / "a.json", "[{")
    with pytest.raises(DamagedInputError, match=r"b\.json is JSON, but has no list of records at the top level;"):
        read(tmp_path / "b.json", json.dumps({"a": 1}, indent=2))


def test_plays_with_one_line_each_are_read_like_a_list(tmp_path: Path) -> None:
    rows = [record(), record(ts="2023-04-01T10:30:30Z")]
    as_list = read(tmp_path / "a.json", rows)
    path = tmp_path / "b.json"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    reader = FORMATS["spotify-history"].make(ReadOptions())
    (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
    (as_lines,) = reader.read(unit)
    assert as_lines.rows.drop(["source"]) == as_list.rows.drop(["source"])
