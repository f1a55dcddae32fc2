"""The HTTP application: a plain FastAPI app around a service, which runs with or without Ray."""

from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from importlib.resources import files
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import APIRouter, Depends, FastAPI, Path, Query
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import AfterValidator, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from rayrec.data.spelling import MAX_ID
from rayrec.errors import NotFoundError
from rayrec.serving.live_release import release_status
from rayrec.serving.middleware import (
    ID_HEADER,
    TIMING_HEADER,
    Middleware,
    escaped_segment,
    needed_role,
    needs_no_key,
)
from rayrec.serving.problems import DOCUMENTED, SCHEMA, add_handlers, documented
from rayrec.serving.schemas import (
    BatchRequest,
    Health,
    ListedPlays,
    MapRequest,
    ModelCard,
    NewSongs,
    NoParameters,
    PlaysTaken,
    PopularSongs,
    RankedSongs,
    RankRequest,
    Recommendations,
    RecommendationsBatch,
    RecommendationsRequest,
    ReleaseStatus,
    SentPlays,
    SentSongs,
    SimilarSongs,
    SimilarSongsQuery,
    SongMatches,
    SongPositions,
    SongsAdded,
    SongSearchQuery,
    SongsQuery,
    Tastes,
    TastesRequest,
    UserPlaysQuery,
    UserRecommendationsQuery,
    UserTaste,
    UserTasteQuery,
    as_json,
    spelled_user,
)
from rayrec.serving.service import Service

PAGE = "page.html"
# The page has no contact with other hosts, cannot be framed, and runs only the script and style that it contains.
POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
DOCS = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>rayrec API</title><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="swagger-ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script>
</body>
</html>
"""
DOCS_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", persistAuthorization: false});'
DOCS_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
# Swagger UI sets inline styles and draws its icons from data: URLs.
DOCS_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
# A report has no script; its bars have inline styles.
REPORT_HEADERS = {
    **HEADERS,
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; sandbox",
}
Router = Callable[[Service], APIRouter]
ABOUT = "Song recommendations based on what users played, for the next songs or for a later time."
UserPath = Annotated[
    str,
    Path(min_length=1, max_length=MAX_ID, description="ID of a user, percent-encoded."),
    AfterValidator(spelled_user),
]
SongPath = Annotated[str, Path(min_length=1, max_length=MAX_ID, description="ID of a song, percent-encoded.")]


async def _refuse_parameters(query: Annotated[NoParameters, Query()]) -> None:
    """Answer 422 if the URL has parameters."""


WITHOUT_PARAMETERS = Depends(_refuse_parameters)


def page(service: Service) -> APIRouter:
    """Routes of the page and the API documentation. They hold no data and need no key; a key can be entered in both."""
    router = APIRouter(include_in_schema=False)
    content = files("rayrec.serving").joinpath(PAGE).read_bytes()
    headers = {**HEADERS, "Content-Security-Policy": policy(content.decode())}

    @router.get("/")
    async def read() -> Response:
        """Return the page."""
        return Response(content, media_type="text/html; charset=utf-8", headers=headers)

    static_files = files("fastapi_offline").joinpath("static")

    @router.get("/docs")
    async def docs() -> Response:
        """Return Swagger UI for /openapi.json."""
        return Response(DOCS, media_type="text/html; charset=utf-8", headers=DOCS_HEADERS)

    @router.get("/docs/{name}")
    async def docs_file(name: str) -> Response:
        """Return a file of Swagger UI, from the package fastapi-offline."""
        if name == "start.js":
            return Response(DOCS_SCRIPT, media_type="text/javascript", headers=DOCS_HEADERS)
        if name not in DOCS_FILES:
            raise NotFoundError(f"/docs has no file {name[:100]}")
        return Response(static_files.joinpath(name).read_bytes(), media_type=DOCS_FILES[name], headers=DOCS_HEADERS)

    return router


def policy(html: str) -> str:
    """Return the content security policy of a page. It allows the page's one script and one style by their digests."""

    def digest(tag: str) -> str:
        tag_content = html.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return f"'sha256-{b64encode(sha256(tag_content.encode()).digest()).decode()}'"

    return POLICY.format(script=digest("script"), style=digest("style"))


class AnyId(Convertor[str]):
    """Convertor for an id of any characters, which is one segment of a path as `escaped_path` returns it."""

    regex = "[^/]+"

    def convert(self, value: str) -> str:
        """Return the id of a segment."""
        return unquote(value)

    def to_string(self, value: str) -> str:
        """Return the segment of an id."""
        return escaped_segment(value)


register_url_convertor("any_id", AnyId())


