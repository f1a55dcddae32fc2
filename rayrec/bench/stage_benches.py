"""The stages taste, embed, train and index against plain loops, and the speed of training steps by catalog size.

A plain loop does the work of a stage in one process over the same files, without Ray. It uses the same network, batches
and word2vec, but nothing that the stage adds: no tasks, no transport, no bookkeeping. Each plain loop is a function of
plain values, so that another process can run it. This module also has what other benchmarks use: generated plays, an
untrained network, and a process outside of Ray.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from rayrec.bench.bench_config import (
    EmbedBenchConfig,
    IndexBenchConfig,
    SongsBenchConfig,
    TasteBenchConfig,
    TrainBenchConfig,
)
from rayrec.bench.rounds import BenchResult, Measured, MemoryWatch, PlainProcess, compare, measure, niceness
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.split import FitRange
from rayrec.data.synthetic import GenerateConfig
from rayrec.data.windows import Windows, batches_in_memory, cut_windows
from rayrec.embeddings import word2vec
from rayrec.embeddings.word2vec import TOKENS_PER_WORKER, Corpus, EmbedConfig, Word2Vec, write_corpus
from rayrec.errors import InputError, RayrecError
from rayrec.jobs.embed import embed
from rayrec.jobs.generate import generate
from rayrec.jobs.runtime import node_cpus, quiet_data, ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.trainer import WindowStream, model_config
from rayrec.model.checkpoint import load_model, save_model
from rayrec.model.epochs import start_vectors
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.taste_table import taste_table
from rayrec.model.train_config import FeatureSpec, ModelConfig, SongTable, TasteConfig, TrainConfig
from rayrec.model.training import Training
from rayrec.model.training_windows import ShardReader, window_lengths
from rayrec.recommend.index import IndexConfig, SongIndex, import_faiss, sample_queries
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, fingerprint
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

POOL_PLAYS = 200_000  # plays whose windows are sorted by length into batches together
WARM_STEPS = 5  # first steps of a round, which fill buffers and are not timed
EMBEDDING_DIM = 64
SONGS_PER_ARTIST = 8
SONGS_WITH_ARTISTS = 10_000  # a larger catalog has as many artists as a catalog of this size
PLAIN_TASTES = "plain-tastes"  # folder for the taste vectors of the plain loop
ORDER_TRAIN, ORDER_DATA, ORDER_END = "train", "data", "end"
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """The network, settings and data that both ways train with."""

    workspace: Workspace
    config: TrainConfig
    model: ModelConfig
    counts: np.ndarray  # int64 (N,): plays per song, by which negatives are drawn

    def training(self) -> Training:
        """Return a `Training` of a new network with random song vectors."""
        torch.set_num_threads(1)
        torch.manual_seed(self.config.seed)
        zero_vectors = np.zeros((self.model.num_songs, self.model.embedding_dim), dtype=np.float32)
        model = TasteModel(self.model, torch.from_numpy(start_vectors(zero_vectors, self.config.seed)))
        return Training(model, self.config, self.counts, device="cpu", share=Share())


def timed_steps(training: Training, batches: Iterable[Windows], epoch: int, seconds: float) -> Measured:
    """Train for `seconds` and return the plays learned from, without the first steps and the wait for the first batch.

    Ends earlier if there are no more batches. Raises `InputError` if there are no batches after the first steps.
    """
    training.model.train()
    steps = enumerate(batches)
    for step, windows in islice(steps, WARM_STEPS):
        training.step(windows, epoch, step)
    plays, started = 0, time.perf_counter()
    for step, windows in steps:
        training.step(windows, epoch, step)
        plays += int(windows.inputs.sum())
        if time.perf_counter() - started >= seconds:
            break
    if not plays:
        raise InputError(f"a round of training needs more than {WARM_STEPS} batches; increase --users")
    return Measured(plays, time.perf_counter() - started)


def timed_windows(batches: Iterable[Windows], seconds: float) -> Measured:
    """Read batches for `seconds` without training and return their plays, from the second batch on."""
    batch_iterator = iter(batches)
    next(batch_iterator, None)
    plays, started = 0, time.perf_counter()
    for windows in batch_iterator:
        plays += int(windows.inputs.sum())
        if time.perf_counter() - started >= seconds:
            break
    return Measured(plays, time.perf_counter() - started)


def measure_plain_training(task: TrainTask, epoch: int, seconds: float) -> Measured:
    """Measure training with plain PyTorch over the same Parquet files: plays and seconds."""
    return timed_steps(task.training(), plain_windows(task, epoch), epoch, seconds)


def plain_windows(task: TrainTask, epoch: int) -> Iterator[Windows]:
    """Yield batches as the stage has them, of the same size and of windows of similar length, made in this process."""
    config = task.config
    rng = np.random.default_rng([config.seed, epoch])
    for pool in _pools(Dataset(task.workspace), rng):
        windows = cut_windows(pool, config.window, config.lookahead)
        yield from batches_in_memory(windows, config.batch, rng)


def _pools(dataset: Dataset, rng: np.random.Generator) -> Iterator[Histories]:
    pool_parts: list[Histories] = []
    for bucket in rng.permutation(dataset.manifest.buckets).tolist():
        for histories in dataset.read_bucket(bucket):
            pool_parts.append(histories)
            if sum(part.num_plays for part in pool_parts) >= POOL_PLAYS:
                yield concatenate(pool_parts)
                pool_parts = []
    if pool_parts:
        yield concatenate(pool_parts)


def measure_plain_tastes(workspace: Workspace, model: Manifest, folder: str, at: int, users: int) -> Measured:
    """Compute and store the taste vectors of all users, `users` at a time; return plays and seconds."""
    torch.set_num_threads(1)
    started, plays = time.perf_counter(), 0
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
    return Measured(plays, time.perf_counter() - started)


def measure_plain_embedding(corpus: Path, config: EmbedConfig, workers: int, tokens: int) -> Measured:
    """Train gensim alone on a finished corpus file; return the tokens of all epochs, and seconds."""
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
    started = time.perf_counter()
    Word2Vec(corpus_file=str(corpus), **settings)
    return Measured(tokens * config.epochs, time.perf_counter() - started)


def bench_dataset(
    bench_workspace: Workspace, *, users: int, songs: int, plays: float, seed: int, **options: int
) -> Dataset:
    """Return a generated data set, made now or by an earlier run; `plays` is the mean number of plays per user."""
    artists = max(GenerateConfig().genres, min(songs, SONGS_WITH_ARTISTS) // SONGS_PER_ARTIST)
    generate_config = GenerateConfig(
        users=users, songs=songs, plays=plays, seed=seed, playlists=0, artists=artists, **options
    )
    workspace = Workspace(f"{bench_workspace.uri}/{fingerprint('bench', to_mapping(generate_config), {})}")
    if not workspace.exists(DATASET_MANIFEST):
        generate(workspace, generate_config)
    return Dataset(workspace)


def train_task(dataset: Dataset, seed: int) -> TrainTask:
    settings = TrainConfig(seed=seed)
    counts = np.zeros(dataset.num_songs, dtype=np.int64)
    for histories in dataset.read_bucket(0):
        counts += np.bincount(histories.songs, minlength=dataset.num_songs)
    shape = model_config(dataset, settings, EMBEDDING_DIM)
    return TrainTask(workspace=dataset.workspace, config=settings, model=shape, counts=counts)


def untrained_model(dataset: Dataset, seed: int) -> Manifest:
    """Write a model of the default shape with random weights, which is as fast as a trained one."""
    manifest = Manifest(kind="models", id="bench", inputs={"dataset": dataset.manifest.id}, seed=seed)
    model = train_task(dataset, seed).training().model
    file_names = save_model(dataset.workspace, manifest.folder, model, np.ones(dataset.num_songs, dtype=np.bool_))
    return artifacts.publish(dataset.workspace, manifest, file_names)


def plain_process() -> PlainProcess:
    """Return a separate process with the niceness of the cluster's workers."""
    return PlainProcess(int(ray.get(ray.remote(niceness).remote())))


