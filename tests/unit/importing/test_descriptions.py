"""The metadata of a table of songs is joined to the catalog by song id."""

import gzip
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import random_histories, write_dataset

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.errors import InputError, NotFoundError
from rayrec.importing.descriptions import DescribeConfig, describe, read_descriptions
from rayrec.jobs.verify import verify_workspace
from rayrec.recommend.filters import SongAttributes, SongMasks
from rayrec.storage import artifacts
from rayrec.storage.artifacts import write_dataset_manifest
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

CSV = """song,title,artist,released,markets
song-3,Three,,2001-05-07,SE|NO
song-0,Zero,Ann,1999,
song-9,Nine,Bo,,SE
song-3,Again,Cy,,
other,Other,,,
,,,,
song-1,,Di,1984-12,
"""


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    return write_dataset(workspace, random_histories(5, 6), num_songs=6)


def write_file(folder: Path, text: str, name: str = "songs.csv") -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


def test_a_csv_without_an_end_of_its_last_line_and_one_with_another_delimiter_are_pointed_out(
    dataset: Dataset, tmp_path: Path
) -> None:
    path = write_file(tmp_path, CSV.rstrip("\n"))
    result = describe(dataset.workspace, DescribeConfig(), path)
    assert result.warnings == [f"The last line of {path} has no line end: the file may be incomplete."]
    assert describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, CSV)).warnings == []
    with pytest.raises(InputError, match="its delimiter seems to be ';'; pass --delimiter ';'"):
        read_descriptions(write_file(tmp_path, CSV.replace(",", ";")))


@pytest.mark.parametrize("name", ["songs.csv", "songs.csv.gz"])
def test_songs_are_described_by_id(dataset: Dataset, tmp_path: Path, name: str) -> None:
    result = describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, CSV, name))
    assert (result.songs, result.described, result.unknown) == (6, 3, 2)
    assert (result.titles, result.artists, result.released, result.markets) == (6, 6, 3, 1)
    table = dataset.catalog().table
    assert table.column(columns.SONG_ID).to_pylist() == [f"song-{row}" for row in range(6)]
    # The first row of a song counts, and an empty value leaves the known value unchanged.
    assert table.column(columns.TITLE).to_pylist() == ["Zero", "Title 1", "Title 2", "Three", "Title 4", "Title 5"]
    assert table.column(columns.ARTIST).to_pylist()[:4] == ["Ann", "Di", "Artist 2", "Artist 3"]
    assert table.column(columns.RELEASED).to_pylist() == [
        date(1999, 1, 1),
        date(1984, 12, 1),
        None,
        date(2001, 5, 7),
        None,
        None,
    ]
    assert table.column(columns.MARKETS).to_pylist() == [None, None, None, ["SE", "NO"], None, None]


def test_parquet_gives_dates_and_lists_and_columns_are_mapped(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "songs.parquet"
    table = {
        "id": ["song-2"],
        "when": pa.array([date(2020, 1, 2)]),
        "where": pa.array([["SE", "DE"]]),
        "artist": [["A", "B"]],
    }
    pq.write_table(pa.table(table), path)
    mapping = {"song": "id", "released": "when", "markets": "where"}
    assert describe(dataset.workspace, DescribeConfig(columns=mapping), str(path)).released == 1
    row = dataset.catalog().table.slice(2, 1).to_pylist()[0]
    assert (row[columns.RELEASED], row[columns.MARKETS], row[columns.TITLE], row[columns.ARTIST]) == (
        date(2020, 1, 2),
        ["SE", "DE"],
        "Title 2",
        "A",
    )


def test_a_second_table_takes_the_place_of_the_first(dataset: Dataset, tmp_path: Path) -> None:
    describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, CSV))
    describe(dataset.workspace, DescribeConfig(delimiter=";"), write_file(tmp_path, "song;title\nsong-0;New\n"))
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "New"
    assert dataset.catalog().table.column(columns.RELEASED).null_count == 6
    (artifact,) = artifacts.listing(dataset.workspace, "descriptions")
    assert dataset.workspace.folders("descriptions") == [artifact.id]
    artifacts.verify(dataset.workspace, artifact)
    describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, CSV))
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "Zero"


