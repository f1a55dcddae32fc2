"""How often each song was played, in all and of late, and since when.

N songs, T pairs of a day and a song played on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS
from rayrec.recommend.retrieval.ragged import first_of_each, offsets_of, places_in, stable_order

NOT_PLAYED = np.iinfo(np.int32).max  # first day of a song without plays
RECENT_DAYS = 28  # that count as of late, back from the day of the last play
MAX_DISTANCE = 10  # plays between a song and one that follows it
UNIT = 2520  # weight of a song that follows at once; 1/distance of it is whole for every distance, so sums are exact
KEPT = 200  # followers of a song, the strongest


@dataclass(frozen=True, kw_only=True)
class PlayCounts:
    """Plays of each song, and those of the last 28 days by day, so that a later part moves the days on."""

    plays: np.ndarray  # int64 (N,)
    first_days: np.ndarray  # int32 (N,), day of the first play, days since 1970 UTC; NOT_PLAYED for a song without
    days: np.ndarray  # int32 (T,), days since 1970 UTC, ascending
    day_songs: np.ndarray  # int32 (T,), ascending within a day
    day_plays: np.ndarray  # int64 (T,)
    skips: np.ndarray | None = None  # int64 (N,), plays that were skipped; None where the data does not say

    @property
    def num_songs(self) -> int:
        """N."""
        return len(self.plays)

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int) -> PlayCounts:
        """Count the plays of histories."""
        plays = np.bincount(histories.songs, minlength=num_songs).astype(np.int64)
        days = histories.played_at // DAY_MS
        first_days = np.full(num_songs, NOT_PLAYED, dtype=np.int32)
        np.minimum.at(first_days, histories.songs, days.astype(np.int32))
        counted = _counted(plays, first_days, days, histories.songs, np.ones(len(days), np.int64))
        if histories.skipped is None:
            return counted
        skips = np.bincount(histories.songs[histories.skipped], minlength=num_songs).astype(np.int64)
        return replace(counted, skips=skips)

    @classmethod
    def merge(cls, parts: Sequence[PlayCounts]) -> PlayCounts:
        """The sums over all parts; a catalog may have grown between them."""
        plays = np.zeros(max(part.num_songs for part in parts), dtype=np.int64)
        first_days = np.full(len(plays), NOT_PLAYED, dtype=np.int32)
        for part in parts:
            plays[: part.num_songs] += part.plays
            np.minimum(first_days[: part.num_songs], part.first_days, out=first_days[: part.num_songs])
        names = ("days", "day_songs", "day_plays")
        counted = _counted(
            plays, first_days, *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
        )
        known = [part.skips for part in parts if part.skips is not None]
        if not known:
            return counted
        skips = np.zeros(len(plays), dtype=np.int64)
        for part_skips in known:
            skips[: len(part_skips)] += part_skips
        return replace(counted, skips=skips)

    def recent(self, days: int = RECENT_DAYS) -> np.ndarray:
        """int64 (N,): plays of each song in the last `days` days, at most 28."""
        late = self.days > (int(self.days[-1]) if len(self.days) else 0) - days
        recent = np.zeros(self.num_songs, dtype=np.int64)
        np.add.at(recent, self.day_songs[late], self.day_plays[late])
        return recent


def _counted(
    plays: np.ndarray, first_days: np.ndarray, days: np.ndarray, songs: np.ndarray, counts: np.ndarray
) -> PlayCounts:
    days, songs = days.astype(np.int64), songs.astype(np.int64)
    late = np.flatnonzero(days > days.max(initial=0) - RECENT_DAYS)
    order = late[np.lexsort((songs[late], days[late]))]
    first = first_of_each(days[order] * (len(plays) + 1) + songs[order])
    return PlayCounts(
        plays=plays,
        first_days=first_days,
        days=days[order][first].astype(np.int32),
        day_songs=songs[order][first].astype(np.int32),
        day_plays=np.add.reduceat(counts[order], first) if len(first) else np.zeros(0, np.int64),
    )


@dataclass(frozen=True, kw_only=True)
class RuleCounts:
    """The followers of each song with their weights, Σ 2520 / distance, the strongest first.

    Weights are whole numbers, so merging is exact in any order. `strongest` cuts each song's followers: do it
    once, after all parts have been merged.
    """

    offsets: np.ndarray  # int64 (N + 1,)
    followers: np.ndarray  # int32 (R,), song rows
    weights: np.ndarray  # int64 (R,), descending within a song; equal ones by row
    at_once: np.ndarray  # int64 (R,), times that the song followed with no other between

    @property
    def num_songs(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @classmethod
    def fit(cls, histories: Histories, *, num_songs: int) -> RuleCounts:
        """Count what follows what in each user's history, across pauses as well."""
        rows, songs = histories.rows, histories.songs.astype(np.int64)
        keys, weights, at_once = ([np.zeros(0, np.int64)] for _ in range(3))
        for distance in range(1, min(MAX_DISTANCE, len(songs) - 1) + 1):
            pairs = np.flatnonzero(rows[distance:] == rows[:-distance])
            pairs = pairs[songs[pairs] != songs[pairs + distance]]
            keys.append(songs[pairs] * num_songs + songs[pairs + distance])
            weights.append(np.full(len(pairs), UNIT // distance, dtype=np.int64))
            at_once.append(np.full(len(pairs), int(distance == 1), dtype=np.int64))
        return _summed(np.concatenate(keys), np.concatenate(weights), np.concatenate(at_once), num_songs)

    @classmethod
    def merge(cls, parts: Sequence[RuleCounts]) -> RuleCounts:
        """The sums over all parts; a catalog may have grown between them."""
        num_songs = max(part.num_songs for part in parts)
        keys = [
            np.repeat(np.arange(part.num_songs), np.diff(part.offsets)) * num_songs + part.followers for part in parts
        ]
        weights, at_once = (np.concatenate([getattr(part, name) for part in parts]) for name in ("weights", "at_once"))
        return _summed(np.concatenate(keys), weights, at_once, num_songs)

    def strongest(self, count: int = KEPT) -> RuleCounts:
        """The `count` strongest followers of each song."""
        song = np.repeat(np.arange(self.num_songs), np.diff(self.offsets))
        kept = np.flatnonzero(places_in(song) < count)
        return RuleCounts(
            offsets=offsets_of(np.bincount(song[kept], minlength=self.num_songs)),
            followers=self.followers[kept],
            weights=self.weights[kept],
            at_once=self.at_once[kept],
        )

    def of_songs(self, first: int, last: int) -> RuleCounts:
        """The part for the songs from row `first` up to `last`; the parts of all ranges merge into the whole again."""
        bounds = self.offsets[np.minimum([first, last], self.num_songs)]
        entries = slice(int(bounds[0]), int(bounds[1]))
        offsets = np.clip(self.offsets, entries.start, entries.stop) - entries.start
        return RuleCounts(
            offsets=offsets,
            followers=self.followers[entries],
            weights=self.weights[entries],
            at_once=self.at_once[entries],
        )


def _summed(keys: np.ndarray, weights: np.ndarray, at_once: np.ndarray, num_songs: int) -> RuleCounts:
    """Add up the weights and the counts of equal keys, song * num_songs + follower."""
    order = stable_order(keys)
    first = first_of_each(keys[order])
    weights, at_once = (
        np.add.reduceat(values[order], first) if len(first) else values for values in (weights, at_once)
    )
    songs, followers = np.divmod(keys[order][first], max(1, num_songs))
    strongest = stable_order(songs * (int(weights.max(initial=0)) + 1) + weights.max(initial=0) - weights)
    return RuleCounts(
        offsets=offsets_of(np.bincount(songs, minlength=num_songs)),
        followers=followers[strongest].astype(np.int32),
        weights=weights[strongest],
        at_once=at_once[strongest],
    )
