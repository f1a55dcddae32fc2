"""The data that retrievers read: play counts, rules, sessions and groups of songs, as flat arrays.

Each bucket is counted separately. Its counts are split by ranges of songs and stored as bytes; the counts of a range
are merged over all buckets, and range_join.py joins the ranges. The result is saved and memory-mapped as one
`Retrieval`. As in VMIS-kNN, only the newest sessions of each song are kept, with all their songs.

Shapes: N songs, T pairs of a day and a song played on it, R rules, S sessions, E songs of all sessions together, L
entries of all songs together, G groups. In counts of a range of songs, N is the number of songs of the range, numbered
from 0; followers and the songs of sessions are always rows of the catalog.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories, mix_bits, user_hash
from rayrec.data.moments import DAY_MS
from rayrec.data.ragged import (
    group_of_each_item,
    group_starts,
    offsets_of,
    positions_in_groups,
    ranges,
    stable_order,
    sum_groups,
)
from rayrec.data.split import FitRange
from rayrec.embeddings.word2vec import cut_long, cut_sessions
from rayrec.storage.workspace import Workspace

NOT_PLAYED = np.iinfo(np.int32).max  # first day of a song without plays
RECENT_DAYS = 28  # days that count as recent, up to the day of the last play
MAX_DISTANCE = 10  # maximum distance in plays from a song to one that follows it
DIRECT_WEIGHT = 2520  # weight of a song that follows directly; all distances up to 10 divide it, so sums are exact
RULES_PER_SONG = 200  # strongest followers kept per song


@dataclass(frozen=True, kw_only=True)
class PlayCounts:
    """Plays of each song, in total and per day of the last 28 days, so that later parts can move this window."""

    plays: np.ndarray  # int64 (N,)
    first_days: np.ndarray  # int32 (N,), day of the first play, days since 1970 UTC; NOT_PLAYED without a play
    days: np.ndarray  # int32 (T,), days since 1970 UTC, ascending
    day_songs: np.ndarray  # int32 (T,), ascending within a day
    day_plays: np.ndarray  # int64 (T,)
    skips: np.ndarray | None = None  # int64 (N,), plays that were skipped; None if the data has no skips

    @property
    def num_songs(self) -> int:
        """The number of songs, N."""
        return len(self.plays)

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int, real_times: bool = True) -> PlayCounts:
        """Count the plays of histories; without `real_times` all plays get the same day.

        If times are only positions, the last days would be the ends of the longest histories.
        """
        plays = np.bincount(histories.songs, minlength=num_songs).astype(np.int64)
        days = histories.played_at // DAY_MS if real_times else np.zeros(len(histories.songs), dtype=np.int64)
        first_days = np.full(num_songs, NOT_PLAYED, dtype=np.int32)
        np.minimum.at(first_days, histories.songs, days.astype(np.int32))
        play_counts = _make_play_counts(plays, first_days, days, histories.songs, np.ones(len(days), np.int64))
        if histories.skipped is None:
            return play_counts
        skips = np.bincount(histories.songs[histories.skipped], minlength=num_songs).astype(np.int64)
        return replace(play_counts, skips=skips)

    @classmethod
    def merge(cls, parts: Sequence[PlayCounts]) -> PlayCounts:
        """Return the sums over all parts; the catalog may have grown between them."""
        plays = np.zeros(max(part.num_songs for part in parts), dtype=np.int64)
        first_days = np.full(len(plays), NOT_PLAYED, dtype=np.int32)
        for part in parts:
            plays[: part.num_songs] += part.plays
            np.minimum(first_days[: part.num_songs], part.first_days, out=first_days[: part.num_songs])
        names = ("days", "day_songs", "day_plays")
        play_counts = _make_play_counts(
            plays, first_days, *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
        )
        skip_counts = [part.skips for part in parts if part.skips is not None]
        if not skip_counts:
            return play_counts
        skips = np.zeros(len(plays), dtype=np.int64)
        for part_skips in skip_counts:
            skips[: len(part_skips)] += part_skips
        return replace(play_counts, skips=skips)

    def recent(self, days: int = RECENT_DAYS) -> np.ndarray:
        """int64 (N,): plays of each song in the last `days` days, at most 28."""
        recent_plays = np.zeros(self.num_songs, dtype=np.int64)
        for day in self.each_day():
            if self.days[day.start] > self.days[-1] - days:
                recent_plays[self.day_songs[day]] += self.day_plays[day]  # each song occurs once per day
        return recent_plays

    def each_day(self) -> Iterator[slice]:
        """Yield the slice of `days`, `day_songs` and `day_plays` of each day, in order."""
        start = 0
        while start < len(self.days):
            end = int(np.searchsorted(self.days, self.days[start], side="right"))
            yield slice(start, end)
            start = end

    def of_songs(self, start: int, stop: int) -> PlayCounts:
        """Return the counts of the songs from row `start` up to, but not including, `stop`."""
        bounds = [day.start + np.searchsorted(self.day_songs[day], [start, stop]) for day in self.each_day()]
        starts, ends = np.array(bounds, dtype=np.int64).reshape(-1, 2).T
        entries = ranges(starts, ends - starts)
        return PlayCounts(
            plays=_slice_padded(self.plays, start, stop, 0),
            first_days=_slice_padded(self.first_days, start, stop, NOT_PLAYED),
            days=self.days[entries],
            day_songs=self.day_songs[entries] - np.int32(start),
            day_plays=self.day_plays[entries],
            skips=None if self.skips is None else _slice_padded(self.skips, start, stop, 0),
        )


def _slice_padded(values: np.ndarray, start: int, stop: int, fill_value: int) -> np.ndarray:
    """Return the values from row `start` up to, but not including, `stop`; rows past the end get `fill_value`."""
    padded_values = np.full(stop - start, fill_value, dtype=values.dtype)
    existing_values = values[start:stop]
    padded_values[: len(existing_values)] = existing_values
    return padded_values


def _make_play_counts(
    plays: np.ndarray, first_days: np.ndarray, days: np.ndarray, songs: np.ndarray, counts: np.ndarray
) -> PlayCounts:
    days, songs = days.astype(np.int64), songs.astype(np.int64)
    recent_entries = np.flatnonzero(days > days.max(initial=0) - RECENT_DAYS)
    order = recent_entries[np.lexsort((songs[recent_entries], days[recent_entries]))]
    first_positions = group_starts(days[order] * (len(plays) + 1) + songs[order])
    return PlayCounts(
        plays=plays,
        first_days=first_days,
        days=days[order][first_positions].astype(np.int32),
        day_songs=songs[order][first_positions].astype(np.int32),
        day_plays=sum_groups(counts[order], first_positions),
    )


@dataclass(frozen=True, kw_only=True)
class RuleCounts:
    """The followers of each song with their weights, Σ 2520 / distance, the strongest first.

    Weights are integers, so merging is exact in any order. `strongest` drops followers: call it once, after all parts
    have been merged.
    """

    offsets: np.ndarray  # int64 (N + 1,)
    followers: np.ndarray  # int32 (R,), rows of the catalog
    weights: np.ndarray  # int64 (R,), descending within a song; equal ones by row
    at_once: np.ndarray  # int64 (R,), how often the follower was the very next play

    @property
    def num_songs(self) -> int:
        """The number of songs, N."""
        return len(self.offsets) - 1

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int) -> RuleCounts:
        """Count which songs follow which in each user's history, across pauses as well."""
        rows, songs = histories.rows, histories.songs.astype(np.int64)
        keys, weights, at_once = ([np.zeros(0, np.int64)] for _ in range(3))
        for distance in range(1, min(MAX_DISTANCE, len(songs) - 1) + 1):
            pairs = np.flatnonzero(rows[distance:] == rows[:-distance])
            pairs = pairs[songs[pairs] != songs[pairs + distance]]
            keys.append(songs[pairs] * num_songs + songs[pairs + distance])
            weights.append(np.full(len(pairs), DIRECT_WEIGHT // distance, dtype=np.int64))
            at_once.append(np.full(len(pairs), int(distance == 1), dtype=np.int64))
        return _sum_rules(np.concatenate(keys), np.concatenate(weights), np.concatenate(at_once), num_songs, num_songs)

    @classmethod
    def merge(cls, parts: Sequence[RuleCounts]) -> RuleCounts:
        """Return the sums over all parts; the catalog may have grown between them."""
        catalog_size = 1 + max(int(part.followers.max(initial=-1)) for part in parts)
        keys = [group_of_each_item(np.diff(part.offsets)) * catalog_size + part.followers for part in parts]
        weights, at_once = (np.concatenate([getattr(part, name) for part in parts]) for name in ("weights", "at_once"))
        return _sum_rules(np.concatenate(keys), weights, at_once, max(part.num_songs for part in parts), catalog_size)

    def strongest(self, count: int = RULES_PER_SONG) -> RuleCounts:
        """Return the counts with only the `count` strongest followers of each song."""
        songs = group_of_each_item(np.diff(self.offsets))
        strongest_entries = np.flatnonzero(positions_in_groups(songs) < count)
        return RuleCounts(
            offsets=offsets_of(np.bincount(songs[strongest_entries], minlength=self.num_songs)),
            followers=self.followers[strongest_entries],
            weights=self.weights[strongest_entries],
            at_once=self.at_once[strongest_entries],
        )

    def of_songs(self, start: int, stop: int) -> RuleCounts:
        """Return the counts of the songs from row `start` up to, but not including, `stop`."""
        offsets = self.offsets[np.minimum(np.arange(start, stop + 1), self.num_songs)]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        return RuleCounts(
            offsets=offsets - offsets[0],
            followers=self.followers[entries],
            weights=self.weights[entries],
            at_once=self.at_once[entries],
        )


def _sum_rules(
    keys: np.ndarray, weights: np.ndarray, at_once: np.ndarray, num_songs: int, catalog_size: int
) -> RuleCounts:
    """Sum the weights and the counts of equal keys; a key is song * catalog_size + follower."""
    order = stable_order(keys)
    first_positions = group_starts(keys[order])
    weights, at_once = (sum_groups(values[order], first_positions) for values in (weights, at_once))
    songs, followers = np.divmod(keys[order][first_positions], max(1, catalog_size))
    strongest_first = stable_order(songs * (int(weights.max(initial=0)) + 1) + weights.max(initial=0) - weights)
    return RuleCounts(
        offsets=offsets_of(np.bincount(songs, minlength=num_songs)),
        followers=followers[strongest_first].astype(np.int32),
        weights=weights[strongest_first],
        at_once=at_once[strongest_first],
    )


SESSIONS_PER_SONG = 50  # newest sessions kept per song
MAX_SESSION = 100  # maximum songs per session; longer sessions, and histories without times, are cut into pieces
NO_GROUP = -1
SONGS_PER_GROUP = 100  # most played songs kept per group


@dataclass(frozen=True, kw_only=True)
class SessionPostings:
    """Sessions, newest first, and for each song the `newest` latest sessions that hold it.

    A session holds each of its songs once, at its last place. Only sessions that are among the newest of one of their
    songs are kept, so the arrays do not depend on the buckets of the histories or on their order.
    """

    newest: int  # maximum sessions kept per song
    keys: np.ndarray  # uint64 (S,), a hash of each session; breaks ties in time and identifies duplicates
    ended_at: np.ndarray  # int64 (S,), ms UTC, descending
    offsets: np.ndarray  # int64 (S + 1,)
    songs: np.ndarray  # int32 (E,), rows of the catalog in the order of play
    song_offsets: np.ndarray  # int64 (N + 1,)
    song_sessions: np.ndarray  # int32 (L,), the sessions of each song, newest first
    song_places: np.ndarray  # uint8 (L,), the place of the song in the session, from 0
    first_song: int = 0  # row in the catalog of the first of the N songs

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_songs(self) -> int:
        """The number of songs, N."""
        return len(self.song_offsets) - 1

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int, newest: int = SESSIONS_PER_SONG) -> SessionPostings:
        """Cut histories into sessions at pauses of more than 30 minutes; sessions of a single song are left out."""
        songs, cuts = cut_long(cut_sessions(histories), MAX_SESSION)
        lengths = np.diff(cuts)
        session_rows = group_of_each_item(lengths)
        order = np.lexsort((np.arange(len(songs)), songs, session_rows))
        is_last = np.ones(len(order), dtype=bool)
        is_last[:-1] = (np.diff(session_rows[order]) != 0) | (np.diff(songs[order]) != 0)
        session_plays = np.sort(order[is_last])
        counts = np.bincount(session_rows[session_plays], minlength=len(lengths))
        session_plays, is_kept = session_plays[counts[session_rows[session_plays]] > 1], counts > 1
        user_hashes = user_hash(histories.user_ids)[np.searchsorted(histories.offsets, cuts[:-1], side="right") - 1]
        keys = user_hashes ^ mix_bits(
            histories.played_at[np.minimum(cuts[:-1], max(0, len(songs) - 1))].astype(np.uint64)
        )
        return _newest_sessions(
            mix_bits(keys[is_kept]) + _content_hash(songs[session_plays], offsets_of(counts[is_kept])),
            histories.played_at[cuts[1:][is_kept] - 1],
            counts[is_kept],
            songs[session_plays],
            newest,
            (0, num_songs),
        )

    @classmethod
    def merge(cls, parts: Sequence[SessionPostings]) -> SessionPostings:
        """Return the result of `fit` for the histories of all parts together; the catalog may have grown between them.

        If the parts cover a range of songs, it must be the same range.
        """
        first_song = parts[0].first_song
        return _newest_sessions(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.ended_at for part in parts]),
            np.concatenate([np.diff(part.offsets) for part in parts]),
            np.concatenate([part.songs for part in parts]),
            parts[0].newest,
            (first_song, first_song + max(part.num_songs for part in parts)),
        )

    def of_songs(self, start: int, stop: int) -> SessionPostings:
        """Return the entries of the songs from row `start` up to (not including) `stop`, with their whole sessions."""
        bounds = self.song_offsets[np.minimum([start, stop], self.num_songs)]
        entries = slice(int(bounds[0]), int(bounds[1]))
        sessions = np.unique(self.song_sessions[entries])
        counts = self.offsets[sessions + 1] - self.offsets[sessions]
        songs = self.songs[ranges(self.offsets[sessions], counts)]
        arrays = (self.keys[sessions], self.ended_at[sessions], counts, songs)
        return _newest_sessions(*arrays, self.newest, (start, stop))


