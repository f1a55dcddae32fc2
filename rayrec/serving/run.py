"""`rayrec serve`: the application on this machine, behind HAProxy, on a Ray of its own.

Behind HAProxy a request through Serve costs about what bare uvicorn does, a quarter of what Serve's own proxy takes.
On loopback every port of every process is checked before the application counts as started, and while it runs.
"""

import csv
import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import chain, repeat
from pathlib import Path
from random import SystemRandom
from typing import NoReturn

import psutil

from rayrec.config import to_mapping
from rayrec.errors import InputError, RayrecError, ray_not_started
from rayrec.serving.middleware import load_keys
from rayrec.serving.serve_compat import require_known_ray, write_haproxy_wrapper
from rayrec.serving.serve_config import LOOPBACK, ServeConfig, is_loopback
from rayrec.serving.telemetry import AccessLog
from rayrec.storage.workspace import Workspace

NAME = "rayrec"  # of the application in Serve
# Above those of Ray's workers, below those of Serve's replicas and those that Linux gives to whoever asks for any.
PORTS = range(20_000, 30_000)
DRAIN_SECONDS = 2  # that Serve waits at least before it ends a replica
REQUEST_SECONDS = 30  # for the requests at work when the application ends
SETTLE_SECONDS = 3.0  # for sockets that are open for a moment only
CHECK_SECONDS = (1.0,) * 60 + (60.0,)  # between checks of ports; the last goes on
ADMIN_SOCKET = "admin"  # HAProxy's, in a folder that Serve names by the id of the node
NODE_ID_DIGITS = 56
SOCKET_PATH_BYTES = 97  # at most, of a socket that HAProxy listens on
# How Serve runs, here and on a cluster, whose image (cluster/Dockerfile) sets the same; a test compares them.
SERVE_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_niceness": "0",  # else Ray's workers, replicas among them, give way to everything else
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(REQUEST_SECONDS),
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    # A request whose replica dies goes to another one: all of ours may be sent twice.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # three that fail, and a new HAProxy is started
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a line of log a request that Serve's Python would read; we count
}


@contextmanager
def running(workspace: Workspace, config: ServeConfig) -> Iterator[str]:
    """The URL of the application, which runs until the block ends.

    To be called in the main thread; the caller's handler of SIGTERM stays, but while Ray starts SIGTERM raises
    `KeyboardInterrupt`. Raises `InputError` where keys are missing, the port is taken, the access log cannot be
    written or the folder for temporary files has too long a path, `RayrecError` where Ray or Serve cannot start it.
    """
    load_keys(config)  # before anything starts
    if config.access_log:
        AccessLog(config.access_log).close()
    require_known_ray()
    config = config.replace(port=config.port or free_ports(1)[0])
    require_free(config.host, config.port)
    folder = _haproxy_folder()
    try:
        os.environ.update(environment(config, folder))
        with _application(workspace, config, folder):
            if is_loopback(config.host):
                require_loopback()
            yield f"http://{config.host}:{config.port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment(config: ServeConfig, folder: Path) -> dict[str, str]:
    """What Ray and Serve read as they are imported; `folder` is for HAProxy's files."""
    figures, statistics, fallback = [port for port in free_ports(4) if port != config.port][:3]
    settings = {
        **SERVE_SETTINGS,
        # As on a laptop: Ray's node is 127.0.0.1, and all its servers listen there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_loopback(config.host) else "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(figures),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),  # where nobody reads: no UDP port is opened
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / ADMIN_SOCKET),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_haproxy_wrapper(folder, (figures, statistics))),
    }
    return {name: os.environ.get(name, value) if name.startswith("OMP") else value for name, value in settings.items()}