def bench_taste(bench_workspace: Workspace, config: TasteBenchConfig) -> dict[str, Any]:
    """Compare plays per second of the taste job with one worker to a plain loop.

    The time of the job includes the worker's start and the artifact's checksums.
    """
    with ray_cluster():
        dataset = bench_dataset(
            bench_workspace, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed
        )
        workspace, model = dataset.workspace, untrained_model(dataset, config.seed)
        settings = TasteConfig(concurrency=1)

        def run_stage() -> Measured:
            started = time.perf_counter()
            artifact = compute_tastes(workspace, settings, model_id=model.id, repeat=True)
            seconds = time.perf_counter() - started
            workspace.delete(artifact.folder)
            return Measured(artifact.metrics["plays"], seconds)

        arguments = (workspace, model, PLAIN_TASTES, dataset.manifest.last_play, settings.users)
        with plain_process() as process:
            run_plain_loop = partial(process.run, measure_plain_tastes, *arguments)
            result = measure("taste", "plays", run_stage, run_plain_loop, rounds=config.rounds, users=config.users)
        workspace.delete(PLAIN_TASTES)
    return result.to_json()


def bench_embed(bench_workspace: Workspace, config: EmbedBenchConfig) -> dict[str, Any]:
    """Compare the embed job with gensim alone, in tokens per second.

    The time of the job includes writing the corpus and the health check.
    """
    with ray_cluster(), tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        dataset = bench_dataset(
            bench_workspace, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed
        )
        settings = EmbedConfig(source="histories", epochs=config.epochs, seed=config.seed)
        sentences = word2vec.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        workers = max(1, min(node_cpus(), corpus.tokens // TOKENS_PER_WORKER))
        settings = settings.replace(workers=workers)

        def run_stage() -> Measured:
            started = time.perf_counter()
            artifact = embed(dataset.workspace, settings, repeat=True)
            seconds = time.perf_counter() - started
            dataset.workspace.delete(artifact.folder)
            return Measured(artifact.metrics["tokens"] * settings.epochs, seconds)

        with plain_process() as process:
            run_plain_loop = partial(
                process.run, measure_plain_embedding, corpus.path, settings, workers, corpus.tokens
            )
            result = measure(
                "embed",
                "tokens",
                run_stage,
                run_plain_loop,
                rounds=config.rounds,
                workers=workers,
                corpus_tokens=corpus.tokens,
            )
    return result.to_json()


def word2vec_scaling(dataset: Dataset, thread_counts: list[int], *, epochs: int, seed: int) -> dict[str, Any]:
    """Return tokens per second of the epochs of word2vec alone, by number of threads."""
    settings = EmbedConfig(source="histories", epochs=epochs, seed=seed)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        sentences = word2vec.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        rates = {}
        for threads in thread_counts:
            with PlainProcess(0) as process:
                rates[str(threads)] = process.run(timed_epochs, corpus, settings, threads).per_second
    first_rate = rates[str(thread_counts[0])]
    return {
        "corpus_tokens": corpus.tokens,
        "tokens_per_second": rates,
        "speedup": {threads: rate / first_rate for threads, rate in rates.items()},
    }


def timed_epochs(corpus: Corpus, config: EmbedConfig, threads: int) -> Measured:
    """Measure the epochs of word2vec alone. A small corpus is trained with fewer threads than `threads`."""
    training = Word2Vec(corpus, config, threads)
    started = time.perf_counter()
    epochs = sum(1 for _ in training.train())
    return Measured(corpus.tokens * epochs, time.perf_counter() - started)


def bench_train(bench_workspace: Workspace, config: TrainBenchConfig) -> dict[str, Any]:
    """Compare steady plays per second of Ray Data and Ray Train, with one worker, to plain PyTorch.

    `feed` is plays per second of the data path alone, as a multiple of those of training.
    """
    with ray_cluster():
        dataset = bench_dataset(
            bench_workspace, users=config.users, songs=config.songs, plays=config.plays, seed=config.seed
        )
        task = train_task(dataset, config.seed)
        epoch_numbers = iter(range(config.rounds))
        with rounds_of_training(task, config.seconds) as ray_rounds, plain_process() as process:
            data_path = ray_rounds.data_path()
            result = measure(
                "train",
                "plays",
                ray_rounds.train,
                lambda: process.run(measure_plain_training, task, next(epoch_numbers), config.seconds),
                rounds=config.rounds,
                users=config.users,
                data_per_second=data_path.per_second,
            )
    return {**result.to_json(), "feed": data_path.per_second / result.per_second}


class TrainingRounds:
    """The driver's side of the rounds: sends orders to the worker and waits for its measurements."""

    def __init__(self, task: TrainTask, seconds: float) -> None:
        self._orders, self._results = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        arguments = {"task": task, "seconds": seconds, "orders": self._orders, "answers": self._results}
        self._trainer = TorchTrainer(
            run_rounds,
            train_loop_config=arguments,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name="run",
                storage_path=task.workspace.full("train-rounds"),
                storage_filesystem=task.workspace.filesystem,
            ),
        )
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._fit, daemon=True)
        self._thread.start()

    def train(self) -> Measured:
        """Run one round of training; see `timed_steps`."""
        return self._run_round(ORDER_TRAIN)

    def data_path(self) -> Measured:
        """Run one round of the data path without training; see `timed_windows`."""
        return self._run_round(ORDER_DATA)

    def end(self) -> None:
        """Stop the worker."""
        if self._thread.is_alive():
            self._orders.put(ORDER_END)
            self._thread.join()
        for queue in (self._orders, self._results):
            queue.shutdown()

    def _fit(self) -> None:
        try:
            self._error = self._trainer.fit().error
        except Exception as error:  # `_run_round` raises it
            self._error = error

    def _run_round(self, order: str) -> Measured:
        self._orders.put(order)
        while True:
            try:
                result: Measured = self._results.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                if not self._thread.is_alive():
                    raise RayrecError(f"Ray Train ended before the end of its round: {self._error}") from self._error
            else:
                return result


