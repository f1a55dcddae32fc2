"""How word2vec grows with its threads: on one node, since it grows no other way (see `rayrec.embeddings.word2vec`)."""

import tempfile
import time
from pathlib import Path
from typing import Any

from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.plain import PlainProcess
from rayrec.bench.rounds import Measured
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.embeddings import sessions
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.word2vec import Corpus, Word2Vec, write_corpus


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
