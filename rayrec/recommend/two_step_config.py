"""Settings of retrieval and ranking, and the parts that an ablation leaves out. Imports no large library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from rayrec.config import Settings


class RankConfig(Settings):
    """How rankers are trained, and on how many queries."""

    queries: int = Field(40_000, ge=1, description="Maximum number of queries from the validation range to train on")
    trees: int = Field(
        600, ge=1, description="Maximum number of trees; training stops earlier if held-out queries no longer improve"
    )
    leaves: int = Field(31, ge=2, description="Leaves per tree")
    learning_rate: float = Field(0.05, gt=0, description="Weight of each tree")
    min_long_queries: int = Field(20, ge=1, description="Minimum number of held-out queries for a long-horizon ranker")
    seed: int = Field(0, ge=0, description="Random seed")


class RetrievalConfig(Settings):
    """How many sessions and rules are kept."""

    sessions_per_song: int = Field(50, ge=1, description="Number of newest sessions to keep per song")
    rules_per_song: int = Field(
        200, ge=1, description="Number of strongest followers (songs played soon after it) to keep per song"
    )
    full: bool = Field(
        False, description="Count all plays again instead of adding only new plays to the counts of an earlier run"
    )


@dataclass(frozen=True, kw_only=True)
class RankedPart:
    """The retrievers and features of one part that an ablation can leave out."""

    retrievers: tuple[str, ...]
    features: tuple[str, ...]  # prefixes of the names of its features, in addition to those of its retrievers


# Features of the query as a whole, such as history length, pauses and repeats, belong to no part.
ABLATED_PARTS = {
    "network": RankedPart(retrievers=("taste_short", "taste_long", "new_content"), features=("cosine_", "logit_")),
    "sessions": RankedPart(retrievers=("sessions", "history_sessions"), features=()),
    "rules": RankedPart(retrievers=("rules", "next_rules", "recent_rules", "history_rules"), features=("rules_lift",)),
    "user plays": RankedPart(retrievers=("user_top", "user_rules"), features=("user_",)),
    "artists": RankedPart(
        retrievers=("artists", "albums", "new_artists", "new_albums"),
        features=("artist_", "album_", "recent_artists", "recent_albums"),
    ),
}


def kept_features(names: Iterable[str], part: RankedPart | None) -> list[int]:
    """Return the positions of the features that remain if `part` is left out; all positions if it is None."""
    prefixes = part.features if part else ()
    return [position for position, name in enumerate(names) if not (prefixes and name.startswith(prefixes))]
