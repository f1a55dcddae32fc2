"""Redis servers on loopback for benchmarks and tests: one alone, or a cluster with a replica of each primary."""

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
START_SECONDS = 60.0  # that a server, or a cluster, may take: on a busy machine nodes are slow to agree
PRIMARIES = 3
NODE_TIMEOUT_MS = 1_000  # of silence, after which a primary of a cluster is replaced
PORTS = range(11_000, 18_000)  # of a cluster's nodes: they talk to each other on ports 10,000 higher


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A Redis server on a free port of this machine; its data outlives its process."""

    def __init__(self, folder: Path, *options: str, port: int | None = None) -> None:
        """`options` are further ones of redis-server."""
        self._folder, self._options, self.port = folder, options, port or free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """As stores are named."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, and wait until it answers. Every write is on the disk before it is acknowledged.

        Raises `RayrecError` where redis-server is not installed, or does not start.
        """
        if SERVER is None:
            raise RayrecError("redis-server was not found; install Redis 6 or later, or use SQLite")
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([SERVER, *options, *durable, *self._options], stdout=subprocess.DEVNULL)
        wait_until(self._answers, f"the Redis server at port {self.port} did not start")

    def empty(self) -> None:
        """Forget everything."""
        self.ask("FLUSHALL")

    def ask(self, *command: Any) -> Any:
        """What the server answers to a command."""
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        with redis.Redis("127.0.0.1", self.port, retry=Retry(NoBackoff(), 0), socket_timeout=10) as client:
            return client.execute_command(*command)

    def send(self, number: int) -> None:
        """Send a signal to the process."""
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """As kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        from redis.exceptions import RedisError

        try:
            return bool(self.ask("PING"))
        except RedisError:
            return False


class RedisCluster:
    """Three primaries and a replica of each; `nodes` begins with those that were primaries first."""

    def __init__(self, nodes: list[RedisServer]) -> None:
        """`nodes` run and are a cluster."""
        self.nodes = nodes

    @property
    def uri(self) -> str:
        """That of any node."""
        return self.nodes[0].uri

    def primaries(self) -> list[RedisServer]:
        """Those that run and are primaries now."""
        return [node for node in self.nodes if node.process is not None and node.ask("ROLE")[0] == b"master"]

    def fail_over(self, primary: RedisServer) -> None:
        """Kill a primary, and return when its replica has taken over; it is down until it is started again."""
        wait_until(lambda: primary.ask("ROLE")[2], f"the primary at port {primary.port} has no replica")
        primary.kill()
        wait_until(lambda: len(self.primaries()) == PRIMARIES, "no replica took over")


@contextmanager
def redis_cluster(folder: Path) -> Iterator[RedisCluster]:
    """A cluster until the block ends. Raises `RayrecError` where redis-server or redis-cli is not installed."""
    if CLI is None:
        raise RayrecError("redis-cli was not found; install Redis 6 or later")
    options = ["--cluster-enabled", "yes", "--cluster-node-timeout", str(NODE_TIMEOUT_MS)]
    options += ["--cluster-require-full-coverage", "no"]  # users of the other nodes are served during a failover
    nodes: list[RedisServer] = []
    try:
        for port in _free_ports(2 * PRIMARIES):
            place = folder / str(port)
            place.mkdir(parents=True)
            nodes.append(RedisServer(place, *options, port=port))
            nodes[-1].start()
        places = [f"127.0.0.1:{node.port}" for node in nodes]
        redis_cli("--cluster", "create", *places, "--cluster-replicas", "1", "--cluster-yes")
        wait_until(lambda: all(node.ask("CLUSTER INFO")["cluster_state"] == "ok" for node in nodes), "no cluster")
        wait_until(lambda: all(node.ask("ROLE")[2] for node in nodes[:PRIMARIES]), "a primary has no replica")
        yield RedisCluster(nodes)
    finally:
        for node in nodes:
            node.kill()


def redis_cli(*arguments: str) -> str:
    """What redis-cli prints. Raises `RayrecError` where it fails."""
    done = subprocess.run([str(CLI), *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise RayrecError(f"redis-cli {' '.join(arguments)} failed: {done.stdout + done.stderr}")
    return done.stdout


def wait_until(condition: Callable[[], Any], message: str) -> None:
    """Wait until a condition holds. Raises `RayrecError` with the message after `START_SECONDS`."""
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RayrecError(message)
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, socket.socket() as bus:
            try:
                probe.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            break
    return ports