def create_app(service: Service) -> FastAPI:
    """Create the application. Endpoints need a key if the service has keys; every error is an RFC 9457 problem."""
    from importlib.metadata import version

    app = FastAPI(
        title="rayrec",
        version=version("rayrec"),
        description=ABOUT,
        docs_url=None,  # FastAPI's own documentation pages load scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # DELETE /v1/users/ann/ must not lead to the user ann
    )
    for router in ROUTERS:
        app.include_router(router(service))
    add_handlers(app)
    app.add_middleware(Middleware, service=service)
    if service.config.cors_origins:  # before the key check: a browser's preflight has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=service.config.cors_origins,
            allow_methods=["*"],
            allow_headers=["Authorization", "Content-Type", "Traceparent", ID_HEADER],
            expose_headers=[ID_HEADER, TIMING_HEADER],
        )
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]
    return app


def _recommendations_router(service: Service) -> APIRouter:
    """Routes of recommendations, rankings and taste vectors."""
    router = APIRouter(
        prefix="/v1",
        tags=["recommendations"],
        responses=documented(*DOCUMENTED),
        dependencies=[WITHOUT_PARAMETERS],
    )

    @router.post("/recommendations", response_model=Recommendations)
    async def recommend(request: RecommendationsRequest) -> Response:
        """Recommend songs to one user: a stored user or the user of a given history."""
        return as_json((await service.recommend(service.live, [request]))[0])

    @router.post("/recommendations/batch", response_model=RecommendationsBatch)
    async def recommend_batch(request: BatchRequest) -> Response:
        """Recommend songs to many users.

        All answers are from one release, unless arms of an experiment use others. An invalid request gets an error
        entry; the other requests are answered.
        """
        live = service.live
        answers = await service.recommend(live, request.requests, alone=True)
        return as_json(RecommendationsBatch.model_construct(release=live.id, answers=answers))

    @router.post("/rank", response_model=RankedSongs)
    async def rank(request: RankRequest) -> Response:
        """Rank given songs for one user.

        The answer contains every song that the release can score, once, whether the user has heard it or not.
        """
        return as_json(await service.rank(service.live, request))

    @router.post("/tastes", response_model=Tastes)
    async def tastes(request: TastesRequest) -> Response:
        """Compute the taste vectors of many histories.

        An invalid history gets an error entry; the other histories are answered.
        """
        return as_json(await service.tastes(service.live, request.users))

    return router


def _users_router(service: Service) -> APIRouter:
    """Routes of stored users."""
    router = APIRouter(prefix="/v1", tags=["users"], responses=documented(*DOCUMENTED))

    @router.post("/plays", response_model=PlaysTaken, dependencies=[WITHOUT_PARAMETERS])
    async def plays(request: SentPlays) -> Response:
        """Store one or more plays, skips or likes of any users. The next answer for a user reflects them.

        Plays may arrive out of order: a play among the latest 64 to 128 of its user is inserted by its time, an older
        one is rejected. A play that is sent again with the same event id counts once. In a list of plays, an invalid
        one does not affect the others.
        """
        return as_json(await service.take_plays(service.live, request.plays))

    @router.get("/users/{user_id:any_id}/recommendations", response_model=Recommendations)
    async def user_recommendations(user_id: UserPath, query: Annotated[UserRecommendationsQuery, Query()]) -> Response:
        """Recommend songs to a stored user."""
        try:
            request = query.request(user_id)
        except ValidationError as error:
            errors = [{**item, "loc": ("query", *item["loc"])} for item in error.errors()]
            raise RequestValidationError(errors) from error
        return as_json((await service.recommend(service.live, [request]))[0])

    @router.get("/users/{user_id:any_id}/taste", response_model=UserTaste)
    async def taste(user_id: UserPath, query: Annotated[UserTasteQuery, Query()]) -> Response:
        """Get the taste vectors of a stored user."""
        return as_json(await service.user_taste(service.live, user_id, query.at))

    @router.get("/users/{user_id:any_id}/plays", response_model=ListedPlays)
    async def user_plays(user_id: UserPath, query: Annotated[UserPlaysQuery, Query()]) -> Response:
        """List the last plays of a stored user."""
        return as_json(await service.user_plays(service.live, user_id, query.k))

    @router.delete(
        "/users/{user_id:any_id}", status_code=204, response_class=Response, dependencies=[WITHOUT_PARAMETERS]
    )
    async def forget(user_id: UserPath) -> Response:
        """Delete a user. Deleting an unknown user is not an error.

        After the answer, the user is unknown. Plays from before the deletion are rejected, and later plays belong to a
        new user. `rayrec compact` erases the user's rows from the files of the workspace.
        """
        await service.forget(service.live, user_id)
        return Response(status_code=204)

    return router


