"""csv and Parquet files of plays and playlists."""

import gzip
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.data import columns
from rayrec.errors import InputError
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions

MAPPING = {"user": "user_id", "song": "song_id", "played_at": "ts"}


def read(path: Path, options: ReadOptions, format_name: str = "csv", unit_bytes: int = 1 << 20) -> tuple[list, list]:
    """Good rows and rejected rows of all units, lines as the file counts them."""
    reader = FORMATS[format_name].make(options)
    good, bad, before = [], [], 0
    for unit in reader.plan(str(path), path.stat().st_size, unit_bytes):
        covered = 0
        for batch in reader.read(unit):
            assert batch.read == batch.rows.num_rows + batch.rejected.num_rows
            assert batch.rows.schema == (columns.PLAYLIST_ENTRIES if options.playlists else columns.PLAYS)
            good += [{**row, "line": row["line"] + before} for row in batch.rows.to_pylist()]
            bad += [{**row, "line": row["line"] + before} for row in batch.rejected.to_pylist()]
            covered += batch.lines
        before += covered
    return good, bad


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
    good, bad = read(file, ReadOptions(columns=MAPPING))
    assert bad == []
    assert good[0] == {
        "user_id": "ann",
        "song_id": "s1",
        "played_at": 1421163674000,
        "contexts": ["radio", "search"],
        "skipped": True,
        "title": "Hello, you",
        "artist": 'The "A"',
        "source": str(file),
        "line": 2,
    }
    assert good[1]["played_at"] == 1421163674000
    assert (good[1]["contexts"], good[1]["skipped"], good[1]["title"]) == (None, False, None)


def test_each_bad_line_is_rejected_by_itself_with_its_number_and_text(tmp_path: Path) -> None:
    lines = [
        b"user,song,played_at,skipped",
        b"a,s1,1421163674,1",  # 2: good
        b"a,s1",  # 3: too few values
        b"",  # 4: empty, passed over
        b",s1,1421163674,1",  # 5
        b"a,,1421163674,1",  # 6
        b"a,s1,,1",  # 7
        b"a,s1,yesterday,1",  # 8
        b"a,s1,2015-01-13T15:41:14,1",  # 9: no zone
        b"a,s1,1421163674,perhaps",  # 10
        b'a,"s1,1421163674,1',  # 11: a quote stays open
        b"a,s\xff,1421163674,1",  # 12: not UTF-8
        b"a,s\r1,1421163674,1",  # 13
        b"a,s2,1421163675,0",  # 14: good
        b"a,s2,1421163675,0,9",  # 15: too many
        b"a,s3,1421163676,",  # 16: good, the file ends without a line break
    ]
    good, bad = read(write(tmp_path / "plays.csv", b"\n".join(lines)), ReadOptions())
    assert [(row["line"], row["song_id"]) for row in good] == [(2, "s1"), (14, "s2"), (16, "s3")]
    assert [(row["line"], row["reason"]) for row in bad] == [
        (3, "2 values where the file has 4"),
        (5, "no user"),
        (6, "no song"),
        (7, "no time"),
        (8, "time is neither unix seconds, unix milliseconds nor ISO 8601"),
        (9, "time without a zone"),
        (10, "skipped is none of true, false, 1, 0"),
        (11, "a quote is not closed on its line"),
        (12, "not UTF-8"),
        (13, "a carriage return within the line"),
        (15, "5 values where the file has 4"),
    ]
    assert bad[1]["text"] == ",s1,1421163674,1"
    assert bad[7]["text"] == 'a,"s1,1421163674,1'
    assert bad[8]["text"] == "a,s\N{REPLACEMENT CHARACTER},1421163674,1"


@pytest.mark.parametrize("unit_bytes", [1, 7, 16, 24, 31, 64, 1000])  # 24: the header, to the byte
def test_byte_ranges_of_any_size_give_the_rows_and_lines_of_the_whole(tmp_path: Path, unit_bytes: int) -> None:
    body = "".join(f"u{row % 3},s{row},{1421163674 + row}\r\n" + ("\r\n" if row % 5 == 0 else "") for row in range(40))
    file = write(tmp_path / "plays.csv", "\N{BYTE ORDER MARK}user,song,played_at\r\n" + body + "bad\r\n")
    whole = read(file, ReadOptions())
    assert len(whole[0]) == 40
    assert [row["reason"] for row in whole[1]] == ["1 values where the file has 3"]
    assert whole[1][0]["line"] == 50
    assert read(file, ReadOptions(), unit_bytes=unit_bytes) == whole


