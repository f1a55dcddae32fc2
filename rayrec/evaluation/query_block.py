"""A block of users with their queries: what is the same for all models, computed once.

Q queries, U users, G groups of users, S slices, B bootstrap samples, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import LAST
from rayrec.evaluation.bootstrap import poisson_weights
from rayrec.evaluation.protocol import (
    GROUPS,
    OFFSETS,
    EvaluateConfig,
    HeardSongs,
    TargetSongs,
    slice_masks,
    target_songs,
    user_groups,
)


@dataclass(frozen=True, kw_only=True)
class QueryBlock:
    """Users and queries, the target songs, and for whom and in what each query counts."""

    histories: Histories
    queries: Questions
    weights: np.ndarray  # float64 (B + 1, U)
    groups: list[np.ndarray]  # G times int64: the users of each group
    targets: dict[str, TargetSongs]  # of OFFSETS
    counted: dict[str, np.ndarray]  # view -> bool (Q,), the queries that count in it
    slices: np.ndarray  # bool (S, Q)
    drawn: np.ndarray  # bool (Q,)
    heard: HeardSongs

    @classmethod
    def of(
        cls,
        histories: Histories,
        plays: np.ndarray,
        split: Split,
        config: EvaluateConfig,
        curve_share: float,
        contexts: Sequence[str],
    ) -> QueryBlock:
        """The queries whose next plays are those at positions `plays`, int (Q,)."""
        queries = Questions.before_plays(histories, plays)
        groups = user_groups(histories, split)
        drawn = user_hash(histories.user_ids, salt=f"curves {config.seed} ") / 2.0**64 < curve_share
        heard = HeardSongs(histories)
        repeat = heard(queries.rows, queries.seen, histories.songs[plays])
        targets = {name: target_songs(histories, queries, name, heard) for name in OFFSETS}
        counted = {name: target.sizes > 0 for name, target in targets.items()}
        last = plays == histories.offsets[queries.rows + 1] - 1
        return cls(
            histories=histories,
            queries=queries,
            weights=poisson_weights(histories.user_ids, config.bootstrap_samples, config.seed),
            groups=[np.flatnonzero(groups == group) for group in range(len(GROUPS))],
            targets=targets,
            counted={**counted, "next_new": ~repeat, "next_repeat": repeat, LAST: last},
            slices=slice_masks(histories, queries, contexts),
            drawn=drawn[queries.rows],
            heard=heard,
        )

    def sums_by_user(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float64 (U, C): the sums of values (Q, C) over each user's queries, those in the mask (Q,) alone."""
        chosen = np.arange(len(self.queries)) if mask is None else np.flatnonzero(mask)
        users = self.queries.rows[chosen]
        columns = [np.bincount(users, weights=column, minlength=len(self.histories)) for column in values[chosen].T]
        return np.stack(columns, axis=1)

    def weighted(self, per_user: np.ndarray, users: np.ndarray) -> np.ndarray:
        """float64 (B + 1, C): bootstrap sums of (U, C) over some users."""
        return np.asarray(self.weights[:, users] @ per_user[users])
