"""`rayrec serve`: runs the application on this machine, behind HAProxy, in its own Ray instance.

HAProxy takes the place of Serve's own proxy because that costs more per request: docs/benchmarks.md, Serving. On
loopback every port of every process is checked before the application counts as started and while it runs.
"""

import logging
import math
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from itertools import chain, repeat
from pathlib import Path
from random import SystemRandom
from types import FrameType
from typing import Any, NoReturn

import psutil

from rayrec.config import to_mapping
from rayrec.errors import InputError, RayrecError, ray_not_started
from rayrec.serving.middleware import load_keys
from rayrec.serving.serve_compat import (
    ADMIN_SOCKET,
    NODE_ID_DIGITS,
    SOCKET_PATH_BYTES,
    finish_requests,
    require_known_ray,
    write_haproxy_wrapper,
)
from rayrec.serving.serve_config import LOOPBACK, ServeConfig, is_loopback
from rayrec.serving.telemetry import AccessLog
from rayrec.storage.workspace import Workspace

NAME = "rayrec"  # name of the application in Serve
# Above the ports of Ray's workers, below those of Serve's replicas and the ephemeral ports of Linux.
PORTS = range(20_000, 30_000)
DRAIN_SECONDS = 2  # minimum time that Serve waits before it ends a replica
REQUEST_SECONDS = 30  # maximum time for requests in progress when the application ends
SETTLE_SECONDS = 3.0  # time after which an open port is an error: some sockets are open only for a moment
POLL_SECONDS = 0.1  # between calls of `check_stop` while waiting
HANDLER_SECONDS = 0.01  # while Ray starts: its C++ code sets a handler of SIGTERM that aborts, until ours is set again
CHECK_SECONDS = (1.0,) * 60 + (60.0,)  # between checks of ports; the last value repeats
# Settings of Serve. The image for clusters (cluster/Dockerfile) has the same settings; a test compares them.
SERVE_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_worker_niceness": "0",  # by default Ray's workers, replicas included, have low priority
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(REQUEST_SECONDS),
    "RAY_SERVE_HAPROXY_NBTHREAD": "2",
    # If a replica dies, HAProxy sends its request to another one: every request of this API may be sent twice.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # after three failures Serve starts a new HAProxy
    # Otherwise Serve reads one log line per request in Python; rayrec has its own metrics.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
}


@contextmanager
def stop_requests() -> Iterator[Callable[[], None]]:
    """Let SIGINT and SIGTERM end the block, but only where it calls the function that this yields.

    That function raises `KeyboardInterrupt` once a signal has come. A handler that raises it itself does so at any
    point: an import may swallow it, so that the process never stops, and a C library may crash. Only a second SIGINT
    (Ctrl-C) raises it at once. Ignored signals stay ignored. Must be called in the main thread.
    """
    requests: list[int] = []

    def note_request(signal_number: int, frame: FrameType | None) -> None:
        if signal_number == signal.SIGINT and requests:
            raise KeyboardInterrupt
        requests.append(signal_number)

    def check_stop() -> None:
        if requests:
            raise KeyboardInterrupt

    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    earlier_handlers = {number: signal.signal(number, note_request) for number in numbers}
    try:
        yield check_stop
    finally:
        for number, handler in earlier_handlers.items():
            signal.signal(number, handler)


@contextmanager
def running(workspace: Workspace, config: ServeConfig, check_stop: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Run the application until the block ends; `with running(...) as url` gives its URL.

    Must be called in the main thread. `check_stop` is called between the steps of the start and may raise an exception
    to end it, as that of `stop_requests` does. Raises `InputError` as `require_startable` does, or if the path of the
    folder for temporary files is too long. Raises `RayrecError` if Ray or Serve cannot start the application, or if it
    should be for this machine only and a port is open to other machines.
    """
    require_startable(config)
    config = config.replace(port=config.port or free_ports(1)[0])
    folder = _create_haproxy_folder()
    try:
        os.environ.update(environment(config, folder))
        with _run_application(workspace, config, folder, check_stop):
            if is_loopback(config.host):
                require_loopback()
            yield f"http://{config.host}:{config.port}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_startable(config: ServeConfig) -> None:
    """Raise `InputError` if keys are missing, the port is taken, or the access log cannot be written.

    Raises `RayrecError` for a version of Ray that is not supported.
    """
    load_keys(config)
    if config.access_log:
        AccessLog(config.access_log).close()
    require_known_ray()
    if config.port:
        require_free(config.host, config.port)


def environment(config: ServeConfig, folder: Path) -> dict[str, str]:
    """Return the environment variables that Ray and Serve read when imported; `folder` is for HAProxy's files."""
    metrics_port, statistics_port, fallback_port = [port for port in free_ports(4) if port != config.port][:3]
    settings = {
        **SERVE_SETTINGS,
        # "0" as on a laptop: the address of Ray's node is 127.0.0.1, and all its servers listen there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_loopback(config.host) else "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log.sock"),  # unread: avoids an open UDP port
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / ADMIN_SOCKET),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_haproxy_wrapper(folder, (metrics_port, statistics_port))),
    }
    return {name: os.environ.get(name, value) if name.startswith("OMP") else value for name, value in settings.items()}


