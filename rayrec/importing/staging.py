"""The scratch folder of an import or a compaction: fragments that the first pass writes and the second reads, and the
step that publishes the result as the data set.

A piece is one unit of input, or many small consecutive units. Its rows are a file of blocks, one block per bucket of
users, so that one request reads a group of buckets from a piece. Its songs are a file of blocks, one block per range of
keys. The offsets of the blocks are in a small file, which the driver reads once. Plays and playlist entries have the
same columns here: an owner (user or playlist), a song, and an order (time or position).

The fragments of a unit can be used again by an import of other files that include the same unit, such as an import that
leaves out a damaged file. Publishing removes the old manifest (unless the new data set extends the old one), moves the
files into place and writes the new manifest last; if it is killed, the next import finishes it.
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
from rayrec.importing.vocabulary import (
    FIRST_POSITION,
    KEY,
    SONGS,
    SongMerger,
    first_songs,
    key_ranges,
    range_of,
    song_keys,
)
from rayrec.storage.artifacts import DatasetManifest, read_dataset_manifest, record_lineage
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
LINE = "line"  # line number, from the start of the unit

ROWS_PER_CHUNK = 1 << 20  # rows of a piece held in memory at once
CONTEXTS_PER_UNIT = 1_000  # a column of session ids, taken for contexts, may have a new name in each row
REJECTED = "rejected.parquet"
SECONDS, MILLISECONDS = "seconds", "milliseconds"  # columns of a block: differences of times from row to row
STEPS = {SECONDS: 1_000, MILLISECONDS: 1}  # ms per unit of the column

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


@dataclass(kw_only=True)
class UnitResult:
    """The result of reading one unit; it grows with each batch."""

    read: int = 0  # rows, good and bad
    usable: int = 0  # rows
    lines: int = 0  # lines or records of the file in the unit
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    contexts: dict[str, int] = field(default_factory=dict)  # name -> plays, of the CONTEXTS_PER_UNIT most frequent
    has_skipped: bool = False
    has_likes: bool = False
    error: str = ""  # why the input cannot be imported at all
    damaged: bool = False  # True if the error is that the file cannot be read to its end

    def add(self, batch: Batch) -> None:
        """Count the rows of a batch of the unit."""
        self.read += batch.read
        self.usable += batch.rows.num_rows
        self.lines += batch.lines
        _add_counts(self.rejected, batch.rejected.column("reason"))
        if columns.CONTEXTS in batch.rows.column_names:
            _add_counts(self.contexts, pc.list_flatten(batch.rows.column(columns.CONTEXTS)))
            if len(self.contexts) > CONTEXTS_PER_UNIT:
                frequent_first = sorted(self.contexts.items(), key=lambda pair: (-pair[1], pair[0]))
                self.contexts = dict(frequent_first[:CONTEXTS_PER_UNIT])
            skipped = batch.rows.column(columns.SKIPPED)
            self.has_skipped |= skipped.null_count < len(skipped)
            self.has_likes |= bool(pc.any(batch.rows.column(columns.LIKED)).as_py())


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """The result of reading one piece, and the offsets of its blocks."""

    units: list[UnitResult]
    rows: np.ndarray  # int64 (buckets + 1,), byte offsets of the blocks in the file of rows
    songs: np.ndarray  # int64 (ranges + 1,), byte offsets of the blocks in the file of songs


class FragmentStore:
    """The files of the first pass, in a folder of the workspace; `names` are the folders of the pieces in it."""

    def __init__(self, workspace: Workspace, folder: str, names: Sequence[str] = ()) -> None:
        self.workspace, self.folder, self.names = workspace, folder, names

    def rows_file(self, piece: int) -> str:
        """Path of the rows of a piece: blocks by bucket."""
        return f"{self.folder}/{self.names[piece]}/rows.blocks"

    def songs_file(self, piece: int) -> str:
        """Path of the distinct songs of a piece: blocks by range of keys."""
        return f"{self.folder}/{self.names[piece]}/songs.blocks"

    def rejected_file(self, piece: int) -> str:
        """Path of the rejected rows of a piece, Parquet; it exists only if there are any."""
        return f"{self.folder}/{self.names[piece]}/rejected.parquet"

    def result_file(self, piece: int) -> str:
        """Path of the result of a piece, JSON; the piece is done if it exists."""
        return f"{self.folder}/{self.names[piece]}/result.json"

    def result(self, piece: int) -> PieceResult:
        """Read the result of a piece that is done."""
        raw = self.workspace.read_json(self.result_file(piece))
        offsets = {name: np.array(raw[name], dtype=np.int64) for name in ("rows", "songs")}
        return PieceResult(units=[UnitResult(**unit) for unit in raw["units"]], **offsets)

    def pieces_done(self) -> set[int]:
        """Return the pieces that are done; takes one listing of the folder."""
        existing_files = set(self.workspace.files(self.folder))
        return {piece for piece in range(len(self.names)) if self.result_file(piece) in existing_files}

    def write_piece(
        self, piece: int, units: Iterable[Iterable[Batch]], buckets: int, *, with_lines: bool
    ) -> PieceResult:
        """Write the rows, songs, rejected rows and result of a piece from the batches of its units.

        Memory is bounded by a chunk of 1 M rows and the songs of the piece; chunks are kept on the local disk. The unit
        and line of each row are kept only if `with_lines`. If a unit cannot be read, the result has its error, later
        units are not read, and no file of the result is written: the next import reads the piece again.
        """
        unit_results: list[UnitResult] = []
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            spool = _Spool(Path(folder), buckets, with_lines=with_lines)
            for unit_index, batches in enumerate(units):
                unit_results.append(UnitResult())
                try:
                    for batch in batches:
                        unit_results[-1].add(batch)
                        spool.reject(unit_index, batch.rejected)
                        spool.add(unit_index, batch.rows)
                except InputError as error:
                    unit_results[-1].error = str(error)
                    unit_results[-1].damaged = isinstance(error, DamagedInputError)
                    break
            rejected_path = spool.rejected()
            result = PieceResult(
                units=unit_results,
                rows=np.zeros(buckets + 1, dtype=np.int64),
                songs=np.zeros(key_ranges(buckets) + 1, dtype=np.int64),
            )
            if rejected_path is not None:
                self.workspace.put_file(rejected_path, self.rejected_file(piece))
            if unit_results[-1].error:
                return result
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
        """Return a piece's songs in a range of keys, SONGS, in order of first appearance; None if there are none."""
        start, end = offsets[key_range : key_range + 2].tolist()
        if start == end:
            return None
        stored_songs = pq.read_table(pa.BufferReader(self._read(self.songs_file(piece), start, end)))
        song_ids = one_array(stored_songs.column(columns.SONG_ID).cast(SONGS.field(columns.SONG_ID).type))
        positions = one_array(stored_songs.column(FIRST_POSITION)).to_numpy() + (piece << 32)
        data = {
            item.name: stored_songs.column(item.name).cast(item.type)
            if item.name in stored_songs.column_names
            else pa.nulls(len(stored_songs), item.type)
            for item in SONGS
        }
        return pa.table({**data, KEY: pa.array(song_keys(song_ids)), FIRST_POSITION: pa.array(positions)}, schema=SONGS)

    def rejected(self, piece: int, result: PieceResult) -> Iterator[tuple[int, pa.Table]]:
        """Yield the place of a unit in the piece and some of its rejected rows, columns.REJECTED.

        Line numbers count from the start of the unit.
        """
        if any(unit.rejected for unit in result.units):
            with self.workspace.open_input(self.rejected_file(piece)) as stream:
                for batch in pq.ParquetFile(stream).iter_batches():
                    table = pa.Table.from_batches([batch])
                    units = table.column(UNIT).to_numpy()
                    for unit in np.unique(units).tolist():
                        yield unit, table.filter(pa.array(units == unit)).select(columns.REJECTED.names)

    def read_group(self, offsets: np.ndarray, first: int, last: int, spool: IO[bytes]) -> "BucketGroup":
        """Copy buckets `first` to `last` of all pieces into the local file `spool`, with one read per piece.

        `offsets`, int64 (pieces, buckets + 1), are the `rows` of the results of the pieces.
        """
        block_offsets = np.zeros((len(offsets), last - first + 2), dtype=np.int64)
        for piece, piece_offsets in enumerate(offsets):
            start, end = int(piece_offsets[first]), int(piece_offsets[last + 1])
            block_offsets[piece] = piece_offsets[first : last + 2] - start + spool.tell()
            if start < end:
                spool.write(self._read(self.rows_file(piece), start, end))
        spool.flush()
        return BucketGroup(first, spool, block_offsets)

    def _read(self, path: str, start: int, end: int) -> bytes:
        with self.workspace.open_input(path) as stream:
            stream.seek(start)
            return bytes(stream.read(end - start))


