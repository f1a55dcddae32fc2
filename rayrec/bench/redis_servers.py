"""Redis servers on loopback for benchmarks and tests: a single server, or a cluster with one replica per primary."""

import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayrec.errors import RayrecError

SERVER, CLI = shutil.which("redis-server"), shutil.which("redis-cli")
START_SECONDS = 60.0  # limit of a wait for a server or a cluster: on a busy machine nodes are slow to agree
PRIMARIES = 3
NODE_TIMEOUT_MS = 1_000  # silence of a primary after which its replica replaces it
PORTS = range(11_000, 18_000)  # of a cluster's nodes, which talk to each other on the ports 10,000 higher


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A Redis server on this machine. Its data stay on disk when its process ends."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        """Keep the data in `folder`; `options` are more options of redis-server. Without `port`, choose a free one."""
        self._folder, self._options, self.port = folder, options, port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The address of the server, as a store URI."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server and wait until it answers. It writes every change to disk before it acknowledges it.

        Raises `RayrecError` if redis-server is not installed or does not start.
        """
        if SERVER is None:
            raise RayrecError("redis-server was not found; install Redis 6 or later, or use SQLite")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        durability_options = ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(
            [SERVER, *options, *durability_options, *self._options], stdout=subprocess.DEVNULL
        )
        wait_until(self._is_ready, f"the Redis server on port {self.port} did not start")

    def empty(self) -> None:
        """Delete all data."""
        self.ask("FLUSHALL")

    def ask(self, *command: Any) -> Any:
        """Send a command to the server and return its answer."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with redis.Redis("127.0.0.1", self.port, retry=Retry(NoBackoff(), 0), socket_timeout=10) as client:
            return client.execute_command(*command)

    def send(self, signal_number: int) -> None:
        """Send the signal `signal_number` to the process."""
        if self.process is not None:
            self.process.send_signal(signal_number)

    def kill(self) -> None:
        """Kill the process with SIGKILL and wait until it has ended."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _is_ready(self) -> bool:
        from redis.exceptions import RedisError

        try:
            return bool(self.ask("PING"))
        except RedisError:
            return False


class RedisCluster:
    """Three primaries with one replica each; `nodes` begins with the initial primaries."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        """`nodes` are running servers that form a cluster."""
        self.nodes = nodes

    @property
    def uri(self) -> str:
        """The store URI of the cluster: the address of its first node; any other node would do."""
        return self.nodes[0].uri

    def primaries(self) -> list[RedisServer]:
        """Return the running nodes that are primaries now."""
        return [node for node in self.nodes if node.process is not None and node.ask("ROLE")[0] == b"master"]

    def fail_over(self, primary: RedisServer) -> None:
        """Kill `primary` and wait until its replica has taken over. `primary` stays down until it is started again."""
        wait_until(lambda: primary.ask("ROLE")[2], f"the primary on port {primary.port} has no replica")
        primary.kill()
        wait_until(
            lambda: len(self.primaries()) == PRIMARIES, f"no replica took over from the primary on port {primary.port}"
        )


@contextmanager
def redis_cluster(folder: Path) -> Iterator[RedisCluster]:
    """Run a cluster until the block ends. Raises `RayrecError` if redis-server or redis-cli is not installed."""
    if CLI is None:
        raise RayrecError("redis-cli was not found; install Redis 6 or later")
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
    options += ["--cluster-require-full-coverage", "no"]  # during a failover, the other nodes still serve their users
    nodes: list[RedisServer] = []
    try:
        for port in _free_ports(2 * PRIMARIES):
            node_folder = folder / str(port)
            node_folder.mkdir(parents=True)
            nodes.append(RedisServer(node_folder, *options, port=port))
            nodes[-1].start()
        addresses = [f"127.0.0.1:{node.port}" for node in nodes]
        redis_cli("--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes")
        wait_until(
            lambda: all(node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in nodes),
            "the Redis Cluster did not become ready",
        )
        wait_until(
            lambda: all(node.ask("ROLE")[2] for node in nodes[:PRIMARIES]),
            "a primary of the Redis Cluster has no replica yet",
        )
        yield RedisCluster(nodes)
    finally:
        for node in nodes:
            node.kill()


def redis_cli(*arguments: str) -> str:
    """Run redis-cli and return its output. Raises `RayrecError` if it fails."""
    completed = subprocess.run([str(CLI), *arguments], capture_output=True, text=True, timeout=120, check=False)
    if completed.returncode != 0:
        raise RayrecError(f"redis-cli {' '.join(arguments)} failed: {completed.stdout + completed.stderr}")
    return completed.stdout


def wait_until(condition: Callable[[], Any], message: str) -> None:
    """Wait until `condition()` is true. Raises `RayrecError` with `message` after `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RayrecError(message)
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, socket.socket() as bus_probe:
            try:
                probe.bind(("127.0.0.1", port))
                bus_probe.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports
