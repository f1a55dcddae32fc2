import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rankings import nearest

from rayrec.data.top_k import top_k
from rayrec.errors import DamagedArtifactError, InputError, MissingDependencyError
from rayrec.recommend import index as index_module
from rayrec.recommend.base import NO_SONG
from rayrec.recommend.filters import AnswerFilter
from rayrec.recommend.index import (
    INDEX_FILE,
    MAX_OVERFETCH,
    IndexConfig,
    SongIndex,
    import_faiss,
    reaches,
    recall_against,
    require_one_faiss,
    sample_queries,
)
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

FLAT, IVF = IndexConfig(kind="flat"), IndexConfig(kind="ivf", nlist=4, queries=20)


def unit_vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).normal(size=(count, dim))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def brute_force(
    vectors: np.ndarray, queries: np.ndarray, k: int, exclude: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    scores = queries @ vectors.T
    scores[:, ~vectors.any(axis=1)] = -np.inf
    for query_scores, excluded in zip(scores, exclude, strict=True):
        query_scores[excluded] = -np.inf
    return top_k(scores, k)


@st.composite
def search_cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int, list[np.ndarray]]:
    """A few songs with vectors of small whole numbers, so that scores are exact and ties are frequent."""
    num_songs, dim, num_queries = draw(st.integers(1, 16)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    coordinates = st.integers(-2, 2)
    vectors = draw(st.lists(st.lists(coordinates, min_size=dim, max_size=dim), min_size=num_songs, max_size=num_songs))
    vectors[draw(st.integers(0, num_songs - 1))] = [1] * dim
    queries = draw(
        st.lists(st.lists(coordinates, min_size=dim, max_size=dim), min_size=num_queries, max_size=num_queries)
    )
    rows = st.lists(st.integers(0, num_songs - 1))
    exclude = draw(st.lists(rows, min_size=num_queries, max_size=num_queries))
    return (
        np.array(vectors, np.float32),
        np.array(queries, np.float32),
        draw(st.integers(1, 20)),
        [np.array(rows, np.int32) for rows in exclude],
    )


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@settings(max_examples=150)
@given(case=search_cases())
def test_search_equals_brute_force(kind: str, case: tuple[np.ndarray, np.ndarray, int, list[np.ndarray]]) -> None:
    vectors, queries, k, exclude = case
    # One list: IVF is exact, so that the ranking can be compared song by song.
    index = SongIndex.build(vectors, IndexConfig(kind=kind, nlist=1, queries=4))
    songs, scores = nearest(index, queries, k, exclude)
    expected_songs, expected_scores = brute_force(vectors, queries, k, exclude)
    np.testing.assert_array_equal(songs, expected_songs)
    np.testing.assert_array_equal(scores, expected_scores)


@pytest.mark.parametrize("excluded", [0, 5, 300, 1_990])
@pytest.mark.parametrize("limit", [10, 1_000])
def test_many_songs_left_out_still_give_the_true_best(
    excluded: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MAX_OVERFETCH", limit)
    vectors, queries = unit_vectors(2_000), unit_vectors(3, seed=1)
    # One query excludes its nearest songs, the worst case for over-fetching; the others exclude none or one.
    exclude = [np.argsort(-(vectors @ queries[0]))[:excluded], np.zeros(0, np.int64), np.array([7, 7])]
    songs, scores = nearest(SongIndex.build(vectors, FLAT), queries, 20, exclude)
    expected_songs, expected_scores = brute_force(vectors, queries, 20, exclude)
    np.testing.assert_array_equal(songs, expected_songs)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_a_user_who_has_heard_very_many_songs_costs_no_mask_of_the_catalog() -> None:
    num_songs, num_heard = 200_000, MAX_OVERFETCH + 500
    vectors = unit_vectors(num_songs)
    index = SongIndex.build(vectors, IVF.replace(nlist=32))
    random = np.random.default_rng(1)
    query, excluded = unit_vectors(1, seed=2), random.choice(num_songs, num_heard, replace=False).astype(np.int32)
    filters = [AnswerFilter(excluded=excluded)]
    index.rank(query, 10, filters)
    tracemalloc.start()
    ranking = index.rank(query, 10, filters)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < num_songs  # bytes
    assert ranking.paths == ("selector",)
    expected, _ = brute_force(vectors, query, 10, [excluded])
    assert len(np.intersect1d(ranking.songs, expected)) >= 9
    assert not np.isin(ranking.songs, excluded).any()


def test_an_answer_is_complete_although_the_searched_lists_hold_too_few_songs() -> None:
    vectors = unit_vectors(500)
    index = SongIndex.build(vectors, IndexConfig(kind="ivf", nlist=100, target_recall=0.01, queries=20))
    assert index.figures.nprobe == 1
    queries = unit_vectors(4, seed=1)
    exclude = [np.arange(0, 500, 2)] * 4
    songs, _ = nearest(index, queries, 240, exclude)
    assert np.all(songs % 2 == 1)
    assert all(len(set(row)) == 240 for row in songs)
    np.testing.assert_array_equal(songs, brute_force(vectors, queries, 240, exclude)[0])


@pytest.mark.parametrize("config", [FLAT, IVF], ids=["flat", "ivf"])
def test_songs_without_a_vector_never_come_and_missing_answers_are_filled(config: IndexConfig) -> None:
    vectors = unit_vectors(30)
    vectors[::2] = 0
    songs, scores = nearest(SongIndex.build(vectors, config), -vectors[1:2], 20, [np.array([3])])
    assert set(songs[0, :14]) == set(range(1, 30, 2)) - {3}
    assert songs[0, 14:].tolist() == [NO_SONG] * 6
    assert np.all(scores[0, 14:] == -np.inf)
    assert (songs.dtype, scores.dtype) == (np.int32, np.float32)


def test_a_batch_answers_as_single_queries_do() -> None:
    index = SongIndex.build(unit_vectors(300), FLAT)
    queries, exclude = unit_vectors(5, seed=1), [np.arange(n) for n in range(5)]
    songs, _ = nearest(index, queries, 10, exclude)
    for row, query in enumerate(queries):
        np.testing.assert_array_equal(nearest(index, query[None], 10, [exclude[row]])[0][0], songs[row])


def test_lists_in_half_precision_give_scores_and_an_order_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "SCORED_AT_ONCE", 3)
    vectors, queries = unit_vectors(2_000), unit_vectors(7, seed=1)
    index = SongIndex.build(vectors, IndexConfig(kind="ivf", nlist=1, queries=4))
    songs, scores = nearest(index, queries, 50)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, songs, axis=1), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(songs, brute_force(vectors, queries, 50, [np.zeros(0, np.int32)] * 7)[0])
    assert {stored_vectors.dtype for _, stored_vectors in index.stored()} == {np.dtype(np.float16)}