class BucketGroup:
    """The rows of consecutive buckets, on the local disk."""

    def __init__(self, first: int, spool: IO[bytes], block_offsets: np.ndarray) -> None:
        self._first, self._spool, self._block_offsets = first, spool, block_offsets

    def read(self, bucket: int) -> Iterator[tuple[int, pa.Table]]:
        """Yield each piece that has rows of a bucket, with these rows, ROWS.

        The rows of an owner are in the order of the file.
        """
        index = bucket - self._first
        for piece, piece_offsets in enumerate(self._block_offsets):
            start, end = int(piece_offsets[index]), int(piece_offsets[index + 1])
            if start < end:
                self._spool.seek(start)
                yield piece, _read_block(self._spool.read(end - start))


def _write_block(block: pa.Table, stream: OutputFile) -> None:
    """Write a block as a small Parquet file within the file; columns without values are left out."""
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


def _encode_times(rows: pa.Table) -> pa.Table:
    """Replace the times of rows by their differences from row to row, in seconds if that is exact."""
    order = one_array(rows.column(ORDER)).to_numpy()
    steps = np.diff(order, prepend=np.int64(0))
    column_name = SECONDS if not (order % STEPS[SECONDS]).any() else MILLISECONDS
    steps //= STEPS[column_name]
    steps_int32 = steps.astype(np.int32)
    return rows.set_column(
        rows.column_names.index(ORDER), column_name, pa.array(steps_int32 if (steps_int32 == steps).all() else steps)
    )


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
    """Collects the rows of a piece on the local disk, in chunks that are sorted by bucket, and its songs in memory."""

    def __init__(self, folder: Path, buckets: int, *, with_lines: bool) -> None:
        self._folder, self._buckets, self._with_lines = folder, buckets, with_lines
        self._pending_tables: list[pa.Table] = []
        self._chunks: list[tuple[Path, np.ndarray]] = []  # file, int64 (buckets + 1,): the first row of each bucket
        self._songs = SongMerger()
        self._rejected: pq.ParquetWriter | None = None

    def reject(self, unit: int, rows: pa.Table) -> None:
        """Add rejected rows of a unit."""
        if rows.num_rows:
            rejected_rows = rows.append_column(UNIT, pa.array(np.full(rows.num_rows, unit, dtype=np.int32)))
            path = str(self._folder / REJECTED)
            self._rejected = self._rejected or pq.ParquetWriter(path, rejected_rows.schema, compression="zstd")
            self._rejected.write_table(rejected_rows)

    def rejected(self) -> Path | None:
        """Close the file of all rejected rows and return it; None if there are none."""
        if self._rejected is None:
            return None
        self._rejected.close()
        return self._folder / REJECTED

    def add(self, unit: int, rows: pa.Table) -> None:
        """Add rows of a unit, in the order of the file."""
        if not rows.num_rows:
            return
        self._pending_tables.append(rows.append_column(UNIT, pa.array(np.full(rows.num_rows, unit, dtype=np.int32))))
        if sum(table.num_rows for table in self._pending_tables) >= ROWS_PER_CHUNK:
            self._write_chunk()

    def _write_chunk(self) -> None:
        rows = pa.concat_tables(self._pending_tables).combine_chunks()
        self._pending_tables = []
        self._songs.add(first_songs(rows))
        chunk = _to_rows(rows, with_lines=self._with_lines)
        owners = one_array(chunk.column(OWNER)).dictionary_encode()
        row_buckets = bucket_of(owners.dictionary.to_numpy(zero_copy_only=False), self._buckets)[
            owners.indices.to_numpy()
        ]
        row_order = np.argsort(row_buckets, kind="stable")
        bucket_starts = np.searchsorted(row_buckets[row_order], np.arange(self._buckets + 1))
        path = self._folder / f"{len(self._chunks)}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, ROWS) as writer:
            writer.write_table(chunk.take(pa.array(row_order)).combine_chunks())
        self._chunks.append((path, bucket_starts))

    def blocks(self) -> Iterator[pa.Table]:
        """Yield the rows of each bucket, sorted by owner; those of an owner are in the order of the file."""
        if self._pending_tables:
            self._write_chunk()
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path, _ in self._chunks]
        for bucket in range(self._buckets):
            parts = [
                table.slice(bucket_starts[bucket], bucket_starts[bucket + 1] - bucket_starts[bucket])
                for table, (_, bucket_starts) in zip(tables, self._chunks, strict=True)
            ]
            rows = pa.concat_tables(parts) if parts else ROWS.empty_table()
            if rows.num_rows:
                owners = one_array(rows.column(OWNER)).to_numpy(zero_copy_only=False)
                rows = _encode_times(rows.take(pa.array(np.argsort(owners, kind="stable"))))
            yield rows

    def song_blocks(self, range_count: int) -> Iterator[pa.Table]:
        """Return the distinct songs of each range of keys, with their place among the songs of the piece."""
        if self._pending_tables:
            self._write_chunk()
        songs = self._songs.table()
        positions = pa.array(np.arange(len(songs), dtype=np.int64))
        songs = songs.set_column(songs.column_names.index(FIRST_POSITION), FIRST_POSITION, positions)
        range_numbers = range_of(one_array(songs.column(KEY)).to_numpy(), range_count)
        songs = songs.drop_columns([KEY])  # can be computed from the ids
        return (songs.filter(pa.array(range_numbers == key_range)) for key_range in range(range_count))


