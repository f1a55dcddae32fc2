"""Filters: which songs one answer may hold. The one way in which songs are filtered.

N songs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.catalog import ARTIST_NAME, Catalog, fold, with_folded
from rayrec.data.histories import Histories
from rayrec.errors import FieldError

MASKS_KEPT = 64  # of those asked for last, at most
MASKS_BYTES = 32_000_000  # that they take together, a byte a song each; one is kept whatever its size
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


def masks_kept(num_songs: int) -> int:
    """How many masks of a catalog are kept."""
    return max(1, min(MASKS_KEPT, MASKS_BYTES // max(1, num_songs)))


class SongMasks:
    """Answers which songs of a catalog fit what is wanted. Masks are kept, and safe to share between threads."""

    def __init__(self, catalog: Catalog) -> None:
        table = with_folded(catalog.table)
        self.num_songs = len(catalog)
        self._artists = columns.one_array(table.column(ARTIST_NAME))
        self._released = _column(table, columns.RELEASED)
        self._markets = _column(table, columns.MARKETS)
        self.mask = lru_cache(maxsize=masks_kept(self.num_songs))(self._mask)

    def lookups(self, outcome: str) -> int:
        """How many masks asked for so far were `hits`, kept from before, or `misses`."""
        return int(getattr(self.mask.cache_info(), outcome))

    def _mask(self, attributes: SongAttributes) -> np.ndarray:
        """bool (N,), read-only: true for the songs that are known to fit.

        Raises `FieldError` for an artist or a market that no song has, and where release days or markets are asked
        for and the catalog tells none.
        """
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
        fits.flags.writeable = False
        return fits

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
    allowed: np.ndarray | None = None  # bool (N,); None: every song
    new_only: bool = False  # True where every song that the user has played is excluded

    def excluded_rows(self, num_songs: int) -> np.ndarray:
        """int (any,): the excluded rows of a catalog, each once."""
        return np.unique(self.excluded[self.excluded < num_songs])

    def mask(self, num_songs: int) -> np.ndarray:
        """bool (num_songs,): true for the songs that qualify. The caller's own copy."""
        mask = np.zeros(num_songs, dtype=np.bool_)
        if self.allowed is None:
            mask[:] = True
        else:
            mask[: len(self.allowed)] = self.allowed[:num_songs]
        mask[self.excluded[self.excluded < num_songs]] = False
        return mask

    def qualify(self, rows: np.ndarray) -> np.ndarray:
        """bool (n,): which of the song rows, int (n,), qualify, without a pass over the catalog."""
        qualifies = ~np.isin(rows, self.excluded)
        if self.allowed is not None:
            known = rows < len(self.allowed)
            qualifies &= known & self.allowed[np.where(known, rows, 0)]
        return np.asarray(qualifies)

    def mask_scores(self, scores: np.ndarray) -> None:
        """Set float (N,) scores of songs that do not qualify to -inf, in place."""
        if self.allowed is not None:
            known = self.allowed[: len(scores)]
            scores[: len(known)][~known] = -np.inf
            scores[len(known) :] = -np.inf
        scores[self.excluded[self.excluded < len(scores)]] = -np.inf


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
