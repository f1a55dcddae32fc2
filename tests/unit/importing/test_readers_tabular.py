"""csv and Parquet files of plays and playlists."""

import gzip
import json
import uuid
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.data import columns
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions

MAPPING = {"user": "user_id", "song": "song_id", "played_at": "ts"}


def read(path: Path, options: ReadOptions, format_name: str = "csv", unit_bytes: int = 1 << 20) -> tuple[list, list]:
    """The good and the rejected rows of all units, with line numbers of the whole file."""
    reader = FORMATS[format_name].make(options)
    rows, rejected, lines_before = [], [], 0
    for unit in reader.plan(str(path), path.stat().st_size, unit_bytes):
        unit_lines = 0
        for batch in reader.read(unit):
            assert batch.read == batch.rows.num_rows + batch.rejected.num_rows
            assert batch.rows.schema == (columns.PLAYLIST_ENTRIES if options.playlists else columns.PLAYS)
            rows += [{**row, "line": row["line"] + lines_before} for row in batch.rows.to_pylist()]
            rejected += [{**row, "line": row["line"] + lines_before} for row in batch.rejected.to_pylist()]
            unit_lines += batch.lines
        lines_before += unit_lines
    return rows, rejected


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_mapped_csv_gives_every_field_of_a_play(tmp_path: Path) -> None:
    file = write(
        tmp_path / "plays.csv",
        "n,user_id,song_id,ts,contexts,skipped,title,artist\n"
        '1,ann,s1,1421163674,radio|search,true,"Hello, you","The ""A"""\n'
        "2,bob,s2,2015-01-13T15:41:14Z,,0,,\n",
    )
    rows, rejected = read(file, ReadOptions(columns=MAPPING))
    assert rejected == []
    assert rows[0] == {
        "user_id": "ann",
        "song_id": "s1",
        "played_at": 1421163674000,
        "contexts": ["radio", "search"],
        "skipped": True,
        "liked": None,
        "is_play": None,
        "title": "Hello, you",
        "artist": 'The "A"',
        "source": str(file),
        "line": 2,
    }
    assert rows[1]["played_at"] == 1421163674000
    assert (rows[1]["contexts"], rows[1]["skipped"], rows[1]["title"]) == (None, False, None)


def test_each_bad_line_is_rejected_by_itself_with_its_number_and_text(tmp_path: Path) -> None:
    lines = [
        b"user,song,played_at,skipped",
        b"a,s1,1421163674,1",  # 2: good
        b"a,s1",  # 3: too few values
        b"",  # 4: empty, skipped
        b",s1,1421163674,1",  # 5
        b"a,,1421163674,1",  # 6
        b"a,s1,,1",  # 7
        b"a,s1,yesterday,1",  # 8
        b"a,s1,2015-01-13T15,1",  # 9: no minute
        b"a,s1,1421163674,perhaps",  # 10
        b'a,"s1,1421163674,1',  # 11: a quote stays open
        b"a,s\xff,1421163674,1",  # 12: not UTF-8
        b"a,s\r1,1421163674,1",  # 13
        b"a,s2,1421163675,0",  # 14: good
        b"a,s2,1421163675,0,9",  # 15: too many
        b"a,s3,1421163676,",  # 16: good, the file ends without a line break
    ]
    rows, rejected = read(write(tmp_path / "plays.csv", b"\n".join(lines)), ReadOptions())
    assert [(row["line"], row["song_id"]) for row in rows] == [(2, "s1"), (14, "s2"), (16, "s3")]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (3, "2 values, but the file has 4 columns"),
        (5, "no user"),
        (6, "no song"),
        (7, "no time"),
        (8, "time is neither unix seconds, unix milliseconds nor ISO 8601"),
        (9, "time is neither unix seconds, unix milliseconds nor ISO 8601"),
        (10, "skipped is not true, false, 1 or 0"),
        (11, "a quote is not closed on its line"),
        (12, "not UTF-8"),
        (13, "a carriage return within the line"),
        (15, "5 values, but the file has 4 columns"),
    ]
    assert rejected[1]["text"] == ",s1,1421163674,1"
    assert rejected[7]["text"] == 'a,"s1,1421163674,1'
    assert rejected[8]["text"] == "a,s\N{REPLACEMENT CHARACTER},1421163674,1"


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_missing_values_of_database_dumps_are_no_ids_and_no_names(tmp_path: Path, delimiter: str) -> None:
    lines = ["user,song,played_at,artist", "a,s1,1421163674,\\N", "\\N,s1,1421163674,A"]
    file = write(tmp_path / "p.csv", "\n".join(lines).replace(",", delimiter) + "\n")
    rows, rejected = read(file, ReadOptions(delimiter=delimiter))
    assert [(row["user_id"], row["artist"]) for row in rows] == [("a", None)]
    assert [(row["line"], row["reason"]) for row in rejected] == [(3, "no user")]


