"""What a question is asked for: the next play, or the songs of several plays to come.

Q questions, P plays, T right answers of all questions together.
"""

from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.base import Horizon, Recommender

TARGETS = ("next", "next_new", "next_repeat", "next10", "offsets25_50")
AHEAD = {"next": (1, 1), "next10": (1, 10), "offsets25_50": (25, 50)}  # offsets; 1 is the next play
LONG_TERM = "offsets25_50"


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The distinct songs that would be right, question by question."""

    rows: np.ndarray  # int64 (T,), the question, ascending
    songs: np.ndarray  # int64 (T,)
    sizes: np.ndarray  # int64 (Q,), how many songs each question has; 0 where the history ends before


def answers(histories: Histories, questions: Questions, target: str) -> Answers:
    """The songs played at the offsets of a target of AHEAD, as many of them as the histories hold.

    A song that is played twice there counts once; a question without any play there has none and
    is not counted.
    """
    first, last = AHEAD[target]
    rows, plays = plays_ahead(histories, questions, first, last)
    songs = histories.songs[plays].astype(np.int64)
    if last > first:
        num_songs = int(histories.songs.max(initial=0)) + 1
        rows, songs = np.divmod(np.unique(rows * num_songs + songs), num_songs)
    return Answers(rows=rows, songs=songs, sizes=np.bincount(rows, minlength=len(questions)))


def plays_ahead(histories: Histories, questions: Questions, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    """The plays at offsets `first` to `last` that the histories hold: their questions and positions, int64 each."""
    start = histories.offsets[questions.rows] + questions.seen + first - 1
    count = np.clip(histories.offsets[questions.rows + 1] - start, 0, last - first + 1)
    rows = np.repeat(np.arange(len(questions)), count)
    plays = np.repeat(start - np.cumsum(count) + count, count) + np.arange(count.sum())
    return rows, plays


class Heard:
    """Which songs a user has played before a moment."""

    def __init__(self, histories: Histories) -> None:
        self._num_songs = int(histories.songs.max(initial=0)) + 1
        keys = histories.rows * self._num_songs + histories.songs
        self._keys, plays = np.unique(keys, return_index=True)  # the first play of each user and song
        self._places = histories.places[plays]

    def __call__(self, rows: np.ndarray, seen: np.ndarray, songs: np.ndarray) -> np.ndarray:
        """bool: whether the user at `rows` has song `songs` among the first `seen` plays, int each, of one shape."""
        if not len(self._keys):
            return np.zeros(np.shape(songs), dtype=bool)
        keys = rows * self._num_songs + songs
        found = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        there = (self._keys[found] == keys) & (songs < self._num_songs)
        return np.asarray(there & (self._places[found] < seen))


def horizon_of(recommender: Recommender, target: str) -> Horizon:
    """The long horizon for the long term where a recommender has one, else the short."""
    return "long" if target == LONG_TERM and "long" in recommender.horizons else "short"