def test_blocks_end_anywhere_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayrec.importing.readers import lines

    file = write(
        tmp_path / "plays.csv", "user,song,played_at\n" + "".join(f"u,s{row},{10**9 + row}\n" for row in range(30))
    )
    whole = read(file, ReadOptions())
    for size in (1, 5, 17, 100):
        monkeypatch.setattr(lines.read_blocks, "__defaults__", (size,))
        assert read(file, ReadOptions()) == whole


def test_a_gzip_file_is_one_unit_with_the_same_rows(tmp_path: Path) -> None:
    text = "user,song,played_at\na,s,1421163674\nb,s,x\n"
    plain = read(write(tmp_path / "plays.csv", text), ReadOptions())
    packed = read(write(tmp_path / "plays.csv.gz", gzip.compress(text.encode())), ReadOptions(), unit_bytes=4)
    assert [row["user_id"] for row in packed[0]] == [row["user_id"] for row in plain[0]] == ["a"]
    assert [row["line"] for row in packed[1]] == [3]


def test_a_cut_off_gzip_file_is_an_input_error(tmp_path: Path) -> None:
    text = "user,song,played_at\n" + "".join(f"u{row},s,{10**9 + row * 7919}\n" for row in range(20_000))
    file = write(tmp_path / "plays.csv.gz", gzip.compress(text.encode())[:-5000])
    with pytest.raises(InputError, match="is not a whole gzip file"):
        read(file, ReadOptions())


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        ("user,song,ts", ReadOptions(), "no column 'played_at' for played_at; it has user, song, ts"),
        ("user,song,ts", ReadOptions(columns={"played_at": "when"}), "no column 'when' for played_at"),
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
    good, _ = read(file, ReadOptions(delimiter="\t"))
    assert good[0]["song_id"] == "s 1, live"


def test_playlist_entries_are_read_with_their_positions(tmp_path: Path) -> None:
    file = write(tmp_path / "lists.csv", "playlist,position,song\np1,0,s1\np1,1,s2\n,2,s3\np1,first,s3\n")
    good, bad = read(file, ReadOptions(playlists=True))
    assert [(row["playlist_id"], row["position"], row["song_id"]) for row in good] == [("p1", 0, "s1"), ("p1", 1, "s2")]
    assert [row["reason"] for row in bad] == ["no playlist", "position is not a whole number"]


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
    good, bad = read(tmp_path / "plays.parquet", ReadOptions(columns=MAPPING), "parquet")
    assert [(row["user_id"], row["song_id"], row["played_at"]) for row in good] == [
        ("7", "s1", 1421163674000),
        ("8", "s1", 1421163674000),
    ]
    assert good[0]["contexts"] == ["radio"]
    assert [row["skipped"] for row in good] == [True, None]
    assert [(row["line"], row["reason"]) for row in bad] == [(3, "no user")]
    assert '"song_id": "s2"' in bad[0]["text"]


def test_parquet_is_cut_at_row_groups(tmp_path: Path) -> None:
    rows = 100
    table = pa.table({"user": ["u"] * rows, "song": [f"s{row}" for row in range(rows)], "played_at": range(rows)})
    file = tmp_path / "plays.parquet"
    pq.write_table(table, file, row_group_size=9)
    units = FORMATS["parquet"].make(ReadOptions()).plan(str(file), file.stat().st_size, 300)
    assert len(units) > 3
    good, _ = read(file, ReadOptions(), "parquet", unit_bytes=300)
    assert [row["song_id"] for row in good] == [f"s{row}" for row in range(rows)]
    assert [row["line"] for row in good] == list(range(1, rows + 1))


def test_whole_floats_are_ids_without_a_fraction(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"user": [1.0, 2.0], "song": [16.0, None], "played_at": [1421163674.5, 1.0]}), tmp_path / "p.parquet"
    )
    good, bad = read(tmp_path / "p.parquet", ReadOptions(), "parquet")
    assert (good[0]["user_id"], good[0]["song_id"], good[0]["played_at"]) == ("1", "16", 1421163674500)
    assert bad[0]["reason"] == "no song"


def test_a_csv_file_is_no_parquet_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a Parquet file"):
        read(write(tmp_path / "plays.parquet", "user,song\n"), ReadOptions(), "parquet")
