"""A typed client of the HTTP API. It needs only httpx, and retries requests that fail temporarily.

    with Client("http://127.0.0.1:8000") as client:
        client.play("ann", "song-12")
        client.recommend(user_id="ann", k=5)["songs"]

A retry is always safe: reading changes nothing, and a play has an event id, so it counts once even if it is sent again.
"""

import asyncio
import os
import random
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict, cast
from urllib.parse import quote

import httpx

from rayrec.errors import RayrecError

KEY_VARIABLE = "RAYREC_API_KEY"
RETRIED_STATUSES = (502, 503, 504)  # statuses of a server that is busy, starting or briefly unavailable
FIRST_WAIT_SECONDS = 0.1  # before the first retry, unless the server gives a time; doubled for each further retry
LONGEST_WAIT_SECONDS = 5.0
MAX_ERRORS = 3  # errors of single fields in the text of an exception; its `problem` has all

Moment = str | int | datetime  # ISO 8601 with a zone, unix seconds or milliseconds, or a datetime with a zone
Call = tuple[str, str, dict[str, Any]]  # method, path, options of httpx


class CatalogSongAnswer(TypedDict):
    """A song of the catalog."""

    song_id: str
    title: str | None
    artist: str | None


class SongAnswer(CatalogSongAnswer):
    """One recommended song."""

    score: float
    reasons: list[str] | None
    explored: bool | None
    probability: float | None


class BestSongsAnswer(TypedDict):
    """Songs, best first."""

    recommendation_id: str
    release: str
    at: str
    source: Literal["taste", "popular"]
    path: Literal["index", "selector", "exact", "popular"]
    plays: int
    unknown_songs: int
    songs: list[SongAnswer]
    last_plays: list[CatalogSongAnswer] | None


class RecommendationsAnswer(BestSongsAnswer):
    """Recommended songs, best first."""

    arm: str | None
    cursor: str | None


class RankAnswer(BestSongsAnswer):
    """The given songs, best first."""

    unknown_song_ids: list[str]


class PopularSongAnswer(CatalogSongAnswer):
    """A popular song and its number of plays."""

    plays: int


class PopularAnswer(TypedDict):
    """The most played songs, in descending order of plays."""

    release: str
    songs: list[PopularSongAnswer]
    cursor: str | None


class NewSongAnswer(CatalogSongAnswer):
    """A new song: first played recently, or added."""

    first_played: str | None


class NewAnswer(TypedDict):
    """New songs, newest first."""

    release: str
    songs: list[NewSongAnswer]
    cursor: str | None


class InvalidEntryAnswer(TypedDict):
    """The answer to an invalid entry of a batch; each error has `where` and `detail`."""

    detail: str
    errors: list[dict[str, str]]


class BatchAnswer(TypedDict):
    """Answers in the order of the requests."""

    release: str
    answers: list[RecommendationsAnswer | InvalidEntryAnswer]


class PlaysAnswer(TypedDict):
    """The outcome of each play that was sent, and their counts."""

    release: str
    taken: int
    repeated: int
    rejected: int
    unknown_songs: int
    invalid: int
    outcomes: list[Literal["taken", "repeated", "rejected", "unknown", "invalid"]]
    errors: list[dict[str, str]]


class SongsAddedAnswer(TypedDict):
    """The outcome of each song that was sent, and their counts."""

    release: str
    added: int
    online: int
    limit: int
    outcomes: list[Literal["added", "known"]]


class TasteAnswer(TypedDict):
    """The taste vectors of a stored user."""

    release: str
    model: str
    user_id: str
    at: str
    plays: int
    last_played_at: str | None
    rejected: int
    short: list[float]
    long: list[float]


class HistoryTasteAnswer(TypedDict):
    """The taste vectors of a history."""

    at: str
    plays: int
    unknown_songs: int
    short: list[float]
    long: list[float]


class TastesAnswer(TypedDict):
    """Taste vectors in the order of the users."""

    release: str
    model: str
    dim: int
    tastes: list[HistoryTasteAnswer | InvalidEntryAnswer]


class StoredPlay(CatalogSongAnswer):
    """A play of a stored user."""

    played_at: str
    contexts: list[str]
    skipped: bool