@contextmanager
def rounds_of_training(task: TrainTask, seconds: float) -> Iterator[TrainingRounds]:
    """Run a Ray Train worker until the block ends; each of its rounds is timed for `seconds`."""
    rounds = TrainingRounds(task, seconds)
    try:
        yield rounds
    finally:
        rounds.end()
        task.workspace.delete("train-rounds")


def run_rounds(arguments: dict[str, Any]) -> None:
    """Run the rounds that the driver orders, in the worker, each with a new network and a new stream."""
    quiet_data()
    task: TrainTask = arguments["task"]
    orders, results, seconds = arguments["orders"], arguments["answers"], arguments["seconds"]
    dataset = Dataset(task.workspace)
    lengths = window_lengths(dataset, FitRange(), task.config)
    reader = ShardReader(dataset, FitRange(), task.config, lengths, Share())
    for epoch, order in enumerate(iter(orders.get, ORDER_END)):
        stream = WindowStream(reader, range(epoch, epoch + 1))
        if order == ORDER_DATA:
            results.put(timed_windows(stream.epoch(epoch), seconds))
        else:
            results.put(timed_steps(task.training(), stream.epoch(epoch), epoch, seconds))
        stream.close()  # a stream that is not read to its end would continue to read ahead
    ray.train.report({})


