"""Middleware in front of the routes: request ids, API keys, media types, body sizes, timing, and disconnects."""

import asyncio
import hmac
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args
from urllib.parse import quote, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrec.errors import InputError
from rayrec.serving.problems import problem, problem_of_error, request_id
from rayrec.serving.serve_config import ServeConfig, is_loopback
from rayrec.serving.telemetry import end_span, request_span, request_stages, trace_id

Role = Literal["read", "write", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)
GRANTS: dict[Role, tuple[Role, ...]] = {"read": ("read",), "write": ("write",), "admin": ROLES}  # admin may do all
KEYS_VARIABLE = "RAYREC_API_KEYS"  # environment variable of the server: role:key or role+role:key, separated by commas
MIN_KEY_LENGTH = 16  # minimum characters of a key
GZIP_BYTES = 1_000  # minimum size of an answer that is compressed, if the client accepts gzip
ID_HEADER = "X-Request-ID"
TIMING_HEADER = "Server-Timing"
ID_PATTERN = re.compile(r"[\x21-\x7e]{1,128}")
STATIC = re.compile(r"/|/openapi\.json|/docs(/[^/]*)?")  # pages and the OpenAPI document, which hold no data
DOCUMENT = "/openapi.json"
HEALTH = ("/healthz", "/readyz")
log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class Keys:
    """The digests of all API keys with their roles. Without any key, every client may do everything."""

    digests: tuple[tuple[bytes, Role], ...] = ()  # one entry per role of a key

    @property
    def required(self) -> bool:
        """True if requests need a key."""
        return bool(self.digests)

    def roles(self, authorization: str | None) -> set[Role]:
        """Return the roles of the key in an Authorization header; empty for a wrong or missing key.

        The key is compared with all digests, even after a match, so that the time does not depend on the key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "replace")).digest()
        roles: set[Role] = set()
        for known_digest, role in self.digests:
            if hmac.compare_digest(known_digest, digest):
                roles.update(GRANTS[role])
        return roles if scheme.lower() == "bearer" else set()


def load_keys(config: ServeConfig, environment: Mapping[str, str] = os.environ) -> Keys:
    """Return the keys from the environment variable and from the keys file of the config.

    Raises `InputError` if the file cannot be read, if an entry is not a valid key, and if there are no keys although a
    keys file is given or other machines can reach the application.
    """
    entries = list(_parse_entries(environment.get(KEYS_VARIABLE, "").replace(",", "\n").splitlines(), KEYS_VARIABLE))
    if config.keys_file:
        try:
            text = Path(config.keys_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"keys file {config.keys_file} cannot be read: {error}") from error
        entries += _parse_entries(text.splitlines(), config.keys_file)
        if not entries:
            raise InputError(
                f"keys file {config.keys_file} has no keys, so everybody would get access; write role:key into it, one "
                "per line, or leave out --keys-file"
            )
    if not entries and not is_loopback(config.host):
        raise InputError(
            f"serving on {config.host} without API keys would give everybody access; set {KEYS_VARIABLE}=read:KEY,"
            "write:KEY or give --keys-file, or serve on 127.0.0.1"
        )
    return Keys(tuple(entries))


def _parse_entries(lines: Iterable[str], source: str) -> Iterable[tuple[bytes, Role]]:
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        role_names, colon, key = text.partition(":")
        roles, key = [name.strip() for name in role_names.split("+")], key.strip()
        if not colon or not set(roles) <= set(ROLES) or any(char.isspace() for char in key):
            raise InputError(f"{source}, entry {number} is not role:key or role+role:key; roles are {', '.join(ROLES)}")
        if "," in key:  # only in a file: entries of the environment variable are separated by commas
            raise InputError(f"{source}, entry {number} has a comma in its key; write one role:key per line")
        if not key.isascii() or not key.isprintable():
            raise InputError(
                f"{source}, entry {number} has a key with characters that an HTTP header cannot carry; give one of "
                "printable ASCII characters"
            )
        if len(key) < MIN_KEY_LENGTH:
            raise InputError(
                f"{source}, entry {number} has a key of {len(key)} characters; give at least {MIN_KEY_LENGTH}"
            )
        for role in roles:
            yield sha256(key.encode()).digest(), role  # type: ignore[misc]


if TYPE_CHECKING:
    from rayrec.serving.service import Service


def needed_role(method: str, path: str) -> Role:
    """Return the role that a key needs for a request; `read` for every path that is not named here."""
    if path == "/v1/plays" or (method == "POST" and path == "/v1/songs"):
        return "write"
    return "admin" if method == "DELETE" or path == "/metrics" else "read"


def needs_no_key(method: str, path: str, config: ServeConfig) -> bool:
    """True if a request is answered without a key even when the application has keys."""
    is_open_path = STATIC.fullmatch(path) or (config.open_health and path in HEALTH)
    return method == "GET" and bool(is_open_path or (config.open_metrics and path == "/metrics"))


def escaped_path(scope: Scope) -> str:
    """Return the path of a request, decoded except for the slashes and percent signs of ids, which remain %2F and %25.

    In the decoded path of the scope, a slash of an id looks like one between two segments.
    """
    raw_path = scope.get("raw_path")  # optional in ASGI
    segments = (quote(str(scope["path"])) if raw_path is None else raw_path.decode("ascii", "replace")).split("/")
    return "/".join(escaped_segment(unquote(segment)) for segment in segments)


def escaped_segment(text: str) -> str:
    """Return `text` as a segment of an `escaped_path`."""
    return text.replace("%", "%25").replace("/", "%2F")


def routed_path(scope: Scope) -> str:
    """Return the path of a request as the router matches it.

    The router removes the prefix that Serve's `route_prefix` puts before all paths, and its patterns ignore one line
    break at the end.
    """
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    if prefix and path.startswith(f"{prefix}/"):
        path = path[len(prefix) :]
    return path.removesuffix("\n")


def names_loopback(host: str | None) -> bool:
    """True if a Host header names this machine, or is missing as in HTTP/1.0.

    A web page whose host name resolves to 127.0.0.1 can send requests from the browser of this machine, by loopback and
    without a check of its origin, but with its own name as the Host.
    """
    if host is None:
        return True
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:  # brackets without an IPv6 address
        return False


class Middleware:
    """ASGI middleware in front of the whole application."""

    def __init__(self, app: ASGIApp, service: "Service") -> None:
        self._app, self._service = GZipMiddleware(app, minimum_size=GZIP_BYTES, compresslevel=5), service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the application, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        method = scope["method"]
        headers = Headers(scope=scope)
        current_request_id = headers.get(ID_HEADER, "")
        current_request_id = current_request_id if ID_PATTERN.fullmatch(current_request_id) else uuid.uuid4().hex
        request_id.set(current_request_id)
        stages: dict[str, float] = {}
        request_stages.set(stages)
        is_head = method == "HEAD"  # handled as a GET, but the body is not sent
        scope = {**scope, "method": "GET" if is_head else method, "path": escaped_path(scope)}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                response_headers = MutableHeaders(scope=message)
                response_headers[ID_HEADER] = current_request_id
                response_headers[TIMING_HEADER] = server_timing(stages, time.perf_counter() - started)
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        with request_span(method, headers) as span:
            try:
                await self._handle_request(scope, headers, receive, send_with_headers)
            except Exception as error:
                if status:  # the answer has started; the server logs the error and closes the connection
                    status = 500
                    raise
                # The framework would answer outside of this middleware, without its headers and its metrics.
                span.record_exception(error)
                await problem_of_error(error)(scope, receive, send_with_headers)
            finally:
                # 499, as in nginx: the client disconnected before the answer.
                route, status, seconds = _route_template(scope), status or 499, time.perf_counter() - started
                self._service.metrics.answered(route, status, seconds)
                end_span(span, method, route, status)
                if self._service.access is not None:
                    self._service.access.write(
                        method=method,
                        route=route,
                        status=status,
                        ms=round(1000 * seconds, 2),
                        request_id=current_request_id,
                        trace_id=trace_id(headers),
                    )

    async def _handle_request(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        refusal = self._check_access(scope, headers)
        body = None if refusal else await _read_body(receive, self._service.config.max_body)
        if body is None:
            limit = self._service.config.max_body
            refusal = refusal or problem(413, f"The body is larger than {limit} bytes; send smaller batches")
        elif body:
            refusal = _check_media_type(headers)
        if body is None or refusal:
            assert refusal is not None
            await refusal(scope, receive, send)
            return
        await _run_while_connected(self._app, scope, body, receive, send)

    def _check_access(self, scope: Scope, headers: Headers) -> Response | None:
        keys, config, path = self._service.keys, self._service.config, routed_path(scope)
        if not keys.required:
            client = scope.get("client")
            if client and not is_loopback(client[0]):
                return problem(403, "This application runs without API keys, so it answers only its own machine")
            if not names_loopback(headers.get("host")):
                return problem(
                    403,
                    "This application runs without API keys, so it answers only requests to localhost or a loopback "
                    "address, not to another name of it; use http://localhost, or set API keys",
                )
            return None
        if needs_no_key(scope["method"], path, config):
            return None
        role = needed_role(scope["method"], path)
        roles = keys.roles(headers.get("authorization"))
        if not roles:
            challenge = {"WWW-Authenticate": "Bearer"}
            return problem(401, "A valid key is required: send it as `Authorization: Bearer KEY`", headers=challenge)
        if role not in roles:
            return problem(403, f"This key lacks the {role!r} role, needed for {path[:200]}")
        return None


def _check_media_type(headers: Headers) -> Response | None:
    """Return a problem if the body is not plain JSON, by its headers; else None."""
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not re.fullmatch(r"application/[\w.-]+\+json", media_type):
        sent_type = f"is {media_type[:100]}" if media_type else "is missing"
        detail = f"The Content-Type {sent_type}; send JSON with `Content-Type: application/json`"
        return problem(415, detail, headers={"Accept": "application/json"})
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        detail = f"The body is encoded as {headers['content-encoding'][:100]}; send it without Content-Encoding"
        return problem(415, detail, headers={"Accept-Encoding": "identity"})
    return None


async def _read_body(receive: Receive, limit: int) -> bytes | None:
    """Return the whole body; None if it is longer than `limit` bytes."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body", False):  # a disconnect message has no more_body
            return b"".join(parts)