class StoredPlaysAnswer(TypedDict):
    """The last plays of a stored user, oldest first."""

    release: str
    user_id: str
    count: int
    plays: list[StoredPlay]


class FoundAnswer(TypedDict):
    """Songs that match a search; `count` is the number of all matches."""

    release: str
    count: int
    songs: list[CatalogSongAnswer]


class SimilarAnswer(CatalogSongAnswer):
    """A song, its number of plays, and the songs most similar to it, most similar first."""

    release: str
    plays: int
    path: str
    songs: list[SongAnswer]


class MapPointAnswer(CatalogSongAnswer):
    """The position of a song on a map."""

    x: float
    y: float


class MapAnswer(TypedDict):
    """Songs as points of a map."""

    release: str
    points: list[MapPointAnswer]
    unknown_songs: int


class HealthAnswer(TypedDict):
    """The state of a replica and its release."""

    status: Literal["ok"]
    release: str | None


class DataAnswer(TypedDict):
    """The data set of a release."""

    id: str
    source: str
    users: int
    plays: int
    songs: int
    first_play: str | None
    last_play: str | None


class CardAnswer(TypedDict):
    """The model card of a release: its parts, its data and its metrics."""

    release: str
    created_at: str
    version: str
    parts: dict[str, str]
    data: DataAnswer
    report: str | None
    verdict: str | None
    metrics: dict[str, float]
    queries: int | None
    warning: str | None


class RefusedReleaseAnswer(TypedDict):
    """A release that could not be loaded, and why."""

    id: str
    reason: str


class ReplicaAnswer(TypedDict):
    """The last report of a replica."""

    replica: str
    release: str | None
    change: str | None
    loading: str | None
    refused: RefusedReleaseAnswer | None
    beat: int
    arms: list[str]


class ReleaseAnswer(TypedDict):
    """The release that a replica answers with, and those of all replicas."""

    replica: str
    release: str | None
    refused: RefusedReleaseAnswer | None
    activated: str | None
    change: str
    agreed: bool
    replicas: list[ReplicaAnswer]


class ApiError(RayrecError):
    """The server refused a request. `problem` is its answer, a problem document of RFC 9457."""

    def __init__(self, problem: Mapping[str, Any], request_id: str | None = None) -> None:
        text = f"{problem.get('status')} {problem.get('title')}: {problem.get('detail', '')}"
        super().__init__("; ".join([text, *_field_errors(problem)]))
        self.problem, self.request_id = dict(problem), request_id

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.problem.get("status", 0))


class ApiUnavailableError(RayrecError):
    """The server did not answer any attempt."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often a request is retried, and how long an attempt may take."""

    retries: int = 3  # attempts after the first one
    timeout: float = 10.0  # seconds per attempt


class _Connection:
    """Base of both clients: connection settings, pauses between retries, and the handling of answers."""

    def __init__(self, url: str, key: str | None, retry: Retry | None) -> None:
        self._url, self._retry = url.rstrip("/"), retry or Retry()
        key = os.environ.get(KEY_VARIABLE) if key is None else key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "base_url": self._url,
            "headers": self._headers,
            "timeout": self._retry.timeout,
            "trust_env": False,
        }

    def _retry_waits(self) -> Iterator[float]:
        """Yield the seconds to wait before each retry."""
        for attempt in range(self._retry.retries):
            max_wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt)
            yield max_wait * (0.5 + random.random() / 2)  # random, so that many clients do not retry at the same time

    @staticmethod
    def _read_response(
        response: "httpx.Response | httpx.TransportError", wait: float | None, url: str, is_text: bool
    ) -> Any:
        """Return the JSON of an answer, or its text if `is_text`; or `_RETRY` if the request must be sent again.

        `wait` is None after the last attempt. Raises `ApiError` and `ApiUnavailableError`. A redirect, or a body
        that is no JSON object, comes from something in front of the server, so the request has not reached it.
        """
        if isinstance(response, httpx.TransportError):
            if wait is None:
                raise ApiUnavailableError(f"{url} does not answer: {response!r}; check that it runs") from response
            return _RETRY
        if response.status_code in RETRIED_STATUSES and wait is not None:
            return _RETRY
        if not response.is_success:
            raise ApiError(_read_problem(response), response.headers.get("X-Request-ID"))
        if is_text:
            return response.text
        if response.status_code == httpx.codes.NO_CONTENT:
            return {}
        body = _read_object(response)
        if body is None:
            content_type = response.headers.get("Content-Type", "no Content-Type")
            detail = f"{url} answered {content_type} where a JSON object is expected; check that it is a rayrec server"
            problem = {"status": response.status_code, "title": response.reason_phrase, "detail": detail}
            raise ApiError(problem, response.headers.get("X-Request-ID"))
        return body


