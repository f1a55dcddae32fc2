"""A block of users with the questions asked of them: what is the same for all models, made once.

Q questions, U users, G groups of users, S slices, B bootstrap samples, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import GROUPS, LAST
from rayrec.evaluation.bootstrap import poisson_weights
from rayrec.evaluation.protocol import EvaluateConfig, user_groups
from rayrec.evaluation.slices import slice_masks
from rayrec.evaluation.targets import AHEAD, Answers, Heard, answers


@dataclass(frozen=True, kw_only=True)
class Block:
    """Users and questions, the right answers, and for whom and what each question counts."""

    histories: Histories
    questions: Questions
    weights: np.ndarray  # float64 (B + 1, U)
    groups: list[np.ndarray]  # G times int64: the users of each group
    answers: dict[str, Answers]  # of the targets of AHEAD
    asked: dict[str, np.ndarray]  # view -> bool (Q,), the questions that count in it
    slices: np.ndarray  # bool (S, Q)
    drawn: np.ndarray  # bool (Q,)
    heard: Heard

    @classmethod
    def of(
        cls,
        histories: Histories,
        plays: np.ndarray,
        split: Split,
        config: EvaluateConfig,
        curve_share: float,
        contexts: Sequence[str],
    ) -> Block:
        """The questions whose answers are the plays at positions `plays`, int (Q,)."""
        questions = Questions.before_plays(histories, plays)
        groups = user_groups(histories, split)
        drawn = user_hash(histories.user_ids, salt=f"curves {config.seed} ") / 2.0**64 < curve_share
        heard = Heard(histories)
        again = heard(questions.rows, questions.seen, histories.songs[plays])
        wanted = {target: answers(histories, questions, target) for target in AHEAD}
        asked = {target: wanted[target].sizes > 0 for target in AHEAD}
        last = plays == histories.offsets[questions.rows + 1] - 1
        return cls(
            histories=histories,
            questions=questions,
            weights=poisson_weights(histories.user_ids, config.bootstrap_samples, config.seed),
            groups=[np.flatnonzero(groups == group) for group in range(len(GROUPS))],
            answers=wanted,
            asked={**asked, "next_new": ~again, "next_repeat": again, LAST: last},
            slices=slice_masks(histories, questions, contexts),
            drawn=drawn[questions.rows],
            heard=heard,
        )

    def sums_by_user(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float64 (U, C): the sums of values (Q, C) over each user's questions, those in the mask (Q,) alone."""
        chosen = np.arange(len(self.questions)) if mask is None else np.flatnonzero(mask)
        users = self.questions.rows[chosen]
        columns = [np.bincount(users, weights=column, minlength=len(self.histories)) for column in values[chosen].T]
        return np.stack(columns, axis=1)

    def weighted(self, per_user: np.ndarray, users: np.ndarray) -> np.ndarray:
        """float64 (B + 1, C): bootstrap sums of (U, C) over some users."""
        return np.asarray(self.weights[:, users] @ per_user[users])
