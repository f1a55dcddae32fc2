"""A block of users with their queries: what is the same for all models, computed once.

Q queries, U users, G groups of users, S slices, C bootstrap cells, K columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayrec.data.histories import Histories, Questions, user_hash
from rayrec.data.split import Split
from rayrec.evaluation.accumulator import LAST
from rayrec.evaluation.bootstrap import CellRange
from rayrec.evaluation.protocol import (
    GROUPS,
    OFFSETS,
    EvaluateConfig,
    HeardSongs,
    TargetSongs,
    plays_to_predict,
    slice_masks,
    target_songs,
    user_groups,
)
from rayrec.recommend.vector_recommender import VectorRecommender


@dataclass(frozen=True, kw_only=True)
class QueryBlock:
    """Users and queries, the target songs, and for whom and in what each query counts."""

    histories: Histories
    queries: Questions
    cells: np.ndarray  # int64 (U,), the bootstrap cell of each user
    num_cells: int  # C
    groups: np.ndarray  # int64 (U,), the place in GROUPS of each user
    targets: dict[str, TargetSongs]  # of OFFSETS
    counted: dict[str, np.ndarray]  # view -> bool (Q,), the queries that count in it
    slices: np.ndarray  # bool (S, Q)
    drawn: np.ndarray  # bool (Q,), queries of the users drawn for curves, pairs and lists
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
        cells: CellRange,
        known_songs: np.ndarray,
        network: VectorRecommender | None = None,
    ) -> QueryBlock:
        """The queries whose next plays are those at positions `plays`, int (Q,).

        `known_songs` are as in `target_songs`, `network` as in `slice_masks`.
        """
        queries = Questions.before_plays(histories, plays)
        drawn = user_hash(histories.user_ids, salt=f"curves {config.seed} ") / 2.0**64 < curve_share
        heard = HeardSongs(histories)
        repeat = heard(queries.rows, queries.seen, histories.songs[plays])
        targets = {name: target_songs(histories, queries, name, heard, known_songs) for name in OFFSETS}
        counted = {name: target.sizes > 0 for name, target in targets.items()}
        last = plays == histories.offsets[queries.rows + 1] - 1
        predicted = np.bincount(histories.rows[plays_to_predict(histories, split)], minlength=len(histories))
        return cls(
            histories=histories,
            queries=queries,
            cells=cells.cells_of(histories.user_ids),
            num_cells=cells.count,
            groups=user_groups(histories, split),
            targets=targets,
            counted={**counted, "next_new": ~repeat, "next_repeat": repeat, LAST: last},
            slices=slice_masks(histories, queries, predicted, contexts, network),
            drawn=drawn[queries.rows],
            heard=heard,
        )

    def sums(self, values: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """float64 (C, G, K): the sums of values (Q, K), those of the queries in the mask (Q,) alone."""
        chosen = np.arange(len(self.queries)) if mask is None else np.flatnonzero(mask)
        users = self.queries.rows[chosen]
        keys = self.cells[users] * len(GROUPS) + self.groups[users]
        size = self.num_cells * len(GROUPS)
        columns = [np.bincount(keys, weights=column, minlength=size) for column in values[chosen].T]
        return np.stack(columns, axis=1).reshape(self.num_cells, len(GROUPS), -1)

    def sums_of_users(self, values: np.ndarray) -> np.ndarray:
        """float64 (C, ...): the sums of values (U, ...)."""
        sums = np.zeros((self.num_cells, *values.shape[1:]))
        np.add.at(sums, self.cells, values)
        return sums
