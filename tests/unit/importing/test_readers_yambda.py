"""Listens of the Yambda data set."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.errors import InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions


def test_listens_keep_their_times_and_say_whether_they_were_recommended_and_skipped(tmp_path: Path) -> None:
    listens = {
        "uid": pa.array([10, 20, None], pa.uint32()),
        "timestamp": pa.array([15_929_455, 18_111_700, 5], pa.uint32()),
        "item_id": pa.array([6_928_395, 6_417_612, 1], pa.uint32()),
        "is_organic": pa.array([1, 0, 1], pa.uint8()),
        "played_ratio_pct": pa.array([100, 49, 3], pa.uint16()),
        "track_length_seconds": pa.array([200, 180, 9], pa.uint32()),
    }
    path = tmp_path / "listens.parquet"
    pq.write_table(pa.table(listens), path)
    reader = FORMATS["yambda"].make(ReadOptions())
    (batch,) = [batch for unit in reader.plan(str(path), 0, 1 << 20) for batch in reader.read(unit)]
    rows = batch.rows.to_pylist()
    assert [(row["user_id"], row["song_id"], row["played_at"]) for row in rows] == [
        ("10", "6928395", 15_929_455_000),
        ("20", "6417612", 18_111_700_000),
    ]
    assert [(row["contexts"], row["skipped"]) for row in rows] == [(["organic"], False), (["recommended"], True)]
    assert batch.rejected.column("reason").to_pylist() == ["no user"]


def test_another_table_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": [1]}), tmp_path / "listens.parquet")
    with pytest.raises(InputError, match="no column 'item_id' or 'timestamp'; it has uid; check the format"):
        FORMATS["yambda"].make(ReadOptions()).plan(str(tmp_path / "listens.parquet"), 0, 1)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("uid", [[1]]),
        ("item_id", [{"id": 1}]),
        ("timestamp", [True]),
        ("is_organic", [[1]]),
        ("played_ratio_pct", ["all"]),
    ],
)
def test_a_column_of_another_type_is_named_with_its_file(column: str, values: list[Any], tmp_path: Path) -> None:
    listens = {"uid": [1], "timestamp": [5], "item_id": [2], "is_organic": [1], "played_ratio_pct": [9]}
    path = tmp_path / "listens.parquet"
    pq.write_table(pa.table({**listens, column: values}), path)
    reader = FORMATS["yambda"].make(ReadOptions())
    (unit,) = reader.plan(str(path), 0, 1 << 20)
    with pytest.raises(InputError, match=f"{path}: column '{column}' holds"):
        list(reader.read(unit))


def test_is_organic_in_words_is_read_and_an_invalid_value_rejects_only_its_row(tmp_path: Path) -> None:
    listens = {"uid": [1, 2, 3], "timestamp": [5] * 3, "item_id": [2] * 3, "is_organic": ["True", "false", "often"]}
    path = tmp_path / "listens.parquet"
    pq.write_table(pa.table(listens), path)
    reader = FORMATS["yambda"].make(ReadOptions())
    (batch,) = [batch for unit in reader.plan(str(path), 0, 1 << 20) for batch in reader.read(unit)]
    assert batch.rows.column("contexts").to_pylist() == [["organic"], ["recommended"]]
    assert batch.rejected.column("reason").to_pylist() == ["is_organic is not true, false, 1 or 0"]
