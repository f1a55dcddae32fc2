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


def parse_day(text: str | None, field_name: str) -> date | None:
    """Return the date in `text`, YYYY-MM-DD. Raises `FieldError` for field `field_name` if there is no such day."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise FieldError(field_name, f"{text!r} is not a valid date; expected YYYY-MM-DD") from error


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
        is_small = np.count_nonzero(mask) <= FEW_SONGS
        return cls(rows=np.flatnonzero(mask)) if is_small else cls(mask=mask)

    def __len__(self) -> int:
        return self._count

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): True for song `rows`, int (n,), not negative, that are in the set."""
        if self.mask is not None:
            in_range = rows < len(self.mask)
            return np.asarray(in_range & self.mask[np.where(in_range, rows, 0)])
        assert self.rows is not None
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.bool_)
        return np.asarray(self.rows[np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)] == rows)

    def between(self, start: int, stop: int) -> np.ndarray:
        """int64 (n,), ascending: the songs of the set from row `start` up to, but not including, `stop`."""
        if self.mask is not None:
            return start + np.flatnonzero(self.mask[start:stop])
        assert self.rows is not None
        return np.asarray(self.rows[slice(*np.searchsorted(self.rows, [start, stop]))], dtype=np.int64)

    def union(self, later: "SongSet", start: int) -> "SongSet":
        """Return the union with `later`, whose row 0 is row `start` here; all rows of this set are below `start`."""
        if self.mask is None and later.mask is None and len(self) + len(later) <= FEW_SONGS:
            return SongSet(rows=np.concatenate([self.between(0, start), start + later.between(0, later.end)]))
        mask = np.zeros(start + later.end, dtype=np.bool_)
        mask[self.between(0, start)] = True
        mask[start + later.between(0, later.end)] = True
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


def intersect_songs(rows: np.ndarray | None, matching_songs: SongSet | None) -> SongSet | None:
    """Return the songs that are both in `rows`, int (any,), -1 for unknown songs, and in `matching_songs`.

    None means all songs, as an argument and as the result.
    """
    if rows is None:
        return matching_songs
    listed_songs = SongSet.of_rows(rows)
    if matching_songs is None:
        return listed_songs
    assert listed_songs.rows is not None
    return SongSet(rows=listed_songs.rows[matching_songs.holds(listed_songs.rows)])


def max_masks(num_songs: int) -> int:
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
        total_songs = self.num_songs + (earlier.num_songs if earlier else 0)
        self.fitting = lru_cache(maxsize=max_masks(total_songs))(self._find_matching)

    def lookups(self, outcome: str) -> int:
        """Return the number of lookups so far that were `hits` in the cache, or `misses`."""
        return int(getattr(self.fitting.cache_info(), outcome))

    def _find_matching(self, attributes: SongAttributes) -> SongSet:
        """Return the songs that are known to match.

        Raises `FieldError` for an artist or a market that no song has, and for release days or markets if the catalog
        has none.
        """
        if self._earlier is None:
            return self._match_catalog(attributes)
        parts: list[SongSet] = []
        errors: list[FieldError] = []
        finders: list[Callable[[SongAttributes], SongSet]] = [self._earlier.fitting, self._match_catalog]
        for find_matching in finders:
            try:
                parts.append(find_matching(attributes))
            except FieldError as error:
                parts.append(SongSet.of_rows(NO_ROWS))
                errors.append(error)
        if len(errors) == len(parts):
            raise errors[0]
        return parts[0].union(parts[1], self._earlier.num_songs)

    def _match_catalog(self, attributes: SongAttributes) -> SongSet:
        """Return the songs of this catalog that match, without the earlier one. Raises as `_find_matching` does."""
        is_match = np.ones(self.num_songs, dtype=np.bool_)
        if attributes.artists:
            is_match &= self._by_artists(attributes.artists)
        field_name = "released_from" if attributes.released_from else "released_to"
        release_days = (
            self._require_column(self._released, field_name, "release days")
            if attributes.released_from or attributes.released_to
            else None
        )
        if attributes.released_from:
            is_match &= _to_mask(pc.greater_equal(release_days, pa.scalar(attributes.released_from, pa.date32())))
        if attributes.released_to:
            is_match &= _to_mask(pc.less_equal(release_days, pa.scalar(attributes.released_to, pa.date32())))
        if attributes.market:
            markets, market = self._require_column(self._markets, "market", "markets"), attributes.market.strip()
            market_names = pc.list_flatten(markets)
            is_market = _to_mask(pc.equal(market_names, market))
            if not is_market.any():
                market_list = ", ".join(sorted(pc.unique(market_names).drop_null().to_pylist())[:MARKETS_SHOWN])
                raise FieldError(
                    "market", f"no song is available in market {attributes.market!r}; available markets: {market_list}"
                )
            rows = pc.list_parent_indices(markets).to_numpy()[is_market]
            in_market = np.zeros(self.num_songs, dtype=np.bool_)
            in_market[rows] = True
            is_match &= in_market
        return SongSet.of_mask(is_match)

    def _by_artists(self, artists: tuple[str, ...]) -> np.ndarray:
        """bool (N,): True for songs by any of the artists."""
        names = pa.array([fold(name) or None for name in artists], pa.string())  # "" would match songs without artist
        is_unknown = pc.index_in(names, value_set=self._artists.dictionary).is_null().to_pylist()
        if any(is_unknown):
            raise FieldError(
                "artists", f"the catalog has no song by {artists[is_unknown.index(True)]!r}; check the name"
            )
        is_wanted = pc.is_in(self._artists.dictionary, value_set=names).to_numpy(zero_copy_only=False)
        return np.asarray(is_wanted[self._artists.indices.to_numpy()])

    def _require_column(self, values: pa.Array | None, field_name: str, description: str) -> pa.Array:
        if values is None or values.null_count == len(values):
            raise FieldError(field_name, f"the catalog has no {description}; add them with `rayrec describe`")
        return values