def test_times_without_a_zone_are_of_the_zone_of_the_options(tmp_path: Path) -> None:
    file = write(tmp_path / "plays.csv", "user,song,played_at\na,s,2015-01-13 16:41:14\na,s,2015-01-13T15:41:14Z\n")
    for timezone_name, hours in (("UTC", 1), ("Europe/Berlin", 0), ("Asia/Tokyo", -8)):
        rows, _ = read(file, ReadOptions(timezone=timezone_name))
        assert [row["played_at"] for row in rows] == [1421163674000 + hours * 3_600_000, 1421163674000]


@pytest.mark.parametrize("unit_bytes", [1, 7, 16, 24, 31, 64, 1000])  # 24: exactly the bytes of the header
def test_byte_ranges_of_any_size_give_the_rows_and_lines_of_the_whole(tmp_path: Path, unit_bytes: int) -> None:
    body = "".join(f"u{row % 3},s{row},{1421163674 + row}\r\n" + ("\r\n" if row % 5 == 0 else "") for row in range(40))
    file = write(tmp_path / "plays.csv", "\N{BYTE ORDER MARK}user,song,played_at\r\n" + body + "bad\r\n")
    full = read(file, ReadOptions())
    assert len(full[0]) == 40
    assert [row["reason"] for row in full[1]] == ["1 values, but the file has 3 columns"]
    assert full[1][0]["line"] == 50
    assert read(file, ReadOptions(), unit_bytes=unit_bytes) == full


def test_blocks_end_anywhere_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrec.importing.readers import reader

    file = write(
        tmp_path / "plays.csv", "user,song,played_at\n" + "".join(f"u,s{row},{10**9 + row}\n" for row in range(30))
    )
    full = read(file, ReadOptions())
    for size in (1, 5, 17, 100):
        monkeypatch.setattr(reader.read_blocks, "__defaults__", (size,))
        assert read(file, ReadOptions()) == full


def test_a_gzip_file_is_one_unit_with_the_same_rows(tmp_path: Path) -> None:
    text = "user,song,played_at\na,s,1421163674\nb,s,x\n"
    plain = read(write(tmp_path / "plays.csv", text), ReadOptions())
    packed = read(write(tmp_path / "plays.csv.gz", gzip.compress(text.encode(), mtime=0)), ReadOptions(), unit_bytes=4)
    assert [row["user_id"] for row in packed[0]] == [row["user_id"] for row in plain[0]] == ["a"]
    assert [row["line"] for row in packed[1]] == [3]


