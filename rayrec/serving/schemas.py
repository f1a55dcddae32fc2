"""Requests and answers, as the OpenAPI document shows them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.responses import Response

from rayrec.serving.serve_config import MAX_BATCH, MAX_HISTORY, MAX_ID, MAX_K, MAX_LISTED

LAST_MOMENT = 253_402_300_799_999  # ms UTC: the end of the year 9999

UserId = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
SongId = Annotated[str, Field(min_length=1, max_length=MAX_ID, description="Id of a song, as it was imported.")]
Moment = Annotated[
    Annotated[int, Field(ge=0, le=LAST_MOMENT)] | Annotated[str, Field(min_length=1, max_length=40)],
    Field(description="ISO 8601 with a zone, or unix seconds or milliseconds."),
]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="YYYY-MM-DD.")]
Weight = Annotated[float, Field(ge=0, le=1)]


class Request(BaseModel):
    """What is sent: nothing beside the fields, no value of another type, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Play(Request):
    """A song that was played."""

    song: SongId
    played_at: Moment | None = Field(default=None, description="When; for all plays of a history or for none.")
    contexts: list[Annotated[str, Field(max_length=MAX_ID)]] = Field(
        default=[], max_length=31, description="Where it was played from; names unknown to the data set say nothing."
    )
    skipped: bool = Field(default=False, description="Whether it was skipped.")


HISTORY_EXAMPLE: list[Any] = [
    {"song": "song-12", "played_at": "2026-01-20T18:24:00Z"},
    {"song": "song-7", "played_at": "2026-01-20T18:27:30Z"},
]


History = Annotated[
    list[Play | SongId],
    Field(
        max_length=MAX_HISTORY,
        description="Songs played, the latest last, as plays or as bare ids. Without times they count as played "
        "three minutes apart, the last at the moment of the request.",
        examples=[HISTORY_EXAMPLE],
    ),
]
At = Annotated[Moment | None, Field(description="The moment of the request: now, where it is left out.")]


class Asker(Request):
    """Whose taste is asked for, and when."""

    history: History
    at: At = None


class RecommendationsRequest(Request):
    """For whom to recommend, and what: for a stored user, or for whoever has the history."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["user_id"]}, {"required": ["history"]}],
            "examples": [
                {"user_id": "ann", "k": 5},
                {"history": HISTORY_EXAMPLE, "at": "2026-01-20T18:31:00Z", "k": 5, "horizon": "short"},
                {"history": ["song-12", "song-7"], "horizon": 0.5, "exclude_heard": False, "exclude": ["song-3"]},
                {"history": ["song-12"], "artists": ["Abba"], "diversity": 0.3, "explain": True},
            ],
        }
    )

    user_id: UserId = Field(default="", description="A user whose plays were loaded or sent before.")
    history: History = []
    at: At = None
    k: int = Field(default=20, ge=1, le=MAX_K, description="How many songs.")
    horizon: Literal["short", "long"] | Weight = Field(
        default="short",
        description="short: the next songs; long: songs for the time to come; a number from 0 to 1: "
        "both, with this weight for long.",
    )
    exclude_heard: bool = Field(default=True, description="Leave out the songs that were played.")
    exclude: list[SongId] = Field(default=[], max_length=MAX_LISTED, description="Songs to leave out.")
    allow: list[SongId] | None = Field(default=None, max_length=MAX_LISTED, description="Songs to keep to.")
    artists: list[Annotated[str, Field(min_length=1, max_length=MAX_ID)]] = Field(
        default=[], max_length=100, description="Keep to songs of these artists, whatever case and accents."
    )
    released_from: Day | None = Field(default=None, description="Keep to songs released on that day or later.")
    released_to: Day | None = Field(default=None, description="Keep to songs released on that day or earlier.")
    market: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Keep to songs that name this market."
    )
    diversity: Weight = Field(
        default=0.0,
        description="0: the best songs; up to 1: the more unlike each other. Then they come in the order of choice.",
    )
    explain: bool = Field(
        default=False,
        description="Explain which of the last plays influenced the taste most, and why each song is recommended.",
    )

    @model_validator(mode="after")
    def _one_listener(self) -> "RecommendationsRequest":
        if ("user_id" in self.model_fields_set) == ("history" in self.model_fields_set):
            raise ValueError("give either a user_id or a history")
        return self

    @property
    def long_weight(self) -> float:
        """The weight of the long horizon."""
        return {"short": 0.0, "long": 1.0}[self.horizon] if isinstance(self.horizon, str) else self.horizon


class BatchRequest(Request):
    """Requests of many users."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [{"history": ["song-12"]}, {"history": ["song-7"], "k": 5}]}]}
    )

    requests: list[RecommendationsRequest] = Field(min_length=1, max_length=MAX_BATCH)


