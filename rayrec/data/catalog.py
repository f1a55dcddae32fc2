"""The catalog: ids, titles and artists of songs, their metadata from `rayrec describe`, and their content vectors.

N songs, C numbers per content vector.
"""

import re
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.columns import one_array
from rayrec.data.spelling import spell_id
from rayrec.data.top_k import top_k
from rayrec.errors import InputError
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

DESCRIPTIONS = "descriptions"  # the kind of artifact that `rayrec describe` writes
DESCRIPTIONS_FILE = "descriptions.parquet"  # file in its folder, with the schema columns.DESCRIPTIONS
EXACT, PREFIX, INSIDE = 2, 1, 0  # how well a title or an artist matches a search
MANY = 8  # rows are many if they are at least one in `MANY` of all songs
# Columns that `with_folded` adds: three texts, and the artist also as a dictionary.
FOLDED_TITLE, FOLDED_ARTIST, FOLDED_BOTH, ARTIST_NAME = "folded_title", "folded_artist", "folded_both", "artist_name"
MOST_WORDS = 16  # words of a search that are used; the rest are ignored
SLICE = 1 << 17  # songs that are searched at once


class Catalog:
    """The songs: rows, ids, titles and artists, and the metadata that `rayrec describe` stored of some songs."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def song_ids(self, rows: np.ndarray) -> list[str]:
        """Return the song ids of song rows."""
        ids: list[str] = self.table.column(columns.SONG_ID).take(pa.array(rows)).to_pylist()
        return ids

    def names(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return song_id, title and artist of song rows."""
        table = self.table.select([columns.SONG_ID, columns.TITLE, columns.ARTIST]).take(pa.array(rows))
        return list(table.to_pylist())

    def titles(self, rows: np.ndarray) -> list[str]:
        """Return `Artist – Title` of song rows, or the id of a song without a title."""
        songs = self.table.take(pa.array(rows)).to_pylist()
        return [
            " – ".join(part for part in (row[columns.ARTIST], row[columns.TITLE]) if part) or row[columns.SONG_ID]
            if row[columns.TITLE]
            else row[columns.SONG_ID]
            for row in songs
        ]

    def listed(self, text: str) -> list[str]:
        """Return the song ids in a text such as `12,7`: the text if it is an id, otherwise its parts between commas."""
        is_known = pc.is_in(pa.array([spell_id(text)], pa.string()), value_set=self.table.column(columns.SONG_ID))
        return [text] if is_known[0].as_py() else [part for part in text.split(",") if part.strip()]

    def codes(self, name: str) -> np.ndarray:
        """int32 (N,): a number for each distinct value of a column of strings, -1 for null or a missing column."""
        if name not in self.table.column_names:
            return np.full(len(self), -1, dtype=np.int32)
        encoded = columns.one_array(self.table.column(name)).dictionary_encode()
        return np.asarray(pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False), dtype=np.int32)

    def find(self, song_ids: Sequence[str]) -> np.ndarray:
        """int32: the row of each song id, -1 for unknown ids."""
        spelled_ids = pa.array(map(spell_id, song_ids), pa.string())
        song_rows = pc.index_in(spelled_ids, value_set=self.table.column(columns.SONG_ID), skip_nulls=True)
        return np.asarray(pc.fill_null(song_rows, -1).to_numpy(zero_copy_only=False), dtype=np.int32)

    def rows(self, song_ids: Sequence[str]) -> np.ndarray:
        """int32: the row of each song id. Raises `InputError`, which names the ids, if some are unknown."""
        song_rows = self.find(song_ids)
        unknown = [song_ids[position] for position in np.flatnonzero(song_rows < 0).tolist()]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(song_ids)} songs are not in the catalog: {', '.join(map(str, unknown[:5]))}; "
                "check the IDs against dataset/songs.parquet"
            )
        return song_rows


def described(songs: pa.Table, descriptions: Sequence[pa.Table]) -> pa.Table:
    """Return the song table with the columns of columns.DESCRIPTIONS; described titles and artists replace its own.

    `descriptions`, oldest first, are tables with some of these columns. A value comes from the last table that has the
    song and the column, even if it is null there.
    """
    song_ids = one_array(songs.column(columns.SONG_ID))
    rows_in: dict[tuple[int, ...], pa.Array] = {}  # numbers of tables -> the row of each song in all of them
    for field in columns.DESCRIPTIONS:
        if field.name == columns.SONG_ID:
            continue
        values = pa.nulls(len(songs), field.type)
        numbers = tuple(
            number for number in reversed(range(len(descriptions))) if field.name in descriptions[number].column_names
        )
        if numbers:
            tables = [descriptions[number].select([columns.SONG_ID, field.name]) for number in numbers]
            newest_first = pa.concat_tables(tables)
            if numbers not in rows_in:  # an id that occurs twice is found where it occurs first
                described_ids = one_array(newest_first.column(columns.SONG_ID))
                rows_in[numbers] = pc.index_in(song_ids, value_set=described_ids)
            values = one_array(newest_first.column(field.name)).take(rows_in[numbers])
        if field.name in songs.column_names:
            values = pc.coalesce(values, songs.column(field.name))
            songs = songs.set_column(songs.column_names.index(field.name), field, values)
        else:
            songs = songs.append_column(field, values)
    return songs


