"""Ids, texts and lists of input files are spelled by one rule each, for every column type."""

from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayrec.data.spelling import (
    NOT_UTF8,
    Problems,
    name_song,
    name_songs,
    spell_artists,
    spell_id,
    spell_ids,
    spell_lists,
    spell_text,
    spell_texts,
    spell_value,
    spell_values,
)
from rayrec.errors import InputError


def ids_and_reasons(values: pa.Array) -> tuple[list[str | None], list[str]]:
    problems = Problems(len(values))
    spelled = spell_ids(values, problems, column="user", reason="no user")
    return [None if is_bad else text for text, is_bad in zip(spelled.to_pylist(), problems.bad, strict=True)], (
        problems.reasons()
    )


@pytest.mark.parametrize(
    "values",
    [
        pa.array([16, 1 << 60]),
        pa.array([16, 1 << 60], pa.uint64()),
        pa.array([16.0, float(1 << 60)]),
        pa.array(["16", str(1 << 60)]),
        pa.array(["16.0", "1.152921504606847e+18"]),  # as pandas writes a column of floats
        pa.array([" 16\t", f"\u2009{1 << 60}\x85"], pa.large_string()),
        pa.array(["16", str(1 << 60)], pa.string_view()),
        pa.array([b"16", str(1 << 60).encode()]),
        pa.array(["16", str(1 << 60)]).dictionary_encode(),
        pa.array([Decimal("16.00"), Decimal(1 << 60)], pa.decimal128(30, 2)),
    ],
    ids=lambda values: str(values.type),
)
def test_whole_numbers_are_spelled_the_same_whatever_the_column_holds(values: pa.Array) -> None:
    assert ids_and_reasons(values) == (["16", str(1 << 60)], [])


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a", None]),
        pa.array(["a", " "]),
        pa.array(["a", "nan"]),
        pa.array(["a", "NaN"]),
        pa.array(["a", "inf"]),
    ],
)
def test_what_is_no_id_is_marked_in_text(values: pa.Array) -> None:
    assert ids_and_reasons(values) == (["a", None], ["no user"])


def test_an_id_that_no_request_can_hold_is_marked() -> None:
    assert ids_and_reasons(pa.array(["ü" * 512, "ü" * 513])) == (
        ["ü" * 512, None],
        ["ID is longer than 512 characters"],
    )


def test_what_is_no_id_is_marked_among_numbers() -> None:
    values = pa.array([16.0, np.nan, np.inf, -np.inf, None, 16.5], from_pandas=False)
    assert ids_and_reasons(values) == (["16", None, None, None, None, "16.5"], ["no user"] * 4)


def test_names_keep_their_letters_and_zeros() -> None:
    names = ["007", "1.10", "Ärger 2.0", "a b", "e+10", "1e5", "null", "\N{DROMEDARY CAMEL}"]
    assert ids_and_reasons(pa.array(names)) == (names, [])


def test_bytes_that_are_not_utf8_are_marked_by_themselves() -> None:
    assert ids_and_reasons(pa.array([b"u", b"\xff\xfe", "ü".encode()])) == (["u", None, "ü"], [NOT_UTF8])
    invalid = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff")]
    )
    assert ids_and_reasons(invalid) == (["a", None], [NOT_UTF8])


@pytest.mark.parametrize(
    "values",
    [pa.array([["a"]]), pa.array([{"id": 1}]), pa.array([True]), pa.array([1], pa.timestamp("s"))],
    ids=lambda values: str(values.type),
)
def test_a_type_that_holds_no_ids_is_an_error_that_names_the_column(values: pa.Array) -> None:
    with pytest.raises(InputError, match=r"column 'user' holds .*; expected text or numbers"):
        ids_and_reasons(values)


