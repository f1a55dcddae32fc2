"""The newest sessions of each song, and the songs of each of these sessions, as VMIS-kNN keeps them.

S sessions, N songs, E songs of all sessions together, L entries of all songs together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayrec.data.histories import Histories, user_hash
from rayrec.embeddings.word2vec import cut_long, cut_sessions
from rayrec.recommend.retrieval.ragged import first_of_each, offsets_of, places_in, ranges, stable_order

NEWEST = 50  # sessions kept for each song
MAX_SESSION = 100  # songs; longer sessions, and histories without times, are cut into pieces
NO_GROUP = -1
KEPT = 100  # songs of a group, the most played


@dataclass(frozen=True, kw_only=True)
class SessionPostings:
    """Sessions, newest first, and for each song the newest `newest` sessions that hold it.

    A session holds each of its songs once, at its last place. Only sessions among the newest of one of their songs are
    kept, so the arrays are the same whatever the buckets in which the histories came, and in whatever order.
    """

    newest: int  # m, sessions kept for a song
    keys: np.ndarray  # uint64 (S,), a hash of each session; breaks ties in time, and tells a session that came twice
    ended_at: np.ndarray  # int64 (S,), ms UTC, descending
    offsets: np.ndarray  # int64 (S + 1,)
    songs: np.ndarray  # int32 (E,), in the order of play
    song_offsets: np.ndarray  # int64 (N + 1,)
    song_sessions: np.ndarray  # int32 (L,), newest first
    song_places: np.ndarray  # uint8 (L,), the place of the song in the session, from 0

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_songs(self) -> int:
        """N."""
        return len(self.song_offsets) - 1

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int, newest: int = NEWEST) -> SessionPostings:
        """From histories, cut at pauses of over 30 minutes; sessions of a single song say nothing and are left out."""
        songs, cuts = cut_long(cut_sessions(histories), MAX_SESSION)
        lengths = np.diff(cuts)
        session = np.repeat(np.arange(len(lengths)), lengths)
        order = np.lexsort((np.arange(len(songs)), songs, session))
        last = np.ones(len(order), dtype=bool)
        last[:-1] = (np.diff(session[order]) != 0) | (np.diff(songs[order]) != 0)
        kept = np.sort(order[last])
        counts = np.bincount(session[kept], minlength=len(lengths))
        kept, whole = kept[counts[session[kept]] > 1], counts > 1
        users = user_hash(histories.user_ids)[np.searchsorted(histories.offsets, cuts[:-1], side="right") - 1]
        keys = users ^ _mixed(histories.played_at[np.minimum(cuts[:-1], max(0, len(songs) - 1))].astype(np.uint64))
        return _newest_sessions(
            _mixed(keys[whole]) + _content_hash(songs[kept], offsets_of(counts[whole])),
            histories.played_at[cuts[1:][whole] - 1],
            counts[whole],
            songs[kept],
            num_songs,
            newest,
        )

    @classmethod
    def merge(cls, parts: Sequence[SessionPostings]) -> SessionPostings:
        """What `fit` gives for the histories of all parts together; a catalog may have grown between them."""
        return _newest_sessions(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.ended_at for part in parts]),
            np.concatenate([np.diff(part.offsets) for part in parts]),
            np.concatenate([part.songs for part in parts]),
            max(part.num_songs for part in parts),
            parts[0].newest,
        )

    def of_songs(self, first: int, last: int) -> SessionPostings:
        """The part for the songs from row `first` up to `last`: their entries, with the whole sessions behind them.

        The parts of all ranges of songs merge into the whole again, so that each range can be reduced by itself.
        """
        bounds = self.song_offsets[np.minimum([first, last], self.num_songs)]
        entries = slice(int(bounds[0]), int(bounds[1]))
        sessions = np.unique(self.song_sessions[entries])
        counts = np.diff(self.offsets)[sessions]
        songs = self.songs[ranges(self.offsets[:-1][sessions], counts)]
        parts = (self.keys[sessions], self.ended_at[sessions], counts, songs)
        return _newest_sessions(*parts, self.num_songs, self.newest, (first, last))


def _newest_sessions(
    keys: np.ndarray,
    ended_at: np.ndarray,
    counts: np.ndarray,
    songs: np.ndarray,
    num_songs: int,
    newest: int,
    within: tuple[int, int] | None = None,
) -> SessionPostings:
    """Order sessions, keep those among the newest of one of their songs (of those `within` rows) and index them."""
    starts = offsets_of(counts)[:-1]
    order = np.lexsort((keys, -ended_at))
    order = order[first_of_each(keys[order])]  # the same session twice has the same time, so it is adjacent
    session, song, place = _entries(counts[order], songs[ranges(starts[order], counts[order])])
    if within is not None:
        inside = (song >= within[0]) & (song < within[1])
        session, song, place = session[inside], song[inside], place[inside]
    by_song = stable_order(song.astype(np.int64))  # sessions stay in order: newest first
    kept = by_song[places_in(song[by_song]) < newest]
    used = np.zeros(len(order), dtype=bool)
    used[session[kept]] = True
    order, renumbered = order[used], np.cumsum(used) - 1
    return SessionPostings(
        newest=newest,
        keys=keys[order],
        ended_at=ended_at[order],
        offsets=offsets_of(counts[order]),
        songs=songs[ranges(starts[order], counts[order])].astype(np.int32),
        song_offsets=offsets_of(np.bincount(song[kept], minlength=num_songs)),
        song_sessions=renumbered[session[kept]].astype(np.int32),
        song_places=place[kept].astype(np.uint8),
    )


def _entries(counts: np.ndarray, songs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The session, the song and the place of each song of sessions."""
    session = np.repeat(np.arange(len(counts)), counts)
    return session, songs, np.arange(len(songs)) - np.repeat(np.cumsum(counts) - counts, counts)


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64: the finalizer of splitmix64, which spreads any difference over all bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def _content_hash(songs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64: a hash of the songs of each session in their order."""
    _, _, place = _entries(np.diff(offsets), songs)
    mixed = _mixed(songs.astype(np.uint64) * np.uint64(1 << 20) + place.astype(np.uint64) + np.uint64(1))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return np.asarray(sums[offsets[1:]] - sums[offsets[:-1]])


@dataclass(frozen=True, kw_only=True)
class SongGroups:
    """The group of each song, and the songs of each group."""

    of_song: np.ndarray  # int32 (N,), the group; -1 where it is not known
    offsets: np.ndarray  # int64 (G + 1,)
    songs: np.ndarray  # int32, the first 100 songs of each group by descending plays, equal ones by row

    def __bool__(self) -> bool:
        return len(self.songs) > 0

    @classmethod
    def build(cls, of_song: np.ndarray, plays: np.ndarray) -> SongGroups:
        """From the group of each song, int (N,), -1 where it is not known, and its plays, int (N,)."""
        known = np.flatnonzero(of_song >= 0)
        order = known[np.lexsort((known, -plays[known], of_song[known]))]
        order = order[places_in(of_song[order]) < KEPT]
        groups = int(of_song.max(initial=-1)) + 1
        return cls(
            of_song=of_song.astype(np.int32),
            offsets=offsets_of(np.bincount(of_song[order], minlength=groups)),
            songs=order.astype(np.int32),
        )

    def with_added(self, rows: np.ndarray, siblings: np.ndarray) -> SongGroups:
        """With songs that came later, int64 (n,) rows, each in the group of its sibling, -1 where it has none.

        Siblings are song rows; those without a group make new ones. The lists of songs stay as they are.
        """
        of_song = np.full(max(len(self.of_song), int(rows.max(initial=-1)) + 1), NO_GROUP, dtype=np.int32)
        of_song[: len(self.of_song)] = self.of_song
        group = np.where(siblings >= 0, of_song[np.clip(siblings, 0, len(of_song) - 1)], NO_GROUP)
        alone = np.flatnonzero((siblings >= 0) & (group == NO_GROUP))
        names, places = np.unique(siblings[alone], return_inverse=True)
        groups = len(self.offsets) - 1
        group[alone] = groups + places
        of_song[rows] = np.where(group >= 0, group, of_song[rows])
        offsets = np.concatenate([self.offsets, np.full(len(names), self.offsets[-1])])
        return SongGroups(of_song=of_song, offsets=offsets, songs=self.songs)

    def listing(self, rows: np.ndarray) -> SongGroups:
        """The same groups that list the songs at `rows`, int64 (n,) ascending, and no others, the last rows first."""
        group = self.of_song[rows]
        order = np.lexsort((-rows, group))
        order = order[group[order] >= 0]
        order = order[places_in(group[order]) < KEPT]
        counts = np.bincount(group[order], minlength=len(self.offsets) - 1)
        return replace(self, offsets=offsets_of(counts), songs=rows[order].astype(np.int32))
