"""The catalog: ids, titles and artists of the songs, and what `rayrec describe` added."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.spelling import spell_id
from rayrec.errors import InputError

DESCRIPTIONS = "descriptions"  # the kind of artifact that `rayrec describe` writes
DESCRIPTIONS_FILE = "descriptions.parquet"  # in its folder: columns.DESCRIPTIONS


class Catalog:
    """The songs: rows, ids, titles and artists; release days and markets where they were described."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def song_ids(self, rows: np.ndarray) -> list[str]:
        """The outside ids of song rows."""
        taken: list[str] = self.table.column(columns.SONG_ID).take(pa.array(rows)).to_pylist()
        return taken

    def names(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """song_id, title and artist of song rows."""
        named = self.table.select([columns.SONG_ID, columns.TITLE, columns.ARTIST]).take(pa.array(rows))
        return list(named.to_pylist())

    def titles(self, rows: np.ndarray) -> list[str]:
        """`Artist – Title` of song rows, or the id where there is no title."""
        picked = self.table.take(pa.array(rows)).to_pylist()
        return [
            " – ".join(part for part in (row[columns.ARTIST], row[columns.TITLE]) if part) or row[columns.SONG_ID]
            if row[columns.TITLE]
            else row[columns.SONG_ID]
            for row in picked
        ]

    def listed(self, text: str) -> list[str]:
        """The song ids of a text such as `12,7`: the whole text where it is an id, else what its commas divide."""
        known = pc.is_in(pa.array([spell_id(text)], pa.string()), value_set=self.table.column(columns.SONG_ID))
        return [text] if known[0].as_py() else [part for part in text.split(",") if part.strip()]

    def codes(self, name: str) -> np.ndarray:
        """int32 (N,): a number for each different value of a column of strings, -1 where it is null or not there."""
        if name not in self.table.column_names:
            return np.full(len(self), -1, dtype=np.int32)
        encoded = columns.one_array(self.table.column(name)).dictionary_encode()
        return np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False), dtype=np.int32)

    def rows(self, song_ids: list[str]) -> np.ndarray:
        """int32: the rows of outside ids. Raises `InputError` that names the unknown ones."""
        spelled = pa.array(map(spell_id, song_ids), pa.string())
        found = pc.index_in(spelled, value_set=self.table.column(columns.SONG_ID))
        unknown = [song for song, row in zip(song_ids, found.to_pylist(), strict=True) if row is None]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(song_ids)} songs are not in the catalog: {', '.join(unknown[:5])}; "
                "check the IDs against dataset/songs.parquet"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int32)


def described(songs: pa.Table, told: pa.Table) -> pa.Table:
    """The song table with release days and markets, and with the titles and artists that were told before its own."""
    ids = (table.column(columns.SONG_ID).combine_chunks() for table in (songs, told))
    places = pc.index_in(next(ids), value_set=next(ids))
    for told_field in columns.DESCRIPTIONS:
        if told_field.name == columns.SONG_ID:
            continue
        values = told.column(told_field.name).combine_chunks().take(places)
        if told_field.name in songs.column_names:
            values = pc.coalesce(values, songs.column(told_field.name))
            songs = songs.set_column(songs.column_names.index(told_field.name), told_field, values)
        else:
            songs = songs.append_column(told_field, values)
    return songs
