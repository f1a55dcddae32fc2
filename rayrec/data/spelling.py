"""The stored form of ids, texts and listed values from outside, the same for every file, command and request."""

import re
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data.columns import one_array
from rayrec.errors import InputError

NOT_UTF8 = "not UTF-8"
MAX_ID = 512  # characters of an id
TOO_LONG = f"ID is longer than {MAX_ID} characters"
LIST_SEPARATOR = "|"
# What numpy, pandas and polars write into a text file for a number that is missing or has overflowed.
NOT_NUMBERS = ("nan", "NaN", "inf", "-inf")
EXPECTED_ID = f"expected text other than spaces, {', '.join(NOT_NUMBERS[:-1])} and {NOT_NUMBERS[-1]}"
WITH_ZEROS = r"^-?\d+\.0+$"  # a whole number from a column of floats
WITH_EXPONENT = r"^-?\d(\.\d+)?[eE]\+\d{2,3}$"  # a whole number of at least 1e16 from a column of floats
_WITH_ZEROS, _WITH_EXPONENT = re.compile(WITH_ZEROS, re.ASCII), re.compile(WITH_EXPONENT, re.ASCII)


class Problems:
    """Records why rows of a batch of R rows are rejected; only the first reason of a row is kept."""

    def __init__(self, rows: int) -> None:
        self._codes = np.zeros(rows, dtype=np.int16)
        self._reasons: list[str] = []

    @property
    def bad(self) -> np.ndarray:
        """bool (R,): the rejected rows."""
        return self._codes > 0

    def mark(self, mask: np.ndarray, reason: str) -> None:
        """Reject the rows where `mask`, bool (R,), is true, for `reason`."""
        is_new = mask & ~self.bad
        if is_new.any():
            self._reasons.append(reason)
            self._codes[is_new] = len(self._reasons)

    def reasons(self) -> list[str]:
        """Return the reasons of the rejected rows, in the order of the rows."""
        return [self._reasons[code - 1] for code in self._codes[self.bad]]


def missing(values: pa.Array) -> np.ndarray:
    """bool (R,): the strings that are null or empty."""
    return np.asarray(pc.fill_null(pc.equal(values, ""), True).to_numpy(zero_copy_only=False))