def _newest_sessions(
    keys: np.ndarray,
    ended_at: np.ndarray,
    counts: np.ndarray,
    songs: np.ndarray,
    newest: int,
    song_range: tuple[int, int],
) -> SessionPostings:
    """Sort sessions, keep those among the newest of a song in the range of rows `song_range`, and index them."""
    starts = offsets_of(counts)[:-1]
    order = np.lexsort((keys, -ended_at))
    order = order[group_starts(keys[order])]  # duplicates have the same time, so they are adjacent
    entry_sessions, entry_songs, entry_positions = _entries(counts[order], songs[ranges(starts[order], counts[order])])
    entry_songs = entry_songs - song_range[0]
    in_range = (entry_songs >= 0) & (entry_songs < song_range[1] - song_range[0])
    if not in_range.all():
        entry_sessions = entry_sessions[in_range]
        entry_songs = entry_songs[in_range]
        entry_positions = entry_positions[in_range]
    song_order = stable_order(entry_songs.astype(np.int64))  # sessions stay in order: newest first
    newest_entries = song_order[positions_in_groups(entry_songs[song_order]) < newest]
    is_used = np.zeros(len(order), dtype=bool)
    is_used[entry_sessions[newest_entries]] = True
    order, new_numbers = order[is_used], np.cumsum(is_used) - 1
    return SessionPostings(
        newest=newest,
        keys=keys[order],
        ended_at=ended_at[order],
        offsets=offsets_of(counts[order]),
        songs=songs[ranges(starts[order], counts[order])].astype(np.int32),
        song_offsets=offsets_of(np.bincount(entry_songs[newest_entries], minlength=song_range[1] - song_range[0])),
        song_sessions=new_numbers[entry_sessions[newest_entries]].astype(np.int32),
        song_places=entry_positions[newest_entries].astype(np.uint8),
        first_song=song_range[0],
    )


