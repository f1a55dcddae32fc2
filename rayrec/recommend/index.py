"""The index: finds the k songs of highest inner product with a query vector, among the songs that pass a filter.

Shapes: N songs, D dimensions, Q queries.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from rayrec.config import Settings
from rayrec.data.ragged import group_of_each_item
from rayrec.data.top_k import top_k
from rayrec.errors import DamagedArtifactError, InputError, MissingDependencyError
from rayrec.recommend.base import NO_SONG, Ranking, SearchPath
from rayrec.recommend.filters import FEW_SONGS, NO_ROWS, AnswerFilter
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

IndexKind = Literal["flat", "ivf"]

FAISS_PACKAGES = ("faiss-cpu", "faiss-gpu")
INDEX_FILE = "index.faiss"
STORED_AT_ONCE = 10_000  # vectors that `stored` yields at once
SCORED_AT_ONCE = 256  # queries whose answers are scored together
RECALL_DEPTH = 100  # recall is measured on the first 100 answers
TIE_SLACK = 16  # extra answers fetched, so that songs of equal score at the end can be sorted by row
SCORED_ROWS = 5_000  # songs that are scored at once when all songs that pass the filter are scored
MAX_OVERFETCH = 1_000  # up to this many excluded songs are compensated by fetching as many more answers
MAX_LIST_SHARE = 0.25  # share of the lists above which scoring every song that passes the filter is as fast


class IndexConfig(Settings):
    """How the song embeddings are searched."""

    kind: Literal["auto", "flat", "ivf"] = Field(
        "auto", description="Index type; flat: exact search; ivf: inverted lists; auto: by catalog size"
    )
    flat_below: int = Field(200_000, ge=0, description="auto: catalog size below which search is exact")
    nlist: int = Field(0, ge=0, description="ivf: number of lists; 0: chosen by catalog size")
    target_recall: float = Field(
        0.99, gt=0, le=1, description="ivf: minimum recall@100 compared with exact search; nprobe is chosen to reach it"
    )
    queries: int = Field(1_000, ge=1, description="ivf: number of taste vectors on which recall is measured")
    seed: int = Field(0, ge=0, description="Random seed of the lists")

    def kind_for(self, num_songs: int) -> IndexKind:
        """Return the type of index for a catalog of `num_songs` songs."""
        if self.kind == "auto":
            return "flat" if num_songs < self.flat_below else "ivf"
        return self.kind


def import_faiss() -> Any:
    """Return the module faiss. Raises `MissingDependencyError`, which names the packages to install."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "faiss is not installed; run `pip install faiss-cpu`, or `pip install faiss-gpu` on a machine with CUDA"
        ) from error
    return faiss


def require_one_faiss() -> None:
    """Raise `MissingDependencyError` unless exactly one of faiss's two packages is installed."""
    if all(list(Distribution.discover(name=name)) for name in FAISS_PACKAGES):
        raise MissingDependencyError(
            "faiss-cpu and faiss-gpu are both installed and overwrite each other's files; run "
            "`pip uninstall faiss-cpu faiss-gpu`, then install one of them"
        )
    import_faiss()


@dataclass(frozen=True, kw_only=True)
class IndexMetrics:
    """The size and the recall of an index."""

    kind: IndexKind
    songs: int  # songs in the index: those that have a vector
    nlist: int  # ivf: lists; flat: 0
    nprobe: int  # ivf: lists that a query searches; flat: 0
    recall: float  # recall@100 against exact search on sampled queries; flat: 1
    build_seconds: float  # time to build the index and measure its recall