def test_each_content_of_a_file_gets_its_own_id(dataset: Dataset, tmp_path: Path) -> None:
    """Retrieval, added songs and the server's catalog are cached by this id."""
    tables = ["song,artist\nsong-0,Ann\n", "song,artist\nsong-0,Bo\n", "song,title\nsong-0,Ann\n"]
    table_ids = [describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, text)).id for text in tables]
    assert len(set(table_ids)) == 3
    config = DescribeConfig(vectors=str(tmp_path / "content.npy"))
    vector_ids = []
    for song_ids, first in ((["song-4"], 0), (["song-5"], 0), (["song-5"], 7)):
        write_vectors(tmp_path, song_ids, first=first)
        vector_ids.append(describe(dataset.workspace, config).id)
    assert len(set(vector_ids)) == 3


def test_metadata_is_used_for_later_versions_of_its_dataset_and_for_no_other(dataset: Dataset, tmp_path: Path) -> None:
    describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, CSV))
    write_dataset_manifest(dataset.workspace, replace(dataset.manifest, id="next", ancestors=[dataset.manifest.id]))
    assert Dataset(dataset.workspace).catalog().titles(np.array([0])) == ["Ann – Zero"]
    write_dataset_manifest(dataset.workspace, replace(dataset.manifest, id="other"))
    assert Dataset(dataset.workspace).catalog().titles(np.array([0])) == ["Artist 0 – Title 0"]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("id,title\na,b\n", "songs.csv", "no column 'song'.*map it with --columns song=NAME"),
        ("song,mood\na,b\n", "songs.csv", "has no metadata"),
        ("song,title\na\n", "songs.csv", "no row can be used: 1 × 1 values, but the file has 2 columns"),
        ("song,title\n", "songs.csv", "no row can be used: the file has no rows"),
        ("", "songs.csv", "is empty"),
        ('[{"song": "a", "title": "b"}]', "songs.csv", "is JSON"),
        ("song,title\ra,b\r", "songs.csv", "carriage returns without line feeds"),
        ("song,title,title\na,b,c\n", "songs.csv", "2 columns named 'title'"),
        ("song;title\na;b\n", "songs.csv", "pass --delimiter"),
        ("song,title\na,b\n", "songs.parquet", "is not a Parquet file"),
        ("song,title\na,b\n", "songs.xls", "is not .csv, .tsv or .parquet"),
    ],
)
def test_an_unusable_file_is_an_error_that_says_why(
    dataset: Dataset, tmp_path: Path, text: str, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, text, name))
    assert columns.RELEASED not in dataset.catalog().table.column_names


def test_unknown_roles_and_missing_data_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot map a column to 'mood'"):
        describe(dataset.workspace, DescribeConfig(columns={"mood": "a"}), write_file(tmp_path, CSV))
    with pytest.raises(NotFoundError, match="no data set"):
        describe(Workspace(tmp_path / "none"), DescribeConfig(), write_file(tmp_path, CSV))
    with pytest.raises(InputError, match="delimiter"):
        DescribeConfig(delimiter="ab")


def test_ids_and_markets_are_spelled_as_imports_and_queries_spell_them(dataset: Dataset, tmp_path: Path) -> None:
    table = "song,title,markets\nsong-0 ,Zero, DE | FR\n song-1,One,\n"
    result = describe(dataset.workspace, DescribeConfig(), write_file(tmp_path, table))
    assert (result.described, result.unknown, result.markets) == (2, 0, 1)
    assert dataset.catalog().table.column(columns.MARKETS).to_pylist()[0] == ["DE", "FR"]
    assert SongMasks(dataset.catalog()).fitting(SongAttributes(market="FR")).between(0, 6).tolist() == [0]


