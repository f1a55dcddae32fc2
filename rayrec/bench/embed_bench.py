"""The embed job against gensim alone."""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from rayrec.bench import loops
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.bench_data import bench_dataset, plain_process
from rayrec.bench.rounds import Measured, PlainProcess, measure
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.embeddings import sessions
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.word2vec import TOKENS_PER_WORKER, Corpus, Word2Vec, write_corpus
from rayrec.jobs.embed import embed
from rayrec.jobs.runtime import node_cpus, ray_cluster
from rayrec.storage.workspace import Workspace


def bench_embed(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Tokens a second of the embed job, making the corpus and the health check included, against gensim alone."""
    with ray_cluster(), tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        dataset = bench_dataset(place, config, users=config.embed_users)
        settings = EmbedConfig(source="histories", epochs=config.embed_epochs, seed=config.seed)
        sentences = sessions.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        workers = max(1, min(node_cpus(), corpus.tokens // TOKENS_PER_WORKER))
        settings = settings.replace(workers=workers)

        def ours() -> Measured:
            began = time.perf_counter()
            made = embed(dataset.workspace, settings, repeat=True)
            seconds = time.perf_counter() - began
            dataset.workspace.delete(made.folder)
            return Measured(made.metrics["tokens"] * settings.epochs, seconds)

        with plain_process() as plain:
            tokens = partial(plain.run, loops.embed_loop, corpus.path, settings, workers, corpus.tokens)
            result = measure("embed", "tokens", ours, tokens, config, workers=workers, corpus_tokens=corpus.tokens)
    return result.to_json()


def word2vec_scaling(dataset: Dataset, config: BenchConfig, crews: list[int]) -> dict[str, Any]:
    """Tokens a second of word2vec by number of threads, without making the corpus and whatever comes after."""
    settings = EmbedConfig(source="histories", epochs=config.embed_epochs, seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        sentences = sessions.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        rates = {}
        for threads in crews:
            with PlainProcess(0) as plain:
                rates[str(threads)] = plain.run(timed_epochs, corpus, settings, threads).per_second
    first = rates[str(crews[0])]
    return {
        "corpus_tokens": corpus.tokens,
        "tokens_per_second": rates,
        "speedup": {threads: rate / first for threads, rate in rates.items()},
    }


def timed_epochs(corpus: Corpus, config: EmbedConfig, threads: int) -> Measured:
    """The epochs alone. A corpus too small for so many threads is trained with fewer."""
    run = Word2Vec(corpus, config, threads)
    began = time.perf_counter()
    epochs = sum(1 for _ in run.train())
    return Measured(corpus.tokens * epochs, time.perf_counter() - began)