def count_window_plays(dataset: Dataset, config: TrainConfig) -> int:
    """Return the plays of one epoch of the data path of training, without training."""
    reader = ShardReader(dataset, FitRange(), config, window_lengths(dataset, FitRange(), config), Share())
    return sum(int(windows.inputs.sum()) for windows in WindowStream(reader, range(1)).epoch(0))


K = 100
QUERIES_PER_CALL = 100
CLUSTERS = 200  # of song vectors, as in real catalogs; any index is worse on vectors without clusters
TABLES: tuple[SongTable, ...] = ("trained", "mapped", "frozen")
WARM_UP = 2  # untimed steps; the first allocates the optimizer's state of all songs


def bench_index(config: IndexBenchConfig) -> BenchResult:
    """Compare queries per second of our IVF index with those of faiss alone; also measure exact (flat) search.

    Each query asks for 100 songs. A call has 100 queries, or one in figures with `single` in their name, and uses
    one thread. The plain side searches the same faiss index for the same number of songs.
    """
    vectors = song_vectors(config.songs, config.dim, config.seed)
    settings = IndexConfig(seed=config.seed)
    queries = sample_queries(vectors, settings.replace(queries=config.queries, seed=config.seed + 1))
    query_subset = queries[: min(1_000, len(queries))]  # flat search of all queries would take minutes
    metrics: dict[str, Any] = {"songs": config.songs}
    with MemoryWatch() as watch:
        indexes = {kind: SongIndex.build(vectors, settings.replace(kind=kind)) for kind in ("flat", "ivf")}
    for kind, index in indexes.items():
        metrics[f"{kind}_build_seconds"] = index.figures.build_seconds
        metrics[f"{kind}_recall"] = index.figures.recall
        metrics[f"{kind}_per_second"] = speed(index.rank, query_subset, QUERIES_PER_CALL).per_second
        metrics[f"{kind}_single_per_second"] = speed(index.rank, query_subset, 1).per_second
    ivf = indexes["ivf"]
    faiss_index = _faiss_index(ivf)
    return compare(
        "index",
        "queries",
        lambda: speed(ivf.rank, queries, QUERIES_PER_CALL),
        lambda: speed(faiss_index.search, queries, QUERIES_PER_CALL),
        rounds=config.rounds,
        peak_mb=watch.total_mb,
        nlist=ivf.figures.nlist,
        nprobe=ivf.figures.nprobe,
        **metrics,
    )


