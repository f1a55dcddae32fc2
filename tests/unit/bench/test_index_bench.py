"""The song side at a small size: the index, and a training step for every kind of song table."""

import numpy as np

from rayrec.bench.bench_config import IndexBenchConfig, SongsBenchConfig
from rayrec.bench.index_bench import K, bench_index, bench_song_side, song_vectors, speed


def test_it_tells_recall_and_speed_of_both_kinds_and_the_ratio_to_faiss_alone() -> None:
    told = bench_index(IndexBenchConfig.quick()).to_json()
    assert told["flat_recall"] == 1
    assert told["ivf_recall"] >= 0.99
    assert 1 <= told["nprobe"] <= told["nlist"]
    assert 0 < told["ratio_low"] <= told["ratio"] <= told["ratio_high"]
    for kind in ("flat", "ivf"):
        for key in ("build_seconds", "per_second", "single_per_second"):
            assert told[f"{kind}_{key}"] > 0
    assert told["peak_mb"] > 0


def test_speed_asks_every_query_once() -> None:
    asked: list[np.ndarray] = []

    def search(queries: np.ndarray, k: int) -> None:
        assert k == K
        asked.append(queries)

    queries = np.arange(10.0).reshape(5, 2)
    assert speed(search, queries, 2).work == 5
    np.testing.assert_array_equal(np.concatenate(asked), queries)


def test_songs_lie_in_clusters() -> None:
    vectors = song_vectors(1_000, 32, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    nearest = np.sort(vectors @ vectors.T, axis=1)[:, -3]
    scattered = np.random.default_rng(0).normal(size=(1_000, 32))
    scattered /= np.linalg.norm(scattered, axis=1, keepdims=True)
    assert nearest.mean() > np.sort(scattered @ scattered.T, axis=1)[:, -3].mean() + 0.05
    assert nearest.mean() < 0.95


def test_every_table_is_timed_at_every_size() -> None:
    told = bench_song_side(SongsBenchConfig(rounds=1, songs=(300, 200), steps=1)).to_json()
    assert (told["name"], told["unit"]) == ("songs", "plays")
    for table in ("trained", "mapped", "frozen"):
        for songs in (200, 300):
            assert told[f"{table}_{songs}_per_second"] > 0
