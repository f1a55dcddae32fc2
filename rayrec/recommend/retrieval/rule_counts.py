"""What followed each song: counts of pairs of plays at most ten apart.

N songs, R rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories
from rayrec.recommend.retrieval.ragged import first_of_each, offsets_of, places_in, stable_order

MAX_DISTANCE = 10  # plays between a song and one that follows it
UNIT = 2520  # weight of a song that follows at once; 1/distance of it is whole for every distance, so sums are exact
KEPT = 200  # followers of a song, the strongest


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
