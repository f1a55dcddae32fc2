"""Where the network's training sequences come from: histories, playlists, or sessions that serve as playlists."""

from collections.abc import Iterator
from typing import Literal

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.embeddings.sessions import Sentences, cut_sessions, drop_single, without_held_out
from rayrec.model.train_config import Source

Kind = Literal["histories", "playlists", "sessions"]


class Sequences:
    """Reads training sequences in units that are there to be read in any order: buckets, or files of playlists."""

    def __init__(self, dataset: Dataset, source: Source) -> None:
        """Playlists are the data set's own, or where it has none the sessions of its histories."""
        self._dataset = dataset
        self.kind: Kind = "histories"
        if source == "playlists":
            self.kind = "playlists" if dataset.manifest.playlists else "sessions"
        self._files = dataset.playlist_files() if self.kind == "playlists" else []

    @property
    def units(self) -> int:
        """How many units there are."""
        return len(self._files) if self.kind == "playlists" else self._dataset.manifest.buckets

    @property
    def plays(self) -> int:
        """Plays, or entries of playlists, in all of them."""
        manifest = self._dataset.manifest
        return manifest.playlist_entries if self.kind == "playlists" else manifest.plays

    def read(self, unit: int, allowed: FitRange, rows: int) -> Iterator[Histories]:
        """The sequences of a unit, a row each, from `rows` users or playlists at a time.

        None of them holds a play that `allowed` forbids; of playlists nobody can say, but for songs that are held out.
        Raises `LeakError`.
        """
        if self.kind == "playlists":
            for playlists in self._dataset.read_playlist_file(self._files[unit], rows):
                yield as_histories(without_held_out(playlists, allowed))
            return
        for batch in self._dataset.read_bucket(unit, rows):
            histories = allowed.select(batch)
            allowed.require(histories)  # the last place where the users are known
            yield as_histories(drop_single(cut_sessions(histories))) if self.kind == "sessions" else histories


def as_histories(sentences: Sentences) -> Histories:
    """Sequences of songs alone, a row each; places stand in for times."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    return Histories(
        user_ids=np.full(len(lengths), "", dtype=object),
        offsets=np.asarray(offsets, dtype=np.int64),
        songs=songs,
        played_at=np.arange(len(songs)) - np.repeat(offsets[:-1], lengths),
    )
