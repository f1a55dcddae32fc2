"""Settings of the two steps: retrieval and rankers. Loads nothing heavy."""

from pydantic import Field

from rayrec.config import Settings


class RankConfig(Settings):
    """How rankers are trained, and on how many queries."""

    queries: int = Field(40_000, ge=1, description="Maximum queries of the validation range to train on")
    trees: int = Field(600, ge=1, description="Maximum trees; training stops where held-out users gain nothing more")
    leaves: int = Field(31, ge=2, description="Leaves per tree")
    learning_rate: float = Field(0.05, gt=0, description="Weight of each tree")
    min_long_queries: int = Field(20, ge=1, description="Held-out queries needed to train a long-horizon ranker")
    seed: int = Field(0, ge=0, description="Random seed")


class RetrievalConfig(Settings):
    """How many sessions and rules are kept."""

    sessions_per_song: int = Field(50, ge=1, description="Newest sessions kept for each song")
    rules_per_song: int = Field(200, ge=1, description="Strongest followers kept for each song")
    full: bool = Field(
        False, description="Count all plays instead of adding the new ones to what an earlier run has counted"
    )
