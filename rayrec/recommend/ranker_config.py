"""Settings of the rank stage. Loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from rayrec.config import setting
from rayrec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How rankers are grown, and on how many queries."""

    queries: int = setting(40_000, help="Queries of the validation range to learn from, at most")
    trees: int = setting(300, help="Trees, at most; growing stops where held-out users gain nothing more")
    leaves: int = setting(31, help="Leaves of a tree")
    learning_rate: float = setting(0.07, help="Weight of each tree")
    min_long_queries: int = setting(20, help="Held-out queries below which the long horizon gets no ranker")
    seed: int = setting(0, help="Random seed")

    def __post_init__(self) -> None:
        for name in ("queries", "trees"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.leaves < 2:
            raise InputError(f"leaves is {self.leaves}; expected 2 or more")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}; expected more than 0")
