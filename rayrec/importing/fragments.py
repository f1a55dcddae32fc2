"""What the first pass of an import leaves of each unit of input: its rows in buckets, its songs, its rejects.

A fragment is an Arrow IPC file with one record batch per bucket, so that the second pass reads the
rows of one bucket out of every fragment without touching the others. Plays and playlist entries
have the same shape here: an owner (user or playlist), a song, and what orders them (time or position).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.dataset import bucket_of
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers.reader import Batch
from rayrec.importing.vocabulary import first_songs, song_keys
from rayrec.storage.workspace import Workspace

OWNER = "owner"  # user or playlist
KEY = "key"  # of the song, see vocabulary.song_keys
ORDER = "order"  # played_at in ms UTC, or position
LINE = "line"  # from the start of the unit

ROWS_PER_FRAGMENT = 1 << 20

FRAGMENT = pa.schema(
    [
        pa.field(OWNER, pa.string()),
        pa.field(KEY, pa.uint64()),
        pa.field(ORDER, pa.int64()),
        pa.field(columns.CONTEXTS, pa.list_(pa.string())),
        pa.field(columns.SKIPPED, pa.bool_()),
        pa.field(LINE, pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What one unit came to; written as JSON after its files."""

    read: int = 0  # rows, good and bad
    kept: int = 0  # rows
    lines: int = 0  # lines or records of the file that the unit covers
    fragments: int = 0  # files of rows, and as many of songs
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    contexts: dict[str, int] = field(default_factory=dict)  # name -> plays
    has_skipped: bool = False
    error: str = ""  # why the input cannot be imported at all
    damaged: bool = False  # the error is that the file cannot be read to its end


class FragmentStore:
    """The files of the first pass, in a folder of the workspace; `names` are those of the units' folders in it."""

    def __init__(self, workspace: Workspace, folder: str, names: Sequence[str] = ()) -> None:
        self.workspace, self.folder, self.names = workspace, folder, names

    def rows_file(self, unit: int, fragment: int) -> str:
        """Rows in buckets, Arrow IPC."""
        return f"{self.folder}/{self.names[unit]}/rows-{fragment:04d}.arrow"

    def songs_file(self, unit: int, fragment: int) -> str:
        """Distinct songs of a fragment, Parquet."""
        return f"{self.folder}/{self.names[unit]}/songs-{fragment:04d}.parquet"

    def rejected_file(self, unit: int, fragment: int) -> str:
        """Rows that could not be used, Parquet; only where there are any."""
        return f"{self.folder}/{self.names[unit]}/rejected-{fragment:04d}.parquet"

    def result_file(self, unit: int) -> str:
        """The unit's result, JSON; where it is there, the unit is done."""
        return f"{self.folder}/{self.names[unit]}/result.json"

    def result(self, unit: int) -> UnitResult:
        """The result of a unit that is done."""
        return UnitResult(**self.workspace.read_json(self.result_file(unit)))

    def is_done(self, unit: int) -> bool:
        """True where a unit needs no more work."""
        return self.workspace.exists(self.result_file(unit))

    def write_unit(self, unit: int, batches: Iterable[Batch], buckets: int) -> UnitResult:
        """Write everything that the batches of a unit hold; memory is bounded by a fragment of 1 M rows."""
        tally = _Tally()
        fragments = 0
        for rows, rejects in _chunks(batches, tally):
            self._write_rows(self.rows_file(unit, fragments), rows, buckets)
            self.workspace.write_table(self.songs_file(unit, fragments), first_songs(rows))
            if rejects.num_rows:
                self.workspace.write_table(self.rejected_file(unit, fragments), rejects)
            fragments += 1
        result = tally.result(fragments)
        self.workspace.write_json(self.result_file(unit), asdict(result))
        return result

    def write_error(self, unit: int, error: InputError) -> None:
        """Note that the input cannot be imported."""
        self.workspace.write_json(
            self.result_file(unit), asdict(UnitResult(error=str(error), damaged=isinstance(error, DamagedInputError)))
        )

    def forget(self, unit: int) -> None:
        """Take a unit for one that is not done."""
        self.workspace.delete(self.result_file(unit))

    def songs(self, unit: int, result: UnitResult) -> Iterator[pa.Table]:
        """The distinct songs of a unit, fragment by fragment, in the order in which they appear."""
        for fragment in range(result.fragments):
            yield self.workspace.read_table(self.songs_file(unit, fragment))

    def rejected(self, unit: int, result: UnitResult) -> Iterator[pa.Table]:
        """columns.REJECTED, fragment by fragment; lines from the start of the unit."""
        for fragment in range(result.fragments if result.rejected else 0):
            path = self.rejected_file(unit, fragment)
            if self.workspace.exists(path):
                yield self.workspace.read_table(path)

    def read_bucket(self, unit: int, result: UnitResult, bucket: int) -> Iterator[pa.RecordBatch]:
        """The rows of one bucket out of a unit, in the order of the file."""
        for fragment in range(result.fragments):
            with self.workspace.open_input(self.rows_file(unit, fragment)) as stream:
                yield pa.ipc.open_file(stream).get_batch(bucket)

    def _write_rows(self, path: str, rows: pa.Table, buckets: int) -> None:
        fragment = _fragment(rows)
        owners = one_array(fragment.column(OWNER)).dictionary_encode()
        bucket = bucket_of(owners.dictionary.to_numpy(zero_copy_only=False), buckets)[owners.indices.to_numpy()]
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(buckets + 1))
        ordered = fragment.take(pa.array(order)).combine_chunks()
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with (
            self.workspace.open_output(path) as stream,
            pa.ipc.new_file(stream, FRAGMENT, options=options) as writer,
        ):
            for start, stop in pairwise(bounds):
                writer.write_batch(_one_batch(ordered.slice(start, stop - start)))


