"""Fixture: a client of a replica."""

from collections.abc import Iterator

import pytest
from served import Client, service

from rayrec.storage.workspace import Workspace


@pytest.fixture(scope="module")
def app(world: Workspace) -> Iterator[Client]:
    """A client of a replica that answers from `world`, which a test file may replace."""
    with service(world) as replica:
        yield Client(replica)
