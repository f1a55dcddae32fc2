"""Lines of songs without times."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.errors import DamagedInputError
from rayrec.importing.readers import FORMATS, sequences
from rayrec.importing.readers.reader import Batch, ReadOptions


def read(path: Path, content: str | bytes, unit_bytes: int = 1 << 20, **options: Any) -> list[Batch]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    reader = FORMATS["sequences"].make(ReadOptions(**options))
    units = reader.plan(str(path), path.stat().st_size, unit_bytes)
    return [batch for unit in units for batch in reader.read(unit)]


def plays(batches: list[Batch]) -> list[tuple[str, str, int, int]]:
    """(user, song, place in the line, line) of each play."""
    rows = pa.concat_tables([batch.rows for batch in batches]).to_pylist()
    return [(row["user_id"], row["song_id"], row["played_at"], row["line"]) for row in rows]


def rejected_rows(batches: list[Batch]) -> list[tuple[int, str, str]]:
    rows = pa.concat_tables([batch.rejected for batch in batches]).to_pylist()
    return [(row["line"], row["reason"], row["text"]) for row in rows]


def test_a_history_a_line_keeps_order_and_repeats(tmp_path: Path) -> None:
    batches = read(tmp_path / "h.lst", "ann,7:5:7\nbob, 3\r\n", user_separator=",", song_separator=":")
    assert plays(batches) == [("ann", "7", 0, 1), ("ann", "5", 1, 1), ("ann", "7", 2, 1), ("bob", "3", 0, 2)]
    assert rejected_rows(batches) == []
    assert (batches[0].rows.schema, batches[0].read, batches[0].lines) == (columns.PLAYS, 4, 2)
    assert batches[0].rows.column("source").to_pylist() == [str(tmp_path / "h.lst")] * 4


def test_without_a_user_each_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    batches = read(tmp_path / "day.txt", "\ufeff1 2\n3 4 3 ", unit_bytes=4)
    assert plays(batches) == [
        ("day.txt:1", "1", 0, 1),
        ("day.txt:1", "2", 1, 1),
        ("day.txt:2", "3", 0, 2),
        ("day.txt:2", "4", 1, 2),
        ("day.txt:2", "3", 2, 2),
    ]


def test_without_a_separator_all_lines_are_those_of_the_user_that_is_given(tmp_path: Path) -> None:
    for unit_bytes in (4, 1 << 20):
        batches = read(tmp_path / "day.txt", "1 2\n3 4\n", unit_bytes, user="ann")
        rows = [(user, song, place) for user, song, place, _ in plays(batches)]
        assert rows == [("ann", "1", 0), ("ann", "2", 1), ("ann", "3", 0), ("ann", "4", 1)]


def test_bad_lines_and_items_are_rejected_with_their_reasons(tmp_path: Path) -> None:
    content = "a,1:2\n\nno separator\n ,1:2\nb,3::4:\n  \nc,\nd,5:\xff".encode("latin-1") + b"\ne,6\n"
    batches = read(tmp_path / "h.lst", content, user_separator=",", song_separator=":")
    assert [(user, song) for user, song, _, _ in plays(batches)] == [
        ("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"), ("e", "6")
    ]  # fmt: skip
    assert rejected_rows(batches) == [
        (2, "empty line", ""),
        (3, "no ',' between user and songs", "no separator"),
        (4, "no user", " ,1:2"),
        (5, "no song", "b,3::4:"),
        (5, "no song", "b,3::4:"),
        (6, "empty line", "  "),
        (7, "no song", "c,"),
        (8, "not UTF-8", "d,5:\ufffd"),
    ]
    assert sum(batch.read for batch in batches) == 13
    assert sum(batch.lines for batch in batches) == 9


def test_a_user_is_what_stands_before_the_first_separator_even_where_both_are_the_same(tmp_path: Path) -> None:
    assert plays(read(tmp_path / "h.txt", "ann 1 2", user_separator=" ")) == [("ann", "1", 0, 1), ("ann", "2", 1, 1)]
    assert plays(read(tmp_path / "h.txt", "ann=>x, y", user_separator="=>", song_separator=",")) == [
        ("ann", "x", 0, 1),
        ("ann", "y", 1, 1),
    ]


@pytest.mark.parametrize("user_separator", ["", "|"])
def test_units_and_blocks_of_any_size_give_the_same_plays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user_separator: str
) -> None:
    random = np.random.default_rng(3)
    lines = [
        f"u{row}|" * bool(user_separator) + " ".join(map(str, random.integers(500, size=random.integers(1, 30))))
        for row in range(60)
    ]
    full = read(tmp_path / "h.txt", "\n".join(lines), user_separator=user_separator)
    monkeypatch.setattr(sequences, "BLOCK_BYTES", 50)
    pieces = read(tmp_path / "h.txt", "\n".join(lines), unit_bytes=700, user_separator=user_separator)
    assert len(pieces) > 5
    assert [row[:3] for row in plays(pieces)] == [row[:3] for row in plays(full)]
    expected = [song for line in lines for song in line.split("|")[-1].split(" ")]
    assert [song for _, song, _, _ in plays(full)] == expected


def test_an_empty_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DamagedInputError, match=r"h\.txt is empty"):
        read(tmp_path / "h.txt", "")
    assert [batch.read for batch in read(tmp_path / "h.txt", "\n")] == [1]