def test_no_queries_give_no_answers() -> None:
    songs, scores = nearest(SongIndex.build(unit_vectors(5), FLAT), np.zeros((0, 8)), 3)
    assert songs.shape == scores.shape == (0, 3)


def test_the_reported_recall_is_the_measured_one_and_nprobe_the_smallest_that_reaches_it(
    workspace: Workspace,
) -> None:
    vectors, queries = unit_vectors(3_000, dim=16), unit_vectors(50, dim=16, seed=1)
    index = SongIndex.build(vectors, IndexConfig(kind="ivf", nlist=32, target_recall=0.9), queries=queries)
    exact, _ = nearest(SongIndex.build(vectors, FLAT), queries, 100)
    index.save(workspace, "stored.faiss")
    faiss_index = import_faiss().read_index(workspace.full("stored.faiss"))

    def recalls(nprobe: int) -> np.ndarray:
        faiss_index.nprobe = nprobe
        songs = faiss_index.search(queries, 100)[1]
        return np.array([np.isin(exact_row, row).mean() for exact_row, row in zip(exact, songs, strict=True)])

    chosen_nprobe = index.figures.nprobe
    assert 1 < chosen_nprobe < 32
    assert index.figures.recall >= 0.9
    assert index.figures.recall == pytest.approx(recalls(chosen_nprobe).mean(), abs=1e-9)
    assert reaches(recalls(chosen_nprobe), 0.9)
    assert not reaches(recalls(chosen_nprobe - 1), 0.9)


