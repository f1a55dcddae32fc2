"""One table of plays, whatever wrote it down: the same plays, and the same reasons against the others."""

import io
import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrec.data.spelling import spell_id
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions

START = 1711929600
# Line breaks are left out: a csv value must not hold one.
CONTEXTS = st.lists(st.none() | st.lists(st.sampled_from(["radio", " search", "ü", ""]), max_size=3), max_size=5)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=6)
IDS = st.one_of(NAMES, st.sampled_from(["7", "7.0", "nan", "", " a ", 'a"b', "a;b", "a,b", "a\tb", "ü", "007"]))
PLAYS = st.lists(st.tuples(IDS, IDS, st.integers(START, START + 9), NAMES), min_size=1, max_size=6)
NUMBERS = st.lists(
    st.tuples(st.integers(-5, 1 << 60) | st.none(), st.integers(0, 9), st.integers(START, START + 9), NAMES),
    min_size=1,
    max_size=6,
)
DIALECTS: list[dict[str, Any]] = [  # of pandas, polars and Excel
    {},
    {"sep": ";"},
    {"sep": "\t", "quoting": 1},
    {"quoting": 2},
    {"lineterminator": "\r\n", "encoding": "utf-8-sig"},
]
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
LISTS = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.large_list(pa.large_string())]
LISTS += [pa.list_(pa.string_view()), pa.list_(pa.string(), 2), pa.list_(pa.dictionary(pa.int32(), pa.string()))]
TIMES = ["seconds", "ms", "timestamp", "text"]

Found = tuple[Counter[tuple[str, str, int, str | None]], Counter[str]]


def read(format_name: str, path: Path, delimiter: str = ",") -> Found:
    reader = FORMATS[format_name].make(ReadOptions(delimiter=delimiter))
    good: Counter[tuple[str, str, int, str | None]] = Counter()
    bad: Counter[str] = Counter()
    for unit in reader.plan(str(path), path.stat().st_size, 1 << 20):
        for batch in reader.read(unit):
            good.update(
                (row["user_id"], row["song_id"], row["played_at"], row["title"]) for row in batch.rows.to_pylist()
            )
            bad.update(batch.rejected.column("reason").to_pylist())
    return good, bad


def expected(plays: list[tuple[Any, Any, int, str]]) -> Found:
    """What plain Python makes of the table."""
    good: Counter[tuple[str, str, int, str | None]] = Counter()
    bad: Counter[str] = Counter()
    for user, song, moment, title in plays:
        user_id, song_id = spell_id(user), spell_id(song)
        if user_id is None or song_id is None:
            bad["no user" if user_id is None else "no song"] += 1
        else:
            good[(user_id, song_id, moment * 1000, title.strip() or None)] += 1
    return good, bad


def times(moments: list[int], form: str) -> pa.Array:
    if form == "seconds":
        return pa.array(moments)
    ms = [moment * 1000 for moment in moments]
    if form == "ms":
        return pa.array(ms)
    if form == "timestamp":
        return pa.array(ms, pa.timestamp("ms", "UTC"))
    return pa.array([pd.Timestamp(moment, unit="s", tz="UTC").isoformat() for moment in moments])


def table(plays: list[tuple[Any, ...]], kind: pa.DataType | None, form: str) -> pa.Table:
    users, songs, moments, titles = zip(*plays, strict=True)
    columns = {"user": pa.array(users), "song": pa.array(songs), "title": pa.array(titles, pa.string())}
    if kind is not None:
        for name in ("user", "song", "title"):
            is_dictionary = pa.types.is_dictionary(kind)
            columns[name] = columns[name].dictionary_encode() if is_dictionary else columns[name].cast(kind)
    return pa.table({**columns, "played_at": times(list(moments), form)})


def to_csv(plays: list[tuple[Any, ...]], form: str, dialect: dict[str, Any], path: Path) -> None:
    users, songs, moments, titles = zip(*plays, strict=True)
    moment = times(list(moments), form).to_pandas()
    frame = pd.DataFrame({"user": users, "song": songs, "title": titles, "played_at": moment})
    stream = io.BytesIO()
    frame.to_csv(stream, index=False, **dialect)
    path.write_bytes(stream.getvalue())


FORMS = st.sampled_from(TIMES)
QUIET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=2_000, deadline=None, suppress_health_check=list(HealthCheck))