def test_a_cut_off_gzip_file_is_an_input_error(tmp_path: Path) -> None:
    text = "user,song,played_at\n" + "".join(f"u{row},s,{10**9 + row * 7919}\n" for row in range(20_000))
    file = write(tmp_path / "plays.csv.gz", gzip.compress(text.encode(), mtime=0)[:-5000])
    with pytest.raises(InputError, match="is not a valid gzip file"):
        read(file, ReadOptions())


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("user,song,ts", ReadOptions(), "no column 'played_at' for played_at; it has user, song, ts"),
        ("user,song,ts", ReadOptions(columns={"played_at": "when"}), "no column 'when' for played_at"),
        (
            "user,song,played_at",
            ReadOptions(columns={"song": ""}),
            r"song needs a column; the file has user, song, played_at; .* with --columns song=song$",
        ),
        (
            "user,song,played_at",
            ReadOptions(columns={"user": ""}),
            "user needs a column; .* with --columns user=user$",
        ),
        ("user,song,song,played_at", ReadOptions(), "2 columns named 'song'"),
        ("user,song,played_at", ReadOptions(columns={"listener": "user"}), "cannot map a column to 'listener'"),
        ("", ReadOptions(), "expected a header"),
    ],
)
def test_what_the_header_lacks_is_an_input_error(
    tmp_path: Path, header: str, options: ReadOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(write(tmp_path / "plays.csv", header + "\n"), options)


def test_another_delimiter_is_read_when_named(tmp_path: Path) -> None:
    file = write(tmp_path / "plays.tsv", "user\tsong\tplayed_at\na\ts 1, live\t1421163674\n")
    rows, _ = read(file, ReadOptions(delimiter="\t"))
    assert rows[0]["song_id"] == "s 1, live"


def test_playlist_entries_are_read_with_their_positions(tmp_path: Path) -> None:
    file = write(tmp_path / "lists.csv", "playlist,position,song\np1,0,s1\np1,1,s2\n,2,s3\np1,first,s3\n")
    rows, rejected = read(file, ReadOptions(playlists=True))
    assert [(row["playlist_id"], row["position"], row["song_id"]) for row in rows] == [("p1", 0, "s1"), ("p1", 1, "s2")]
    assert [row["reason"] for row in rejected] == ["no playlist", "position is not a whole number"]


def test_parquet_types_are_taken_as_they_are(tmp_path: Path) -> None:
    moment = datetime(2015, 1, 13, 15, 41, 14, tzinfo=timezone.utc)
    table = pa.table(
        {
            "user_id": pa.array([7, 8, None]),
            "song_id": pa.array(["s1", "s1", "s2"]).dictionary_encode(),
            "ts": pa.array([moment] * 3, pa.timestamp("us", "Europe/Berlin")),
            "contexts": pa.array([["radio"], [], None], pa.list_(pa.string())),
            "skipped": pa.array([True, None, False]),
        }
    )
    pq.write_table(table, tmp_path / "plays.parquet")
    rows, rejected = read(tmp_path / "plays.parquet", ReadOptions(columns=MAPPING), "parquet")
    assert [(row["user_id"], row["song_id"], row["played_at"]) for row in rows] == [
        ("7", "s1", 1421163674000),
        ("8", "s1", 1421163674000),
    ]
    assert rows[0]["contexts"] == ["radio"]
    assert [row["skipped"] for row in rows] == [True, None]
    assert [(row["line"], row["reason"]) for row in rejected] == [(3, "no user")]
    assert '"song_id": "s2"' in rejected[0]["text"]


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    num_rows = 100
    table = pa.table(
        {"user": ["u"] * num_rows, "song": [f"s{row}" for row in range(num_rows)], "played_at": range(num_rows)}
    )
    file = tmp_path / "plays.parquet"
    pq.write_table(table, file, row_group_size=9)
    units = FORMATS["parquet"].make(ReadOptions()).plan(str(file), file.stat().st_size, 300)
    assert len(units) > 3
    rows, _ = read(file, ReadOptions(), "parquet", unit_bytes=300)
    assert [row["song_id"] for row in rows] == [f"s{row}" for row in range(num_rows)]
    assert [row["line"] for row in rows] == list(range(1, num_rows + 1))


def test_whole_floats_are_ids_without_a_fraction(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"user": [1.0, 2.0], "song": [16.0, None], "played_at": [1421163674.5, 1.0]}), tmp_path / "p.parquet"
    )
    rows, rejected = read(tmp_path / "p.parquet", ReadOptions(), "parquet")
    assert (rows[0]["user_id"], rows[0]["song_id"], rows[0]["played_at"]) == ("1", "16", 1421163674500)
    assert rejected[0]["reason"] == "no song"


