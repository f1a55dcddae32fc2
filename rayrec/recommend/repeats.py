"""Repeats: which songs users have heard before, and the chance that their next play is one of those.

Listeners repeat in spells, so the latest plays tell most. Q questions, N songs, P plays, E pairs of a question
and a song, F features.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from rayrec.data.histories import Histories, Questions

LATEST = (2, 5, 20)  # plays among which repeats are counted, beside all of them
LITTLE = 0.01  # beside chances, so that odds have an end, and are even where a member is silent
RIDGE = 1e-4  # on the coefficients, times the number of examples: the same plays may all be repeats


@dataclass(frozen=True)
class Repeats:
    """What the plays before each question say of repeats."""

    asked: np.ndarray  # int64 (E,), the question
    songs: np.ndarray  # int32 (E,), a song that its user has heard, each once
    features: np.ndarray  # float64 (Q, 5), see `RepeatGate`

    @classmethod
    def of(cls, histories: Histories, questions: Questions, num_songs: int) -> "Repeats":
        """From the plays before each question alone; songs from row `num_songs` on are not told."""
        users, rows = np.unique(questions.rows, return_inverse=True)
        histories = histories.take(users)  # a chunk asks of few users
        keys = histories.rows * (int(histories.songs.max(initial=0)) + 1) + histories.songs
        first = np.zeros(histories.num_plays, dtype=bool)
        first[np.unique(keys, return_index=True)[1]] = True
        before = np.concatenate([[0], np.cumsum(first)])  # first plays before each place of the flat arrays
        begin = histories.offsets[rows]
        end = begin + questions.seen
        counts = before[end] - before[begin]
        asked = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts)
        songs = histories.songs[first][np.repeat(before[begin], counts) + place]
        known = songs < num_songs

        def share(latest: int) -> np.ndarray:
            since = np.maximum(begin, end - latest)
            found: np.ndarray = (end - since - (before[end] - before[since]) + 0.5) / (end - since + 1)
            return found

        told = [np.log1p(questions.seen), *(share(latest) for latest in (*LATEST, histories.num_plays))]
        return cls(asked[known], songs[known], np.stack(told, axis=1))


@dataclass(frozen=True)
class RepeatGate:
    """The chance that a play to come repeats a song: logistic in the features [ours; after RepeatNet's repeat gate].

    The features are log(1 + plays), the shares of repeats among the last 2, 5 and 20 plays and all, n + 1/2
    of m + 1, and the odds that each member gives to songs heard. Where RepeatNet (Ren et al. 2019) attends over
    states of its own, this asks ten numbers.
    """

    coefficients: tuple[float, ...]  # 1 + F of them, the constant first

    def chances(self, features: np.ndarray) -> np.ndarray:
        """float32 (Q,): in (0, 1)."""
        return np.asarray(expit(_with_one(features) @ np.array(self.coefficients)), dtype=np.float32)

    def shifted(self, by: float) -> "RepeatGate":
        """One whose log-odds of a repeat are higher by this."""
        return replace(self, coefficients=(self.coefficients[0] + by, *self.coefficients[1:]))

    @classmethod
    def fit(cls, features: np.ndarray, repeated: np.ndarray) -> "RepeatGate":
        """From features, float64 (Q, F), and whether each next play was a repeat, bool (Q,)."""
        inputs, signs = _with_one(features), np.where(repeated, 1.0, -1.0)

        def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
            margins = signs * (inputs @ coefficients)
            value = -log_expit(margins).mean() + RIDGE * coefficients @ coefficients
            slope = -(signs * expit(-margins)) @ inputs / len(signs) + 2 * RIDGE * coefficients
            return float(value), slope

        found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B")
        return cls(tuple(found.x.tolist()))


def gate_features(repeats: Repeats, heard_MQ: np.ndarray, new_MQ: np.ndarray) -> np.ndarray:
    """float64 (Q, F): with what M members think of all songs heard and of all others, float32 (M, Q) both."""
    odds_MQ = np.log((heard_MQ.astype(np.float64) + LITTLE) / (new_MQ.astype(np.float64) + LITTLE))
    return np.concatenate([repeats.features, odds_MQ.T], axis=1)


def _with_one(features: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(features), 1)), features], axis=1)
