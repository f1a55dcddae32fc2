"""Format and columns of files of plays are guessed, and what is given comes first."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.errors import InputError
from rayrec.importing.guessing import ORDER, describe_import, guess_format, guess_import
from rayrec.importing.readers import FORMATS


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


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
        ("Apple Music Play Activity.csv", "Song Name\n", "apple-music"),
        ("streaming.csv", "artist_name,track_title,entry_date\n", "tidal"),
        ("streaming.csv", "user,song,ts\n", "csv"),
        ("deezer-data_1.xlsx", "", "deezer"),
        ("userid_trackid_timestamp.tsv", "user_id\ttrack_id\n", "music4all-onion"),
        ("sessions.txt", "1 2 3\n", "sequences"),
    ],
)
def test_the_format_follows_from_name_and_content(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert guess_format([write(tmp_path, f"folder/{name}", text)]) == expected
    assert guess_format([str(tmp_path / "folder")]) == expected


def test_a_known_ending_of_compression_is_not_looked_at(tmp_path: Path) -> None:
    for suffix in ("gz", "bz2"):
        assert guess_format([write(tmp_path, f"sessions.txt.{suffix}", "1 2 3\n")]) == "sequences"


def test_every_format_of_plays_is_guessed() -> None:
    assert set(ORDER) == set(FORMATS)


def test_a_parquet_file_named_as_yambdas_is_told_from_it_by_its_columns(tmp_path: Path) -> None:
    for columns, expected in ((["uid", "item_id", "played_ratio_pct"], "yambda"), (["user", "song", "ts"], "parquet")):
        path = tmp_path / "listens.parquet"
        pq.write_table(pa.table({name: [1] for name in columns}), path)
        assert guess_format([str(path)]) == expected


def test_columns_are_guessed_by_name_and_those_given_come_first(tmp_path: Path) -> None:
    path = write(tmp_path, "plays.csv", "listener;track;alt;timestamp\nann;s1;x1;1400000000\n")
    config = guess_import([path])
    assert config.columns == {"user": "listener", "song": "track", "played_at": "timestamp"}
    assert config.delimiter == ";"
    assert describe_import(config) == (
        "csv: user = listener, song = track, played_at = timestamp; times without a zone are UTC"
    )
    assert guess_import([path], timezone="Asia/Tokyo").timezone == "Asia/Tokyo"
    assert guess_import([path], columns={"song": "alt"}).columns["song"] == "alt"


def test_all_missing_columns_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "plays.csv", "a,b\n1,2\n")
    message = "like user or song or played_at; pass --columns user=NAME,song=NAME,played_at=NAME, with names from: a, b"
    with pytest.raises(InputError, match=message):
        guess_import([path])


@pytest.mark.parametrize(
    ("name", "said"),
    [("plays.xlsx", "the format of .*plays.xlsx is not known; pass --format"), ("slice.json", "holds playlists, not")],
)
def test_what_holds_no_plays_is_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        guess_import([write(tmp_path, name, '{"playlists": []}')])


def test_a_path_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        guess_import([str(tmp_path / "none.csv")])