def _create_haproxy_folder() -> Path:
    """Create a folder for HAProxy's files, which only its owner can access, in the folder of Ray's temporary files.

    Raises `InputError` if its path is too long for HAProxy's socket.
    """
    parent = os.environ.get("RAY_TMPDIR", tempfile.gettempdir())
    os.makedirs(parent, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="rayrec-", dir=parent))
    excess_bytes = len(os.fsencode(folder / ("0" * NODE_ID_DIGITS) / ADMIN_SOCKET)) - SOCKET_PATH_BYTES
    if excess_bytes > 0:
        folder.rmdir()
        raise InputError(
            f"the folder for temporary files, {parent}, has a path that is {excess_bytes} bytes too long for HAProxy's "
            "socket; set RAY_TMPDIR=/tmp"
        )
    return folder


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on, outside of the range from which the system gives ports to processes."""
    ports: list[int] = []
    for port in SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RayrecError(
        f"{count} free ports are needed, but only {len(ports)} are free from {PORTS[0]} to {PORTS[-1]}; stop other "
        "programs that listen on them"
    )


def require_free(host: str, port: int) -> None:
    """Raise `InputError` if no server can listen on a host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"cannot listen on {host}, port {port}: {error.strerror}; give another --port, or 0 for any free port"
            ) from error


def open_listeners(pid: int | None = None) -> list[str]:
    """List the ports of a process and its children that other machines can reach, with address and process name.

    `pid` is the process; None is this one. A process whose ports may not be read is listed too: it may have open ports.
    """
    main_process, open_ports = psutil.Process(pid), []
    for process in [main_process, *main_process.children(recursive=True)]:
        try:
            name = process.name()
            connections = process.net_connections(kind="inet")
        except psutil.AccessDenied:
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    open_ports.append(f"unknown ports of process {process.pid} ({process.name()}): access denied")
            continue
        except psutil.NoSuchProcess:  # it has just ended; psutil raises this for a zombie too
            continue
        for connection in connections:
            is_listening = connection.status == psutil.CONN_LISTEN or (
                connection.type == socket.SOCK_DGRAM and connection.laddr and not connection.raddr
            )
            if is_listening and not is_loopback(connection.laddr.ip):
                open_ports.append(f"{connection.laddr.ip} port {connection.laddr.port} ({name})")
    return open_ports


def require_loopback(pid: int | None = None) -> None:
    """Raise `RayrecError` if a port of a process or its children stays open to other machines for `SETTLE_SECONDS`.

    `pid` is the process; None is this one.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while open_ports := open_listeners(pid):
        if time.monotonic() > deadline:
            raise RayrecError(
                "these ports are open to other machines, although --host is a loopback address: "
                f"{', '.join(open_ports)}. The application was stopped; please report this bug of rayrec"
            )
        time.sleep(0.2)


def wait_for_stop(host: str, check_stop: Callable[[], None]) -> NoReturn:
    """Wait until `check_stop` raises an exception. If `host` is loopback, check the ports repeatedly in the meantime.

    Ray processes that start late, or restart, open ports too. Raises `RayrecError` if a port stays open.
    """
    pauses = chain(CHECK_SECONDS, repeat(CHECK_SECONDS[-1]))
    while True:
        deadline = time.monotonic() + next(pauses)
        while (seconds := deadline - time.monotonic()) > 0:
            check_stop()
            time.sleep(min(seconds, POLL_SECONDS))
        if is_loopback(host):
            require_loopback()


@contextmanager
def _run_application(
    workspace: Workspace, config: ServeConfig, folder: Path, check_stop: Callable[[], None]
) -> Iterator[None]:
    import ray
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.schema import LoggingConfig

    from rayrec.serving.deployments import build

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging_config = LoggingConfig(log_level=logging.ERROR, enable_access_log=False)
    # Reserved CPUs are for the scheduler of a cluster; here all replicas share the CPUs of the machine.
    reserved_cpus = config.cpus * max(config.replicas, config.max_replicas)
    cpus = max(os.cpu_count() or 1, math.ceil(reserved_cpus))
    arguments = {**to_mapping(config), "workspace": workspace.root if workspace.is_local else workspace.uri}
    check_stop()
    # Ray starts in another thread, so that it does not replace the handler of SIGTERM by one that raises `SystemExit`
    # at any point. Linux ends the processes that Ray starts when that thread ends.
    with ThreadPoolExecutor(1) as ray_thread:
        try:
            _start_ray(ray_thread, address="local", num_cpus=cpus, include_dashboard=False)
            check_stop()
            serve.start(http_options={"host": config.host, "port": config.port}, logging_config=logging_config)
            check_stop()
            target = serve.RunTarget(build(arguments), name=NAME, logging_config=logging_config)
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            _wait_until_running(check_stop)
            yield
            finish_requests(folder, REQUEST_SECONDS)
        finally:
            # Ray prints on stdout that the controller has ended, and sometimes raises it as an error.
            with open(os.devnull, "w") as devnull, redirect_stdout(devnull), redirect_stderr(devnull):
                if ray.is_initialized():  # otherwise Serve would start Ray
                    with suppress(RayError):
                        serve.shutdown()
                ray.shutdown()


def _start_ray(ray_thread: ThreadPoolExecutor, **options: Any) -> None:
    """Start Ray in a thread. Raises `RayrecError` if it does not start."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    future = ray_thread.submit(ray.init, **options, logging_level=logging.ERROR, log_to_driver=False)
    while wait([future], timeout=HANDLER_SECONDS).not_done:
        signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGTERM, handler)
    try:
        future.result()
    except Exception as error:
        raise ray_not_started(error) from error


def _wait_until_running(check_stop: Callable[[], None]) -> None:
    """Wait until the application runs. Raises `RayrecError` if Serve cannot start it."""
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    while (application := serve.status().applications[NAME]).status != ApplicationStatus.RUNNING:
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            raise RayrecError(f"the application did not start: {application.message}")
        check_stop()
        time.sleep(POLL_SECONDS)
