"""word2vec on plays: each song a word, each playlist or session a sentence.

After De Boom et al. 2018 (arXiv:1708.06520), who train word2vec (Mikolov et al. 2013,
arXiv:1301.3781) on playlists; item2vec (Barkan and Koenigstein 2016) is the same idea. Sessions as
sentences are ours.

gensim trains in the threads of one process, so this stage runs on one node, the largest, and does not
grow with the cluster. Threads add up to about 24 (gensim issue 3376: they then wait for the same cache
lines and for the thread that reads), and more than one makes the result depend on their timing (issue
641). `rayrec bench scale` measures the threads of a machine. Where one node takes too long: fewer epochs,
`--subsample`, `--no-skip-gram` or `--min-count` first; then vectors trained elsewhere, `rayrec embed
--vectors`; and the network's song table trains on the whole cluster whatever it starts from.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.embeddings.embed_config import EmbedConfig
from rayrec.embeddings.vectors import SongVectors
from rayrec.errors import InputError

MINUTE_MS = 60_000
MAX_SENTENCE = 10_000  # words; gensim looks no further into a sentence

UNCUT = (
    "made of playlists, which carry no times: no split can cut them, so they may hold what was played together in "
    "the test range, and figures there may flatter"
)

Sentences = tuple[np.ndarray, np.ndarray]  # songs int32 (P,), offsets int64 (S + 1,)
FINAL_LEARNING_RATE = 1e-4
MAX_WORKERS = 24  # gensim gains nothing from more threads: its issue 3376
# A thread of gensim takes 10,000 tokens at a time and stops after its share, so that threads with
# smaller shares than this would go over much of the corpus several times an epoch.
TOKENS_PER_WORKER = 50_000


def cut_sessions(histories: Histories, gap_minutes: float = 30.0) -> Sentences:
    """The plays of each user cut where the pause to the next play is longer than `gap_minutes`."""
    starts = np.zeros(histories.num_plays + 1, dtype=bool)
    starts[1:-1] = np.diff(histories.played_at) > gap_minutes * MINUTE_MS
    starts[histories.offsets] = True
    return histories.songs, np.flatnonzero(starts)


def cut_long(sentences: Sentences, limit: int = MAX_SENTENCE) -> Sentences:
    """The same songs with sentences of more than `limit` songs cut into pieces of at most that."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    if not len(lengths) or lengths.max() <= limit:
        return sentences
    pieces = np.maximum(1, -(-lengths // limit))
    sentence = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(sentence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return songs, np.append(offsets[sentence] + number * limit, offsets[-1])


def drop_single(sentences: Sentences) -> Sentences:
    """Without sentences of fewer than two songs: a song without neighbours would keep its random first vector."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    kept = lengths > 1
    return songs[np.repeat(kept, lengths)], np.append(0, np.cumsum(lengths[kept]))


def from_histories(batches: Iterable[Histories], allowed: FitRange, gap_minutes: float = 30.0) -> Iterator[Sentences]:
    """Sessions as sentences, batch by batch. Raises `LeakError` for plays that are not `allowed`."""
    for histories in batches:
        allowed.require(histories)
        yield drop_single(cut_long(cut_sessions(histories, gap_minutes)))


def from_playlists(batches: Iterable[Sentences], allowed: FitRange) -> Iterator[Sentences]:
    """Playlists as sentences, batch by batch. They carry no times, so a split cuts no more than songs held out."""
    for batch in batches:
        yield drop_single(cut_long(without_held_out(batch, allowed)))


def without_held_out(sentences: Sentences, allowed: FitRange) -> Sentences:
    """Without the songs that a split holds out."""
    songs, offsets = sentences
    kept = allowed.allowed_songs(songs)
    return songs[kept], np.append(0, np.cumsum(kept))[offsets]


@dataclass(frozen=True)
class Corpus:
    """Sentences in a local text file, one a line, song rows as decimal numbers: read without the interpreter lock."""

    path: Path
    counts: np.ndarray  # int64 (N,), how often each song occurs
    sentences: int

    @property
    def tokens(self) -> int:
        """Songs in all sentences together."""
        return int(self.counts.sum())


def write_corpus(sentences: Iterable[Sentences], path: Path, num_songs: int) -> Corpus:
    """Write sentences to a file batch by batch, counting as they pass; memory holds one batch."""
    counts = np.zeros(num_songs, dtype=np.int64)
    written = 0
    with path.open("wb") as stream:
        for songs, offsets in sentences:
            if len(songs):
                counts += np.bincount(songs, minlength=num_songs)
                written += len(offsets) - 1
                stream.write(_text(songs, offsets))
    return Corpus(path, counts, written)


def _text(songs: np.ndarray, offsets: np.ndarray) -> pa.Buffer:
    words = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(songs).cast(pa.string()))
    lines = pc.binary_join(words, " ")
    ends = pa.array([0, len(lines)], pa.int32())
    text = pc.binary_join(pa.ListArray.from_arrays(ends, lines), "\n")
    return pc.binary_join_element_wise(text, "", "\n")[0].as_buffer()


class Word2Vec:
    """One training run. `workers` threads; with one, the same corpus, config and seed give the same vectors.

    Raises `InputError` for a corpus from which nothing can be learned.
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
        # From our own counts: gensim would read the file once more, in Python.
        self._model.build_vocab_from_freq(frequencies, corpus_count=corpus.sentences)

    def train(self) -> Iterator[int]:
        """Yields 1, 2, ... as each epoch is done, so that the caller can show how far it is."""
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
        """The vectors as they are now; zeros for songs that are not in the corpus often enough."""
        words = self._model.wv
        raw = np.zeros((len(self.corpus.counts), self.config.dim), dtype=np.float32)
        raw[np.array(words.index_to_key, dtype=np.int64)] = words.vectors
        vectors = SongVectors.normalized(raw)
        return vectors.centered() if self.config.center and vectors.known.any() else vectors


def _frequencies(corpus: Corpus, min_count: int) -> dict[str, int]:
    """gensim's vocabulary: word -> count."""
    rows = np.flatnonzero(corpus.counts)
    if not (corpus.counts >= min_count).any():
        raise InputError(
            f"nothing to train song embeddings on: {corpus.sentences} playlists or sessions of two or more songs, "
            f"no song {min_count} times in them; if plays lie further apart than --session-gap-minutes (30 unless "
            "given), raise it, for example to 1440; else lower --min-count or import more plays"
        )
    return dict(zip(map(str, rows.tolist()), corpus.counts[rows].tolist(), strict=True))