def clean(text: str) -> str:
    """Return text that UTF-8 can encode: single surrogates, which JSON can escape, become question marks."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def spell_id(value: Any) -> str | None:
    """Return an id in its stored form: without spaces around it, whole numbers without a fraction; None if not an id.

    1, 1.0, "1" and " 1.0 " are all "1", because pandas converts whole numbers to floats if some are missing. NaN and
    infinity, as numbers or as text, are not ids. A UUID is its text, in lower case with hyphens, and bytes are text in
    UTF-8.
    """
    if isinstance(value, np.generic):  # from a pandas column
        value = value.item()
    if isinstance(value, float):
        value = str(int(value)) if value.is_integer() else repr(value)
    elif (isinstance(value, int | Decimal) and not isinstance(value, bool)) or isinstance(value, UUID):
        value = str(value)
    elif isinstance(value, bytes):
        value = _decode_utf8(value)
    if not isinstance(value, str):
        return None
    text = clean(value).strip()
    if not text or text in NOT_NUMBERS:
        return None
    return _normalize_whole_number(text)


def validate_user(user_id: str | None) -> str | None:
    """Return the user id of a setting in its stored form; None and empty text, for no user, stay as they are.

    Raises `ValueError`, for pydantic, if it is not an id.
    """
    if not user_id:
        return user_id
    spelled_id = spell_id(user_id)
    if spelled_id is None:
        raise ValueError(f"not a user ID; {EXPECTED_ID}")
    if len(spelled_id) > MAX_ID:
        raise ValueError(f"expected at most {MAX_ID} characters")
    return spelled_id


def spell_text(value: Any) -> str | None:
    """Return a title or a name in its stored form: text without spaces around it, other values as ids.

    The text `nan` is a valid title.
    """
    return (clean(value).strip() or None) if isinstance(value, str) else spell_id(value)


def spell_value(text: str) -> str | None:
    """Return a flag, a category or a listed value in its stored form: as `spell_text`, but `1.0` is `1`, too."""
    spelled_text = spell_text(text)
    return spelled_text and _normalize_whole_number(spelled_text)


def name_song(artist: str | None, title: str | None) -> str | None:
    """Return the id of a song without an id of its own: `artist – title`; None without a title."""
    return f"{artist or ''} – {title}" if title else None


def name_songs(ids: pa.Array, artists: pa.Array, titles: pa.Array) -> pa.Array:
    """Return the ids of songs, strings (R,); `name_song` of artist and title replaces null, empty and NaN ids."""
    titles = pc.if_else(pc.equal(titles, ""), None, titles)
    names = pc.binary_join_element_wise(pc.fill_null(artists, ""), titles, " – ")
    is_missing = pc.is_in(pc.utf8_trim_whitespace(ids), value_set=pa.array(["", *NOT_NUMBERS]))
    return pc.coalesce(pc.if_else(is_missing, None, ids), names)


def spell_ids(values: pa.Array, problems: Problems, *, column: str, reason: str) -> pa.Array:
    """Return a column of ids in the form of `spell_id`, strings (R,). Rows without an id are rejected for `reason`.

    Raises `InputError`, which names `column`, for a type that cannot hold ids, such as a list.
    """
    texts = as_strings(values, problems, column=column)
    is_not_a_number = pc.fill_null(pc.is_in(texts, value_set=pa.array(NOT_NUMBERS)), False)
    problems.mark(missing(texts) | is_not_a_number.to_numpy(zero_copy_only=False), reason)
    mark_long(texts, problems)
    return texts


def mark_long(ids: pa.Array, problems: Problems) -> None:
    """Reject the rows whose ids, strings (R,), are too long for a request."""
    problems.mark(pc.fill_null(pc.greater(pc.utf8_length(ids), MAX_ID), False).to_numpy(zero_copy_only=False), TOO_LONG)


def spell_texts(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """Return a column of titles or names in the form of `spell_text`, strings (R,), null if missing.

    Text only loses the spaces around it. Whole numbers of a numeric column are written without a fraction. Raises the
    errors of `spell_ids`.
    """
    values = plain(values)
    if _is_text(values.type):
        texts = pc.utf8_trim_whitespace(valid_text(values, problems))
    else:
        texts = as_strings(values, problems, column=column)
    if pa.types.is_floating(values.type):
        texts = pc.if_else(pc.is_in(texts, value_set=pa.array(NOT_NUMBERS)), None, texts)
    return pc.if_else(pc.equal(texts, ""), None, texts)


def spell_artists(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """Return a column of artists as `spell_texts` does, strings (R,); of a list of artists, the first name is used."""
    values = plain(values)
    if _is_list(values.type):
        first_names = pc.list_slice(values, 0, 1, return_fixed_size_list=False)  # no or one name in each row
        rows = pc.list_parent_indices(first_names).to_numpy()
        positions = np.full(len(values), -1)
        positions[rows] = np.arange(len(rows))
        values = pc.list_flatten(first_names).take(pa.array(positions, mask=positions < 0))
    return spell_texts(values, problems, column=column)


def spell_values(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """Return a column of numbers, flags, days or categories as `spell_value` does, strings (R,), null if missing.

    A CSV file has `1.0` if pandas wrote it from whole numbers of which some are missing.
    """
    return _normalize_whole_numbers(spell_texts(values, problems, column=column))


def spell_lists(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """Return a column of lists, or of texts with `|` between values, as list<string> (R,); null if missing.

    Raises `InputError`, which names `column`, for another type.
    """
    values = plain(values)
    if not _is_list(values.type):
        texts = spell_values(values, problems, column=column)
        lists = pc.split_pattern(texts, LIST_SEPARATOR)
    else:
        lists = values
    flat_values, parents = pc.list_flatten(lists), pc.list_parent_indices(lists).to_numpy()
    inner_problems = Problems(len(flat_values))
    names = spell_values(flat_values, inner_problems, column=column)
    is_broken = np.zeros(len(values), dtype=bool)
    is_broken[parents[inner_problems.bad]] = True
    problems.mark(is_broken, NOT_UTF8)
    is_valid = ~(missing(names) | inner_problems.bad)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(parents[is_valid], minlength=len(values)))]).astype(np.int32)
    is_null = lists.is_null().to_numpy(zero_copy_only=False)
    return pa.ListArray.from_arrays(pa.array(offsets), names.filter(pa.array(is_valid)), mask=pa.array(is_null))


def plain(values: pa.Array) -> pa.Array:
    """Return a column as one array of a plain type: no extension type but UUID, no dictionary, no list view."""
    if isinstance(values, pa.ChunkedArray):
        values = one_array(values)
    if isinstance(values.type, pa.BaseExtensionType) and not _is_uuid(values.type):
        return plain(values.storage)
    if pa.types.is_dictionary(values.type):
        return plain(values.dictionary_decode())
    if _is_list_view(values.type):
        # No cast, because pyarrow's cast of list views loses elements.
        return plain(pa.array(values.to_pylist(), pa.list_(values.type.value_type)))
    return values


def as_strings(values: pa.Array, problems: Problems, *, column: str) -> pa.Array:
    """Return a column of text or numbers as strings (R,), without spaces around them, whole numbers without a fraction.

    Rows that are not UTF-8 are rejected. Raises `InputError`, which names `column`, for another type.
    """
    values = plain(values)
    data_type = values.type
    if _is_uuid(data_type):
        return pa.array([None if value is None else str(value) for value in values.to_pylist()], pa.string())
    if pa.types.is_integer(data_type) or pa.types.is_null(data_type):
        return values.cast(pa.string())
    if pa.types.is_decimal(data_type):
        return pa.array(
            [None if value is None else _decimal_to_string(value) for value in values.to_pylist()], pa.string()
        )
    if pa.types.is_floating(data_type):
        return _floats_to_strings(values)
    if not _is_text(data_type):
        raise InputError(f"column {column!r} holds {data_type}; expected text or numbers")
    return _normalize_whole_numbers(pc.utf8_trim_whitespace(valid_text(values, problems)))


def valid_text(values: pa.Array, problems: Problems) -> pa.Array:
    """Return text or bytes as strings (R,); rows that are not UTF-8 are rejected, and their values are null."""
    try:
        texts = values.cast(pa.string())
        texts.validate(full=True)
        return one_array(texts)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raw_values = values.cast(pa.binary()).to_pylist()
    texts = [None if value is None else _decode_utf8(value) for value in raw_values]
    problems.mark(
        np.array(
            [value is not None and text is None for value, text in zip(raw_values, texts, strict=True)], dtype=bool
        ),
        NOT_UTF8,
    )
    return pa.array(texts, pa.string())


def _decode_utf8(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _is_text(data_type: pa.DataType) -> bool:
    types = pa.types
    checks = [types.is_string, types.is_large_string, types.is_binary, types.is_large_binary]
    checks += [types.is_fixed_size_binary, types.is_string_view, types.is_binary_view]
    return any(check(data_type) for check in checks)


def _is_uuid(data_type: pa.DataType) -> bool:
    return getattr(data_type, "extension_name", "") == "arrow.uuid"


def _is_list(data_type: pa.DataType) -> bool:
    return any(check(data_type) for check in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _is_list_view(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_list_view(data_type) or pa.types.is_large_list_view(data_type))


def _decimal_to_string(value: Decimal) -> str:
    return str(int(value)) if value == value.to_integral_value() else str(value)


def _floats_to_strings(values: pa.Array) -> pa.Array:
    """Return floats as strings: whole numbers without a fraction, NaN as null."""
    numbers = np.asarray(values.cast(pa.float64()).to_numpy(zero_copy_only=False))  # null becomes NaN
    is_whole = np.isfinite(numbers) & (numbers == np.floor(numbers)) & (np.abs(numbers) < 2**63)
    texts = np.empty(len(numbers), dtype=object)
    texts[is_whole] = numbers[is_whole].astype(np.int64).astype(str)
    texts[~is_whole] = [
        None if np.isnan(value) else str(int(value)) if value.is_integer() else repr(value)
        for value in numbers[~is_whole].tolist()
    ]
    return pa.array(texts, pa.string())


def _normalize_whole_numbers(texts: pa.Array) -> pa.Array:
    """Remove the fraction or the exponent of whole numbers in a column of text."""
    is_whole = pc.match_substring_regex(texts, f"{WITH_ZEROS}|{WITH_EXPONENT}")
    rows = np.flatnonzero(pc.fill_null(is_whole, False).to_numpy(zero_copy_only=False))
    if not len(rows):
        return texts
    new_texts = texts.to_numpy(zero_copy_only=False).copy()
    new_texts[rows] = [_normalize_whole_number(text) for text in new_texts[rows]]
    return pa.array(new_texts, pa.string())


def _normalize_whole_number(text: str) -> str:
    if _WITH_ZEROS.match(text):
        return text.split(".")[0] if text[0] != "-" or text.strip("-0.") else "0"
    if _WITH_EXPONENT.match(text):
        number = float(text)
        return str(int(number)) if number.is_integer() else text
    return text
