"""Where the network's training sequences come from: histories, playlists, or sessions that serve as playlists; and
how they become a worker's share of the batches of an epoch."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
import pyarrow as pa

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.ragged import ranges
from rayrec.data.split import FitRange
from rayrec.data.windows import EpochBatches, WindowLengths, Windows, count_inputs, cut_windows
from rayrec.embeddings.word2vec import Sentences, cut_sessions, drop_single
from rayrec.errors import MismatchError
from rayrec.model.song_tables import Share
from rayrec.model.train_config import Source, TrainConfig

Kind = Literal["histories", "playlists", "sessions"]
USERS_PER_READ = 100  # few, since one worker may read from all lanes at once
PLAYS_PER_CUT = 20_000  # whose windows, which hold plays several times, are held at once for a lane
STEP = "step"  # column: the number of a window's batch within the epoch


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
        for raw in self._raw(unit, rows):
            yield self._sequences(self._select(raw, allowed))

    def count(
        self, unit: int, ranges: Sequence[FitRange], window: int, rows: int = 5_000
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """What the plays of a unit come to in each of several fit ranges.

        That is the songs played, int64, their plays, int64, and the inputs of all windows in the order of `read`.
        Small where the catalog is large.
        """
        plays = [np.zeros(self._dataset.num_songs, dtype=np.int64) for _ in ranges]
        inputs = [[np.zeros(0, dtype=np.int64)] for _ in ranges]
        for raw in self._raw(unit, rows):
            for number, allowed in enumerate(ranges):
                selected = self._select(raw, allowed)
                plays[number] += np.bincount(selected.songs, minlength=len(plays[number]))
                inputs[number].append(count_inputs(self._sequences(selected).lengths, window))
        return [
            (np.flatnonzero(count), count[count > 0], np.concatenate(parts).astype(np.min_scalar_type(window)))
            for count, parts in zip(plays, inputs, strict=True)
        ]

    def _raw(self, unit: int, rows: int) -> Iterator[Histories]:
        if self.kind == "playlists":
            return map(as_histories, self._dataset.read_playlist_file(self._files[unit], rows))
        return self._dataset.read_bucket(unit, rows)

    def _select(self, raw: Histories, allowed: FitRange) -> Histories:
        if self.kind == "playlists":
            return raw.keep(allowed.allowed_songs(raw.songs))
        histories = allowed.select(raw)
        allowed.require(histories)  # the last place where the users are known
        return histories

    def _sequences(self, selected: Histories) -> Histories:
        return as_histories(drop_single(cut_sessions(selected))) if self.kind == "sessions" else selected


def as_histories(sentences: Sentences) -> Histories:
    """Sequences of songs alone, a row each; places stand in for times."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    return Histories(
        user_ids=np.full(len(lengths), "", dtype=object),
        offsets=np.asarray(offsets, dtype=np.int64),
        songs=songs,
        played_at=ranges(0, lengths),
    )


class WindowCounter:
    """A bucket worker that counts plays by song, and windows, once for each of several fit ranges."""

    def __init__(self, dataset: Dataset, config: TrainConfig, ranges: list[FitRange]) -> None:
        self._sequences, self._window, self._ranges = Sequences(dataset, config.source), config.window, ranges

    def __call__(self, unit: int) -> tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """The unit, and what `Sequences.count` says of it."""
        return unit, self._sequences.count(unit, self._ranges, self._window)


def window_lengths(dataset: Dataset, allowed: FitRange, config: TrainConfig) -> WindowLengths:
    """Those of the whole data, counted in this process."""
    sequences = Sequences(dataset, config.source)
    counted = [sequences.count(unit, [allowed], config.window)[0] for unit in range(sequences.units)]
    return WindowLengths.of_units([inputs for _, _, inputs in counted])


