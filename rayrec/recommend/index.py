"""The index: the songs of highest inner product with a query, exactly k of them, some left out.

N songs, D numbers per vector, Q queries.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rayrec.artifacts import Manifest
from rayrec.config import setting
from rayrec.errors import DamagedArtifactError, InputError, MissingDependencyError
from rayrec.recommend.recommender import NO_SONG, chunk_size, top_k
from rayrec.workspace import Workspace

IndexKind = Literal["flat", "ivf"]

INDEX_FILE = "index.faiss"
RECALL_DEPTH = 100  # recall is measured on the first 100 answers
TIE_SLACK = 16  # extra answers fetched, so that songs of equal score at the end come in the order of rows
MAX_OVERFETCH = 1_000  # more answers to leave out than this: the whole catalog is scored where it takes that


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """How the vectors of songs are searched."""

    kind: Literal["auto", "flat", "ivf"] = setting("auto", help="flat: exact; ivf: by inverted lists; auto: by size")
    flat_below: int = setting(200_000, help="auto: fewer songs than this are searched exactly")
    nlist: int = setting(0, help="ivf: number of lists; 0: chosen from the number of songs")
    target_recall: float = setting(0.99, help="ivf: recall@100 against exact search that nprobe must reach")
    queries: int = setting(1_000, help="ivf: queries on which recall is measured")
    seed: int = setting(0, help="which queries")

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "flat", "ivf"):
            raise InputError(f"index kind is {self.kind!r}; expected auto, flat or ivf")
        if not 0 < self.target_recall <= 1:
            raise InputError(f"index target_recall is {self.target_recall}; give a share in (0, 1]")
        if self.nlist < 0 or self.flat_below < 0:
            raise InputError(f"index nlist {self.nlist} and flat_below {self.flat_below} must not be negative")
        if self.queries < 1:
            raise InputError(f"index queries is {self.queries}; measure recall on at least 1")


def import_faiss() -> Any:
    """The module faiss. Raises `MissingDependencyError` that says which of its two packages to install."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "faiss is not installed; run `pip install rayrec[cpu]`, or `pip install rayrec[gpu]` on a machine with CUDA"
        ) from error
    return faiss


@dataclass(frozen=True, kw_only=True)
class IndexFigures:
    """What was built and how well it finds."""

    kind: IndexKind
    songs: int  # songs in the index: those that have a vector
    nlist: int  # ivf: lists; flat: 0
    nprobe: int  # ivf: lists looked into by a query; flat: 0
    recall: float  # recall@100 against exact search on sampled queries; flat: 1
    build_seconds: float  # building and measuring


