"""What retrievers and features need of some queries, computed once: the plays before each and the songs in them.

Q queries, N songs, E plays of all queries together, P pairs of a query and a song that its user has played.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Queries, first_of_each, offsets_of, ranges, stable_order

LATEST = 5_000  # plays before a query that are looked at
LATEST_LIKES = 1_000  # likes before a query that are looked at
HOUR_MS = 3_600_000
SESSION_GAP_MS = HOUR_MS // 2  # a longer pause ends a session
DECAY = 0.5  # of base level activation in ACT-R: a play t ago counts t^-0.5


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """E pairs of a query and a song, sorted by query and song, each once."""

    num_songs: int
    rows: np.ndarray  # int64 (E,), the query
    songs: np.ndarray  # int64 (E,)

    @property
    def keys(self) -> np.ndarray:
        """int64 (E,), ascending: one number for each pair."""
        return np.asarray(self.rows * self.num_songs + self.songs)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """int64: the position of each key, -1 where the pair is not there."""
        own = self.keys
        if not len(own):
            return np.full(len(keys), -1, dtype=np.int64)
        position = np.minimum(np.searchsorted(own, keys), len(own) - 1)
        return np.where(own[position] == keys, position, -1)


@dataclass(frozen=True, kw_only=True)
class UserSongs(Pairs):
    """The songs that the user of each query has played before it, among the last 5,000 plays."""

    plays: np.ndarray  # int64 (P,), how often
    back: np.ndarray  # int64 (P,), plays since the last time, 0 for the song played last
    hours: np.ndarray  # float32 (P,), from the last time to the query
    base_level: np.ndarray  # float32 (P,), ACT-R: log of the sum of (plays since)^-0.5 over all times
    base_level_hours: np.ndarray  # float32 (P,), the same with hours since
    session_plays: np.ndarray  # int64 (P,), times in the session that is going on
    skips: np.ndarray  # int64 (P,), times skipped


@dataclass(frozen=True, kw_only=True)
class QueryBatch:
    """Some queries with their recent plays, oldest first, and the taste vectors where a network gave them.

    Songs from `num_songs` on, which came after a fit, are left out.
    """

    histories: Histories
    queries: Queries
    num_songs: int
    offsets: np.ndarray  # int64 (Q + 1,), the plays of each query
    rows: np.ndarray  # int64 (E,), the query of each play
    songs: np.ndarray  # int64 (E,)
    back: np.ndarray  # int64 (E,), plays since, 0 for the last
    played_at: np.ndarray  # int64 (E,), ms UTC
    in_session: np.ndarray  # bool (E,), in the session that the query goes on
    repeated: np.ndarray  # bool (E,), an earlier one of these plays is of the same song
    skipped: np.ndarray  # bool (E,), false where the data does not say
    user_songs: UserSongs
    liked: Pairs  # the songs that the user of each query had liked, the last 1,000 likes
    short_vectors: np.ndarray  # float32 (Q, D)
    long_vectors: np.ndarray  # float32 (Q, D)

    def __len__(self) -> int:
        return len(self.queries)

    @classmethod
    def of(
        cls,
        histories: Histories,
        queries: Queries,
        num_songs: int,
        *,
        short_vectors: np.ndarray,
        long_vectors: np.ndarray,
    ) -> QueryBatch:
        """From histories, of which the plays that the queries have seen are used and no others."""
        ends = histories.offsets[queries.rows] + queries.seen
        counts = np.minimum(queries.seen, LATEST)
        plays = ranges(ends - counts, counts)
        rows = np.repeat(np.arange(len(queries)), counts)
        known = histories.songs[plays] < num_songs
        plays, rows = plays[known], rows[known]
        offsets = offsets_of(np.bincount(rows, minlength=len(queries)))
        back = offsets[1:][rows] - 1 - np.arange(len(rows))
        songs, played_at = histories.songs[plays].astype(np.int64), histories.played_at[plays]
        in_session = _in_session(offsets, rows, played_at, queries.at)
        skipped = np.zeros(len(plays), dtype=bool) if histories.skipped is None else histories.skipped[plays]
        user_songs, repeated = _user_songs(rows, songs, back, played_at, in_session, skipped, queries.at, num_songs)
        return cls(
            histories=histories,
            queries=queries,
            num_songs=num_songs,
            offsets=offsets,
            rows=rows,
            songs=songs,
            back=back,
            played_at=played_at,
            in_session=in_session,
            repeated=repeated,
            skipped=skipped,
            user_songs=user_songs,
            liked=_liked(histories, queries, num_songs),
            short_vectors=short_vectors,
            long_vectors=long_vectors,
        )

    @property
    def last_songs(self) -> np.ndarray:
        """int64 (Q,): the song played last, -1 where there is none."""
        last = np.full(len(self), -1, dtype=np.int64)
        some = np.diff(self.offsets) > 0
        last[some] = self.songs[self.offsets[1:][some] - 1]
        return last

    def latest(self, count: int) -> np.ndarray:
        """int64: positions of the last `count` plays of each query, in order."""
        counts = np.minimum(np.diff(self.offsets), count)
        return ranges(self.offsets[1:] - counts, counts)

    def keys(self, rows: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """int64: one number for each pair of a query and a song, as `Pairs` spells them."""
        return np.asarray(rows * self.num_songs + songs)


def _in_session(offsets: np.ndarray, rows: np.ndarray, played_at: np.ndarray, at: np.ndarray) -> np.ndarray:
    """bool (E,): no pause of over 30 minutes lies between the play and the query."""
    following = np.append(played_at[1:], 0)
    last = offsets[1:][np.diff(offsets) > 0] - 1
    following[last] = at[rows[last]]
    pauses = np.concatenate([[0], np.cumsum(following - played_at > SESSION_GAP_MS)])
    return np.asarray(pauses[offsets[1:]][rows] == pauses[:-1])


def _user_songs(
    rows: np.ndarray,
    songs: np.ndarray,
    back: np.ndarray,
    played_at: np.ndarray,
    in_session: np.ndarray,
    skipped: np.ndarray,
    at: np.ndarray,
    num_songs: int,
) -> tuple[UserSongs, np.ndarray]:
    """The songs of each query, and bool (E,): plays that repeat an earlier one."""
    keys = rows * num_songs + songs
    order = stable_order(keys)  # plays of one query and song together, in the order of time
    first = first_of_each(keys[order])
    last = order[np.append(first[1:], len(order)) - 1] if len(order) else order
    hours = np.maximum(0, at[rows] - played_at) / HOUR_MS

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values[order], first) if len(first) else values[:0]

    repeated = np.ones(len(order), dtype=bool)
    repeated[order[first]] = False
    user_songs = UserSongs(
        num_songs=num_songs,
        rows=rows[last],
        songs=songs[last],
        plays=np.diff(np.append(first, len(order))),
        back=back[last],
        hours=hours[last].astype(np.float32),
        base_level=np.log(total((back + 1.0) ** -DECAY)).astype(np.float32),
        base_level_hours=np.log(total((hours + 0.05) ** -DECAY)).astype(np.float32),
        session_plays=total(in_session.astype(np.int64)),
        skips=total(skipped.astype(np.int64)),
    )
    return user_songs, repeated


def _liked(histories: Histories, queries: Queries, num_songs: int) -> Pairs:
    """The songs that the user of each query liked before it."""
    likes = histories.likes
    if likes is None:
        return Pairs(num_songs=num_songs, rows=np.zeros(0, np.int64), songs=np.zeros(0, np.int64))
    counts = likes.lengths[queries.rows]
    entries, rows = ranges(likes.offsets[queries.rows], counts), np.repeat(np.arange(len(queries)), counts)
    before = likes.played_at[entries] < queries.at[rows]
    entries, rows = entries[before], rows[before]
    ends = np.cumsum(np.bincount(rows, minlength=len(queries)))
    latest = (ends[rows] - np.arange(len(rows)) <= LATEST_LIKES) & (likes.songs[entries] < num_songs)
    keys = np.unique(rows[latest] * num_songs + likes.songs[entries[latest]])
    liked_rows, songs = np.divmod(keys, max(1, num_songs))
    return Pairs(num_songs=num_songs, rows=liked_rows, songs=songs)
