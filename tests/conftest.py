"""Fixtures for all tests."""

import os
from pathlib import Path

import pytest

from rayrec.storage.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace."""
    return Workspace(tmp_path / "workspace")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real plays; tests that want it skip where RAYREC_REAL_DATA is unset."""
    folder = os.environ.get("RAYREC_REAL_DATA")
    if not folder:
        pytest.skip("RAYREC_REAL_DATA is unset: it names the folder of real plays")
    return Path(folder)
