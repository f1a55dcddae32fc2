"""Fixture: stages that run without Ray."""

import pytest
from without_ray import without_ray


@pytest.fixture
def run_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all stages run in this process; trainings only with `workers=0`."""
    without_ray(monkeypatch)
