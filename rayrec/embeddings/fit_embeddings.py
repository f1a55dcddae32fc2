"""Fit or take the vectors of a data set: from what is stored in a workspace to one file of vectors in it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.embeddings import word2vec
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.external import read_outside
from rayrec.embeddings.word2vec import Sentences, Word2Vec, write_corpus
from rayrec.errors import InputError
from rayrec.storage.workspace import Workspace


def choose_source(dataset: Dataset, config: EmbedConfig) -> str:
    """What sentences are made of: playlists or histories. Raises `InputError` for playlists that are not there."""
    if config.source == "playlists" and not dataset.manifest.playlists:
        raise InputError("embed source is playlists, but the data set has none; import some, or use histories")
    if config.source == "auto":
        return "playlists" if dataset.manifest.playlists else "histories"
    return config.source


def fit_vectors(
    workspace: Workspace, config: EmbedConfig, allowed: FitRange, workers: int, path: str
) -> Iterator[dict[str, Any] | None]:
    """Fit vectors by word2vec on what is `allowed` and write them to `path` of the workspace.

    Yields None after each epoch and at the end the figures: counts (int64 (N,), occurrences of each
    song), source, tokens, sentences and workers.
    """
    dataset = Dataset(workspace)
    source = choose_source(dataset, config)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        corpus = write_corpus(_sentences(dataset, source, config, allowed), Path(folder) / "corpus", dataset.num_songs)
        run = Word2Vec(corpus, config, workers)
        for _ in run.train():
            yield None
    run.vectors().save(workspace, path)
    yield {
        "counts": corpus.counts,
        "source": source,
        "tokens": corpus.tokens,
        "sentences": corpus.sentences,
        "workers": run.workers,
    }


def _sentences(dataset: Dataset, source: str, config: EmbedConfig, allowed: FitRange) -> Iterator[Sentences]:
    if source == "playlists":
        return word2vec.from_playlists(dataset.read_playlists(), allowed)
    histories = (allowed.select(batch) for batch in dataset.read_all())
    return word2vec.from_histories(histories, allowed, config.session_gap_minutes)


def take_vectors(workspace: Workspace, config: EmbedConfig, allowed: FitRange, paths: list[str]) -> dict[str, Any]:
    """Take the vectors of the file `config.vectors` and write them to every one of `paths`.

    Returns the figures: counts (int64 (N,), plays of each song among those `allowed`), source,
    rows of the file, unknown_ids and zero_vectors.
    """
    dataset = Dataset(workspace)
    outside = read_outside(str(config.vectors), dataset.catalog())
    for path in paths:
        outside.vectors.save(workspace, path)
    counts = np.zeros(dataset.num_songs, dtype=np.int64)
    for batch in dataset.read_all():
        counts += np.bincount(allowed.select(batch).songs, minlength=dataset.num_songs)
    return {
        "counts": counts,
        "source": str(config.vectors),
        "rows": outside.rows,
        "unknown_ids": outside.unknown_ids,
        "zero_vectors": outside.zero_vectors,
    }
