"""Find songs by words of their title or artist.

N songs.
"""

import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import Catalog
from rayrec.data.columns import one_array

EXACT, PREFIX, INSIDE = 2, 1, 0  # how well a title or an artist fits
MANY = 8  # a share of the songs of more than 1 in this many
MOST_WORDS = 16  # of a query; the rest are not looked at


def fold(text: str) -> str:
    """Text as it is compared: without accents, in lower case, spaces drawn together."""
    bare = "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))
    return " ".join(bare.casefold().split())


def fold_all(texts: pa.Array) -> pa.Array:
    """`fold` of every string; nulls become empty."""
    bare = pc.replace_substring_regex(pc.utf8_normalize(pc.fill_null(texts, ""), form="NFKD"), r"\p{M}+", "")
    # Arrow has no casefold: beyond lower case it is ß, the final sigma and a few ligatures, which NFKD takes apart.
    lower = pc.replace_substring(pc.replace_substring(pc.utf8_lower(bare), "ß", "ss"), "ς", "σ")
    return pc.utf8_trim_whitespace(pc.replace_substring_regex(lower, r"\s+", " "))


class SongSearch:
    """Searches titles and artists held in memory: a pass over all songs for each word of a query.

    A song without a title is found by its id. `popularity`, float or int (N,), ranks songs that fit
    equally well; without it they come in the order of song rows.
    """

    def __init__(self, catalog: Catalog, popularity: np.ndarray | None = None) -> None:
        table = catalog.table
        titles = pc.coalesce(one_array(table.column(columns.TITLE)), one_array(table.column(columns.SONG_ID)))
        self._titles, self._artists = fold_all(titles), fold_all(one_array(table.column(columns.ARTIST)))
        self._both = pc.binary_join_element_wise(self._artists, self._titles, "\n")
        songs = len(catalog)
        order = np.arange(songs) if popularity is None else np.argsort(-np.asarray(popularity), kind="stable")
        self._worth = np.empty(songs, dtype=np.int64)  # the more popular, the higher; no two alike
        self._worth[order] = np.arange(songs, 0, -1)

    def find(self, query: str, limit: int) -> tuple[np.ndarray, int]:
        """The best `limit` song rows, int32, that hold every word of the query, and how many do.

        First the songs whose title or artist is the query, then those where one begins with it, then
        all others; within each the most played first. An empty query finds nothing.
        """
        wanted = fold(query)
        words = wanted.split()[:MOST_WORDS]
        if not words:
            return np.zeros(0, np.int32), 0
        rows = self._holding(words)
        found = rows.to_numpy()
        fits = np.maximum(_fit(self._titles, rows, wanted), _fit(self._artists, rows, wanted))
        worth = fits * (len(self._worth) + 1) + self._worth[found]
        best = np.argpartition(-worth, limit)[:limit] if limit < len(found) else np.arange(len(found))
        return found[best[np.argsort(-worth[best])]].astype(np.int32), len(found)

    def _holding(self, words: list[str]) -> pa.Array:
        """uint64: the rows of the songs that hold every word; the longest is looked for first, as few hold it."""
        longest, *others = sorted(words, key=len, reverse=True)
        rows = pc.indices_nonzero(pc.match_substring(self._both, longest))
        for word in others:
            rows = rows.filter(pc.match_substring(self._both.take(rows), word))
        return rows


def _fit(texts: pa.Array, rows: pa.Array, wanted: str) -> np.ndarray:
    """int64: how well the text of each row fits."""
    if len(rows) * MANY < len(texts):
        texts, rows = texts.take(rows), None
    starts = pc.starts_with(texts, wanted).to_numpy(zero_copy_only=False)
    if rows is not None:  # of many rows a pass over all texts is faster than a copy of theirs
        starts = starts[rows.to_numpy()]
    fits = np.where(starts, PREFIX, INSIDE)
    begin = np.flatnonzero(starts)
    same = pc.equal(texts.take(pa.array(begin if rows is None else rows.to_numpy()[begin])), wanted)
    fits[begin[same.to_numpy(zero_copy_only=False)]] = EXACT
    return fits
