"""Where the network's training sequences come from: histories, playlists, or sessions that serve as playlists."""

import json
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.split import FitRange
from rayrec.data.windows import Windows, cut_windows, worker_batches
from rayrec.embeddings.word2vec import Sentences, cut_sessions, drop_single, without_held_out
from rayrec.model.train_config import Source, TrainConfig
from rayrec.model.workers import Share

Kind = Literal["histories", "playlists", "sessions"]
POOL_PLAYS = 200_000  # plays whose windows are put in batches by length together
USERS_PER_READ = 1_000  # few, so that a pool holds little more than its plays, whatever the size of a bucket
FIRST = "first"  # column: whether a window is the first of its batch


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


class UnitReader:
    """Reads sequences by lists of units and cuts them into one worker's share of the batches."""

    def __init__(self, dataset: Dataset, allowed: FitRange, config: TrainConfig, share: Share, epoch: int) -> None:
        self._sequences = Sequences(dataset, config.source)
        self._allowed, self._config, self._share, self._epoch = allowed, config, share, epoch

    def tables(self, rows: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        """The batches of JSON lists of units of `Sequences`, as rows that `split_batches` takes apart."""
        for unit in rows["unit"]:
            for pool in self._pools(json.loads(unit)):
                yield from self._batches(pool, json.loads(unit))
                pa.default_memory_pool().release_unused()  # a reader lives as long as the training

    def _pools(self, buckets: list[int]) -> Iterator[Histories]:
        held: list[Histories] = []
        for bucket in buckets:
            for histories in self._sequences.read(bucket, self._allowed, USERS_PER_READ):
                held.append(histories)
                if sum(part.num_plays for part in held) >= POOL_PLAYS:
                    yield concatenate(held)
                    held = []
        yield concatenate(held)

    def _batches(self, pool: Histories, buckets: list[int]) -> Iterator[pa.Table]:
        config = self._config
        windows = cut_windows(pool, config.window, config.lookahead)
        rng = np.random.default_rng([config.seed, self._epoch, buckets[0], pool.num_plays])
        batches = list(
            worker_batches(windows, batch=config.batch, rank=self._share.rank, workers=self._share.workers, rng=rng)
        )
        if batches:
            table = pa.concat_tables([batch.to_arrow() for batch in batches])
            first: np.ndarray = np.zeros(len(table), dtype=bool)
            first[np.cumsum([0] + [len(batch) for batch in batches[:-1]])] = True
            yield table.append_column(FIRST, pa.array(first))


def split_batches(tables: Iterable[pa.Table]) -> Iterator[Windows]:
    """The batches of the tables that `UnitReader` made, in order, wherever an engine joined or cut the tables."""
    rest: pa.Table | None = None
    for arrived in tables:
        table = arrived if rest is None else pa.concat_tables([rest, arrived])
        cuts = np.flatnonzero(table.column(FIRST).to_numpy()).tolist()
        for begin, end in pairwise(cuts):
            yield Windows.from_arrow(table.slice(begin, end - begin))
        rest = table.slice(cuts[-1]) if cuts else table
    if rest is not None and len(rest):
        yield Windows.from_arrow(rest)


def plain_stream(reader: UnitReader, units: list[list[int]]) -> Iterator[Windows]:
    """The same batches in this process, for training without a cluster."""
    rows: dict[str, Any] = {"unit": np.array([json.dumps(unit) for unit in units], dtype=object)}
    yield from split_batches(reader.tables(rows))
