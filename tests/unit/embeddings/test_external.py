import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import random_histories, write_dataset

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.embeddings.word2vec import EmbedConfig, read_external_vectors
from rayrec.errors import InputError
from rayrec.jobs.embed import embed
from rayrec.storage.workspace import Workspace

RAW = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
UNIT = np.array([[0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])


@pytest.fixture
def catalog() -> Catalog:
    data = {columns.SONG: [0, 1, 2], columns.SONG_ID: ["a", "b", "c"], columns.TITLE: [None] * 3}
    return Catalog(pa.table({**data, columns.ARTIST: [None] * 3}, columns.SONGS_TABLE))


def write_parquet(folder: Path, song_ids: list[Any], vectors: pa.Array) -> Path:
    path = folder / "vectors.parquet"
    pq.write_table(pa.table({"song_id": song_ids, "vector": vectors}), path)
    return path


def write_npy(folder: Path, array: np.ndarray, name: str = "vectors.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def test_npy_rows_stand_in_the_order_of_the_catalog(tmp_path: Path, catalog: Catalog) -> None:
    external = read_external_vectors(write_npy(tmp_path, RAW), catalog)
    np.testing.assert_allclose(external.vectors.vectors, UNIT, rtol=1e-6)
    assert (external.rows, external.unknown_ids, external.zero_vectors) == (3, 0, 0)


@pytest.mark.parametrize("listed", ["txt", "json"])
def test_ids_beside_an_npy_file_place_its_rows(listed: str, tmp_path: Path, catalog: Catalog) -> None:
    ids = ["c", "unknown", "a"]
    text = json.dumps(ids) if listed == "json" else "\n".join(ids) + "\n"
    (tmp_path / f"vectors.ids.{listed}").write_text(text)
    external = read_external_vectors(write_npy(tmp_path, RAW.astype(np.float16)), catalog)
    np.testing.assert_allclose(external.vectors.vectors, [UNIT[2], [0, 0], UNIT[0]], rtol=1e-3)
    assert external.unknown_ids == 1


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float32())], ids=str
)
def test_parquet_places_vectors_by_id(kind: pa.DataType, tmp_path: Path, catalog: Catalog) -> None:
    path = write_parquet(tmp_path, ["b", "x", "a"], pa.array(RAW.tolist(), kind))
    external = read_external_vectors(path, catalog)
    np.testing.assert_allclose(external.vectors.vectors, [UNIT[2], UNIT[0], [0, 0]], rtol=1e-6)
    assert external.unknown_ids == 1


def test_zero_vectors_are_counted_and_leave_their_songs_without_one(tmp_path: Path, catalog: Catalog) -> None:
    external = read_external_vectors(write_npy(tmp_path, RAW * [[1], [0], [1]]), catalog)
    assert external.zero_vectors == 1
    assert external.vectors.known.tolist() == [True, False, True]