class ShardReader:
    """Reads one worker's lanes, in an order of each epoch, and puts their windows into its share of the batches."""

    def __init__(
        self, dataset: Dataset, allowed: FitRange, config: TrainConfig, windows: WindowLengths, share: Share
    ) -> None:
        """`windows` are those of the data set in the range that is `allowed`."""
        self._sequences, self._lengths = Sequences(dataset, config.source), windows
        self._allowed, self._config, self._share = allowed, config, share

    def batches(self, epoch: int) -> EpochBatches:
        """The batches of an epoch, of all workers."""
        config = self._config
        return EpochBatches(self._lengths, shards=config.shards, batch=config.batch, seed=config.seed, epoch=epoch)

    def tables(self, batches: EpochBatches) -> Iterator[pa.Table]:
        """The worker's windows of one pool after the other, by batch, as rows that `split_batches` takes apart."""
        share = self._share
        lanes = batches.lanes_of(share.rank, share.workers)
        readers = {lane: _LaneReader(self._windows(batches.lanes[lane])) for lane in lanes}
        for number in range(batches.pools):
            pool, parts, rows_of_lanes = batches.pool(number), list[Windows](), list[np.ndarray]()
            for lane, reader in readers.items():
                rows = np.flatnonzero(pool.lanes == lane)
                windows = reader.take(pool.inputs[rows])
                own = pool.shards[rows] % share.workers == share.rank
                parts.append(windows.take(np.flatnonzero(own)))
                rows_of_lanes.append(rows[own])
            rows = np.concatenate(rows_of_lanes)
            order = np.lexsort((pool.places[rows], pool.steps[rows]))
            windows = replace(Windows.joined(parts).take(order), places=pool.places[rows[order]])
            if len(windows):
                yield windows.to_arrow().append_column(STEP, pa.array(pool.steps[rows[order]]))
            pa.default_memory_pool().release_unused()  # a reader lives as long as the training

    def _windows(self, units: list[int]) -> Iterator[Windows]:
        for unit in units:
            for histories in self._sequences.read(unit, self._allowed, USERS_PER_READ):
                for users in np.split(np.arange(len(histories)), _cuts(histories)):
                    yield cut_windows(histories.take(users), self._config.window, self._config.lookahead)


def _cuts(histories: Histories) -> np.ndarray:
    """Rows before which to cut, so that parts hold about `PLAYS_PER_CUT` plays."""
    return np.flatnonzero(np.diff(histories.offsets[:-1] // PLAYS_PER_CUT)) + 1


class _LaneReader:
    """Hands out the windows of a lane, as many at a time as are asked for."""

    def __init__(self, windows: Iterator[Windows]) -> None:
        self._windows, self._rest = windows, Windows.joined([])

    def take(self, inputs: np.ndarray) -> Windows:
        """The next windows, which are to have so many inputs, int (W,). Raises `MismatchError` where they have not."""
        held = [self._rest]
        while sum(map(len, held)) < len(inputs) and (windows := next(self._windows, None)) is not None:
            held.append(windows)
        joined = Windows.joined(held)
        self._rest = joined.take(np.arange(len(inputs), len(joined)))
        first_windows = joined.take(np.arange(min(len(inputs), len(joined))))
        if not np.array_equal(first_windows.inputs, inputs):
            raise MismatchError("the plays changed during the training; run `rayrec train --restart`")
        return first_windows


def split_batches(tables: Iterable[pa.Table], steps: int) -> Iterator[Windows]:
    """A worker's share of each of so many batches, from the tables of `ShardReader`, wherever an engine joined or
    cut them. The share of a batch of which the worker holds nothing has no windows."""
    following, rest = 0, None
    for arrived in tables:
        table = arrived if rest is None else pa.concat_tables([rest, arrived])
        numbers = table.column(STEP).to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist()]
        for begin, end in pairwise(cuts):
            yield from _nothing(int(numbers[begin]) - following)
            yield Windows.from_arrow(table.slice(begin, end - begin))
            following = int(numbers[begin]) + 1
        rest = table.slice(cuts[-1])
    if rest is not None and len(rest):
        number = int(rest.column(STEP)[0].as_py())
        yield from _nothing(number - following)
        yield Windows.from_arrow(rest)
        following = number + 1
    yield from _nothing(steps - following)


def _nothing(batches: int) -> Iterator[Windows]:
    return (Windows.joined([]) for _ in range(batches))


def plain_stream(reader: ShardReader, epoch: int) -> Iterator[Windows]:
    """A worker's share of the batches of an epoch, read in this process: for training without a cluster."""
    batches = reader.batches(epoch)
    return split_batches(reader.tables(batches), batches.steps)
