"""One table of plays gives the same plays and the same reject reasons, whichever library and type it is written in."""

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayrec.data.spelling import spell_id
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions

START = 1711929600
# Without line breaks: a csv value must not contain one.
CONTEXTS = st.lists(st.none() | st.lists(st.sampled_from(["radio", " search", "ü", ""]), max_size=3), max_size=5)
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=6)
IDS = st.one_of(NAMES, st.sampled_from(["7", "7.0", "nan", "", " a ", 'a"b', "a;b", "a,b", "a\tb", "ü", "007"]))
TITLES = st.one_of(NAMES, st.sampled_from(["7.0", " 7.0", "-0.0", "1e+16", "nan"]))  # titles that read as numbers
MOMENTS = st.integers(START, START + 9) | st.none()
PLAYS = st.lists(st.tuples(IDS, IDS, MOMENTS, TITLES), min_size=1, max_size=6)
WHOLE_NUMBERS = st.integers(-5, 1 << 60) | st.none()
NUMBERS = st.lists(st.tuples(WHOLE_NUMBERS, st.integers(0, 9), MOMENTS, NAMES), min_size=1, max_size=6)
TEXTS = ("user", "song", "title")
STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string()), pa.binary()]
LISTS = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.large_list(pa.large_string())]
LISTS += [pa.list_(pa.string_view()), pa.list_(pa.string(), 2), pa.list_(pa.dictionary(pa.int32(), pa.string()))]
TIMES = ["seconds", "ms", "timestamp", "text"]

Writer = Callable[[pa.Table, Path], Any]


def pandas_csv(table: pa.Table, path: Path, **dialect: Any) -> None:
    table.to_pandas().to_csv(path, index=False, **dialect)


def polars_csv(table: pa.Table, path: Path, **dialect: Any) -> None:
    pl.from_arrow(table).write_csv(path, **dialect)


def duckdb_csv(table: pa.Table, path: Path, **dialect: Any) -> None:
    duckdb.from_arrow(table).write_csv(str(path), **dialect)


CSV_WRITERS: dict[str, tuple[str, Writer]] = {  # delimiter, writer
    "pandas": (",", pandas_csv),
    "pandas with semicolons": (";", partial(pandas_csv, sep=";")),
    "pandas with tabs, all quoted": ("\t", partial(pandas_csv, sep="\t", quoting=1)),
    "pandas, text quoted": (",", partial(pandas_csv, quoting=2)),
    "Excel": (";", partial(pandas_csv, sep=";", lineterminator="\r\n", encoding="utf-8-sig")),
    "polars": (",", polars_csv),
    "polars with tabs, all quoted": ("\t", partial(polars_csv, separator="\t", quote_style="always")),
    "polars, text quoted": (",", partial(polars_csv, quote_style="non_numeric")),
    "polars as Excel": (";", partial(polars_csv, separator=";", line_terminator="\r\n", include_bom=True)),
    "DuckDB": (",", duckdb_csv),
    "DuckDB with bars, all quoted": ("|", partial(duckdb_csv, sep="|", quoting="ALL")),
}


def pyarrow_parquet(table: pa.Table, path: Path, kind: pa.DataType) -> None:
    for name in TEXTS:
        column = table.column(name)
        typed_column = column.dictionary_encode() if pa.types.is_dictionary(kind) else column.cast(kind)
        table = table.set_column(table.column_names.index(name), name, typed_column)
    pq.write_table(table, path)


def polars_parquet(table: pa.Table, path: Path, kind: Any) -> None:
    pl.from_arrow(table).with_columns(pl.col(*TEXTS).cast(kind)).write_parquet(path)


PARQUET_WRITERS: dict[str, Writer] = {
    **{f"pyarrow {kind}": partial(pyarrow_parquet, kind=kind) for kind in STRINGS},
    "pandas": lambda table, path: table.to_pandas().to_parquet(path),
    "pandas category": lambda table, path: table.to_pandas().astype(dict.fromkeys(TEXTS, "category")).to_parquet(path),
    **{f"polars {kind}": partial(polars_parquet, kind=kind) for kind in (pl.String, pl.Categorical, pl.Binary)},
    "DuckDB": lambda table, path: duckdb.from_arrow(table).write_parquet(str(path)),
}


def pyarrow_lists(table: pa.Table, path: Path, kind: pa.DataType) -> None:
    """Write the contexts as lists of the type `kind`."""
    flat = table.column("contexts").combine_chunks()
    if pa.types.is_dictionary(kind.value_type):
        typed_column = pa.ListArray.from_arrays(flat.offsets, flat.values.dictionary_encode(), mask=flat.is_null())
    else:
        typed_column = pa.array(flat.to_pylist(), kind)
    pq.write_table(table.set_column(table.column_names.index("contexts"), "contexts", typed_column), path)


