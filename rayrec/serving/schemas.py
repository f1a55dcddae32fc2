"""Models of requests and answers. The OpenAPI document contains their docstrings and descriptions."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    RootModel,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from starlette.responses import Response

from rayrec.data.moments import END_MS, format_iso, now_ms, parse_timestamp
from rayrec.data.spelling import EXPECTED_ID, MAX_ID, spell_id, spell_text, spell_value
from rayrec.errors import InputError
from rayrec.recommend.base import LATEST_PLAYS, weight_of_long
from rayrec.serving.serve_config import MAX_BATCH, MAX_HISTORY, MAX_K, MAX_LISTED, MAX_NEW_SONGS, MAX_PLAYS

LAST_MOMENT = END_MS - 1  # ms UTC
PlayOutcome = Literal["taken", "repeated", "rejected", "unknown", "invalid"]
EventType = Literal["play", "skip", "like"]
SongOutcome = Literal["added", "known"]
MAX_VECTOR = 4_096  # maximum length of a content vector
MAX_FLOAT32 = float(np.finfo(np.float32).max)  # content vectors are float32: a larger number would be infinite
AHEAD_MS = 24 * 3600 * 1000  # limit for a client's clock: a play in the far future would block later plays
MAX_ERRORS = 20  # per answer
MAX_SEARCH = 200  # characters of a search for songs
MAX_MATCHES = 100  # songs of the answer to a search
TAG = "<"  # first character of union tags: they are no part of a request, so the location of an error omits them


def _moment(value: object) -> int:
    """Return a moment of a request in ms UTC."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or len(str(value)) > 40:
        raise ValueError("expected ISO 8601 with a zone, or unix seconds or milliseconds")
    try:
        return parse_timestamp(f"{value:.3f}" if isinstance(value, float) else value)
    except InputError as error:
        raise ValueError(str(error)) from error


def _play_moment(moment: int) -> int:
    if moment > now_ms() + AHEAD_MS:
        raise ValueError(f"{format_iso(moment)} is more than a day in the future; check the sender's clock")
    return moment


def spelled_user(text: str) -> str:
    """Return a user id spelled as in every import."""
    user_id = spell_id(text)
    if user_id is None:
        raise ValueError(f"not a user ID; {EXPECTED_ID}")
    return user_id


def spelled_song(text: str) -> str:
    """Return a song id spelled as in every import."""
    song_id = spell_id(text)
    if song_id is None:
        raise ValueError(f"not a song ID; {EXPECTED_ID}")
    return song_id


MOMENT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "minimum": 0, "maximum": LAST_MOMENT},
        {"type": "string", "minLength": 1, "maxLength": 40},
    ],
    "description": "ISO 8601 with a zone, or unix seconds or milliseconds.",
}
HORIZON_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": ["short", "long"], "type": "string"}, {"type": "number", "minimum": 0, "maximum": 1}],
    "default": "short",
    "description": "short: the next songs; long: songs for a later time; a number from 0 to 1: both, with this weight "
    "for long.",
}
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
UserId = Annotated[Id, AfterValidator(spelled_user)]
SongId = Annotated[Id, Field(description="ID of a song, as it was imported.")]
Moment = Annotated[Any, AfterValidator(_moment), WithJsonSchema(MOMENT_SCHEMA)]
Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$", description="YYYY-MM-DD.")]
Weight = Annotated[float, Field(ge=0, le=1)]
Explain = Annotated[
    bool, Field(description="Return reasons for each song, and the last plays that the reasons refer to.")
]
Explore = Annotated[
    Weight,
    Field(
        description="Share of the answer that is drawn at random from songs with fewer than 20 plays; the answer "
        "contains the probability of each. Above 0, the answer has no further pages."
    ),
]
LongWeight = Annotated[Any, AfterValidator(weight_of_long), WithJsonSchema(HORIZON_SCHEMA)]
IsoMoment = Annotated[
    int, PlainSerializer(format_iso, return_type=str), WithJsonSchema({"type": "string", "format": "date-time"})
]


Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # reports only the first invalid item: there may be thousands


