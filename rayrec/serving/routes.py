"""The HTTP application: a plain FastAPI app around a service, with or without Ray around it."""

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from rayrec.serving.holder import status_of
from rayrec.serving.middleware import Gate
from rayrec.serving.page import page
from rayrec.serving.problems import DOCUMENTED, SCHEMA, add_handlers, documented
from rayrec.serving.schemas import (
    BatchAnswer,
    BatchRequest,
    Health,
    Recommendations,
    RecommendationsRequest,
    ReleaseStatus,
    Tastes,
    TastesRequest,
    as_json,
)
from rayrec.serving.service import Service
from rayrec.serving.song_routes import songs
from rayrec.serving.user_routes import users

Router = Callable[[Service], APIRouter]

ABOUT = "Songs for listeners, from what they played: over the short term or the long one."


def create_app(service: Service) -> FastAPI:
    """The application. Every endpoint needs a key where the service has any, and answers errors as problems."""
    from importlib.metadata import version

    # No pages of FastAPI's own: they load scripts from other machines.
    app = FastAPI(title="rayrec", version=version("rayrec"), description=ABOUT, docs_url=None, redoc_url=None)
    for router in ROUTERS:
        app.include_router(router(service))
    add_handlers(app)
    app.add_middleware(Gate, service=service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def recommendations(service: Service) -> APIRouter:
    """Songs and tastes for given histories."""
    router = APIRouter(prefix="/v1", tags=["recommendations"], responses=documented(*DOCUMENTED))

    @router.post("/recommendations", response_model=Recommendations)
    async def recommend(request: RecommendationsRequest) -> Response:
        """Songs for one user."""
        return as_json((await service.recommend(service.live, [request]))[0])

    @router.post("/recommendations/batch", response_model=BatchAnswer)
    async def recommend_batch(request: BatchRequest) -> Response:
        """Songs for many users, all by one release."""
        live = service.live
        answers = await service.recommend(live, request.requests)
        return as_json(BatchAnswer.model_construct(release=live.id, answers=answers))

    @router.post("/tastes", response_model=Tastes)
    async def tastes(request: TastesRequest) -> Response:
        """The taste vectors of many users."""
        return as_json(await service.tastes(service.live, request.users))

    return router


def operations(service: Service) -> APIRouter:
    """How the application is."""
    router = APIRouter(tags=["operations"], responses=documented(401, 403, 500))

    @router.get("/healthz", response_model=Health)
    async def healthz() -> Response:
        """Says that the replica is alive."""
        return as_json(Health())

    @router.get("/readyz", response_model=Health, responses=documented(503))
    async def readyz() -> Response:
        """Says that the replica can answer, with which release; else 503."""
        return as_json(Health(release=service.live.id))

    @router.get("/v1/release", response_model=ReleaseStatus)
    async def release() -> Response:
        """Says which release answers, here and in all replicas."""
        # A look into the workspace, which may be a bucket far away.
        return as_json(ReleaseStatus(**await run_in_threadpool(status_of, service.holder)))

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """The figures of this replica for Prometheus."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return router


ROUTERS: tuple[Router, ...] = (recommendations, users, songs, operations, page)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document with our own errors and the key in it."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        parts = made.setdefault("components", {})
        parts.setdefault("schemas", {})["Problem"] = SCHEMA
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{}, {"key": []}]
        app.openapi_schema = made
    return app.openapi_schema
