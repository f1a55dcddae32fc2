"""Settings of what retrievers look up."""

from dataclasses import dataclass

from rayrec.config import setting
from rayrec.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What is kept of sessions and rules."""

    sessions_per_song: int = setting(50, help="Newest sessions kept for each song")
    rules_per_song: int = setting(200, help="Strongest followers kept for each song")

    def __post_init__(self) -> None:
        for name in ("sessions_per_song", "rules_per_song"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; expected 1 or more")
