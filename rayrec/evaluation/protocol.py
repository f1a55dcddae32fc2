"""The protocol: what is measured, which plays are predicted, and for whom.

Every play of the test range that has an earlier play by the same user is a question, asked at its
time. Figures are means over questions: sums and counts are carried, never means of means.

Q questions, U users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from rayrec.config import Settings
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import GROUPS

USUAL_K = 20


class EvaluateConfig(Settings):
    """What is measured, and how finely."""

    models: tuple[str, ...] | None = Field(
        None, description="Models to compare, NAME=ID for another network; default: the network and all baselines"
    )
    ks: tuple[PositiveInt, ...] = Field((10, 20, 100), description="Cutoffs k of recall, MRR and NDCG")
    bootstrap_samples: int = Field(1000, ge=0, description="Bootstrap samples over users; 0 computes no intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="Confidence level of the intervals")
    offsets: int = Field(100, ge=0, description="Offsets of the cosine curve, in plays ahead; 0 computes no curve")
    max_curve_users: int = Field(
        5_000, ge=0, description="Users sampled for the cosine curve, pairwise accuracy and recommendation statistics"
    )
    seed: int = Field(0, ge=0, description="Random seed of the bootstrap, sampled users and negatives")

    @model_validator(mode="after")
    def _check_lists(self) -> EvaluateConfig:
        if self.models is not None and not self.models:
            raise ValueError("models is empty; expected at least one name, or no value for all models")
        if not self.ks or len(set(self.ks)) < len(self.ks):
            raise ValueError(f"ks is {list(self.ks)}; expected different cutoffs such as 10, 20, 100")
        return self


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
