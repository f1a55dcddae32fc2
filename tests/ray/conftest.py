"""One local Ray cluster for all tests below this folder."""

from collections.abc import Iterator

import pytest

from rayrec.jobs.runtime import ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real local cluster with two CPUs."""
    with ray_cluster(num_cpus=2):
        yield
