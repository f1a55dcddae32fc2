"""The index against faiss alone: what exact-k answers, ties and filters cost on top of the search itself."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.private_memory import MemoryWatch
from rayrec.bench.rounds import BenchResult, Measured, compare
from rayrec.recommend.index import IndexConfig, SongIndex, import_faiss, sample_queries
from rayrec.storage.workspace import Workspace

K = 100
QUERIES_PER_CALL = 100
CLUSTERS = 200  # songs of a catalog lie in clusters; vectors without any would flatter no index


def bench_index(config: BenchConfig) -> BenchResult:
    """Queries a second, 100 songs each, of the IVF index that we would choose; flat as further figures.

    One thread, 100 queries a call, and `single_` for one query a call. The plain side searches the
    same faiss index for as many answers.
    """
    vectors = song_vectors(config.index_songs, config.index_dim, config.seed)
    settings = IndexConfig(seed=config.seed)
    queries = sample_queries(vectors, settings.replace(queries=config.index_queries, seed=config.seed + 1))
    few = queries[: min(1_000, len(queries))]  # flat search of all of them would take minutes
    figures: dict[str, Any] = {"songs": config.index_songs}
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
