"""Counts of one range of songs as bytes: what a bucket leaves for the merge of that range.

N songs.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from safetensors.numpy import load, save

from rayrec.data.histories import Histories
from rayrec.recommend.retrieval.play_counts import PlayCounts, RuleCounts
from rayrec.recommend.retrieval.session_postings import SessionPostings
from rayrec.recommend.retrieval.stored_retrieval import RetrievalCounts

PARTS = {"sessions": SessionPostings, "rules": RuleCounts, "plays": PlayCounts}
WHOLE = ("plays.plays", "plays.first_days")  # of every song in the first range, and there alone
BY_SONG = ("sessions.song_offsets", "rules.offsets")  # int64 (N + 1,), flat outside the range


def pack_counts(counts: RetrievalCounts, first: int, last: int) -> bytes:
    """The counts of the songs from row `first` up to `last`, as `RetrievalCounts.of_songs` gives them.

    What is known of every song is stored for the range alone, so that a piece grows with its range and its bucket
    and not with the catalog.
    """
    arrays = {"about": np.array([first, last, counts.plays.num_songs, counts.sessions.newest], dtype=np.int64)}
    for name in PARTS:
        part = getattr(counts, name)
        for field in fields(part):
            value = getattr(part, field.name)
            if isinstance(value, np.ndarray):
                key = f"{name}.{field.name}"
                value = value[first : last + 1] if key in BY_SONG else value
                arrays[key] = np.ascontiguousarray(value)
    if first > 0:
        for key in WHOLE:
            del arrays[key]
    return bytes(save(arrays))


def unpack_counts(data: bytes) -> RetrievalCounts:
    """What `pack_counts` stored."""
    arrays = load(data)
    first, last, num_songs, newest = (int(value) for value in arrays.pop("about"))
    for key in BY_SONG:
        offsets = np.empty(num_songs + 1, dtype=np.int64)
        offsets[:first], offsets[first : last + 1], offsets[last + 1 :] = 0, arrays[key], arrays[key][-1]
        arrays[key] = offsets
    nothing = PlayCounts.fit(Histories.from_lists([], []), num_songs=num_songs)
    for key in WHOLE:
        arrays.setdefault(key, getattr(nothing, key.partition(".")[2]))

    def of(name: str) -> dict[str, np.ndarray]:
        return {key.partition(".")[2]: value for key, value in arrays.items() if key.startswith(f"{name}.")}

    return RetrievalCounts(
        sessions=SessionPostings(newest=newest, **of("sessions")),
        rules=RuleCounts(**of("rules")),
        plays=PlayCounts(**of("plays")),
    )
