"""Settings of the retrieval stage. Loads nothing heavy."""

from pydantic import Field

from rayrec.config import Settings


class RetrievalConfig(Settings):
    """How many sessions and rules are kept."""

    sessions_per_song: int = Field(50, ge=1, description="Newest sessions kept for each song")
    rules_per_song: int = Field(200, ge=1, description="Strongest followers kept for each song")
    full: bool = Field(
        False, description="Count all plays instead of adding the new ones to what an earlier run has counted"
    )