def polars_lists(table: pa.Table, path: Path, kind: Any) -> None:
    frame = pl.from_arrow(table.drop(["contexts"]))
    contexts = pl.Series("contexts", table.column("contexts").to_pylist(), pl.List(pl.String))
    frame.with_columns(contexts.cast(kind)).write_parquet(path)


def pyarrow_text_with_bars(table: pa.Table, path: Path) -> None:
    texts = [None if names is None else " | ".join(names) for names in table.column("contexts").to_pylist()]
    pq.write_table(table.set_column(table.column_names.index("contexts"), "contexts", pa.array(texts)), path)


LIST_WRITERS: dict[str, Writer] = {
    **{f"pyarrow {kind}": partial(pyarrow_lists, kind=kind) for kind in LISTS},
    "text with bars": pyarrow_text_with_bars,
    "pandas": lambda table, path: table.to_pandas().to_parquet(path),
    "polars list": partial(polars_lists, kind=pl.List(pl.String)),
    "polars list of categories": partial(polars_lists, kind=pl.List(pl.Categorical)),
    "DuckDB": lambda table, path: duckdb.from_arrow(table).write_parquet(str(path)),
}

ReadResult = tuple[Counter[tuple[str, str, int, str | None]], Counter[str]]


def read(format_name: str, path: Path, delimiter: str = ",") -> ReadResult:
    reader = FORMATS[format_name].make(ReadOptions(delimiter=delimiter))
    play_counts: Counter[tuple[str, str, int, str | None]] = Counter()
    reason_counts: Counter[str] = Counter()
    for unit in reader.plan(str(path), path.stat().st_size, 1 << 20):
        for batch in reader.read(unit):
            play_counts.update(
                (row["user_id"], row["song_id"], row["played_at"], row["title"]) for row in batch.rows.to_pylist()
            )
            reason_counts.update(batch.rejected.column("reason").to_pylist())
    return play_counts, reason_counts


def expected(plays: list[tuple[Any, ...]]) -> ReadResult:
    """The plays and the counts of reject reasons, computed in plain Python."""
    play_counts: Counter[tuple[str, str, int, str | None]] = Counter()
    reason_counts: Counter[str] = Counter()
    for user, song, moment, title in plays:
        user_id, song_id = spell_id(user), spell_id(song)
        if user_id is None or song_id is None:
            reason_counts["no user" if user_id is None else "no song"] += 1
        elif moment is None:
            reason_counts["no time"] += 1
        else:
            play_counts[(user_id, song_id, moment * 1000, title.strip() or None)] += 1
    return play_counts, reason_counts


def times(moments: list[int | None], form: str) -> pa.Array:
    if form == "seconds":
        return pa.array(moments, pa.int64())
    ms = [None if moment is None else moment * 1000 for moment in moments]
    if form == "ms":
        return pa.array(ms, pa.int64())
    if form == "timestamp":
        return pa.array(ms, pa.timestamp("ms", "UTC"))
    texts = [None if moment is None else pd.Timestamp(moment, unit="s", tz="UTC").isoformat() for moment in moments]
    return pa.array(texts, pa.string())


def table(plays: list[tuple[Any, ...]], form: str) -> pa.Table:
    users, songs, moments, titles = zip(*plays, strict=True)
    texts = {"user": pa.array(users), "song": pa.array(songs), "title": pa.array(titles, pa.string())}
    return pa.table({**texts, "played_at": times(list(moments), form)})


TIME_FORMS = st.sampled_from(TIMES)
CSV_WRITER_NAMES = st.sampled_from(sorted(CSV_WRITERS))
PARQUET_WRITER_NAMES = st.sampled_from(sorted(PARQUET_WRITERS))
LIST_WRITER_NAMES = st.sampled_from(sorted(LIST_WRITERS))
QUICK = settings(max_examples=40, suppress_health_check=list(HealthCheck))
THOROUGH = settings(max_examples=2_000, suppress_health_check=list(HealthCheck))


def check_csv(plays: list[tuple[Any, ...]], form: str, writer: str) -> None:
    delimiter, write = CSV_WRITERS[writer]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        write(table(plays, form), path)
        assert read("csv", path, delimiter) == expected(plays)


