"""A real Redis server for the tests that want one, and what they skip for where there is none."""

import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

REDIS = shutil.which("redis-server")
needs_redis = pytest.mark.skipif(REDIS is None, reason="redis-server is not installed")


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """A Redis server on a free port of this machine; its data outlives its process."""

    def __init__(self, folder: Path, *options: str) -> None:
        """`options` are further ones of redis-server."""
        self._folder, self._options, self.port = folder, options, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """As stores are named."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start, and wait until it answers. Every write is on the disk before it is acknowledged."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder), "--save", ""]
        durable = ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen([str(REDIS), *options, *durable, *self._options], stdout=subprocess.DEVNULL)
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        client = redis.Redis("127.0.0.1", self.port, retry=Retry(NoBackoff(), 0))
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline, "the Redis server did not start"
                time.sleep(0.05)
        client.close()

    def empty(self) -> None:
        """Forget everything."""
        import redis

        with redis.Redis("127.0.0.1", self.port) as client:
            client.flushall()

    def kill(self) -> None:
        """As kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