class _RetryMarker:
    """Type of `_RETRY`, which means that the request is sent again."""


_RETRY = _RetryMarker()


class Client(_Connection):
    """Client of one server. `key` defaults to the value of RAYREC_API_KEY. An option that is None is not sent."""

    def __init__(self, url: str, *, key: str | None = None, retry: Retry | None = None) -> None:
        super().__init__(url, key, retry)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def recommend(
        self, *, user_id: str | None = None, history: Sequence[Any] | None = None, **options: Any
    ) -> RecommendationsAnswer:
        """Recommend songs to a stored user, or for a history of song ids or plays.

        `options` are those of the API, such as k and at. For the next page of songs, give the answer's `cursor` and the
        same options.
        """
        return cast(RecommendationsAnswer, self._send(_request_call("recommendations", user_id, history, options)))

    def rank(
        self,
        songs: Sequence[str],
        *,
        user_id: str | None = None,
        history: Sequence[Any] | None = None,
        **options: Any,
    ) -> RankAnswer:
        """Rank `songs`, which are ids, for a stored user or a history.

        `options` are those of the API, such as at and horizon.
        """
        options = {**options, "songs": list(songs)}
        return cast(RankAnswer, self._send(_request_call("rank", user_id, history, options)))

    def popular(self, **options: Any) -> PopularAnswer:
        """Return the most played songs; `options` are those of the API, such as k, artists, market and cursor."""
        return cast(PopularAnswer, self._send(_get_call("/v1/songs/popular", options)))

    def new(self, **options: Any) -> NewAnswer:
        """Return the newest songs: first played recently, or added; `options` as in `popular`."""
        return cast(NewAnswer, self._send(_get_call("/v1/songs/new", options)))

    def play(
        self,
        user_id: str,
        song_id: str,
        played_at: Moment | None = None,
        *,
        event_id: str | None = None,
        **options: Any,
    ) -> PlaysAnswer:
        """Store a play; the next answer for the user reflects it. Without `event_id` a new one is generated."""
        return self.plays([_play_fields(user_id, song_id, played_at, event_id, options)])

    def plays(self, plays: Sequence[Mapping[str, Any]]) -> PlaysAnswer:
        """Store up to 1,000 plays. Each has user_id, song_id, event_id and, unless it is played now, played_at.

        With `type` skip the play was skipped; with like the entry is a like and not a play. `recommendation_id` is that
        of the answer that proposed the song.
        """
        return cast(PlaysAnswer, self._send(_plays_call(plays)))

    def add_songs(self, songs: Sequence[Mapping[str, Any]]) -> SongsAddedAnswer:
        """Add up to 1,000 songs, all or none, until the next release; every replica recommends them within a second.

        Each song has a song_id and, if known, title, artist, album, released, markets and vector.
        """
        return cast(SongsAddedAnswer, self._send(("POST", "/v1/songs", {"json": {"songs": list(songs)}})))

    def user_recommendations(self, user_id: str, **options: Any) -> RecommendationsAnswer:
        """Recommend songs to a stored user by a GET request, which caches may store; `options` are those of the API."""
        return cast(RecommendationsAnswer, self._send(_user_call(user_id, "recommendations", options)))

    def recommend_batch(self, requests: Sequence[Mapping[str, Any]]) -> BatchAnswer:
        """Recommend songs to up to 256 users with one release; each request has the fields that `recommend` takes."""
        return cast(BatchAnswer, self._send(_batch_call(requests)))

    def taste(self, user_id: str, at: Moment | None = None) -> TasteAnswer:
        """Return the taste vectors of a stored user."""
        return cast(TasteAnswer, self._send(_user_call(user_id, "taste", {"at": at})))

    def tastes(self, users: Sequence[Mapping[str, Any]]) -> TastesAnswer:
        """Return the taste vectors of up to 256 users; each entry has a history and optionally `at`."""
        return cast(TastesAnswer, self._send(_tastes_call(users)))

    def user_plays(self, user_id: str, k: int = 20) -> StoredPlaysAnswer:
        """Return the last `k` plays of a stored user, oldest first."""
        return cast(StoredPlaysAnswer, self._send(_user_call(user_id, "plays", {"k": k})))

    def forget(self, user_id: str) -> None:
        """Delete a user, known or not. Earlier plays are rejected from now on; later plays are those of a new user."""
        self._send(_forget_call(user_id))

    def find_songs(self, query: str, k: int = 20) -> FoundAnswer:
        """Return up to `k` songs whose title and artist contain all words of a search text."""
        return cast(FoundAnswer, self._send(_get_call("/v1/songs", {"query": query, "k": k})))

    def similar(self, song_id: str, k: int = 20) -> SimilarAnswer:
        """Return a song, its number of plays, and the `k` songs most similar to it, most similar first."""
        return cast(SimilarAnswer, self._send(_similar_call(song_id, k)))

    def map(self, songs: Sequence[str]) -> MapAnswer:
        """Return `songs`, which are ids, as points on the plane along which their embeddings differ most."""
        return cast(MapAnswer, self._send(("POST", "/v1/map", {"json": {"songs": list(songs)}})))

    def release(self) -> ReleaseAnswer:
        """Return the release of the replica that answers, and those of all replicas."""
        return cast(ReleaseAnswer, self._send(("GET", "/v1/release", {})))

    def card(self) -> CardAnswer:
        """Return the model card of the release: its parts, its data and its metrics."""
        return cast(CardAnswer, self._send(("GET", "/v1/release/card", {})))

    def report(self) -> str:
        """Return the report of the last evaluation of the release, an HTML page."""
        return cast(str, self._send(("GET", "/v1/release/report", {}), is_text=True))

    def health(self) -> HealthAnswer:
        """Check that the replica is alive."""
        return cast(HealthAnswer, self._send(("GET", "/healthz", {})))

    def ready(self) -> HealthAnswer:
        """Check that the replica has loaded a release; otherwise raise `ApiError` (503) after the last retry."""
        return cast(HealthAnswer, self._send(("GET", "/readyz", {})))

    def metrics(self) -> str:
        """Return the metrics of the replica in the text format of Prometheus."""
        return cast(str, self._send(("GET", "/metrics", {}), is_text=True))

    def _send(self, call: Call, *, is_text: bool = False) -> Any:
        method, path, options = call
        for wait in (*self._retry_waits(), None):
            response: httpx.Response | httpx.TransportError
            try:
                response = self._http.request(method, path, **options)
            except httpx.TransportError as error:
                response = error
            result = self._read_response(response, wait, self._url, is_text)
            if result is not _RETRY:
                return result
            time.sleep(_seconds_to_wait(response, wait))
        raise AssertionError("the last attempt returns or raises")