def test_the_user_of_the_options_stands_in_for_a_column_of_users(tmp_path: Path) -> None:
    table = pa.table({"song": ["s1", "s2"], "played_at": [1, 2]})
    pq.write_table(table, tmp_path / "p.parquet")
    table.to_pandas().to_csv(tmp_path / "p.csv", index=False)
    for format_name in ("csv", "parquet"):
        rows, rejected = read(tmp_path / f"p.{format_name}", ReadOptions(user="ann"), format_name)
        assert ([(row["user_id"], row["song_id"]) for row in rows], rejected) == ([("ann", "s1"), ("ann", "s2")], [])
    with pytest.raises(InputError, match=r"no column 'user' for user; .* pass --user NAME instead of a user column"):
        read(tmp_path / "p.csv", ReadOptions())


def test_numbers_flags_and_positions_of_a_frame_with_gaps_are_read_from_csv_and_parquet(tmp_path: Path) -> None:
    plays = pd.DataFrame(
        {
            "user": ["u", "u", "u"],
            "artist": ["A", "A", None],
            "title": ["2.0", "2", "2.0"],
            "played_at": [1, 2, 3],
            "skipped": [1.0, 0.0, np.nan],
        }
    )
    entries = pd.DataFrame({"playlist": ["p", "p", "p"], "position": [1.0, 0.0, np.nan], "song": ["a", "b", "c"]})
    for name in ("csv", "parquet"):
        for frame, stem in ((plays, "plays"), (entries, "lists")):  # in csv, 1 is written as 1.0
            path = tmp_path / f"{stem}.{name}"
            frame.to_csv(path, index=False) if name == "csv" else frame.to_parquet(path)
        rows, rejected = read(tmp_path / f"plays.{name}", ReadOptions(columns={"song": "artist+title"}), name)
        assert [(row["song_id"], row["title"]) for row in rows] == [
            ("A – 2.0", "2.0"),
            ("A – 2", "2"),
            ("– 2.0", "2.0"),
        ]
        assert ([row["skipped"] for row in rows], rejected) == ([True, False, None], [])
        rows, rejected = read(tmp_path / f"lists.{name}", ReadOptions(playlists=True), name)
        assert [row["position"] for row in rows] == [1, 0]
        assert [row["reason"] for row in rejected] == ["position is not a whole number"]


def test_songs_without_an_id_are_known_by_artist_and_title(tmp_path: Path) -> None:
    songs = [
        ("m1", "A", "One"),
        ("", "A", "Two"),
        (" ", "A", "Two"),
        ("nan", "B", "Two"),
        ("", "B", ""),
        ("7.0", "", ""),
    ]
    table = pa.table(
        {
            "user": ["ann"] * 6,
            "played_at": range(6),
            **dict(zip(("mbid", "artist", "track"), zip(*songs, strict=True), strict=True)),
        }
    )
    mapping = {"song": "mbid", "title": "track"}
    pq.write_table(table, tmp_path / "p.parquet")
    table.to_pandas().to_csv(tmp_path / "p.csv", index=False)
    for format_name in ("csv", "parquet"):
        rows, rejected = read(tmp_path / f"p.{format_name}", ReadOptions(columns=mapping), format_name)
        assert [row["song_id"] for row in rows] == ["m1", "A – Two", "A – Two", "B – Two", "7"]
        assert [(row["title"], row["artist"]) for row in rows][-2:] == [("Two", "B"), (None, None)]
        assert [row["reason"] for row in rejected] == ["no song"]
    pq.write_table(table.drop_columns("artist"), tmp_path / "q.parquet")
    rows, rejected = read(tmp_path / "q.parquet", ReadOptions(columns=mapping), "parquet")
    assert ([row["song_id"] for row in rows], len(rejected)) == (["m1", "7"], 4)


