"""The Ray side of the benchmarks: each stage as users run it, in rounds against its plain loop."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from rayrec import artifacts
from rayrec.artifacts import Manifest, fingerprint
from rayrec.bench import loops, memory
from rayrec.bench.config import BenchConfig, check_name
from rayrec.bench.indexes import bench_index
from rayrec.bench.loops import TrainTask
from rayrec.bench.memory import MemoryWatch
from rayrec.bench.plain import PlainProcess, niceness
from rayrec.bench.rounds import BenchResult, Measured, Way, compare
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.generate import GenerateConfig
from rayrec.data.split import FitRange
from rayrec.jobs.bench_training import rounds_of_training
from rayrec.jobs.cluster import WORKER_ENVIRONMENT, ray_cluster
from rayrec.jobs.embed import embed
from rayrec.jobs.generating import generate
from rayrec.jobs.node import node_cpus
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import model_config, window_stream
from rayrec.progress import progress
from rayrec.songs import sessions
from rayrec.songs.embedding import EmbedConfig
from rayrec.songs.word2vec import TOKENS_PER_WORKER, write_corpus
from rayrec.taste.checkpoint import save_model
from rayrec.taste.config import TasteConfig, TrainConfig
from rayrec.taste.training import Share
from rayrec.workspace import DATASET_MANIFEST, Workspace

EMBEDDING_DIM = 64
SONGS_PER_ARTIST = 8
PLAIN_TASTES = "plain-tastes"  # folder that the plain loop writes to
# Few, so that batches and pools are full in the smaller data too: what still grows, grows with the users.
MEMORY_BUCKETS = 4


def bench(
    name: str, workspace: Workspace | None = None, config: BenchConfig | None = None, *, quick: bool = False
) -> dict[str, Any]:
    """Run one benchmark, train, taste, index, embed or memory; its figures as one flat object.

    Generated data stay under bench/ of the workspace for the next run; without one they are
    temporary. `quick` is for a look whether it works. Raises `InputError` for another name.
    """
    check_name(name)
    config = config or (BenchConfig.quick() if quick else BenchConfig())
    # Before Ray starts: its workers as nice as the driver, like the plain loops, and these with the
    # environment of its workers, which the allocator reads when a process starts.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.update(WORKER_ENVIRONMENT)
    with _place(workspace) as place:
        return BENCHES[name](place, config)


def bench_train(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Steady plays a second of Ray Data and Ray Train with one worker.

    `feed` is what the data path alone delivers, as a multiple of what the network eats.
    """
    with ray_cluster():
        dataset = _dataset(place, config, users=config.train_users)
        task = _train_task(dataset, config.seed)
        epochs = iter(range(config.rounds))
        with rounds_of_training(task, config.train_seconds) as ray_side, PlainProcess(worker_niceness()) as plain:
            feed = ray_side.data_path()
            result = _rounds(
                "train",
                "plays",
                ray_side.train,
                lambda: plain.run(loops.train_loop, task, next(epochs), config.train_seconds),
                config,
                users=config.train_users,
                data_per_second=feed.per_second,
            )
    return {**result.to_json(), "feed": feed.per_second / result.per_second}


