"""Fit the vectors of a data set, or take those made elsewhere: from what a workspace holds to one file in it."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange
from rayrec.embeddings import word2vec
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.vectors import SongVectors
from rayrec.embeddings.word2vec import Sentences, Word2Vec, write_corpus
from rayrec.errors import InputError
from rayrec.importing.vector_files import read_vector_file
from rayrec.storage.workspace import Workspace


@dataclass(frozen=True)
class OutsideVectors:
    """What a file gave."""

    vectors: SongVectors  # (N, D), in the order of the catalog
    rows: int  # rows of the file
    unknown_ids: int  # rows whose song is not in the catalog; left out
    zero_vectors: int  # rows of zeros; their songs stay without a vector


def read_outside(path: str | Path, catalog: Catalog) -> OutsideVectors:
    """Vectors of a local file, as `read_vector_file` reads it, for the songs of the catalog.

    A .npy file without ids has one row per song in the order of the catalog.

    Raises `InputError` for a file that cannot be read so, numbers that are not finite, and a file that has no vector
    for any song of the catalog.
    """
    raw, song_ids = read_vector_file(path)
    if song_ids is None:
        if len(raw) != len(catalog):
            raise InputError(
                f"vectors file {path} has {len(raw)} rows, the catalog {len(catalog)} songs; "
                f"give one row per song in the order of the catalog, or the ids in {Path(path).stem}.ids.txt beside it"
            )
        targets = np.arange(len(catalog))
    else:
        rows = pc.index_in(song_ids, value_set=catalog.table.column(columns.SONG_ID))
        targets = np.asarray(pc.fill_null(rows, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    known = targets >= 0
    placed = np.zeros((len(catalog), raw.shape[1]), dtype=raw.dtype)
    placed[targets[known]] = raw[known]
    try:
        vectors = SongVectors.normalized(placed)
    except InputError as error:
        raise InputError(f"vectors file {path}: {error}") from error
    if not vectors.known.any():
        raise InputError(
            f"vectors file {path} has a vector for none of the {len(catalog)} songs of the catalog "
            f"({int((~known).sum())} of its {len(raw)} ids are unknown); check its song ids"
        )
    return OutsideVectors(vectors, len(raw), int((~known).sum()), int((~raw.any(axis=1)).sum()))


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