def test_whole_numbers_are_the_same_songs_in_every_file(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("a.csv", "a.parquet"):
        frame = pd.DataFrame({"song": [1.0, 2.0, np.nan], "title": ["One", "Two", "None"]})
        frame.to_csv(tmp_path / name, index=False) if name == "a.csv" else frame.to_parquet(tmp_path / name)
        metadata = read_descriptions(str(tmp_path / name))
        assert metadata.table.column(columns.SONG_ID).to_pylist() == ["1", "2"]
        assert metadata.rejected == {"no song": 1}


def test_years_are_release_days_and_titles_stay_text_in_a_frame_with_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame({"song": ["a", "b"], "title": ["2.0", "nan"], "released": [1999.0, np.nan]})
    frame.to_csv(tmp_path / "a.csv", index=False)  # writes 1999.0
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        metadata = read_descriptions(str(tmp_path / name))
        assert metadata.table.column(columns.TITLE).to_pylist() == ["2.0", "nan"]
        assert metadata.table.column(columns.RELEASED).to_pylist() == [date(1999, 1, 1), None]
        assert metadata.invalid == {}


@pytest.mark.parametrize("name", ["songs.csv", "songs.parquet"])
def test_an_invalid_value_is_left_out_and_counted(dataset: Dataset, tmp_path: Path, name: str) -> None:
    days = ["2020-02-31", "spring", "0000", "1999", None, "2001-05-07"]
    table = {"song": [f"song-{row}" for row in range(6)], "title": ["T"] * 6, "released": days}
    path = tmp_path / name
    pd.DataFrame(table).to_csv(path, index=False) if name.endswith("csv") else pq.write_table(pa.table(table), path)
    result = describe(dataset.workspace, DescribeConfig(), str(path))
    assert (result.described, result.titles, result.released) == (6, 6, 2)
    assert (result.rejected, result.invalid) == ({}, {"release day is not YYYY-MM-DD, YYYY-MM or YYYY": 3})
    assert dataset.catalog().table.column(columns.RELEASED).to_pylist() == [None] * 3 + [
        date(1999, 1, 1),
        None,
        date(2001, 5, 7),
    ]


def test_values_that_python_or_a_response_cannot_hold_are_left_out(dataset: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "songs.parquet"
    table = {
        "song": ["song-0", "song-1", "song-2"],
        "title": pa.array([b"\xff", b"One", b"Two"]),
        "released": pa.array([-(10**6), 10**7, 0], pa.int32()).cast(pa.date32()),
        "markets": pa.array([["SE", None, ""], [], None], pa.large_list(pa.large_string())),
    }
    pq.write_table(pa.table(table), path)
    result = describe(dataset.workspace, DescribeConfig(), str(path))
    assert result.invalid == {"title: not UTF-8": 1, "release day is not in the years 1 to 9999": 2}
    rows = dataset.catalog().table.to_pylist()
    assert [row[columns.RELEASED] for row in rows[:3]] == [None, None, date(1970, 1, 1)]
    assert [row[columns.MARKETS] for row in rows[:3]] == [["SE"], [], None]
    assert rows[0][columns.TITLE] == "Title 0"


def test_a_header_over_128_kib_and_stray_quotes_are_read_as_an_import_reads_them(
    dataset: Dataset, tmp_path: Path
) -> None:
    extra = ",".join(f"column-{number:06d}" for number in range(20_000))
    rows = [f'song-{row},Blue Monday 12" mix,' + "," * 19_999 for row in range(2)] + ['song-2,"Weird,' + "," * 19_999]
    result = describe(
        dataset.workspace, DescribeConfig(), write_file(tmp_path, "\n".join([f"song,title,{extra}", *rows]))
    )
    assert (result.described, result.rejected) == (2, {"a quote is not closed on its line": 1})
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == 'Blue Monday 12" mix'


@pytest.mark.parametrize("name", ["title", "song", "markets"])
def test_a_column_of_a_type_that_cannot_hold_its_role_is_named(dataset: Dataset, tmp_path: Path, name: str) -> None:
    path = tmp_path / "s.parquet"
    pq.write_table(pa.table({"song": ["a"], "album": ["b"], f"my {name}": pa.array([{"x": 1}])}), path)
    with pytest.raises(InputError, match=f"{path}: column 'my {name}' holds struct"):
        describe(dataset.workspace, DescribeConfig(columns={name: f"my {name}"}), str(path))


def write_vectors(folder: Path, song_ids: list[str], dim: int = 3, first: float = 0.0, name: str = "content") -> str:
    np.save(folder / f"{name}.npy", first + np.arange(len(song_ids) * dim, dtype=np.float64).reshape(-1, dim))
    (folder / f"{name}.ids.txt").write_text("\n".join(song_ids) + "\n")
    return str(folder / f"{name}.npy")


def test_content_vectors_are_imported_with_the_table_and_read_for_the_requested_songs(
    dataset: Dataset, tmp_path: Path
) -> None:
    vectors = write_vectors(tmp_path, ["song-4", "song-9", "song-1"])
    result = describe(dataset.workspace, DescribeConfig(vectors=vectors), write_file(tmp_path, CSV))
    assert (result.content, result.released) == (2, 3)
    content_vectors = dataset.content()
    assert content_vectors.dim == 3
    np.testing.assert_array_equal(content_vectors.vectors(np.array([1, 0, 4])), [[6, 7, 8], [0, 0, 0], [0, 1, 2]])


def test_appended_metadata_keeps_the_metadata_of_other_songs(dataset: Dataset, tmp_path: Path) -> None:
    vectors = write_vectors(tmp_path, ["song-4", "song-1"])
    describe(dataset.workspace, DescribeConfig(vectors=vectors), write_file(tmp_path, CSV))
    later_path = write_file(tmp_path, "song,artist\nsong-1,Eve\nsong-5,Flo\n", "later.csv")
    later_vectors = write_vectors(tmp_path, ["song-5", "song-1"], first=100, name="more")
    result = describe(dataset.workspace, DescribeConfig(vectors=later_vectors, append=True), later_path)
    assert (result.content, result.released) == (3, 3)
    artists = dataset.catalog().table.column(columns.ARTIST).to_pylist()
    assert artists == ["Ann", "Eve", "Artist 2", "Artist 3", "Artist 4", "Flo"]
    np.testing.assert_array_equal(
        dataset.content().vectors(np.array([4, 1, 5])), [[0, 1, 2], [103, 104, 105], [100, 101, 102]]
    )
    assert len(dataset.descriptions()) == 2
    describe(dataset.workspace, DescribeConfig(), later_path)  # replaces both
    assert len(dataset.descriptions()) == 1
    assert dataset.content().dim == 0


def test_after_many_appends_each_song_has_the_values_of_its_last_file(dataset: Dataset, tmp_path: Path) -> None:
    artists, vectors = [f"Artist {row}" for row in range(6)], np.zeros((6, 3))
    for number in range(20):
        first, second = number % 6, number * number % 6
        song_ids = [f"song-{row}" for row in dict.fromkeys((first, second))]
        path = write_file(tmp_path, "song,artist\n" + "".join(f"{song},File {number}\n" for song in song_ids))
        vectors_path = write_vectors(tmp_path, song_ids, first=10 * number)
        describe(dataset.workspace, DescribeConfig(vectors=vectors_path, append=number > 0), path)
        for place, song in enumerate(song_ids):
            artists[int(song[-1])] = f"File {number}"
            vectors[int(song[-1])] = 10 * number + 3 * place + np.arange(3)
    assert dataset.catalog().table.column(columns.ARTIST).to_pylist() == artists
    np.testing.assert_array_equal(dataset.content().vectors(np.arange(6)), vectors)


def test_an_appended_empty_value_removes_the_earlier_one_and_a_missing_column_keeps_its_values(
    dataset: Dataset, tmp_path: Path
) -> None:
    texts = [
        "song,title,markets,album\nsong-0,Zero,SE|NO,A\nsong-1,One,SE,B\nsong-2,Two,SE,C\n",
        "song,markets,title\nsong-0,,\nsong-1,DE,Uno\n",
        "song,album\nsong-1,\n",
    ]
    for number, text in enumerate(texts):
        describe(dataset.workspace, DescribeConfig(append=number > 0), write_file(tmp_path, text))
    table = dataset.catalog().table
    assert table.column(columns.MARKETS).to_pylist() == [None, ["DE"], ["SE"], None, None, None]
    assert table.column(columns.TITLE).to_pylist()[:3] == ["Title 0", "Uno", "Two"]  # Title 0 is that of the import
    assert table.column(columns.ALBUM).to_pylist()[:3] == ["A", None, "C"]
    assert table.column(columns.RELEASED).null_count == 6
    assert not any("descriptions" in finding.path for finding in verify_workspace(dataset.workspace).problems)


@pytest.mark.parametrize(
    ("dim", "first", "message"),
    [
        (4, 0.0, r"vectors of 4 numbers, but the existing vectors have 3.*--append"),
        (3, np.nan, r"contain NaN .* first is row 1;"),
    ],
)
def test_content_that_cannot_be_used_is_refused(
    dataset: Dataset, tmp_path: Path, dim: int, first: float, message: str
) -> None:
    describe(dataset.workspace, DescribeConfig(vectors=write_vectors(tmp_path, ["song-4"])))
    vectors = write_vectors(tmp_path, ["song-1", "song-2"], dim, first, name="other")
    with pytest.raises(InputError, match=message):
        describe(dataset.workspace, DescribeConfig(vectors=vectors, append=True))


def test_vectors_without_ids_belong_to_the_songs_of_the_catalog(dataset: Dataset, tmp_path: Path) -> None:
    np.save(tmp_path / "all.npy", np.eye(6, dtype=np.float32))
    assert describe(dataset.workspace, DescribeConfig(vectors=str(tmp_path / "all.npy"))).content == 6
    np.save(tmp_path / "few.npy", np.eye(4, dtype=np.float32))
    with pytest.raises(InputError, match=r"has 4 rows, but the catalog has 6 songs.*NAME.ids.txt"):
        describe(dataset.workspace, DescribeConfig(vectors=str(tmp_path / "few.npy")))


def test_metadata_of_other_songs_alone_is_refused_and_the_existing_metadata_stays(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    describe(dataset.workspace, DescribeConfig(vectors=write_vectors(tmp_path, ["song-4"])), write_file(tmp_path, CSV))
    others_path = write_file(
        tmp_path, "song,title\n" + "".join(f"SONG-{song},Other\n" for song in range(5)), "others.csv"
    )
    vectors = write_vectors(tmp_path, ["SONG-0", "SONG-1"], name="others")
    example_ids = "the file has IDs such as 'SONG-0', 'SONG-1', 'SONG-2', the catalog 'song-0', 'song-1', 'song-2'"
    for arguments in ([others_path], ["--vectors", vectors], [write_file(tmp_path, CSV), "--vectors", vectors]):
        assert main(["--workspace", dataset.workspace.uri, "describe", *arguments]) == 2
        assert "is in the catalog: the file has IDs such as 'SONG-0'" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=f"no song of {others_path} is in the catalog: {example_ids}; check the column"
    ):
        describe(dataset.workspace, DescribeConfig(), others_path)
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "Zero"
    assert dataset.content().dim == 3
    result = describe(dataset.workspace, DescribeConfig(append=True), others_path)
    assert result.warnings == [f"no song of {others_path} is in the catalog: {example_ids}."]
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "Zero"
    assert result.unknown == 5


def test_describe_without_a_table_or_vectors_is_refused(dataset: Dataset) -> None:
    with pytest.raises(InputError, match=r"a table of songs, or content vectors with --vectors"):
        describe(dataset.workspace, DescribeConfig())