def test_ids_are_made_of_artist_and_title_where_the_mapping_says_so(tmp_path: Path) -> None:
    table = pa.table(
        {"user": ["ann"] * 3, "artist": ["A", "B", None], "song": ["One", "One", ""], "played_at": [1, 2, 3]}
    )
    pq.write_table(table, tmp_path / "p.parquet")
    table.to_pandas().to_csv(tmp_path / "p.csv", index=False)
    for format_name in ("csv", "parquet"):
        options = ReadOptions(columns={"song": "artist+title", "title": "song"})
        rows, rejected = read(tmp_path / f"p.{format_name}", options, format_name)
        assert [(row["song_id"], row["title"]) for row in rows] == [("A – One", "One"), ("B – One", "One")]
        assert [row["reason"] for row in rejected] == ["no song"]
        with pytest.raises(InputError, match="no column 'title' for title"):
            read(tmp_path / f"p.{format_name}", ReadOptions(columns={"song": "artist+title"}), format_name)


def test_a_csv_file_is_no_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Parquet file"):
        read(write(tmp_path / "plays.parquet", "user,song\n"), ReadOptions(), "parquet")


def test_an_unclosed_quote_rejects_only_its_line(tmp_path: Path) -> None:
    lines = [
        "user,song,played_at,title,artist",
        'u1,s1,1421452800,Blue Monday 12" mix,"Weird',  # an even number of quotes, and one of them opens a value
        "u2,s2,1421452900,Song Two,Band",
        'u3,s3,1421453000,"Song" Three,Band',
        'u4,s4,1421453100,Blue Monday 12" mix,Band',
        'u5,s5,1421453200,"Blue Monday 12"" mix",7" Band',
    ]
    rows, rejected = read(write(tmp_path / "plays.csv", "\n".join(lines) + "\n"), ReadOptions())
    assert [(row["line"], row["title"], row["artist"]) for row in rows] == [
        (3, "Song Two", "Band"),
        (5, 'Blue Monday 12" mix', "Band"),
        (6, 'Blue Monday 12" mix', '7" Band'),
    ]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (2, "a quote is not closed on its line"),
        (4, "text after a closing quote"),
    ]


FRAME = pd.DataFrame({"user": [1.0, 2.0, np.nan], "song": [3, 4, 5], "played_at": [1717200000, 1717200100, 1717200200]})


def test_one_frame_gives_the_same_users_from_csv_and_from_parquet(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "p.csv", index=False)
    FRAME.to_parquet(tmp_path / "p.parquet")
    pq.write_table(pa.Table.from_pandas(FRAME, preserve_index=False), tmp_path / "q.parquet")
    # What polars writes: NaN stays NaN.
    write(tmp_path / "polars.csv", "user,song,played_at\n1.0,3,1717200000\n2.0,4,1717200100\nNaN,5,1717200200\n")
    nan_table = pa.table(
        {
            **{name: FRAME[name].tolist() for name in FRAME},
            "user": pa.array(FRAME["user"].to_numpy(), from_pandas=False),
        }
    )
    pq.write_table(nan_table, tmp_path / "polars.parquet")
    for name in ("p.csv", "polars.csv", "p.parquet", "q.parquet", "polars.parquet"):
        rows, rejected = read(tmp_path / name, ReadOptions(), name.split(".")[1])
        assert [(row["user_id"], row["song_id"]) for row in rows] == [("1", "3"), ("2", "4")], name
        assert [row["reason"] for row in rejected] == ["no user"], name


PLAYS = {"user": ["u", "v"], "song": ["a", "b"], "played_at": [1421452800, 1421452900]}
PLAYED_AT_MS = 1421452800000