@given(
    st.lists(
        st.one_of(
            st.integers(-(2**63), 2**63 - 1).map(str),
            st.floats(allow_nan=True).map(str),
            st.floats(allow_nan=True).map(lambda value: f"{value:.1f}"),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_a_query_spells_an_id_as_an_import_does(texts: list[str]) -> None:
    assert ids_and_reasons(pa.array(texts, pa.string()))[0] == [spell_id(text) for text in texts]


@pytest.mark.parametrize("value", [b" 7.0", b"007", "ü".encode(), b"\xff", b" ", b"nan"], ids=repr)
def test_bytes_of_a_query_are_spelled_as_an_import_does(value: bytes) -> None:
    assert ids_and_reasons(pa.array([value]))[0] == [spell_id(value)]


def test_a_uuid_of_a_query_is_spelled_as_an_import_does() -> None:
    value = UUID("6BA7B810-9DAD-11D1-80B4-00C04FD430C8")
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([value.bytes], pa.binary(16)))
    assert ids_and_reasons(uuids)[0] == [spell_id(value)] == ["6ba7b810-9dad-11d1-80b4-00c04fd430c8"]


@given(st.lists(st.floats() | st.none(), min_size=1, max_size=8))
def test_a_number_out_of_json_is_spelled_as_one_out_of_parquet(values: list[float | None]) -> None:
    assert ids_and_reasons(pa.array(values, pa.float64(), from_pandas=False))[0] == [
        spell_id(value) for value in values
    ]


@pytest.mark.parametrize("value", [np.int64(7), np.uint8(7), np.float32(7), np.float64(7), np.str_("7")], ids=repr)
def test_an_id_out_of_a_column_of_pandas_is_spelled_as_a_plain_one(value: Any) -> None:
    assert spell_id(value) == "7"


@pytest.mark.parametrize("value", [None, "", " ", True, [], {}, float("nan"), float("inf"), "NaN"])
def test_what_is_no_id_in_json_is_none(value: Any) -> None:
    assert spell_id(value) is None


@pytest.mark.parametrize("text", ["DE|FR", "DE | FR", " DE|| FR |", "\tDE |FR\n"])
def test_listed_values_are_split_and_trimmed(text: str) -> None:
    problems = Problems(1)
    assert spell_lists(pa.array([text]), problems, column="markets").to_pylist() == [["DE", "FR"]]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.large_string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.list_(pa.string_view()),
        pa.list_view(pa.string()),
    ],
    ids=str,
)
def test_lists_of_every_type_are_taken_as_they_are(kind: pa.DataType) -> None:
    values = pa.array([["DE", " FR "], [], None, ["", None, "SE"]], pa.list_(pa.string()))
    if pa.types.is_list_view(kind):
        values = pa.array(values.to_pylist(), kind)
    else:
        flat = pa.array(["DE", " FR ", "", None, "SE"])
        flat = flat.dictionary_encode() if pa.types.is_dictionary(kind.value_type) else flat.cast(kind.value_type)
        array_type = pa.LargeListArray if pa.types.is_large_list(kind) else pa.ListArray
        offsets = pa.array([0, 2, 2, 2, 5], pa.int64() if pa.types.is_large_list(kind) else pa.int32())
        values = array_type.from_arrays(offsets, flat, mask=pa.array([False, False, True, False]))
    result = spell_lists(values, Problems(4), column="markets")
    assert result.type == pa.list_(pa.string())
    assert result.to_pylist() == [["DE", "FR"], [], None, ["SE"]]


def test_titles_of_numbers_are_text_and_nan_is_a_title_only_as_text() -> None:
    assert spell_texts(pa.array([1999.0, np.nan], from_pandas=False), Problems(2), column="t").to_pylist() == [
        "1999",
        None,
    ]
    assert spell_texts(pa.array(["nan", " A ", ""]), Problems(3), column="t").to_pylist() == ["nan", "A", None]