class KnownFields(BaseModel):
    """An object of a request. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, value: Any) -> Any:
        """Refuse an object with many unknown fields at once, since each of them would be an error."""
        field_count = len(cls.model_fields)
        if isinstance(value, dict) and len(value) > field_count + MAX_ERRORS:
            raise ValueError(f"got {len(value):,} fields, expected at most {field_count}; see /openapi.json")
        return value


class RequestBody(KnownFields):
    """A body, or an object in it. A value must have the type of its field; NaN and infinity are errors."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class InvalidEntry(BaseModel):
    """The answer to an invalid entry of a batch. The other entries are answered."""

    detail: str
    errors: list[dict[str, str]] = Field(description="Field and reason of each error.")


def _keep_invalid(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError as error:
        return InvalidEntry(detail="The entry is invalid; see `errors`", errors=error_list(error.errors()))


ENTRY = WrapValidator(_keep_invalid)  # for entries of a list: an invalid one does not make the request fail


def error_list(errors: Any) -> list[dict[str, str]]:
    """Convert pydantic's errors. `where` is the field as the client wrote it, such as `k` or `history.3.played_at`.

    For an error of the whole request, `where` is `body` or `query`; for one of a whole entry of a batch, `body`.
    """

    def field_path(location: Sequence[Any]) -> str:
        parts = [str(part) for part in location if not str(part).startswith(TAG)]
        parts = parts[1:] if len(parts) > 1 and parts[0] in ("body", "query", "path") else parts
        return ".".join(parts)[:200] or "body"

    return [
        {
            "where": field_path(item["loc"]),
            "detail": item["msg"].removeprefix("Value error, ")[:500],
        }
        for item in errors[:MAX_ERRORS]
    ]


class Play(RequestBody):
    """A play of a song."""

    song_id: SongId
    played_at: Moment | None = Field(
        default=None, description="When the song was played; give it for all plays of a history or for none."
    )
    contexts: Items[Annotated[str, Field(max_length=MAX_ID)]] = Field(
        default=[], max_length=31, description="Where the play came from, such as radio; unknown names are ignored."
    )
    skipped: bool = Field(default=False, description="Whether the song was skipped.")
    share_listened: Weight | None = Field(
        default=None,
        description="Share of the song that was listened to, from 0 to 1. If it is below the --skip-below of the data "
        "set's import (default: 0.5), the play counts as skipped.",
    )

    def was_skipped(self, skip_below: float) -> bool:
        """Return True if the play was skipped, or if its `share_listened` is less than `skip_below`."""
        return self.skipped or (self.share_listened is not None and self.share_listened < skip_below)


HISTORY_EXAMPLE: list[Any] = [
    {"song_id": "song-12", "played_at": "2026-01-20T18:24:00Z"},
    {"song_id": "song-7", "played_at": "2026-01-20T18:27:30Z"},
]


def _kind(value: Any) -> str:
    return "<song id>" if isinstance(value, str) else "<play>"


History = Annotated[
    Items[Annotated[Annotated[Play, Tag("<play>")] | Annotated[SongId, Tag("<song id>")], Discriminator(_kind)]],
    Field(
        max_length=MAX_HISTORY,
        description="Played songs, the latest last, as plays or as song IDs. Without times they count as played "
        "three minutes apart, the last one three minutes before the moment of the request.",
        examples=[HISTORY_EXAMPLE],
    ),
]
At = Annotated[Moment | None, Field(description="The moment that the request is for; default: now.")]


class SongFilters(BaseModel):
    """Filters for songs. A song must pass all given filters."""

    artists: Items[Annotated[str, Field(min_length=1, max_length=MAX_ID)]] = Field(
        default=[], max_length=100, description="Only songs of these artists; case and accents are ignored."
    )
    released_from: Day | None = Field(default=None, description="Only songs released on this day or later.")
    released_to: Day | None = Field(default=None, description="Only songs released on this day or earlier.")
    market: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Only songs that are available in this market."
    )


class Page(BaseModel):
    """The part of a ranking to return."""

    k: int = Field(default=20, ge=1, le=MAX_K, description="Number of songs.")
    cursor: str | None = Field(
        default=None,
        max_length=200,
        description="The cursor of an earlier answer to the same request, to get the songs that follow; k may differ.",
    )


