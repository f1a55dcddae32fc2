"""The watch history of YouTube Music out of Google Takeout."""

import json
from pathlib import Path
from typing import Any

import pytest

from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions


def watch_entry(**changes: Any) -> dict[str, Any]:
    """An entry as Takeout writes it."""
    return {
        "header": "YouTube Music",
        "title": "Watched Solar",
        "titleUrl": "https://www.youtube.com/watch?v=-e8Nfjl_AKk",
        "subtitles": [{"name": "Sault - Topic", "url": "https://www.youtube.com/channel/UC-o"}],
        "time": "2022-04-25T18:09:04.784Z",
        "products": ["YouTube"],
        **changes,
    }


def read(path: Path, entries: list[Any], user: str = "") -> Batch:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entries))
    reader = FORMATS["youtube-takeout"].make(ReadOptions(user=user))
    (unit,) = reader.plan(str(path), path.stat().st_size, 10)
    (batch,) = reader.read(unit)
    return batch


def test_a_watched_song_is_a_play_of_the_folders_owner(tmp_path: Path) -> None:
    path = tmp_path / "ann" / "Takeout" / "YouTube and YouTube Music" / "history" / "watch-history.json"
    (row,) = read(path, [watch_entry()]).rows.to_pylist()
    assert (row["user_id"], row["song_id"], row["played_at"]) == ("ann", "-e8Nfjl_AKk", 1650910144784)
    assert (row["title"], row["artist"]) == ("Solar", "Sault")
    assert read(path, [watch_entry()], user="me").rows.column("user_id").to_pylist() == ["me"]


@pytest.mark.parametrize(
    ("folder", "user"),
    [
        ("ann/Takeout/YouTube und YouTube Music/Verlauf", "ann"),
        ("ann/Takeout/YouTube と YouTube Music/履歴", "ann"),
        ("ann/takeout-20240101T000000Z-001/Takeout/YouTube et YouTube Music/historique", "ann"),
        ("takeout/ann", "ann"),
    ],
)
def test_folders_that_takeout_translates_are_no_users(tmp_path: Path, folder: str, user: str) -> None:
    batch = read(tmp_path / folder / "Wiedergabeverlauf.json", [watch_entry()])
    assert batch.rows.column("user_id").to_pylist() == [user]


def test_an_ad_is_no_play_and_a_link_no_title(tmp_path: Path) -> None:
    link = "https://music.youtube.com/watch?v=gone"
    entries = [
        watch_entry(details=[{"name": "From Google Ads"}]),
        watch_entry(title=f"Watched {link}", titleUrl=link, subtitles=None),
        watch_entry(title=f"{link} angesehen", titleUrl=link, subtitles=None),
    ]
    batch = read(tmp_path / "watch-history.json", entries)
    assert [(row["song_id"], row["title"]) for row in batch.rows.to_pylist()] == [("gone", None)] * 2
    assert [(row["line"], row["reason"]) for row in batch.rejected.to_pylist()] == [(1, "not a YouTube Music play")]


def test_a_search_is_no_play(tmp_path: Path) -> None:
    batch = read(tmp_path / "Suchverlauf.json", [watch_entry(titleUrl="https://music.youtube.com/search?q=solar")])
    assert batch.rejected.column("reason").to_pylist() == ["a search"]
    assert "a search" in FORMATS["youtube-takeout"].not_plays


def test_videos_and_invalid_entries_are_rejected_with_a_reason(tmp_path: Path) -> None:
    entries = [
        watch_entry(header="YouTube"),
        watch_entry(header="YouTube", titleUrl="https://music.youtube.com/watch?v=x", subtitles=None),
        watch_entry(titleUrl=None),
        watch_entry(time=None),
        "junk",
    ]
    batch = read(tmp_path / "watch-history.json", entries)
    assert batch.rows.column("song_id").to_pylist() == ["x"]
    assert [(row["line"], row["reason"]) for row in batch.rejected.to_pylist()] == [
        (1, "not a YouTube Music play"),
        (3, "no song"),
        (4, "no time"),
        (5, "not an entry of a watch history"),
    ]
