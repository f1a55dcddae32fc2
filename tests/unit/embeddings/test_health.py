import json

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.embeddings.vectors import SongVectors, check_health, directions, mean_cosine


def catalog_of_titles(titles: list[str]) -> Catalog:
    data = {columns.SONG: range(len(titles)), columns.SONG_ID: [f"id {row}" for row in range(len(titles))]}
    return Catalog(pa.table({**data, columns.TITLE: titles, columns.ARTIST: ["X"] * len(titles)}, columns.SONGS_TABLE))


def random_vectors(num_songs: int, dim: int, shift: float = 0.0) -> SongVectors:
    return SongVectors.normalized(np.random.default_rng(0).normal(size=(num_songs, dim)) + shift)


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    vectors = random_vectors(200, 4, shift=0.5)
    cosines = vectors.vectors @ vectors.vectors.T
    expected = cosines[~np.eye(200, dtype=bool)].mean()
    assert abs(mean_cosine(vectors) - expected) < 0.02


def test_a_song_is_never_paired_with_itself() -> None:
    assert abs(mean_cosine(SongVectors.normalized(np.array([[1, 0], [0, 1]])))) < 1e-6


def test_the_directions_in_use_are_those_planted() -> None:
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(16, 16)))
    for count in (1, 3, 16):
        vectors = SongVectors((random.normal(size=(5_000, count)) @ rotation[:count]).astype(np.float32))
        assert abs(directions(vectors) - count) < 0.2
    assert directions(SongVectors.normalized(np.array([[1, 0], [0, 0]]))) == 0


def test_collapsed_vectors_are_warned_of_and_spread_ones_are_not() -> None:
    catalog = catalog_of_titles(["t"] * 100)
    counts = np.ones(100, dtype=np.int64)
    assert check_health(random_vectors(100, 16), counts, catalog)["warning"] is None
    assert "have collapsed" in check_health(random_vectors(100, 16, shift=5), counts, catalog)["warning"]


def test_the_most_played_songs_come_with_their_nearest_neighbors() -> None:
    vectors = SongVectors.normalized(np.array([[1, 0], [0.9, 0.1], [0, 1], [0, 0], [0.1, 0.9]]))
    report = check_health(vectors, np.array([5, 1, 9, 99, 2]), catalog_of_titles(["a", "b", "c", "d", "e"]))
    assert report["coverage"] == 0.8
    assert report["songs_with_vector"] == 4
    assert [entry["song"] for entry in report["neighbors"]] == ["X – c", "X – a", "X – e", "X – b"]
    assert report["neighbors"][0]["neighbors"] == ["X – e", "X – b", "X – a"]
    assert report["neighbors"][0]["plays"] == 9


def test_the_report_is_plain_json() -> None:
    report = check_health(random_vectors(10, 4), np.arange(10), catalog_of_titles(["t"] * 10))
    assert json.loads(json.dumps(report)) == report


def test_a_catalog_with_one_vector_or_none_is_reported_without_a_crash() -> None:
    single_vector = SongVectors.normalized(np.array([[1, 0], [0, 0]]))
    report = check_health(single_vector, np.array([1, 0]), catalog_of_titles(["a", "b"]))
    assert (report["mean_cosine"], report["neighbors"][0]["neighbors"]) == (0.0, [])
    no_vectors = SongVectors.normalized(np.zeros((2, 2)))
    assert check_health(no_vectors, np.array([1, 0]), catalog_of_titles(["a", "b"]))["neighbors"] == []
