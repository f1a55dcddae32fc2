"""Marks that skip a test if Redis is not installed; a block in which answers of Redis get lost."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rayrec.bench.redis_servers import CLI, SERVER

needs_redis = pytest.mark.skipif(SERVER is None, reason="no redis-server: install Debian's package redis-server")
needs_redis_cli = pytest.mark.skipif(
    SERVER is None or CLI is None, reason="no redis-cli: install Debian's package redis-tools"
)


@contextmanager
def lost_answers(monkeypatch: pytest.MonkeyPatch, most: float = math.inf) -> Iterator[None]:
    """Break the connection when Redis answers 1, at most `most` times: the script has run, but its answer is lost."""
    from redis.connection import Connection
    from redis.exceptions import ConnectionError as BrokenConnectionError

    read_response, lost_count = Connection.read_response, 0

    def read_and_lose(self: Any, *args: Any, **options: Any) -> Any:
        nonlocal lost_count
        answer = read_response(self, *args, **options)
        if answer == 1 and lost_count < most:
            lost_count += 1
            self.disconnect()
            raise BrokenConnectionError("the answer got lost")
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "read_response", read_and_lose)
        yield