def song_vectors(songs: int, dim: int, seed: int) -> np.ndarray:
    """Return random vectors, float32 (songs, dim), normalized, in clusters."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(CLUSTERS, dim)).astype(np.float32)
    vectors = centers[rng.integers(CLUSTERS, size=songs)]
    vectors += rng.normal(size=(songs, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def speed(search: Callable[[np.ndarray, int], Any], queries: np.ndarray, per_call: int) -> Measured:
    """Answer all queries, `per_call` at a time; return their number, and seconds."""
    import_faiss().omp_set_num_threads(1)
    started = time.perf_counter()
    for start in range(0, len(queries), per_call):
        search(queries[start : start + per_call], K)
    return Measured(len(queries), time.perf_counter() - started)


def _faiss_index(index: SongIndex) -> Any:
    """Return the faiss index inside `index`, read back from its file."""
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        index.save(Workspace(folder), "index.faiss")
        return import_faiss().read_index(str(Path(folder) / "index.faiss"))


def bench_song_side(config: SongsBenchConfig) -> BenchResult:
    """Compare plays per second of training with the largest catalog to those with the smallest, with a trained table.

    `{table}_{songs}_per_second` are the plays per second of each kind of song table at each size. One process trains
    with one thread, on windows of songs drawn by Zipf's law.
    """
    sizes = sorted(config.songs)
    metrics: dict[str, float] = {}
    with MemoryWatch() as watch:
        for table in TABLES:
            for songs in sizes:
                steady_steps = _SteadySteps(table, songs, config)
                rates = [steady_steps().per_second for _ in range(config.rounds)]
                metrics[f"{table}_{songs}_per_second"] = median(rates)
    small_steps, large_steps = (_SteadySteps("trained", songs, config) for songs in (sizes[0], sizes[-1]))
    return compare(
        "songs",
        "plays",
        large_steps,
        small_steps,
        rounds=config.rounds,
        peak_mb=watch.total_mb,
        dim=EMBEDDING_DIM,
        **metrics,
    )


class _SteadySteps:
    """Takes the same training steps at each call, after a warm-up, and measures them."""

    def __init__(self, table: SongTable, songs: int, config: SongsBenchConfig) -> None:
        self._settings = TrainConfig(song_table=table, workers=0, seed=config.seed)
        self._windows = _windows(songs, self._settings, config.seed)
        self._training = _training(songs, self._settings)
        self._steps = config.steps
        for step in range(WARM_UP):
            self._training.step(self._windows, 0, step)

    def __call__(self) -> Measured:
        started = time.perf_counter()
        for step in range(self._steps):
            self._training.step(self._windows, 1, step)
        return Measured(float(self._windows.inputs.sum()) * self._steps, time.perf_counter() - started)


def _training(songs: int, settings: TrainConfig) -> Training:
    torch.set_num_threads(1)
    vectors = torch.randn(songs, EMBEDDING_DIM, generator=torch.Generator().manual_seed(settings.seed))
    shape = settings.network_shape(
        num_songs=songs, embedding_dim=EMBEDDING_DIM, features=FeatureSpec(pause_hours=settings.pause_hours)
    )
    counts = np.arange(songs, 0, -1)
    return Training(TasteModel(shape, vectors), settings, counts, device="cpu", share=Share())


def _windows(songs: int, settings: TrainConfig, seed: int) -> Windows:
    """Return one batch of full windows."""
    rng = np.random.default_rng(seed)
    play_count = settings.window + settings.lookahead
    rows = np.minimum(rng.zipf(1.2, size=(settings.batch, play_count)), songs) - 1
    times = np.broadcast_to(np.arange(play_count) * 180_000, rows.shape)
    windows = cut_windows(Histories.from_lists(list(rows), list(times)), settings.window, settings.lookahead)
    full_rows = np.flatnonzero(windows.inputs == settings.window)[: settings.batch]
    return windows.take(full_rows)
