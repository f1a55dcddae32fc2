"""Sentences for word2vec: playlists as they are, histories cut into sessions.

A batch of S sentences travels flat: songs int32 (P,) and offsets int64 (S + 1,), as everywhere.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange

MINUTE_MS = 60_000
MAX_SENTENCE = 10_000  # words; gensim looks no further into a sentence

UNCUT = (
    "made of playlists, which carry no times: no split can cut them, so they may hold what was played together in "
    "the test range, and figures there may flatter"
)

Sentences = tuple[np.ndarray, np.ndarray]  # songs int32 (P,), offsets int64 (S + 1,)


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
