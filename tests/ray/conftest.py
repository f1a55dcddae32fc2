"""One local Ray cluster for all tests below this folder."""

from collections.abc import Iterator

import pytest
from s3 import KEYS

from rayrec.jobs.runtime import ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real local cluster with two CPUs, whose workers have the keys of a local S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with ray_cluster(num_cpus=2):
            yield