class SongsQuery(SongFilters, Page, KnownFields):
    """Filters and page of a list of songs of the catalog."""


class NoParameters(KnownFields):
    """The query of a URL that takes no parameters."""


class SongSearchQuery(KnownFields):
    """A search for songs of the catalog."""

    query: str = Field(min_length=1, max_length=MAX_SEARCH, description="Words of a title or an artist.")
    k: int = Field(default=20, ge=1, le=MAX_MATCHES, description="Number of songs.")


class SimilarSongsQuery(KnownFields):
    """The number of songs similar to a song."""

    k: int = Field(default=20, ge=1, le=MAX_K, description="Number of songs.")


class UserTasteQuery(KnownFields):
    """The moment of the taste vectors of a stored user."""

    at: At = None


class UserPlaysQuery(KnownFields):
    """The number of the last plays of a stored user."""

    k: int = Field(default=20, ge=1, le=LATEST_PLAYS, description="Number of plays.")


class UserOrHistory(BaseModel):
    """The user of a request, who is a stored user or the user of a given history, and the moment of the request."""

    user_id: UserId | None = Field(default=None, description="A user whose plays were loaded or sent before.")
    history: History | None = None
    at: At = None
    horizon: LongWeight = 0.0

    @model_validator(mode="after")
    def _one_user(self) -> "UserOrHistory":
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either a user_id or a history")
        return self


class TasteQuery(RequestBody):
    """A history, and the moment that its taste vectors are for."""

    history: History
    at: At = None


class RecommendationsRequest(SongFilters, Page, UserOrHistory, RequestBody):
    """A request for recommendations, for a stored user or for a given history: give either `user_id` or `history`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "ann", "k": 5},
                {"history": HISTORY_EXAMPLE, "at": "2026-01-20T18:31:00Z", "k": 5, "horizon": "short"},
                {"history": ["song-12", "song-7"], "horizon": 0.5, "exclude_heard": False, "exclude": ["song-3"]},
                {"history": ["song-12"], "artists": ["Artist 1"], "diversity": 0.3, "explain": True},
            ],
        }
    )

    exclude_heard: bool = Field(default=True, description="Leave out the songs that the user has played.")
    exclude: Items[SongId] = Field(default=[], max_length=MAX_LISTED, description="Songs to leave out.")
    allow: Items[SongId] | None = Field(
        default=None, max_length=MAX_LISTED, description="The only songs to recommend; default: all."
    )
    diversity: Weight = Field(
        default=0.0,
        description="0: the best songs; towards 1: songs that differ more from each other, in the order in which they "
        "were chosen. Above 0, the answer has no further pages.",
    )
    explore: Explore = 0.0
    explain: Explain = False


class UserRecommendationsQuery(SongsQuery):
    """A request for recommendations for a stored user, as query parameters of a URL."""

    at: At = None
    horizon: Annotated[str, Field(max_length=40, description="short, long, or the weight of long from 0 to 1.")] = (
        "short"
    )
    exclude_heard: bool = Field(default=True, description="Leave out the songs that the user has played.")
    exclude: Items[SongId] = Field(default=[], max_length=100, description="Songs to leave out.")
    diversity: Weight = Field(
        default=0.0, description="0: the best songs; towards 1: songs that differ more from each other."
    )
    explore: Explore = 0.0
    explain: Explain = False

    def request(self, user_id: str) -> RecommendationsRequest:
        """Return the same request as the body of a POST. Raises `ValidationError` for an invalid horizon."""
        fields = {name: getattr(self, name) for name in self.model_fields_set} | {"user_id": user_id}
        if self.at is not None:
            fields["at"] = format_iso(self.at)
        return RecommendationsRequest.model_validate(fields)


class RankRequest(UserOrHistory, RequestBody):
    """Songs to rank, for a stored user or for a given history: give either `user_id` or `history`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "ann", "songs": ["song-12", "song-7", "song-3"]},
                {"history": HISTORY_EXAMPLE, "at": "2026-01-20T18:31:00Z", "songs": ["song-3", "song-5"]},
            ],
        }
    )

    songs: Items[SongId] = Field(min_length=1, max_length=MAX_K, description="Songs to rank, heard or not.")
    explain: Explain = False


