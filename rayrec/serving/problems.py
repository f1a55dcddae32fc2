"""Answers every error as RFC 9457 problem details: errors of rayrec, of the framework, and unexpected ones."""

import json
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from rayrec.errors import FieldError, InputError, NotFoundError, RayrecError
from rayrec.online.state_store import StoreUnavailableError
from rayrec.serving.schemas import error_list

MEDIA_TYPE = "application/problem+json"
METHODS = ("GET", "HEAD", "POST", "DELETE")  # of all routes
RETRY_AFTER_S = 1

# The id of the current request: from the client, or a new one.
request_id: ContextVar[str] = ContextVar("request_id", default="-")

log = logging.getLogger(__name__)


class NotReadyError(RayrecError):
    """The application cannot answer yet."""


class OverloadedError(RayrecError):
    """More requests are waiting than can be answered in time."""


SCHEMA: dict[str, Any] = {
    "title": "Problem",
    "description": "An error (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string", "description": "The name of the status."},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was sent, what was expected and what to do."},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["where", "detail"],
                "properties": {
                    "where": {"type": "string", "description": "Name of the invalid field, as it was sent."},
                    "detail": {"type": "string"},
                },
            },
        },
    },
    "example": {
        "type": "about:blank",
        "title": "Unprocessable Content",
        "status": 422,
        "detail": "The request is invalid; see `errors` and /openapi.json",
        "errors": [{"where": "k", "detail": "Input should be less than or equal to 1000"}],
    },
}
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # as in RFC 9110; http.HTTPStatus has older names
DOCUMENTED = (400, 401, 403, 404, 413, 415, 422, 500, 503)


def problem(
    status: int, detail: str, *, errors: list[dict[str, str]] | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a response with an error."""
    body: dict[str, Any] = {"type": "about:blank", "title": title(status), "status": status, "detail": detail}
    if errors:
        body["errors"] = errors
    return Response(json.dumps(body), status, headers, MEDIA_TYPE)


def title(status: int) -> str:
    """Return the name of a status."""
    return TITLES.get(status) or HTTPStatus(status).phrase


def field_errors(error: InputError) -> list[dict[str, str]]:
    """Return the field that an error names, with its detail; an empty list if it names none."""
    return [{"where": error.where, "detail": error.detail}] if isinstance(error, FieldError) else []


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses with these statuses, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    retry_headers = {
        "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}}
    }
    return {
        status: {
            "description": title(status),
            "content": content,
            **({"headers": retry_headers} if status == 503 else {}),
        }
        for status in statuses
    }


def add_handlers(app: FastAPI) -> None:
    """Make `app` answer invalid requests and rayrec's errors with a problem; other errors reach the middleware."""
    app.exception_handler(RequestValidationError)(_answer_invalid_request)
    app.exception_handler(HTTPException)(_answer_http_error)
    app.exception_handler(RayrecError)(_answer_rayrec_error)


def problem_of_error(error: Exception) -> Response:
    """Return the problem for an error, also if Ray has wrapped it. An unexpected error is logged and becomes a 500."""
    error = getattr(error, "cause", error)
    if isinstance(error, (OverloadedError, NotReadyError, StoreUnavailableError)):
        return problem(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
    if isinstance(error, NotFoundError):
        return problem(404, str(error))
    if isinstance(error, InputError):
        return problem(422, str(error), errors=field_errors(error))
    log.error("request %s failed", request_id.get(), exc_info=error)
    return problem(500, f"Internal server error; the replica's log has the details of request {request_id.get()}")


async def _answer_invalid_request(request: Request, error: Any) -> Response:
    errors = error.errors()
    if any(item["type"] == "json_invalid" for item in errors):
        return problem(400, f"The body is not JSON: {errors[0].get('ctx', {}).get('error', 'it cannot be parsed')}")
    detail = "The request is invalid; see `errors` and /openapi.json"
    return problem(422, detail, errors=error_list(errors))


async def _answer_http_error(request: Request, error: Any) -> Response:
    detail = error.detail if error.detail != title(error.status_code) else _default_detail(error.status_code, request)
    headers = {"Allow": ", ".join(_allowed_methods(request))} if error.status_code == 405 else error.headers
    return problem(error.status_code, detail, headers=headers)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes with the path of a request; the framework names those of the first route."""

    def has_route(method: str) -> bool:
        scope = {**request.scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in METHODS if has_route(method)]


def _default_detail(status: int, request: Request) -> str:
    if status == 404:
        return f"Path {request.url.path[:200]} not found; see /openapi.json"
    if status == 405:
        return f"{request.url.path[:200]} does not support {request.method[:20]}; see /openapi.json"
    return title(status)


async def _answer_rayrec_error(request: Request, error: Exception) -> Response:
    return problem_of_error(error)
