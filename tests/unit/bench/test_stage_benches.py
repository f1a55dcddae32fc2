"""The benchmarks of word2vec by threads, of the index and of song tables: what they time and report."""

import numpy as np
import pytest
from worlds import random_histories, write_dataset

from rayrec.bench import stage_benches
from rayrec.bench.bench_config import IndexBenchConfig, SongsBenchConfig
from rayrec.bench.stage_benches import K, bench_index, bench_song_side, song_vectors, speed
from rayrec.embeddings.word2vec import Word2Vec
from rayrec.storage.workspace import Workspace


def test_the_tokens_of_all_epochs_are_timed_for_each_number_of_threads(workspace: Workspace) -> None:
    dataset = write_dataset(workspace, random_histories(40, 20), 20)
    report = stage_benches.word2vec_scaling(dataset, [1, 2], epochs=2, seed=0)
    assert 0 < report["corpus_tokens"] <= dataset.manifest.plays
    one_thread, two_threads = (report["tokens_per_second"][threads] for threads in ("1", "2"))
    assert report["speedup"] == {"1": 1.0, "2": pytest.approx(two_threads / one_thread)}


def test_the_start_is_not_timed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances only at the start, by 100 s, and at each epoch, by 2 s."""
    clock = [0.0]

    class FakeWord2Vec(Word2Vec):
        def __init__(self, corpus, config, workers) -> None:  # type: ignore[no-untyped-def]
            clock[0] += 100.0
            self.config = config

        def train(self):  # type: ignore[no-untyped-def]
            for epoch in range(self.config.epochs):
                clock[0] += 2.0
                yield epoch + 1

    monkeypatch.setattr(stage_benches, "Word2Vec", FakeWord2Vec)
    monkeypatch.setattr(stage_benches.time, "perf_counter", lambda: clock[0])
    corpus = type("Corpus", (), {"tokens": 50})()
    measured = stage_benches.timed_epochs(corpus, stage_benches.EmbedConfig(epochs=3), 1)
    assert (measured.work, measured.seconds) == (150, 6.0)


def test_the_index_benchmark_reports_recall_and_speed_of_both_kinds_and_the_ratio_to_faiss_alone() -> None:
    report = bench_index(IndexBenchConfig.quick()).to_json()
    assert report["flat_recall"] == 1
    assert report["ivf_recall"] >= 0.99
    assert 1 <= report["nprobe"] <= report["nlist"]
    assert 0 < report["ratio_low"] <= report["ratio"] <= report["ratio_high"]
    for kind in ("flat", "ivf"):
        for key in ("build_seconds", "per_second", "single_per_second"):
            assert report[f"{kind}_{key}"] > 0
    assert report["peak_mb"] > 0


def test_speed_asks_every_query_once() -> None:
    searches: list[np.ndarray] = []

    def search(queries: np.ndarray, k: int) -> None:
        assert k == K
        searches.append(queries)

    queries = np.arange(10.0).reshape(5, 2)
    assert speed(search, queries, 2).work == 5
    np.testing.assert_array_equal(np.concatenate(searches), queries)


def test_songs_lie_in_clusters() -> None:
    vectors = song_vectors(1_000, 32, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    similarities = np.sort(vectors @ vectors.T, axis=1)[:, -3]
    random_vectors = np.random.default_rng(0).normal(size=(1_000, 32))
    random_vectors /= np.linalg.norm(random_vectors, axis=1, keepdims=True)
    assert similarities.mean() > np.sort(random_vectors @ random_vectors.T, axis=1)[:, -3].mean() + 0.05
    assert similarities.mean() < 0.95


def test_every_table_is_timed_at_every_size() -> None:
    report = bench_song_side(SongsBenchConfig(rounds=1, songs=(300, 200), steps=1)).to_json()
    assert (report["name"], report["unit"]) == ("songs", "plays")
    for table in ("trained", "mapped", "frozen"):
        for songs in (200, 300):
            assert report[f"{table}_{songs}_per_second"] > 0