class BatchRequest(RequestBody):
    """Requests for recommendations for many users."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"requests": [{"history": ["song-12"]}, {"history": ["song-7"], "k": 5}]}]}
    )

    requests: list[Annotated[RecommendationsRequest, ENTRY]] = Field(min_length=1, max_length=MAX_BATCH)


class TastesRequest(RequestBody):
    """Histories of many users, to compute taste vectors from."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"users": [{"history": HISTORY_EXAMPLE}]}]})

    users: list[Annotated[TasteQuery, ENTRY]] = Field(min_length=1, max_length=MAX_BATCH)


PLAY_EXAMPLE: dict[str, Any] = {
    "event_id": "4f1c9b52-7c1e-4a53-9a43-6d8f6f2f7c10",
    "user_id": "ann",
    "song_id": "song-12",
    "played_at": "2026-01-20T18:24:00Z",
}


class NewPlay(Play):
    """A play, skip or like of a user."""

    model_config = ConfigDict(json_schema_extra={"examples": [PLAY_EXAMPLE]})

    event_id: Id = Field(
        description="Unique ID of this play. A play that is sent again with the same ID counts once. IDs are kept for "
        "at least 24 hours."
    )
    user_id: UserId
    played_at: Annotated[Moment, AfterValidator(_play_moment)] | None = Field(default=None, description="Default: now.")
    type: EventType = Field(
        default="play",
        description="play; skip: a play that was skipped; like: not a play, so it changes neither history nor taste "
        "vectors; a ranker that was trained on data with likes uses it.",
    )
    recommendation_id: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="The recommendation_id of the answer that the song was chosen from."
    )

    def was_skipped(self, skip_below: float) -> bool:
        """Return True if the event is a skip, or a play that counts as skipped as in `Play.was_skipped`."""
        return self.type == "skip" or super().was_skipped(skip_below)

    @model_validator(mode="after")
    def _like_is_no_play(self) -> "NewPlay":
        if self.type == "like" and (self.skipped or self.share_listened is not None or self.contexts):
            raise ValueError("a like is not a play; leave out skipped, share_listened and contexts")
        return self


class NewPlays(RequestBody):
    """Plays of any users. Plays of one user at the same moment keep the order of this list."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"plays": [PLAY_EXAMPLE]}]})

    plays: list[Annotated[NewPlay, ENTRY]] = Field(min_length=1, max_length=MAX_PLAYS)


def _one_or_many(value: Any) -> str:
    return "<plays>" if isinstance(value, dict) and "plays" in value else "<play>"


class SentPlays(
    RootModel[
        Annotated[Annotated[NewPlay, Tag("<play>")] | Annotated[NewPlays, Tag("<plays>")], Discriminator(_one_or_many)]
    ]
):
    """One play, or a list of plays."""

    model_config = ConfigDict(json_schema_extra={"examples": [PLAY_EXAMPLE, {"plays": [PLAY_EXAMPLE]}]})

    @property
    def plays(self) -> list[NewPlay | InvalidEntry]:
        """The plays as a list, also if one play was sent without a list."""
        return [self.root] if isinstance(self.root, NewPlay) else list(self.root.plays)


SONG_EXAMPLE: dict[str, Any] = {
    "song_id": "song-9001",
    "title": "A new one",
    "artist": "Artist 1",
    "released": "2026-01-20",
}


def spelled_names(names: list[str] | None) -> list[str] | None:
    """Return names spelled as those of a list in every import, without empty ones."""
    return None if names is None else [text for name in names if (text := spell_value(name))]


SongText = Annotated[Annotated[str, Field(max_length=MAX_ID)] | None, AfterValidator(spell_text)]


class AddedSong(RequestBody):
    """A song to add. It stays until every release in use contains it."""

    model_config = ConfigDict(json_schema_extra={"examples": [SONG_EXAMPLE]})

    song_id: Annotated[SongId, AfterValidator(spelled_song)]
    title: SongText = None
    artist: SongText = Field(
        default=None, description="Artist, spelled as in the catalog; used for the initial embedding of the song."
    )
    album: SongText = None
    released: Day | None = Field(default=None, description="Release day.")
    markets: Annotated[Items[Annotated[str, Field(max_length=64)]] | None, AfterValidator(spelled_names)] = Field(
        default=None, max_length=500, description="Markets in which the song is available."
    )
    vector: Items[Annotated[float, Field(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_VECTOR,
        description="Content vector, from the same model as the vectors of `rayrec describe --vectors`.",
    )


class AddedSongList(RequestBody):
    """Songs to add: either all or none are added."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"songs": [SONG_EXAMPLE]}]})

    songs: Items[AddedSong] = Field(min_length=1, max_length=MAX_NEW_SONGS)


