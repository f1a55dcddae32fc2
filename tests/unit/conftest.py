"""The two stores of user states: an SQLite file and a real Redis server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from stores import needs_redis

from rayrec.bench.redis_servers import RedisServer


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for the tests of a module."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/states.sqlite"
    server: RedisServer = request.getfixturevalue("redis")
    server.empty()
    return server.uri
