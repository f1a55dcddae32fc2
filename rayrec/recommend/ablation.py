"""The parts of two-step recommendation that an ablation leaves out: retrievers, and the features made from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankedPart:
    """What one part brings in."""

    retrievers: tuple[str, ...]
    features: tuple[str, ...]  # beginnings of the names of its features, beside those that retrievers score


# The features of all plays of a query (its lengths, pauses and repeats) belong to no part.
ABLATED_PARTS = {
    "network": RankedPart(retrievers=("taste_short", "taste_long", "new_content"), features=("cosine_", "logit_")),
    "sessions": RankedPart(retrievers=("sessions",), features=()),
    "rules": RankedPart(retrievers=("rules", "next_rules", "recent_rules"), features=("rules_lift",)),
    "own plays": RankedPart(retrievers=("user_top", "user_rules"), features=("user_",)),
    "artists": RankedPart(
        retrievers=("artists", "albums", "new_artists", "new_albums"),
        features=("artist_", "album_", "recent_artists", "recent_albums"),
    ),
}


def kept_features(names: Iterable[str], part: RankedPart | None) -> list[int]:
    """The places of the features that are left without a part."""
    left_out = part.features if part else ()
    return [place for place, name in enumerate(names) if not (left_out and name.startswith(left_out))]
