"""Filters: which songs one answer may hold. The one way in which songs are filtered.

N songs.
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

MASKS_KEPT = 64  # of those asked for last, at most
MASKS_BYTES = 32_000_000  # that they take together, a byte a song each; one is kept whatever its size
ORDERED_AT_ONCE = 10_000  # song rows of an order that are looked at together, at most
FEW_SONGS = 5_000  # a set of no more is held as rows in place of a mask, and an index scores each of them
MARKETS_SHOWN = 20  # where one is asked for that no song has


@dataclass(frozen=True, kw_only=True)
class SongAttributes:
    """What songs must have to be recommended: all that is set here."""

    artists: tuple[str, ...] = ()  # any of these, whatever case or accents
    released_from: date | None = None  # that day or later
    released_to: date | None = None  # that day or earlier
    market: str | None = None  # where the song may be played

    def __bool__(self) -> bool:
        return bool(self.artists) or any((self.released_from, self.released_to, self.market))


def parse_day(text: str | None, where: str) -> date | None:
    """The day of the field `where`, YYYY-MM-DD. Raises `FieldError` for one that is not in the calendar."""
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError as error:
        raise FieldError(where, f"day {text!r} is not in the calendar; give YYYY-MM-DD") from error


class SongSet:
    """Some songs, which never change, so that many answers share them: rows where they are few, a mask where many."""

    def __init__(self, *, rows: np.ndarray | None = None, mask: np.ndarray | None = None) -> None:
        """Of song rows, int (n,) ascending, each once, or of a mask, bool (N,): one of them."""
        array = rows if mask is None else mask
        assert array is not None
        array.flags.writeable = False
        self.rows, self.mask = rows, mask
        self._count = len(array) if mask is None else int(np.count_nonzero(mask))

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "SongSet":
        """Of song rows, int (any,), in any order and some perhaps twice; those below 0 are no songs."""
        return cls(rows=np.unique(rows[rows >= 0]))

    @classmethod
    def of_mask(cls, mask: np.ndarray) -> "SongSet":
        """Of the songs that are true in bool (N,), which is not copied."""
        few = np.count_nonzero(mask) <= FEW_SONGS
        return cls(rows=np.flatnonzero(mask)) if few else cls(mask=mask)

    def __len__(self) -> int:
        return self._count

    def holds(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which of the song rows, int (n,) from 0 on, are in the set."""
        if self.mask is not None:
            inside = rows < len(self.mask)
            return np.asarray(inside & self.mask[np.where(inside, rows, 0)])
        assert self.rows is not None
        if not len(self.rows):
            return np.zeros(len(rows), dtype=np.bool_)
        return np.asarray(self.rows[np.minimum(np.searchsorted(self.rows, rows), len(self.rows) - 1)] == rows)

    def between(self, first: int, last: int) -> np.ndarray:
        """int64 (n,), ascending: the songs from row `first` up to `last`."""
        if self.mask is not None:
            return first + np.flatnonzero(self.mask[first:last])
        assert self.rows is not None
        return np.asarray(self.rows[slice(*np.searchsorted(self.rows, [first, last]))], dtype=np.int64)

    def joined(self, later: "SongSet", first: int) -> "SongSet":
        """With the songs of another set, whose rows count from row `first` on, behind all of this one."""
        if self.mask is None and later.mask is None and len(self) + len(later) <= FEW_SONGS:
            return SongSet(rows=np.concatenate([self.between(0, first), first + later.between(0, later.end)]))
        mask = np.zeros(first + later.end, dtype=np.bool_)
        mask[self.between(0, first)] = True
        mask[first + later.between(0, later.end)] = True
        return SongSet(mask=mask)

    @property
    def end(self) -> int:
        """A row behind all songs of the set."""
        if self.mask is not None:
            return len(self.mask)
        assert self.rows is not None
        return int(self.rows[-1]) + 1 if len(self.rows) else 0

    @cached_property
    def bits(self) -> np.ndarray:
        """uint8 (N / 8,): the mask with a bit a song, the first in the lowest bit."""
        assert self.mask is not None
        return np.packbits(self.mask, bitorder="little")


def listed_and_fitting(rows: np.ndarray | None, fitting: SongSet | None) -> SongSet | None:
    """The songs of both: of the rows of a list, int (any,), -1 for unknown songs, and of those that fit; None: all."""
    if rows is None:
        return fitting
    listed = SongSet.of_rows(rows)
    if fitting is None:
        return listed
    assert listed.rows is not None
    return SongSet(rows=listed.rows[fitting.holds(listed.rows)])


