"""Filters: which songs an answer may hold. All recommenders filter songs with `AnswerFilter`.

Shapes: N songs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property, lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import ARTIST_NAME, Catalog, fold, with_folded
from rayrec.data.histories import Histories
from rayrec.errors import FieldError

MASKS_KEPT = 64  # maximum masks in the cache, the most recently used
MASKS_BYTES = 32_000_000  # maximum bytes of the cache, one byte per song and mask; at least one mask is kept
ORDERED_AT_ONCE = 10_000  # maximum song rows that `first_of_order` checks at once
FEW_SONGS = 5_000  # a set of at most this size is stored as rows, not as a mask, and an index scores all its songs
MARKETS_SHOWN = 20  # maximum markets in the error for a market that no song has


@dataclass(frozen=True, kw_only=True)
class SongAttributes:
    """The attributes that a song needs to be recommended. A song must match all that are set."""

    artists: tuple[str, ...] = ()  # the song is by any of these; case and accents are ignored
    released_from: date | None = None  # released on that day or later
    released_to: date | None = None  # released on that day or earlier
    market: str | None = None  # where the song may be played

    def __bool__(self) -> bool:
        return bool(self.artists) or any((self.released_from, self.released_to, self.market))


def parse_day(text: str | None, where: str) -> date | None:
    """Return the date in `text`, YYYY-MM-DD. Raises `FieldError` for field `where` if there is no such day."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise FieldError(where, f"{text!r} is not a valid date; expected YYYY-MM-DD") from error


