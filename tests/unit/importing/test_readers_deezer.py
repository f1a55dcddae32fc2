"""Deezer's deezer-data_NUMBER.xlsx."""

import zipfile
from datetime import datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.import_plan import ImportConfig, plan_import
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import Batch, ReadOptions

HEADER = ["Song Title", "Artist", "ISRC", "Album Title", "IP Address", "Listening Time", "Platform Name", "Date"]


def write(path: Path, *rows: list[Any], sheet: str = "10_listeningHistory", header: list[str] = HEADER) -> Path:
    book = openpyxl.Workbook()
    book.create_sheet("01_profile").append(["a", "b"])
    history = book.create_sheet(sheet)
    for row in (header, *rows):
        history.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def play(title: str | None, isrc: str | None, seconds: Any, date: Any) -> list[Any]:
    return [title, "Björk", isrc, "Debut", "1.2.3.4", seconds, "web", date]


def read(path: Path, user: str = "") -> Batch:
    reader = FORMATS["deezer"].make(ReadOptions(user=user))
    (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
    (batch,) = reader.read(unit)
    return batch


def test_a_row_of_the_history_is_a_play_of_the_account_in_the_name(tmp_path: Path) -> None:
    path = write(
        tmp_path / "deezer-data_2175171744.xlsx",
        play("Venus as a Boy", "GBAAA9300001", 240, "2024-07-02 22:34:59"),
        play("Jóga", None, 29, datetime(2024, 7, 2, 22, 40)),
        play("Jóga", "  ", -1, "2024-07-02T22:41:00Z"),
    )
    rows = read(path).rows.to_pylist()
    assert [row["song_id"] for row in rows] == ["GBAAA9300001", "Björk – Jóga", "Björk – Jóga"]
    assert [row["played_at"] for row in rows] == [1719959699000, 1719960000000, 1719960060000]
    assert [row["skipped"] for row in rows] == [False, True, None]
    assert {row["user_id"] for row in rows} == {"2175171744"}
    assert set(read(path, user="me").rows.column("user_id").to_pylist()) == {"me"}


def test_rows_that_are_no_plays_are_rejected_with_a_reason(tmp_path: Path) -> None:
    path = write(tmp_path / "d.xlsx", play(None, None, 1, "2024-07-02 22:34:59"), play("A", "B", 1, "yesterday"), [])
    rejected = read(path).rejected.to_pylist()
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (2, "no song"),
        (3, "time is neither unix seconds, unix milliseconds nor ISO 8601"),
    ]


def test_another_workbook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DamagedInputError, match="has no listening history, a sheet whose name ends in"):
        read(write(tmp_path / "d.xlsx", sheet="Plays"))
    with pytest.raises(InputError, match="no column 'Date'; it has Song Title, Artist"):
        read(write(tmp_path / "d.xlsx", header=["Song Title", "Artist"]))


def test_a_part_that_does_not_match_its_checksum_is_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "d.xlsx", play("Jóga", "B", 40, "2024-07-02 22:34:59"))
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    path.write_bytes(path.read_bytes().replace(b"22:34:59", b"23:34:59"))
    with pytest.raises(DamagedInputError, match="does not match its checksum"):
        read(path)


def test_files_of_two_accounts_in_one_folder_are_two_users_and_one_without_a_name_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path / f"deezer-data_{number}.xlsx", play("Jóga", "B", 40, "2024-07-02 22:34:59"))
    plan = plan_import(ImportConfig(format="deezer", paths=(str(tmp_path),)))
    assert [read(Path(unit.source)).rows.column("user_id").to_pylist() for unit in plan.units] == [["1"], ["2"]]
    write(tmp_path / "deezer-data.xlsx", play("Jóga", "B", 40, "2024-07-02 22:34:59"))
    with pytest.raises(InputError, match="contains files that name the user, such as '1', and files that do not"):
        plan_import(ImportConfig(format="deezer", paths=(str(tmp_path),)))
