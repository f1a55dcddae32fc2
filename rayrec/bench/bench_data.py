"""What the benchmarks of the stages run on: generated plays, an untrained network, a plain process beside Ray."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import ray

from rayrec.bench.loops import TrainTask
from rayrec.bench.rounds import PlainProcess, niceness
from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.jobs.generate import generate
from rayrec.jobs.train_plan import model_config
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import TrainConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest, fingerprint
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

EMBEDDING_DIM = 64
SONGS_PER_ARTIST = 8
SONGS_WITH_ARTISTS = 10_000  # larger catalogs have no more artists than one of so many


@contextmanager
def bench_place(workspace: Workspace | None) -> Iterator[Workspace]:
    """Where generated data go."""
    if workspace is not None:
        yield Workspace(f"{workspace.uri}/bench")
        return
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        yield Workspace(folder)


def bench_dataset(place: Workspace, *, users: int, songs: int, plays: float, seed: int, **others: int) -> Dataset:
    """Generated plays of a size, made now or by an earlier run; `plays` is their mean per user."""
    artists = max(GenerateConfig().genres, min(songs, SONGS_WITH_ARTISTS) // SONGS_PER_ARTIST)
    world = GenerateConfig(users=users, songs=songs, plays=plays, seed=seed, playlists=0, artists=artists, **others)
    workspace = Workspace(f"{place.uri}/{fingerprint('bench', to_mapping(world), {})}")
    if not workspace.exists(DATASET_MANIFEST):
        generate(workspace, world)
    return Dataset(workspace)


def train_task(dataset: Dataset, seed: int) -> TrainTask:
    settings = TrainConfig(seed=seed)
    counts = np.zeros(dataset.num_songs, dtype=np.int64)
    for histories in dataset.read_bucket(0):
        counts += np.bincount(histories.songs, minlength=dataset.num_songs)
    shape = model_config(dataset, settings, EMBEDDING_DIM)
    return TrainTask(workspace=dataset.workspace, config=settings, model=shape, counts=counts)


def untrained_model(dataset: Dataset, seed: int) -> Manifest:
    """A model of the default shape with random weights: as fast as a trained one."""
    manifest = Manifest(kind="models", id="bench", inputs={"dataset": dataset.manifest.id}, seed=seed)
    model = train_task(dataset, seed).training().model
    names = save_model(dataset.workspace, manifest.folder, model, np.ones(dataset.num_songs, dtype=np.bool_))
    return artifacts.publish(dataset.workspace, manifest, names)


def plain_process() -> PlainProcess:
    """A process as nice as the cluster's workers are."""
    return PlainProcess(int(ray.get(ray.remote(niceness).remote())))
