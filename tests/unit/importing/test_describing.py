"""What a table tells of songs joins the catalog by song id."""

import gzip
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import random_histories, write_dataset

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.errors import InputError, NotFoundError
from rayrec.importing.describing import DescribeConfig, describe
from rayrec.storage import artifacts
from rayrec.storage.dataset_manifest import write_manifest
from rayrec.storage.workspace import Workspace

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


def written(folder: Path, text: str, name: str = "songs.csv") -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["songs.csv", "songs.csv.gz"])
def test_songs_are_described_by_id(dataset: Dataset, tmp_path: Path, name: str) -> None:
    told = describe(dataset.workspace, DescribeConfig(), written(tmp_path, CSV, name))
    assert (told.songs, told.described, told.unknown) == (6, 3, 2)
    assert (told.titles, told.artists, told.released, told.markets) == (6, 6, 3, 1)
    table = dataset.catalog().table
    assert table.column(columns.SONG_ID).to_pylist() == [f"song-{row}" for row in range(6)]
    # The first row of a song counts, and what is not told leaves what was known.
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
    table = {"id": ["song-2"], "when": pa.array([date(2020, 1, 2)]), "where": pa.array([["SE", "DE"]])}
    pq.write_table(pa.table(table), path)
    names = {"song": "id", "released": "when", "markets": "where"}
    assert describe(dataset.workspace, DescribeConfig(columns=names), str(path)).released == 1
    row = dataset.catalog().table.slice(2, 1).to_pylist()[0]
    assert (row[columns.RELEASED], row[columns.MARKETS], row[columns.TITLE]) == (
        date(2020, 1, 2),
        ["SE", "DE"],
        "Title 2",
    )


def test_a_second_table_takes_the_place_of_the_first(dataset: Dataset, tmp_path: Path) -> None:
    describe(dataset.workspace, DescribeConfig(), written(tmp_path, CSV))
    describe(dataset.workspace, DescribeConfig(delimiter=";"), written(tmp_path, "song;title\nsong-0;New\n"))
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "New"
    assert dataset.catalog().table.column(columns.RELEASED).null_count == 6
    (made,) = artifacts.listing(dataset.workspace, "descriptions")
    assert dataset.workspace.folders("descriptions") == [made.id]
    artifacts.verify(dataset.workspace, made)
    describe(dataset.workspace, DescribeConfig(), written(tmp_path, CSV))
    assert dataset.catalog().table.column(columns.TITLE).to_pylist()[0] == "Zero"


def test_what_was_told_of_other_songs_is_not_told_of_these(dataset: Dataset, tmp_path: Path) -> None:
    describe(dataset.workspace, DescribeConfig(), written(tmp_path, CSV))
    write_manifest(dataset.workspace, replace(dataset.manifest, id="next", ancestors=[dataset.manifest.id]))
    assert Dataset(dataset.workspace).catalog().titles(np.array([0])) == ["Ann – Zero"]
    write_manifest(dataset.workspace, replace(dataset.manifest, id="other"))
    assert Dataset(dataset.workspace).catalog().titles(np.array([0])) == ["Artist 0 – Title 0"]


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("id,title\na,b\n", "songs.csv", "no column 'song'.*--columns song=NAME"),
        ("song,mood\na,b\n", "songs.csv", "tells nothing"),
        ("song,released\na,2020-02-31\n", "songs.csv", "release day"),
        ("song,released\na,spring\n", "songs.csv", "spring.*expected YYYY-MM-DD"),
        ("song,title\na\n", "songs.csv", "cannot be read"),
        ("", "songs.csv", "cannot be read"),
        ("song,title\na,b\n", "songs.parquet", "cannot be read"),
        ("song,title\na,b\n", "songs.xls", "neither .csv nor .parquet"),
    ],
)
def test_what_is_wrong_is_named(dataset: Dataset, tmp_path: Path, text: str, name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        describe(dataset.workspace, DescribeConfig(), written(tmp_path, text, name))
    assert columns.RELEASED not in dataset.catalog().table.column_names


def test_unknown_roles_and_missing_data_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot map a column to 'mood'"):
        describe(dataset.workspace, DescribeConfig(columns={"mood": "a"}), written(tmp_path, CSV))
    with pytest.raises(NotFoundError, match="no data set"):
        describe(Workspace(tmp_path / "none"), DescribeConfig(), written(tmp_path, CSV))
    with pytest.raises(InputError, match="delimiter"):
        DescribeConfig(delimiter="ab")