class SongIndex:
    """Searches songs by inner product, which is the cosine if the vectors are normalized.

    A flat index is exact. An IVF index searches some of its lists; if these hold fewer than k songs that pass the
    filter, or few songs pass it at all, every song that passes is scored instead. The lists hold vectors in half
    precision, since reading them takes most of the time of a search; scores are computed with the original vectors.
    """

    def __init__(
        self,
        index: Any,
        vectors: np.ndarray,
        metrics: IndexMetrics,
        added_rows: np.ndarray | None = None,
    ) -> None:
        self._index = index  # a faiss index whose ids are song rows
        self.vectors = vectors  # float32 (N, D), of the songs in the index and of added songs
        self.figures = metrics
        # Rows that every search scores.
        self._added_rows = np.zeros(0, dtype=np.int64) if added_rows is None else added_rows
        self._added_vectors = np.ascontiguousarray(vectors[self._added_rows])
        self.songs = metrics.songs + len(self._added_rows)

    @classmethod
    def build(
        cls, vectors: np.ndarray, config: IndexConfig, *, queries: np.ndarray | None = None, threads: int = 1
    ) -> "SongIndex":
        """Build an index of `vectors`, float32 (N, D); songs with a row of zeros are not in it.

        `queries`, float32 (Q, D), are used to choose nprobe; the default is `sample_queries`. Raises `InputError` if no
        song has a vector.
        """
        faiss = import_faiss()
        faiss.omp_set_num_threads(threads)
        started = time.perf_counter()
        rows = np.flatnonzero(vectors.any(axis=1))
        if not len(rows):
            raise InputError(f"none of {len(vectors)} songs has a vector; run `rayrec embed` and `rayrec train` again")
        known_vectors = np.ascontiguousarray(vectors[rows], dtype=np.float32)
        flat_index = faiss.IndexIDMap(faiss.IndexFlatIP(vectors.shape[1]))
        flat_index.add_with_ids(known_vectors, rows)
        kind = config.kind_for(len(vectors))
        index, recall = flat_index, 1.0
        if kind == "ivf":
            index = _train_ivf(known_vectors, rows, _list_count(config, len(rows)), config.seed)
            recall_queries = (
                sample_queries(known_vectors, config) if queries is None else np.ascontiguousarray(queries, np.float32)
            )
            recall = _choose_nprobe(
                index, recall_queries, _nearest_rows(flat_index, recall_queries), config.target_recall
            )
        metrics = IndexMetrics(
            kind=kind,
            songs=len(rows),
            nlist=index.nlist if kind == "ivf" else 0,
            nprobe=index.nprobe if kind == "ivf" else 0,
            recall=recall,
            build_seconds=time.perf_counter() - started,
        )
        return cls(index, vectors, metrics)

    def with_added(self, rows: np.ndarray, vectors: np.ndarray) -> "SongIndex":
        """Return the same index with added songs, int64 (n,) `rows`, ascending; every search scores all of them.

        They replace the songs added before. `vectors`, float32 (N, D), are those of all songs, with rows of zeros for
        songs that must not be found. Nothing is rebuilt.
        """
        return SongIndex(self._index, vectors, self.figures, rows)

    def rank(self, queries: np.ndarray, k: int, filters: Sequence[AnswerFilter] | None = None) -> Ranking:
        """Return the k songs of highest inner product with each of `queries`, float32 (Q, D), that pass its filter.

        Songs are in descending order of score. Songs without a vector are never returned, and fewer than k songs only
        if fewer pass. Equal scores are sorted by song row, except if more than 16 songs at the end have the same score.
        """
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        filters = [_NO_FILTER] * len(queries) if filters is None else filters
        if len(filters) != len(queries):
            raise ValueError(f"expected {len(queries)} filters, one per query, got {len(filters)}")
        ranking = Ranking.empty(len(queries), k, "index")
        paths = list(ranking.paths)
        for query in self._search_overfetching(queries, k, filters, ranking):
            query_slice = slice(query, query + 1)
            paths[query] = self._rank_filtered(
                queries[query_slice], k, filters[query], ranking.songs[query_slice], ranking.scores[query_slice]
            )
        return replace(ranking, paths=tuple(paths))

    def _search_overfetching(
        self, queries: np.ndarray, k: int, filters: Sequence[AnswerFilter], ranking: Ranking
    ) -> list[int]:
        """Answer queries that exclude few songs and allow all others, in one search; return the unanswered queries."""
        excludes_few = [
            answer_filter.allowed is None and len(answer_filter.excluded) <= MAX_OVERFETCH for answer_filter in filters
        ]
        rows = np.flatnonzero(excludes_few)
        if not len(rows):
            return list(range(len(queries)))
        excluded = [filters[row].excluded_rows(len(self.vectors)) for row in rows.tolist()]
        num_fetched = min(self.songs, k + TIE_SLACK + max(len(songs) for songs in excluded))
        nearest = self._search_with_added(queries if all(excludes_few) else queries[rows], num_fetched)
        songs, scores = _first_allowed(*nearest, excluded, len(self.vectors), k)
        ranking.songs[rows], ranking.scores[rows] = songs, scores
        is_complete = num_fetched == self.songs and self.figures.kind == "flat"
        short_rows = [] if is_complete else rows[songs[:, -1] == NO_SONG].tolist()
        return sorted([*short_rows, *np.flatnonzero(np.logical_not(excludes_few)).tolist()])

    def _rank_filtered(
        self, query: np.ndarray, k: int, answer_filter: AnswerFilter, songs: np.ndarray, scores: np.ndarray
    ) -> SearchPath:
        """Answer one query, float32 (1, D), in place, (1, k), by a search limited to the songs that pass the filter.

        If such a search is no faster, or finds fewer than k songs, scores all songs that pass.
        """
        nprobe = self._lists_to_search(k, self._estimate_qualified(answer_filter))
        if nprobe:
            nearest = self._search_filtered(query, k + TIE_SLACK, answer_filter, nprobe)
            if nearest[0][0, k - 1] != NO_SONG:
                songs[:], scores[:] = _first_allowed(*nearest, [NO_ROWS], len(self.vectors), k)
                return "selector"
        songs[:], scores[:] = self._score_all(query, k, answer_filter)
        return "exact"

    def _estimate_qualified(self, answer_filter: AnswerFilter) -> int:
        """Estimate how many songs pass the filter and have a vector.

        Assumes that the share of songs with a vector is the same in the allowed set as in the catalog.
        """
        if answer_filter.allowed is not None:
            return -(-len(answer_filter.allowed) * self.songs // len(self.vectors))
        excluded = answer_filter.excluded_rows(len(self.vectors))
        return self.songs - int(np.count_nonzero(self.vectors[excluded].any(axis=1)))

    def _lists_to_search(self, k: int, num_qualified: int) -> int:
        """Return how many lists to search if `num_qualified` songs pass the filter; 0 if scoring them all is as fast.

        If a share s of the songs passes, the k-th of them is about the (k/s)-th of all songs. nprobe was chosen for the
        first 100 songs, so it must grow with that depth to keep the recall.
        """
        if self.figures.kind == "flat" or num_qualified <= FEW_SONGS:
            return 0
        depth = k * self.songs / num_qualified
        nprobe = int(np.ceil(self.figures.nprobe * max(1.0, depth / RECALL_DEPTH)))
        return nprobe if nprobe <= self.figures.nlist * MAX_LIST_SHARE else 0

    def _search_filtered(
        self, query: np.ndarray, count: int, answer_filter: AnswerFilter, nprobe: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best `count` songs in `nprobe` lists that pass the filter, and their scores; (1, count) each."""
        selector = _selector(answer_filter, len(self.vectors))
        parameters = import_faiss().SearchParametersIVF(sel=selector, nprobe=nprobe)
        return self._search_with_added(query, count, parameters, answer_filter.qualify(self._added_rows))

    def _score_all(self, query: np.ndarray, k: int, answer_filter: AnswerFilter) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best of all songs that pass the filter, and their scores, (1, k) each.

        Songs are scored in blocks, so that few vectors are in memory at once.
        """
        songs, scores = np.full((1, k), NO_SONG, np.int32), np.full((1, k), -np.inf, np.float32)
        for rows in answer_filter.qualifying(len(self.vectors), SCORED_ROWS):
            vectors = self.vectors[rows]
            new_scores = np.where(vectors.any(axis=1), query @ vectors.T, -np.inf)
            songs, scores = top_k(np.concatenate([scores, new_scores], axis=1), k, np.append(songs, rows))
        return songs, scores

    def _search_with_added(
        self, queries: np.ndarray, count: int, parameters: Any = None, is_allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the best `count` songs of the index and of the added songs, and their scores; (Q, count) each.

        `queries` are float32 (Q, D). `is_allowed`, bool, is True for the added songs that may be returned; None: all.
        """
        songs, scores = self._search_index(queries, count, parameters)
        added_positions = np.arange(len(self._added_rows)) if is_allowed is None else np.flatnonzero(is_allowed)
        if len(added_positions):
            songs = np.concatenate(
                [songs, np.broadcast_to(self._added_rows[added_positions], (len(queries), len(added_positions)))],
                axis=1,
            )
            scores = np.concatenate([scores, queries @ self._added_vectors[added_positions].T], axis=1)
            songs, scores = top_k(scores, count, songs)
        return songs, scores

    def _search_index(self, queries: np.ndarray, count: int, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
        scores, songs = self._index.search(queries, count, params=parameters)
        if self.figures.kind == "ivf":
            for start in range(0, len(queries), SCORED_AT_ONCE):
                chunk = slice(start, start + SCORED_AT_ONCE)
                exact_scores = (self.vectors[songs[chunk]] @ queries[chunk, :, None])[..., 0]
                scores[chunk] = np.where(songs[chunk] == NO_SONG, -np.inf, exact_scores)
        return songs, scores

    def stored(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the contents of the index in blocks: song rows int64 (n,) and vectors (n, D), float32 or float16."""
        faiss = import_faiss()
        dim = self._index.d
        if self.figures.kind == "flat":
            songs = faiss.vector_to_array(self._index.id_map)
            for start in range(0, len(songs), STORED_AT_ONCE):
                count = min(STORED_AT_ONCE, len(songs) - start)
                yield songs[start : start + count], self._index.index.reconstruct_n(start, count)
            return
        lists = self._index.invlists
        for list_id in range(self._index.nlist):
            if size := lists.list_size(list_id):
                codes = faiss.rev_swig_ptr(lists.get_codes(list_id), size * lists.code_size)
                vectors = codes.view(f"f{lists.code_size // dim}").reshape(size, dim)
                yield faiss.rev_swig_ptr(lists.get_ids(list_id), size).copy(), vectors

    def save(self, workspace: Workspace, path: str) -> None:
        """Write the index as one file."""
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            local_path = Path(folder) / INDEX_FILE
            import_faiss().write_index(self._index, str(local_path))
            workspace.put_file(local_path, path)

    @classmethod
    def load(cls, workspace: Workspace, manifest: Manifest, vectors: np.ndarray) -> "SongIndex":
        """Load the index of an artifact, see `read`."""
        metrics = IndexMetrics(**{name: manifest.metrics[name] for name in IndexMetrics.__annotations__})
        path, checksum = manifest.path(INDEX_FILE), manifest.files.get(INDEX_FILE)
        return cls.read(workspace, path, metrics, vectors, checksum=checksum)

    @classmethod
    def read(
        cls,
        workspace: Workspace,
        path: str,
        metrics: IndexMetrics,
        vectors: np.ndarray,
        *,
        checksum: str | None = None,
    ) -> "SongIndex":
        """Read a file that `save` wrote; `vectors`, float32 (N, D), must be those that the index was built from.

        IVF lists are memory-mapped. Raises `DamagedArtifactError` for a file that faiss cannot read
        or that does not fit the vectors.
        """
        faiss = import_faiss()
        # One thread: workers and replicas share the machine, and busy-waiting threads slow each other down.
        faiss.omp_set_num_threads(1)
        # The flag exists since faiss 1.10; memory-mapped lists load immediately and are searched as fast.
        io_flags = getattr(faiss, "IO_FLAG_MMAP_IFC", 0) if metrics.kind == "ivf" else 0
        try:
            index = faiss.read_index(str(workspace.local_file(path, checksum)), io_flags)
        except RuntimeError as error:
            raise DamagedArtifactError(f"faiss cannot read {path}; run `rayrec index --force`") from error
        if index.d != vectors.shape[1] or index.ntotal != metrics.songs:
            raise DamagedArtifactError(
                f"{path} holds {index.ntotal} vectors of dimension {index.d}, expected {metrics.songs} of "
                f"dimension {vectors.shape[1]}; run `rayrec index --force`"
            )
        return cls(index, vectors, metrics)


_NO_FILTER = AnswerFilter()


def _selector(answer_filter: AnswerFilter, num_songs: int) -> Any:
    """Return a faiss selector of the songs that pass the filter; it may refer to memory of the filter."""
    faiss, allowed = import_faiss(), answer_filter.allowed
    if allowed is not None and allowed.rows is not None:
        rows = allowed.between(0, num_songs)
        return faiss.IDSelectorBatch(rows[answer_filter.qualify(rows)])
    not_excluded = faiss.IDSelectorNot(faiss.IDSelectorBatch(answer_filter.excluded_rows(num_songs).astype(np.int64)))
    if allowed is None:
        return not_excluded
    return faiss.IDSelectorAnd(faiss.IDSelectorBitmap(len(allowed.bits), faiss.swig_ptr(allowed.bits)), not_excluded)


def _first_allowed(
    songs: np.ndarray, scores: np.ndarray, excluded: list[np.ndarray], num_songs: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first k songs of each row, by score and song row, without excluded ones; padded with -1 and -inf."""
    excluded_keys = group_of_each_item([len(rows) for rows in excluded]) * num_songs + np.concatenate(excluded)
    keys = np.arange(len(songs))[:, None] * num_songs + songs
    is_left_out = songs == NO_SONG
    if len(excluded_keys):  # ascending, so that binary search finds each key
        is_left_out |= excluded_keys[np.minimum(np.searchsorted(excluded_keys, keys), len(excluded_keys) - 1)] == keys
    return top_k(np.where(is_left_out, -np.inf, scores), k, songs)


def _list_count(config: IndexConfig, num_songs: int) -> int:
    """Return the number of lists: about 2 √songs, as a power of two, such as 2,048 for a million songs."""
    count = config.nlist or 1 << round(np.log2(2 * np.sqrt(num_songs)))
    return max(1, min(count, num_songs))


def _train_ivf(vectors: np.ndarray, rows: np.ndarray, nlist: int, seed: int) -> Any:
    faiss = import_faiss()
    dim, half_precision = vectors.shape[1], faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim), dim, nlist, half_precision, faiss.METRIC_INNER_PRODUCT, False
    )
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1  # no warning for small catalogs
    index.train(vectors)
    index.add_with_ids(vectors, rows)
    return index


def sample_queries(vectors: np.ndarray, config: IndexConfig) -> np.ndarray:
    """float32 (Q, D): normalized query vectors, half of them vectors of songs, half the middle of two songs.

    A taste vector lies between songs, where its nearest songs are spread over more lists than those of a song.
    """
    random = np.random.default_rng(config.seed)
    first, second = random.integers(len(vectors), size=(2, config.queries))
    second[: config.queries // 2] = first[: config.queries // 2]
    vector_sums = vectors[first] + vectors[second]
    return np.asarray(
        vector_sums / np.maximum(np.linalg.norm(vector_sums, axis=1, keepdims=True), 1e-12), dtype=np.float32
    )


def _nearest_rows(index: Any, queries: np.ndarray) -> np.ndarray:
    """int64 (Q, 100): the first 100 answers; fewer if the index holds fewer songs."""
    return np.asarray(index.search(queries, min(RECALL_DEPTH, index.ntotal))[1])


def recall_against(exact: np.ndarray, approximate: np.ndarray) -> np.ndarray:
    """float64 (Q,): the share of each query's `exact` answers, int (Q, n), in its `approximate` ones, int (Q, n)."""
    # The shift makes the numbers of different queries distinct, so that one call compares all queries.
    shift = np.arange(len(exact))[:, None] * (max(exact.max(), approximate.max()) + 2)
    return np.asarray(np.isin(exact + shift, (approximate + shift)[approximate != NO_SONG]).mean(axis=1))


def _choose_nprobe(index: Any, queries: np.ndarray, exact: np.ndarray, target: float) -> float:
    """Set the smallest nprobe whose recall reaches the target, and return the mean recall.

    Recall grows with nprobe, so a binary search finds it. The mean must be two standard errors above the target, or 1,
    so that other queries reach the target, too.
    """

    def recalls_at(nprobe: int) -> np.ndarray:
        index.nprobe = nprobe
        return recall_against(exact, _nearest_rows(index, queries))

    low, high = 0, 1  # the recall of `low` is below the target
    while high < index.nlist and not reaches(recalls_at(high), target):
        low, high = high, min(2 * high, index.nlist)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(recalls_at(middle), target) else (middle, high)
    return float(recalls_at(high).mean())


def reaches(recalls: np.ndarray, target: float) -> bool:
    """True if the mean of recalls, float (Q,), is two of its standard errors above the target, or all are 1."""
    error = recalls.std() / np.sqrt(len(recalls))
    return bool(recalls.mean() - 2 * error >= target)
