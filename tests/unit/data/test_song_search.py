"""Songs are found by words of title and artist, the best fit first."""

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayrec.data import catalog as catalog_module
from rayrec.data import columns
from rayrec.data.catalog import Catalog, SongSearch, fold, fold_all, popularity_positions

SONGS: list[tuple[str | None, str | None]] = [
    ("Hollow", "Abba"),
    ("Hollow Engine", "Björk"),
    ("The Hollow", "Abba"),
    ("ABBA", "Someone"),
    ("Straße", "Sigur Rós"),
    (None, None),
    ("Hollow", None),
]


def catalog(songs: list[tuple[str | None, str | None]] = SONGS) -> Catalog:
    data = {
        columns.SONG: pa.array(range(len(songs)), pa.int32()),
        columns.SONG_ID: [f"id-{row}" for row in range(len(songs))],
        columns.TITLE: pa.array([title for title, _ in songs], pa.string()),
        columns.ARTIST: pa.array([artist for _, artist in songs], pa.string()),
    }
    return Catalog(pa.table(data, schema=columns.SONGS_TABLE))


def find_rows(query: str, popularity: list[int] | None = None, limit: int = 10) -> list[int]:
    ranks = None if popularity is None else popularity_positions(np.array(popularity))
    rows, _ = SongSearch(catalog(), ranks).find(query, limit)
    assert rows.dtype == np.int32
    return rows.tolist()


def test_an_equal_title_comes_before_a_prefix_and_a_prefix_before_the_rest() -> None:
    assert find_rows("hollow") == [0, 6, 1, 2]


def test_songs_that_fit_equally_well_come_by_popularity() -> None:
    assert find_rows("hollow", [1, 9, 9, 0, 0, 0, 5]) == [6, 0, 1, 2]


def test_title_and_artist_both_count() -> None:
    assert set(find_rows("abba")) == {0, 2, 3}
    assert find_rows("abba hollow") == find_rows("hollow abba")
    assert set(find_rows("abba hollow")) == {0, 2}


@pytest.mark.parametrize(
    ("query", "row"),
    [("bjork", 1), ("BJÖRK", 1), ("sigur ros", 4), ("strasse", 4), ("STRASSE", 4), ("  engine\thollow ", 1)],
)
def test_case_accents_and_spaces_do_not_matter(query: str, row: int) -> None:
    assert find_rows(query) == [row]


@pytest.mark.parametrize("name", ["लता मंगेशकर", "ลำไย ไหทองคำ", "இளையராஜா", "অরিজিৎ সিং", "សិន ស៊ីសាមុត", "ハナ", "שָׁלוֹם"])
def test_names_in_every_script_are_found(name: str) -> None:
    songs = catalog([("Other", "Somebody"), (name, name)])
    assert SongSearch(songs).find(name, 5)[0].tolist() == [1]
    assert fold_all(pa.array([name]))[0].as_py() == fold(name)


@pytest.mark.parametrize(("one", "other"), [("กี", "กู"), ("ババ", "ハハ"), ("कि", "कु")])
def test_names_that_differ_in_a_mark_that_belongs_to_a_letter_differ(one: str, other: str) -> None:
    assert fold(one) != fold(other)


def test_a_song_without_a_title_is_found_by_its_id() -> None:
    assert find_rows("id-5") == [5]
    assert find_rows("id-0") == []


@pytest.mark.parametrize("query", ["", "   ", "́"])
def test_an_empty_query_finds_nothing(query: str) -> None:
    assert find_rows(query) == []


def test_characters_of_patterns_have_no_special_meaning() -> None:
    assert find_rows(".*") == []
    assert find_rows("h[o") == []


def test_the_limit_cuts_the_rows_but_not_the_count() -> None:
    rows, count = SongSearch(catalog()).find("hollow", 2)
    assert (rows.tolist(), count) == ([0, 6], 4)


def test_an_empty_catalog_finds_nothing() -> None:
    assert SongSearch(catalog([])).find("a", 5)[1] == 0


@settings(max_examples=200)
@given(st.text(st.characters(categories=["L", "M", "N", "P"], include_characters=" \t\n"), max_size=20))
def test_one_text_folds_as_a_column_does(text: str) -> None:
    # Characters whose casefold is not their lower case are left out, except for ß and ς.
    plain_text = "".join(
        char
        for char in text
        if all(part.casefold() == part.lower() or part in "ßς" for part in unicodedata.normalize("NFKD", char))
    )
    assert fold_all(pa.array([plain_text]))[0].as_py() == fold(plain_text)


@settings(max_examples=150)
@given(
    songs=st.lists(
        st.tuples(st.text("ab ", max_size=4) | st.none(), st.text("ab ", max_size=4) | st.none()), max_size=20
    ),
    query=st.text("ab ", max_size=3),
    limit=st.integers(1, 8),
    data=st.data(),
)
def test_finding_equals_a_plain_loop(
    songs: list[tuple[str | None, str | None]], query: str, limit: int, data: st.DataObject
) -> None:
    plays = data.draw(st.lists(st.integers(0, 3), min_size=len(songs), max_size=len(songs)))
    sort_keys = []
    for row, (title, artist) in enumerate(songs):
        parts = [fold(f"id-{row}" if title is None else title), fold(artist or "")]
        folded_query = fold(query)
        if not folded_query or not all(word in "\n".join(parts) for word in folded_query.split()):
            continue
        match_level = max(2 if part == folded_query else 1 if part.startswith(folded_query) else 0 for part in parts)
        sort_keys.append((-match_level, -plays[row], row))
    search = SongSearch(catalog(songs), popularity_positions(np.array(plays, dtype=np.int64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog_module, "SLICE", data.draw(st.sampled_from([3, 100])))  # several slices, or one
        rows, count = search.find(query, limit)
    assert rows.tolist() == [row for *_, row in sorted(sort_keys)][:limit]
    assert count == len(sort_keys)