def _entries(counts: np.ndarray, songs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the session, the song and the place in the session of each song of all sessions."""
    entry_sessions = group_of_each_item(counts)
    return entry_sessions, songs, ranges(0, counts)


def _content_hash(songs: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint64: a hash of the songs of each session in their order."""
    _, _, positions = _entries(np.diff(offsets), songs)
    hashes = mix_bits(songs.astype(np.uint64) * np.uint64(1 << 20) + positions.astype(np.uint64) + np.uint64(1))
    cumulative = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes, dtype=np.uint64)])
    return np.asarray(cumulative[offsets[1:]] - cumulative[offsets[:-1]])


@dataclass(frozen=True, kw_only=True)
class SongGroups:
    """Groups of songs, such as artists or albums: the group of each song, and the played songs of each group."""

    of_song: np.ndarray  # int32 (N,), the group; -1 if unknown
    offsets: np.ndarray  # int64 (G + 1,)
    songs: np.ndarray  # int32, the first 100 played songs of each group by descending plays, equal ones by row

    def __bool__(self) -> bool:
        return len(self.songs) > 0

    @classmethod
    def build(cls, of_song: np.ndarray, plays: np.ndarray) -> SongGroups:
        """Create the groups from the group of each song, int (N,), -1 if unknown, and its plays, int (N,).

        Songs without a play have a group, but no group lists them: they may be held-out songs, and have no vector.
        """
        grouped_songs = np.flatnonzero((of_song >= 0) & (plays > 0))
        order = grouped_songs[np.lexsort((grouped_songs, -plays[grouped_songs], of_song[grouped_songs]))]
        order = order[positions_in_groups(of_song[order]) < SONGS_PER_GROUP]
        num_groups = int(of_song.max(initial=-1)) + 1
        return cls(
            of_song=of_song.astype(np.int32),
            offsets=offsets_of(np.bincount(of_song[order], minlength=num_groups)),
            songs=order.astype(np.int32),
        )

    def with_added(self, rows: np.ndarray, siblings: np.ndarray) -> SongGroups:
        """Return the groups with added songs, int64 (n,) `rows`, each in the group of its sibling.

        `siblings` are song rows, -1 for songs without one. A sibling without a group gets a new group, too. The lists
        of songs of each group are unchanged.
        """
        num_songs = max(len(self.of_song), int(rows.max(initial=-1)) + 1, int(siblings.max(initial=-1)) + 1)
        of_song = np.full(num_songs, NO_GROUP, dtype=np.int32)
        of_song[: len(self.of_song)] = self.of_song
        group_ids = np.where(siblings >= 0, of_song[siblings], NO_GROUP)
        without_group = np.flatnonzero((siblings >= 0) & (group_ids == NO_GROUP))
        new_siblings, new_numbers = np.unique(siblings[without_group], return_inverse=True)
        num_groups = len(self.offsets) - 1
        group_ids[without_group] = num_groups + new_numbers
        of_song[siblings[without_group]] = group_ids[without_group]
        of_song[rows] = np.where(group_ids >= 0, group_ids, of_song[rows])
        offsets = np.concatenate([self.offsets, np.full(len(new_siblings), self.offsets[-1])])
        return SongGroups(of_song=of_song, offsets=offsets, songs=self.songs)

    def listing(self, rows: np.ndarray) -> SongGroups:
        """Return the same groups that list only the songs at `rows`, int64 (n,), ascending; the highest rows first."""
        group_ids = self.of_song[rows]
        order = np.lexsort((-rows, group_ids))
        order = order[group_ids[order] >= 0]
        order = order[positions_in_groups(group_ids[order]) < SONGS_PER_GROUP]
        counts = np.bincount(group_ids[order], minlength=len(self.offsets) - 1)
        return replace(self, offsets=offsets_of(counts), songs=rows[order].astype(np.int32))


