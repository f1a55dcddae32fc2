"""Fixtures: stores of user states in SQLite and in a real Redis server; commands without Ray; a browser."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium
from stores import needs_redis

from rayrec.bench.redis_servers import RedisServer


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis server for all tests of a module."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=needs_redis)])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty store of user states, in SQLite and in Redis."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/states.sqlite"
    server: RedisServer = request.getfixturevalue("redis")
    server.empty()
    return server.uri


@pytest.fixture(scope="module")
def commands_without_ray() -> Iterator[None]:
    """Make the stages of commands run in this process, not on Ray."""
    from typer.main import get_command
    from without_ray import without_ray

    from rayrec_cli.app import app

    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        patch.setattr("rayrec_cli.main.app", get_command(app))  # Typer would build all commands at each call
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser without a window; skips the test if Playwright or Chromium is missing."""
    with chromium() as chromium_browser:
        yield chromium_browser
