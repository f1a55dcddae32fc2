"""word2vec by threads: that the epochs are what is timed, and what is told of them."""

import pytest
from worlds import random_histories, write_dataset

from rayrec.bench import job_benches
from rayrec.embeddings.word2vec import Word2Vec
from rayrec.storage.workspace import Workspace


def test_tokens_of_all_epochs_are_told_by_threads_against_the_first(workspace: Workspace) -> None:
    dataset = write_dataset(workspace, random_histories(40, 20), 20)
    told = job_benches.word2vec_scaling(dataset, [1, 2], epochs=2, seed=0)
    assert 0 < told["corpus_tokens"] <= dataset.manifest.plays
    one, two = (told["tokens_per_second"][threads] for threads in ("1", "2"))
    assert told["speedup"] == {"1": 1.0, "2": pytest.approx(two / one)}


def test_the_start_is_not_timed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the start and each epoch move."""
    clock = [0.0]

    class Fake(Word2Vec):
        def __init__(self, corpus, config, workers) -> None:  # type: ignore[no-untyped-def]
            clock[0] += 100.0
            self.config = config

        def train(self):  # type: ignore[no-untyped-def]
            for epoch in range(self.config.epochs):
                clock[0] += 2.0
                yield epoch + 1

    monkeypatch.setattr(job_benches, "Word2Vec", Fake)
    monkeypatch.setattr(job_benches.time, "perf_counter", lambda: clock[0])
    corpus = type("Corpus", (), {"tokens": 50})()
    measured = job_benches.timed_epochs(corpus, job_benches.EmbedConfig(epochs=3), 1)
    assert (measured.work, measured.seconds) == (150, 6.0)
