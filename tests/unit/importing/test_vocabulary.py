"""The song vocabulary."""

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.errors import RayrecError
from rayrec.importing import vocabulary
from rayrec.importing.vocabulary import SongRows, Vocabulary, first_songs, song_keys


def songs(*ids: str, titles: list[str | None] | None = None) -> pa.Table:
    given = titles or [None] * len(ids)
    rows = pa.table(
        {"song_id": list(ids), "title": pa.array(given, pa.string()), "artist": pa.nulls(len(ids), pa.string())}
    )
    return first_songs(rows)


def ids(found: Vocabulary) -> list[str]:
    return found.table().column("song_id").to_pylist()


def test_songs_stand_in_the_order_in_which_they_first_appear() -> None:
    found = Vocabulary()
    found.add([songs("b", "a", "b"), songs("c", "a"), songs("0")])
    assert ids(found) == ["b", "a", "c", "0"]
    assert found.table().schema == columns.SONGS_TABLE
    assert found.table().column("song").to_pylist() == [0, 1, 2, 3]


def test_merging_early_and_late_give_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    tables = [songs(*(f"s{number}" for number in random.integers(0, 200, 30))) for _ in range(40)]
    late = Vocabulary()
    late.add(tables)
    monkeypatch.setattr(vocabulary, "COMPACT_ROWS", 1)
    early = Vocabulary()
    early.add(tables)
    assert ids(early) == ids(late)
    assert len(set(ids(late))) == len(ids(late))


def test_a_title_is_the_first_one_given() -> None:
    found = Vocabulary()
    found.add([songs("a", "a", titles=[None, "first"]), songs("a", titles=["second"])])
    assert found.table().column("title").to_pylist() == ["first"]


def test_existing_rows_never_change_and_new_songs_are_appended() -> None:
    first = Vocabulary()
    first.add([songs("a", "b")])
    second = Vocabulary(first.table())
    second.add([songs("z", "b")])
    assert ids(second) == ["a", "b", "z"]
    second.keep(np.array([False, False, False]))
    assert ids(second) == ["a", "b"]


def test_rows_are_found_by_key_and_unknown_songs_are_minus_one() -> None:
    found = Vocabulary()
    found.add([songs(*(f"s{number}" for number in range(100)))])
    rows = SongRows.of(found.keys)
    wanted = song_keys(pa.array(["s42", "nobody", "s0", "s99"]))
    assert rows.find(wanted).tolist() == [42, -1, 0, 99]
    assert rows.find(wanted).dtype == np.int32
    assert SongRows.of(np.zeros(0, np.uint64)).find(wanted).tolist() == [-1] * 4


def test_song_keys_never_change() -> None:
    # Staged fragments of a killed import depend on them.
    assert song_keys(pa.array(["spotify:track:a"])).tolist() == [5665356852961450735]


def test_two_songs_with_one_key_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "song_keys", lambda song_ids: np.zeros(len(song_ids), np.uint64))
    found = Vocabulary()
    found.add([songs("a"), songs("b")])
    with pytest.raises(RayrecError, match="same 64-bit key"):
        found.table()
