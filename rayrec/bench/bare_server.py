"""`python -m rayrec.bench.bare_server WORKSPACE STORE`: the application on bare uvicorn, without Ray.

It also serves /noop, an endpoint that does nothing. It prints its URL once it answers requests, and exits when its
standard input is closed.
"""

import sys
import threading
import time
from typing import TYPE_CHECKING

from rayrec.serving.serve_config import ServeConfig
from rayrec.storage.workspace import Workspace

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

MAX_WAITING = 1_000  # requests that may wait: the server must answer the load, not refuse it


def main(uri: str, store: str) -> None:
    """Serve the workspace at `uri` with the user states at `store` until standard input is closed."""
    _run_server(Workspace(uri), ServeConfig(port=0, store=store, max_waiting=MAX_WAITING))


def _run_server(workspace: Workspace, config: ServeConfig) -> None:
    import uvicorn
    from fastapi import FastAPI

    from rayrec.serving.routes import create_app
    from rayrec.serving.service import open_service

    noop_app = FastAPI(openapi_url=None)

    @noop_app.get("/noop")
    async def answer_noop() -> dict[str, str]:
        return {"status": "ok"}

    service = open_service(workspace, config)
    app: ASGIApp = create_app(service)

    async def route_request(scope: "Scope", receive: "Receive", send: "Send") -> None:
        await (noop_app if scope.get("path") == "/noop" else app)(scope, receive, send)

    server = uvicorn.Server(
        uvicorn.Config(route_request, host=config.host, port=0, log_level="error", access_log=False)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.05)
    _print_url(f"http://{config.host}:{server.servers[0].sockets[0].getsockname()[1]}")
    sys.stdin.read()
    server.should_exit = True
    thread.join(10)
    service.close()


def _print_url(url: str) -> None:
    print(url, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
