"""Failures of tests that hold which private parts of other packages rayrec uses."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest


@contextmanager
def explain_failure(package: str, behavior: str, file: str = "rayrec/compat.py") -> Iterator[None]:
    """If the block fails, raise an error that says what changed, and which file of rayrec to mend."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{package} {version(package)} {behavior} differently: read {file} and mend it") from error