@lru_cache
def _accents() -> str:
    """Return a pattern of marks that people often do not type: accents, and vowel points of Hebrew, Arabic and Syriac.

    Other marks are a part of letters, such as vowel signs of India and South-East Asia, and voicing marks of Japanese.
    """
    classes = ((char, unicodedata.combining(char)) for char in map(chr, range(sys.maxunicode + 1)))
    return f"[{''.join(char for char, char_class in classes if char_class >= 200 or 10 <= char_class <= 36)}]+"


def fold(text: str) -> str:
    """Return text in the form for comparisons: without accents, in lower case, with single spaces."""
    without_accents = re.sub(_accents(), "", unicodedata.normalize("NFKD", text))
    return " ".join(without_accents.casefold().split())


def fold_all(texts: pa.Array) -> pa.Array:
    """Return `fold` of every string; nulls become empty."""
    without_accents = pc.replace_substring_regex(
        pc.utf8_normalize(pc.fill_null(texts, ""), form="NFKD"), _accents(), ""
    )
    # Arrow has no casefold. It differs from lower case for ß, the final sigma and ligatures that NFKD has replaced.
    lower = pc.replace_substring(pc.replace_substring(pc.utf8_lower(without_accents), "ß", "ss"), "ς", "σ")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, r"\s+", " "))


def with_folded(table: pa.Table) -> pa.Table:
    """Return a song table with the texts that searches and filters compare, added unless they exist.

    They are `fold` of the title (or of the id of a song without a title), `fold` of the artist, and both together.
    """
    if FOLDED_BOTH in table.column_names:
        return table
    titles = pc.coalesce(one_array(table.column(columns.TITLE)), one_array(table.column(columns.SONG_ID)))
    folded_titles, folded_artists = fold_all(titles), fold_all(one_array(table.column(columns.ARTIST)))
    table = table.append_column(FOLDED_TITLE, folded_titles)
    table = table.append_column(FOLDED_ARTIST, folded_artists)
    table = table.append_column(ARTIST_NAME, folded_artists.dictionary_encode())
    return table.append_column(FOLDED_BOTH, pc.binary_join_element_wise(folded_artists, folded_titles, "\n"))


def popularity_positions(popularity: np.ndarray) -> np.ndarray:
    """int32 (N,): the popularity rank of each song, 0 for the most popular; equally popular songs are ranked by row."""
    ranks = np.empty(len(popularity), dtype=np.int32)
    ranks[np.argsort(-popularity, kind="stable")] = np.arange(len(popularity))
    return ranks


