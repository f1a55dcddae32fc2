"""The plays to predict in parts: by length of history, by activity of the user, by context of the play.

Q questions, S slices.
"""

from collections.abc import Sequence

import numpy as np

from rayrec.data.histories import Histories, Questions

BOUNDS = (1, 5, 20, 100)  # the least plays of each class
CLASSES = ("1-4", "5-19", "20-99", "100+")


def slices_of(contexts: Sequence[str]) -> list[tuple[str, str]]:
    """What each slice goes by and its name, S of them: history, activity and the named contexts.

    history: the user's plays before the question. activity: how many plays of the user are
    predicted. context: where the play to predict came from; a play of several counts in each.
    """
    by_plays = [(by, name) for by in ("history", "activity") for name in CLASSES]
    return by_plays + [("context", name) for name in contexts]


def slice_masks(histories: Histories, questions: Questions, contexts: Sequence[str]) -> np.ndarray:
    """bool (S, Q): the questions in each of the slices of `slices_of`."""
    activity = np.bincount(questions.rows, minlength=len(histories))[questions.rows]
    masks = [class_of(plays) == place for plays in (questions.seen, activity) for place in range(len(CLASSES))]
    asked_for = histories.offsets[questions.rows] + questions.seen
    bits = np.zeros(len(questions), np.int32) if histories.contexts is None else histories.contexts[asked_for]
    masks += [(bits >> bit) & 1 == 1 for bit in range(len(contexts))]
    return np.stack(masks)


def class_of(plays: np.ndarray) -> np.ndarray:
    """int64: the place in CLASSES of numbers of plays, at least 1 each."""
    return np.asarray(np.searchsorted(BOUNDS, plays, side="right") - 1)
