"""Apple Music Play Activity.csv."""

from pathlib import Path

import pytest

from rayrec.errors import InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions

HEADER = (
    "Album Name,Container Artist Name,End Reason Type,Event End Timestamp,Event Start Timestamp,Event Type,"
    "Play Duration Milliseconds,Song Name"
)
HEADER_BEFORE_2021 = "Artist Name,Content Name,End Reason Type,Event Start Timestamp,Play Duration Milliseconds"


def read(path: Path, header: str, *lines: str) -> Batch:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    reader = FORMATS["apple-music"].make(ReadOptions())
    (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
    (batch,) = reader.read(unit)
    return batch


def test_the_end_of_a_play_is_a_play_of_the_folders_owner(tmp_path: Path) -> None:
    path = tmp_path / "ann" / "Apple_Media_Services" / "Apple Music Activity" / "Apple Music Play Activity.csv"
    batch = read(
        path,
        HEADER,
        "Debut,,NATURAL_END_OF_TRACK,2024-07-02T22:38:59.918Z,2024-07-02T22:34:59.918Z,PLAY_END,240000,Venus as a Boy",
        "Debut,Björk,TRACK_SKIPPED_FORWARDS,,2024-07-02 22:40:00,PLAY_END,90000,Human Behaviour",
        "Debut,Björk,NOT_APPLICABLE,2024-07-02T22:41:00Z,,,29999,Human Behaviour",
    )
    rows = batch.rows.to_pylist()
    assert {row["user_id"] for row in rows} == {"ann"}
    assert [row["song_id"] for row in rows] == ["Debut – Venus as a Boy", *["Björk – Human Behaviour"] * 2]
    assert [row["played_at"] for row in rows] == [1719959699918, 1719960000000, 1719960060000]
    assert [row["skipped"] for row in rows] == [False, True, True]
    assert [row["artist"] for row in rows] == [None, "Björk", "Björk"]


def test_older_exports_name_the_columns_otherwise(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.csv", HEADER_BEFORE_2021, "Björk,Jóga,,2018-07-02T22:34:59Z,").rows.to_pylist()
    assert (row["song_id"], row["title"], row["played_at"], row["skipped"]) == (
        "Björk – Jóga",
        "Jóga",
        1530570899000,
        None,
    )


def test_other_events_and_plays_without_song_or_time_are_rejected_with_a_reason(tmp_path: Path) -> None:
    batch = read(
        tmp_path / "a.csv",
        HEADER,
        "Debut,Björk,,,2024-07-02T22:34:59Z,PLAY_START,0,Human Behaviour",
        "Debut,Björk,,,2024-07-02T22:34:59Z,LYRIC_DISPLAY,0,Human Behaviour",
        "Debut,Björk,,,2024-07-02T22:34:59Z,PLAY_END,0,",
        "Debut,Björk,,,,PLAY_END,0,Human Behaviour",
    )
    assert batch.rejected.column("reason").to_pylist() == [*["event is not a play"] * 2, "no song", "no time"]


@pytest.mark.parametrize(
    "reason", ["PLAYBACK_MANUALLY_PAUSED", "PLAYBACK_SUSPENDED", "SCRUB_BEGIN", "SCRUB_END", "EXITED_APPLICATION"]
)
def test_a_part_of_a_listen_is_not_skipped(tmp_path: Path, reason: str) -> None:
    batch = read(
        tmp_path / "a.csv", HEADER, f"Debut,Björk,{reason},,2024-07-02T22:41:00Z,PLAY_END,5000,Human Behaviour"
    )
    assert batch.rows.column("skipped").to_pylist() == [False]


def test_failed_loads_videos_and_shows_are_no_plays_of_songs(tmp_path: Path) -> None:
    batch = read(
        tmp_path / "a.csv",
        "End Reason Type,Event Start Timestamp,Event Type,Item Type,Media Type,Play Duration Milliseconds,Song Name",
        "FAILED_TO_LOAD,2024-07-02T22:34:59Z,PLAY_END,ITUNES_STORE_CONTENT,AUDIO,0,Lucky",
        "NATURAL_END_OF_TRACK,2024-07-02T22:34:59Z,PLAY_END,ORIGINAL_CONTENT_SHOWS,AUDIO,1200000,Carpool",
        "NATURAL_END_OF_TRACK,2024-07-02T22:34:59Z,PLAY_END,ITUNES_STORE_CONTENT,VIDEO,1200000,Jóga",
        "NATURAL_END_OF_TRACK,2024-07-02T22:34:59Z,PLAY_END,ITUNES_STORE_CONTENT,AUDIO,200000,Airbag",
    )
    reasons = batch.rejected.column("reason").to_pylist()
    assert reasons == ["event is not a play", "video or show", "video or show"]
    assert set(reasons) <= set(FORMATS["apple-music"].not_plays)
    assert batch.rows.column("title").to_pylist() == ["Airbag"]


def test_another_file_of_the_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="no column 'Song Name' or 'Event Start Timestamp'; it has Track Description, Date Played"
    ):
        read(
            tmp_path / "Apple Music - Play History Daily Tracks.csv", "Track Description,Date Played", "A - B,20240101"
        )