def test_a_pickle_is_refused_and_never_run(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "vectors.npy"
    path.write_bytes(pickle.dumps(RAW))
    with pytest.raises(InputError, match="not an array of numbers"):
        read_external_vectors(path, catalog)
    np.save(path, np.array([{}, {}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="not an array of numbers"):
        read_external_vectors(path, catalog)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (RAW[:2], "has 2 rows, but the catalog has 3 songs"),
        (RAW[0], r"shape \(2,\)"),
        (RAW.astype("U4"), "expected numbers"),
        (RAW * [[1], [np.nan], [1]], "NaN"),
        (RAW * 0, "no vector for any of the 3 songs"),
    ],
)
def test_wrong_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(InputError, match=message):
        read_external_vectors(write_npy(tmp_path, array), catalog)


@pytest.mark.parametrize(
    ("song_ids", "vectors", "message"),
    [
        (["a", "a"], [[1.0], [2.0]], "1 repeated IDs"),
        (["a", "b"], [[1.0], [2.0, 3.0]], "one length"),
        (["a", "b"], [[1.0], None], "one length"),
        (["x", "y"], [[1.0], [2.0]], "2 of its 2 IDs are unknown"),
        (["a", "b"], [1.0, 2.0], "expected lists"),
        (["a", "b"], [["x"], ["y"]], "expected numbers"),
        (["a", "b"], [[1.0], [None]], "NaN"),
        ([["a"], ["b"]], [[1.0], [2.0]], r"vectors\.parquet: column 'song_id' holds list"),
    ],
)
def test_wrong_tables_are_refused(
    song_ids: list[Any], vectors: list[object], message: str, tmp_path: Path, catalog: Catalog
) -> None:
    with pytest.raises(InputError, match=message):
        read_external_vectors(write_parquet(tmp_path, song_ids, pa.array(vectors)), catalog)


def test_a_missing_file_column_and_format_are_named(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_external_vectors(tmp_path / "none.npy", catalog)
    (tmp_path / "vectors.csv").write_text("")
    with pytest.raises(InputError, match=r"ends in '\.csv'"):
        read_external_vectors(tmp_path / "vectors.csv", catalog)
    pq.write_table(pa.table({"song_id": ["a"]}), tmp_path / "vectors.parquet")
    with pytest.raises(InputError, match="no column 'vector'"):
        read_external_vectors(tmp_path / "vectors.parquet", catalog)
    (tmp_path / "vectors.parquet").write_text("no parquet")
    with pytest.raises(InputError, match="is not a Parquet file"):
        read_external_vectors(tmp_path / "vectors.parquet", catalog)


def test_ids_must_be_as_many_as_rows(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "vectors.ids.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match="3 rows, but its file of IDs has 2; give one ID per row"):
        read_external_vectors(write_npy(tmp_path, RAW), catalog)
    (tmp_path / "vectors.ids.txt").unlink()
    (tmp_path / "vectors.ids.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        read_external_vectors(write_npy(tmp_path, RAW), catalog)


@pytest.mark.parametrize(
    "ids",
    [
        "\ufeffa\nb\nc\n",
        "a\r\nb\r\nc\r\n",
        "a \n b\nc\n\n \n",
        "a\nb\u2028\nc",
    ],
    ids=["byte order mark", "CRLF", "spaces and blank lines", "another line separator"],
)
def test_ids_are_read_as_an_import_reads_them(ids: str, tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "vectors.ids.txt").write_bytes(ids.encode())
    external = read_external_vectors(write_npy(tmp_path, RAW), catalog)
    np.testing.assert_allclose(external.vectors.vectors, UNIT, rtol=1e-6)
    assert external.unknown_ids == 0


def catalog_with_number_ids() -> Catalog:
    data = {columns.SONG: [0, 1, 2], columns.SONG_ID: ["1", "2", "10"], columns.TITLE: [None] * 3}
    return Catalog(pa.table({**data, columns.ARTIST: [None] * 3}, columns.SONGS_TABLE))


@pytest.mark.parametrize("ids", ["[1, 2, 10]", "[1.0, 2.0, 10.0]", '["1", " 2", "10.0"]', "\ufeff[1, 2, 10]"])
def test_whole_numbers_in_a_list_are_the_same_songs(ids: str, tmp_path: Path) -> None:
    (tmp_path / "vectors.ids.json").write_text(ids, encoding="utf-8")
    np.testing.assert_allclose(
        read_external_vectors(write_npy(tmp_path, RAW), catalog_with_number_ids()).vectors.vectors, UNIT, rtol=1e-6
    )


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1, 2, 10]),
        pa.array([1.0, 2.0, 10.0]),
        pa.array(["1", "2", "10"], pa.large_string()),
        pa.array(["1", "2", "10"], pa.string_view()),
        pa.array(["1", "2", "10"]).dictionary_encode(),
    ],
    ids=lambda ids: str(ids.type),
)
def test_ids_of_every_column_type_are_the_same_songs(ids: pa.Array, tmp_path: Path) -> None:
    pq.write_table(pa.table({"song_id": ids, "vector": pa.array(RAW.tolist())}), tmp_path / "v.parquet")
    np.testing.assert_allclose(
        read_external_vectors(tmp_path / "v.parquet", catalog_with_number_ids()).vectors.vectors, UNIT, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        (pa.list_(pa.float16()), RAW.astype(np.float16)),
        (pa.list_(pa.int8()), RAW.astype(np.int8)),
        (pa.list_(pa.decimal128(5, 2)), RAW),
        (pa.list_(pa.float64(), 2), RAW),
    ],
    ids=str,
)
def test_vectors_of_every_number_type_are_read(
    kind: pa.DataType, raw: np.ndarray, tmp_path: Path, catalog: Catalog
) -> None:
    flat = pa.array(raw.ravel().astype(float)).cast(kind.value_type)
    lists = (
        pa.FixedSizeListArray.from_arrays(flat, 2)
        if pa.types.is_fixed_size_list(kind)
        else pa.ListArray.from_arrays(pa.array([0, 2, 4, 6], pa.int32()), flat)
    )
    external = read_external_vectors(write_parquet(tmp_path, ["a", "b", "c"], lists), catalog)
    np.testing.assert_allclose(external.vectors.vectors, UNIT, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("txt", "a\n\nc\n", "1 rows without a song ID, the first is row 2"),
        ("json", '["a", null, "c"]', "1 rows without a song ID, the first is row 2"),
        ("json", '["a", NaN, "c"]', "1 rows without a song ID"),
        ("json", '{"a": 1}', "expected a JSON list of IDs"),
        ("txt", "a\nb\n", "has 3 rows, but its file of IDs has 2; give one ID per row"),
        ("txt", "a\na \nc\n", "1 repeated IDs, such as 'a'"),
        ("json", "[" * 100_000, "cannot be read"),
    ],
)
def test_ids_that_do_not_fit_the_rows_are_an_error(
    name: str, ids: str, message: str, tmp_path: Path, catalog: Catalog
) -> None:
    (tmp_path / f"vectors.ids.{name}").write_text(ids)
    with pytest.raises(InputError, match=message):
        read_external_vectors(write_npy(tmp_path, RAW), catalog)


def test_corrected_ids_beside_an_npy_file_give_other_song_embeddings(workspace: Workspace, tmp_path: Path) -> None:
    write_dataset(workspace, random_histories(5, 3), num_songs=3)
    config = EmbedConfig(vectors=str(write_npy(tmp_path, RAW)))
    manifest_by_ids = {}
    for ids in (("song-1", "song-0", "song-2"), ("song-0", "song-1", "song-2"), ()):
        (tmp_path / "vectors.ids.txt").write_text("\n".join(ids))
        if not ids:
            (tmp_path / "vectors.ids.txt").unlink()
        manifest_by_ids[ids] = embed(workspace, config)
        assert embed(workspace, config).id == manifest_by_ids[ids].id
    swapped, ordered, without_ids = manifest_by_ids.values()
    assert len({swapped.id, ordered.id, without_ids.id}) == 3
    np.testing.assert_allclose(workspace.read_array(swapped.path("vectors.npy")), UNIT[[1, 0, 2]], rtol=1e-6)
    np.testing.assert_allclose(workspace.read_array(ordered.path("vectors.npy")), UNIT, rtol=1e-6)
