"""Songs that share an artist or an album, the most played first.

N songs, n added songs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
