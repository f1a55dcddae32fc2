"""Histories, the plays of many users as flat arrays plus offsets; queries; and hashes of user ids.

U users, P plays of all users together, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.ragged import group_of_each_item, offsets_of, ranges

HASH_KEY = "rayrec user hash"  # 16 bytes; must never change, because buckets on disk depend on it
PLAY_COLUMNS = (columns.SONGS, columns.PLAYED_AT, columns.CONTEXTS, columns.SKIPPED)  # the values of each play
GOLDEN_STEP = np.uint64(0x9E3779B97F4A7C15)  # step of the counter of SplitMix64: 2⁶⁴ / golden ratio, made odd


def user_hash(user_ids: Sequence[str] | np.ndarray, salt: str = "") -> np.ndarray:
    """uint64 (U,): a hash of each user id that is the same on every machine and in every run."""
    salted = np.asarray([salt + user for user in user_ids], dtype=object)
    return np.asarray(pd.util.hash_array(salted, hash_key=HASH_KEY, categorize=False))


def uniform_draws(hashes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float64 in [0, 1): one number for each hash and step, uint64 arrays that broadcast; the same in every run."""
    bits = mix_bits(hashes + steps.astype(np.uint64) * GOLDEN_STEP)
    return np.asarray((bits >> np.uint64(11)) * 2.0**-53)