def same_from_csv(plays: list[tuple[Any, ...]], form: str, dialect: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        to_csv(plays, form, dialect, path)
        assert read("csv", path, dialect.get("sep", ",")) == expected(plays)


def same_from_parquet(plays: list[tuple[Any, ...]], form: str, kind: pa.DataType | None) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.parquet"
        pq.write_table(table(plays, kind, form), path)
        assert read("parquet", path) == expected(plays)


def same_contexts(contexts: list[list[str] | None], kind: pa.DataType) -> None:
    """Listed contexts from every type of list, and from text with bars between them."""
    if pa.types.is_fixed_size_list(kind):
        # Without null: pyarrow cannot read back what it writes of those.
        contexts = [(names * 2)[:2] for names in contexts if names]
    if not contexts:
        return
    rows = len(contexts)
    flat = pa.array(contexts, pa.list_(pa.string()))
    if pa.types.is_dictionary(kind.value_type):
        values = pa.ListArray.from_arrays(flat.offsets, flat.values.dictionary_encode(), mask=flat.is_null())
    else:
        values = pa.array(contexts, kind)
    table = {"user": ["u"] * rows, "song": ["s"] * rows, "played_at": [START + row for row in range(rows)]}
    expected = [names and [name.strip() for name in names if name.strip()] for names in contexts]
    texts = [None if names is None else " | ".join(names) for names in contexts]
    for column in (values, pa.array(texts)):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "p.parquet"
            pq.write_table(pa.table({**table, "contexts": column}), path)
            reader = FORMATS["parquet"].make(ReadOptions())
            (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
            (batch,) = reader.read(unit)
            found = batch.rows.column("contexts").to_pylist()
        assert [names or None for names in found] == [names or None for names in expected]


def same_from_numbers(plays: list[tuple[Any, ...]]) -> None:
    """A pandas frame with gaps in a column of whole numbers, as csv and Parquet and back."""
    with TemporaryDirectory() as folder:
        frame = pd.DataFrame(plays, columns=["user", "song", "played_at", "title"])
        frame["user"] = frame["user"].astype(float)
        frame.to_csv(Path(folder) / "p.csv", index=False)
        frame.to_parquet(Path(folder) / "p.parquet")
        rounded = [(None if user is None else int(float(user)), *rest) for user, *rest in plays]
        assert read("csv", Path(folder) / "p.csv") == expected(rounded)
        assert read("parquet", Path(folder) / "p.parquet") == expected(rounded)


def same_from_listens(plays: list[tuple[Any, ...]], in_lines: bool) -> None:
    listens = [
        {"user_name": user, "listened_at": at, "recording_msid": song, "track_metadata": {"track_name": title}}
        for user, song, at, title in plays
        if spell_id(song)  # a listen without an id is known by its title
    ]
    kept = [play for play in plays if spell_id(play[1])]
    if not listens:
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.json"
        path.write_text("\n".join(map(json.dumps, listens)) if in_lines else json.dumps(listens))
        assert read("listenbrainz", path) == expected(kept)


@QUIET
@given(PLAYS, FORMS, st.sampled_from(DIALECTS))
def test_any_table_is_the_same_from_every_dialect_of_csv(
    plays: list[tuple[Any, ...]], form: str, dialect: dict[str, Any]
) -> None:
    same_from_csv(plays, form, dialect)


@QUIET
@given(PLAYS, FORMS, st.sampled_from(STRINGS))
def test_any_table_is_the_same_from_every_type_of_parquet(
    plays: list[tuple[Any, ...]], form: str, kind: pa.DataType
) -> None:
    same_from_parquet(plays, form, kind)


@QUIET
@given(NUMBERS)
def test_whole_numbers_with_gaps_are_the_same_from_csv_and_parquet(plays: list[tuple[Any, ...]]) -> None:
    same_from_numbers(plays)


@QUIET
@given(PLAYS, st.booleans())
def test_any_table_is_the_same_from_json_in_lines_and_in_a_list(plays: list[tuple[Any, ...]], in_lines: bool) -> None:
    same_from_listens(plays, in_lines)


@QUIET
@given(CONTEXTS, st.sampled_from(LISTS))
def test_listed_contexts_are_the_same_from_every_type_of_list(
    contexts: list[list[str] | None], kind: pa.DataType
) -> None:
    same_contexts(contexts, kind)


@pytest.mark.slow
@THOROUGH
@given(
    PLAYS,
    NUMBERS,
    CONTEXTS,
    st.sampled_from(LISTS),
    FORMS,
    st.sampled_from(DIALECTS),
    st.sampled_from(STRINGS),
    st.booleans(),
)
def test_thousands_of_tables_are_the_same_from_every_file(
    plays: list[tuple[Any, ...]],
    numbers: list[tuple[Any, ...]],
    contexts: list[list[str] | None],
    lists: pa.DataType,
    form: str,
    dialect: dict[str, Any],
    kind: pa.DataType,
    in_lines: bool,
) -> None:
    same_from_csv(plays, form, dialect)
    same_from_parquet(plays, form, kind)
    same_from_numbers(numbers)
    same_contexts(contexts, lists)
    same_from_listens(plays, in_lines)