class TastesRequest(Request):
    """Histories of many users."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"users": [{"history": HISTORY_EXAMPLE}]}]})

    users: list[Asker] = Field(min_length=1, max_length=MAX_BATCH)


class RecommendedSong(BaseModel):
    """One song of an answer."""

    song: str
    title: str | None = None
    artist: str | None = None
    score: float = Field(description="Comparable within one answer only.")
    because: str | None = Field(
        default=None, description="Explained: the song among the last plays that this one owes most to, if any."
    )


class Reason(BaseModel):
    """One of the last plays, and what it did."""

    song: str
    title: str | None = None
    artist: str | None = None
    played_at: int = Field(description="ms UTC; made up where the request gave no times.")
    moved: float = Field(description="1 − cosine of the taste vector with the one without this play, from 0 to 2.")


class Recommendations(BaseModel):
    """Songs, best first."""

    release: str = Field(description="Id of the release that answered.")
    at: int = Field(description="The moment of the request, ms UTC.")
    source: Literal["taste", "popular"] = Field(
        description="taste: from the plays; popular: no play is known, so these are the most played songs."
    )
    path: Literal["index", "selector", "exact", "popular"] = Field(
        description="index: the first of the index that qualify; selector: a search of it among those that qualify; "
        "exact: by scoring every song that does; popular: by play counts."
    )
    plays: int = Field(description="Plays of known songs that the answer is drawn from.")
    unknown_songs: int = Field(description="Songs of history and exclude that the release does not know.")
    songs: list[RecommendedSong] = Field(description="k of them, fewer only where fewer qualify.")
    explanation: list[Reason] | None = Field(
        default=None,
        description="Explained: the last plays, the one that moved the taste vector most first. Of an answer by "
        "network and memory it explains the network.",
    )


class BatchAnswer(BaseModel):
    """The answers in the order of the requests, all of one release."""

    release: str
    answers: list[Recommendations]


class Taste(BaseModel):
    """A user's taste vectors, normalized."""

    at: int = Field(description="The moment of the request, ms UTC.")
    plays: int = Field(description="Plays of known songs that they are drawn from.")
    unknown_songs: int
    short: list[float] = Field(description="Points at the next songs.")
    long: list[float] = Field(description="Points at songs for the time to come.")


class Tastes(BaseModel):
    """The tastes in the order of the users, all of one release."""

    release: str
    model: str = Field(description="Id of the model; vectors of two models cannot be compared.")
    dim: int
    tastes: list[Taste]


class Refused(BaseModel):
    """A release that could not be loaded."""

    id: str
    reason: str


class Replica(BaseModel):
    """What a replica said of itself last."""

    replica: str
    role: Literal["app", "model", "index"] = Field(
        description="model, index: where these are deployments of their own."
    )
    release: str | None
    change: str | None = Field(description="The activation that it acted on last.")
    refused: Refused | None
    at: float = Field(description="When it said so, seconds since 1970.")


class ReleaseStatus(BaseModel):
    """Which release answers."""

    replica: str = Field(description="The replica that says this.")
    release: str | None = Field(description="The release that it answers with.")
    refused: Refused | None = Field(description="The release that it could not load, and why.")
    wanted: str | None = Field(description="The release that was activated.")
    change: str = Field(description="The activation.")
    agreed: bool = Field(description="Whether all replicas answer with the wanted release.")
    replicas: list[Replica]


class Health(BaseModel):
    """The application is there."""

    status: Literal["ok"] = "ok"
    release: str | None = None


def as_json(answer: BaseModel, status: int = 200) -> Response:
    """A response whose model was made by us: written out once, not checked again."""
    return Response(answer.model_dump_json(), status, media_type="application/json")