def _haproxy_folder() -> Path:
    """A new folder for HAProxy's files, for its owner alone, in the one where Ray has its own."""
    parent = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    os.makedirs(parent, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rayrec-", dir=parent))
    excess = len(os.fsencode(folder / ("0" * NODE_ID_DIGITS) / ADMIN_SOCKET)) - SOCKET_PATH_BYTES
    if excess > 0:
        folder.rmdir()
        raise InputError(
            f"the folder for temporary files, {parent}, has a path that is {excess} bytes too long for HAProxy's "
            "socket; set RAY_TMPDIR=/tmp"
        )
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, nor will by chance: Ray's processes take any that the system gives them."""
    ports: list[int] = []
    for port in SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RayrecError(f"{count} free ports are needed; from {PORTS[0]} to {PORTS[-1]} only {len(ports)} are free")


def require_free(host: str, port: int) -> None:
    """Raise `InputError` where nothing can listen on an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}, port {port}: {error.strerror}; give another --port, 0 for any free one"
            ) from error


def open_listeners(pid: int | None = None) -> list[str]:
    """Address, port and process of every port of a process, this one unless given, and its children that is reached
    from other machines, or may be: a process that may not be looked into counts."""
    command, reached = psutil.Process(pid), []
    for process in [command, *command.children(recursive=True)]:
        try:
            name = process.name()
            connections = process.net_connections(kind="inet")
        except psutil.AccessDenied:
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    reached.append(f"unknown ports of process {process.pid} ({process.name()}): access denied")
            continue
        except psutil.NoSuchProcess:  # it has just ended; a zombie counts as such
            continue
        for connection in connections:
            listens = connection.status == psutil.CONN_LISTEN or (
                connection.type == socket.SOCK_DGRAM and connection.laddr and not connection.raddr
            )
            if listens and not is_loopback(connection.laddr.ip):
                reached.append(f"{connection.laddr.ip} port {connection.laddr.port} ({name})")
    return reached


def require_loopback(pid: int | None = None) -> None:
    """Raise `RayrecError` where a port of a process, this one unless given, or of its children stays open to other
    machines for `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while reached := open_listeners(pid):
        if time.monotonic() > deadline:
            raise RayrecError(
                f"ports are open to other machines though the application is for this one: {', '.join(reached)}; "
                "the application was stopped"
            )
        time.sleep(0.2)


def wait_for_interrupt(host: str) -> NoReturn:
    """Wait until `KeyboardInterrupt`, with the ports checked by `require_loopback` where `host` is loopback.

    Processes of Ray that start late, or again, open ports too. Raises `RayrecError` where one stays open.
    """
    pauses = chain(CHECK_SECONDS, repeat(CHECK_SECONDS[-1]))
    while True:
        time.sleep(next(pauses))
        if is_loopback(host):
            require_loopback()


def _finish_requests(folder: Path) -> None:
    """Have HAProxy take no more connections, and wait for the requests at work: Serve itself would cut them off.

    `folder` holds its admin socket. A soft stop would wait for idle connections too, and Serve replaces a HAProxy that
    ends within 3 seconds.
    """
    for path in folder.rglob(ADMIN_SOCKET):
        with suppress(OSError):
            for name in {row["# pxname"] for row in _statistics(path) if row["svname"] == "FRONTEND"}:
                _ask_haproxy(path, f"disable frontend {name}")
            deadline = time.monotonic() + REQUEST_SECONDS
            while time.monotonic() < deadline:
                if not sum(int(row["scur"] or 0) for row in _statistics(path) if row["svname"] == "BACKEND"):
                    break
                time.sleep(0.1)


def _statistics(path: Path) -> list[dict[str, str]]:
    """A row for each frontend, backend and server of the HAProxy whose admin socket this is."""
    return list(csv.DictReader(_ask_haproxy(path, "show stat").splitlines()))


def _ask_haproxy(path: Path, command: str) -> str:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(5)
        admin.connect(str(path))
        admin.sendall(f"{command}\n".encode())
        parts = iter(lambda: admin.recv(1 << 16), b"")
        return b"".join(parts).decode()


@contextmanager
def _application(workspace: Workspace, config: ServeConfig, folder: Path) -> Iterator[None]:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.schema import LoggingConfig

    from rayrec.serving.deployments import build

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = LoggingConfig(log_level=logging.ERROR, enable_access_log=False)
    # Reserved CPUs are for the scheduler of a cluster; here all replicas share what there is.
    reserved = config.cpus * max(config.replicas, config.max_replicas)
    cpus = max(os.cpu_count() or 1, math.ceil(reserved))
    own = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(**own, logging_level=logging.ERROR, log_to_driver=False)
        except SystemExit as error:  # from Ray's handler of SIGTERM, which it sets first
            raise KeyboardInterrupt from error
        except Exception as error:
            raise ray_not_started(error) from error
        finally:
            signal.signal(signal.SIGTERM, handler)  # Ray's last one dumps the stack and aborts
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config=quiet)
        arguments = {**to_mapping(config), "workspace": workspace.root if workspace.is_local else workspace.uri}
        serve.run(build(arguments), name=NAME, logging_config=quiet)
        yield
        _finish_requests(folder)
    finally:
        # Ray prints on stdout that the controller has ended, and at times raises it.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            if ray.is_initialized():  # else Serve would start Ray
                with suppress(RayError):
                    serve.shutdown()
            ray.shutdown()
