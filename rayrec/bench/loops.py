"""The plain loops: the work of a stage as one process does it over the same files, without Ray.

They use the same network, batches and word2vec, and none of what the stages add: no tasks, no
transport, no bookkeeping. Each is a function of plain values, so that another process can run it.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from rayrec.bench.rounds import Measured
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.windows import Windows, batches_in_memory, cut_windows
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.model.checkpoint import load_model
from rayrec.model.epochs import start_vectors
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.taste_table import taste_table
from rayrec.model.train_config import ModelConfig, TrainConfig
from rayrec.model.training import Training
from rayrec.model.workers import Share
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

POOL_PLAYS = 200_000  # plays whose windows are put in batches by length together
WARM_STEPS = 5  # first steps of a round, in which buffers fill: not timed


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """What both ways train, and on what."""

    workspace: Workspace
    config: TrainConfig
    model: ModelConfig
    counts: np.ndarray  # int64 (N,), plays by which negatives are drawn

    def training(self) -> Training:
        """A fresh network with random song vectors."""
        torch.set_num_threads(1)
        torch.manual_seed(self.config.seed)
        empty = np.zeros((self.model.num_songs, self.model.embedding_dim), dtype=np.float32)
        model = TasteModel(self.model, torch.from_numpy(start_vectors(empty, self.config.seed)))
        return Training(model, self.config, self.counts, device="cpu", share=Share())


def timed_steps(training: Training, batches: Iterable[Windows], epoch: int, seconds: float) -> Measured:
    """Plays learned from in steady state: the first steps and the wait for the first batch do not count.

    Ends early with the batches. Raises `InputError` where there are no more than the first steps.
    """
    training.model.train()
    steps = enumerate(batches)
    for step, windows in islice(steps, WARM_STEPS):
        training.step(windows, epoch, step)
    plays, began = 0, time.perf_counter()
    for step, windows in steps:
        training.step(windows, epoch, step)
        plays += int(windows.inputs.sum())
        if time.perf_counter() - began >= seconds:
            break
    if not plays:
        raise InputError(f"a round of training needs more than {WARM_STEPS} batches; give more users")
    return Measured(plays, time.perf_counter() - began)


def timed_windows(batches: Iterable[Windows], seconds: float) -> Measured:
    """Plays that arrive where no network eats them, from the second batch on."""
    arriving = iter(batches)
    next(arriving, None)
    plays, began = 0, time.perf_counter()
    for windows in arriving:
        plays += int(windows.inputs.sum())
        if time.perf_counter() - began >= seconds:
            break
    return Measured(plays, time.perf_counter() - began)


def train_loop(task: TrainTask, epoch: int, seconds: float) -> Measured:
    """Plays a second of plain PyTorch over the same Parquet files."""
    return timed_steps(task.training(), plain_windows(task, epoch), epoch, seconds)


def plain_windows(task: TrainTask, epoch: int) -> Iterator[Windows]:
    """Batches of the same size and the same likeness of lengths, read and cut in this process."""
    config = task.config
    rng = np.random.default_rng([config.seed, epoch])
    for pool in _pools(Dataset(task.workspace), rng):
        windows = cut_windows(pool, config.window, config.lookahead)
        yield from batches_in_memory(windows, config.batch, rng)


def _pools(dataset: Dataset, rng: np.random.Generator) -> Iterator[Histories]:
    held: list[Histories] = []
    for bucket in rng.permutation(dataset.manifest.buckets).tolist():
        for histories in dataset.read_bucket(bucket):
            held.append(histories)
            if sum(part.num_plays for part in held) >= POOL_PLAYS:
                yield concatenate(held)
                held = []
    if held:
        yield concatenate(held)


def taste_loop(workspace: Workspace, model: Manifest, folder: str, at: int, users: int) -> Measured:
    """Plays a second of computing and storing the taste vectors of all users, `users` at a time."""
    torch.set_num_threads(1)
    began, plays = time.perf_counter(), 0
    encoder = TasteEncoder(load_model(workspace, model.folder))
    dataset = Dataset(workspace)
    for bucket in range(dataset.manifest.buckets):
        batches = dataset.read_bucket(bucket, users)
        with workspace.open_output(f"{folder}/{bucket:05d}.parquet") as stream:
            writer = None
            for histories in batches:
                table = taste_table(encoder, histories, at)
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                writer.write_table(table)
                plays += histories.num_plays
            if writer is not None:
                writer.close()
    return Measured(plays, time.perf_counter() - began)


def embed_loop(corpus: Path, config: EmbedConfig, workers: int, tokens: int) -> Measured:
    """Tokens a second, over all epochs, of gensim alone from a corpus file that is ready."""
    from gensim.models import Word2Vec

    settings: dict[str, Any] = {
        "vector_size": config.dim,
        "sg": int(config.skip_gram),
        "window": config.window,
        "negative": config.negatives,
        "ns_exponent": config.ns_exponent,
        "alpha": config.learning_rate,
        "sample": config.subsample,
        "min_count": config.min_count,
        "epochs": config.epochs,
        "seed": config.seed,
        "workers": workers,
    }
    began = time.perf_counter()
    Word2Vec(corpus_file=str(corpus), **settings)
    return Measured(tokens * config.epochs, time.perf_counter() - began)
