"""Starts a separate Ray head on this machine, with a dashboard and a token, and nodes that join it."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass(frozen=True)
class Head:
    """The addresses of a running head, and its token."""

    url: str  # of the dashboard and the job server
    token: Path  # file that holds the token
    address: str  # host:port that drivers and nodes connect to


def free_ports(count: int) -> list[int]:
    """Return `count` ports on which no process listens now."""
    sockets = [socket.socket() for _ in range(count)]
    for probe in sockets:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in sockets]
    for probe in sockets:
        probe.close()
    return ports


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """Run `ray start --head --block` during a block; at its end, stop all processes of the head."""
    # A short path, because the path of a Unix socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        ports = dict(zip((*HEAD_PORTS, *NODE_PORTS), free_ports(len(HEAD_PORTS) + len(NODE_PORTS)), strict=True))
        options = (
            f"--temp-dir={folder}/ray",
            "--head",
            "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1",
            *_flags(cpus, ports),
        )
        with _ray_process(options, token, Path(folder) / "out") as process:
            url = f"http://127.0.0.1:{ports['dashboard-port']}"
            _wait(url, process, Path(folder) / "out")
            yield Head(url, token, f"127.0.0.1:{ports['port']}")


@contextmanager
def ray_node(head: Head, cpus: int = 1) -> Iterator[None]:
    """Run a node during a block; it joins from another address of this machine, like a node on another machine."""
    ports = dict(zip(NODE_PORTS, free_ports(len(NODE_PORTS)), strict=True))
    options = (f"--address={head.address}", "--node-ip-address=127.0.0.2", *_flags(cpus, ports))
    with _ray_process(options, head.token, head.token.with_name("node-out")):
        yield


@contextmanager
def _ray_process(options: Sequence[str], token: Path, out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start --block` during a block; at its end, stop all processes that it started."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    with out.open("w+") as stream:
        process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _flags(cpus: int, ports: dict[str, int]) -> list[str]:
    # Workers use any free ports: otherwise two nodes on one machine would assign the same ports.
    sizes = [f"--num-cpus={cpus}", "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0"]
    return sizes + [f"--{name}={port}" for name, port in ports.items()]


HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")
NODE_PORTS = (
    *("dashboard-agent-listen-port", "metrics-export-port", "dashboard-agent-grpc-port"),
    *("runtime-env-agent-port", "node-manager-port", "object-manager-port"),
)


def _wait(url: str, process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait until the job server answers; it refuses the request, which has no token."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the head did not start: {out.read_text()[-2000:]}")