async def _run_while_connected(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run the app on a body that was read already; cancel it if the client disconnects."""
    disconnect = asyncio.ensure_future(receive())  # after the body only a disconnect can follow
    is_body_sent = False

    async def replay() -> Message:
        nonlocal is_body_sent
        if not is_body_sent:
            is_body_sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.shield(disconnect)

    app_task = asyncio.ensure_future(app(scope, replay, send))
    try:
        await asyncio.wait((app_task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not app_task.done():
            app_task.cancel()
        with suppress(asyncio.CancelledError):
            await app_task
    finally:  # also if this call itself is cancelled, as Serve does when a client disconnects from its proxy
        app_task.cancel()
        disconnect.cancel()


def server_timing(stages: Mapping[str, float], total: float) -> str:
    """Return the Server-Timing header, in ms, for the seconds of each stage and the total seconds of a request."""
    return ", ".join(f"{name};dur={1000 * seconds:.2f}" for name, seconds in {**stages, "total": total}.items())


def _route_template(scope: Scope) -> str:
    """Return the template of the route as in the OpenAPI document: with the path there would be one label per user."""
    if routed_path(scope) == DOCUMENT:  # its route is FastAPI's own, which the scope does not name
        return DOCUMENT
    return str(getattr(scope.get("route"), "path_format", "none"))