@pytest.mark.parametrize(
    ("role", "values", "expected"),
    [
        ("user", pa.array(["u", "v"], pa.large_string()), ["u", "v"]),
        ("user", pa.array(["u", "v"], pa.string_view()), ["u", "v"]),
        ("user", pa.array(["u", "v"]).dictionary_encode(), ["u", "v"]),
        ("user", pa.array([b"u", b"v"]), ["u", "v"]),
        ("user", pa.array([b"0123456789abcdef"] * 2, pa.binary(16)), ["0123456789abcdef"] * 2),
        ("user", pa.array([1 << 63, 1], pa.uint64()), [str(1 << 63), "1"]),
        ("song", pa.array([1e17, 2e15]), ["100000000000000000", "2000000000000000"]),
        ("song", pa.array([16.0, 16.5]), ["16", "16.5"]),
        ("title", pa.array([1999, None]), ["1999", None]),
        ("title", pa.nulls(2), [None, None]),
        ("skipped", pa.array([1.0, 0.0]), [True, False]),
        ("skipped", pa.array([1, None]), [True, None]),
        ("contexts", pa.array([["x"], []], pa.large_list(pa.large_string())), [["x"], []]),
        ("contexts", pa.array(["x | y", ""]), [["x", "y"], None]),
        ("played_at", pa.array([1421452800.25, 1421452900.0]), [PLAYED_AT_MS + 250, PLAYED_AT_MS + 100_000]),
        (
            "played_at",
            pa.array(["2015-01-17T00:00:00Z", "1421452900"]).dictionary_encode(),
            [PLAYED_AT_MS, PLAYED_AT_MS + 100_000],
        ),
        (
            "played_at",
            pa.array([PLAYED_AT_MS * 10**6 + 5, (PLAYED_AT_MS + 100_000) * 10**6], pa.timestamp("ns", "Europe/Berlin")),
            [PLAYED_AT_MS, PLAYED_AT_MS + 100_000],
        ),
    ],
    ids=str,
)
def test_parquet_columns_of_every_sensible_type_are_read(
    tmp_path: Path, role: str, values: pa.Array, expected: list
) -> None:
    pq.write_table(pa.table({**PLAYS, role: values}), tmp_path / "p.parquet")
    rows, rejected = read(tmp_path / "p.parquet", ReadOptions(), "parquet")
    name = {"user": "user_id", "song": "song_id"}.get(role, role)
    assert ([row[name] for row in rows], rejected) == (expected, [])


