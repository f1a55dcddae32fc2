"""Requests and answers about stored users, as the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from rayrec.serving.schemas import Moment, Play, Request, UserId
from rayrec.serving.serve_config import MAX_ID, MAX_PLAYS

PLAY_EXAMPLE: dict[str, Any] = {
    "event_id": "4f1c9b52-7c1e-4a53-9a43-6d8f6f2f7c10",
    "user_id": "ann",
    "song": "song-12",
    "played_at": "2026-01-20T18:24:00Z",
}


class NewPlay(Play):
    """A play of a user."""

    model_config = ConfigDict(json_schema_extra={"examples": [PLAY_EXAMPLE]})

    event_id: Annotated[str, Field(min_length=1, max_length=MAX_ID)] = Field(
        description="The same whenever this play is sent again, and no other play's: it counts once."
    )
    user_id: UserId
    played_at: Moment | None = Field(default=None, description="When; now, where it is left out.")


class NewPlays(Request):
    """Plays of any users; those of one user at one moment are taken in this order."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"plays": [PLAY_EXAMPLE]}]})

    plays: list[NewPlay] = Field(min_length=1, max_length=MAX_PLAYS)


class SentPlays(RootModel[NewPlay | NewPlays]):
    """One play, or many."""

    model_config = ConfigDict(json_schema_extra={"examples": [PLAY_EXAMPLE, {"plays": [PLAY_EXAMPLE]}]})

    @property
    def plays(self) -> list[NewPlay]:
        """The plays, however they were sent."""
        return [self.root] if isinstance(self.root, NewPlay) else self.root.plays


class PlaysTaken(BaseModel):
    """What became of the plays."""

    release: str = Field(description="Id of the release whose model took them.")
    taken: int = Field(description="Plays that are part of their users' states now.")
    repeated: int = Field(description="Plays that were there already; nothing changed.")
    rejected: int = Field(description="Plays too old to be put in their place.")
    unknown_songs: int = Field(description="Plays of songs that the release does not know; left out.")
    outcomes: list[Literal["taken", "repeated", "rejected", "unknown"]] = Field(description="One for each play.")


class UserTaste(BaseModel):
    """Where a stored user stands."""

    release: str
    model: str = Field(description="Id of the model; vectors of two models cannot be compared.")
    user_id: str
    at: int = Field(description="The moment of the request, ms UTC.")
    plays: int = Field(description="Plays that the vectors are drawn from.")
    last_played_at: int | None = Field(description="The last of them, ms UTC.")
    rejected: int = Field(description="Plays that came too late to be put in their place.")
    short: list[float] = Field(description="Points at the next songs; normalized.")
    long: list[float] = Field(description="Points at songs for the time to come; normalized.")
