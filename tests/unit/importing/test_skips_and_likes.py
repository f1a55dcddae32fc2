"""Skips and likes in every kind of column, and the flags that an import derives from them."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from rayrec.data import columns
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.inspection import guess_import
from rayrec.importing.readers.reader import Batch

START = 1_711_929_600


def read(folder: Path, kind: str, rows: list[dict[str, object]], **settings: object) -> Batch:
    """Write plays of user u, one second apart, to a csv or Parquet file, and read it."""
    names = ["user", "song", "played_at", *dict.fromkeys(name for row in rows for name in row)]
    plays = [
        {"user": "u", "song": f"s{position}", "played_at": START + position, **row} for position, row in enumerate(rows)
    ]
    table = pa.table({name: [row.get(name) for row in plays] for name in names})
    path = folder / f"plays.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        pacsv.write_csv(table, path)
    config = ImportConfig(format=kind, paths=(str(path),), **settings)  # type: ignore[arg-type]
    reader = config.reader()
    ((batch,),) = (tuple(reader.read(unit)) for unit in reader.plan(str(path), path.stat().st_size, 1 << 20))
    return batch


def flags(batch: Batch, name: str) -> list[bool | None]:
    values: list[bool | None] = batch.rows.column(name).to_pylist()
    return values


def reasons(batch: Batch) -> list[str]:
    texts: list[str] = batch.rejected.column("reason").to_pylist()
    return texts


@pytest.mark.parametrize("kind", ["csv", "parquet"])
class TestEveryKindOfColumn:
    def test_a_share_below_the_limit_is_a_skip_and_the_limit_can_be_set(self, tmp_path: Path, kind: str) -> None:
        rows: list[dict[str, object]] = [{"share_listened": share} for share in (0.49, 0.5, 1.0, 5e-05, None, 1.2)]
        batch = read(tmp_path, kind, rows)
        assert flags(batch, columns.SKIPPED) == [True, False, False, True, None]
        assert reasons(batch) == ["share_listened is not a number from 0 to 1"]
        assert flags(read(tmp_path, kind, rows, skip_below=0.2), columns.SKIPPED) == [False, False, False, True, None]

    def test_milliseconds_count_against_the_duration_and_without_one_against_thirty_seconds(
        self, tmp_path: Path, kind: str
    ) -> None:
        rows: list[dict[str, object]] = [
            {"ms_played": 99_000, "duration_ms": 200_000},
            {"ms_played": 101_000, "duration_ms": 200_000},
            {"ms_played": 29_000, "duration_ms": None},
            {"ms_played": 31_000, "duration_ms": 0},
            {"ms_played": -4, "duration_ms": 1},
        ]
        batch = read(tmp_path, kind, rows)
        assert flags(batch, columns.SKIPPED) == [True, False, True, False]
        assert reasons(batch) == ["ms_played is not a number of at least 0"]

    def test_an_explicit_skip_flag_comes_before_shares(self, tmp_path: Path, kind: str) -> None:
        batch = read(
            tmp_path,
            kind,
            [
                {"skipped": False, "share_listened": 0.1},
                {"skipped": True, "share_listened": 0.9},
                {"skipped": None, "share_listened": 0.1},
            ],
        )
        assert flags(batch, columns.SKIPPED) == [False, True, True]

    def test_events_are_plays_skips_and_likes_and_others_are_rejected(self, tmp_path: Path, kind: str) -> None:
        events = ["play", "Skip", "like", "listen", None, "dislike"]
        batch = read(tmp_path, kind, [{"event_type": event, "liked": event == "listen"} for event in events])
        assert flags(batch, columns.SKIPPED) == [None, True, None, None, None]
        assert flags(batch, columns.IS_PLAY) == [True, True, False, True, True]
        assert flags(batch, columns.LIKED) == [False, False, True, True, False]
        assert reasons(batch) == ["event is not a play, skip or like"]

    def test_flags_stay_empty_where_nothing_is_skipped_or_liked(self, tmp_path: Path, kind: str) -> None:
        batch = read(tmp_path, kind, [{"event_type": "play", "liked": False}, {"event_type": None, "liked": None}])
        for name in (columns.SKIPPED, columns.LIKED, columns.IS_PLAY):
            assert flags(batch, name) == [None, None]


def test_skips_of_a_yambda_table_follow_the_share_that_is_set(tmp_path: Path) -> None:
    path = tmp_path / "listens.parquet"
    pq.write_table(
        pa.table({"uid": [1, 1], "item_id": [2, 3], "timestamp": [5, 10], "played_ratio_pct": [40, 90]}), path
    )
    for share, expected in ((0.5, [True, False]), (0.3, [False, False]), (1.0, [True, True])):
        reader = ImportConfig(format="yambda", paths=(str(path),), skip_below=share).reader()
        (unit,) = reader.plan(str(path), 0, 1 << 20)
        (batch,) = reader.read(unit)
        assert flags(batch, columns.SKIPPED) == expected


def test_columns_of_skips_and_likes_are_guessed_by_name_and_events_by_their_values(tmp_path: Path) -> None:
    path = tmp_path / "plays.csv"
    header = "user_id,track_id,ts,Event Type,completion_rate,msPlayed,track_duration_ms,is_liked"
    path.write_text(f"{header}\nann,s1,{START},skip,0.3,5,10,true\n")
    assert guess_import([str(path)]).columns == {
        "user": "user_id",
        "song": "track_id",
        "played_at": "ts",
        "event_type": "Event Type",
        "share_listened": "completion_rate",
        "ms_played": "msPlayed",
        "duration_ms": "track_duration_ms",
        "liked": "is_liked",
    }
    path.write_text(f"user_id,track_id,ts,action\nann,s1,{START},opened\n")
    assert "event_type" not in guess_import([str(path)]).columns
