"""The song vocabulary: which int32 row stands for which song, in the order of first import.

Songs are told apart by a 64-bit key of their id while rows are still on the way, so that passes
over plays never join on strings.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.errors import RayrecError

HASH_KEY = "rayrec song hash"  # 16 bytes
KEY = "key"
COMPACT_ROWS = 1 << 20  # songs that wait to be merged into the vocabulary

SONGS = pa.schema(
    [
        pa.field(KEY, pa.uint64()),
        pa.field(columns.SONG_ID, pa.string()),
        pa.field(columns.TITLE, pa.string()),
        pa.field(columns.ARTIST, pa.string()),
    ]
)


def song_keys(song_ids: pa.Array) -> np.ndarray:
    """uint64: a key of each song id, the same on every machine."""
    texts = song_ids.to_numpy(zero_copy_only=False)
    return np.asarray(pd.util.hash_array(texts, hash_key=HASH_KEY, categorize=False), dtype=np.uint64)


def first_songs(rows: pa.Table) -> pa.Table:
    """SONGS: each song of some plays or entries once, in the order in which they appear.

    Title and artist are the first ones that are given.
    """
    # Not group_by: it does not keep the order of appearance, dictionary_encode does.
    encoded = one_array(rows.column(columns.SONG_ID)).dictionary_encode()
    codes, count = encoded.indices.to_numpy(), len(encoded.dictionary)
    titles, artists = (_first_values(rows.column(name), codes, count) for name in (columns.TITLE, columns.ARTIST))
    return pa.table([pa.array(song_keys(encoded.dictionary)), encoded.dictionary, titles, artists], schema=SONGS)


def _first_values(values: pa.ChunkedArray, codes: np.ndarray, count: int) -> pa.Array:
    """The first value that is not null of each of `count` groups; `codes`, int (R,), are the groups of the rows."""
    column = one_array(values)
    given = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))[::-1]
    places = np.full(count, -1, dtype=np.int64)
    places[codes[given]] = given  # from the last to the first: the first stays
    return column.take(pa.array(places, mask=places < 0))


class Vocabulary:
    """The song table under construction: rows that exist already, then new songs as they are added.

    Memory: the songs, and a bounded number of songs that wait to be merged.
    """

    def __init__(self, existing: pa.Table | None = None) -> None:
        table = columns.SONGS_TABLE.empty_table() if existing is None else existing
        self._fixed = len(table)
        song_ids = one_array(table.column(columns.SONG_ID))
        keys = pa.array(song_keys(song_ids) if self._fixed else np.zeros(0, np.uint64))
        self._songs = pa.table(
            [keys, song_ids, table.column(columns.TITLE), table.column(columns.ARTIST)], schema=SONGS
        )
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0

    def add(self, songs: Iterable[pa.Table]) -> None:
        """Add tables of SONGS, in the order of import."""
        for table in songs:
            self._waiting.append(table)
            self._waiting_rows += table.num_rows
            # Merging costs as much as the vocabulary is long: wait until that much is new.
            if self._waiting_rows > max(COMPACT_ROWS, len(self._songs)):
                self._compact()

    @property
    def keys(self) -> np.ndarray:
        """uint64 (N,): the key of every song row."""
        self._compact()
        return np.asarray(self._songs.column(KEY).to_numpy())

    def keep(self, mask: np.ndarray) -> None:
        """Drop the new songs where `mask`, bool (N,), is false; rows that existed before stay."""
        self._compact()
        mask = mask.copy()
        mask[: self._fixed] = True
        self._songs = self._songs.filter(pa.array(mask))

    def table(self) -> pa.Table:
        """columns.SONGS_TABLE."""
        self._compact()
        rows = pa.array(np.arange(len(self._songs), dtype=np.int32))
        return pa.table([rows, *self._songs.columns[1:]], schema=columns.SONGS_TABLE)

    def _compact(self) -> None:
        if not self._waiting:
            return
        everything = pa.concat_tables([self._songs, *self._waiting])
        self._waiting, self._waiting_rows = [], 0
        encoded = one_array(everything.column(KEY)).dictionary_encode()
        codes, count = encoded.indices.to_numpy(), len(encoded.dictionary)
        values = {name: _first_values(everything.column(name), codes, count) for name in SONGS.names[1:]}
        song_ids = values[columns.SONG_ID]
        if not pc.all(pc.equal(song_ids.take(pa.array(codes)), one_array(everything.column(columns.SONG_ID)))).as_py():
            raise RayrecError("two song ids have the same 64-bit key; please report this with the two ids")
        self._songs = pa.table([encoded.dictionary, *values.values()], schema=SONGS)


class SongRows:
    """Finds song rows by key."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        self.keys, self.rows = keys, rows  # uint64 (N,) ascending; int32 (N,)

    @classmethod
    def of(cls, keys: np.ndarray) -> "SongRows":
        """From the key of every song row, uint64 (N,)."""
        order = np.argsort(keys)
        return cls(keys[order], order.astype(np.int32))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int32: the row of each song, -1 where it is not in the vocabulary."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int32)
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[places] == keys, self.rows[places], np.int32(-1))
