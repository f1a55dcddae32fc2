"""One local Ray cluster for all tests below this folder; a split of generated plays."""

from collections.abc import Iterator

import pytest
from s3 import KEYS
from trainings import NUM_SONGS
from worlds import random_vectors, write_song_vectors

from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.jobs.runtime import ray_cluster
from rayrec.storage.workspace import Workspace


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A real local cluster with two CPUs, whose workers have the keys of a local S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        with ray_cluster(num_cpus=2):
            yield


@pytest.fixture(scope="module")
def split(world: Workspace) -> Split:
    """A split of the `world` of a test file, whose `NUM_SONGS` songs get random embeddings."""
    split = split_dataset(world, SplitConfig(test_days=15, validation_days=10))
    write_song_vectors(world, random_vectors(NUM_SONGS), {"dataset": split.dataset, "split": split.id})
    return split