def _add_counts(counts: dict[str, int], values: pa.ChunkedArray) -> None:
    for pair in pc.value_counts(values).to_pylist():
        if pair["values"]:
            counts[pair["values"]] = counts.get(pair["values"], 0) + pair["counts"]


def _to_rows(rows: pa.Table, *, with_lines: bool) -> pa.Table:
    """Convert plays or playlist entries to ROWS."""
    is_plays = columns.USER in rows.column_names
    songs = one_array(rows.column(columns.SONG_ID)).dictionary_encode()
    keys = song_keys(songs.dictionary)[songs.indices.to_numpy()]
    data = {
        OWNER: rows.column(columns.USER if is_plays else columns.PLAYLIST),
        KEY: pa.array(keys),
        ORDER: rows.column(columns.PLAYED_AT if is_plays else "position"),
        columns.CONTEXTS: rows.column(columns.CONTEXTS) if is_plays else pa.nulls(len(keys), pa.list_(pa.string())),
        **{
            name: rows.column(name) if is_plays else pa.nulls(len(keys), pa.bool_())
            for name in (columns.SKIPPED, columns.LIKED, columns.IS_PLAY)
        },
        UNIT: rows.column(UNIT) if with_lines else pa.nulls(len(keys), pa.int32()),
        LINE: rows.column(LINE) if with_lines else pa.nulls(len(keys), pa.int64()),
    }
    return pa.table(data, schema=ROWS)


