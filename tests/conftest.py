"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from rayrec.storage.object_storage import CACHE_VARIABLE
from rayrec.storage.workspace import Workspace

settings.register_profile("here", deadline=None)  # an example takes longer while other programs keep the CPUs busy
settings.load_profile("here")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a new local cache for each test run, also in the processes that tests start."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with the data set of `served.write_world` and a live release."""
    from served import write_release, write_world

    workspace = Workspace(tmp_path_factory.mktemp("world") / "workspace")
    write_world(workspace)
    write_release(workspace)
    return workspace


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real plays; skips the test if RAYREC_REAL_DATA is not set."""
    folder = os.environ.get("RAYREC_REAL_DATA")
    if not folder:
        pytest.skip("no real plays: set RAYREC_REAL_DATA to their folder")
    return Path(folder)
