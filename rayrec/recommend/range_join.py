"""Joins the counts of ranges of songs into the counts of all songs, in files, so that memory use stays bounded."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from rayrec.data.ragged import group_starts, offsets_of, ranges
from rayrec.recommend.stored_retrieval import RECENT_DAYS, SKIPS, RetrievalCounts, counts_of_arrays

SESSIONS_AT_ONCE = 200_000  # sessions that are sorted together, approximately; one range may hold more
RESULT_DTYPES = {
    "rules.offsets": np.int64,
    "rules.followers": np.int32,
    "rules.weights": np.int64,
    "rules.at_once": np.int64,
    "plays.plays": np.int64,
    "plays.first_days": np.int32,
    "plays.days": np.int32,
    "plays.day_songs": np.int32,
    "plays.day_plays": np.int64,
    SKIPS: np.int64,
    "sessions.keys": np.uint64,
    "sessions.ended_at": np.int64,
    "sessions.offsets": np.int64,
    "sessions.songs": np.int32,
    "sessions.song_offsets": np.int64,
    "sessions.song_sessions": np.int32,
    "sessions.song_places": np.uint8,
}
RANGE_DTYPES = {  # arrays with the values of the ranges, one range after another
    "day_songs": np.int32,
    "day_plays": np.int64,
    "ages": np.int64,  # -ended_at, so that they are ascending within each range
    "keys": np.uint64,
    "offsets": np.int64,
    "songs": np.int32,
    "song_sessions": np.int32,
}


class _ArrayFiles:
    """One-dimensional arrays to which values can be appended, each in a file of a folder."""

    def __init__(self, folder: Path) -> None:
        self._files = {name: (folder / name).open("wb") for name in (*RESULT_DTYPES, *RANGE_DTYPES)}
        self._dtypes = {name: np.dtype(dtype) for name, dtype in {**RESULT_DTYPES, **RANGE_DTYPES}.items()}

    def length(self, name: str) -> int:
        """Return the number of values in an array so far."""
        return self._files[name].tell() // self._dtypes[name].itemsize

    def append(self, name: str, values: np.ndarray) -> None:
        """Add values at the end of an array."""
        self._files[name].write(values.astype(self._dtypes[name], copy=False).tobytes())

    def append_offsets(self, name: str, offsets: np.ndarray, start: int) -> None:
        """Append the `offsets` of groups, int64 (groups + 1,) from 0, shifted so that the first group is at `start`."""
        self.append(name, offsets[min(1, self.length(name)) :] + start)

    def array(self, name: str) -> np.ndarray:
        """Return the whole array, memory-mapped; no more values can be appended."""
        self._files[name].close()
        path, dtype = self._files[name].name, self._dtypes[name]
        return np.asarray(np.memmap(path, dtype, mode="r")) if Path(path).stat().st_size else np.zeros(0, dtype)


def join_ranges(parts: Iterable[RetrievalCounts], folder: Path) -> RetrievalCounts:
    """Return the counts of all songs from the counts of one or more ranges of songs, given in the order of rows.

    The memory needed is that of one range and of a few hundred thousand sessions. The arrays of the result are
    memory-mapped from files in `folder`, which must be empty before and must exist as long as they are in use.
    """
    files = _ArrayFiles(folder)
    days: list[tuple[int, int, int]] = []  # day, start and end of its entries, for each range
    session_ends, entry_ends, newest = [0], [0], 0  # ends of each range
    for part in parts:
        first_song, newest = part.sessions.first_song, part.sessions.newest
        assert first_song == files.length("plays.plays")
        _append_rules(files, part)
        days += _append_plays(files, part, first_song)
        _append_sessions(files, part)
        session_ends.append(files.length("keys"))
        entry_ends.append(files.length("song_sessions"))
    _order_days(files, days)
    new_numbers = _order_sessions(files, session_ends, folder / "numbers")
    song_sessions = files.array("song_sessions")
    for session_bounds, entry_bounds in zip(pairwise(session_ends), pairwise(entry_ends), strict=True):
        files.append("sessions.song_sessions", new_numbers[slice(*session_bounds)][song_sessions[slice(*entry_bounds)]])
    arrays = {name: files.array(name) for name in RESULT_DTYPES}
    if not len(arrays[SKIPS]):
        del arrays[SKIPS]
    return counts_of_arrays(arrays, newest=newest)


def _append_rules(files: _ArrayFiles, part: RetrievalCounts) -> None:
    rules = part.rules
    files.append_offsets("rules.offsets", rules.offsets, files.length("rules.followers"))
    for name in ("followers", "weights", "at_once"):
        files.append(f"rules.{name}", getattr(rules, name))


def _append_plays(files: _ArrayFiles, part: RetrievalCounts, first_song: int) -> list[tuple[int, int, int]]:
    plays, start = part.plays, files.length("day_songs")
    files.append("plays.plays", plays.plays)
    files.append("plays.first_days", plays.first_days)
    if plays.skips is not None:
        files.append(SKIPS, plays.skips)
    files.append("day_songs", plays.day_songs + first_song)
    files.append("day_plays", plays.day_plays)
    return [(int(plays.days[day.start]), start + day.start, start + day.stop) for day in plays.each_day()]


def _append_sessions(files: _ArrayFiles, part: RetrievalCounts) -> None:
    sessions = part.sessions
    files.append("ages", -sessions.ended_at)
    files.append("keys", sessions.keys)
    files.append_offsets("offsets", sessions.offsets, files.length("songs"))
    files.append("songs", sessions.songs)
    files.append_offsets("sessions.song_offsets", sessions.song_offsets, files.length("song_sessions"))
    files.append("song_sessions", sessions.song_sessions)
    files.append("sessions.song_places", sessions.song_places)


def _order_days(files: _ArrayFiles, days: list[tuple[int, int, int]]) -> None:
    """Write the play counts of the last 28 days, day by day, back from the last day of all ranges together."""
    day_songs, day_plays = files.array("day_songs"), files.array("day_plays")
    last_day = max((day for day, _, _ in days), default=0)
    for day, start, end in sorted(days):
        if day > last_day - RECENT_DAYS:
            files.append("plays.days", np.full(end - start, day))
            files.append("plays.day_songs", day_songs[start:end])
            files.append("plays.day_plays", day_plays[start:end])


def _order_sessions(files: _ArrayFiles, ends: list[int], path: Path) -> np.ndarray:
    """Write the sessions of all ranges, newest first and each once; return their new numbers, int32, memory-mapped.

    `ends` are the ends of the ranges in the arrays, after a leading 0.
    """
    ages, keys, offsets, songs = (files.array(name) for name in ("ages", "keys", "offsets", "songs"))
    new_numbers: np.ndarray = np.memmap(path, np.int32, mode="w+", shape=max(1, ends[-1]))
    for positions in _newest_first(ages, keys, ends):
        order = positions[np.lexsort((keys[positions], ages[positions]))]
        is_first = np.zeros(len(order), dtype=bool)
        is_first[group_starts(keys[order])] = True
        new_numbers[order] = files.length("sessions.keys") + np.cumsum(is_first) - 1
        order = order[is_first]
        counts = offsets[order + 1] - offsets[order]
        files.append("sessions.keys", keys[order])
        files.append("sessions.ended_at", -ages[order])
        files.append_offsets("sessions.offsets", offsets_of(counts), files.length("sessions.songs"))
        files.append("sessions.songs", songs[ranges(offsets[order], counts)])
    return new_numbers


def _newest_first(ages: np.ndarray, keys: np.ndarray, ends: list[int]) -> Iterator[np.ndarray]:
    """Yield the positions of sessions, int64, in slices, each older than the one before; equal sessions share a slice.

    The bounds between slices are sessions sampled from every range, so that no slice is more than twice as large as
    intended.
    """
    step = max(1, SESSIONS_AT_ONCE // len(ends))
    sample = np.concatenate([np.arange(start + step - 1, end, step) for start, end in pairwise(ends)])
    sample = sample[np.lexsort((keys[sample], ages[sample]))]
    starts = np.array(ends[:-1])
    for bound in sample[len(ends) - 1 :: len(ends)].tolist():
        stops = np.empty_like(starts)
        for index, (start, end) in enumerate(pairwise(ends)):
            same_age = start + np.searchsorted(ages[start:end], [ages[bound], ages[bound] + 1])
            stops[index] = same_age[0] + np.searchsorted(keys[slice(*same_age)], keys[bound], side="right")
        yield ranges(starts, stops - starts)
        starts = stops
    yield ranges(starts, np.array(ends[1:]) - starts)