PLAYS_PER_ROW_GROUP = 500_000
PIECES = "pieces"  # folder of the pieces of all imports, next to the scratch folders


class Staging:
    """The scratch folder of one import or compaction; a killed run is continued in it by a run with the same inputs."""

    def __init__(self, workspace: Workspace, print_id: str, pieces: Sequence[str] = ()) -> None:
        """`pieces` are the names of the pieces of input, as `piece_names` returns them."""
        self.workspace = workspace
        self.folder = f"{IMPORT_STAGING}/{print_id}"
        self.fragments = FragmentStore(workspace, f"{IMPORT_STAGING}/{PIECES}", pieces)

    def out(self, path: str) -> str:
        """Return the path of a staged file that will be published as `path`."""
        return f"{self.folder}/out/{path.removeprefix(f'{DATASET}/')}"

    def counts_file(self, bucket: int) -> str:
        """Path of the number of plays of each song in one bucket, Parquet."""
        return f"{self.folder}/counts/{bucket:05d}.parquet"

    def songs_file(self, key_range: int) -> str:
        """Path of the distinct songs in a range of keys, Parquet."""
        return f"{self.folder}/songs/{key_range:05d}.parquet"

    def bucket_file(self, bucket: int) -> str:
        """Path of the result of one bucket, JSON; the bucket is done if it exists."""
        return f"{self.folder}/buckets/{bucket:05d}.json"

    def bucket_results(self) -> dict[int, Any]:
        """Return bucket -> result of all buckets that are done; takes one listing, and one small file per bucket."""
        paths = self.workspace.files(f"{self.folder}/buckets")
        return {int(posixpath.basename(path).split(".")[0]): self.workspace.read_json(path) for path in paths}

    def keep_manifest(self, dataset: DatasetManifest) -> dict[str, str]:
        """Add the current manifest to the files of the next data set; return its path below dataset/ -> checksum."""
        path = earlier_manifest(dataset.id)
        return {path.removeprefix(f"{DATASET}/"): self.workspace.write_json(self.out(path), asdict(dataset))}

    def publish(self, manifest: DatasetManifest) -> None:
        """Publish the staged files and `manifest` as the data set, see `finish_publishing`."""
        self.workspace.write_json(self.out(DATASET_MANIFEST), asdict(manifest))
        finish_publishing(self.workspace)