class AsyncClient(_Connection):
    """The same as `Client`, for asyncio."""

    def __init__(self, url: str, *, key: str | None = None, retry: Retry | None = None) -> None:
        super().__init__(url, key, retry)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def recommend(
        self, *, user_id: str | None = None, history: Sequence[Any] | None = None, **options: Any
    ) -> RecommendationsAnswer:
        """As in `Client`."""
        call = _request_call("recommendations", user_id, history, options)
        return cast(RecommendationsAnswer, await self._send(call))

    async def rank(
        self,
        songs: Sequence[str],
        *,
        user_id: str | None = None,
        history: Sequence[Any] | None = None,
        **options: Any,
    ) -> RankAnswer:
        """As in `Client`."""
        options = {**options, "songs": list(songs)}
        return cast(RankAnswer, await self._send(_request_call("rank", user_id, history, options)))

    async def popular(self, **options: Any) -> PopularAnswer:
        """As in `Client`."""
        return cast(PopularAnswer, await self._send(_get_call("/v1/songs/popular", options)))

    async def new(self, **options: Any) -> NewAnswer:
        """As in `Client`."""
        return cast(NewAnswer, await self._send(_get_call("/v1/songs/new", options)))

    async def play(
        self,
        user_id: str,
        song_id: str,
        played_at: Moment | None = None,
        *,
        event_id: str | None = None,
        **options: Any,
    ) -> PlaysAnswer:
        """As in `Client`."""
        return await self.plays([_play_fields(user_id, song_id, played_at, event_id, options)])

    async def plays(self, plays: Sequence[Mapping[str, Any]]) -> PlaysAnswer:
        """As in `Client`."""
        return cast(PlaysAnswer, await self._send(_plays_call(plays)))

    async def add_songs(self, songs: Sequence[Mapping[str, Any]]) -> SongsAddedAnswer:
        """As in `Client`."""
        return cast(SongsAddedAnswer, await self._send(("POST", "/v1/songs", {"json": {"songs": list(songs)}})))

    async def user_recommendations(self, user_id: str, **options: Any) -> RecommendationsAnswer:
        """As in `Client`."""
        return cast(RecommendationsAnswer, await self._send(_user_call(user_id, "recommendations", options)))

    async def recommend_batch(self, requests: Sequence[Mapping[str, Any]]) -> BatchAnswer:
        """As in `Client`."""
        return cast(BatchAnswer, await self._send(_batch_call(requests)))

    async def taste(self, user_id: str, at: Moment | None = None) -> TasteAnswer:
        """As in `Client`."""
        return cast(TasteAnswer, await self._send(_user_call(user_id, "taste", {"at": at})))

    async def tastes(self, users: Sequence[Mapping[str, Any]]) -> TastesAnswer:
        """As in `Client`."""
        return cast(TastesAnswer, await self._send(_tastes_call(users)))

    async def user_plays(self, user_id: str, k: int = 20) -> StoredPlaysAnswer:
        """As in `Client`."""
        return cast(StoredPlaysAnswer, await self._send(_user_call(user_id, "plays", {"k": k})))

    async def find_songs(self, query: str, k: int = 20) -> FoundAnswer:
        """As in `Client`."""
        return cast(FoundAnswer, await self._send(_get_call("/v1/songs", {"query": query, "k": k})))

    async def similar(self, song_id: str, k: int = 20) -> SimilarAnswer:
        """As in `Client`."""
        return cast(SimilarAnswer, await self._send(_similar_call(song_id, k)))

    async def map(self, songs: Sequence[str]) -> MapAnswer:
        """As in `Client`."""
        return cast(MapAnswer, await self._send(("POST", "/v1/map", {"json": {"songs": list(songs)}})))

    async def release(self) -> ReleaseAnswer:
        """As in `Client`."""
        return cast(ReleaseAnswer, await self._send(("GET", "/v1/release", {})))

    async def card(self) -> CardAnswer:
        """As in `Client`."""
        return cast(CardAnswer, await self._send(("GET", "/v1/release/card", {})))

    async def report(self) -> str:
        """As in `Client`."""
        return cast(str, await self._send(("GET", "/v1/release/report", {}), is_text=True))

    async def health(self) -> HealthAnswer:
        """As in `Client`."""
        return cast(HealthAnswer, await self._send(("GET", "/healthz", {})))

    async def ready(self) -> HealthAnswer:
        """As in `Client`."""
        return cast(HealthAnswer, await self._send(("GET", "/readyz", {})))

    async def metrics(self) -> str:
        """As in `Client`."""
        return cast(str, await self._send(("GET", "/metrics", {}), is_text=True))

    async def forget(self, user_id: str) -> None:
        """As in `Client`."""
        await self._send(_forget_call(user_id))

    async def _send(self, call: Call, *, is_text: bool = False) -> Any:
        method, path, options = call
        for wait in (*self._retry_waits(), None):
            response: httpx.Response | httpx.TransportError
            try:
                response = await self._http.request(method, path, **options)
            except httpx.TransportError as error:
                response = error
            result = self._read_response(response, wait, self._url, is_text)
            if result is not _RETRY:
                return result
            await asyncio.sleep(_seconds_to_wait(response, wait))
        raise AssertionError("the last attempt returns or raises")


