"""`rayrec serve` as people run it: behind HAProxy, on loopback alone, with keys, until it is told to end."""

import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import psutil
import pytest
from served import AT, write_release, write_world

from rayrec import releases
from rayrec.workspace import Workspace

READ, ADMIN = "reader-0123456789", "admin-0123456789a"
BODY = {"history": ["song-3", "song-50"], "at": AT, "k": 5}


@dataclass
class Served:
    """A running command."""

    workspace: Workspace
    process: "subprocess.Popen[str]"
    url: str

    def listening(self) -> dict[tuple[str, int], str]:
        """Address and port -> command, of every TCP and UDP port that the command's processes have open to others."""
        command = psutil.Process(self.process.pid)
        found = {}
        for process in [command, *command.children(recursive=True)]:
            for connection in process.net_connections(kind="inet"):
                if not connection.raddr and connection.laddr:
                    found[(connection.laddr.ip, connection.laddr.port)] = " ".join(process.cmdline())
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    workspace = Workspace(tmp_path_factory.mktemp("serve") / "workspace")
    write_world(workspace)
    write_release(workspace, "1", seed=1)
    write_release(workspace, "2", seed=2, activate=False)
    with started(workspace) as (process, url):
        yield Served(workspace, process, url)


@contextmanager
def started(workspace: Workspace) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A running command and its URL."""
    process = run(workspace, "serve", "--port", "0", "--watch-seconds", "0.2")
    try:
        assert process.stderr is not None
        line = process.stderr.readline()  # the first: nothing is told before it
        found = re.search(r"^Serving at (http://127\.0\.0\.1:\d+)", line)
        assert found, line
        yield process, found[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(workspace: Workspace, *arguments: str, key: str = "") -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rayrec_cli.main", "--workspace", workspace.root, *arguments]
    environment = {**os.environ, "RAYREC_API_KEYS": f"read:{READ},admin:{ADMIN}", "RAYREC_API_KEY": key}
    for name in ("RAY_ADDRESS",):
        environment.pop(name, None)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # As in a terminal: tests that run in the background of a shell would hand down that interrupts are ignored.
    return subprocess.Popen(command, env=environment, **pipes, preexec_fn=_hear_interrupts)


def _hear_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_port_is_on_loopback(served: Served) -> None:
    httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ))
    found = served.listening()
    for name in ("haproxy", "ServeReplica", "raylet", "gcs_server", "ProxyActor", "ServeController", "DashboardAgent"):
        assert any(name in command for command in found.values()), name
    open_to_others = {place: command for place, command in found.items() if not loopback(place[0])}
    assert open_to_others == {}


def loopback(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def test_behind_haproxy_requests_are_answered_and_errors_are_problems(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ))
    assert (answer.status_code, len(answer.json()["songs"])) == (200, 5)
    for response, status in (
        (httpx.post(f"{served.url}/v1/recommendations", content=b"{", headers=with_key(READ)), 422),
        (httpx.post(f"{served.url}/v1/recommendations", content=b"x" * 5_000_000, headers=with_key(READ)), 413),
        (httpx.get(f"{served.url}/v1/nothing", headers=with_key(READ)), 404),
        (httpx.get(f"{served.url}/v1/release"), 401),
    ):
        assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")


def test_the_port_of_a_replica_answers_nothing_without_a_key(served: Served) -> None:
    ports = [port for (_, port), command in served.listening().items() if "ServeReplica" in command]
    spoken = []
    for port in ports:
        try:
            without = httpx.get(f"http://127.0.0.1:{port}/v1/release", timeout=2)
        except httpx.HTTPError:
            continue  # a port of Ray's own, which does not speak HTTP
        spoken.append(without.status_code)
        assert httpx.post(f"http://127.0.0.1:{port}/v1/recommendations", json=BODY).status_code == 401
        assert httpx.get(f"http://127.0.0.1:{port}/v1/release", headers=with_key(READ)).status_code == 200
    assert spoken == [401]


def test_a_release_is_activated_and_rolled_back_while_it_runs(served: Served) -> None:
    first, second = (release.id for release in releases.list_releases(served.workspace))
    for arguments, live in ((("activate", second), second), (("rollback",), first)):
        done = run(served.workspace, "release", *arguments, "--wait", "--url", served.url, key=ADMIN)
        assert done.wait(120) == 0, done.stderr and done.stderr.read()
        answer = httpx.post(f"{served.url}/v1/recommendations", json=BODY, headers=with_key(READ)).json()
        assert answer["release"] == live
    wrong = run(served.workspace, "release", "activate", second, "--url", served.url, key="wrong-0123456789")
    assert wrong.wait(120) == 1
    assert wrong.stderr is not None
    assert "RAYREC_API_KEY" in wrong.stderr.read()
    assert releases.read_active(served.workspace)["active"] == first


def test_an_interrupt_ends_it_with_all_its_processes(served: Served) -> None:
    command = psutil.Process(served.process.pid)
    processes = command.children(recursive=True)
    served.process.send_signal(signal.SIGINT)
    out, errors = served.process.communicate(timeout=120)
    assert served.process.returncode == 0, errors
    assert (out.strip(), errors.strip()) == ("Ended.", "Ending")
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    assert served.workspace.files("serving/replicas") == []


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv of util-linux is not here")
def test_killed_it_leaves_nobody_who_answers(served: Served) -> None:
    with started(served.workspace) as (process, _):
        processes = psutil.Process(process.pid).children(recursive=True)
        answering = [child for child in processes if child.name() == "haproxy" or "ServeReplica" in child.name()]
        assert len(answering) >= 2
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(answering, timeout=60)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