def _song_or_songs(value: Any) -> str:
    return "<songs>" if isinstance(value, dict) and "songs" in value else "<song>"


class SentSongs(
    RootModel[
        Annotated[
            Annotated[AddedSong, Tag("<song>")] | Annotated[AddedSongList, Tag("<songs>")],
            Discriminator(_song_or_songs),
        ]
    ]
):
    """One song, or a list of songs."""

    model_config = ConfigDict(json_schema_extra={"examples": [SONG_EXAMPLE, {"songs": [SONG_EXAMPLE]}]})

    @property
    def songs(self) -> list[AddedSong]:
        """The songs as a list, also if one song was sent without a list."""
        return [self.root] if isinstance(self.root, AddedSong) else self.root.songs

    def where(self, place: int, field: str) -> str:
        """Return the name of a field of the song at index `place` for an error, as the client sent it."""
        return field if isinstance(self.root, AddedSong) else f"songs.{place}.{field}"


class MapRequest(RequestBody):
    """Songs to place on the map."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"songs": ["song-12", "song-7", "song-3"]}]})

    songs: Items[SongId] = Field(min_length=1, max_length=2 * MAX_K)


class CatalogSong(BaseModel):
    """A song of the catalog."""

    song_id: str
    title: str | None = None
    artist: str | None = None


Cursor = Annotated[
    str | None, Field(description="Send it with the same request to get the songs that follow; null if there are none.")
]


class RecommendedSong(CatalogSong):
    """One song of an answer."""

    score: float = Field(
        description="With rankers: the probability that the song is the next play or, on the long horizon, among the "
        "later plays; 0 for a song that is not a candidate. Without rankers, with source popular, or with a horizon "
        "between 0 and 1: comparable only within one answer. For similar songs: the cosine."
    )
    reasons: list[str] | None = Field(
        default=None, description="With explain: one to three reasons for the song, in words."
    )
    explored: bool | None = Field(default=None, description="With explore: whether the song was drawn at random.")
    probability: float | None = Field(
        default=None, description="Probability with which this request shows the explored song; null for other songs."
    )


class AnsweredSongs(BaseModel):
    """Songs, best first."""

    recommendation_id: str = Field(description="ID of this answer. Send it with plays of its songs.")
    release: str = Field(description="ID of the release that answered.")
    at: IsoMoment = Field(description="The moment that the answer is for.")
    source: Literal["taste", "popular"] = Field(
        description="taste: ranked by the user's plays; popular: the user has no known plays, so songs are ranked by "
        "popularity."
    )
    path: Literal["index", "selector", "exact", "popular"] = Field(
        description="How songs were retrieved. With rankers: exact: only candidates of the retrievers; index: songs "
        "near the taste vector fill the places for which there are too few candidates. Without rankers: index: an "
        "index search, filtered afterwards; selector: an index search among the songs that pass the filters; exact: a "
        "score for every song that passes the filters. popular: by play counts."
    )
    plays: int = Field(description="Number of the user's plays of known songs.")
    unknown_songs: int = Field(description="Number of songs of history, exclude and allow that are not in the catalog.")
    songs: list[RecommendedSong] = Field(description="k songs; fewer only if fewer songs qualify.")
    last_plays: list[CatalogSong] | None = Field(
        default=None, description="With explain: the user's last five plays of known songs, the latest last."
    )


class Recommendations(AnsweredSongs):
    """Recommended songs, best first."""

    arm: str | None = Field(default=None, description="Arm of the experiment that the user is in; null if none.")
    cursor: Cursor = None


class RankedSongs(AnsweredSongs):
    """The given songs, best first, each once."""

    unknown_song_ids: list[str] = Field(
        description="The given IDs that are not in the catalog, or whose songs the release cannot score."
    )


class PopularSong(CatalogSong):
    """A song with its number of plays."""

    plays: int = Field(description="Number of plays by all users among the plays that the model was fitted to.")


class PopularSongs(BaseModel):
    """The most played songs, best first."""

    release: str
    songs: list[PopularSong]
    cursor: Cursor = None


class NewSong(CatalogSong):
    """A new song: first played recently, or added to the release."""

    first_played: str | None = Field(
        description="Day of the first play by any user, YYYY-MM-DD in UTC; null for an added song without plays.",
        json_schema_extra={"format": "date"},
    )


class NewSongs(BaseModel):
    """The newest songs, newest first: added songs without plays, then the others by the day of their first play."""

    release: str
    songs: list[NewSong]
    cursor: Cursor = None


class RecommendationsBatch(BaseModel):
    """The answers in the order of the requests. All are from one release, unless arms of an experiment use others."""

    release: str
    answers: list[Recommendations | InvalidEntry]


class Taste(BaseModel):
    """A user's taste vectors, normalized."""

    at: IsoMoment = Field(description="The moment that the vectors are for.")
    plays: int = Field(description="Number of plays used, without those of unknown songs.")
    unknown_songs: int
    short: list[float] = Field(description="Taste vector for the next songs.")
    long: list[float] = Field(description="Taste vector for songs of a later time.")


class Tastes(BaseModel):
    """The taste vectors in the order of the users, all from one release."""

    release: str
    model: str = Field(description="ID of the model; vectors of two models cannot be compared.")
    dim: int
    tastes: list[Taste | InvalidEntry] = Field(description="One per user, in the order of the request.")


class PlaysTaken(BaseModel):
    """The outcomes of the plays and likes that were sent."""

    release: str = Field(description="ID of the release whose model processed the plays.")
    taken: int = Field(description="Number of plays and likes that were added to the states of their users.")
    repeated: int = Field(
        description="Number of plays and likes whose event IDs were already stored; they change nothing."
    )
    rejected: int = Field(
        description="Number of plays older than the latest 64 to 128 plays of their user, and of plays and likes from "
        "before the deletion of their user."
    )
    unknown_songs: int = Field(
        description="Number of plays and likes of songs that are not in the catalog; they are ignored."
    )
    invalid: int = Field(description="Number of invalid plays and likes; they are ignored.")
    outcomes: list[PlayOutcome] = Field(description="Outcome of each play and like, in the order of the request.")
    errors: list[dict[str, str]] = Field(
        description="Field and reason of each error in invalid plays and likes; at most 20."
    )


class SongsAdded(BaseModel):
    """The outcomes of the songs that were sent."""

    release: str = Field(description="ID of the release to which the songs are added.")
    added: int = Field(description="Number of songs that were added; every replica recommends them within a second.")
    online: int = Field(description="Number of songs that were added online and are not in the release.")
    limit: int = Field(description="Maximum number of songs that were added online and that a release in use lacks.")
    outcomes: list[SongOutcome] = Field(
        description="Outcome of each song, in the order of the request. known: the song is in the release or was added "
        "before, so nothing changed."
    )


class UserTaste(BaseModel):
    """The taste vectors of a stored user, normalized."""

    release: str
    model: str = Field(description="ID of the model; vectors of two models cannot be compared.")
    user_id: str
    at: IsoMoment = Field(description="The moment that the vectors are for.")
    plays: int = Field(description="Number of plays used.")
    last_played_at: IsoMoment | None = Field(description="The moment of the last of these plays.")
    rejected: int = Field(
        description="How often a play arrived too late to be inserted; one that is sent again counts again."
    )
    short: list[float] = Field(description="Taste vector for the next songs.")
    long: list[float] = Field(description="Taste vector for songs of a later time.")


