"""A damaged file never ends in a traceback, and no row of it is lost without a reason."""

import bz2
import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.embeddings.word2vec import read_external_vectors
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.descriptions import read_descriptions
from rayrec.importing.readers import FORMATS
from rayrec.importing.readers.reader import ReadOptions

ROWS = 24
START = 1711929600
TITLES = ["Jóga", 'Blue Monday 12" mix', "Plain", "日本, 語"]


def csv_plays(delimiter: str = ",", line_end: str = "\n") -> bytes:
    lines = [delimiter.join(["user", "song", "played_at", "title"])]
    for row in range(ROWS):
        title = TITLES[row % 4].replace('"', '""')
        lines.append(delimiter.join([f"u{row % 3}", f"s{row % 5}", str(START + row), f'"{title}"']))
    return (line_end.join(lines) + line_end).encode()


def lastfm_plays() -> bytes:
    lines = [f"user_{row % 3}\t2009-05-04T23:08:{row:02}Z\tx\tBjörk\t\tSong {row % 5}" for row in range(ROWS)]
    return ("\n".join(lines) + "\n").encode()


def listens() -> list[dict[str, Any]]:
    names = [{"artist_name": "Björk", "track_name": TITLES[row % 4]} for row in range(ROWS)]
    return [
        {"listened_at": START + row, "user_name": f"u{row % 3}", "track_metadata": names[row]} for row in range(ROWS)
    ]


def streams() -> list[dict[str, Any]]:
    return [
        {"ts": f"2024-04-01T10:00:{row:02}Z", "username": "ann", "spotify_track_uri": f"t{row}", "ms_played": 40_000}
        for row in range(ROWS)
    ]


