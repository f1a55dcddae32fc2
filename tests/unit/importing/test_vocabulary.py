"""The song vocabulary."""

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.errors import RayrecError
from rayrec.importing import vocabulary
from rayrec.importing.vocabulary import FIRST_POSITION, SongMerger, SongRows, Vocabulary, first_songs, song_keys


def songs(*ids: str, titles: list[str | None] | None = None) -> pa.Table:
    given = titles or [None] * len(ids)
    rows = pa.table(
        {"song_id": list(ids), "title": pa.array(given, pa.string()), "artist": pa.nulls(len(ids), pa.string())}
    )
    return first_songs(rows)


def vocabulary_of(*tables: pa.Table, existing: pa.Table | None = None) -> Vocabulary:
    """The vocabulary of `tables`, which are given in the order of import."""
    placed = []
    for number, table in enumerate(tables):
        places = pa.array(np.arange(len(table), dtype=np.int64) + (number << 32))
        placed.append(table.set_column(table.column_names.index(FIRST_POSITION), FIRST_POSITION, places))
    return Vocabulary(existing, placed)


def ids(found: Vocabulary) -> list[str]:
    return found.table().column("song_id").to_pylist()


def test_songs_stand_in_the_order_in_which_they_first_appear() -> None:
    found = vocabulary_of(songs("b", "a", "b"), songs("c", "a"), songs("0"))
    assert ids(found) == ["b", "a", "c", "0"]
    assert found.table().schema == columns.SONGS_TABLE
    assert found.table().column("song").to_pylist() == [0, 1, 2, 3]


def test_merging_early_and_late_give_the_same_songs(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    tables = [songs(*(f"s{number}" for number in random.integers(0, 200, 30))) for _ in range(40)]
    late, early = SongMerger(), SongMerger()
    for table in tables:
        late.add(table)
    monkeypatch.setattr(vocabulary, "MERGE_ROWS", 1)
    for table in tables:
        early.add(table)
    assert early.table().equals(late.table())
    assert len(set(late.table().column("song_id").to_pylist())) == len(late.table())


def test_a_title_is_the_first_one_given() -> None:
    found = vocabulary_of(songs("a", "a", titles=[None, "first"]), songs("a", titles=["second"]))
    assert found.table().column("title").to_pylist() == ["first"]


def test_existing_rows_never_change_and_new_songs_are_appended() -> None:
    first = vocabulary_of(songs("a", "b"))
    second = vocabulary_of(songs("z", "b"), existing=first.table())
    assert ids(second) == ["a", "b", "z"]
    second.keep(np.array([False, False, False]))
    assert ids(second) == ["a", "b"]


def test_ids_may_take_more_than_2_gib_and_are_written_in_pieces_that_readers_hold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = vocabulary_of(songs(*(f"s{number}" for number in range(10))))
    assert {found._songs.schema.field(name).type for name in ("song_id", "title", "artist")} == {pa.large_string()}
    monkeypatch.setattr(vocabulary, "ROWS_PER_ARRAY", 3)
    table = found.table()
    assert table.schema == columns.SONGS_TABLE
    assert max(len(chunk) for chunk in table.column("song_id").chunks) == 3
    assert table.column("song").to_pylist() == list(range(10))
    assert ids(vocabulary_of(songs("s3", "new"), existing=table)) == [*(f"s{number}" for number in range(10)), "new"]


def test_rows_are_found_by_key_and_unknown_songs_are_minus_one() -> None:
    found = vocabulary_of(songs(*(f"s{number}" for number in range(100))))
    rows = SongRows.of(found.keys)
    wanted = song_keys(pa.array(["s42", "nobody", "s0", "s99"]))
    assert rows.find(wanted).tolist() == [42, -1, 0, 99]
    assert rows.find(wanted).dtype == np.int32
    assert SongRows.of(np.zeros(0, np.uint64)).find(wanted).tolist() == [-1] * 4


def test_every_key_falls_into_a_range() -> None:
    keys = np.array([0, 2**32, 2**63, 2**64 - 1], dtype=np.uint64)
    assert vocabulary.range_of(keys, 5).tolist() == [0, 0, 2, 4]
    assert [vocabulary.key_ranges(buckets) for buckets in (1, 16, 512, 4096)] == [1, 1, 2, 16]


def test_song_keys_never_change() -> None:
    # Staged fragments of a killed import depend on the keys.
    assert song_keys(pa.array(["spotify:track:a"])).tolist() == [5665356852961450735]


def test_two_songs_with_one_key_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "song_keys", lambda song_ids: np.zeros(len(song_ids), np.uint64))
    with pytest.raises(RayrecError, match="same 64-bit key"):
        vocabulary_of(songs("a"), songs("b"))
