"""A real Serve application over HTTP, on the cluster of the tests."""

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from rayrec.serving.deployments import build
from rayrec.storage.workspace import Workspace


def free_port() -> int:
    """Return a port on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(workspace: Workspace, **settings: Any) -> Iterator[str]:
    """Run an application until the block ends; yield its URL. Needs a connection to Ray."""
    port = free_port()
    quiet_logging = LoggingConfig(log_level=logging.ERROR, enable_access_log=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet_logging)
    try:
        serve.run(build({"workspace": workspace.root, "port": port, **settings}), logging_config=quiet_logging)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
