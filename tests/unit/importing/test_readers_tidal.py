"""TIDAL's streaming.csv."""

from pathlib import Path

import pytest

from rayrec.errors import InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions

HEADER = "artist_name,track_title,entry_date,stream_duration_ms,product_type,country_name,time_zone"


def read(path: Path, *lines: str, header: str = HEADER, user: str = "") -> Batch:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n")
    reader = FORMATS["tidal"].make(ReadOptions(user=user))
    (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
    (batch,) = reader.read(unit)
    return batch


def test_times_are_local_to_the_zone_of_their_row_and_utc_without_one(tmp_path: Path) -> None:
    batch = read(
        tmp_path / "ann" / "streaming.csv",
        'WZRD,"Teleport 2 Me, Jamie",08/03/2022 19:06,238000.0,TRACK,Canada,America/Toronto',
        "Barrie,Canyons,25/04/2025 7:11,4819.0,TRACK,null,null",
        "Barrie,Canyons,25/10/2026 02:30,x,TRACK,Germany,Europe/Berlin",
    )
    rows = batch.rows.to_pylist()
    # In UTC: 00:06 on 9 March; 07:11; 00:30, since 02:30 occurs twice when the clocks go back and the first one counts.
    assert [row["played_at"] for row in rows] == [1646784360000, 1745565060000, 1792888200000]
    assert [row["skipped"] for row in rows] == [False, True, None]
    assert [(row["user_id"], row["song_id"]) for row in rows][:1] == [("ann", "WZRD – Teleport 2 Me, Jamie")]
    assert (rows[0]["title"], rows[0]["artist"]) == ("Teleport 2 Me, Jamie", "WZRD")


def test_the_name_of_the_folder_is_spelled_as_a_user_id(tmp_path: Path) -> None:
    line = "Barrie,Canyons,25/04/2025 7:11,4819.0,TRACK,null,null"
    assert read(tmp_path / " 7.0" / "streaming.csv", line).rows.column("user_id").to_pylist() == ["7"]
    with pytest.raises(InputError, match=r"the name of folder .*/nan is not a user ID; pass --user NAME"):
        read(tmp_path / "nan" / "streaming.csv", line)


def test_what_is_no_play_of_a_song_is_rejected_with_a_reason(tmp_path: Path) -> None:
    batch = read(
        tmp_path / "streaming.csv",
        "A,Video,08/03/2022 19:06,1,VIDEO,null,null",
        "A,,08/03/2022 19:06,1,TRACK,null,null",
        "A,B,2022-03-08T19:06,1,TRACK,null,null",
        "A,B,08/03/2022 19:06,1,TRACK,null,Not/AZone",
        "A,B,31/12/2099 19:06,1,TRACK,null,null",
        "A,B,,1,TRACK,null,null",
        user="me",
    )
    assert batch.rows.num_rows == 0
    assert batch.rejected.column("reason").to_pylist() == [
        "not a track",
        "no song",
        "time does not match the time pattern of this format",
        "unknown time zone",
        "time is more than a day in the future",
        "no time",
    ]


def test_optional_columns_may_be_missing_but_not_those_of_a_play(tmp_path: Path) -> None:
    batch = read(tmp_path / "s.csv", "A,B,08/03/2022 19:06", header="artist_name,track_title,entry_date", user="me")
    assert batch.rows.column("played_at").to_pylist() == [1646766360000]
    with pytest.raises(InputError, match="no column 'entry_date'; it has artist_name, track_title"):
        read(tmp_path / "s.csv", "A,B", header="artist_name,track_title")