PLAYS_PER_RANGE = 20_000_000  # plays per range of songs, so that the counts of a range fit into a task's memory
POPULAR = 500  # maximum songs in the list of popular songs
POPULAR_DAYS = 7  # last days whose plays order the list of popular songs
SETTINGS_FILE = "retrieval.json"  # written last
SKIPS = "plays.skips"  # array that exists only if the data has skips


@dataclass(frozen=True, kw_only=True)
class RetrievalCounts:
    """The sessions, rules and play counts of histories. Parts merge exactly, in any order, before `strongest`."""

    sessions: SessionPostings
    rules: RuleCounts
    plays: PlayCounts

    @classmethod
    def fit(
        cls,
        histories: Histories,
        *,
        num_songs: int,
        allowed: FitRange | None = None,
        newest: int = SESSIONS_PER_SONG,
        real_times: bool = True,
    ) -> RetrievalCounts:
        """Count histories; without `real_times` their times are only positions.

        Raises `LeakError` for a play that `allowed` forbids.
        """
        (allowed or FitRange()).require(histories)
        return cls(
            sessions=SessionPostings.fit(histories, num_songs=num_songs, newest=newest),
            rules=RuleCounts.fit(histories, num_songs=num_songs),
            plays=PlayCounts.fit(histories, num_songs=num_songs, real_times=real_times),
        )

    @classmethod
    def merge(cls, parts: Sequence[RetrievalCounts]) -> RetrievalCounts:
        """Return the result of `fit` for the histories of all parts together."""
        return cls(
            sessions=SessionPostings.merge([part.sessions for part in parts]),
            rules=RuleCounts.merge([part.rules for part in parts]),
            plays=PlayCounts.merge([part.plays for part in parts]),
        )

    def of_songs(self, start: int, stop: int) -> RetrievalCounts:
        """Return the counts of the songs from row `start` up to, but not including, `stop`.

        Songs that were not counted have no entries. Such parts can be merged like counts of all songs, and
        `join_ranges` joins the parts of all ranges.
        """
        return RetrievalCounts(
            sessions=self.sessions.of_songs(start, stop),
            rules=self.rules.of_songs(start, stop),
            plays=self.plays.of_songs(start, stop),
        )

    def strongest(self, rules_per_song: int = RULES_PER_SONG) -> RetrievalCounts:
        """Return the counts with only the strongest rules of each song; call it after all parts have been merged."""
        return replace(self, rules=self.rules.strongest(rules_per_song))


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """All data that retrievers read, apart from the index: flat arrays, of which a query reads a few entries."""

    sessions: SessionPostings
    rules: RuleCounts  # the strongest of each song
    plays: PlayCounts
    recent_plays: np.ndarray  # int64 (N,), plays of the last 28 days
    popular: np.ndarray  # int32 (at most 500,), songs by plays in the last 7 days, then by all plays
    artists: SongGroups
    albums: SongGroups
    skip_share: float = 0.0  # share of all plays that were skipped
    has_likes: bool = False  # whether the data has likes

    @property
    def num_songs(self) -> int:
        """The number of songs, N."""
        return self.plays.num_songs

    @property
    def counts(self) -> RetrievalCounts:
        """The counts, to which later plays can be added: sessions and plays are exact, rules are only the strongest."""
        return RetrievalCounts(sessions=self.sessions, rules=self.rules, plays=self.plays)

    @classmethod
    def build(
        cls,
        counts: RetrievalCounts,
        *,
        artist_of_song: np.ndarray | None = None,
        album_of_song: np.ndarray | None = None,
        has_likes: bool = False,
    ) -> Retrieval:
        """Create a retrieval from merged counts with the strongest rules, and the artist and the album of each song.

        Artists and albums are int (N,), -1 if unknown. The large arrays of rules, sessions and days are not copied.
        """
        plays = counts.plays
        no_groups = np.full(plays.num_songs, NO_GROUP, dtype=np.int32)
        order = np.lexsort((np.arange(plays.num_songs), -plays.plays, -plays.recent(POPULAR_DAYS)))
        return cls(
            sessions=counts.sessions,
            rules=counts.rules,
            plays=plays,
            recent_plays=plays.recent(RECENT_DAYS),
            popular=order[plays.plays[order] > 0][:POPULAR].astype(np.int32),
            artists=SongGroups.build(no_groups if artist_of_song is None else artist_of_song, plays.plays),
            albums=SongGroups.build(no_groups if album_of_song is None else album_of_song, plays.plays),
            skip_share=0.0 if plays.skips is None else float(plays.skips.sum() / max(1, plays.plays.sum())),
            has_likes=has_likes,
        )

    def with_added(self, rows: np.ndarray, artist_rows: np.ndarray, album_rows: np.ndarray) -> Retrieval:
        """Return the retrieval with the artists and albums of added songs, see `SongGroups.with_added`."""
        artists, albums = self.artists.with_added(rows, artist_rows), self.albums.with_added(rows, album_rows)
        return replace(self, artists=artists, albums=albums)

    def save(self, workspace: Workspace, folder: str) -> list[str]:
        """Write .npy files and a JSON file of settings into a folder; return the names of the files."""
        arrays = {name: value for name, value in _flatten(self).items() if isinstance(value, np.ndarray)}
        for name, array in arrays.items():
            workspace.write_array(f"{folder}/{name}.npy", array)
        skips = {"skip_share": self.skip_share} if SKIPS in arrays else {}
        likes = {"has_likes": True} if self.has_likes else {}
        workspace.write_json(f"{folder}/{SETTINGS_FILE}", {"newest": self.sessions.newest, **skips, **likes})
        return [SETTINGS_FILE, *(f"{name}.npy" for name in arrays)]

    @classmethod
    def load(cls, workspace: Workspace, folder: str) -> Retrieval:
        """Read what `save` wrote; arrays on a local disk are memory-mapped."""
        settings: dict[str, Any] = workspace.read_json(f"{folder}/{SETTINGS_FILE}")

        def read(part_class: type, prefix: str, **given_values: Any) -> Any:
            names = [field.name for field in fields(part_class) if field.name not in given_values]
            return part_class(
                **given_values, **{name: workspace.read_array(f"{folder}/{prefix}.{name}.npy") for name in names}
            )

        return cls(
            sessions=read(SessionPostings, "sessions", newest=int(settings["newest"]), first_song=0),
            rules=read(RuleCounts, "rules"),
            plays=read(PlayCounts, "plays", **({} if "skip_share" in settings else {"skips": None})),
            recent_plays=workspace.read_array(f"{folder}/recent_plays.npy"),
            popular=workspace.read_array(f"{folder}/popular.npy"),
            artists=read(SongGroups, "artists"),
            albums=read(SongGroups, "albums"),
            skip_share=float(settings.get("skip_share", 0.0)),
            has_likes=bool(settings.get("has_likes", False)),
        )


