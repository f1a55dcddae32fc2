"""Connect to a Ray cluster, or start a quiet one on this machine for the length of a job."""

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before ray is imported: no usage report, and no spinning OpenMP threads, which cost a factor of
# 30 where another process wants the core.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ray
from ray.data import DataContext

from rayrec.errors import InputError, RayrecError

CONNECT_SECONDS = 5.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
HTTP2_SETTINGS = b"\x04"  # type of the frame with which every HTTP/2 server begins

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A worker that runs for long gives freed memory back, not to one of many arenas. Single runs of the
    # taste job at 500,000 users peaked at 420 MiB with both, at 494 and 507 without.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
}


@contextmanager
def ray_cluster(address: str | None = None, **options: Any) -> Iterator[None]:
    """A with block on Ray: the running connection, else `address` or RAY_ADDRESS, else a private local cluster.

    Only what this block connected is shut down at its end. Ray's own logs and bars stay quiet.

    Raises `InputError` for an address where no Ray cluster answers, and `RayrecError` where Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)
    local = {} if address else {"include_dashboard": False, **options}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            # "local" and not None: plain init attaches to whatever died here last and hangs.
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
            **local,
        )
    except Exception as error:  # Ray raises bare exceptions of many types
        raise _not_started(address, error) from error
    quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def require_cluster(address: str, timeout: float = CONNECT_SECONDS) -> None:
    """Raise `InputError` unless something at `host:port` or `ray://host:port` speaks gRPC, as Ray's head does.

    Ray itself tries for a quarter of an hour. `auto` and `local` pass.
    """
    if address in ("auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    try:
        if "://" in host or not host:
            raise ValueError("expected host:port or ray://host:port")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
        if answer[3:4] != HTTP2_SETTINGS:
            raise ValueError("another program answers there")
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS={address} points to no Ray cluster: {error}; start one with `ray start --head`, give its "
            "address, or unset RAY_ADDRESS to use this machine"
        ) from error


def _not_started(address: str | None, error: Exception) -> RayrecError:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "AF_UNIX" in text:
        return InputError(
            f"the folder for temporary files, {tempfile.gettempdir()}, has too long a path for Ray's sockets; "
            "set RAY_TMPDIR=/tmp"
        )
    where = f"the Ray cluster at {address} cannot be used" if address else "Ray could not be started on this machine"
    return RayrecError(f"{where}: {text}; check its logs below /tmp/ray, and the memory and CPUs that are free")


def quiet_data() -> None:
    """Ray Data without its own progress bars and log lines; ours stand on stderr."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come out as exceptions


def cluster_cpus() -> int:
    """CPUs of the whole cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