def masks_kept(num_songs: int) -> int:
    """How many masks of a catalog are kept."""
    return max(1, min(MASKS_KEPT, MASKS_BYTES // max(1, num_songs)))


class SongMasks:
    """Answers which songs of a catalog fit what is wanted. Masks are kept, and safe to share between threads."""

    def __init__(self, catalog: Catalog, earlier: "SongMasks | None" = None) -> None:
        """`earlier` are those of the songs before the ones of this catalog, whose rows go on behind them."""
        table = with_folded(catalog.table)
        self.num_songs, self._earlier = len(catalog), earlier
        self._artists = columns.one_array(table.column(ARTIST_NAME))
        self._released = _column(table, columns.RELEASED)
        self._markets = _column(table, columns.MARKETS)
        all_songs = self.num_songs + (earlier.num_songs if earlier else 0)
        self.fitting = lru_cache(maxsize=masks_kept(all_songs))(self._fitting)

    def lookups(self, outcome: str) -> int:
        """How many sets asked for so far were `hits`, kept from before, or `misses`."""
        return int(getattr(self.fitting.cache_info(), outcome))

    def _fitting(self, attributes: SongAttributes) -> SongSet:
        """The songs that are known to fit.

        Raises `FieldError` for an artist or a market that no song has, and where release days or markets are asked
        for and the catalog tells none.
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
        """The songs of the own catalog that fit, by rows of it. Raises as `_fitting`."""
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
                raise FieldError("market", f"no song is available in market {attributes.market!r}; there are {shown}")
            rows = pc.list_parent_indices(markets).to_numpy()[here]
            in_market = np.zeros(self.num_songs, dtype=np.bool_)
            in_market[rows] = True
            fits &= in_market
        return SongSet.of_mask(fits)

    def _by_artists(self, artists: tuple[str, ...]) -> np.ndarray:
        """bool (N,): the songs of any of the artists."""
        names = pa.array([fold(name) or None for name in artists], pa.string())  # none is the name of songs without
        unknown = pc.index_in(names, value_set=self._artists.dictionary).is_null().to_pylist()
        if any(unknown):
            raise FieldError("artists", f"no song of the catalog is by {artists[unknown.index(True)]!r}")
        codes = pc.is_in(self._artists.dictionary, value_set=names).to_numpy(zero_copy_only=False)
        return np.asarray(codes[self._artists.indices.to_numpy()])

    def _described(self, values: pa.Array | None, where: str, what: str) -> pa.Array:
        if values is None or values.null_count == len(values):
            raise FieldError(where, f"no song of the catalog has {what}; give a table that does to `rayrec describe`")
        return values


def _column(table: pa.Table, name: str) -> pa.Array | None:
    """One array; None where the table has no such column."""
    return columns.one_array(table.column(name)) if name in table.column_names else None


def _true(values: pa.BooleanArray) -> np.ndarray:
    return np.asarray(pc.fill_null(values, False).to_numpy(zero_copy_only=False))


NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class AnswerFilter:
    """The songs that one answer may hold: those allowed, without those excluded.

    Rows past the catalog of who answers, songs that came later, do no harm.
    """

    excluded: np.ndarray = field(default_factory=lambda: NOTHING)  # int (any,), song rows, some perhaps twice
    allowed: SongSet | None = None  # None: every song
    new_only: bool = False  # True where every song that the user has played is excluded

    def excluded_rows(self, num_songs: int) -> np.ndarray:
        """int (any,), ascending: the excluded rows of a catalog, each once."""
        return np.unique(self.excluded[self.excluded < num_songs])

    def qualify(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which of the song rows, int (n,), qualify, without a pass over the catalog."""
        qualifies = ~np.isin(rows, self.excluded)
        return np.asarray(qualifies if self.allowed is None else qualifies & self.allowed.holds(rows))

    def qualifying(self, num_songs: int, at_once: int) -> Iterator[np.ndarray]:
        """int64 (n,) each, ascending: the songs of a catalog that qualify, about `at_once` after the other."""
        excluded = self.excluded_rows(num_songs)
        count = num_songs if self.allowed is None else len(self.allowed)
        step = max(at_once, at_once * num_songs // max(1, count))
        for first in range(0, num_songs, step):
            last = min(first + step, num_songs)
            rows = np.arange(first, last) if self.allowed is None else self.allowed.between(first, last)
            near = excluded[slice(*np.searchsorted(excluded, [first, last]))]
            yield rows[~np.isin(rows, near, assume_unique=True)]

    def mask_scores(self, scores: np.ndarray) -> None:
        """Set float (N,) scores of songs that do not qualify to -inf, in place."""
        if self.allowed is not None:
            outside = np.ones(len(scores), dtype=np.bool_)
            outside[self.allowed.between(0, len(scores))] = False
            scores[outside] = -np.inf
        scores[self.excluded[self.excluded < len(scores)]] = -np.inf


def first_of_order(order: np.ndarray, qualify: Callable[[np.ndarray], np.ndarray], count: int) -> np.ndarray:
    """The first `count` of song rows, int (any,), for which `qualify` is true: bool (n,) of int (n,).

    Rows are looked at some at a time until there are enough, so that the cost grows with the songs left out before.
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
    """The filters of each user, with the songs of the user's history excluded as well."""
    heard = np.split(histories.songs, histories.offsets[1:-1]) if len(histories) else []
    if filters is None:
        return [AnswerFilter(excluded=songs, new_only=True) for songs in heard]
    pairs = zip(filters, heard, strict=True)
    return [
        replace(answer_filter, excluded=np.concatenate([answer_filter.excluded, songs]), new_only=True)
        for answer_filter, songs in pairs
    ]