class SongSearch:
    """Searches titles and artists in memory, by a pass over all songs.

    A song without a title is found by its id. Songs that match equally well are in the order of `popularity_positions`,
    int32 (N,) from `popularity_positions`; without it they are in the order of song rows.
    """

    def __init__(self, catalog: Catalog, popularity_positions: np.ndarray | None = None) -> None:
        table, names = with_folded(catalog.table), (FOLDED_TITLE, FOLDED_ARTIST, FOLDED_BOTH)
        self._titles, self._artists, self._combined = (one_array(table.column(name)) for name in names)
        self._popularity_ranks = popularity_positions  # not copied: in a served catalog they are memory-mapped

    def find(self, query: str, limit: int) -> tuple[np.ndarray, int]:
        """Return the best `limit` rows, int32, of songs with every word of the query, and the number of such songs.

        Songs whose title or artist is the query come first, then songs whose title or artist begins with it, then
        all others; each of these groups is in the order of `popularity_positions`. An empty query finds nothing.
        """
        folded_query = fold(query)
        words = folded_query.split()[:MOST_WORDS]
        if not words or not len(self._combined):
            return np.zeros(0, np.int32), 0
        slices = [
            self._find_in_slice(start, words, folded_query, limit) for start in range(0, len(self._combined), SLICE)
        ]
        rows, sort_keys = (np.concatenate(parts) for parts in zip(*(best for best, _ in slices), strict=True))
        (best_rows,), _ = top_k(sort_keys[None], min(limit, len(rows)), rows)
        return best_rows, sum(count for _, count in slices)

    def _find_in_slice(
        self, start: int, words: list[str], folded_query: str, limit: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Return the best rows, int32, of the slice from `start` on, their sort keys, int64, and how many songs match.

        With slices, the memory of a search does not grow with the catalog.
        """
        titles, artists, combined = (
            texts.slice(start, SLICE) for texts in (self._titles, self._artists, self._combined)
        )
        rows = _rows_with_words(combined, words)
        match_levels = np.maximum(
            _match_levels(titles, rows, folded_query), _match_levels(artists, rows, folded_query)
        ).astype(np.int64)
        song_rows = rows.to_numpy().astype(np.int64) + start
        ranks = song_rows if self._popularity_ranks is None else self._popularity_ranks[song_rows].astype(np.int64)
        sort_keys = match_levels * (len(self._combined) + 1) - ranks  # no two are equal
        (best,), _ = top_k(sort_keys[None], min(limit, len(rows)))
        return (song_rows[best].astype(np.int32), sort_keys[best]), len(rows)

    def fits(self, query: str, rows: np.ndarray) -> np.ndarray:
        """int64 (n,): how well the songs at `rows`, int32 (n,), match a query that they contain; EXACT is best."""
        row_array, folded_query = pa.array(rows), fold(query)
        texts = (self._titles.take(row_array), self._artists.take(row_array))
        return np.asarray(np.maximum(*(_match_levels(text, None, folded_query) for text in texts)))


def _rows_with_words(texts: pa.Array, words: list[str]) -> pa.Array:
    """uint64: the rows of the texts with every word; the longest word is searched first, because few texts have it."""
    longest, *other_words = sorted(words, key=len, reverse=True)
    rows = pc.indices_nonzero(pc.match_substring(texts, longest))
    for word in other_words:
        rows = rows.filter(pc.match_substring(texts.take(rows), word))
    return rows


def _match_levels(texts: pa.Array, rows: pa.Array | None, query: str) -> np.ndarray:
    """int64: how well the text of each row matches the query; of all texts if `rows` is None."""
    if rows is not None and len(rows) * MANY < len(texts):
        texts, rows = texts.take(rows), None
    is_prefix = pc.starts_with(texts, query).to_numpy(zero_copy_only=False)
    if rows is not None:  # for many rows, a pass over all texts is faster than a copy of the rows' texts
        is_prefix = is_prefix[rows.to_numpy()]
    match_levels = np.where(is_prefix, PREFIX, INSIDE)
    prefix_positions = np.flatnonzero(is_prefix)
    is_exact = pc.equal(
        texts.take(pa.array(prefix_positions if rows is None else rows.to_numpy()[prefix_positions])), query
    )
    match_levels[prefix_positions[is_exact.to_numpy(zero_copy_only=False)]] = EXACT
    return match_levels


CONTENT_FILE = "content.npy"  # float32 (n, C) in the folder of a description
CONTENT_IDS = "content_ids.parquet"  # song_id of each row


@dataclass(frozen=True, kw_only=True)
class Content:
    """The content vectors of a catalog's songs; only requested vectors are read from the files."""

    parts: Sequence[np.ndarray]  # float32 (n, C) each, memory-mapped, the newest first
    places: np.ndarray  # int64 (N,), position of each song among the rows of all parts; -1 without content

    @classmethod
    def load(cls, workspace: Workspace, descriptions: Sequence[Manifest], song_ids: pa.Array) -> "Content":
        """Load the content of the songs with `song_ids`; if several descriptions have a song, the last one counts."""
        newest_first = [description for description in reversed(descriptions) if CONTENT_FILE in description.files]
        ids, parts = [pa.array([], pa.string())], []
        for description in newest_first:
            table = workspace.read_table(description.path(CONTENT_IDS))
            ids.append(one_array(table.column(columns.SONG_ID)).cast(pa.string()))
            parts.append(workspace.read_array(description.path(CONTENT_FILE), description.files[CONTENT_FILE]))
        positions = pc.index_in(song_ids, value_set=pa.concat_arrays(ids))  # an id is found where it occurs first
        places = pc.fill_null(positions, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        return cls(parts=parts, places=places)

    @property
    def dim(self) -> int:
        """C, the numbers per vector; 0 if no song has content."""
        return self.parts[0].shape[1] if self.parts else 0

    def vectors(self, songs: np.ndarray) -> np.ndarray:
        """float32 (n, C): the content vectors of `songs`, int (n,) rows; zeros for a song without content."""
        vectors = np.zeros((len(songs), self.dim), dtype=np.float32)
        positions, start = self.places[songs], 0
        for part in self.parts:
            in_part = np.flatnonzero((positions >= start) & (positions < start + len(part)))
            vectors[in_part] = part[positions[in_part] - start]
            start += len(part)
        return vectors