def bench_taste(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Plays a second of the taste job with one worker; the worker's start and the artifact's checksums count."""
    with ray_cluster():
        dataset = _dataset(place, config, users=config.taste_users)
        workspace, model = dataset.workspace, _untrained_model(dataset, config.seed)
        settings = TasteConfig(concurrency=1)

        def ours() -> Measured:
            began = time.perf_counter()
            made = compute_tastes(workspace, settings, model_id=model.id, repeat=True)
            seconds = time.perf_counter() - began
            workspace.delete(made.folder)
            return Measured(made.metrics["plays"], seconds)

        arguments = (workspace, model, PLAIN_TASTES, dataset.manifest.last_play, settings.users)
        with PlainProcess(worker_niceness()) as plain:
            plays = partial(plain.run, loops.taste_loop, *arguments)
            result = _rounds("taste", "plays", ours, plays, config, users=config.taste_users)
        workspace.delete(PLAIN_TASTES)
    return result.to_json()


def bench_embed(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Tokens a second of the embed job, making the corpus and the health check included, against gensim alone."""
    with ray_cluster(), tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        dataset = _dataset(place, config, users=config.embed_users)
        settings = EmbedConfig(source="histories", epochs=config.embed_epochs, seed=config.seed)
        sentences = sessions.from_histories(dataset.read_all(), FitRange(), settings.session_gap_minutes)
        corpus = write_corpus(sentences, Path(folder) / "corpus", dataset.num_songs)
        workers = max(1, min(node_cpus(), corpus.tokens // TOKENS_PER_WORKER))
        settings = replace(settings, workers=workers)

        def ours() -> Measured:
            began = time.perf_counter()
            made = embed(dataset.workspace, settings, repeat=True)
            seconds = time.perf_counter() - began
            dataset.workspace.delete(made.folder)
            return Measured(made.metrics["tokens"] * settings.epochs, seconds)

        with PlainProcess(worker_niceness()) as plain:
            tokens = partial(plain.run, loops.embed_loop, corpus.path, settings, workers, corpus.tokens)
            result = _rounds("embed", "tokens", ours, tokens, config, workers=workers, corpus_tokens=corpus.tokens)
    return result.to_json()


def bench_memory(place: Workspace, config: BenchConfig) -> dict[str, Any]:
    """Peak private memory of the driver and of the largest worker at two numbers of users.

    Of the taste job and of the training data path, each in a driver and a cluster of its own, so
    that no run inherits what another has grown to. `growth` is the largest share by which any of the
    four figures grew. Sees the processes of this machine.
    """
    with ray_cluster():
        sizes = {"plays": config.memory_plays, "buckets": MEMORY_BUCKETS}
        datasets = [_dataset(place, config, users=users, **sizes) for users in config.memory_users]
        models = [_untrained_model(dataset, config.seed) for dataset in datasets]
    peaks: list[dict[str, float]] = [{}, {}]
    totals, seconds = [], 0.0
    with progress("bench memory", 2 * len(datasets)) as bar:
        for size, (dataset, model) in enumerate(zip(datasets, models, strict=True)):
            passes = {
                "taste": partial(taste_memory, dataset.workspace, model),
                "data": partial(data_memory, dataset.workspace),
            }
            for name, job in passes.items():
                with PlainProcess(0) as driver:
                    found = driver.run(job)
                peaks[size] |= {f"{name} {role}": found.peaks_mb[role] for role in (memory.DRIVER, memory.WORKER)}
                totals.append(found.total_mb)
                seconds = found.seconds if name == "taste" else seconds
                bar.advance()
    grown = memory.growth(*peaks)
    return {
        "name": "memory",
        "unit": "users",
        "growth": max(grown.values()),
        "growth_by_role": grown,
        "users": list(config.memory_users),
        "peaks_mb": peaks,
        "per_second": config.memory_users[1] / max(seconds, 1e-9),
        "peak_mb": max(totals),
    }


@dataclass(frozen=True, kw_only=True)
class MemoryPass:
    """What one job needed on one size of data."""

    peaks_mb: dict[str, float]  # by role
    total_mb: float
    seconds: float


def taste_memory(workspace: Workspace, model: Manifest) -> MemoryPass:
    """What the taste job needs."""

    def job() -> None:
        made = compute_tastes(workspace, TasteConfig(), model_id=model.id, repeat=True)
        workspace.delete(made.folder)

    return _watched(job)


def data_memory(workspace: Workspace) -> MemoryPass:
    """What the data path of training needs."""
    return _watched(lambda: ray.get(ray.remote(read_windows).remote(Dataset(workspace), TrainConfig())))


def _watched(job: Callable[[], Any]) -> MemoryPass:
    with ray_cluster(), MemoryWatch() as watch:
        began = time.perf_counter()
        job()
        seconds = time.perf_counter() - began
    return MemoryPass(peaks_mb=watch.peaks_mb, total_mb=watch.total_mb, seconds=seconds)


def read_windows(dataset: Dataset, config: TrainConfig) -> int:
    """Plays of an epoch of the training data path, which nothing learns from."""
    return sum(int(windows.inputs.sum()) for windows in window_stream(dataset, FitRange(), config, Share(), 0))


def worker_niceness() -> int:
    """How nice the cluster's workers are."""
    return int(ray.get(ray.remote(niceness).remote()))


BENCHES: dict[str, Callable[[Workspace, BenchConfig], dict[str, Any]]] = {
    "train": bench_train,
    "taste": bench_taste,
    "index": lambda place, config: bench_index(config).to_json(),
    "embed": bench_embed,
    "memory": bench_memory,
}


def _rounds(name: str, unit: str, ours: Way, plain: Way, config: BenchConfig, **extra: Any) -> BenchResult:
    """One round of ours for its memory, unmeasured otherwise, and then the rounds that count."""
    with progress(f"bench {name}", 2 * config.rounds + 1) as bar:

        def shown(way: Way) -> Measured:
            bar.advance()
            return way()

        with MemoryWatch() as watch:
            shown(ours)
        ways = partial(shown, ours), partial(shown, plain)
        return compare(name, unit, *ways, rounds=config.rounds, peak_mb=watch.total_mb, **extra)


@contextmanager
def _place(workspace: Workspace | None) -> Iterator[Workspace]:
    """Where generated data go."""
    if workspace is not None:
        yield Workspace(f"{workspace.uri}/bench")
        return
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        yield Workspace(folder)


def _dataset(place: Workspace, config: BenchConfig, **sizes: Any) -> Dataset:
    """Generated plays of a size, made now or by an earlier run."""
    common = {"songs": config.songs, "plays": config.plays, "seed": config.seed, "playlists": 0}
    artists = max(GenerateConfig.genres, config.songs // SONGS_PER_ARTIST)
    world = GenerateConfig(**{**common, "artists": artists, **sizes})
    workspace = Workspace(f"{place.uri}/{fingerprint('bench', to_mapping(world), {})}")
    if not workspace.exists(DATASET_MANIFEST):
        generate(workspace, world)
    return Dataset(workspace)


def _train_task(dataset: Dataset, seed: int) -> TrainTask:
    settings = TrainConfig(seed=seed)
    counts = np.zeros(dataset.num_songs, dtype=np.int64)
    for histories in dataset.read_bucket(0):
        counts += np.bincount(histories.songs, minlength=dataset.num_songs)
    shape = model_config(dataset, settings, EMBEDDING_DIM)
    return TrainTask(workspace=dataset.workspace, config=settings, model=shape, counts=counts)


def _untrained_model(dataset: Dataset, seed: int) -> Manifest:
    """A model of the default shape with random weights: as fast as a trained one."""
    manifest = Manifest(kind="models", id="bench", inputs={"dataset": dataset.manifest.id}, seed=seed)
    model = _train_task(dataset, seed).training().model
    names = save_model(dataset.workspace, manifest.folder, model, np.ones(dataset.num_songs, dtype=np.bool_))
    return artifacts.publish(dataset.workspace, manifest, names)
