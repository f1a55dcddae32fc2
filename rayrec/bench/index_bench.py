"""The song side: the index against faiss alone, and what a training step costs as the catalog grows."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from rayrec.bench.bench_config import IndexBenchConfig, SongsBenchConfig
from rayrec.bench.private_memory import MemoryWatch
from rayrec.bench.rounds import BenchResult, Measured, compare
from rayrec.recommend.index import IndexConfig, SongIndex, import_faiss, sample_queries
from rayrec.storage.workspace import Workspace

K = 100
QUERIES_PER_CALL = 100
CLUSTERS = 200  # songs of a catalog lie in clusters; vectors without any would flatter no index
DIM = 64
TABLES: tuple["SongTable", ...] = ("trained", "mapped", "frozen")
WARM_UP = 2  # steps; the first makes the optimizer's memory of all songs


def bench_index(config: IndexBenchConfig) -> BenchResult:
    """Queries a second, 100 songs each, of the IVF index that we would choose; flat as further figures.

    One thread, 100 queries a call, and `single_` for one query a call. The plain side searches the
    same faiss index for as many answers.
    """
    vectors = song_vectors(config.songs, config.dim, config.seed)
    settings = IndexConfig(seed=config.seed)
    queries = sample_queries(vectors, settings.replace(queries=config.queries, seed=config.seed + 1))
    few = queries[: min(1_000, len(queries))]  # flat search of all of them would take minutes
    figures: dict[str, Any] = {"songs": config.songs}
    with MemoryWatch() as watch:
        built = {kind: SongIndex.build(vectors, settings.replace(kind=kind)) for kind in ("flat", "ivf")}
    for kind, index in built.items():
        figures[f"{kind}_build_seconds"] = index.figures.build_seconds
        figures[f"{kind}_recall"] = index.figures.recall
        figures[f"{kind}_per_second"] = speed(index.search, few, QUERIES_PER_CALL).per_second
        figures[f"{kind}_single_per_second"] = speed(index.search, few, 1).per_second
    ivf = built["ivf"]
    alone = _faiss_alone(ivf)
    return compare(
        "index",
        "queries",
        lambda: speed(ivf.search, queries, QUERIES_PER_CALL),
        lambda: speed(alone.search, queries, QUERIES_PER_CALL),
        rounds=config.rounds,
        peak_mb=watch.total_mb,
        nlist=ivf.figures.nlist,
        nprobe=ivf.figures.nprobe,
        **figures,
    )


def song_vectors(songs: int, dim: int, seed: int) -> np.ndarray:
    """float32 (songs, dim), normalized, in clusters."""
    random = np.random.default_rng(seed)
    centers = random.normal(size=(CLUSTERS, dim)).astype(np.float32)
    vectors = centers[random.integers(CLUSTERS, size=songs)]
    vectors += random.normal(size=(songs, dim)).astype(np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def speed(search: Callable[[np.ndarray, int], Any], queries: np.ndarray, per_call: int) -> Measured:
    """Queries answered by a search, and the seconds."""
    import_faiss().omp_set_num_threads(1)
    started = time.perf_counter()
    for start in range(0, len(queries), per_call):
        search(queries[start : start + per_call], K)
    return Measured(len(queries), time.perf_counter() - started)


def _faiss_alone(index: SongIndex) -> Any:
    """The faiss index within ours, read back from its file."""
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        index.save(Workspace(folder), "index.faiss")
        return import_faiss().read_index(str(Path(folder) / "index.faiss"))


if TYPE_CHECKING:
    from rayrec.data.windows import Windows
    from rayrec.model.train_config import SongTable, TrainConfig
    from rayrec.model.training import Training


def bench_song_side(config: SongsBenchConfig) -> BenchResult:
    """Plays a second of training with a trained table, the largest catalog against the smallest.

    `{table}_{songs}_per_second` tells every kind of song table at every size. One process, one
    thread, windows of songs drawn by Zipf's law.
    """
    sizes = sorted(config.songs)
    figures: dict[str, float] = {}
    with MemoryWatch() as watch:
        for table in TABLES:
            for songs in sizes:
                ways = _SteadySteps(table, songs, config)
                rates = [ways().per_second for _ in range(config.rounds)]
                figures[f"{table}_{songs}_per_second"] = median(rates)
    small, large = (_SteadySteps("trained", songs, config) for songs in (sizes[0], sizes[-1]))
    return compare("songs", "plays", large, small, rounds=config.rounds, peak_mb=watch.total_mb, dim=DIM, **figures)


class _SteadySteps:
    """Takes the same few steps at each call, after a warm-up."""

    def __init__(self, table: "SongTable", songs: int, config: SongsBenchConfig) -> None:
        from rayrec.model.train_config import TrainConfig

        self._settings = TrainConfig(song_table=table, workers=0, seed=config.seed)
        self._windows = _windows(songs, self._settings, config.seed)
        self._training = _training(songs, self._settings)
        self._steps = config.steps
        for step in range(WARM_UP):
            self._training.step(self._windows, 0, step)

    def __call__(self) -> Measured:
        began = time.perf_counter()
        for step in range(self._steps):
            self._training.step(self._windows, 1, step)
        return Measured(float(self._windows.inputs.sum()) * self._steps, time.perf_counter() - began)


def _training(songs: int, settings: "TrainConfig") -> "Training":
    import torch

    from rayrec.model.network import TasteModel
    from rayrec.model.train_config import FeatureSpec, ModelConfig
    from rayrec.model.training import Training
    from rayrec.model.workers import Share

    torch.set_num_threads(1)
    vectors = torch.randn(songs, DIM, generator=torch.Generator().manual_seed(settings.seed))
    shape = ModelConfig(
        num_songs=songs,
        embedding_dim=DIM,
        hidden_dim=settings.hidden_dim,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
        features=FeatureSpec(),
        horizons=settings.horizons,
        song_table=settings.song_table,
        averages=settings.averages,
        input_table=settings.has_input_table,
    )
    counts = np.arange(songs, 0, -1)
    return Training(TasteModel(shape, vectors), settings, counts, device="cpu", share=Share())


def _windows(songs: int, settings: "TrainConfig", seed: int) -> "Windows":
    """One batch of full windows."""
    from rayrec.data.histories import Histories
    from rayrec.data.windows import cut_windows

    random = np.random.default_rng(seed)
    plays = settings.window + settings.lookahead
    rows = np.minimum(random.zipf(1.2, size=(settings.batch, plays)), songs) - 1
    times = np.broadcast_to(np.arange(plays) * 180_000, rows.shape)
    windows = cut_windows(Histories.from_lists(list(rows), list(times)), settings.window, settings.lookahead)
    full = np.flatnonzero(windows.inputs == settings.window)[: settings.batch]
    return windows.take(full)