@pytest.mark.parametrize(
    ("role", "values", "message"),
    [
        ("song", pa.array([["a"], ["b"]]), r"p.parquet: column 'song' holds list<.*>; expected text or numbers"),
        ("user", pa.array([{"id": 1}, {"id": 2}]), "column 'user' holds struct"),
        ("user", pa.array([True, False]), "column 'user' holds bool"),
        ("title", pa.array([["a"], ["b"]]), "column 'title' holds list"),
        ("played_at", pa.array([1, 2], pa.duration("s")), "column 'played_at' holds duration"),
        ("skipped", pa.array([["a"], ["b"]]), "column 'skipped' holds list"),
        ("contexts", pa.array([[["a"]], [["b"]]]), "column 'contexts' holds list"),
    ],
    ids=str,
)
def test_a_parquet_column_that_cannot_hold_its_role_is_named(
    tmp_path: Path, role: str, values: pa.Array, message: str
) -> None:
    pq.write_table(pa.table({**PLAYS, role: values}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "p.parquet", ReadOptions(), "parquet")


def test_uuids_of_parquet_are_spelled_as_everywhere(tmp_path: Path) -> None:
    user_ids = [uuid.UUID(int=1), uuid.UUID(int=2)]
    column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([user_id.bytes for user_id in user_ids], pa.binary(16)))
    pq.write_table(pa.table({**PLAYS, "user": column}), tmp_path / "p.parquet")
    assert [row["user_id"] for row in read(tmp_path / "p.parquet", ReadOptions(), "parquet")[0]] == list(
        map(str, user_ids)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            json.dumps([{"ts": "2015", "name": "x" * 300}] * 700).encode(),
            "is JSON, not csv; pass the format of the file",
        ),
        (b"user,song,played_at\ra,b,1421452800\r", "has carriage returns without line feeds as line ends"),
        ("user,song,played_at\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
        (gzip.compress(b"user,song,played_at\n", mtime=0), r"is a gzip file; give it a name that ends in \.gz"),
        (b"PK\x03\x04....", "is a zip archive; unpack it"),
        (b"PAR1....", "is a Parquet file"),
        (b"user;song;played_at\na;b;1\n", "its delimiter seems to be ';'; pass --delimiter ';'"),
        (b"user\tsong\tplayed_at\na\tb\t1\n", r"pass --delimiter '\\t'"),
        (b'"user";"song";"played_at"\na;b;1\n', "its delimiter seems to be ';'; pass --delimiter ';'"),
        (b'"user"\t"song, or id"\t"played_at"\na\tb\t1\n', r"pass --delimiter '\\t'"),
        (b'"user" name;song;played_at\na;b;1\n', "the header of .* cannot be read: text after a closing quote"),
        (b",".join(b"column%d" % number for number in range(20_000)) + b"\n", "column19 and 19980 more; map them"),
        (b'"user,song,played_at\na,b,1\n', "the header of .* cannot be read: a quote is not closed"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_a_file_that_is_no_csv_is_a_short_clear_error(tmp_path: Path, content: bytes, message: str) -> None:
    file = write(tmp_path / "plays.csv", content)
    with pytest.raises(InputError, match=message) as error:
        FORMATS["csv"].make(ReadOptions()).plan(str(file), len(content), 1 << 20)
    assert len(str(error.value)) < 700


def test_a_header_of_any_length_is_read(tmp_path: Path) -> None:
    names = [f"column-{number:06d}" for number in range(20_000)] + ["user", "song", "played_at"]
    values = ["0"] * 20_000 + ["u", "s", "1421452800"]
    rows, rejected = read(write(tmp_path / "p.csv", ",".join(names) + "\n" + ",".join(values) + "\n"), ReadOptions())
    assert ([(row["user_id"], row["song_id"]) for row in rows], rejected) == ([("u", "s")], [])


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_gzip_file_is_an_error_at_every_byte(tmp_path: Path, damage: str) -> None:
    text = "user,song,played_at\n" + "".join(f"u{row},s,{10**9 + row * 7919}\n" for row in range(30))
    original = gzip.compress(text.encode(), mtime=0)
    expected = read(write(tmp_path / "plays.csv.gz", original), ReadOptions())
    for position in range(len(original)):
        content = bytearray(original[:position] if damage == "cut" else original)
        if damage == "flip":
            content[position] ^= 4
        try:
            result = read(write(tmp_path / "plays.csv.gz", bytes(content)), ReadOptions())
        except DamagedInputError:
            continue
        assert (damage, result) == ("flip", expected)  # the flipped bit is of the gzip date or unused


@pytest.mark.parametrize(
    "changes", [{"sep": ";"}, {"quoting": 1}, {"quoting": 2}, {"lineterminator": "\r\n"}, {"encoding": "utf-8-sig"}]
)
def test_every_dialect_of_pandas_gives_the_same_plays(tmp_path: Path, changes: dict[str, Any]) -> None:
    frame = pd.DataFrame(
        {
            "user": ["a, b", 'say "hi"'],
            "song": ["ö;x", "1"],
            "played_at": pd.to_datetime([PLAYED_AT_MS, PLAYED_AT_MS + 1], unit="ms", utc=True),
        }
    )
    frame.to_csv(tmp_path / "p.csv", index=False, **changes)
    rows, rejected = read(tmp_path / "p.csv", ReadOptions(delimiter=changes.get("sep", ",")))
    assert [(row["user_id"], row["song_id"], row["played_at"]) for row in rows] == [
        ("a, b", "ö;x", PLAYED_AT_MS),
        ('say "hi"', "1", PLAYED_AT_MS + 1),
    ]
    assert rejected == []
