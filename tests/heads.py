"""A real Ray head of its own on this machine, with a dashboard and a token."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass(frozen=True)
class Head:
    """Where it listens and what opens it."""

    url: str
    token: Path  # file that holds the token


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[Head]:
    """Start it with `ray start --head --block` and end it with all that it started."""
    # A short path: the sockets below it may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="rr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--disable-usage-stats"),
            *(f"--temp-dir={folder}/ray", f"--num-cpus={cpus}", "--object-store-memory=200000000"),
            *("--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--{name}={port}" for name, port in ports.items()),
        ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with (Path(folder) / "out").open("w+") as out:
            process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
            try:
                url = f"http://127.0.0.1:{ports['dashboard-port']}"
                _wait(url, process, Path(folder) / "out")
                yield Head(url, token)
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


PORTS = (
    *("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port"),
    *("dashboard-agent-grpc-port", "runtime-env-agent-port", "node-manager-port", "object-manager-port"),
)


def _wait(url: str, process: subprocess.Popen[bytes], out: Path) -> None:
    """Until the job server answers, with a refusal as we show no token."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/api/jobs/", timeout=5)
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.3)
    raise RuntimeError(f"the head did not start: {out.read_text()[-2000:]}")