def _request_call(name: str, user_id: str | None, history: Sequence[Any] | None, options: Mapping[str, Any]) -> Call:
    if (user_id is None) == (history is None):
        raise ValueError("give either a user_id or a history")
    return "POST", f"/v1/{name}", {"json": _request_fields({"user_id": user_id, "history": history, **options})}


def _plays_call(plays: Sequence[Mapping[str, Any]]) -> Call:
    return "POST", "/v1/plays", {"json": {"plays": [_request_fields(play) for play in plays]}}


def _batch_call(requests: Sequence[Mapping[str, Any]]) -> Call:
    return (
        "POST",
        "/v1/recommendations/batch",
        {"json": {"requests": [_request_fields(request) for request in requests]}},
    )


def _tastes_call(users: Sequence[Mapping[str, Any]]) -> Call:
    return "POST", "/v1/tastes", {"json": {"users": [_request_fields(user) for user in users]}}


def _get_call(path: str, options: Mapping[str, Any]) -> Call:
    return "GET", path, {"params": _request_fields(options)}


def _user_call(user_id: str, resource: str, options: Mapping[str, Any]) -> Call:
    return _get_call(f"/v1/users/{_escape(user_id)}/{resource}", options)


def _similar_call(song_id: str, k: int) -> Call:
    return _get_call(f"/v1/songs/{_escape(song_id)}/similar", {"k": k})


