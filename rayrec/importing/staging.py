"""The scratch folder of an import or a compaction: the fragments that the first pass leaves, how the second reads them,
and the step that makes the result the data set.

A piece is one unit of input, or many small ones that follow each other. Its rows are one file of
blocks, one block a bucket of users, so that a group of buckets is read out of each piece by one
request; its songs are a file of blocks by range of keys. Where blocks begin stands in a small file
that is read once, by the driver. Plays and playlist entries have the same shape here: an owner (user
or playlist), a song, and what orders them (time or position).

What was read of a unit of input stays of use to an import of other files in which the unit is the
same, such as one that leaves a damaged file out. Publishing takes the old manifest away, moves the
files into place and puts the new manifest last; if it is killed, the next import finishes it.
"""

import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.dataset import bucket_of
from rayrec.data.histories import Histories
from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers.reader import Batch
from rayrec.importing.vocabulary import KEY, PLACE, SONGS, SongMerger, first_songs, key_ranges, range_of, song_keys
from rayrec.storage.artifacts import DatasetManifest, read_dataset_manifest
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    GENERATING,
    IMPORT_STAGING,
    SONGS_TABLE,
    OutputFile,
    Workspace,
    earlier_manifest,
)

OWNER = "owner"  # user or playlist
ORDER = "order"  # played_at in ms UTC, or position
UNIT = "unit"  # place of the unit in its piece
LINE = "line"  # from the start of the unit

ROWS_PER_CHUNK = 1 << 20  # rows of a piece held in memory at once
REJECTED = "rejected.parquet"
SECONDS, MILLISECONDS = "seconds", "milliseconds"  # columns of a block: times as steps from row to row
STEPS = {SECONDS: 1_000, MILLISECONDS: 1}  # ms