def _songs_router(service: Service) -> APIRouter:
    """Routes of the songs of the catalog."""
    router = APIRouter(prefix="/v1", tags=["songs"], responses=documented(401, 403, 422, 500, 503))

    @router.get("/songs", response_model=SongMatches)
    async def find(query: Annotated[SongSearchQuery, Query()]) -> Response:
        """Find songs by words of their title or artist."""
        return as_json(await service.find_songs(service.live, query.query, query.k))

    @router.post(
        "/songs",
        response_model=SongsAdded,
        responses=documented(400, 413, 415, 507),
        dependencies=[WITHOUT_PARAMETERS],
    )
    async def add(request: SentSongs) -> Response:
        """Add one or more songs without a new release: either all or none. Every replica has them within a second.

        The initial embedding of a song is computed from its artist, album and content vector, and updated by its first
        plays, as in `rayrec songs add`. The first release that contains the song replaces it.
        """
        return as_json(await service.add_songs(service.live, request))

    @router.get("/songs/popular", response_model=PopularSongs)
    async def popular(query: Annotated[SongsQuery, Query()]) -> Response:
        """List the most played songs."""
        return as_json(await service.popular_songs(service.live, query))

    @router.get("/songs/new", response_model=NewSongs, responses=documented(404))
    async def new(query: Annotated[SongsQuery, Query()]) -> Response:
        """List the newest songs: added songs without plays, then the others by their first play, latest first."""
        return as_json(await service.new_songs(service.live, query))

    @router.get("/songs/{song_id:any_id}/similar", response_model=SimilarSongs, responses=documented(404))
    async def similar(song_id: SongPath, query: Annotated[SimilarSongsQuery, Query()]) -> Response:
        """Get the songs most similar to a song."""
        return as_json(await service.similar_songs(service.live, song_id, query.k))

    @router.post(
        "/map",
        response_model=SongPositions,
        responses=documented(400, 413, 415),
        dependencies=[WITHOUT_PARAMETERS],
    )
    async def place(request: MapRequest) -> Response:
        """Get the positions of songs on a map, where similar songs are close together."""
        return as_json(await service.map_songs(service.live, request.songs))

    return router


def _operations_router(service: Service) -> APIRouter:
    """Routes of health, release and metrics."""
    router = APIRouter(tags=["operations"], responses=documented(401, 403, 422, 500), dependencies=[WITHOUT_PARAMETERS])

    @router.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Check that the replica is alive."""
        return as_json(Health())

    @router.get("/readyz", response_model=Health, responses=documented(503))
    async def readyz() -> Response:
        """Check that the replica has loaded a release. The status is 503 if not."""
        return as_json(Health(release=service.live.id))

    @router.get("/v1/release", response_model=ReleaseStatus)
    async def release() -> Response:
        """Get the release that answers, in this replica and in all others."""
        # In another thread, since it reads the workspace, which may be a remote bucket.
        return as_json(ReleaseStatus(**await run_in_threadpool(release_status, service.holder)))

    @router.get("/v1/release/card", response_model=ModelCard)
    async def card() -> Response:
        """Get the model card of the release: its parts, its data and its metrics."""
        return as_json(await run_in_threadpool(service.card, service.live))

    @router.get(
        "/v1/release/report",
        response_class=Response,
        responses={200: {"content": {"text/html": {}}}, **documented(404)},
    )
    async def report() -> Response:
        """Get the report of the last evaluation of the release, as HTML."""
        content = await run_in_threadpool(service.report, service.live)
        return Response(content, media_type="text/html; charset=utf-8", headers=REPORT_HEADERS)

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Get the metrics of this replica in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return router


ROUTERS: tuple[Router, ...] = (_recommendations_router, _users_router, _songs_router, _operations_router, page)


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    """Return the OpenAPI document, with the Problem schema and the key and role that each operation needs."""
    if not app.openapi_schema:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = SCHEMA
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                role = needed_role(method.upper(), path)
                is_open = needs_no_key(method.upper(), path, service.config)
                with_key: list[dict[str, list[str]]] = [] if is_open else [{"key": [role]}]
                operation["security"] = with_key if with_key and service.keys.required else [{}, *with_key]
                key_text = "No key is needed." if is_open else f"Role of the key: {role}."
                operation["description"] = f"{operation.get('description', '')}\n\n{key_text}".strip()
        app.openapi_schema = document
    return app.openapi_schema