class SongIndex:
    """Searches songs by inner product; over normalized vectors that is the cosine.

    Flat answers are exact. IVF answers are those of the lists it looks into; where these hold fewer
    than k songs that qualify, the query is answered exactly.
    """

    def __init__(self, index: Any, vectors: np.ndarray, figures: IndexFigures) -> None:
        self._index = index  # a faiss index whose ids are song rows
        self.vectors = vectors  # float32 (N, D), those it was built over
        self.figures = figures
        self._unknown = np.flatnonzero(~vectors.any(axis=1))

    @classmethod
    def build(
        cls, vectors: np.ndarray, config: IndexConfig, *, queries: np.ndarray | None = None, threads: int = 1
    ) -> "SongIndex":
        """An index over float32 (N, D); songs whose row is zero are not in it.

        `queries`, float32 (Q, D), are what nprobe is chosen on; without them, a sample of
        `sample_queries`. Raises `InputError` where no song has a vector.
        """
        faiss = import_faiss()
        faiss.omp_set_num_threads(threads)
        started = time.perf_counter()
        rows = np.flatnonzero(vectors.any(axis=1))
        if not len(rows):
            raise InputError(f"none of {len(vectors)} songs has a vector; run `rayrec embed` and `rayrec train` again")
        known = np.ascontiguousarray(vectors[rows], dtype=np.float32)
        flat = faiss.IndexIDMap(faiss.IndexFlatIP(vectors.shape[1]))
        flat.add_with_ids(known, rows)
        kind = config.kind if config.kind != "auto" else ("flat" if len(vectors) < config.flat_below else "ivf")
        index, recall = flat, 1.0
        if kind == "ivf":
            index = _train_ivf(known, rows, _lists(config, len(rows)), config.seed)
            asked = sample_queries(known, config) if queries is None else np.ascontiguousarray(queries, np.float32)
            recall = _choose_nprobe(index, asked, _nearest(flat, asked), config.target_recall)
        figures = IndexFigures(
            kind=kind,
            songs=len(rows),
            nlist=index.nlist if kind == "ivf" else 0,
            nprobe=index.nprobe if kind == "ivf" else 0,
            recall=recall,
            build_seconds=time.perf_counter() - started,
        )
        return cls(index, vectors, figures)

    def search(
        self, queries: np.ndarray, k: int, exclude: Sequence[np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k songs of highest inner product with each of float32 (Q, D), best first.

        `exclude` holds the song rows, int (any,), that each query must not get. Songs without a
        vector never come. Returns songs int32 (Q, k) and scores float32 (Q, k), filled with -1 and
        -inf only where fewer than k songs qualify; equal scores in the order of song rows, except
        among more than 16 of them at the end.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        banned = [np.unique(rows) for rows in exclude] if exclude is not None else [_NOTHING] * len(queries)
        if len(banned) != len(queries):
            raise ValueError(f"{len(queries)} queries need as many lists of songs to leave out, got {len(banned)}")
        if not len(queries):
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        most = max(len(rows) for rows in banned)
        fetched = min(self.figures.songs, k + TIE_SLACK + min(most, MAX_OVERFETCH))
        scores, songs = self._index.search(queries, fetched)
        songs, scores = _first_allowed(songs, scores, banned, len(self.vectors), k)
        if fetched < self.figures.songs or self.figures.kind == "ivf":
            short = np.flatnonzero(songs[:, -1] == NO_SONG)
            songs[short], scores[short] = self._exact(queries[short], k, [banned[query] for query in short])
        return songs, scores

    def _exact(self, queries: np.ndarray, k: int, banned: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, by scoring every song."""
        songs = np.full((len(queries), k), NO_SONG, dtype=np.int32)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        step = chunk_size(len(self.vectors))
        for start in range(0, len(queries), step):
            chunk = slice(start, start + step)
            scored = queries[chunk] @ self.vectors.T
            scored[:, self._unknown] = -np.inf
            for row, rows in zip(scored, banned[chunk], strict=True):
                row[rows] = -np.inf
            songs[chunk], scores[chunk] = top_k(scored, k)
        return songs, scores

    def save(self, workspace: Workspace, path: str) -> None:
        """Write the index as one file."""
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            local = Path(folder) / INDEX_FILE
            import_faiss().write_index(self._index, str(local))
            workspace.put_file(local, path)

    @classmethod
    def load(cls, workspace: Workspace, manifest: Manifest, vectors: np.ndarray, *, threads: int = 1) -> "SongIndex":
        """The index of a manifest over the vectors, float32 (N, D), that it was built over.

        IVF lists are memory-mapped. Raises `DamagedArtifactError` for a file that faiss cannot read
        or that does not fit the vectors.
        """
        faiss = import_faiss()
        # One thread: workers and replicas share the machine, and spinning threads starve each other.
        faiss.omp_set_num_threads(threads)
        figures = IndexFigures(**{name: manifest.metrics[name] for name in IndexFigures.__annotations__})
        # The flag came with faiss 1.10; mapped lists load at once and search as fast.
        mapped = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if figures.kind == "ivf" else 0
        path = manifest.path(INDEX_FILE)
        try:
            with workspace.local_copy(path) as local:
                index = faiss.read_index(str(local), mapped)
        except RuntimeError as error:
            raise DamagedArtifactError(f"{path} is not an index that faiss reads; run `rayrec index` again") from error
        if index.d != vectors.shape[1] or index.ntotal != figures.songs:
            raise DamagedArtifactError(
                f"{path} holds {index.ntotal} vectors of {index.d} numbers, expected {figures.songs} of "
                f"{vectors.shape[1]}; run `rayrec index` again"
            )
        return cls(index, vectors, figures)


_NOTHING = np.zeros(0, dtype=np.int64)


def _first_allowed(
    songs: np.ndarray, scores: np.ndarray, banned: list[np.ndarray], num_songs: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first k of each row, ordered by score and song row, without the banned ones; filled with -1 and -inf."""
    lengths = [len(rows) for rows in banned]
    pairs = np.repeat(np.arange(len(banned)), lengths) * num_songs + np.concatenate(banned)
    left_out = np.isin(songs + np.arange(len(songs))[:, None] * num_songs, pairs) | (songs == NO_SONG)
    scores = np.where(left_out, -np.inf, scores)
    order = np.lexsort((songs, -scores))[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    songs = np.where(scores > -np.inf, np.take_along_axis(songs, order, axis=1), NO_SONG)
    missing = ((0, 0), (0, k - songs.shape[1]))
    return (
        np.pad(songs, missing, constant_values=NO_SONG).astype(np.int32),
        np.pad(scores, missing, constant_values=-np.inf).astype(np.float32),
    )


def _lists(config: IndexConfig, songs: int) -> int:
    """About 2 √songs lists, as a power of two: 2,048 for a million songs."""
    wanted = config.nlist or 1 << round(np.log2(2 * np.sqrt(songs)))
    return max(1, min(wanted, songs))


def _train_ivf(known: np.ndarray, rows: np.ndarray, nlist: int, seed: int) -> Any:
    faiss = import_faiss()
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(known.shape[1]), known.shape[1], nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1  # small catalogs are no reason for a warning
    index.train(known)
    index.add_with_ids(known, rows)
    return index


def sample_queries(vectors: np.ndarray, config: IndexConfig) -> np.ndarray:
    """float32 (Q, D): normalized, half of them songs and half the middle of two songs.

    A taste lies between songs, where neighbours fall into more lists than around a song itself.
    """
    random = np.random.default_rng(config.seed)
    first, second = random.integers(len(vectors), size=(2, config.queries))
    second[: config.queries // 2] = first[: config.queries // 2]
    mixed = vectors[first] + vectors[second]
    return np.asarray(mixed / np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-12), dtype=np.float32)


def _nearest(index: Any, queries: np.ndarray) -> np.ndarray:
    """int64 (Q, 100): the first answers, fewer where the index holds fewer songs."""
    return np.asarray(index.search(queries, min(RECALL_DEPTH, index.ntotal))[1])


def recall_against(exact: np.ndarray, found: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of each query's exact answers, int (Q, n), among those found, int (Q, n)."""
    # Distinct numbers for distinct queries, so that one call compares all.
    shift = np.arange(len(exact))[:, None] * (max(exact.max(), found.max()) + 2)
    return np.asarray(np.isin(exact + shift, (found + shift)[found != NO_SONG]).mean(axis=1))


def _choose_nprobe(index: Any, queries: np.ndarray, exact: np.ndarray, target: float) -> float:
    """Set the smallest nprobe that reaches the target; recall grows with nprobe. Returns the mean recall.

    The target is reached where the mean is two standard errors above it (or is 1): on other
    queries than these, the recall is then still as asked.
    """

    def recall(nprobe: int) -> np.ndarray:
        index.nprobe = nprobe
        return recall_against(exact, _nearest(index, queries))

    low, high = 0, 1  # low falls short of the target
    while high < index.nlist and not reaches(recall(high), target):
        low, high = high, min(2 * high, index.nlist)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(recall(middle), target) else (middle, high)
    return float(recall(high).mean())


def reaches(recalls: np.ndarray, target: float) -> bool:
    """True where the mean of recalls, float (Q,), is two of its standard errors above the target, or all are 1."""
    error = recalls.std() / np.sqrt(len(recalls))
    return bool(recalls.mean() - 2 * error >= target)