ROWS = pa.schema(
    [
        pa.field(OWNER, pa.string()),
        pa.field(KEY, pa.uint64()),
        pa.field(ORDER, pa.int64()),
        pa.field(columns.CONTEXTS, pa.list_(pa.string())),
        pa.field(columns.SKIPPED, pa.bool_()),
        pa.field(columns.LIKED, pa.bool_()),
        pa.field(columns.IS_PLAY, pa.bool_()),
        pa.field(UNIT, pa.int32()),
        pa.field(LINE, pa.int64()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What one unit came to."""

    read: int = 0  # rows, good and bad
    usable: int = 0  # rows
    lines: int = 0  # lines or records of the file that the unit covers
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    contexts: dict[str, int] = field(default_factory=dict)  # name -> plays
    has_skipped: bool = False
    has_likes: bool = False
    error: str = ""  # why the input cannot be imported at all
    damaged: bool = False  # the error is that the file cannot be read to its end


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """What one piece came to, and where its blocks begin."""

    units: list[UnitResult]
    rows: np.ndarray  # int64 (buckets + 1,), bytes of the file of rows
    songs: np.ndarray  # int64 (ranges + 1,), bytes of the file of songs


class FragmentStore:
    """The files of the first pass, in a folder of the workspace; `names` are those of the pieces' folders in it."""

    def __init__(self, workspace: Workspace, folder: str, names: Sequence[str] = ()) -> None:
        self.workspace, self.folder, self.names = workspace, folder, names

    def rows_file(self, piece: int) -> str:
        """Blocks of rows by bucket."""
        return f"{self.folder}/{self.names[piece]}/rows.blocks"

    def songs_file(self, piece: int) -> str:
        """Blocks of distinct songs by range of keys."""
        return f"{self.folder}/{self.names[piece]}/songs.blocks"

    def rejected_file(self, piece: int) -> str:
        """Rows that could not be used, Parquet; only where there are any."""
        return f"{self.folder}/{self.names[piece]}/rejected.parquet"

    def result_file(self, piece: int) -> str:
        """The piece's result, JSON; where it is there, the piece is done."""
        return f"{self.folder}/{self.names[piece]}/result.json"

    def result(self, piece: int) -> PieceResult:
        """The result of a piece that is done."""
        raw = self.workspace.read_json(self.result_file(piece))
        offsets = {name: np.array(raw[name], dtype=np.int64) for name in ("rows", "songs")}
        return PieceResult(units=[UnitResult(**unit) for unit in raw["units"]], **offsets)

    def pieces_done(self) -> set[int]:
        """The pieces that need no more work, by one listing."""
        existing_files = set(self.workspace.files(self.folder))
        return {piece for piece in range(len(self.names)) if self.result_file(piece) in existing_files}

    def forget(self, piece: int) -> None:
        """Take a piece for one that is not done."""
        self.workspace.delete(self.result_file(piece))

    def write_piece(
        self, piece: int, units: Iterable[Iterable[Batch]], buckets: int, *, with_lines: bool
    ) -> PieceResult:
        """Write everything that the batches of a piece's units hold.

        Memory is bounded by a chunk of 1 M rows and the piece's songs; chunks wait on the local disk. The place
        of each row in its file is kept only `with_lines`. A unit that cannot be read leaves its error in the result.
        """
        counts: list[_Counts] = []
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            spool = _Spool(Path(folder), buckets, with_lines=with_lines)
            for number, batches in enumerate(units):
                counts.append(_Counts())
                try:
                    for batch in batches:
                        counts[-1].add(batch)
                        spool.reject(number, batch.rejected)
                        spool.add(number, batch.rows)
                except InputError as error:
                    counts[-1].error, counts[-1].damaged = str(error), isinstance(error, DamagedInputError)
                    break
            rejected = spool.rejected()
            result = PieceResult(
                units=[unit.result() for unit in counts],
                rows=np.zeros(buckets + 1, dtype=np.int64),
                songs=np.zeros(key_ranges(buckets) + 1, dtype=np.int64),
            )
            if rejected is not None:
                self.workspace.put_file(rejected, self.rejected_file(piece))
            if not counts[-1].error:
                result = replace(
                    result,
                    rows=self._write_blocks(self.rows_file(piece), spool.blocks()),
                    songs=self._write_blocks(self.songs_file(piece), spool.song_blocks(key_ranges(buckets))),
                )
        raw = {"units": [asdict(unit) for unit in result.units]}
        self.workspace.write_json(
            self.result_file(piece), {**raw, "rows": result.rows.tolist(), "songs": result.songs.tolist()}
        )
        return result

    def _write_blocks(self, path: str, blocks: Iterable[pa.Table]) -> np.ndarray:
        offsets = [0]
        with self.workspace.open_output(path) as stream:
            for block in blocks:
                if block.num_rows:
                    _write_block(block, stream)
                offsets.append(stream.tell())
        return np.array(offsets, dtype=np.int64)

    def read_songs(self, piece: int, offsets: np.ndarray, key_range: int) -> pa.Table | None:
        """SONGS of a piece in a range of keys, in the order in which they appear; None where there are none."""
        begin, end = offsets[key_range : key_range + 2].tolist()
        if begin == end:
            return None
        stored = pq.read_table(pa.BufferReader(self._read(self.songs_file(piece), begin, end)))
        song_ids = one_array(stored.column(columns.SONG_ID).cast(SONGS.field(columns.SONG_ID).type))
        places = one_array(stored.column(PLACE)).to_numpy() + (piece << 32)
        data = {
            item.name: stored.column(item.name).cast(item.type)
            if item.name in stored.column_names
            else pa.nulls(len(stored), item.type)
            for item in SONGS
        }
        return pa.table({**data, KEY: pa.array(song_keys(song_ids)), PLACE: pa.array(places)}, schema=SONGS)

    def rejected(self, piece: int, result: PieceResult) -> Iterator[tuple[int, pa.Table]]:
        """Place of the unit in the piece, and its columns.REJECTED with lines from the start of the unit."""
        if any(unit.rejected for unit in result.units):
            with self.workspace.open_input(self.rejected_file(piece)) as stream:
                for batch in pq.ParquetFile(stream).iter_batches():
                    table = pa.Table.from_batches([batch])
                    units = table.column(UNIT).to_numpy()
                    for unit in np.unique(units).tolist():
                        yield unit, table.filter(pa.array(units == unit)).select(columns.REJECTED.names)

    def read_group(self, offsets: np.ndarray, first: int, last: int, spool: IO[bytes]) -> "BucketGroup":
        """Fetch buckets `first` to `last` out of all pieces, one read a piece, into a local file.

        `offsets`, int64 (pieces, buckets + 1), are those of the results.
        """
        places = np.zeros((len(offsets), last - first + 2), dtype=np.int64)
        for piece, row in enumerate(offsets):
            begin, end = int(row[first]), int(row[last + 1])
            places[piece] = row[first : last + 2] - begin + spool.tell()
            if begin < end:
                spool.write(self._read(self.rows_file(piece), begin, end))
        spool.flush()
        return BucketGroup(first, spool, places)

    def _read(self, path: str, begin: int, end: int) -> bytes:
        with self.workspace.open_input(path) as stream:
            stream.seek(begin)
            return bytes(stream.read(end - begin))


class BucketGroup:
    """The rows of some buckets that follow each other, on the local disk."""

    def __init__(self, first: int, spool: IO[bytes], places: np.ndarray) -> None:
        self._first, self._spool, self._places = first, spool, places

    def read(self, bucket: int) -> Iterator[tuple[int, pa.Table]]:
        """Each piece that has rows of a bucket, and these, ROWS; those of an owner in the order of the file."""
        place = bucket - self._first
        for piece, row in enumerate(self._places):
            begin, end = int(row[place]), int(row[place + 1])
            if begin < end:
                self._spool.seek(begin)
                yield piece, _read_block(self._spool.read(end - begin))


def _write_block(block: pa.Table, stream: OutputFile) -> None:
    """A small Parquet file within the file; columns without values are left out."""
    sink = pa.BufferOutputStream()
    filled_columns = [name for name in block.column_names if block.column(name).null_count < block.num_rows]
    pq.write_table(
        block.select(filled_columns),
        sink,
        compression="zstd",
        use_dictionary=[name for name in filled_columns if name not in STEPS],
        write_statistics=False,
        store_schema=False,
        column_encoding={name: "BYTE_STREAM_SPLIT" for name in filled_columns if name in STEPS} or None,
    )
    stream.write(sink.getvalue())


def _packed(rows: pa.Table) -> pa.Table:
    """Rows by owner, times as steps from row to row, in seconds where that is exact."""
    order = one_array(rows.column(ORDER)).to_numpy()
    steps = np.diff(order, prepend=np.int64(0))
    name = SECONDS if not (order % STEPS[SECONDS]).any() else MILLISECONDS
    steps //= STEPS[name]
    narrow = steps.astype(np.int32)
    return rows.set_column(rows.column_names.index(ORDER), name, pa.array(narrow if (narrow == steps).all() else steps))


def _read_block(data: bytes) -> pa.Table:
    table = pq.read_table(pa.BufferReader(data))
    arrays = []
    for item in ROWS:
        if item.name == ORDER:
            name = next(name for name in STEPS if name in table.column_names)
            steps = one_array(table.column(name)).to_numpy().astype(np.int64)
            arrays.append(pa.array(np.cumsum(steps) * STEPS[name]))
        elif item.name not in table.column_names:
            arrays.append(pa.nulls(table.num_rows, item.type))
        else:
            arrays.append(one_array(table.column(item.name)).cast(item.type))
    return pa.table(arrays, schema=ROWS)


class _Spool:
    """The rows of a piece on the local disk, in chunks that are each sorted by bucket, and its songs in memory."""

    def __init__(self, folder: Path, buckets: int, *, with_lines: bool) -> None:
        self._folder, self._buckets, self._with_lines = folder, buckets, with_lines
        self._waiting: list[pa.Table] = []
        self._chunks: list[tuple[Path, np.ndarray]] = []  # file, int64 (buckets + 1,): the first row of each bucket
        self._songs = SongMerger()
        self._rejected: pq.ParquetWriter | None = None

    def reject(self, unit: int, rows: pa.Table) -> None:
        """Rows of a unit that cannot be used."""
        if rows.num_rows:
            numbered = rows.append_column(UNIT, pa.array(np.full(rows.num_rows, unit, dtype=np.int32)))
            path = str(self._folder / REJECTED)
            self._rejected = self._rejected or pq.ParquetWriter(path, numbered.schema, compression="zstd")
            self._rejected.write_table(numbered)

    def rejected(self) -> Path | None:
        """The file of all rejected rows; None where there are none."""
        if self._rejected is None:
            return None
        self._rejected.close()
        return self._folder / REJECTED

    def add(self, unit: int, rows: pa.Table) -> None:
        """Rows of a unit, in the order of the file."""
        if not rows.num_rows:
            return
        self._waiting.append(rows.append_column(UNIT, pa.array(np.full(rows.num_rows, unit, dtype=np.int32))))
        if sum(table.num_rows for table in self._waiting) >= ROWS_PER_CHUNK:
            self._write_chunk()

    def _write_chunk(self) -> None:
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        self._songs.add(first_songs(rows))
        chunk = _rows(rows, with_lines=self._with_lines)
        owners = one_array(chunk.column(OWNER)).dictionary_encode()
        bucket = bucket_of(owners.dictionary.to_numpy(zero_copy_only=False), self._buckets)[owners.indices.to_numpy()]
        order = np.argsort(bucket, kind="stable")
        bounds = np.searchsorted(bucket[order], np.arange(self._buckets + 1))
        path = self._folder / f"{len(self._chunks)}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ROWS) as writer:
            writer.write_table(chunk.take(pa.array(order)).combine_chunks())
        self._chunks.append((path, bounds))

    def blocks(self) -> Iterator[pa.Table]:
        """The rows of each bucket, by owner; those of an owner in the order of the file."""
        if self._waiting:
            self._write_chunk()
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path, _ in self._chunks]
        for bucket in range(self._buckets):
            parts = [
                table.slice(bounds[bucket], bounds[bucket + 1] - bounds[bucket])
                for table, (_, bounds) in zip(tables, self._chunks, strict=True)
            ]
            rows = pa.concat_tables(parts) if parts else ROWS.empty_table()
            if rows.num_rows:
                owners = one_array(rows.column(OWNER)).to_numpy(zero_copy_only=False)
                rows = _packed(rows.take(pa.array(np.argsort(owners, kind="stable"))))
            yield rows

    def song_blocks(self, ranges: int) -> Iterator[pa.Table]:
        """The distinct songs in each range of keys, in the order in which they appear; with their place in it."""
        if self._waiting:
            self._write_chunk()
        songs = self._songs.table()
        places = pa.array(np.arange(len(songs), dtype=np.int64))
        songs = songs.set_column(songs.column_names.index(PLACE), PLACE, places)
        part = range_of(one_array(songs.column(KEY)).to_numpy(), ranges)
        songs = songs.drop_columns([KEY])  # the ids tell them
        return (songs.filter(pa.array(part == number)) for number in range(ranges))


class _Counts:
    """Adds up the batches of a unit."""

    def __init__(self) -> None:
        self.read = self.usable = self.lines = 0
        self.rejected: dict[str, int] = {}
        self.contexts: dict[str, int] = {}
        self.has_skipped = self.has_likes = False
        self.error = ""
        self.damaged = False

    def add(self, batch: Batch) -> None:
        self.read += batch.read
        self.usable += batch.rows.num_rows
        self.lines += batch.lines
        _count(self.rejected, batch.rejected.column("reason"))
        if columns.CONTEXTS in batch.rows.column_names:
            _count(self.contexts, pc.list_flatten(batch.rows.column(columns.CONTEXTS)))
            skipped = batch.rows.column(columns.SKIPPED)
            self.has_skipped |= skipped.null_count < len(skipped)
            self.has_likes |= bool(pc.any(batch.rows.column(columns.LIKED)).as_py())

    def result(self) -> UnitResult:
        return UnitResult(**vars(self))


def _count(counts: dict[str, int], values: pa.ChunkedArray) -> None:
    for pair in pc.value_counts(values).to_pylist():
        if pair["values"]:
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]


def _rows(rows: pa.Table, *, with_lines: bool) -> pa.Table:
    """Plays or playlist entries as ROWS."""
    plays = columns.USER in rows.column_names
    songs = one_array(rows.column(columns.SONG_ID)).dictionary_encode()
    keys = song_keys(songs.dictionary)[songs.indices.to_numpy()]
    data = {
        OWNER: rows.column(columns.USER if plays else columns.PLAYLIST),
        KEY: pa.array(keys),
        ORDER: rows.column(columns.PLAYED_AT if plays else "position"),
        columns.CONTEXTS: rows.column(columns.CONTEXTS) if plays else pa.nulls(len(keys), pa.list_(pa.string())),
        **{
            name: rows.column(name) if plays else pa.nulls(len(keys), pa.bool_())
            for name in (columns.SKIPPED, columns.LIKED, columns.IS_PLAY)
        },
        UNIT: rows.column(UNIT) if with_lines else pa.nulls(len(keys), pa.int32()),
        LINE: rows.column(LINE) if with_lines else pa.nulls(len(keys), pa.int64()),
    }
    return pa.table(data, schema=ROWS)


PLAYS_PER_ROW_GROUP = 500_000
PIECES = "pieces"  # folder of the scratch folders in which every import reads


class Staging:
    """The scratch folder of one import or compaction: a killed one with the same inputs goes on in it."""

    def __init__(self, workspace: Workspace, print_id: str, pieces: Sequence[str] = ()) -> None:
        """`pieces` are the names of the pieces of input, as `piece_names` gives them."""
        self.workspace = workspace
        self.folder = f"{IMPORT_STAGING}/{print_id}"
        self.fragments = FragmentStore(workspace, f"{IMPORT_STAGING}/{PIECES}", pieces)

    def out(self, path: str) -> str:
        """Where the file that will be `path` waits for being published."""
        return f"{self.folder}/out/{path.removeprefix(f'{DATASET}/')}"

    def counts_file(self, bucket: int) -> str:
        """Plays of each song in one bucket, Parquet."""
        return f"{self.folder}/counts/{bucket:05d}.parquet"

    def songs_file(self, key_range: int) -> str:
        """Distinct songs in a range of keys, Parquet."""
        return f"{self.folder}/songs/{key_range:05d}.parquet"

    def bucket_file(self, bucket: int) -> str:
        """The result of one bucket, JSON; where it is there, the bucket is done."""
        return f"{self.folder}/buckets/{bucket:05d}.json"

    def bucket_results(self) -> dict[int, Any]:
        """What the buckets came to that are done, by one listing and a small file each."""
        paths = self.workspace.files(f"{self.folder}/buckets")
        return {int(posixpath.basename(path).split(".")[0]): self.workspace.read_json(path) for path in paths}

    def keep_manifest(self, dataset: DatasetManifest) -> dict[str, str]:
        """Put the present manifest among the files of the next: its name below dataset/, and its checksum."""
        path = earlier_manifest(dataset.id)
        return {path.removeprefix(f"{DATASET}/"): self.workspace.write_json(self.out(path), asdict(dataset))}

    def publish(self, manifest: DatasetManifest) -> None:
        """Make the staged files and those that the manifest keeps the data set; nothing else stays."""
        self.workspace.write_json(self.out(DATASET_MANIFEST), asdict(manifest))
        finish_publishing(self.workspace)


def write_histories(workspace: Workspace, path: str, batches: Iterable[Histories]) -> str:
    """Write a bucket of histories, none where there are no users, in row groups of about 500,000 plays; its sha256."""
    with workspace.open_output(path) as stream:
        writer: pq.ParquetWriter | None = None
        try:
            for histories in batches:
                table = histories.to_arrow()
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                groups = histories.offsets[:-1] // PLAYS_PER_ROW_GROUP
                starts = [row for row in range(len(groups)) if row == 0 or groups[row] != groups[row - 1]]
                for start, stop in zip(starts, [*starts[1:], len(groups)], strict=False):
                    writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            pq.write_table(Histories.from_lists([], []).to_arrow(), stream)
    return stream.sha256


def piece_names(pieces: Sequence[str], buckets: int) -> list[str]:
    """Names of pieces of a plan that are read into so many buckets."""
    return [f"{buckets:04d}-{unit}" for unit in pieces]


def buckets_read(workspace: Workspace, pieces: Sequence[str]) -> int:
    """Into how many buckets an unfinished import has read some of the pieces of a plan; 0 where none has."""
    read = [name.split("-") for name in workspace.folders(f"{IMPORT_STAGING}/{PIECES}")]
    known = set(pieces)
    return max((int(buckets) for buckets, unit in read if unit in known), default=0)


def discard_others(workspace: Workspace, staging: Staging) -> None:
    """Delete what imports of other inputs have left, but for the pieces that this one reads too."""
    current_folders = {f"{IMPORT_STAGING}/{PIECES}", staging.folder}
    current_folders |= {f"{staging.fragments.folder}/{unit}" for unit in staging.fragments.names}
    for folder in (IMPORT_STAGING, f"{IMPORT_STAGING}/{PIECES}"):
        for name in workspace.folders(folder):
            if f"{folder}/{name}" not in current_folders:
                workspace.delete(f"{folder}/{name}")


def finish_publishing(workspace: Workspace) -> None:
    """Publish an import whose files are complete; does nothing where none waits. May be repeated at any point.

    Where the new data set begins with the one that is there, that is there for readers all the while; any other
    is gone from before its first file is touched until the new one is whole.
    """
    for name in workspace.folders(IMPORT_STAGING):
        staging = Staging(workspace, name)
        staged_manifest = staging.out(DATASET_MANIFEST)
        if not workspace.exists(staged_manifest):
            continue
        staged = read_dataset_manifest(workspace, staged_manifest)
        if not _stays_whole(workspace, staged):
            workspace.delete(DATASET_MANIFEST)
            workspace.delete(GENERATING)
            for path in workspace.files(DATASET):
                if not path.startswith(f"{IMPORT_STAGING}/") and path.removeprefix(f"{DATASET}/") not in staged.files:
                    workspace.delete(path)
        waiting = set(workspace.files(f"{staging.folder}/out"))
        for path in staged.files:
            if staging.out(path) in waiting:
                workspace.move(staging.out(path), f"{DATASET}/{path}")
        workspace.move(staged_manifest, DATASET_MANIFEST)
        workspace.delete(IMPORT_STAGING)


def _stays_whole(workspace: Workspace, staged: DatasetManifest) -> bool:
    """True where all files of the data set that is there stay as they are, but for the song table, which grows.

    Histories and users that the new manifest leaves out stay for those who read the old one.
    """
    if not workspace.exists(DATASET_MANIFEST):
        return False
    current = read_dataset_manifest(workspace)
    songs = SONGS_TABLE.removeprefix(f"{DATASET}/")
    left_out = ("histories/", "users/")
    return current.id in staged.ancestors and all(
        staged.files.get(path) == digest or (path not in staged.files and path.startswith(left_out))
        for path, digest in current.files.items()
        if path != songs
    )
