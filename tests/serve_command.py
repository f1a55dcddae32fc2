"""Runs the command `rayrec serve` in a process of its own, with keys, on a free port."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from rayrec.storage.workspace import Workspace

READ, ADMIN = "reader-0123456789", "admin-0123456789a"


@dataclass
class Served:
    """A running `rayrec serve`."""

    workspace: Workspace
    process: "subprocess.Popen[str]"
    url: str

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Return the live processes of the command whose command line contains `name`."""
        command, live_processes = psutil.Process(self.process.pid), []
        for process in [command, *command.children(recursive=True)]:
            try:
                if name in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                    live_processes.append(process)
            except psutil.Error:  # the process has just ended
                continue
        return live_processes

    def listening(self) -> dict[tuple[str, int], str]:
        """Return (address, port) -> command line, for each TCP and UDP port on which the command's processes listen."""
        command_lines = {}
        for process in self.processes():
            try:
                connections, command = process.net_connections(kind="inet"), " ".join(process.cmdline())
            except psutil.Error:  # the process has just ended
                continue
            for connection in connections:
                if not connection.raddr and connection.laddr:
                    command_lines[(connection.laddr.ip, connection.laddr.port)] = command
        return command_lines


@contextmanager
def started(workspace: Workspace, *options: str) -> Iterator[Served]:
    """Run `rayrec serve` until the block ends."""
    process = run(workspace, "serve", "--port", "0", "--watch-seconds", "0.2", *options)
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:  # lines about the users' states come first
            lines.append(line)
            match = re.search(r"^Serving at (http://[\d.]+:\d+)", line)
            if match:
                break
        else:
            raise AssertionError("".join(lines))
        yield Served(workspace, process, match[1])
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(workspace: Workspace, *arguments: str, key: str = "") -> "subprocess.Popen[str]":
    """Start a rayrec command."""
    command = [sys.executable, "-m", "rayrec_cli.main", "--workspace", workspace.root, *arguments]
    environment = {**os.environ, "RAYREC_API_KEYS": f"read:{READ},admin:{ADMIN}", "RAYREC_API_KEY": key}
    for name in ("RAY_ADDRESS",):
        environment.pop(name, None)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # If the tests run in the background of a shell, child processes would inherit that interrupts are ignored.
    return subprocess.Popen(command, env=environment, **pipes, preexec_fn=_enable_interrupts)


def with_key(key: str) -> dict[str, str]:
    """Return the header that sends an API key."""
    return {"Authorization": f"Bearer {key}"}


def _enable_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
