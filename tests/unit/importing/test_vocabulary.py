"""The song vocabulary."""

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.errors import RayrecError
from rayrec.importing import vocabulary
from rayrec.importing.vocabulary import (
    FIRST_POSITION,
    SongMerger,
    SongRows,
    Vocabulary,
    first_songs,
    merge_songs,
    song_keys,
)


def songs(*song_ids: str, titles: list[str | None] | None = None) -> pa.Table:
    all_titles = titles or [None] * len(song_ids)
    rows = pa.table(
        {
            "song_id": list(song_ids),
            "title": pa.array(all_titles, pa.string()),
            "artist": pa.nulls(len(song_ids), pa.string()),
        }
    )
    return first_songs(rows)


def vocabulary_of(*tables: pa.Table, existing: pa.Table | None = None) -> Vocabulary:
    """The vocabulary of `tables`, which are given in the order of import."""
    positioned_tables = []
    for number, table in enumerate(tables):
        positions = pa.array(np.arange(len(table), dtype=np.int64) + (number << 32))
        positioned_tables.append(table.set_column(table.column_names.index(FIRST_POSITION), FIRST_POSITION, positions))
    return Vocabulary(existing, positioned_tables)


def song_ids(result: Vocabulary) -> list[str]:
    return result.table().column("song_id").to_pylist()


def test_songs_stand_in_the_order_in_which_they_first_appear() -> None:
    result = vocabulary_of(songs("b", "a", "b"), songs("c", "a"), songs("0"))
    assert song_ids(result) == ["b", "a", "c", "0"]
    assert result.table().schema == columns.SONGS_TABLE
    assert result.table().column("song").to_pylist() == [0, 1, 2, 3]


def test_merging_early_and_late_give_the_same_songs(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    tables = [songs(*(f"s{number}" for number in random.integers(0, 200, 30))) for _ in range(40)]
    late_merger, early_merger = SongMerger(), SongMerger()
    for table in tables:
        late_merger.add(table)
    monkeypatch.setattr(vocabulary, "MERGE_ROWS", 1)
    for table in tables:
        early_merger.add(table)
    assert early_merger.table().equals(late_merger.table())
    assert len(set(late_merger.table().column("song_id").to_pylist())) == len(late_merger.table())


def test_a_title_is_the_first_one_given() -> None:
    result = vocabulary_of(songs("a", "a", titles=[None, "first"]), songs("a", titles=["second"]))
    assert result.table().column("title").to_pylist() == ["first"]


def test_existing_rows_never_change_and_new_songs_are_appended() -> None:
    first = vocabulary_of(songs("a", "b"))
    second = vocabulary_of(songs("z", "b"), existing=first.table())
    assert song_ids(second) == ["a", "b", "z"]
    second.keep(np.array([False, False, False]))
    assert song_ids(second) == ["a", "b"]


def test_ids_may_take_more_than_2_gib_and_are_written_in_pieces_that_readers_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged_songs = merge_songs([songs("a"), songs("b")])
    assert {merged_songs.schema.field(name).type for name in ("song_id", "title", "artist")} == {pa.large_string()}
    result = vocabulary_of(songs(*(f"s{number}" for number in range(10))))
    monkeypatch.setattr(vocabulary, "ROWS_PER_ARRAY", 3)
    table = result.table()
    assert table.schema == columns.SONGS_TABLE
    assert max(len(chunk) for chunk in table.column("song_id").chunks) == 3
    assert table.column("song").to_pylist() == list(range(10))
    assert song_ids(vocabulary_of(songs("s3", "new"), existing=table)) == [
        *(f"s{number}" for number in range(10)),
        "new",
    ]


def test_rows_are_found_by_key_and_unknown_songs_are_minus_one() -> None:
    result = vocabulary_of(songs(*(f"s{number}" for number in range(100))))
    rows = SongRows.of(result.keys)
    keys = song_keys(pa.array(["s42", "nobody", "s0", "s99"]))
    assert rows.find(keys).tolist() == [42, -1, 0, 99]
    assert rows.find(keys).dtype == np.int32
    assert SongRows.of(np.zeros(0, np.uint64)).find(keys).tolist() == [-1] * 4


def test_every_key_falls_into_a_range() -> None:
    keys = np.array([0, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
    assert vocabulary.range_of(keys, 5).tolist() == [0, 0, 2, 4]
    assert [vocabulary.key_ranges(buckets) for buckets in (1, 16, 512, 4096)] == [1, 1, 2, 16]


def test_song_keys_never_change() -> None:
    # Staged fragments of a killed import depend on the keys.
    assert song_keys(pa.array(["spotify:track:a"])).tolist() == [5665356852961450735]


def test_two_songs_with_one_key_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "song_keys", lambda song_ids: np.zeros(len(song_ids), np.uint64))
    with pytest.raises(RayrecError, match="song IDs 'a' and 'b' have the same 64-bit key; rename one"):
        vocabulary_of(songs("a"), songs("b"))