class SongSet:
    """An immutable set of songs, which many answers can share. Small sets are stored as rows, large ones as a mask."""

    def __init__(self, *, rows: np.ndarray | None = None, mask: np.ndarray | None = None) -> None:
        """Create a set from `rows`, int (n,), ascending and without duplicates, or from `mask`, bool (N,).

        Give exactly one of them; it becomes read-only.
        """
        array = rows if mask is None else mask
        assert array is not None
        array.flags.writeable = False
        self.rows, self.mask = rows, mask
        self._count = len(array) if mask is None else int(np.count_nonzero(mask))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "SongSet":
        """Return the set of song `rows`, int (any,), in any order; duplicates and rows below 0 are dropped."""
        return cls(rows=np.unique(rows[rows >= 0]))

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> "SongSet":
        """Return the set of the songs that are True in `mask`, bool (N,), which is not copied."""
        few = np.count_nonzero(mask) <= FEW_SONGS
        return cls(rows=np.flatnonzero(mask)) if few else cls(mask=mask)

    def __len__(self) -> int:
        return self._count

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): True for song `rows`, int (n,), not negative, that are in the set."""
        if self.mask is not None:
            inside = rows < len(self.mask)
            return np.asarray(inside & self.mask[np.where(inside, rows, 0)])
        assert self.rows is not None
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.bool_)
        return np.asarray(self.rows[np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)] == rows)

    def between(self, first: int, last: int) -> np.ndarray:
        """int64 (n,), ascending: the songs of the set from row `first` up to, but not including, `last`."""
        if self.mask is not None:
            return first + np.flatnonzero(self.mask[first:last])
        assert self.rows is not None
        return np.asarray(self.rows[slice(*np.searchsorted(self.rows, [first, last]))], dtype=np.int64)

    def joined(self, later: "SongSet", first: int) -> "SongSet":
        """Return the union with `later`, whose row 0 is row `first` here; all rows of this set are below `first`."""
        if self.mask is None and later.mask is None and len(self) + len(later) <= FEW_SONGS:
            return SongSet(rows=np.concatenate([self.between(0, first), first + later.between(0, later.end)]))
        mask = np.zeros(first + later.end, dtype=np.bool_)
        mask[self.between(0, first)] = True
        mask[first + later.between(0, later.end)] = True
        return SongSet(mask=mask)

    @property
    def end(self) -> int:
        """A row number higher than that of every song in the set."""
        if self.mask is not None:
            return len(self.mask)
        assert self.rows is not None
        return int(self.rows[-1]) + 1 if len(self.rows) else 0

    @cached_property
    def bits(self) -> np.ndarray:
        """uint8 (N / 8,), rounded up: the mask with one bit per song, the first song in the lowest bit."""
        assert self.mask is not None
        return np.packbits(self.mask, bitorder="little")


def listed_and_fitting(rows: np.ndarray | None, fitting: SongSet | None) -> SongSet | None:
    """Return the songs that are both in `rows`, int (any,), -1 for unknown songs, and in `fitting`.

    None means all songs, as an argument and as the result.
    """
    if rows is None:
        return fitting
    listed = SongSet.of_rows(rows)
    if fitting is None:
        return listed
    assert listed.rows is not None
    return SongSet(rows=listed.rows[fitting.holds(listed.rows)])


def masks_kept(num_songs: int) -> int:
    """Return the maximum number of masks in the cache for a catalog of `num_songs` songs."""
    return max(1, min(MASKS_KEPT, MASKS_BYTES // max(1, num_songs)))


class SongMasks:
    """Finds the songs of a catalog that match attributes. Results are cached; threads may share an instance."""

    def __init__(self, catalog: Catalog, earlier: "SongMasks | None" = None) -> None:
        """`earlier` are the masks of an earlier catalog; the rows of `catalog` follow the rows of that one."""
        table = with_folded(catalog.table)
        self.num_songs, self._earlier = len(catalog), earlier
        self._artists = columns.one_array(table.column(ARTIST_NAME))
        self._released = _column(table, columns.RELEASED)
        self._markets = _column(table, columns.MARKETS)
        all_songs = self.num_songs + (earlier.num_songs if earlier else 0)
        self.fitting = lru_cache(maxsize=masks_kept(all_songs))(self._fitting)

    def lookups(self, outcome: str) -> int:
        """Return the number of lookups so far that were `hits` in the cache, or `misses`."""
        return int(getattr(self.fitting.cache_info(), outcome))

    def _fitting(self, attributes: SongAttributes) -> SongSet:
        """Return the songs that are known to match.

        Raises `FieldError` for an artist or a market that no song has, and for release days or markets if the catalog
        has none.
        """
        if self._earlier is None:
            return self._of_catalog(attributes)
        parts: list[SongSet] = []
        errors: list[FieldError] = []
        sources: list[Callable[[SongAttributes], SongSet]] = [self._earlier.fitting, self._of_catalog]
        for fitting in sources:
            try:
                parts.append(fitting(attributes))
            except FieldError as error:
                parts.append(SongSet.of_rows(NOTHING))
                errors.append(error)
        if len(errors) == len(parts):
            raise errors[0]
        return parts[0].joined(parts[1], self._earlier.num_songs)

    def _of_catalog(self, attributes: SongAttributes) -> SongSet:
        """Return the songs of this catalog that match, without the earlier one. Raises as `_fitting` does."""
        fits = np.ones(self.num_songs, dtype=np.bool_)
        if attributes.artists:
            fits &= self._by_artists(attributes.artists)
        flag = "released_from" if attributes.released_from else "released_to"
        days = (
            self._described(self._released, flag, "release days")
            if attributes.released_from or attributes.released_to
            else None
        )
        if attributes.released_from:
            fits &= _true(pc.greater_equal(days, pa.scalar(attributes.released_from, pa.date32())))
        if attributes.released_to:
            fits &= _true(pc.less_equal(days, pa.scalar(attributes.released_to, pa.date32())))
        if attributes.market:
            markets, market = self._described(self._markets, "market", "markets"), attributes.market.strip()
            names = pc.list_flatten(markets)
            here = _true(pc.equal(names, market))
            if not here.any():
                shown = ", ".join(sorted(pc.unique(names).drop_null().to_pylist())[:MARKETS_SHOWN])
                raise FieldError(
                    "market", f"no song is available in market {attributes.market!r}; available markets: {shown}"
                )
            rows = pc.list_parent_indices(markets).to_numpy()[here]
            in_market = np.zeros(self.num_songs, dtype=np.bool_)
            in_market[rows] = True
            fits &= in_market
        return SongSet.of_mask(fits)

    def _by_artists(self, artists: tuple[str, ...]) -> np.ndarray:
        """bool (N,): True for songs by any of the artists."""
        names = pa.array([fold(name) or None for name in artists], pa.string())  # "" would match songs without artist
        unknown = pc.index_in(names, value_set=self._artists.dictionary).is_null().to_pylist()
        if any(unknown):
            raise FieldError("artists", f"the catalog has no song by {artists[unknown.index(True)]!r}")
        codes = pc.is_in(self._artists.dictionary, value_set=names).to_numpy(zero_copy_only=False)
        return np.asarray(codes[self._artists.indices.to_numpy()])

    def _described(self, values: pa.Array | None, where: str, what: str) -> pa.Array:
        if values is None or values.null_count == len(values):
            raise FieldError(where, f"the catalog has no {what}; add them with `rayrec describe`")
        return values


def _column(table: pa.Table, name: str) -> pa.Array | None:
    """Return the column as one array; None if the table has no such column."""
    return columns.one_array(table.column(name)) if name in table.column_names else None


def _true(values: pa.BooleanArray) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False))


NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class AnswerFilter:
    """The songs that an answer may hold: the allowed songs without the excluded ones.

    Rows beyond the catalog of the recommender, of songs that were imported later, are ignored.
    """

    excluded: np.ndarray = field(default_factory=lambda: NOTHING)  # int (any,), song rows, perhaps with duplicates
    allowed: SongSet | None = None  # None: every song
    new_only: bool = False  # True if every song that the user has played is excluded

    def excluded_rows(self, num_songs: int) -> np.ndarray:
        """int (any,), ascending: the excluded rows below `num_songs`, each once."""
        return np.unique(self.excluded[self.excluded < num_songs])

    def qualify(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): True for song `rows`, int (n,), that pass the filter. The cost does not depend on the catalog."""
        qualifies = ~np.isin(rows, self.excluded)
        return np.asarray(qualifies if self.allowed is None else qualifies & self.allowed.holds(rows))

    def qualifying(self, num_songs: int, at_once: int) -> Iterator[np.ndarray]:
        """Yield the songs of a catalog that pass the filter, about `at_once` at a time: int64 (n,), ascending."""
        excluded = self.excluded_rows(num_songs)
        count = num_songs if self.allowed is None else len(self.allowed)
        step = max(at_once, at_once * num_songs // max(1, count))
        for first in range(0, num_songs, step):
            last = min(first + step, num_songs)
            rows = np.arange(first, last) if self.allowed is None else self.allowed.between(first, last)
            near = excluded[slice(*np.searchsorted(excluded, [first, last]))]
            yield rows[~np.isin(rows, near, assume_unique=True)]

    def mask_scores(self, scores: np.ndarray) -> None:
        """Set the scores, float (N,), of songs that do not pass the filter to -inf, in place."""
        if self.allowed is not None:
            outside = np.ones(len(scores), dtype=np.bool_)
            outside[self.allowed.between(0, len(scores))] = False
            scores[outside] = -np.inf
        scores[self.excluded[self.excluded < len(scores)]] = -np.inf


def first_of_order(order: np.ndarray, qualify: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Return the first `count` of the song rows in `order`, int (any,), for which `qualify` is True.

    `qualify` maps song rows, int (n,), to bool (n,). Rows are checked in blocks until there are enough, so that the
    cost grows with the number of songs skipped and not with the length of `order`.
    """
    songs, found = [order[:0]], 0
    begin, size = 0, 2 * count
    while found < count and begin < len(order):
        rows = order[begin : begin + size]
        songs.append(rows[qualify(rows)])
        found += len(songs[-1])
        begin, size = begin + size, min(2 * size, ORDERED_AT_ONCE)
    return np.concatenate(songs)[:count]


def without_heard(histories: Histories, filters: Sequence[AnswerFilter] | None = None) -> list[AnswerFilter]:
    """Return the filter of each user, extended to exclude the songs of the user's history; None: no other filters."""
    heard = np.split(histories.songs, histories.offsets[1:-1]) if len(histories) else []
    if filters is None:
        return [AnswerFilter(excluded=songs, new_only=True) for songs in heard]
    pairs = zip(filters, heard, strict=True)
    return [
        replace(answer_filter, excluded=np.concatenate([answer_filter.excluded, songs]), new_only=True)
        for answer_filter, songs in pairs
    ]