def test_recall_is_reached_two_standard_errors_above_the_target() -> None:
    recalls = np.array([0.8, 1.0] * 50)  # mean 0.9, standard error 0.01
    assert reaches(recalls, 0.879)
    assert not reaches(recalls, 0.881)
    assert reaches(np.ones(3), 1.0)


def test_recall_holds_on_queries_that_nprobe_was_not_chosen_on() -> None:
    vectors = unit_vectors(4_000, dim=16)
    config = IndexConfig(kind="ivf", nlist=64, target_recall=0.95, queries=200)
    queries = sample_queries(vectors, config.replace(seed=1))
    exact, _ = nearest(SongIndex.build(vectors, FLAT), queries, 100)
    approximate, _ = nearest(SongIndex.build(vectors, config), queries, 100)
    assert recall_against(exact, approximate).mean() >= 0.95


def test_full_recall_is_reached_by_looking_into_all_lists() -> None:
    metrics = SongIndex.build(unit_vectors(400), IndexConfig(kind="ivf", target_recall=1.0, queries=50)).figures
    assert metrics.recall == 1.0
    assert 1 <= metrics.nprobe <= metrics.nlist == 32  # about 2 √400, as a power of two


@pytest.mark.parametrize(("songs", "kind"), [(49, "flat"), (50, "ivf")])
def test_the_number_of_songs_chooses_the_kind(songs: int, kind: str) -> None:
    assert SongIndex.build(unit_vectors(songs), IndexConfig(flat_below=50, queries=5)).figures.kind == kind


@pytest.mark.parametrize("config", [FLAT, IVF], ids=["flat", "ivf"])
def test_a_saved_index_answers_as_before(config: IndexConfig, workspace: Workspace) -> None:
    vectors, queries = unit_vectors(200), unit_vectors(4, seed=1)
    index = SongIndex.build(vectors, config)
    manifest = Manifest(kind="indexes", id="a", metrics={**vars(index.figures), "seconds": 1.0})
    index.save(workspace, manifest.path(INDEX_FILE))
    loaded = SongIndex.load(workspace, manifest, vectors)
    assert loaded.figures == index.figures
    for expected, actual in zip(nearest(index, queries, 10), nearest(loaded, queries, 10), strict=True):
        np.testing.assert_array_equal(expected, actual)


def test_an_index_of_other_vectors_or_no_index_is_refused(workspace: Workspace) -> None:
    index = SongIndex.build(unit_vectors(20), FLAT)
    manifest = Manifest(kind="indexes", id="a", metrics=vars(index.figures))
    index.save(workspace, manifest.path(INDEX_FILE))
    with pytest.raises(DamagedArtifactError, match="expected 20 of dimension 4"):
        SongIndex.load(workspace, manifest, unit_vectors(20, dim=4))
    workspace.write_bytes(manifest.path(INDEX_FILE), b"no index")
    with pytest.raises(DamagedArtifactError, match=r"faiss cannot read .*; run `rayrec index --force`"):
        SongIndex.load(workspace, manifest, unit_vectors(20))


def test_a_catalog_without_vectors_is_refused() -> None:
    with pytest.raises(InputError, match="none of 3 songs has a vector"):
        SongIndex.build(np.zeros((3, 4), np.float32), FLAT)


def test_without_faiss_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install faiss-cpu.*pip install faiss-gpu"):
        require_one_faiss()


def test_two_packages_of_faiss_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("faiss_cpu", "faiss_gpu"):
        (tmp_path / f"{name}-1.15.1.dist-info").mkdir()
        (tmp_path / f"{name}-1.15.1.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.15.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"both installed.*pip uninstall faiss-cpu faiss-gpu"):
        require_one_faiss()


@pytest.mark.parametrize(
    "wrong", [{"kind": "hnsw"}, {"target_recall": 0.0}, {"target_recall": 1.5}, {"nlist": -1}, {"queries": 0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        IndexConfig(**wrong)
