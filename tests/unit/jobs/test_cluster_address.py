"""An address without a Ray cluster gives a one-line error within seconds, not after a quarter of an hour."""

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import ray
from ray.data import DataContext

from rayrec.errors import InputError, RayrecError
from rayrec.jobs import runtime as cluster
from rayrec.jobs.runtime import HTTP2_GREETING, ray_cluster, require_cluster


@contextmanager
def run_server(handle: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that calls `handle` with each connection, and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            try:
                while True:
                    connection, _ = server.accept()
                    with connection:
                        handle(connection)
            except OSError:
                return

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_without_a_server_is_refused_at_once(scheme: str) -> None:
    address = f"{scheme}127.0.0.1:{free_port()}"
    program = "from rayrec.jobs.runtime import ray_cluster\nwith ray_cluster():\n    pass"  # Ray may be connected here
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=300,  # Ray itself tries for a quarter of an hour
    )
    assert re.search(f"InputError: RAY_ADDRESS={address} points to no Ray cluster: .*refused", result.stderr)


def test_an_address_of_another_program_is_refused_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        run_server(lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as address,
        pytest.raises(InputError, match="another program answers there"),
    ):
        require_cluster(address)
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.2)

    def read_and_keep_silent(connection: socket.socket) -> None:
        while connection.recv(1 << 16):  # until the client leaves
            pass

    with run_server(read_and_keep_silent) as address, pytest.raises(InputError, match="timed out"):
        require_cluster(address)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "head", "127.0.0.1:many", "127.0.0.1:99999999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="points to no Ray cluster"):
        require_cluster(address)


def test_a_server_that_speaks_grpc_and_this_machine_pass() -> None:
    def greet(connection: socket.socket) -> None:
        assert connection.recv(len(HTTP2_GREETING)) == HTTP2_GREETING
        connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))

    with run_server(greet) as address:
        require_cluster(address)
        require_cluster(f"ray://{address}")
    require_cluster("auto")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), InputError, "set RAY_TMPDIR=/tmp"),
        (
            Exception("The node timed out.\nmore"),
            RayrecError,
            "Ray could not be started on this machine: The node timed",
        ),
    ],
)
def test_a_failed_start_of_ray_gives_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[Exception], message: str
) -> None:
    def fail(**options: object) -> None:
        raise raised

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(kind, match=message) as error, ray_cluster():
        pass
    assert "\n" not in str(error.value)


def test_a_cluster_that_rejects_the_token_gives_the_variables_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: object) -> None:
        try:
            raise RuntimeError("Failed to connect: ... ray.exceptions.AuthenticationError: InvalidAuthToken")
        except RuntimeError as error:
            raise ConnectionError("Failed to connect to Ray cluster at head:6379") from error

    monkeypatch.setattr(cluster, "require_cluster", lambda address: None)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    message = "the cluster at head:6379 rejects the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
    with pytest.raises(InputError, match=message), ray_cluster("head:6379"):
        pass


def test_a_connection_that_exists_already_shows_no_progress_bars_of_ray_data_either(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    context = DataContext.get_current()
    monkeypatch.setattr(context, "enable_progress_bars", True)
    with ray_cluster():
        assert not context.enable_progress_bars
