"""What every request passes before the routes: its key, its size, its clock, and whether its client still listens."""

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayrec.serving.auth import Role
from rayrec.serving.problems import problem
from rayrec.serving.serve_config import is_loopback

if TYPE_CHECKING:
    from rayrec.serving.service import Service

# Who may do what; every path that is not named is for readers.
OPEN = ("/",)  # the page, which holds nothing but itself
NEEDS: dict[str, Role] = {"/metrics": "admin", "/v1/plays": "write"}


class Gate:
    """ASGI middleware in front of the whole application."""

    def __init__(self, app: ASGIApp, service: "Service") -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._pass(scope, receive, counted)
        finally:
            # 499, as nginx counts it: the client went away before there was an answer.
            self._service.metrics.answered(_route(scope), status or 499, time.perf_counter() - began)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        refusal = self._refuse(scope, headers)
        body = None if refusal else await _read(receive, self._service.config.max_body)
        if body is None:
            limit = self._service.config.max_body
            refusal = refusal or problem(413, f"the body is over {limit} bytes; send smaller batches")
            await refusal(scope, receive, send)
            return
        await _while_connected(self._app, scope, body, receive, send)

    def _refuse(self, scope: Scope, headers: Headers) -> Response | None:
        keys = self._service.keys
        if not keys.required:
            client = scope.get("client")
            if client and not is_loopback(client[0]):
                return problem(403, "this application runs without API keys and answers its own machine only")
            return None
        if scope["path"] in OPEN and scope["method"] in ("GET", "HEAD"):
            return None
        needed = NEEDS.get(scope["path"], "read")
        roles = keys.roles(headers.get("authorization"))
        if not roles:
            wanted = {"WWW-Authenticate": "Bearer"}
            return problem(401, "a valid key is needed: send it as `Authorization: Bearer KEY`", headers=wanted)
        if needed not in roles:
            return problem(403, f"this key is not for {scope['path'][:200]}; it takes the role {needed}")
        return None


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None where it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body", False):  # true of a disconnect, too
            return b"".join(parts)


async def _while_connected(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Run the app on a body that is here already, and no longer than its client waits for it."""
    gone = asyncio.ensure_future(receive())  # after the body, all that can come is the disconnect
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await asyncio.shield(gone)

    work = asyncio.ensure_future(app(scope, replay, send))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
        with suppress(asyncio.CancelledError):
            await work
    finally:  # also where this very call is cancelled, as Serve does for a client that left its proxy
        work.cancel()
        gone.cancel()


def _route(scope: Scope) -> str:
    """The route's template, for a label: a path would make one label for each user."""
    route = scope.get("route")
    return str(getattr(route, "path", "none"))
