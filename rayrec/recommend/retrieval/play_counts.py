"""How often each song was played, in all and of late, and since when.

N songs, T pairs of a day and a song played on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS
from rayrec.recommend.retrieval.ragged import first_of_each

NOT_PLAYED = np.iinfo(np.int32).max  # first day of a song without plays
RECENT_DAYS = 28  # that count as of late, back from the day of the last play


@dataclass(frozen=True, kw_only=True)
class PlayCounts:
    """Plays of each song, and those of the last 28 days by day, so that a later part moves the days on."""

    plays: np.ndarray  # int64 (N,)
    first_days: np.ndarray  # int32 (N,), day of the first play, days since 1970 UTC; NOT_PLAYED for a song without
    days: np.ndarray  # int32 (T,), days since 1970 UTC, ascending
    day_songs: np.ndarray  # int32 (T,), ascending within a day
    day_plays: np.ndarray  # int64 (T,)

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
        return _counted(plays, first_days, days, histories.songs, np.ones(len(days), np.int64))

    @classmethod
    def merge(cls, parts: Sequence[PlayCounts]) -> PlayCounts:
        """The sums over all parts; a catalog may have grown between them."""
        plays = np.zeros(max(part.num_songs for part in parts), dtype=np.int64)
        first_days = np.full(len(plays), NOT_PLAYED, dtype=np.int32)
        for part in parts:
            plays[: part.num_songs] += part.plays
            np.minimum(first_days[: part.num_songs], part.first_days, out=first_days[: part.num_songs])
        names = ("days", "day_songs", "day_plays")
        return _counted(plays, first_days, *(np.concatenate([getattr(part, name) for part in parts]) for name in names))

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