TITLES = ["2.0", " 22.00 ", "-0.0", "1e+16", "Ärger 2.0", None]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(TITLES),
        pa.array(TITLES, pa.string_view()),
        pa.array(TITLES).cast(pa.binary()),
        pa.array(TITLES).dictionary_encode(),
    ],
    ids=lambda values: str(values.type),
)
def test_a_title_that_reads_as_a_number_stays_as_it_is_like_in_json(values: pa.Array) -> None:
    result = spell_texts(values, Problems(6), column="title")
    assert result.to_pylist() == ["2.0", "22.00", "-0.0", "1e+16", "Ärger 2.0", None]
    assert result.to_pylist() == [spell_text(title) for title in TITLES]


@pytest.mark.parametrize("values", [pa.array([2.0, 16.5, None]), pa.array([2.0, 16.5, None]).dictionary_encode()])
def test_numbers_as_titles_are_the_same_from_parquet_and_json(values: pa.Array) -> None:
    result = spell_texts(values, Problems(3), column="title").to_pylist()
    assert result == ["2", "16.5", None] == [spell_text(title) for title in (2.0, 16.5, None)]


def test_a_song_is_known_by_the_same_name_from_a_table_and_from_json() -> None:
    artists = spell_texts(pa.array(["1975.0", None, " B "]), Problems(3), column="artist")
    titles = spell_texts(pa.array(["2.0", "2.0", "2"]), Problems(3), column="title")
    names = spell_ids(
        name_songs(pa.nulls(3, pa.string()), artists, titles), Problems(3), column="title", reason="no song"
    )
    assert names.to_pylist() == ["1975.0 – 2.0", "– 2.0", "B – 2"]
    assert names.to_pylist() == [
        spell_id(name_song(artist, title))
        for artist, title in zip(artists.to_pylist(), titles.to_pylist(), strict=True)
    ]


def test_values_lose_a_fraction_of_zeros_in_text_too() -> None:
    values = pa.array(["1.0", " 1999.0", "1.0 1", "0.5", "", None])
    assert spell_values(values, Problems(6), column="c").to_pylist() == ["1", "1999", "1.0 1", "0.5", None, None]
    assert spell_lists(pa.array(["7.0", None]), Problems(2), column="contexts").to_pylist() == [["7"], None]


@pytest.mark.parametrize("text", ["840.0", " 276.0 ", "-0.0", "1e+16", "DE ", "840.5", "nan", " ", ""])
def test_a_value_alone_is_spelled_as_in_a_list_of_an_import(text: str) -> None:
    (listed_values,) = spell_lists(pa.array([[text]]), Problems(1), column="markets").to_pylist()
    spelled_value = spell_value(text)
    assert ([] if spelled_value is None else [spelled_value]) == listed_values


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, pa.list_view], ids=["list", "large_list", "list_view"])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_the_first_of_several_artists_is_the_artist_of_a_song(kind: Any, text: pa.DataType) -> None:
    lists = pa.array([["Spare"], [" Queen ", "David Bowie"], [], None, [None, "B"], ["1975.0"]], pa.list_(pa.string()))
    values = lists.cast(pa.list_(text)) if text != pa.string() else lists
    values = pa.array(values.to_pylist(), kind(text)) if kind is not pa.list_ else values
    artists = spell_artists(values[1:], Problems(5), column="artist").to_pylist()
    assert artists == ["Queen", None, None, None, "1975.0"]


def test_the_first_artist_is_read_from_lists_of_one_size_and_beside_nulls_that_hold_names() -> None:
    fixed = pa.array([["A", "B"], None, ["C", "D"]], pa.list_(pa.string(), 2))
    assert spell_artists(fixed, Problems(3), column="artist").to_pylist() == ["A", None, "C"]
    names = pa.array(["A", "B", "C"])
    masked = pa.ListArray.from_arrays(pa.array([0, 2, 3], pa.int32()), names, mask=pa.array([True, False]))
    assert spell_artists(masked, Problems(2), column="artist").to_pylist() == [None, "C"]


def test_a_list_of_artists_that_holds_no_text_is_an_error() -> None:
    with pytest.raises(InputError, match="column 'artist' holds struct<name: string>; expected text or numbers"):
        spell_artists(pa.array([[{"name": "A"}]]), Problems(1), column="artist")
