"""The song vocabulary: the int32 row of each song, in the order of first import.

During an import a 64-bit key of the song id identifies a song, so that passes over plays never join on strings. Songs
are merged by ranges of keys, each range by its own worker. Strings have 64-bit offsets here, because 100 million ids
take more than the 2 GiB that 32-bit offsets can address.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.errors import RayrecError

HASH_KEY = "rayrec song hash"  # 16 bytes
KEY = "key"  # key of the song, see `song_keys`
FIRST_POSITION = "place"  # where a song first appears: piece of input << 32 | place among the songs of the piece
MERGE_ROWS = 1 << 20  # a merge starts only if more songs than this are waiting
ROWS_PER_ARRAY = 1 << 20  # rows of an array of strings with 32-bit offsets
BUCKETS_PER_RANGE = 256

SONGS = pa.schema(
    [
        pa.field(KEY, pa.uint64()),
        pa.field(columns.SONG_ID, pa.large_string()),
        pa.field(columns.TITLE, pa.large_string()),
        pa.field(columns.ARTIST, pa.large_string()),
        pa.field(FIRST_POSITION, pa.int64()),
    ]
)


def song_keys(song_ids: pa.Array) -> np.ndarray:
    """uint64: a key of each song id, the same on every machine."""
    texts = song_ids.to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(texts, hash_key=HASH_KEY, categorize=False), dtype=np.uint64)


def key_ranges(buckets: int) -> int:
    """Return the number of ranges of keys in which an import into `buckets` buckets of users merges its songs."""
    return max(1, buckets // BUCKETS_PER_RANGE)


def range_of(keys: np.ndarray, ranges: int) -> np.ndarray:
    """int64: the range of each of the `keys`, uint64, from 0 to `ranges` - 1."""
    return ((keys >> np.uint64(32)) * np.uint64(ranges) >> np.uint64(32)).astype(np.int64)


def first_songs(rows: pa.Table) -> pa.Table:
    """Return the distinct songs of plays or playlist entries, SONGS, in the order of first appearance.

    Title and artist of a song are its first non-null ones.
    """
    # dictionary_encode keeps the order of first appearance; group_by does not.
    encoded = one_array(rows.column(columns.SONG_ID)).dictionary_encode()
    codes, count = encoded.indices.to_numpy(), len(encoded.dictionary)
    titles, artists = (_first_values(rows.column(name), codes, count) for name in (columns.TITLE, columns.ARTIST))
    positions = pa.array(np.arange(count, dtype=np.int64))
    data = [pa.array(song_keys(encoded.dictionary)), encoded.dictionary, titles, artists, positions]
    return pa.table(dict(zip(SONGS.names, data, strict=True))).cast(SONGS)


def merge_songs(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the distinct songs of SONGS tables, SONGS, in the order of first appearance.

    Raises `RayrecError` if two song ids have the same key.
    """
    all_songs = pa.concat_tables(tables)
    encoded = one_array(all_songs.column(KEY)).dictionary_encode()
    codes, count = encoded.indices.to_numpy(), len(encoded.dictionary)
    values = {name: _first_values(all_songs.column(name), codes, count) for name in SONGS.names[1:]}
    song_ids = values[columns.SONG_ID]
    kept_ids, read_ids = song_ids.take(pa.array(codes)), one_array(all_songs.column(columns.SONG_ID))
    is_other = pc.not_equal(kept_ids, read_ids)
    if pc.any(is_other).as_py():
        row = pc.index(is_other, True).as_py()
        raise RayrecError(
            f"song IDs {kept_ids[row].as_py()!r} and {read_ids[row].as_py()!r} have the same 64-bit key; rename one of "
            "the two songs in the files"
        )
    return pa.table([encoded.dictionary, *values.values()], schema=SONGS)


def _first_values(values: pa.ChunkedArray, codes: np.ndarray, count: int) -> pa.Array:
    """Return the first non-null value of each of `count` groups; `codes`, int (R,), are the groups of the rows."""
    column = one_array(values)
    valid_rows = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))[::-1]
    first_rows = np.full(count, -1, dtype=np.int64)
    # In reverse order, so that the first row of a group overwrites later ones.
    first_rows[codes[valid_rows]] = valid_rows
    return column.take(pa.array(first_rows, mask=first_rows < 0))


class SongMerger:
    """Merges SONGS tables as they are added. Memory: the distinct songs, and a bounded number of unmerged ones."""

    def __init__(self) -> None:
        self._songs = SONGS.empty_table()
        self._pending_tables: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, table: pa.Table) -> None:
        """Add a table, in the order of import."""
        self._pending_tables.append(table)
        self._pending_rows += table.num_rows
        # A merge costs as much as all songs merged so far, so it waits until there are as many new ones.
        if self._pending_rows > max(MERGE_ROWS, len(self._songs)):
            self.table()

    def table(self) -> pa.Table:
        """Return all distinct songs added so far, SONGS."""
        if self._pending_tables:
            self._songs = merge_songs([self._songs, *self._pending_tables])
            self._pending_tables, self._pending_rows = [], 0
        return self._songs


class Vocabulary:
    """The song table: rows that exist already, then new songs in the order of first appearance."""

    def __init__(self, existing: pa.Table | None, new: Iterable[pa.Table]) -> None:
        """`existing` is a columns.SONGS_TABLE; `new` are SONGS tables, one per range of keys."""
        table = columns.SONGS_TABLE.empty_table() if existing is None else existing
        self._existing_count = len(table)
        text_columns = [table.column(name).cast(pa.large_string()) for name in SONGS.names[1:4]]
        key_chunks = [song_keys(chunk) for chunk in text_columns[0].chunks if len(chunk)]
        keys_array = pa.array(np.concatenate([np.zeros(0, np.uint64), *key_chunks]))
        existing_songs = pa.table([keys_array, *text_columns, pa.array(np.full(len(table), -1))], schema=SONGS)
        new_songs = pa.concat_tables([SONGS.empty_table(), *new]).sort_by(FIRST_POSITION)
        self._songs = merge_songs([existing_songs, new_songs])

    @property
    def keys(self) -> np.ndarray:
        """uint64 (N,): the key of every song row."""
        return np.asarray(one_array(self._songs.column(KEY)).to_numpy())

    def keep(self, mask: np.ndarray) -> None:
        """Drop the new songs where `mask`, bool (N,), is false; rows that existed before stay."""
        mask = mask.copy()
        mask[: self._existing_count] = True
        self._songs = self._songs.filter(pa.array(mask))

    def table(self) -> pa.Table:
        """Return columns.SONGS_TABLE, in chunks small enough for strings with 32-bit offsets."""
        chunks = []
        for start in range(0, max(1, len(self._songs)), ROWS_PER_ARRAY):
            chunk = self._songs.slice(start, ROWS_PER_ARRAY)
            rows = pa.array(np.arange(start, start + len(chunk), dtype=np.int32))
            data = [rows, *(chunk.column(name).cast(pa.string()) for name in SONGS.names[1:4])]
            chunks.append(pa.table(data, schema=columns.SONGS_TABLE))
        return pa.concat_tables(chunks)


class SongRows:
    """Finds song rows by key."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.rows = keys, rows  # uint64 (N,) ascending; int32 (N,)

    @classmethod
    def of(cls, keys: np.ndarray) -> "SongRows":
        """Create it from the key of every song row, uint64 (N,)."""
        order = np.argsort(keys)
        return cls(keys[order], order.astype(np.int32))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int32: the row of the song with each key, -1 if it is not in the vocabulary."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int32)
        positions = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[positions] == keys, self.rows[positions], np.int32(-1))
