"""Songs that share an artist or an album, the most played first.

N songs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayrec.recommend.retrieval.ragged import offsets_of, places_in

NO_GROUP = -1
KEPT = 100  # songs of a group, the most played


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
