"""Format and columns are guessed from file names and first rows; given settings come first; nothing is imported."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.errors import InputError
from rayrec.importing.import_plan import ImportConfig, plan_import
from rayrec.importing.inspection import (
    ORDER,
    describe_import,
    guess_format,
    guess_import,
    guess_roles,
    inspect_files,
    time_form,
)
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.tabular import OPTIONAL_ROLES

START = 1711929600
CATEGORIES = pa.dictionary(pa.int32(), pa.string())
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), CATEGORIES]  # of csv, pandas, polars and pandas


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_columns_delimiter_times_and_the_command_are_guessed_of_a_csv(tmp_path: Path) -> None:
    rows = [f"u{row};t{row};Artist;Title {row};{START + row}" for row in range(20)] + ["u1;;A;;5"]
    path = write(tmp_path / "my plays.csv", "\n".join(["userid;track_id;artist_name;track_name;ts", *rows]) + "\n")
    inspection = inspect_files("csv", [path])
    assert {column.role: column.name for column in inspection.columns} == {
        "user": "userid",
        "song": "track_id",
        "artist": "artist_name",
        "title": "track_name",
        "played_at": "ts",
    }
    assert (inspection.delimiter, inspection.time, inspection.rows, inspection.rejected) == (
        ";",
        "unix seconds",
        21,
        {"no song": 1},
    )
    assert inspection.examples == {"no song": f"{path}, line 22: u1;;A;;5"}
    columns = "user=userid,song=track_id,played_at=ts,title=track_name,artist=artist_name"
    assert shlex.split(inspection.command) == [
        *("rayrec", "import", "csv", path, "--columns", columns, "--delimiter", ";"),
    ]
    mapping = dict(pair.split("=") for pair in columns.split(","))
    plan_import(ImportConfig(format="csv", paths=(path,), columns=mapping, delimiter=";"))  # the command works


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_of_quoted_column_names_is_guessed(tmp_path: Path, delimiter: str) -> None:
    rows = [["user", "song", "played_at"], ["a", "one, two; three", str(START)]]
    text = "".join(delimiter.join(f'"{value}"' for value in row) + "\n" for row in rows)
    config = guess_import([write(tmp_path / "p.csv", text)])
    assert (config.delimiter, config.columns) == (delimiter, {name: name for name in rows[0]})
    assert inspect_files("csv", list(config.paths)).rejected == {}


@pytest.mark.parametrize(
    ("name", "value", "zone"),
    [
        ("end", "9999-12-31T23:59:59", "Asia/Tokyo"),
        ("start", "0001-01-01T00:00:00", "America/New_York"),
        ("time", "10000-01-01T00:00:00", None),
    ],
)
def test_a_date_that_python_cannot_hold_does_not_stop_an_inspection(
    tmp_path: Path, name: str, value: str, zone: str | None
) -> None:
    seconds = np.datetime64(value, "s").astype(np.int64)
    dates = pa.array([seconds], pa.int64()).cast(pa.timestamp("s", zone))
    plays = pa.table({"user": ["a"], "song": ["b"], "ts": ["2024-01-01"], name: dates})
    path = tmp_path / "p.parquet"
    pq.write_table(plays.cast(plays.schema.set(3, pa.field(name, pa.timestamp("ms", zone)))), path)
    column = inspect_files("parquet", [str(path)]).columns[3]
    assert column.example == f"<{column.type}>"
    assert guess_import([str(path)]).columns["played_at"] == "ts"


def test_types_of_a_parquet_file_are_shown(tmp_path: Path) -> None:
    times = pa.array([START * 1000] * 2, pa.timestamp("ms", "UTC"))
    pq.write_table(pa.table({"uid": [1, 2], "item_id": [7, 8], "timestamp": times}), tmp_path / "p.parquet")
    inspection = inspect_files("parquet", [str(tmp_path)])
    assert [(column.name, column.role, column.type) for column in inspection.columns] == [
        ("uid", "user", "int64"),
        ("item_id", "song", "int64"),
        ("timestamp", "played_at", "timestamp[ms, tz=UTC]"),
    ]
    assert (inspection.time, inspection.rows, inspection.rejected) == ("timestamps in UTC", 2, {})


def test_a_column_of_times_is_found_by_its_values_and_a_missing_column_is_reported(tmp_path: Path) -> None:
    rows = "".join(f"{row},{START + row},x{row}\n" for row in range(10))
    inspection = inspect_files("csv", [write(tmp_path / "p.csv", "user,when it was,song\n" + rows)])
    assert {column.name: column.role for column in inspection.columns}["when it was"] == "played_at"
    inspection = inspect_files("csv", [write(tmp_path / "q.csv", "name of who,song,ts\n" + "a,b,1711929600\n")])
    assert inspection.missing == ["user"]
    assert inspection.rows == 0
    assert "--columns user=NAME,played_at=ts" in inspection.command
    assert inspection.notes == [
        "No column looks like user: map it with --columns user=NAME, or if all plays "
        "belong to one person, pass --user NAME instead of a user column."
    ]


def test_playlists_are_distinguished_from_plays(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "playlist_id,pos,track_uri\np,0,a\np,x,b\n")
    inspection = inspect_files("csv", [path])
    assert (inspection.kind, inspection.rejected) == ("playlists", {"position is not a whole number": 1})
    assert "--kind playlists --columns playlist=playlist_id,position=pos,song=track_uri" in inspection.command


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (["1711929600", "1711929601.5"], "unix seconds"),
        (["1711929600000"], "unix milliseconds"),
        (["1711929600000000"], "unix microseconds, which are rejected"),
        (["2024-04-01T00:00:00Z"], "ISO 8601 with a zone"),
        (["2024-04-01 00:00:00"], "ISO 8601 without a zone, read as Asia/Tokyo"),
        (
            ["2024-04-01 00:00:00", "2024-04-01T00:00:00Z"],
            "ISO 8601 without a zone in 1 of 2 values, read as Asia/Tokyo",
        ),
        (["2024-04-01"], "dates without times, read as midnight in Asia/Tokyo"),
        (["01 Apr 2024"], "dates without times, read as midnight in Asia/Tokyo"),
        (["01 Apr 2024 23:05"], "day, month name and year without a zone, read as Asia/Tokyo"),
        (
            ["soon", "2024-04-01T00:00:00Z"],
            "time is neither unix seconds, unix milliseconds nor ISO 8601 in 1 of 2 values",
        ),
    ],
)
def test_the_form_of_times_is_described(values: list[str], form: str) -> None:
    assert time_form(pa.array(values), "Asia/Tokyo") == form


def test_the_time_zone_is_shown_and_in_the_command(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", "user,song,played_at\na,b,2026-01-01 10:00:00\n")
    assert inspect_files("csv", [path]).time == "ISO 8601 without a zone, read as UTC"
    inspection = inspect_files("csv", [path], "Europe/Berlin")
    assert (inspection.time, inspection.rejected) == ("ISO 8601 without a zone, read as Europe/Berlin", {})
    assert inspection.command.endswith("--timezone Europe/Berlin")
    with pytest.raises(InputError, match="unknown time zone 'Mars'"):
        inspect_files("csv", [path], "Mars")


@pytest.mark.parametrize("text", TEXT_TYPES, ids=str)
def test_a_column_of_times_is_preferred_to_a_column_of_dates(text: pa.DataType) -> None:
    values = {"user": "a", "song": "b", "when it was": "2026-01-01 10:00:00", "first sold": "1999-01-01"}
    _, roles = guess_roles({name: pa.array([value], text) for name, value in values.items()})
    assert roles["played_at"] == "when it was"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"uts": "1711929600", "utc_time": "31 Dec 2025, 21:38"}, "uts"),  # columns of a Last.fm export
        ({"time": "23:10:00", "unix": "1711929600"}, "unix"),
        ({"timestamp": "soon", "date": "2026-01-01 10:00:00"}, "date"),
        ({"timestamp": "31 Dec 2025, 21:38", "first sold": "1999-01-01"}, "timestamp"),  # no time of plays
        ({"timestamp": "soon", "one": "1711929600", "other": "1711929600"}, "timestamp"),
    ],
)
def test_the_first_readable_column_with_the_name_of_a_time_is_taken(columns: dict[str, str], expected: str) -> None:
    values = {"user": "a", "song": "b", **columns}
    _, roles = guess_roles({name: pa.array([value] * 3) for name, value in values.items()})
    assert roles["played_at"] == expected


@pytest.mark.parametrize("values", ["2024-01-01,23:10:00", "31 Jan 2021, 23:10", "2024-01-01,9:05 PM"])
def test_a_date_and_a_time_of_day_in_two_columns_must_be_joined(tmp_path: Path, values: str) -> None:
    path = write(tmp_path / "p.csv", f"user,song,date,time\na,b,{values}\n")
    message = "Column 'time' contains the time of day without the date: combine date and time in one column"
    assert message in inspect_files("csv", [path]).doubts["played_at"]
    with pytest.raises(InputError, match=message):
        guess_import([path])
    assert guess_import([path], columns={"played_at": "date"}).columns["played_at"] == "date"
    path_with_lengths = write(tmp_path / "q.csv", "user,song,date,time\na,b,2024-01-01,3:45\n")
    assert guess_import([path_with_lengths]).columns["played_at"] == "date"


@pytest.mark.parametrize("text", TEXT_TYPES, ids=str)
def test_a_date_and_a_time_of_day_in_two_columns_of_parquet_must_be_joined(tmp_path: Path, text: pa.DataType) -> None:
    values = {"user": "a", "song": "b", "date": "2024-01-01", "time": "23:10:00"}
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({name: pa.array([value] * 3, text) for name, value in values.items()}), path)
    assert inspect_files("parquet", [str(path)]).time == "dates without times, read as midnight in UTC"
    with pytest.raises(InputError, match="Column 'time' contains the time of day without the date"):
        guess_import([str(path)])


def test_names_of_public_data_sets_are_known() -> None:
    for names, expected in (
        (("session_id", "user_id", "item_id", "ts", "playtime"), ("user_id", "item_id", "ts")),
        (("uid", "timestamp", "item_id", "is_organic"), ("uid", "item_id", "timestamp")),
        (("userID", "trackID", "endTime", "msPlayed"), ("userID", "trackID", "endTime")),
    ):
        _, roles = guess_roles({name: pa.array(["1"]) for name in names})
        assert (roles["user"], roles["song"], roles["played_at"]) == expected


def write_times(path: Path, header: str, days: tuple[int, ...] = (0, 1, 2)) -> str:
    """Write 9 plays of songs a, b, c; each song was created on a day of its own, plays are a minute apart."""
    rows = []
    for row in range(9):
        created, time = START - (1 + days[row % 3]) * 86_400, START + 60 * row
        rows.append(f"u{row // 3},{'abc'[row % 3]},{created},{time},{time + 5}")
    return write(path, f"{header}\n" + "\n".join(rows) + "\n")


def test_the_time_at_which_a_song_was_created_is_not_taken_as_the_time_of_its_plays(tmp_path: Path) -> None:
    notes: list[str] = []
    path = write_times(tmp_path / "p.csv", "user_id,item_id,created_at,read_at,note")
    path_with_two_others = write_times(tmp_path / "q.csv", "user_id,item_id,created_at,read_at,sent_at")
    path_of_one_day = write_times(tmp_path / "r.csv", "user_id,item_id,date,read_at,sent_at", days=(0, 0, 0))
    named_path = write_times(tmp_path / "s.csv", "user_id,item_id,created_at,read_at,date")
    assert guess_import([path_of_one_day], on_note=notes.append).columns["played_at"] == "date"
    assert guess_import([named_path], on_note=notes.append).columns["played_at"] == "date"
    pd.read_csv(path).drop(columns="note").to_csv(path, index=False)
    assert guess_import([path], on_note=notes.append).columns["played_at"] == "read_at"
    assert notes == []
    assert guess_import([path_with_two_others], on_note=notes.append).columns["played_at"] == "created_at"
    warning = (
        "Column 'created_at' has the same time in all rows of a song, as a date of release has. If it is not the time "
        "of the plays, select another column, such as read_at or sent_at, with --columns played_at=NAME."
    )
    assert notes == [f"Warning: {warning}"]
    assert inspect_files("csv", [path_with_two_others]).doubts == {"played_at": warning}
    guess_import([path_with_two_others], columns={"played_at": "created_at"}, on_note=notes.append)
    assert len(notes) == 1


def test_a_column_of_names_is_a_title_only_if_songs_have_one_name_each() -> None:
    """The names may be those of users."""
    columns = {"user_id": ["u", "v"] * 3, "item_id": ["a", "a", "b", "b", "c", "c"], "ts": [str(START)] * 6}
    for names, title in ((["Ann", "Bob"] * 3, None), (["A", "A", "B", "B", "C", "C (live)"], "name")):
        sample = {**columns, "name": names}
        _, roles = guess_roles({name: pa.array(values) for name, values in sample.items()})
        assert roles.get("title") == title


@pytest.mark.parametrize("name", ["sid", "tid"])
def test_ids_of_sessions_and_transactions_are_not_taken_as_songs(name: str) -> None:
    _, roles = guess_roles({column: pa.array(["1"]) for column in ("user_id", name, "product_id", "ts")})
    assert roles["song"] == "product_id"


def test_titles_and_artists_are_found_by_names_that_hold_the_words() -> None:
    for names, expected in (
        (
            ("ts", "master_metadata_track_name", "master_metadata_album_artist_name", "spotify_track_uri"),
            {"title": "master_metadata_track_name", "artist": "master_metadata_album_artist_name"},
        ),
        (("Artist Name(s)", "Artist URI(s)", "Track Name"), {"title": "Track Name", "artist": "Artist Name(s)"}),
        (("artist_id", "artist-mbid", "the title", "title of album"), {"title": "the title"}),
        (("main artist", "other artists", "subtitle", "headtitle"), {}),
    ):
        _, roles = guess_roles({name: pa.array(["1"]) for name in names})
        assert {role: roles[role] for role in ("title", "artist") if role in roles} == expected


@pytest.mark.parametrize(
    ("header", "song", "title"),
    [
        ("user,artist,track,spotify_track_uri,timestamp", "spotify_track_uri", "track"),
        ("user,artist,song,track_artist_id,isrc,track_mbid,timestamp", "isrc", "song"),
        ("user,artist,track,mbid,timestamp", "mbid", "track"),
        ("user,artist,track,track_name,mbid,timestamp", "track", "track_name"),  # track_name holds the titles
        ("user,song,track_id,timestamp", "song", None),
        ("user_id,song_id,song,timestamp", "song_id", "song"),
        ("user_id,song_id,song,song_name,timestamp", "song_id", "song_name"),
        ("user,artist,song,song_genre_id,recording_label_id,playlist_item_id,track_paid,timestamp", "song", None),
    ],
)
@pytest.mark.parametrize("text", TEXT_TYPES, ids=str)
def test_with_an_artist_column_a_column_of_ids_is_preferred_to_one_that_may_hold_titles(
    text: pa.DataType, header: str, song: str, title: str | None
) -> None:
    _, roles = guess_roles({name: pa.array(["Intro"], text) for name in header.split(",")})
    assert (roles["song"], roles.get("title")) == (song, title)


def test_song_ids_from_a_column_of_titles_give_a_warning(tmp_path: Path) -> None:
    """Two songs named `Intro` would become one."""
    header = "user,artist,album,{},timestamp\n"
    rows = "".join(f"ann,{artist},X,Intro,{START}\n" for artist in "AB")
    notes: list[str] = []
    path = write(tmp_path / "p.csv", header.format("track") + rows)
    assert guess_import([path], on_note=notes.append).columns["song"] == "track"
    (note,) = notes
    assert note.startswith(
        "Warning: Song IDs come from column 'track', which may contain titles: songs of different artists"
    )
    assert note.removeprefix("Warning: ") == inspect_files("csv", [path]).doubts["song"]
    guess_import([path], columns={"song": "track"}, on_note=notes.append)
    guess_import([path], earlier_columns={"song": "track"}, on_note=notes.append)
    path_with_numbers = write(tmp_path / "q.csv", header.format("track") + rows.replace("Intro", "7"))
    path_with_ids = write(tmp_path / "r.csv", header.format("track_id") + rows)
    for other_path in (path_with_numbers, path_with_ids):
        guess_import([other_path], on_note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize("values", [[f"202401{day:02d}" for day in range(1, 29)], ["45244.92", "45250.5"]])
def test_days_that_are_read_as_seconds_of_1970_give_a_warning(tmp_path: Path, values: list[str]) -> None:
    rows = "".join(f"ann,s{index},{value},{START + index}\n" for index, value in enumerate(values))
    path = write(tmp_path / "p.csv", "user,song,date,sent\n" + rows)
    warning = "Column 'date' is read as Unix seconds of 1970. If that is wrong, write dates as 2024-01-20."
    for columns in ({"played_at": "date"}, {"played_at": "sent"}):
        notes: list[str] = []
        guess_import([path], columns=columns, on_note=notes.append)
        assert notes == ([f"Warning: {warning}"] if columns["played_at"] == "date" else [])
    path = write(tmp_path / "q.csv", "user,song,date\n" + re.sub(r",\d+\n", "\n", rows))
    guess_import([path], on_note=notes.append)
    assert notes == [f"Warning: {warning}"]
    assert warning in inspect_files("csv", [path]).notes


@pytest.mark.parametrize(
    ("role", "name", "values", "reason"),
    [
        ("artist", "artists", pa.array([{"name": "A"}] * 3), "expected text or numbers"),
        (
            "contexts",
            "context",
            pa.array([{"type": "radio"}] * 3),
            "holds struct<type: string>; expected text or numbers",
        ),
        (
            "ms_played",
            "ms_played",
            pa.array([5] * 3, pa.duration("ms")),
            "holds duration[ms]; expected text or numbers",
        ),
        ("share_listened", "completion", pa.array([50, 70, 89]), "is not a number from 0 to 1 in 3 of 3 values"),
        ("skipped", "skip", pa.array([0, 3, 5]), "is not true, false, 1 or 0 in 2 of 3 values"),
        ("liked", "liked", pa.array([1, 7, 4]), "is not true, false, 1 or 0 in 2 of 3 values"),
        (
            "event_type",
            "event_type",
            pa.array(["play", "opened", "closed"]),
            "not a play, skip or like in 2 of 3 values",
        ),
    ],
)
def test_a_column_that_cannot_be_read_as_an_optional_role_is_not_used(
    tmp_path: Path, role: str, name: str, values: pa.Array, reason: str
) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"user": ["a"] * 3, "song": ["b", "c", "d"], "ts": [START] * 3, name: values}), path)
    notes: list[str] = []
    config = guess_import([str(path)], on_note=notes.append)
    assert not config.columns.get(role)
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert (batch.rows.num_rows, batch.rejected.num_rows) == (3, 0)
    (note,) = notes
    assert note.startswith(f"Warning: No column is used as {role}: ")
    assert reason in note
    inspection = inspect_files("parquet", [str(path)])
    assert list(inspection.left_out) == [role]
    assert (f"{role}=" in inspection.command) == (role == name)  # an import would use a column with this name
    assert guess_import([str(path)], columns={role: name}, on_note=notes.append).columns[role] == name
    assert guess_import([str(path)], earlier_columns={role: ""}).columns[role] == ""
    assert len(notes) == 1


def test_the_first_of_a_list_of_artists_is_the_artist_of_a_song(tmp_path: Path) -> None:
    plays = {
        "user": ["a"] * 2,
        "song_id": ["b", "c"],
        "ts": [START] * 2,
        "artists": [["Queen", "David Bowie"], ["Abba"]],
    }
    pq.write_table(pa.table(plays), tmp_path / "p.parquet")
    notes: list[str] = []
    config = guess_import([str(tmp_path)], on_note=notes.append)
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert (batch.rows["artist"].to_pylist(), notes) == (["Queen", "Abba"], [])


@pytest.mark.parametrize(("unreadable", "is_used"), [(1, True), (2, False)])
def test_a_guessed_column_of_flags_costs_at_most_a_hundredth_of_the_plays(unreadable: int, is_used: bool) -> None:
    loved = ["1", "0"] * 50
    loved[:unreadable] = ["maybe"] * unreadable
    columns = {"user": ["a"] * 100, "song": ["b"] * 100, "ts": [str(START)] * 100, "loved": loved}
    _, roles = guess_roles({name: pa.array(values) for name, values in columns.items()})
    assert (roles.get("liked") == "loved") == is_used


@pytest.mark.parametrize("percent", [50, 100])
def test_shares_in_percent_of_which_most_are_0_or_1_reject_no_play(tmp_path: Path, percent: int) -> None:
    rows = "".join(f"u,s{row},{START + row},{percent if row % 4 == 0 else row % 2}\n" for row in range(60))
    path = write(tmp_path / "p.csv", "user_id,item_id,ts,completion\n" + rows)
    notes: list[str] = []
    config = guess_import([path], on_note=notes.append)
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert (batch.rows.num_rows, batch.rejected.num_rows) == (60, 0)
    assert notes == [
        "Warning: No column is used as share_listened: completion is not a number from 0 to 1 in 15 of 60 values."
    ]


def test_the_events_whose_rows_are_rejected_are_named(tmp_path: Path) -> None:
    rows = "".join(f"u,s{row},{START + row},{('like', 'Click', 'play')[row % 3]}\n" for row in range(9))
    path = write(tmp_path / "p.csv", "user_id,item_id,ts,action\n" + rows)
    warning = (
        "Rows whose 'action' is Click are rejected: only play, listen, skip and like are known events. If they are "
        "plays, pass --columns event_type= to ignore the column."
    )
    notes: list[str] = []
    assert guess_import([path], on_note=notes.append).columns["event_type"] == "action"
    assert notes == [f"Warning: {warning}"]
    assert inspect_files("csv", [path]).doubts == {"event_type": warning}
    for columns in ({"event_type": ""}, {"event_type": "action"}):
        guess_import([path], columns=columns, on_note=notes.append)
    needed = {"user": "user_id", "song": "item_id", "played_at": "ts"}
    guess_import([path], earlier_columns=needed, on_note=notes.append)  # does not use the column
    assert len(notes) == 1


@pytest.mark.parametrize("name", ["event", "event_type"])
def test_a_column_of_events_without_a_play_is_not_guessed(tmp_path: Path, name: str) -> None:
    """An import would have no plays left. A file of likes can be named as one."""
    path = write(
        tmp_path / "p.csv",
        f"user,song,ts,{name}\n" + "".join(f"u,s{row},{START + row},like\n" for row in range(3)),
    )
    notes: list[str] = []
    config = guess_import([path], on_note=notes.append)
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert batch.rows["is_play"].to_pylist() == [None] * 3
    assert notes == [f"Warning: No column is used as event_type: no value of column {name!r} is a play."]
    for given in ("columns", "earlier_columns"):
        settings = {given: {"user": "user", "song": "song", "played_at": "ts", "event_type": name}}
        assert guess_import([path], **settings, on_note=notes.append).columns["event_type"] == name
    assert len(notes) == 1
    for event in ("listen", "skip", ""):
        write(tmp_path / "p.csv", f"user,song,ts,{name}\nu,s,{START},{event}\nu,s,{START},like\n")
        assert guess_import([path]).columns["event_type"] == name


LASTFM = """artist,album,track,date
Radiohead,OK Computer,No Surprises,14 Nov 2023 23:05
Blur,Blur,Song 2,14 Nov 2023 23:09
"""


def test_where_no_column_holds_ids_songs_are_known_by_artist_and_title(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", LASTFM)
    notes: list[str] = []
    config = guess_import([path], user="ann", on_note=notes.append)
    assert config.columns == {"song": "artist+title", "played_at": "date", "title": "track", "artist": "artist"}
    assert "song = artist+title" in describe_import(config)
    inspection = inspect_files("csv", [path])
    assert "song=artist+title,played_at=date,title=track" in inspection.command
    assert "No column looks like song IDs: they are made from artist and title." in inspection.notes
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert batch.rows["song_id"].to_pylist() == ["Radiohead – No Surprises", "Blur – Song 2"]
    assert batch.rows["title"].to_pylist() == ["No Surprises", "Song 2"]
    assert batch.rows["played_at"].to_pylist() == [1_700_003_100_000, 1_700_003_340_000]
    path_with_titles = write(tmp_path / "q.csv", "user,artist,title,ts\nann,A,One,1700003100\n")
    assert guess_import([path_with_titles]).columns["song"] == "artist+title"
    assert notes == []


@pytest.mark.parametrize(
    ("text", "song_ids"),
    [
        (
            "\ufeffArtist;Album;AlbumId;Track;Date#ann\n"
            'Blur;Blur;f5a7;"Song 2";"1700003100000"\nBlur;Blur;f5a7;Beetlebum;"1700003340000"\n',
            ["Blur – Song 2", "Blur – Beetlebum"],
        ),
        (
            "uts,utc_time,artist,artist_mbid,album,album_mbid,track,track_mbid\n"
            '"1700003100","14 Nov 2023, 23:05","Blur","ba85","Blur","f5a7","Song 2","da5d"\n'
            '"1700003340","14 Nov 2023, 23:09","Blur","ba85","Blur","f5a7","Beetlebum",""\n',
            ["da5d", "Blur – Beetlebum"],
        ),
        (
            "artist,album,title,played_at\n"
            'Blur,Blur,Song 2,"14 Nov 2023, 23:05"\nBlur,Blur,Beetlebum,"14 Nov 2023, 23:09"\n',
            ["Blur – Song 2", "Blur – Beetlebum"],
        ),
    ],
    ids=["lastfmstats.com", "lastfm.ghan.nl", "lastfm-to-csv and a line of names"],
)
def test_files_of_lastfm_export_tools_are_read_as_they_are(tmp_path: Path, text: str, song_ids: list[str]) -> None:
    config = guess_import([write(tmp_path / "p.csv", text)], user="ann")
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert batch.rows["song_id"].to_pylist() == song_ids
    assert batch.rows["title"].to_pylist() == ["Song 2", "Beetlebum"]
    assert batch.rows["played_at"].to_pylist() == [1_700_003_100_000, 1_700_003_340_000]


@pytest.mark.parametrize("song", ["song", "track", "Recording"])
def test_a_column_of_titles_under_the_name_of_the_role_is_no_id(tmp_path: Path, song: str) -> None:
    path = write(tmp_path / "p.csv", f"user,artist,{song},ts\nann,Blur,Song 2,1700003100\nann,Adele,Hello,1700003160\n")
    config = guess_import([path])
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert batch.rows["song_id"].to_pylist() == ["Blur – Song 2", "Adele – Hello"]


def test_songs_keep_the_ids_of_the_earlier_import(tmp_path: Path) -> None:
    """Files of an update get ids of another kind only if the columns are given."""
    path = write(tmp_path / "p.csv", LASTFM.replace("No Surprises", "Airbag").replace("Song 2", "Beetlebum"))
    mapping = {"user": "user", "song": "artist+title", "played_at": "date", "title": "track", "artist": "artist"}
    assert guess_import([path], user="ann", earlier_columns=mapping).columns["song"] == "artist+title"
    path_with_titles = write(tmp_path / "q.csv", LASTFM)
    for earlier_columns in ({}, {"song": "song_id"}):
        with pytest.raises(InputError, match="no column that looks like song"):
            guess_import([path_with_titles], user="ann", earlier_columns=earlier_columns)
    assert guess_import([path_with_titles], user="ann", earlier_columns={"song": "track"}).columns["song"] == "track"
    config = guess_import([path_with_titles], user="ann", columns={"song": "artist+title"}, earlier_columns={})
    assert config.columns["song"] == "artist+title"


@pytest.mark.parametrize("format_name", ["csv", "parquet"])
def test_columns_are_guessed_from_the_first_file_with_rows(tmp_path: Path, format_name: str) -> None:
    """Spark and Dask write a first part without rows; without values, titles would be read as ids."""
    plays = pd.DataFrame(
        {"user_id": ["a"] * 2, "ts": [START] * 2, "track": ["One More Time", "Hello Again"], "artist": ["A", "B"]}
    )
    for name, part in (("part-00000", plays[:0]), ("part-00001", plays)):
        path = tmp_path / f"{name}.{format_name}"
        if format_name == "csv":
            part.to_csv(path, index=False)
        else:
            part.to_parquet(path, index=False)
    columns = guess_import([str(tmp_path)]).columns
    assert (columns["song"], columns["title"], columns["artist"]) == ("artist+title", "track", "artist")


def test_roles_that_the_earlier_import_did_not_use_are_not_guessed(tmp_path: Path) -> None:
    """An update would count likes that the import counted as plays."""
    header = "user_id,track_id,ts,source,skip,action,artist_name,liked"
    path = write(tmp_path / "p.csv", f"{header}\nann,s1,{START},radio,1,play,A,7\n")
    needed = {"user": "user_id", "song": "track_id", "played_at": "ts"}
    assert {"contexts", "skipped", "event_type"} < guess_import([path]).columns.keys()
    notes: list[str] = []
    own_names = {role: role for role in OPTIONAL_ROLES}
    config = guess_import([path], earlier_columns=own_names | needed, on_note=notes.append)
    assert config.columns == {**needed, "artist": "artist_name", "liked": ""}
    assert notes == ["Warning: No column is used as liked: liked is not true, false, 1 or 0 in 1 of 1 values."]
    config = guess_import([path], earlier_columns=own_names | needed | {"user": "uid", "skipped": "skip"})
    assert config.columns == {**needed, "artist": "artist_name", "liked": "", "skipped": "skip"}


@pytest.mark.parametrize("name", ["skipped", "isskipped", "passed_over"])
def test_a_column_of_the_earlier_import_whose_values_no_longer_fit_is_left_out_with_a_note(
    tmp_path: Path, name: str
) -> None:
    path = write(tmp_path / "p.csv", f"user,song,ts,{name}\nann,s1,{START},3\n")
    notes: list[str] = []
    earlier_columns = {"user": "user", "song": "song", "played_at": "ts", "skipped": name}
    config = guess_import([path], earlier_columns=earlier_columns, on_note=notes.append)
    (batch,) = config.reader().read(plan_import(config).units[0])
    assert (batch.rows.num_rows, batch.rejected.num_rows) == (1, 0)
    assert notes == [f"Warning: No column is used as skipped: {name} is not true, false, 1 or 0 in 1 of 1 values."]


@pytest.mark.parametrize("format_name", ["csv", "parquet"])
@pytest.mark.parametrize("first", ["old", "new"])
def test_an_optional_column_is_used_only_if_all_files_have_it(tmp_path: Path, first: str, format_name: str) -> None:
    plays = pd.DataFrame({"user": ["a"], "song": ["b"], "ts": [START], "loved": [1], "artist": ["A"]})
    for part, name in ((plays[["user", "song", "ts"]], "old"), (plays, "new")):
        path = tmp_path / f"{'1' if name == first else '2'}-{name}.{format_name}"
        part.to_csv(path, index=False) if format_name == "csv" else part.to_parquet(path, index=False)
    old_path = str(next(tmp_path.glob("*old*")))
    notes: list[str] = []
    config = guess_import([str(tmp_path)], on_note=notes.append)
    assert config.columns == {"user": "user", "song": "song", "played_at": "ts"}
    assert notes == [
        f"Warning: {old_path} has no column 'loved': no column is used as liked.",
        f"Warning: {old_path} has no column 'artist': artist is read from the other files only.",
    ]
    batches = [batch for unit in plan_import(config).units for batch in config.reader().read(unit)]
    assert [artist for batch in batches for artist in batch.rows["artist"].to_pylist()] == (
        [None, "A"] if first == "old" else ["A", None]
    )
    update_config = guess_import([str(tmp_path)], earlier_columns={"liked": "loved", "artist": "artist"})
    assert update_config.columns == config.columns
    with pytest.raises(InputError, match="has no column 'loved' for liked"):
        plan_import(guess_import([str(tmp_path)], columns={"liked": "loved"}))


@pytest.mark.parametrize("column", [{"ms_played": pa.array([5], pa.duration("ms"))}, {"liked": pa.array([3.5])}])
@pytest.mark.parametrize("empty_parts", [0, 1])
def test_a_column_that_only_newer_files_have_is_not_read_if_its_type_or_values_have_no_use(
    tmp_path: Path, column: dict[str, pa.Array], empty_parts: int
) -> None:
    plays = pa.table({"user": ["a"], "song": ["b"], "ts": [START], **column})
    (role,) = column
    pq.write_table(plays.drop_columns(role), tmp_path / "1.parquet")
    for part in range(empty_parts):
        pq.write_table(plays[:0], tmp_path / f"2-{part}.parquet")
    pq.write_table(plays, tmp_path / "3.parquet")
    assert guess_import([str(tmp_path)]).columns[role] == ""
    inspection = inspect_files("parquet", [str(tmp_path)])
    assert (inspection.rows, inspection.rejected) == (2, {})


@pytest.mark.parametrize("first", ["ts", "timestamp"])
def test_a_file_without_the_column_of_times_of_the_others_is_named(tmp_path: Path, first: str) -> None:
    """A column of dates that all files have, such as release dates, is no replacement."""
    for name in ("ts", "timestamp"):
        text = f"user,song,first sold,{name}\na,b,1999-01-01,{START}\n"
        write(tmp_path / f"{'1' if name == first else '2'}.csv", text)
    with pytest.raises(InputError, match=r"\.csv has no column '(ts|timestamp)' for played_at"):
        guess_import([str(tmp_path)])


def test_columns_of_one_name_are_pointed_out(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"])] * 3, names=["user", "user", "song"]), tmp_path / "p.parquet")
    for format_name, path in (
        ("parquet", str(tmp_path)),
        ("csv", write(tmp_path / "p.csv", "user,user,song\n1,2,3\n")),
    ):
        inspection = inspect_files(format_name, [path])
        assert "2 columns are named 'user': rename all but one." in inspection.notes
        assert inspection.missing == ["played_at"]


def test_other_formats_say_how_many_rows_would_be_rejected(tmp_path: Path) -> None:
    listens = [{"listened_at": START, "user_name": "u", "track_metadata": {"track_name": "t"}}, {"listened_at": 1}]
    inspection = inspect_files("listenbrainz", [write(tmp_path / "l.json", json.dumps(listens))])
    assert (inspection.rows, inspection.rejected) == (2, {"not a listen: no track_metadata": 1})
    assert inspection.command == f"rayrec import listenbrainz {tmp_path / 'l.json'}"


def test_a_first_line_of_data_is_pointed_out(tmp_path: Path) -> None:
    pd.DataFrame({"a": ["u", "v"], "b": ["s", "t"], "c": [START, START]}).to_csv(
        tmp_path / "p.csv", header=False, index=False
    )
    assert "The first line looks like data" in inspect_files("csv", [str(tmp_path / "p.csv")]).notes[-1]


def test_files_that_cannot_be_inspected_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown format 'xls'"):
        inspect_files("xls", [str(tmp_path)])
    with pytest.raises(InputError, match="is empty"):
        inspect_files("csv", [write(tmp_path / "p.csv", "")])
    with pytest.raises(InputError, match="is not a Parquet file"):
        inspect_files("parquet", [write(tmp_path / "p.parquet", "x")])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("plays.csv", "user,song,ts\n", "csv"),
        ("plays.tsv", "user\tsong\tts\n", "csv"),
        ("userid-timestamp-artid-artname-traid-traname.tsv", "u\tt\n", "lastfm-1k"),
        ("2014.listens", "{}\n", "listenbrainz"),
        ("listens.jsonl", "{}\n", "listenbrainz"),
        ("slice.json", '{"info": 1, "playlists": []}', "mpd"),
        ("Streaming_History_Audio_2023.json", "[]", "spotify-history"),
        ("watch-history.json", "[]", "youtube-takeout"),
        ("Wiedergabeverlauf.json", '[{"header": "YouTube Music", "titleUrl": "u"}]', "youtube-takeout"),
        ("kijkgeschiedenis.json", '[{"header": "YouTube", "activityControls": []}]', "youtube-takeout"),
        ("listens.json", '[{"listened_at": 1, "track_metadata": {}}]', "listenbrainz"),
        ("Apple Music Play Activity.csv", "Song Name\n", "apple-music"),
        ("streaming.csv", "artist_name,track_title,entry_date\n", "tidal"),
        ("streaming.csv", "user,song,ts\n", "csv"),
        ("deezer-data_1.xlsx", "", "deezer"),
        ("userid_trackid_timestamp.tsv", "user_id\ttrack_id\n", "music4all-onion"),
        ("sessions.txt", "1 2 3\n", "sequences"),
    ],
)
def test_the_format_follows_from_name_and_content(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert guess_format([write(tmp_path / f"folder/{name}", text)]) == expected
    assert guess_format([str(tmp_path / "folder")]) == expected


def test_an_ending_of_compression_is_ignored(tmp_path: Path) -> None:
    for suffix in ("gz", "bz2"):
        assert guess_format([write(tmp_path / f"sessions.txt.{suffix}", "1 2 3\n")]) == "sequences"


def test_a_watch_history_is_found_among_the_other_files_of_takeout(tmp_path: Path) -> None:
    write(tmp_path / "Takeout/Abos/abos.json", '{"snippet": {}}')
    write(tmp_path / "Takeout/Abos/abos.csv", "a,b\n")
    name = "Takeout/YouTube und YouTube Music/Verlauf/Wiedergabeverlauf.json"
    write(tmp_path / name, '[{"header": "YouTube", "title": "A", "titleUrl": "https://youtube.com/watch?v=a"}]')
    assert guess_format([str(tmp_path)]) == "youtube-takeout"
    inspection = inspect_files("youtube-takeout", [str(tmp_path)])
    assert inspection.rejected == {"not a YouTube Music play": 1}


@pytest.mark.parametrize("name", ["StreamingHistory_music_0.json", "StreamingHistory0.json"])
def test_spotifys_account_data_is_no_history_and_the_right_one_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "Spotify Account Data" / name
    record = '[{"endTime": "2024-01-05 14:23", "artistName": "A", "trackName": "T", "msPlayed": 184000}]'
    write(path, record)
    for source in (path, path.parent):
        with pytest.raises(InputError, match="ask Spotify for the extended streaming history"):
            guess_format([str(source)])
    (reason,) = inspect_files("spotify-history", [str(path.parent)]).rejected
    assert reason.endswith("ask Spotify for the extended streaming history")
    write(tmp_path / "Streaming_History_Audio_2023_0.json", "[]")
    assert guess_format([str(tmp_path)]) == "spotify-history"


def test_the_format_of_unknown_json_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the format of .*some\.json is unknown; pass --format"):
        guess_format([write(tmp_path / "some.json", '[{"song": "a"}]')])


def test_every_format_of_plays_is_guessed() -> None:
    assert set(ORDER) == set(FORMATS)


def test_a_parquet_file_named_like_yambdas_is_distinguished_by_its_columns(tmp_path: Path) -> None:
    for columns, expected in ((["uid", "item_id", "played_ratio_pct"], "yambda"), (["user", "song", "ts"], "parquet")):
        path = tmp_path / "listens.parquet"
        pq.write_table(pa.table({name: [1] for name in columns}), path)
        assert guess_format([str(path)]) == expected


def test_columns_are_guessed_by_name_and_those_given_come_first(tmp_path: Path) -> None:
    path = write(tmp_path / "plays.csv", "listener;track;alt;timestamp\nann;s1;x1;1400000000\n")
    config = guess_import([path])
    assert config.columns == {"user": "listener", "song": "track", "played_at": "timestamp"}
    assert config.delimiter == ";"
    assert describe_import(config) == (
        "csv: user = listener, song = track, played_at = timestamp; times without a zone are read as UTC"
    )
    assert guess_import([path], timezone="Asia/Tokyo").timezone == "Asia/Tokyo"
    assert guess_import([path], columns={"song": "alt"}).columns["song"] == "alt"


def test_files_without_users_are_those_of_the_user_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "plays.csv", "artist,track,isrc,uts\nA,One,s1,1400000000\n")
    with pytest.raises(InputError, match="user=NAME, or if all plays belong to one person, pass --user NAME"):
        guess_import([path])
    config = guess_import([path], user="ann")
    assert "user" not in config.columns
    assert describe_import(config).endswith("; all plays belong to user 'ann'")
    plan = plan_import(config)
    (batch,) = config.reader().read(plan.units[0])
    assert batch.rows["user_id"].to_pylist() == ["ann"]
    path_with_users = write(tmp_path / "named.csv", "listener,track,uts\nbob,s1,1400000000\n")
    with pytest.raises(InputError, match="has users in column 'listener'; --user would merge them"):
        plan_import(guess_import([path_with_users], user="ann"))


@pytest.mark.parametrize("time", ["14 Nov 2023 23:05", '"14 Nov 2023, 23:05"', "2023-11-14 23:05"])
def test_a_missing_header_is_reported_where_columns_are_missing(tmp_path: Path, time: str) -> None:
    path = write(tmp_path / "plays.csv", f"Radiohead,OK Computer,Airbag,{time}\n" * 2)
    with pytest.raises(InputError, match="The first line looks like data"):
        guess_import([path])


def test_all_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "plays.csv", "a,b\n1,2\n")
    message = "like user or song or played_at; it has a, b; map them with --columns user=NAME,song=NAME,played_at=NAME"
    with pytest.raises(InputError, match=message):
        guess_import([path])


def test_only_a_column_of_times_is_suggested_as_the_time(tmp_path: Path) -> None:
    """The name player_id is similar to played_at."""
    for times, suggestion in (("session_start,session_end", "NAME"), ("playing_at,end", "playing_at")):
        path = write(tmp_path / "p.csv", f"player_id,game_id,{times}\n1,2,{START},{START + 60}\n")
        with pytest.raises(InputError, match=f"--columns user=NAME,played_at={suggestion},"):
            guess_import([path])


@pytest.mark.parametrize(
    ("name", "message"),
    [("plays.xlsx", "the format of .*plays.xlsx is unknown; pass --format"), ("slice.json", "contains playlists, not")],
)
def test_a_file_without_plays_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        guess_import([write(tmp_path / name, '{"playlists": []}')])


def test_an_empty_path_is_refused_instead_of_read_as_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "p.csv", f"user,song,ts\na,b,{START}\n")
    monkeypatch.chdir(tmp_path)
    for call in (inspect_files, lambda format_name, paths: guess_import(paths)):
        with pytest.raises(InputError, match="a path is empty; give a file or folder"):
            call("csv", [""])
    assert inspect_files("csv", ["."]).rows == 1


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file or folder .* does not exist"):
        guess_import([str(tmp_path / "none.csv")])