def mix_bits(values: np.ndarray) -> np.ndarray:
    """uint64: the finalizer of SplitMix64 (Steele, Lea and Flood 2014), which spreads any difference over all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


@dataclass(frozen=True, kw_only=True)
class Histories:
    """The plays of U users in the order of time. The plays of row u are at offsets[u]:offsets[u + 1]."""

    user_ids: np.ndarray  # object (U,), strings
    offsets: np.ndarray  # int64 (U + 1,), from 0 to P
    songs: np.ndarray  # int32 (P,), rows of the song table
    played_at: np.ndarray  # int64 (P,), ms since 1970 UTC, ascending within a user
    contexts: np.ndarray | None = None  # int32 (P,), bit sets
    skipped: np.ndarray | None = None  # bool (P,)
    likes: "Histories | None" = None  # the songs that each user liked, and when, with one play per like
    totals: np.ndarray | None = None  # int64 (U,), number of all plays of each user, of which these are the first

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.user_ids) + 1:
            raise ValueError(
                f"expected {len(self.user_ids) + 1} offsets for {len(self.user_ids)} users, got {len(self.offsets)}"
            )
        if self.totals is not None and len(self.totals) != len(self.user_ids):
            raise ValueError(f"expected {len(self.user_ids)} totals, one per user, got {len(self.totals)}")
        if self.likes is not None and len(self.likes) != len(self.user_ids):
            raise ValueError(f"expected likes of {len(self.user_ids)} users, got likes of {len(self.likes)}")
        for name in PLAY_COLUMNS:
            values = getattr(self, name)
            if values is not None and len(values) != self.offsets[-1]:
                raise ValueError(f"{name} has {len(values)} values, expected {self.offsets[-1]}, the last offset")

    def __len__(self) -> int:
        return len(self.user_ids)

    @property
    def num_plays(self) -> int:
        """P: the number of plays."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """int64 (U,): the number of plays of each user."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """int64 (P,): the user's row of each play."""
        return group_of_each_item(self.lengths)

    @property
    def places(self) -> np.ndarray:
        """int64 (P,): the position of each play in its user's history, from 0."""
        positions: np.ndarray = np.arange(self.num_plays) - np.repeat(self.offsets[:-1], self.lengths)
        return positions

    @classmethod
    def from_lists(
        cls,
        songs: Sequence[Sequence[int]],
        played_at: Sequence[Sequence[int]],
        user_ids: Sequence[str] | None = None,
        contexts: Sequence[Sequence[int]] | None = None,
        skipped: Sequence[Sequence[bool]] | None = None,
        likes: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> "Histories":
        """Create from one list per user, in the order of time; `user_ids` are 0, 1, 2 ... by default.

        `likes` are pairs of a song and the moment at which the user liked it, ms UTC.
        """

        def flatten(lists: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
            return np.concatenate([np.asarray(values, dtype=dtype) for values in lists] or [np.zeros(0, dtype)])

        ids = [str(row) for row in range(len(songs))] if user_ids is None else list(user_ids)
        return cls(
            user_ids=np.array(ids, dtype=object),
            offsets=offsets_of([len(values) for values in songs]),
            songs=flatten(songs, np.int32),
            played_at=flatten(played_at, np.int64),
            contexts=None if contexts is None else flatten(contexts, np.int32),
            skipped=None if skipped is None else flatten(skipped, np.bool_),
            likes=None
            if likes is None
            else cls.from_lists(
                [[song for song, _ in user_likes] for user_likes in likes],
                [[at for _, at in user_likes] for user_likes in likes],
                ids,
            ),
        )

    @classmethod
    def from_arrow(cls, batch: pa.Table | pa.RecordBatch) -> "Histories":
        """Create from rows of the histories schema, without a loop over rows."""
        table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        table = table.combine_chunks()

        def list_offsets(name: str) -> np.ndarray:
            offsets = table.column(name).chunk(0).offsets.to_numpy().astype(np.int64)
            return np.asarray(offsets - offsets[0])

        def flat_values(name: str) -> np.ndarray | None:
            if name not in table.column_names or table.num_rows == 0:
                return None
            column = table.column(name).chunk(0)
            if column.null_count == table.num_rows:
                return None
            return np.asarray(column.flatten().to_numpy(zero_copy_only=False))

        plays: dict[str, Any] = {name: flat_values(name) for name in PLAY_COLUMNS}
        if plays[columns.SONGS] is None or plays[columns.PLAYED_AT] is None:
            return cls.from_lists([], [])
        user_ids = table.column(columns.USER).chunk(0).to_numpy(zero_copy_only=False)
        liked, liked_at = flat_values(columns.LIKED), flat_values(columns.LIKED_AT)
        likes = None
        if liked is not None and liked_at is not None:
            likes = cls(user_ids=user_ids, offsets=list_offsets(columns.LIKED), songs=liked, played_at=liked_at)
        return cls(
            user_ids=user_ids,
            offsets=list_offsets(columns.SONGS),
            **plays,
            likes=likes,
            totals=table.column(columns.TOTAL).to_numpy() if columns.TOTAL in table.column_names else None,
        )

    def to_arrow(self) -> pa.Table:
        """Return rows of the histories schema; contexts, skipped, likes and totals only if they are not None."""

        def list_array(values: np.ndarray, offsets: np.ndarray = self.offsets) -> pa.Array:
            return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))

        data = {columns.USER: pa.array(self.user_ids, pa.string())}
        data |= {name: list_array(values) for name in PLAY_COLUMNS if (values := getattr(self, name)) is not None}
        if self.likes is not None:
            data[columns.LIKED] = list_array(self.likes.songs, self.likes.offsets)
            data[columns.LIKED_AT] = list_array(self.likes.played_at, self.likes.offsets)
        schema = pa.schema([columns.HISTORIES.field(name) for name in data])
        table = pa.table(data, schema=schema)
        return table if self.totals is None else table.append_column(columns.TOTAL, pa.array(self.totals))

    def columns_at(self, plays: np.ndarray | slice) -> dict[str, Any]:
        """Return column name -> values of the plays at `plays`, int (n,) or bool (P,); None for a missing column."""
        return {name: None if (values := getattr(self, name)) is None else values[plays] for name in PLAY_COLUMNS}

    def keep(self, mask: np.ndarray) -> "Histories":
        """Return the plays where `mask`, bool (P,), is true, and all likes; users without such plays stay."""
        kept_before = offsets_of(mask)
        return replace(self, offsets=kept_before[self.offsets], **self.columns_at(mask))

    def span(self, first: int, last: int) -> "Histories":
        """Return each user's plays at positions `first` to `last` - 1; the cost does not depend on the other plays."""
        starts = np.minimum(self.offsets[:-1] + first, self.offsets[1:])
        lengths = np.minimum(self.offsets[:-1] + last, self.offsets[1:]) - starts
        return replace(self, offsets=offsets_of(lengths), **self.columns_at(ranges(starts, lengths)))

    def take(self, rows: np.ndarray) -> "Histories":
        """Return the users at `rows`, int (R,) or bool (U,), in that order."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=np.int64)
        lengths = self.lengths[rows]
        return Histories(
            user_ids=self.user_ids[rows],
            offsets=offsets_of(lengths),
            **self.columns_at(ranges(self.offsets[rows], lengths)),
            likes=None if self.likes is None else self.likes.take(rows),
            totals=None if self.totals is None else self.totals[rows],
        )

    def before(self, cut: int | None) -> "Histories":
        """Return the plays and likes before `cut` (ms UTC; None: all) of the users with such plays."""
        selected = self if cut is None else self.keep(self.played_at < cut)
        if selected.likes is not None and cut is not None:
            selected = replace(selected, likes=selected.likes.keep(selected.likes.played_at < cut))
        return selected.take(selected.lengths > 0)

    def last_songs(self, count: int) -> list[np.ndarray]:
        """Return the last `count` songs of each user, int32, oldest first."""
        ends = self.offsets[1:]
        starts = np.maximum(self.offsets[:-1], ends - count)
        return [self.songs[start:end] for start, end in zip(starts, ends, strict=True)]


def concatenate(parts: Sequence[Histories]) -> Histories:
    """Return the users of all parts as one batch. Contexts, skips, likes and totals stay if every part has them."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return Histories.from_lists([], [])
    starts = np.cumsum([0] + [part.num_plays for part in parts])

    def concatenate_field(name: str) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if any(array is None for array in arrays) else np.concatenate(arrays)

    offsets = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
    likes = [part.likes for part in parts if part.likes is not None]
    return Histories(
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        likes=concatenate(likes) if len(likes) == len(parts) else None,
        **{name: concatenate_field(name) for name in ("user_ids", *PLAY_COLUMNS, "totals")},
    )


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Q requests for recommendations, each for one user after a number of that user's plays.

    The histories may hold later plays, which must not be used to answer.
    """

    rows: np.ndarray  # int64 (Q,), row of the user in the histories
    plays_before: np.ndarray  # int64 (Q,), number of the user's plays before the request, at least 0
    at: np.ndarray  # int64 (Q,), ms UTC, the moment of the request

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, selected: np.ndarray | slice) -> "Queries":
        """Return the queries at `selected`."""
        return Queries(rows=self.rows[selected], plays_before=self.plays_before[selected], at=self.at[selected])

    @classmethod
    def at_end(cls, histories: Histories, at: int | np.ndarray) -> "Queries":
        """Return one query per user, after all plays, at the moment `at` (ms UTC), one for all users or one each."""
        timestamps = np.broadcast_to(np.asarray(at, dtype=np.int64), (len(histories),))
        return cls(rows=np.arange(len(histories)), plays_before=histories.lengths, at=timestamps)

    @classmethod
    def before_plays(cls, histories: Histories, plays: np.ndarray) -> "Queries":
        """Return the queries whose targets are the plays at positions `plays`, int (Q,), of the flat arrays."""
        rows = np.searchsorted(histories.offsets, plays, side="right") - 1
        return cls(rows=rows, plays_before=plays - histories.offsets[rows], at=histories.played_at[plays])
