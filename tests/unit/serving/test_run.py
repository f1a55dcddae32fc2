"""Settings and checks of the local application: HAProxy's files, ports, loopback, and the start of Ray."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rayrec.errors import InputError, RayrecError
from rayrec.serving import run
from rayrec.serving.run import (
    environment,
    free_ports,
    open_listeners,
    require_free,
    require_loopback,
    running,
    stop_requests,
    wait_for_stop,
)
from rayrec.serving.serve_config import ServeConfig, is_loopback
from rayrec.storage.workspace import Workspace


def test_the_files_of_haproxy_are_the_owners_alone_and_its_ports_are_free(tmp_path: Path) -> None:
    variables = environment(ServeConfig(), tmp_path)
    wrapper = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert stat.S_IMODE(wrapper.stat().st_mode) == 0o700
    ports = [value for name, value in variables.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 3
    paths = [value for name, value in variables.items() if name.startswith("RAY_SERVE_HAPROXY") and "/" in value]
    assert all(path.startswith(str(tmp_path)) for path in paths)
    assert len(paths) == 6


def test_ray_stays_on_loopback_unless_the_application_does_not(tmp_path: Path) -> None:
    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    assert environment(ServeConfig(), tmp_path)[name] == "0"
    assert environment(ServeConfig(host="0.0.0.0"), tmp_path)[name] == "1"


def test_a_taken_port_is_an_input_error_before_anything_starts() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=rf"port {port}: .*give another --port"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", free_ports(1)[0])


def test_free_ports_are_none_that_a_process_of_ray_may_be_given_before_they_are_used() -> None:
    with socket.socket() as other_socket:
        other_socket.bind(("127.0.0.1", 0))
        ephemeral_port = other_socket.getsockname()[1]
    assert all(19_999 < port < min(ephemeral_port, 30_000) for port in free_ports(50))


SERVER = (  # after a line on stdin, listens on the given host and prints the port
    "import socket, sys; input(); s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True); "
    "input()"
)


def test_a_port_that_is_open_to_others_is_named_and_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.3)
    for host, is_closed in (("127.0.0.1", True), ("0.0.0.0", False)):
        with subprocess.Popen(
            [sys.executable, "-c", SERVER, host], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin
            assert process.stdout
            print(file=process.stdin, flush=True)
            port = int(process.stdout.readline())
            if is_closed:
                require_loopback(process.pid)
            else:
                assert any(f"0.0.0.0 port {port} (" in listener for listener in open_listeners(process.pid))
                with pytest.raises(RayrecError, match=rf"0.0.0.0 port {port} .*application was stopped"):
                    require_loopback(process.pid)
            process.communicate("\n")


def test_a_process_whose_ports_may_not_be_seen_counts_as_open_and_one_that_has_ended_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.3)
    denied_pids: set[int] = set()
    true_connections = psutil.Process.net_connections

    def net_connections(self: psutil.Process, kind: str = "inet") -> list[Any]:
        if self.pid in denied_pids:
            raise psutil.AccessDenied(self.pid)
        return true_connections(self, kind)

    monkeypatch.setattr(psutil.Process, "net_connections", net_connections)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as process:
        require_loopback(process.pid)
        denied_pids.add(process.pid)
        with pytest.raises(RayrecError, match=rf"unknown ports of process {process.pid} \(python.*access denied"):
            require_loopback(process.pid)
        assert process.stdin
        process.stdin.close()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        require_loopback(process.pid)  # a zombie: its exit status has not been read yet


def test_a_port_that_opens_while_the_application_runs_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SETTLE_SECONDS", 0.3)
    monkeypatch.setattr(run, "CHECK_SECONDS", (0.01,))
    checks = count()

    def require_loopback_and_open() -> None:
        require_loopback()
        if next(checks) == 5:  # the application has started by then
            print(file=process.stdin, flush=True)

    monkeypatch.setattr(run, "require_loopback", require_loopback_and_open)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, "0.0.0.0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with pytest.raises(RayrecError, match=r"0.0.0.0 port \d+ \(python"):
            wait_for_stop("127.0.0.1", lambda: None)
        assert next(checks) > 5
        process.communicate("\n")


@pytest.fixture
def enabled_interrupts() -> Iterator[None]:
    """Let SIGINT raise `KeyboardInterrupt`: it is ignored if the tests run in the background of a shell."""
    earlier_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier_handler)


@pytest.mark.usefixtures("enabled_interrupts")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server_only_where_it_asks(number: signal.Signals) -> None:
    """An exception in the middle of an import may be swallowed, and then the server never stops."""
    with stop_requests() as check_stop:
        check_stop()
        os.kill(os.getpid(), number)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                check_stop()


@pytest.mark.usefixtures("enabled_interrupts")
def test_a_second_interrupt_raises_at_once() -> None:
    with stop_requests():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("enabled_interrupts")
def test_stop_requests_leaves_ignored_signals_and_earlier_handlers() -> None:
    """A shell without job control starts background processes with SIGINT ignored."""
    earlier_handler = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as check_stop:
        os.kill(os.getpid(), signal.SIGINT)
        check_stop()
        assert signal.getsignal(signal.SIGTERM) != earlier_handler
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == earlier_handler


def test_loopback_is_told_from_other_addresses() -> None:
    assert [
        host
        for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1", "0.0.0.0", "::", "10.1.1.1", "x")
        if is_loopback(host)
    ] == [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "localhost",
        "::ffff:127.0.0.1",
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"replicas": 0},
        {"port": 70_000},
        {"watch_seconds": 0},
        {"max_body": 0},
        {"cpus": -1},
        {"max_replicas": 1, "replicas": 2},
    ],
)
def test_settings_that_make_no_sense_are_input_errors(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        ServeConfig(**wrong)  # type: ignore[arg-type]


def test_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    def fail(**options: object) -> None:
        raise OSError("AF_UNIX path length cannot exceed 107 bytes: /x")

    monkeypatch.setenv("RAYREC_API_KEYS", "read:reader-0123456789")
    monkeypatch.setattr(run, "environment", lambda config, folder: {})
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(InputError, match="set RAY_TMPDIR=/tmp"), running(workspace, ServeConfig(port=0)):
        pass


def test_haproxy_listens_in_the_folder_of_ray_if_the_path_of_its_socket_is_short_enough(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace
) -> None:
    """HAProxy refuses longer paths. Serve puts the socket into a folder named after the node's id of 56 digits."""
    paths: list[Path] = []

    def keep_path_and_stop(config: ServeConfig, folder: Path) -> dict[str, str]:
        paths.append(Path(environment(config, folder)["RAY_SERVE_HAPROXY_SOCKET_PATH"]))
        raise RayrecError("far enough")

    monkeypatch.setenv("RAYREC_API_KEYS", "read:reader-0123456789")
    monkeypatch.setattr(run, "environment", keep_path_and_stop)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="") as folder:
        short_path, long_path = (f"{folder}/".ljust(length, "x") for length in (18, 19))  # need not exist, as for Ray
        monkeypatch.setenv("RAY_TMPDIR", short_path)
        with pytest.raises(RayrecError, match="far enough"), running(workspace, ServeConfig(port=0)):
            pass
        (socket_path,) = paths
        assert socket_path.parent.parent == Path(short_path)
        assert len(str(socket_path.parent / ("0" * 56) / socket_path.name)) == 97
        monkeypatch.setenv("RAY_TMPDIR", long_path)
        message = f"{long_path}, has a path that is 1 bytes too long for HAProxy's socket; set RAY_TMPDIR=/tmp"
        with pytest.raises(InputError, match=message), running(workspace, ServeConfig(port=0)):
            pass
        assert os.listdir(long_path) == []