def check_parquet(plays: list[tuple[Any, ...]], form: str, writer: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.parquet"
        PARQUET_WRITERS[writer](table(plays, form), path)
        assert read("parquet", path) == expected(plays)


def check_contexts(contexts: list[list[str] | None], writer: str) -> None:
    if "fixed_size" in writer:
        # Without null: pyarrow cannot read back the fixed-size lists with null that it writes.
        contexts = [(names * 2)[:2] for names in contexts if names]
    if not contexts:
        return
    rows = len(contexts)
    other_columns = {"user": ["u"] * rows, "song": ["s"] * rows, "played_at": [START + row for row in range(rows)]}
    context_lists = pa.array(contexts, pa.list_(pa.string()))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.parquet"
        LIST_WRITERS[writer](pa.table({**other_columns, "contexts": context_lists}), path)
        reader = FORMATS["parquet"].make(ReadOptions())
        (unit,) = reader.plan(str(path), path.stat().st_size, 1 << 20)
        (batch,) = reader.read(unit)
        actual = batch.rows.column("contexts").to_pylist()
    expected = [[name.strip() for name in names or [] if name.strip()] for names in contexts]
    assert [names or [] for names in actual] == expected


def check_numbers(plays: list[tuple[Any, ...]]) -> None:
    """A pandas frame with missing values in a column of whole numbers gives the same plays from csv and Parquet."""
    with TemporaryDirectory() as folder:
        frame = pd.DataFrame(plays, columns=["user", "song", "played_at", "title"])
        frame["user"] = frame["user"].astype(float)
        frame.to_csv(Path(folder) / "p.csv", index=False)
        frame.to_parquet(Path(folder) / "p.parquet")
        rounded_plays = [(None if user is None else int(float(user)), *rest) for user, *rest in plays]
        assert read("csv", Path(folder) / "p.csv") == expected(rounded_plays)
        assert read("parquet", Path(folder) / "p.parquet") == expected(rounded_plays)


def check_listens(plays: list[tuple[Any, ...]], in_lines: bool) -> None:
    listens = [
        {"user_name": user, "listened_at": moment, "recording_msid": song, "track_metadata": {"track_name": title}}
        for user, song, moment, title in plays
        if spell_id(song)  # a listen without a song id would get its title as id
    ]
    plays_with_song = [play for play in plays if spell_id(play[1])]
    if not listens:
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "p.json"
        path.write_text("\n".join(map(json.dumps, listens)) if in_lines else json.dumps(listens))
        assert read("listenbrainz", path) == expected(plays_with_song)


@QUICK
@given(PLAYS, TIME_FORMS, CSV_WRITER_NAMES)
def test_any_table_is_the_same_from_every_dialect_of_csv(plays: list[tuple[Any, ...]], form: str, writer: str) -> None:
    check_csv(plays, form, writer)


@QUICK
@given(PLAYS, TIME_FORMS, PARQUET_WRITER_NAMES)
def test_any_table_is_the_same_from_every_writer_and_type_of_parquet(
    plays: list[tuple[Any, ...]], form: str, writer: str
) -> None:
    check_parquet(plays, form, writer)


@QUICK
@given(NUMBERS)
def test_whole_numbers_with_gaps_are_the_same_from_csv_and_parquet(plays: list[tuple[Any, ...]]) -> None:
    check_numbers(plays)


@QUICK
@given(PLAYS, st.booleans())
def test_any_table_is_the_same_from_json_in_lines_and_in_a_list(plays: list[tuple[Any, ...]], in_lines: bool) -> None:
    check_listens(plays, in_lines)


@QUICK
@given(CONTEXTS, LIST_WRITER_NAMES)
def test_listed_contexts_are_the_same_from_every_writer_and_type_of_list(
    contexts: list[list[str] | None], writer: str
) -> None:
    check_contexts(contexts, writer)


@pytest.mark.slow
@THOROUGH
@given(PLAYS, NUMBERS, CONTEXTS, TIME_FORMS, CSV_WRITER_NAMES, PARQUET_WRITER_NAMES, LIST_WRITER_NAMES, st.booleans())
def test_thousands_of_tables_are_the_same_from_every_file(
    plays: list[tuple[Any, ...]],
    numbers: list[tuple[Any, ...]],
    contexts: list[list[str] | None],
    form: str,
    csv_writer: str,
    parquet_writer: str,
    list_writer: str,
    in_lines: bool,
) -> None:
    check_csv(plays, form, csv_writer)
    check_parquet(plays, form, parquet_writer)
    check_numbers(numbers)
    check_contexts(contexts, list_writer)
    check_listens(plays, in_lines)