def _column(table: pa.Table, name: str) -> pa.Array | None:
    """Return the column as one array; None if the table has no such column."""
    return columns.one_array(table.column(name)) if name in table.column_names else None


def _to_mask(values: pa.BooleanArray) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False))


NO_ROWS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class AnswerFilter:
    """The songs that an answer may hold: the allowed songs without the excluded ones.

    Rows beyond the catalog of the recommender, of songs that were imported later, are ignored.
    """

    excluded: np.ndarray = field(default_factory=lambda: NO_ROWS)  # int (any,), song rows, perhaps with duplicates
    allowed: SongSet | None = None  # None: every song
    new_only: bool = False  # True if every song that the user has played is excluded

    def excluded_rows(self, num_songs: int) -> np.ndarray:
        """int (any,), ascending: the excluded rows below `num_songs`, each once."""
        return np.unique(self.excluded[self.excluded < num_songs])

    def qualify(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): True for song `rows`, int (n,), that pass the filter. The cost does not depend on the catalog."""
        is_qualified = ~np.isin(rows, self.excluded)
        return np.asarray(is_qualified if self.allowed is None else is_qualified & self.allowed.holds(rows))

    def qualifying(self, num_songs: int, chunk_size: int) -> Iterator[np.ndarray]:
        """Yield the songs of a catalog that pass the filter, about `chunk_size` at a time: int64 (n,), ascending."""
        excluded = self.excluded_rows(num_songs)
        count = num_songs if self.allowed is None else len(self.allowed)
        step = max(chunk_size, chunk_size * num_songs // max(1, count))
        for start in range(0, num_songs, step):
            stop = min(start + step, num_songs)
            rows = np.arange(start, stop) if self.allowed is None else self.allowed.between(start, stop)
            excluded_in_range = excluded[slice(*np.searchsorted(excluded, [start, stop]))]
            yield rows[~np.isin(rows, excluded_in_range, assume_unique=True)]

    def mask_scores(self, scores: np.ndarray) -> None:
        """Set the scores, float (N,), of songs that do not pass the filter to -inf, in place."""
        if self.allowed is not None:
            is_outside = np.ones(len(scores), dtype=np.bool_)
            is_outside[self.allowed.between(0, len(scores))] = False
            scores[is_outside] = -np.inf
        scores[self.excluded[self.excluded < len(scores)]] = -np.inf


def first_of_order(order: np.ndarray, qualify: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """Return the first `count` of the song rows in `order`, int (any,), for which `qualify` is True.

    `qualify` maps song rows, int (n,), to bool (n,). Rows are checked in blocks until there are enough, so that the
    cost grows with the number of songs skipped and not with the length of `order`.
    """
    blocks, num_found = [order[:0]], 0
    start, block_size = 0, 2 * count
    while num_found < count and start < len(order):
        rows = order[start : start + block_size]
        blocks.append(rows[qualify(rows)])
        num_found += len(blocks[-1])
        start, block_size = start + block_size, min(2 * block_size, ORDERED_AT_ONCE)
    return np.concatenate(blocks)[:count]


def without_heard(histories: Histories, filters: Sequence[AnswerFilter] | None = None) -> list[AnswerFilter]:
    """Return the filter of each user, extended to exclude the songs of the user's history; None: no other filters."""
    heard_songs = np.split(histories.songs, histories.offsets[1:-1]) if len(histories) else []
    if filters is None:
        return [AnswerFilter(excluded=songs, new_only=True) for songs in heard_songs]
    pairs = zip(filters, heard_songs, strict=True)
    return [
        replace(answer_filter, excluded=np.concatenate([answer_filter.excluded, songs]), new_only=True)
        for answer_filter, songs in pairs
    ]
