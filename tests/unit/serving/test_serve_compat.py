"""`serve_compat` fits the installed Serve. If a test fails, read what changed in Serve and adapt the module."""

import inspect
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from explanations import explain_failure
from ray import serve
from ray.serve._private import replica

from rayrec.errors import RayrecError
from rayrec.serving import serve_compat
from rayrec.serving.run import free_ports

FILE = "rayrec/serving/serve_compat.py"
HAPROXY_CONFIGURATION = """
global
    stats socket {admin_socket} level admin
defaults
    mode http
    timeout connect 5s
    timeout client 300s
    timeout server 300s
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    server replica 127.0.0.1:{replica_port}
"""
SECONDS = 60.0  # for a connection, an answer and the end of HAProxy


def test_the_installed_ray_is_the_one_whose_private_parts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    serve_compat.require_known_ray()
    monkeypatch.setattr(serve_compat, "version", lambda name: "2.61.0")
    with pytest.raises(RayrecError, match=r"serving requires Ray 2.60, found 2.61.0"):
        serve_compat.require_known_ray()


def test_serves_template_of_haproxy_is_the_known_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve_compat.templates_digest() == serve_compat.TEMPLATES, (
        "Serve writes HAProxy's configuration differently now"
    )
    serve_compat.write_haproxy_wrapper(tmp_path)
    monkeypatch.setattr(serve_compat, "TEMPLATES", "0" * len(serve_compat.TEMPLATES))
    with pytest.raises(RayrecError, match="template of HAProxy's configuration is unknown"):
        serve_compat.write_haproxy_wrapper(tmp_path)


def test_only_haproxys_own_pages_are_held_to_loopback(tmp_path: Path) -> None:
    """The application's own port stays on the address in the configuration."""
    config = tmp_path / "haproxy.cfg"
    config.write_text("frontend a\n    bind :7001\nfrontend b\n    bind *:8000\nlisten c\n  bind *:7002\n")
    wrapper = serve_compat.write_haproxy_wrapper(tmp_path, (7001, 7002))
    subprocess.run([wrapper, "-v", "-f", config], check=True, capture_output=True)
    bind_lines = [line.strip() for line in config.read_text().splitlines() if "bind" in line]
    assert bind_lines == ["bind 127.0.0.1:7001", "bind *:8000", "bind 127.0.0.1:7002"]


def test_a_replica_still_binds_its_port_where_it_is_held_to_loopback() -> None:
    with explain_failure("ray", "binds a replica's port (ray/serve/_private/replica.py)", FILE):
        assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica)


def test_serve_still_asks_a_class_without_an_app_for_the_method_that_ours_has() -> None:
    with (
        explain_failure("ray", "takes an app from a class (ray/serve/api.py)", "rayrec/serving/deployments.py"),
        pytest.raises(ValueError, match="__serve_build_asgi_app__"),
    ):
        serve.ingress()(type("Empty", (), {}))


@pytest.fixture
def haproxy_port(tmp_path: Path, replica_socket: socket.socket) -> Iterator[int]:
    """The port of a running HAProxy with its admin socket in a folder of `tmp_path`, before `replica_socket`."""
    (port,), config, folder = free_ports(1), tmp_path / "haproxy.cfg", tmp_path / "node"
    folder.mkdir()
    ports = {"port": port, "replica_port": replica_socket.getsockname()[1]}
    config.write_text(HAPROXY_CONFIGURATION.format(admin_socket=folder / serve_compat.ADMIN_SOCKET, **ports))
    process = subprocess.Popen([serve_compat.write_haproxy_wrapper(tmp_path), "-db", "-f", config])
    while not is_open(port):
        assert process.poll() is None
        time.sleep(0.05)
    yield port
    process.terminate()
    process.wait(SECONDS)


@pytest.fixture
def replica_socket() -> Iterator[socket.socket]:
    """A socket that listens in the place of a replica."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        yield listener


def is_open(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) == 0


def test_haproxy_accepts_no_more_connections_and_its_requests_are_waited_for(
    tmp_path: Path, haproxy_port: int, replica_socket: socket.socket
) -> None:
    with (
        ThreadPoolExecutor() as executor,
        closing(socket.create_connection(("127.0.0.1", haproxy_port), SECONDS)) as client,
        explain_failure("ray", "starts an HAProxy whose admin socket answers (finish_requests; HAProxy 2.8)", FILE),
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        request, _ = replica_socket.accept()  # HAProxy has passed the request on
        finished = executor.submit(serve_compat.finish_requests, tmp_path, 3 * SECONDS)
        deadline = time.monotonic() + SECONDS
        while is_open(haproxy_port):
            assert time.monotonic() < deadline, "HAProxy still accepts connections"
            time.sleep(0.05)
        time.sleep(0.5)
        assert not finished.done(), "the request in progress was not waited for"
        with closing(request):
            request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
        finished.result(SECONDS)  # although the client's idle connection is still open