def slice_of_playlists() -> dict[str, Any]:
    tracks = [
        {"pos": position, "track_uri": f"t{position}", "track_name": TITLES[position % 4]} for position in range(6)
    ]
    return {"info": {}, "playlists": [{"pid": number, "tracks": tracks} for number in range(ROWS // 6)]}


def parquet_plays() -> bytes:
    rows = range(ROWS)
    table = {"user": [f"u{row % 3}" for row in rows], "song": [row % 5 for row in rows]}
    table |= {"played_at": pa.array([(START + row) * 1000 for row in rows], pa.timestamp("ms", "UTC"))}
    table |= {"title": [TITLES[row % 4] for row in rows]}
    stream = io.BytesIO()
    pq.write_table(pa.table(table), stream, row_group_size=10, write_page_checksum=True)
    return stream.getvalue()


def apple_plays() -> bytes:
    lines = ["Song Name,Event Type,Event Start Timestamp,Play Duration Milliseconds"]
    lines += [f"Song {row % 5},PLAY_END,2024-04-01T10:00:{row:02}Z,{row * 5_000}" for row in range(ROWS)]
    return ("\n".join(lines) + "\n").encode()


def tidal_plays() -> bytes:
    lines = ["artist_name,track_title,entry_date,stream_duration_ms,product_type,time_zone"]
    lines += [f"Björk,Song {row},08/03/2022 19:{row:02},{row}000.0,TRACK,America/Toronto" for row in range(ROWS)]
    return ("\n".join(lines) + "\n").encode()


def onion_plays() -> bytes:
    lines = ["user_id\ttrack_id\ttimestamp"]
    lines += [f"{row % 3}\tQm{row % 5}\t2013-01-27 21:42:{row:02}" for row in range(ROWS)]
    return ("\n".join(lines) + "\n").encode()


def deezer_plays() -> bytes:
    book = openpyxl.Workbook()
    sheet = book.create_sheet("10_listeningHistory")
    sheet.append(["Song Title", "Artist", "ISRC", "Listening Time", "Date"])
    for row in range(ROWS):
        sheet.append([TITLES[row % 4], "Björk", f"GB{row}", row * 5, f"2024-04-01 10:00:{row:02}"])
    stream = io.BytesIO()
    book.save(stream)
    return stream.getvalue()


def watch_history() -> list[dict[str, Any]]:
    link = "https://music.youtube.com/watch?v="
    return [
        {"title": TITLES[row % 4], "titleUrl": f"{link}{row}", "time": f"2022-04-25T18:09:{row:02}Z"}
        for row in range(ROWS)
    ]


def yambda_plays() -> bytes:
    rows = pa.array(range(ROWS), pa.uint32())
    table = {"uid": rows, "timestamp": rows, "item_id": rows, "is_organic": pa.array([1] * ROWS, pa.uint8())}
    stream = io.BytesIO()
    pq.write_table(pa.table(table), stream, row_group_size=10, write_page_checksum=True)
    return stream.getvalue()


def json_bytes(value: Any, **options: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode()


@dataclass(frozen=True)
class Sample:
    """An undamaged file of one format."""

    format: str
    name: str
    make: Callable[[], bytes]
    detects_cuts: bool = False  # every cut is detected
    has_checksum: bool = False  # has a checksum: if a damaged file can be read, its rows are right
    header_lines: int = 0  # number of lines that are not rows
    separator: str = ","


SAMPLES = {
    "csv": Sample("csv", "p.csv", csv_plays, header_lines=1),
    "csv CRLF semicolon": Sample("csv", "p.csv", lambda: csv_plays(";", "\r\n"), header_lines=1, separator=";"),
    "csv.gz": Sample("csv", "p.csv.gz", lambda: gzip.compress(csv_plays(), mtime=0), True, has_checksum=True),
    "apple-music": Sample("apple-music", "Apple Music Play Activity.csv", apple_plays, header_lines=1),
    "deezer": Sample("deezer", "deezer-data_1.xlsx", deezer_plays, True, has_checksum=True),
    "music4all-onion": Sample("music4all-onion", "p.tsv", onion_plays, header_lines=1, separator="\t"),
    "music4all-onion.bz2": Sample(
        "music4all-onion", "p.tsv.bz2", lambda: bz2.compress(onion_plays()), True, has_checksum=True
    ),
    "tidal": Sample("tidal", "streaming.csv", tidal_plays, header_lines=1),
    "yambda": Sample("yambda", "listens.parquet", yambda_plays, detects_cuts=True),
    "youtube-takeout": Sample("youtube-takeout", "watch-history.json", lambda: json_bytes(watch_history()), True),
    "lastfm": Sample("lastfm-1k", "userid-timestamp.tsv", lastfm_plays),
    "listenbrainz lines": Sample(
        "listenbrainz", "p.jsonl", lambda: b"\n".join(json_bytes(listen) for listen in listens()) + b"\n"
    ),
    "listenbrainz list": Sample("listenbrainz", "p.json", lambda: json_bytes(listens()), detects_cuts=True),
    "spotify": Sample("spotify-history", "endsong_0.json", lambda: json_bytes(streams(), indent=2), detects_cuts=True),
    "mpd": Sample("mpd", "mpd.slice.0-3.json", lambda: json_bytes(slice_of_playlists()), detects_cuts=True),
    "parquet": Sample("parquet", "p.parquet", parquet_plays, detects_cuts=True),
    "sequences": Sample(
        "sequences", "p.txt", lambda: "".join(f"u{row}->s1|s{row}|ü{row % 5}\n" for row in range(ROWS)).encode()
    ),
}


def outcome(
    sample: Sample, content: bytes, folder: Path, unit_bytes: int = 1 << 20
) -> tuple[list[Any], list[Any]] | InputError:
    """The rows and the rejected rows of a file, or the error that says what is wrong with it."""
    path = folder / sample.name
    path.write_bytes(content)
    options = ReadOptions(
        playlists=FORMATS[sample.format].playlists,
        delimiter=sample.separator,
        user_separator="->" if sample.format == "sequences" else "",
        song_separator="|" if sample.format == "sequences" else " ",
    )
    reader = FORMATS[sample.format].make(options)
    rows, rejected = [], []
    try:
        for unit in reader.plan(str(path), len(content), unit_bytes):
            for batch in reader.read(unit):
                assert batch.read == batch.rows.num_rows + batch.rejected.num_rows
                batch.rows.validate(full=True)
                rows += batch.rows.drop(["source", "line"]).to_pylist()
                rejected += batch.rejected.to_pylist()
    except InputError as error:
        message = str(error)
        if str(path) not in message or len(message) > 1_000:
            raise AssertionError(message) from error
        return error
    assert all(row["reason"] and row["line"] >= 1 for row in rejected)
    return rows, rejected


def count_rows(sample: Sample, content: bytes) -> int:
    """Number of non-empty lines of a file: each must become a row or a rejected row."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return sum(1 for line in lines[sample.header_lines :] if line.removesuffix(b"\r"))


def mutate(original: bytes, random: np.random.Generator) -> tuple[str, bytes]:
    """Return the kind of damage and the bytes: a cut, a changed bit or byte, or bytes removed, doubled or inserted."""
    position = int(random.integers(len(original)))
    length = int(random.integers(1, 20))
    kind = random.choice(["cut", "flip", "byte", "hole", "double", "zeros"])
    mutations = {
        "cut": lambda: original[:position],
        "flip": lambda: (
            original[:position]
            + bytes([original[position] ^ (1 << int(random.integers(8)))])
            + original[position + 1 :]
        ),
        "byte": lambda: original[:position] + bytes([int(random.integers(256))]) + original[position + 1 :],
        "hole": lambda: original[:position] + original[position + length :],
        "double": lambda: original[: position + length] + original[position:],
        "zeros": lambda: original[:position] + bytes(length) + original[position + length :],
    }
    return str(kind), mutations[kind]()


def check_mutations(sample: Sample, folder: Path, count: int) -> None:
    original, random = sample.make(), np.random.default_rng(20)
    expected = outcome(sample, original, folder)
    assert not isinstance(expected, InputError)
    assert (len(expected[0]) >= ROWS, expected[1]) == (True, [])
    lines_are_rows = not sample.detects_cuts and sample.format != "sequences"
    for _ in range(count):
        kind, content = mutate(original, random)
        result = outcome(sample, content, folder)
        if isinstance(result, InputError):
            continue
        if sample.detects_cuts:
            assert kind != "cut", content
        if sample.has_checksum:
            assert result == expected, content
        if lines_are_rows:
            assert len(result[0]) + len(result[1]) == count_rows(sample, content), content


@pytest.mark.parametrize("name", SAMPLES)
def test_a_damaged_file_is_an_error_or_every_row_of_it_is_accounted_for(name: str, tmp_path: Path) -> None:
    check_mutations(SAMPLES[name], tmp_path, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_thousands_of_damaged_files_are_errors_or_accounted_for(name: str, tmp_path: Path) -> None:
    check_mutations(SAMPLES[name], tmp_path, 2_500)


def song_table(id_column: str, **values: list[Any]) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table({id_column: [f"s{row}" for row in range(5)], **values}), stream, write_page_checksum=True)
    return stream.getvalue()


def check_song_files(folder: Path, count: int) -> None:
    """Damaged files of song metadata and vectors are read, or the error names the file."""
    vectors = [[float(row), 1.0] for row in range(5)]
    npy_stream = io.BytesIO()
    np.save(npy_stream, np.array(vectors))
    rows = {columns.SONG: range(5), columns.SONG_ID: [f"s{row}" for row in range(5)]}
    catalog = Catalog(pa.table({**rows, columns.TITLE: [None] * 5, columns.ARTIST: [None] * 5}, columns.SONGS_TABLE))
    csv_text = "song,title,released\n" + "".join(f's{row},"T, {row}",200{row}\n' for row in range(5))
    files: dict[str, tuple[bytes, Callable[[str], Any]]] = {
        "songs.csv": (csv_text.encode(), read_descriptions),
        "songs.csv.bz2": (bz2.compress(csv_text.encode()), read_descriptions),
        "songs.parquet": (song_table("song", title=[*TITLES, "x"]), read_descriptions),
        "vectors.parquet": (song_table("song_id", vector=vectors), lambda path: read_external_vectors(path, catalog)),
        "vectors.npy": (npy_stream.getvalue(), lambda path: read_external_vectors(path, catalog)),
    }
    random = np.random.default_rng(20)
    for name, (original, read) in files.items():
        path = folder / name
        path.write_bytes(original)
        read(str(path))
        for _ in range(count):
            kind, content = mutate(original, random)
            path.write_bytes(content)
            try:
                read(str(path))
            except InputError as error:
                assert str(path) in str(error), content  # noqa: PT017
            else:
                assert kind != "cut" or name == "songs.csv", content


def test_damaged_song_metadata_and_vectors_are_errors_that_name_the_file(tmp_path: Path) -> None:
    check_song_files(tmp_path, 40)


@pytest.mark.slow
def test_thousands_of_damaged_song_files_are_errors_that_name_the_file(tmp_path: Path) -> None:
    check_song_files(tmp_path, 2_000)


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if sample.detects_cuts])
def test_a_format_that_marks_its_end_detects_every_cut(name: str, tmp_path: Path) -> None:
    sample = SAMPLES[name]
    original = sample.make()
    for end in range(0, len(original), max(1, len(original) // 300)):
        assert isinstance(outcome(sample, original[:end], tmp_path), DamagedInputError), end


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("unit_bytes", [1, 100])
def test_units_of_any_size_give_the_same_rows(name: str, unit_bytes: int, tmp_path: Path) -> None:
    content = SAMPLES[name].make()
    result = outcome(SAMPLES[name], content, tmp_path, unit_bytes)
    assert result == outcome(SAMPLES[name], content, tmp_path)


@pytest.mark.parametrize("name", SAMPLES)
def test_an_empty_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    assert isinstance(outcome(SAMPLES[name], b"", tmp_path), DamagedInputError)


@pytest.mark.parametrize(
    ("name", "other"),
    [(name, other) for name, other in product(SAMPLES, SAMPLES) if SAMPLES[name].format != SAMPLES[other].format],
)
def test_a_file_of_another_format_is_an_error_or_gives_no_row(name: str, other: str, tmp_path: Path) -> None:
    result = outcome(SAMPLES[name], SAMPLES[other].make(), tmp_path)
    if not isinstance(result, InputError):
        assert result[0] == []
        assert result[1]


@pytest.mark.parametrize(
    "name", ["csv", "lastfm", "tidal", "listenbrainz lines", "listenbrainz list", "spotify", "mpd"]
)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-8-sig"])
def test_rows_in_another_encoding_are_rejected_or_the_file_is_an_error(
    name: str, encoding: str, tmp_path: Path
) -> None:
    sample = SAMPLES[name]
    text = sample.make().decode().replace("日本, 語", "ß").replace("Plain", "Ö")
    utf8_result = outcome(sample, text.encode(), tmp_path)
    result = outcome(sample, text.encode(encoding), tmp_path)
    assert not isinstance(utf8_result, InputError)
    if encoding == "utf-16":
        assert isinstance(result, DamagedInputError)
    elif encoding == "utf-8-sig":
        assert result == utf8_result
    else:
        assert not isinstance(result, InputError)
        assert len(result[0]) + len(result[1]) == len(utf8_result[0])
        assert {row["reason"] for row in result[1]} <= {"not UTF-8"}