def write_histories(workspace: Workspace, path: str, batches: Iterable[Histories]) -> str:
    """Write the histories of a bucket in row groups of about 500,000 plays; return the sha256 of the file.

    Without users, the file has no rows.
    """
    with workspace.open_output(path) as stream:
        writer: pq.ParquetWriter | None = None
        try:
            for histories in batches:
                table = histories.to_arrow()
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                group_numbers = histories.offsets[:-1] // PLAYS_PER_ROW_GROUP
                starts = [
                    row for row in range(len(group_numbers)) if row == 0 or group_numbers[row] != group_numbers[row - 1]
                ]
                for start, stop in zip(starts, [*starts[1:], len(group_numbers)], strict=False):
                    writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            pq.write_table(Histories.from_lists([], []).to_arrow(), stream)
    return stream.sha256


def piece_names(pieces: Sequence[str], buckets: int) -> list[str]:
    """Return the folder names of the pieces of a plan that are read into `buckets` buckets."""
    return [f"{buckets:04d}-{piece}" for piece in pieces]


def existing_bucket_count(workspace: Workspace, pieces: Sequence[str]) -> int:
    """Return the number of buckets into which an unfinished import has read pieces of a plan; 0 if none has."""
    folder_parts = [name.split("-") for name in workspace.folders(f"{IMPORT_STAGING}/{PIECES}")]
    known_pieces = set(pieces)
    return max((int(buckets) for buckets, piece in folder_parts if piece in known_pieces), default=0)


def delete_other_imports(workspace: Workspace, staging: Staging) -> None:
    """Delete the files of unfinished imports of other inputs, except pieces that this import also reads."""
    current_folders = {f"{IMPORT_STAGING}/{PIECES}", staging.folder}
    current_folders |= {f"{staging.fragments.folder}/{piece}" for piece in staging.fragments.names}
    for folder in (IMPORT_STAGING, f"{IMPORT_STAGING}/{PIECES}"):
        for name in workspace.folders(folder):
            if f"{folder}/{name}" not in current_folders:
                workspace.delete(f"{folder}/{name}")


def finish_publishing(workspace: Workspace) -> None:
    """Publish an import whose files are complete; do nothing if there is none. May be repeated at any point.

    If the new data set extends the current one, readers can read the current one all the time. Otherwise the
    current manifest and the files that the new data set does not use are deleted first, and readers see no data set
    until the new one is complete.
    """
    for name in workspace.folders(IMPORT_STAGING):
        staging = Staging(workspace, name)
        manifest_path = staging.out(DATASET_MANIFEST)
        if not workspace.exists(manifest_path):
            continue
        manifest = read_dataset_manifest(workspace, manifest_path)
        if not _keeps_current_files(workspace, manifest):
            workspace.delete(DATASET_MANIFEST)
            workspace.delete(GENERATING)
            for path in workspace.files(DATASET):
                if not path.startswith(f"{IMPORT_STAGING}/") and path.removeprefix(f"{DATASET}/") not in manifest.files:
                    workspace.delete(path)
        staged_files = set(workspace.files(f"{staging.folder}/out"))
        for path in manifest.files:
            if staging.out(path) in staged_files:
                workspace.move(staging.out(path), f"{DATASET}/{path}")
        record_lineage(workspace, manifest)
        workspace.move(manifest_path, DATASET_MANIFEST)
        workspace.delete(IMPORT_STAGING)


def _keeps_current_files(workspace: Workspace, manifest: DatasetManifest) -> bool:
    """True if all files of the current data set stay unchanged, except for the song table, which grows.

    Files of histories and users that the new manifest does not list are kept for readers of the old manifest.
    """
    if not workspace.exists(DATASET_MANIFEST):
        return False
    current_manifest = read_dataset_manifest(workspace)
    songs_file = SONGS_TABLE.removeprefix(f"{DATASET}/")
    unlisted_folders = ("histories/", "users/")
    return current_manifest.id in manifest.ancestors and all(
        manifest.files.get(path) == digest or (path not in manifest.files and path.startswith(unlisted_folders))
        for path, digest in current_manifest.files.items()
        if path != songs_file
    )
