"""HAProxy as Serve starts it: its own pages are on loopback only; requests of a lost replica are retried or get 503."""

import socketserver
import threading
import time
from collections.abc import Iterator

import httpx
import psutil
import pytest

from rayrec.serving.run import environment, free_ports
from rayrec.serving.serve_config import ServeConfig

# HAProxy's configuration as Serve writes it, shortened.
CONFIGURATION = """
defaults
    mode http
    timeout connect 1s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on {retry_on}
    errorfile 502 /nowhere/500.http
    errorfile 503 /nowhere/500.http
frontend prometheus
    bind :{figures}
frontend http_frontend
  bind *:{port}
    use_backend none if {{ path /none }}
    use_backend dying if {{ path /dying }}
    use_backend both if {{ path /both }}
    default_backend default_backend
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path \\'%[path]\\' not found."
backend none
    server away 127.0.0.1:{nobody}
backend dying
    server dies 127.0.0.1:{dies}
backend both
    http-reuse always
    server dies 127.0.0.1:{dies}
    server lives 127.0.0.1:{lives}
"""
RunningProxy = tuple[psutil.Popen, str]


class ClosingHandler(socketserver.BaseRequestHandler):
    """Reads a request with a JSON body and closes the connection, as the kernel does for a killed process."""

    def handle(self) -> None:
        self.read()

    def read(self) -> bytes:
        request = b""
        while not request.endswith(b"}"):
            request += self.request.recv(1 << 16)
        return request


class EchoHandler(ClosingHandler):
    """Answers a request with the bytes of that request."""

    def handle(self) -> None:
        request = self.read()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(request)}\r\nConnection: close\r\n\r\n"
        self.request.sendall(head.encode() + request)


@pytest.fixture(scope="module")
def haproxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningProxy]:
    """A running HAProxy process and its URL."""
    folder = tmp_path_factory.mktemp("haproxy")
    variables, (port, unused_port) = environment(ServeConfig(), folder), free_ports(2)
    metrics_port = int(variables["RAY_SERVE_HAPROXY_METRICS_PORT"])
    servers = [socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) for handler in (ClosingHandler, EchoHandler)]
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    dying_port, living_port = (server.server_address[1] for server in servers)
    config = folder / "haproxy.cfg"
    ports = {"port": port, "figures": metrics_port, "nobody": unused_port, "dies": dying_port, "lives": living_port}
    config.write_text(CONFIGURATION.format(retry_on=variables["RAY_SERVE_HAPROXY_RETRY_ON"], **ports))
    process = psutil.Popen([variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)])
    while len(process.net_connections()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    yield process, f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait()
    for server in servers:
        server.shutdown()
        server.server_close()


def test_haproxys_own_pages_are_on_loopback_only_and_the_application_on_the_given_address(
    haproxy: RunningProxy,
) -> None:
    process, url = haproxy
    listeners = [connection for connection in process.net_connections() if connection.status == psutil.CONN_LISTEN]
    addresses = {connection.laddr.port: connection.laddr.ip for connection in listeners}
    assert addresses.pop(int(url.rsplit(":", 1)[1])) == "0.0.0.0"  # the application's port, as configured
    assert [*addresses.values()] == ["127.0.0.1"]


def test_a_request_whose_replica_dies_is_answered_by_another(haproxy: RunningProxy) -> None:
    statuses = [httpx.post(f"{haproxy[1]}/both", json={"song_id": "song-3"}, timeout=60).status_code for _ in range(6)]
    assert statuses == [200] * 6


def test_serve_is_told_to_leave_watching_the_client_to_the_application(haproxy: RunningProxy) -> None:
    headers = {"X-Request-Disconnect-Disabled": "?0"}
    request_lines = httpx.post(f"{haproxy[1]}/both", json={}, headers=headers, timeout=60).text.lower().splitlines()
    assert [line for line in request_lines if "disconnect" in line] == ["x-request-disconnect-disabled: ?1"]


@pytest.mark.parametrize("path", ["none", "dying", "before-the-application-is-known"])
def test_where_no_replica_answers_it_says_when_to_try_again(haproxy: RunningProxy, path: str) -> None:
    response = httpx.post(f"{haproxy[1]}/{path}", json={}, timeout=60)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.json()["status"], response.json()["title"]) == (503, "Service Unavailable")