class _Tally:
    """Adds up the batches of a unit."""

    def __init__(self) -> None:
        self.read = self.kept = self.lines = 0
        self.rejected: dict[str, int] = {}
        self.contexts: dict[str, int] = {}
        self.has_skipped = False

    def add(self, batch: Batch) -> None:
        self.read += batch.read
        self.kept += batch.rows.num_rows
        self.lines += batch.lines
        _count(self.rejected, batch.rejected.column("reason"))
        if columns.CONTEXTS in batch.rows.column_names:
            _count(self.contexts, pc.list_flatten(batch.rows.column(columns.CONTEXTS)))
            skipped = batch.rows.column(columns.SKIPPED)
            self.has_skipped |= skipped.null_count < len(skipped)

    def result(self, fragments: int) -> UnitResult:
        return UnitResult(fragments=fragments, **vars(self))


def _count(counts: dict[str, int], values: pa.ChunkedArray) -> None:
    for pair in pc.value_counts(values).to_pylist():
        if pair["values"]:
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]


def _chunks(batches: Iterable[Batch], tally: _Tally) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The good and the bad rows in tables of about a million."""
    good: list[pa.Table] = []
    bad: list[pa.Table] = []
    for batch in batches:
        good.append(batch.rows)
        bad.append(batch.rejected)
        tally.add(batch)
        if sum(rows.num_rows for rows in (*good, *bad)) >= ROWS_PER_FRAGMENT:
            yield pa.concat_tables(good).combine_chunks(), pa.concat_tables(bad)
            good, bad = [], []
    if good:
        yield pa.concat_tables(good).combine_chunks(), pa.concat_tables(bad)


def _fragment(rows: pa.Table) -> pa.Table:
    """Plays or playlist entries in the one shape of fragments."""
    plays = columns.USER in rows.column_names
    songs = one_array(rows.column(columns.SONG_ID)).dictionary_encode()
    keys = song_keys(songs.dictionary)[songs.indices.to_numpy()]
    data = {
        OWNER: rows.column(columns.USER if plays else columns.PLAYLIST),
        KEY: pa.array(keys),
        ORDER: rows.column(columns.PLAYED_AT if plays else "position"),
        columns.CONTEXTS: rows.column(columns.CONTEXTS) if plays else pa.nulls(len(keys), pa.list_(pa.string())),
        columns.SKIPPED: rows.column(columns.SKIPPED) if plays else pa.nulls(len(keys), pa.bool_()),
        LINE: rows.column("line"),
    }
    return pa.table(data, schema=FRAGMENT)


def _one_batch(rows: pa.Table) -> pa.RecordBatch:
    return (rows.to_batches() or FRAGMENT.empty_table().to_batches() or [_empty()])[0]


def _empty() -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], item.type) for item in FRAGMENT], schema=FRAGMENT)
