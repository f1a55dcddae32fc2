"""Slices of the Million Playlist Dataset."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.data import columns
from rayrec.errors import DamagedInputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions


def track(pos: int, song: str | None) -> dict[str, Any]:
    return {
        "pos": pos,
        "artist_name": "Missy Elliott",
        "track_uri": song,
        "artist_uri": "spotify:artist:2wIVse2owClT7go1WT98tk",
        "track_name": "Lose Control",
        "album_uri": "spotify:album:6vV5UrXcfyQD1wu4Qo2I9K",
        "duration_ms": 226863,
        "album_name": "The Cookbook",
    }


def read(path: Path, content: Any) -> Batch:
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=2))
    reader = FORMATS["mpd"].make(ReadOptions(playlists=True))
    (unit,) = reader.plan(str(path), path.stat().st_size, 10)
    (batch,) = reader.read(unit)
    return batch


def test_a_slice_gives_one_row_per_track(tmp_path: Path) -> None:
    playlists = [
        {"name": "Throwbacks", "pid": 0, "num_tracks": 2, "tracks": [track(0, "spotify:track:a"), track(1, "b")]},
        {"name": "disco", "pid": 1, "num_tracks": 1, "tracks": [track(0, "spotify:track:a")]},
    ]
    batch = read(tmp_path / "mpd.slice.0-999.json", {"info": {"slice": "0-999"}, "playlists": playlists})
    assert batch.rows.schema == columns.PLAYLIST_ENTRIES
    assert [(row["playlist_id"], row["position"], row["song_id"]) for row in batch.rows.to_pylist()] == [
        ("0", 0, "spotify:track:a"),
        ("0", 1, "b"),
        ("1", 0, "spotify:track:a"),
    ]
    assert batch.rows.column("title").to_pylist() == ["Lose Control"] * 3
    assert batch.rows.column("line").to_pylist() == [1, 1, 2]
    assert batch.rejected.num_rows == 0


def test_bad_playlists_and_tracks_are_rejected(tmp_path: Path) -> None:
    playlists = [{"name": "no id", "tracks": []}, {"pid": 4, "tracks": [track(0, None), "x", track(2, "c")]}, 5]
    batch = read(tmp_path / "mpd.slice.0-999.json", {"playlists": playlists})
    assert [(row["position"], row["song_id"]) for row in batch.rows.to_pylist()] == [(2, "c")]
    assert sorted((row["line"], row["reason"]) for row in batch.rejected.to_pylist()) == [
        (1, "no playlist"),
        (2, "no song"),
        (2, "not a track"),
        (3, "no playlist"),
    ]


def test_a_slice_that_is_cut_off_is_an_error_that_names_it(tmp_path: Path) -> None:
    one_line = json.dumps({"playlists": [{"pid": 0, "tracks": [track(0, "a")]}]})
    for text in (one_line, json.dumps(json.loads(one_line), indent=2)):
        for end in (len(text) - 40, len(text) - 1, 1):
            with pytest.raises(DamagedInputError, match=r"cut\.json cannot be read completely"):
                read(tmp_path / "cut.json", text[:end])


def test_a_file_that_is_no_slice_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        DamagedInputError, match=r"b\.json is JSON, but has no list of records at the top level or at 'playlists'"
    ):
        read(tmp_path / "b.json", json.dumps({"tracks": []}, indent=2))
    with pytest.raises(DamagedInputError, match=r"empty\.json is empty"):
        read(tmp_path / "empty.json", "")


def test_a_byte_that_is_not_utf8_rejects_only_its_track(tmp_path: Path) -> None:
    text = json.dumps({"playlists": [{"pid": 0, "tracks": [track(0, "a"), {**track(1, "b"), "track_name": "CAFE"}]}]})
    path = tmp_path / "latin.json"
    path.write_bytes(text.encode().replace(b"CAFE", b"Caf\xe9"))
    reader = FORMATS["mpd"].make(ReadOptions(playlists=True))
    (unit,) = reader.plan(str(path), path.stat().st_size, 10)
    (batch,) = reader.read(unit)
    assert batch.rows.column("song_id").to_pylist() == ["a"]
    assert batch.rejected.column("reason").to_pylist() == ["not UTF-8"]