class PlayedSong(CatalogSong):
    """A play of a stored user."""

    played_at: IsoMoment
    contexts: list[str] = Field(description="Where the play came from.")
    skipped: bool


class ListedPlays(BaseModel):
    """The last plays of a stored user, the latest last."""

    release: str
    user_id: str
    count: int = Field(description="Number of all plays of the user; `plays` holds the last ones.")
    plays: list[PlayedSong]


class SongMatches(BaseModel):
    """Songs whose title and artist contain all words of a query.

    Songs whose title or artist equals the query come first, then those whose title or artist begins with it, then all
    others. In each of these groups, the most played songs come first.
    """

    release: str
    count: int = Field(description="Number of all matches; `songs` holds the first ones.")
    songs: list[CatalogSong]


class SimilarSongs(CatalogSong):
    """A song, and the songs most similar to it, most similar first."""

    release: str
    plays: int = Field(description="Number of plays of this song among the plays that the model was fitted to.")
    path: str
    songs: list[RecommendedSong] = Field(description="With the cosine of the song embeddings as score.")


class MapPoint(CatalogSong):
    """The position of a song on the map. Both coordinates are between -1 and 1."""

    x: float
    y: float


class SongPositions(BaseModel):
    """Songs on the plane along which their embeddings differ most. Similar songs are close together."""

    release: str
    points: list[MapPoint]
    unknown_songs: int = Field(description="Number of songs that are not in the catalog, or have no embedding.")


class RefusedRelease(BaseModel):
    """A release that could not be loaded."""

    id: str
    reason: str


class ReplicaReport(BaseModel):
    """The last report of a replica."""

    replica: str
    release: str | None
    change: str | None = Field(description="ID of the last activation that it handled.")
    loading: str | None = Field(description="The release that it is loading.")
    refused: RefusedRelease | None
    beat: int = Field(description="Counter of the reports of this replica.")
    arms: list[str] = Field(description="IDs of the releases that arms of its experiment use.")


class ReleaseStatus(BaseModel):
    """The release that answers, in one replica and in all of them."""

    replica: str = Field(description="The replica that gave this answer.")
    release: str | None = Field(description="The release that it answers with.")
    refused: RefusedRelease | None = Field(description="The release that it could not load, and why.")
    activated: str | None = Field(description="The release that was activated.")
    change: str = Field(description="ID of the last activation.")
    agreed: bool = Field(description="Whether all replicas answer with the activated release.")
    replicas: list[ReplicaReport]


class DataSummary(BaseModel):
    """The data set of a release in its present state, including plays that were appended after the release was made."""

    id: str
    source: str = Field(description="Format of the imported files; generated: synthetic plays.")
    users: int
    plays: int
    songs: int
    first_play: IsoMoment | None = Field(description="null if the data set has no times.")
    last_play: IsoMoment | None


class ModelCard(BaseModel):
    """The model card of a release: its parts, its data and its metrics."""

    release: str
    created_at: str = Field(description="ISO 8601, UTC.")
    version: str = Field(description="Version of rayrec.")
    parts: dict[str, str] = Field(description="IDs of the artifacts that the release consists of, by kind.")
    data: DataSummary
    report: str | None = Field(description="ID of the last evaluation of these parts; null if there is none.")
    verdict: str | None = Field(description="Summary of the report or validation in one sentence.")
    metrics: dict[str, float] = Field(
        description="Metrics of the last report, or of the validation before the last fit if there is no report. "
        "served_: only plays of songs new to the user, ranked without the songs that the user has heard."
    )
    queries: int | None = Field(description="Number of plays that the report or validation predicted.")
    warning: str | None = Field(
        description="Warning of the report, for example that the test range leaked into the model."
    )


class Health(BaseModel):
    """The replica is alive. Only /readyz gives the release."""

    status: Literal["ok"] = "ok"
    release: str | None = None


def as_json(answer: BaseModel) -> Response:
    """Return the JSON response of an answer that is already validated."""
    return Response(answer.model_dump_json(), media_type="application/json")
