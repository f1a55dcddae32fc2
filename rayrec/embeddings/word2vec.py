"""Song embeddings of a data set: trained by word2vec, or read from a file.

word2vec treats each song as a word and each playlist or session as a sentence. De Boom et al. 2018 (arXiv:1708.06520)
train word2vec (Mikolov et al. 2013, arXiv:1301.3781) on playlists; item2vec (Barkan and Koenigstein 2016) is the same
idea. Sessions as sentences are ours.

gensim trains in the threads of one process, so this stage runs on one node, the largest, and does not become faster
with more nodes. More than about 24 threads do not help, since they wait for the same cache lines and for the thread
that reads (gensim issue 3376). With more than one thread the result depends on their timing (issue 641). `rayrec bench
scale` measures the speed of threads on a machine. If one node takes too long, try fewer epochs, `--subsample`,
`--no-skip-gram` or `--min-count` first, then vectors trained elsewhere (`rayrec embed --vectors`). The song table of
the network trains on the whole cluster, whatever vectors it starts from.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from rayrec.config import Settings
from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.ragged import group_of_each_item, offsets_of, ranges
from rayrec.data.split import FitRange
from rayrec.embeddings.vectors import SongVectors
from rayrec.errors import InputError
from rayrec.importing.vector_files import read_vector_file
from rayrec.storage.workspace import Workspace

Source = Literal["auto", "playlists", "histories"]


class EmbedConfig(Settings):
    """Song embeddings: word2vec, or vectors from a file.

    The defaults are the settings with which the neighbors of the last song contain the next play most often:
    docs/method.md#song-embeddings.
    """

    dim: int = Field(64, ge=1, description="Embedding dimension")
    epochs: int = Field(20, ge=1, description="Number of epochs")
    skip_gram: bool = Field(
        True, description="Use skip-gram; otherwise CBOW, which is faster and less accurate on plays"
    )
    window: int = Field(3, ge=1, description="Context window: songs on either side of the target")
    negatives: int = Field(10, ge=1, description="Negative samples per positive pair")
    ns_exponent: float = Field(
        -0.5,
        ge=-4,
        le=4,
        description="Exponent of play counts in negative sampling; 0 is uniform, below 0 prefers rare songs",
    )
    learning_rate: float = Field(0.025, gt=0, le=1, description="Initial learning rate; decays linearly to almost 0")
    center: bool = Field(True, description="Subtract the mean vector before normalization")
    subsample: float = Field(
        0.0, ge=0, description="gensim's threshold for subsampling frequent songs; 0 keeps all plays"
    )
    min_count: int = Field(1, ge=1, description="Minimum occurrences of a song in the corpus to get an embedding")
    session_gap_minutes: float = Field(
        30.0, gt=0, description="Pause between two plays that starts a new session, in minutes"
    )
    source: Source = Field(
        "auto",
        description="Sentences to train on: playlists, or sessions of histories; auto: playlists if the data has any",
    )
    vectors: str | None = Field(
        None, description="Import embeddings from this .npy or .parquet file instead of training"
    )
    workers: int = Field(
        0,
        ge=0,
        description="Training threads; 0 uses all CPUs of one node; with more than 1, results are not reproducible",
    )
    seed: int = Field(0, ge=0, description="Random seed")


MINUTE_MS = 60_000
MAX_SENTENCE = 10_000  # words; gensim ignores the rest of a longer sentence

PLAYLIST_WARNING = (
    "trained on playlists, which have no times: a split cannot cut them, so they may contain songs played together in "
    "the test range, and test figures may be too high"
)

Sentences = tuple[np.ndarray, np.ndarray]  # songs int32 (P,), offsets int64 (S + 1,)
FINAL_LEARNING_RATE = 1e-4
MAX_WORKERS = 24  # gensim gains nothing from more threads: its issue 3376
# A thread of gensim takes 10,000 tokens at a time and stops after its share. With a smaller share than this, threads
# would read much of the corpus several times per epoch.
TOKENS_PER_WORKER = 50_000


def cut_sessions(histories: Histories, gap_minutes: float = 30.0) -> Sentences:
    """Cut the plays of each user into sessions, at pauses longer than `gap_minutes`."""
    is_start = np.zeros(histories.num_plays + 1, dtype=bool)
    is_start[1:-1] = np.diff(histories.played_at) > gap_minutes * MINUTE_MS
    is_start[histories.offsets] = True
    return histories.songs, np.flatnonzero(is_start)


def cut_long(sentences: Sentences, limit: int = MAX_SENTENCE) -> Sentences:
    """Cut sentences of more than `limit` songs into pieces of at most `limit` songs."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    if not len(lengths) or lengths.max() <= limit:
        return sentences
    part_counts = np.maximum(1, -(-lengths // limit))
    sentence_indices = group_of_each_item(part_counts)
    part_numbers = ranges(0, part_counts)
    return songs, np.append(offsets[sentence_indices] + part_numbers * limit, offsets[-1])


def drop_short_sentences(sentences: Sentences) -> Sentences:
    """Remove sentences of fewer than two songs: a song without neighbors would keep its random initial vector."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    has_neighbors = lengths > 1
    return songs[np.repeat(has_neighbors, lengths)], offsets_of(lengths[has_neighbors])


def from_histories(batches: Iterable[Histories], allowed: FitRange, gap_minutes: float = 30.0) -> Iterator[Sentences]:
    """Yield the sessions of histories as sentences, one batch at a time.

    Raises `LeakError` for plays that are not `allowed`.
    """
    for histories in batches:
        allowed.require(histories)
        yield drop_short_sentences(cut_long(cut_sessions(histories, gap_minutes)))


def from_playlists(batches: Iterable[Sentences], allowed: FitRange) -> Iterator[Sentences]:
    """Yield playlists as sentences, one batch at a time.

    Playlists have no times, so only the songs that a split holds out are removed.
    """
    for batch in batches:
        yield drop_short_sentences(cut_long(without_held_out(batch, allowed)))


def without_held_out(sentences: Sentences, allowed: FitRange) -> Sentences:
    """Remove the songs that a split holds out from sentences."""
    songs, offsets = sentences
    is_allowed = allowed.allowed_songs(songs)
    return songs[is_allowed], offsets_of(is_allowed)[offsets]


@dataclass(frozen=True)
class Corpus:
    """Sentences in a local text file, one per line, with song rows as decimal numbers.

    gensim reads such a file without the interpreter lock.
    """

    path: Path
    counts: np.ndarray  # int64 (N,), how often each song occurs
    sentences: int

    @property
    def tokens(self) -> int:
        """Number of songs in all sentences together."""
        return int(self.counts.sum())


def write_corpus(sentences: Iterable[Sentences], path: Path, num_songs: int) -> Corpus:
    """Write sentences to a file and count their songs; memory holds one batch at a time."""
    counts = np.zeros(num_songs, dtype=np.int64)
    num_sentences = 0
    with path.open("wb") as stream:
        for songs, offsets in sentences:
            if len(songs):
                counts += np.bincount(songs, minlength=num_songs)
                num_sentences += len(offsets) - 1
                stream.write(_text(songs, offsets))
    return Corpus(path, counts, num_sentences)


def _text(songs: np.ndarray, offsets: np.ndarray) -> pa.Buffer:
    words = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(songs).cast(pa.string()))
    lines = pc.binary_join(words, " ")
    ends = pa.array([0, len(lines)], pa.int32())
    text = pc.binary_join(pa.ListArray.from_arrays(ends, lines), "\n")
    return pc.binary_join_element_wise(text, "", "\n")[0].as_buffer()


class Word2Vec:
    """One training run with at most `workers` threads.

    With one thread, the same corpus, config and seed give the same vectors. Raises `InputError` if no song occurs
    `min_count` times in the corpus.
    """

    def __init__(self, corpus: Corpus, config: EmbedConfig, workers: int = 1) -> None:
        from gensim.models import Word2Vec as Gensim

        frequencies = _frequencies(corpus, config.min_count)
        self.corpus, self.config = corpus, config
        self.workers = max(1, min(workers, MAX_WORKERS, corpus.tokens // TOKENS_PER_WORKER))
        self._model = Gensim(
            vector_size=config.dim,
            sg=int(config.skip_gram),
            window=config.window,
            negative=config.negatives,
            ns_exponent=config.ns_exponent,
            sample=config.subsample,
            min_count=config.min_count,
            seed=config.seed,
            workers=self.workers,
        )
        # Pass our own counts, since gensim would read the file once more, in Python.
        self._model.build_vocab_from_freq(frequencies, corpus_count=corpus.sentences)

    def train(self) -> Iterator[int]:
        """Train, and yield 1, 2, ... after each epoch, so that the caller can show progress."""
        rates = np.linspace(self.config.learning_rate, FINAL_LEARNING_RATE, self.config.epochs + 1).tolist()
        for epoch in range(self.config.epochs):
            self._model.train(
                corpus_file=str(self.corpus.path),
                total_words=self.corpus.tokens,
                epochs=1,
                start_alpha=rates[epoch],
                end_alpha=rates[epoch + 1],
            )
            yield epoch + 1

    def vectors(self) -> SongVectors:
        """Return the current vectors; zeros for songs that occur fewer than `min_count` times in the corpus."""
        words = self._model.wv
        raw = np.zeros((len(self.corpus.counts), self.config.dim), dtype=np.float32)
        raw[np.array(words.index_to_key, dtype=np.int64)] = words.vectors
        vectors = SongVectors.normalized(raw)
        return vectors.centered() if self.config.center and vectors.known.any() else vectors


def _frequencies(corpus: Corpus, min_count: int) -> dict[str, int]:
    """Return gensim's vocabulary: word -> count. Raises `InputError` if no song occurs `min_count` times."""
    rows = np.flatnonzero(corpus.counts)
    if not (corpus.counts >= min_count).any():
        raise InputError(
            f"nothing to train song embeddings on: no song occurs {min_count} times in the {corpus.sentences} "
            "playlists or sessions of two or more songs; raise --session-gap-minutes (default 30), for example to "
            "1440, lower --min-count, or import more plays"
        )
    return dict(zip(map(str, rows.tolist()), corpus.counts[rows].tolist(), strict=True))


@dataclass(frozen=True)
class ExternalVectors:
    """Song vectors read from a file."""

    vectors: SongVectors  # (N, D), in the order of the catalog
    rows: int  # rows of the file
    unknown_ids: int  # rows whose song is not in the catalog; left out
    zero_vectors: int  # rows of zeros; their songs stay without a vector


def read_external_vectors(path: str | Path, catalog: Catalog) -> ExternalVectors:
    """Read vectors for the songs of the catalog from a local file; see `read_vector_file` for the formats.

    A .npy file without ids must have one row per song, in the order of the catalog.

    Raises `InputError` for a file of another format, for numbers that are not finite, and if no song of the catalog
    gets a vector.
    """
    raw, song_ids = read_vector_file(path)
    if song_ids is None:
        if len(raw) != len(catalog):
            raise InputError(
                f"vectors file {path} has {len(raw)} rows, but the catalog has {len(catalog)} songs; give one row per "
                f"song in the order of the catalog, or the IDs in {Path(path).stem}.ids.txt next to it"
            )
        catalog_rows = np.arange(len(catalog))
    else:
        rows = pc.index_in(song_ids, value_set=catalog.table.column(columns.SONG_ID))
        catalog_rows = np.asarray(pc.fill_null(rows, -1).to_numpy(zero_copy_only=False), dtype=np.int64)
    is_known = catalog_rows >= 0
    catalog_vectors = np.zeros((len(catalog), raw.shape[1]), dtype=raw.dtype)
    catalog_vectors[catalog_rows[is_known]] = raw[is_known]
    try:
        vectors = SongVectors.normalized(catalog_vectors)
    except InputError as error:
        raise InputError(f"vectors file {path}: {error}") from error
    if not vectors.known.any():
        raise InputError(
            f"vectors file {path} has no vector for any of the {len(catalog)} songs in the catalog "
            f"({int((~is_known).sum())} of its {len(raw)} IDs are unknown); check its song IDs"
        )
    return ExternalVectors(vectors, len(raw), int((~is_known).sum()), int((~raw.any(axis=1)).sum()))


def choose_source(dataset: Dataset, config: EmbedConfig) -> str:
    """Return the source of the sentences: "playlists" or "histories".

    Raises `InputError` if the config asks for playlists and the data set has none.
    """
    if config.source == "playlists" and not dataset.manifest.playlists:
        raise InputError(
            "--source is playlists, but the data set has none; import playlists, or use --source histories"
        )
    if config.source == "auto":
        return "playlists" if dataset.manifest.playlists else "histories"
    return config.source


def fit_vectors(
    workspace: Workspace, config: EmbedConfig, allowed: FitRange, workers: int, path: str
) -> Iterator[dict[str, Any] | None]:
    """Fit vectors by word2vec on the plays or playlists that are `allowed`, and write them to `path` in the workspace.

    Yields None after each epoch, then the figures: counts (int64 (N,), occurrences of each song), source, tokens,
    sentences and workers (threads).
    """
    dataset = Dataset(workspace)
    source = choose_source(dataset, config)
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        corpus = write_corpus(
            _read_sentences(dataset, source, config, allowed), Path(folder) / "corpus", dataset.num_songs
        )
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


def _read_sentences(dataset: Dataset, source: str, config: EmbedConfig, allowed: FitRange) -> Iterator[Sentences]:
    if source == "playlists":
        return from_playlists(dataset.read_playlists(), allowed)
    histories = (allowed.select(batch) for batch in dataset.read_all())
    return from_histories(histories, allowed, config.session_gap_minutes)


def import_vectors(workspace: Workspace, config: EmbedConfig, allowed: FitRange, paths: list[str]) -> dict[str, Any]:
    """Read the vectors of the file `config.vectors` and write them to each of `paths`.

    Returns the figures: counts (int64 (N,), `allowed` plays of each song), source, rows (of the file), unknown_ids and
    zero_vectors.
    """
    dataset = Dataset(workspace)
    outside = read_external_vectors(str(config.vectors), dataset.catalog())
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