def _request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in the form of the API: without None values, with moments as text or numbers.

    The plays of a history are converted in the same way.
    """

    def encode(name: str, value: Any) -> Any:
        if name == "history":
            return [_request_fields(play) if isinstance(play, Mapping) else play for play in value]
        return _encode_moment(value) if name in ("at", "played_at") else value

    return {name: encode(name, value) for name, value in options.items() if value is not None}


def _forget_call(user_id: str) -> Call:
    return "DELETE", f"/v1/users/{_escape(user_id)}", {}


def _play_fields(
    user_id: str, song_id: str, played_at: Moment | None, event_id: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    event_id = event_id or str(uuid.uuid4())
    return {"event_id": event_id, "user_id": user_id, "song_id": song_id, **options, "played_at": played_at}


def _encode_moment(at: Moment) -> str | int:
    if not isinstance(at, datetime):
        return at
    if at.tzinfo is None:
        raise ValueError(f"{at.isoformat()} has no zone; give a datetime with tzinfo")
    return at.isoformat()


def _escape(text: str) -> str:
    """Return an id as part of a path; dots are escaped too, since path segments of dots are removed on the way."""
    return quote(text, safe="").replace(".", "%2E")


def _seconds_to_wait(response: httpx.Response | httpx.TransportError, wait: float | None) -> float:
    """Return the seconds to wait: the server's Retry-After header if it has one, or else `wait`."""
    try:
        seconds = float(response.headers["Retry-After"]) if isinstance(response, httpx.Response) else 0.0
    except (KeyError, ValueError):
        seconds = 0.0
    return min(LONGEST_WAIT_SECONDS, seconds or wait or 0.0)


def _read_object(response: httpx.Response) -> dict[str, Any] | None:
    """Return the JSON object of an answer; None if its body is anything else."""
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _field_errors(problem: Mapping[str, Any]) -> list[str]:
    """Return the first errors of a problem as text, without those that its detail already contains."""
    errors = problem.get("errors")
    entries = [entry for entry in errors if isinstance(entry, Mapping)] if isinstance(errors, list) else []
    texts = [f"{entry.get('where')}: {entry.get('detail')}" for entry in entries]
    return [text for text in texts if text not in str(problem.get("detail"))][:MAX_ERRORS]


def _read_problem(response: httpx.Response) -> dict[str, Any]:
    """Return the problem document of an answer; what it lacks, as one of a proxy or gateway may, is filled in."""
    detail = response.text[:200]
    if response.is_redirect:
        detail = f"the server redirects to {response.headers.get('Location')}; give its address as the client's url"
    problem = {"title": response.reason_phrase, "detail": detail}
    return problem | (_read_object(response) or {}) | {"status": response.status_code}
