"""The network's training sequences, and how they become each worker's share of the batches of an epoch.

Sequences are histories, playlists, or, for data without playlists, sessions that are used as playlists.
"""

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
from rayrec.embeddings.word2vec import Sentences, cut_sessions, drop_short_sentences
from rayrec.errors import MismatchError
from rayrec.model.song_tables import Share
from rayrec.model.train_config import Source, TrainConfig

Kind = Literal["histories", "playlists", "sessions"]
USERS_PER_READ = 100  # few, since one worker may read from all lanes at once
PLAYS_PER_CUT = 20_000  # plays per lane whose windows are in memory at once; windows hold plays several times
STEP = "step"  # column: the number of a window's batch within the epoch


class Sequences:
    """Reads training sequences in units that can be read in any order: buckets, or files of playlists."""

    def __init__(self, dataset: Dataset, source: Source) -> None:
        """Playlists are those of the data set, or the sessions of its histories if it has no playlists."""
        self._dataset = dataset
        self.kind: Kind = "histories"
        if source == "playlists":
            self.kind = "playlists" if dataset.manifest.playlists else "sessions"
        self._files = dataset.playlist_files() if self.kind == "playlists" else []

    @property
    def units(self) -> int:
        """The number of units."""
        return len(self._files) if self.kind == "playlists" else self._dataset.manifest.buckets

    @property
    def plays(self) -> int:
        """The number of plays, or of playlist entries, in all units."""
        manifest = self._dataset.manifest
        return manifest.playlist_entries if self.kind == "playlists" else manifest.plays

    def read(self, unit: int, allowed: FitRange, rows: int) -> Iterator[Histories]:
        """Yield the sequences of a unit, one per row, from `rows` users or playlists at a time.

        Plays outside of `allowed` are left out. Playlists have no times and users, so that only their held-out songs
        are left out. Raises `LeakError` if a play outside of `allowed` remains in a history.
        """
        for raw in self._read_raw(unit, rows):
            yield self._sequences(self._select(raw, allowed))

    def count(
        self, unit: int, fit_ranges: Sequence[FitRange], window: int, rows: int = 5_000
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Count the plays and the windows of a unit in each of several fit ranges.

        A count holds the songs with plays, int64, their numbers of plays, int64, and the numbers of inputs of all
        windows, in the order of `read`. It leaves out songs without plays, so it stays small for a large catalog.
        """
        play_counts = [np.zeros(self._dataset.num_songs, dtype=np.int64) for _ in fit_ranges]
        input_counts = [[np.zeros(0, dtype=np.int64)] for _ in fit_ranges]
        for raw in self._read_raw(unit, rows):
            for index, allowed in enumerate(fit_ranges):
                selected = self._select(raw, allowed)
                play_counts[index] += np.bincount(selected.songs, minlength=len(play_counts[index]))
                input_counts[index].append(count_inputs(self._sequences(selected).lengths, window))
        return [
            (np.flatnonzero(counts), counts[counts > 0], np.concatenate(parts).astype(np.min_scalar_type(window)))
            for counts, parts in zip(play_counts, input_counts, strict=True)
        ]

    def _read_raw(self, unit: int, rows: int) -> Iterator[Histories]:
        if self.kind == "playlists":
            return map(as_histories, self._dataset.read_playlist_file(self._files[unit], rows))
        return self._dataset.read_bucket(unit, rows)

    def _select(self, raw: Histories, allowed: FitRange) -> Histories:
        if self.kind == "playlists":
            return raw.keep(allowed.allowed_songs(raw.songs))
        histories = allowed.select(raw)
        allowed.require(histories)  # users are not known after this step
        return histories

    def _sequences(self, selected: Histories) -> Histories:
        return as_histories(drop_short_sentences(cut_sessions(selected))) if self.kind == "sessions" else selected


def as_histories(sentences: Sentences) -> Histories:
    """Return sequences of songs as histories, one per row, with positions instead of times."""
    songs, offsets = sentences
    lengths = np.diff(offsets)
    return Histories(
        user_ids=np.full(len(lengths), "", dtype=object),
        offsets=np.asarray(offsets, dtype=np.int64),
        songs=songs,
        played_at=ranges(0, lengths),
    )


class WindowCounter:
    """A bucket worker that counts the plays of each song, and the windows, in each of several fit ranges."""

    def __init__(self, dataset: Dataset, config: TrainConfig, ranges: list[FitRange]) -> None:
        self._sequences, self._window, self._fit_ranges = Sequences(dataset, config.source), config.window, ranges

    def __call__(self, unit: int) -> tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Return the unit and the result of `Sequences.count` for it."""
        return unit, self._sequences.count(unit, self._fit_ranges, self._window)


def window_lengths(dataset: Dataset, allowed: FitRange, config: TrainConfig) -> WindowLengths:
    """Return the lengths of all windows of the data set, counted in this process."""
    sequences = Sequences(dataset, config.source)
    unit_counts = [sequences.count(unit, [allowed], config.window)[0] for unit in range(sequences.units)]
    return WindowLengths.of_units([inputs for _, _, inputs in unit_counts])


class ShardReader:
    """Reads one worker's lanes, in a new order each epoch, and puts their windows into its share of the batches."""

    def __init__(
        self, dataset: Dataset, allowed: FitRange, config: TrainConfig, windows: WindowLengths, share: Share
    ) -> None:
        """`windows` are the lengths of the data set's windows in the fit range `allowed`."""
        self._sequences, self._lengths = Sequences(dataset, config.source), windows
        self._allowed, self._config, self._share = allowed, config, share

    def batches(self, epoch: int) -> EpochBatches:
        """Return the batches of an epoch, over all workers."""
        config = self._config
        return EpochBatches(self._lengths, shards=config.shards, batch=config.batch, seed=config.seed, epoch=epoch)

    def tables(self, batches: EpochBatches) -> Iterator[pa.Table]:
        """Yield the worker's windows, one table per pool, sorted by batch; `split_batches` cuts them into batches."""
        share = self._share
        lanes = batches.lanes_of(share.rank, share.workers)
        readers = {lane: _LaneReader(self._windows(batches.lanes[lane])) for lane in lanes}
        for index in range(batches.pools):
            pool, parts, lane_rows = batches.pool(index), list[Windows](), list[np.ndarray]()
            for lane, reader in readers.items():
                rows = np.flatnonzero(pool.lanes == lane)
                windows = reader.take(pool.inputs[rows])
                is_in_share = pool.shards[rows] % share.workers == share.rank
                parts.append(windows.take(np.flatnonzero(is_in_share)))
                lane_rows.append(rows[is_in_share])
            rows = np.concatenate(lane_rows)
            order = np.lexsort((pool.places[rows], pool.steps[rows]))
            windows = replace(Windows.concatenate(parts).take(order), places=pool.places[rows[order]])
            if len(windows):
                yield windows.to_arrow().append_column(STEP, pa.array(pool.steps[rows[order]]))
            pa.default_memory_pool().release_unused()  # the reader would keep it for the whole training

    def _windows(self, units: list[int]) -> Iterator[Windows]:
        for unit in units:
            for histories in self._sequences.read(unit, self._allowed, USERS_PER_READ):
                for users in np.split(np.arange(len(histories)), _cuts(histories)):
                    yield cut_windows(histories.take(users), self._config.window, self._config.lookahead)


def _cuts(histories: Histories) -> np.ndarray:
    """Return the rows before which to cut, so that each part holds about `PLAYS_PER_CUT` plays."""
    return np.flatnonzero(np.diff(histories.offsets[:-1] // PLAYS_PER_CUT)) + 1


class _LaneReader:
    """Returns the windows of a lane in order, in portions of any size."""

    def __init__(self, windows: Iterator[Windows]) -> None:
        self._windows, self._remainder = windows, Windows.concatenate([])

    def take(self, inputs: np.ndarray) -> Windows:
        """Return the next W windows. Raises `MismatchError` if their numbers of inputs are not `inputs`, int (W,)."""
        parts = [self._remainder]
        while sum(map(len, parts)) < len(inputs) and (windows := next(self._windows, None)) is not None:
            parts.append(windows)
        merged = Windows.concatenate(parts)
        self._remainder = merged.take(np.arange(len(inputs), len(merged)))
        first_windows = merged.take(np.arange(min(len(inputs), len(merged))))
        if not np.array_equal(first_windows.inputs, inputs):
            raise MismatchError("the plays changed during the training; run `rayrec train --restart`")
        return first_windows


def split_batches(tables: Iterable[pa.Table], steps: int) -> Iterator[Windows]:
    """Yield a worker's share of each of `steps` batches from the tables of `ShardReader`.

    An engine may have joined or cut these tables. The share of a batch of which the worker holds nothing is empty.
    """
    next_number, remainder = 0, None
    for new_table in tables:
        table = new_table if remainder is None else pa.concat_tables([remainder, new_table])
        batch_numbers = table.column(STEP).to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(batch_numbers)) + 1).tolist()]
        for start, end in pairwise(cuts):
            yield from _empty_batches(int(batch_numbers[start]) - next_number)
            yield Windows.from_arrow(table.slice(start, end - start))
            next_number = int(batch_numbers[start]) + 1
        remainder = table.slice(cuts[-1])
    if remainder is not None and len(remainder):
        last_number = int(remainder.column(STEP)[0].as_py())
        yield from _empty_batches(last_number - next_number)
        yield Windows.from_arrow(remainder)
        next_number = last_number + 1
    yield from _empty_batches(steps - next_number)


def _empty_batches(count: int) -> Iterator[Windows]:
    return (Windows.concatenate([]) for _ in range(count))


def stream_batches(reader: ShardReader, epoch: int) -> Iterator[Windows]:
    """Yield a worker's share of the batches of an epoch, read in this process, for training without a cluster."""
    batches = reader.batches(epoch)
    return split_batches(reader.tables(batches), batches.steps)
