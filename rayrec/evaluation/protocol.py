"""The protocol: what is measured, which plays are predicted, and for whom.

Every play of the test range that has an earlier play by the same user is a question, asked at its
time. Figures are means over questions: sums and counts are carried, never means of means.

Q questions, U users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.config import setting
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import GROUPS

USUAL_K = 20


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, and how finely."""

    models: tuple[str, ...] | None = setting(
        None, help="models by name, NAME=ID for the network of another model; none: the network and every baseline"
    )
    ks: tuple[int, ...] = setting((10, 20, 100), help="cut-offs of recall, MRR and NDCG")
    bootstrap_samples: int = setting(1000, help="samples of the bootstrap over users; 0: no intervals")
    confidence: float = setting(0.95, help="share of the bootstrap samples within low and high, in (0, 1)")
    offsets: int = setting(100, help="plays ahead in the curve of mean cosine; 0: no curve")
    max_curve_users: int = setting(
        5_000, help="about how many users are drawn for the curves, the pairs and what is recommended"
    )
    seed: int = setting(0, help="of the bootstrap, of the users drawn and of the negatives")

    def __post_init__(self) -> None:
        if self.models is not None and not self.models:
            raise InputError("models is empty; name at least one, or leave it out for all")
        if not self.ks or min(self.ks) < 1 or len(set(self.ks)) < len(self.ks):
            raise InputError(f"ks is {self.ks}; give different cut-offs of at least 1, such as 10,20,100")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence {self.confidence} is not in (0, 1); give a share such as 0.95")
        for name in ("bootstrap_samples", "offsets", "max_curve_users"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}; it must not be negative")


def usual_k(ks: Sequence[int]) -> int:
    """The cut-off of comparisons, breakdowns and headlines: 20, or the deepest where 20 is not among them."""
    return USUAL_K if USUAL_K in ks else max(ks)


def plays_to_predict(histories: Histories, split: Split) -> np.ndarray:
    """int64 (Q,): positions of the plays to predict, those of the test range with an earlier play."""
    has_earlier = np.ones(histories.num_plays, dtype=bool)
    has_earlier[histories.offsets[:-1][histories.lengths > 0]] = False
    return np.flatnonzero(has_earlier & split.is_test(histories))


def blocks(histories: Histories, split: Split, questions: int) -> Iterator[tuple[Histories, np.ndarray]]:
    """The users who have test plays, with the positions of these, in blocks of about `questions` of them."""
    rows = histories.rows[plays_to_predict(histories, split)]
    users, counts = np.unique(rows, return_counts=True)
    number = (np.cumsum(counts) - counts) // questions
    for cut in np.split(users, np.flatnonzero(np.diff(number)) + 1):
        if len(cut):
            block = histories.take(cut)
            yield block, plays_to_predict(block, split)


def user_groups(histories: Histories, split: Split) -> np.ndarray:
    """int64 (U,): the place in GROUPS of each user: held out, else seen with a play before the test range, else new."""
    earlier = np.bincount(histories.rows[~split.is_test(histories)], minlength=len(histories)) > 0
    groups = np.where(earlier, GROUPS.index("seen"), GROUPS.index("new"))
    allowed = split.held_out.allowed_users(histories.user_ids)
    return np.where(allowed, groups, GROUPS.index("held_out"))