def read_first_days(workspace: Workspace, folder: str) -> np.ndarray:
    """int32 (N,): `PlayCounts.first_days` of a saved retrieval, without reading the rest of it."""
    return np.asarray(workspace.read_array(f"{folder}/plays.first_days.npy"))


def read_popularity(workspace: Workspace, folder: str) -> tuple[np.ndarray, np.ndarray]:
    """int64 (N,) and int32 (N,): the recent plays and the artist of each song of a saved retrieval."""
    return workspace.read_array(f"{folder}/recent_plays.npy"), workspace.read_array(f"{folder}/artists.of_song.npy")


def _flatten(retrieval: Retrieval | RetrievalCounts) -> dict[str, Any]:
    """Return the arrays and single values by the names of their files."""
    values_by_name: dict[str, Any] = {}
    for field in fields(retrieval):
        value = getattr(retrieval, field.name)
        if isinstance(value, np.ndarray | float | bool):
            values_by_name[field.name] = value
        else:
            values_by_name |= {f"{field.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
    return values_by_name


def song_ranges(num_songs: int, num_plays: int) -> list[tuple[int, int]]:
    """Return the first row and the row after the last of each range of songs.

    There are enough ranges for the counts of each range to fit into the memory of a task.
    """
    count = max(1, min(num_songs, -(-num_plays // PLAYS_PER_RANGE)))
    return list(pairwise(np.linspace(0, num_songs, count + 1).astype(int).tolist()))


def pack_counts(counts: RetrievalCounts) -> bytes:
    """Serialize counts, of all songs or of a range; the size depends on their songs, not on the catalog."""
    header = np.array([counts.sessions.first_song, counts.sessions.newest], dtype=np.int64)
    arrays = {name: value for name, value in _flatten(counts).items() if isinstance(value, np.ndarray)}
    return bytes(save({"about": header, **{name: np.ascontiguousarray(value) for name, value in arrays.items()}}))


def unpack_counts(data: bytes) -> RetrievalCounts:
    """Return the counts in bytes of `pack_counts`."""
    arrays = load(data)
    first_song, newest = arrays.pop("about").tolist()
    return counts_of_arrays(arrays, newest=newest, first_song=first_song)


def counts_of_arrays(arrays: Mapping[str, np.ndarray], *, newest: int, first_song: int = 0) -> RetrievalCounts:
    """Return the counts whose arrays are given by the names of their files."""

    def arrays_of(name: str) -> dict[str, np.ndarray]:
        return {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}

    return RetrievalCounts(
        sessions=SessionPostings(newest=newest, first_song=first_song, **arrays_of("sessions")),
        rules=RuleCounts(**arrays_of("rules")),
        plays=PlayCounts(**arrays_of("plays")),
    )
