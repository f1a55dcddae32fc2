"""A small generated data set with song embeddings, settings of a training that takes seconds, and its weights."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_safetensors
from worlds import random_vectors, write_song_vectors

from rayrec.data.split import Split, SplitConfig, list_splits, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

NUM_SONGS = 80
CONFIG = TrainConfig(
    hidden_dim=8,
    window=20,
    batch=16,
    negatives=20,
    long=(2, 5),
    epochs=2,
    learning_rate=0.01,
    dropout=0.0,  # dropout masks depend on the number of workers
    validation_plays=200,
    checkpoint_minutes=0.0,
    workers=1,
)


def make_world(folder: Path) -> tuple[Workspace, Split]:
    """Generate the data set in a new workspace; needs a cluster."""
    from rayrec.jobs.generate import generate

    workspace = Workspace(folder)
    generate(workspace, GenerateConfig(users=150, songs=NUM_SONGS, artists=12, genres=4, plays=25, days=60, buckets=3))
    split = split_dataset(workspace, SplitConfig(test_days=15, validation_days=10))
    write_song_vectors(workspace, random_vectors(NUM_SONGS), {"dataset": split.dataset, "split": split.id})
    return workspace, split


def only_split(workspace: Workspace) -> Split:
    """Return the split that `make_world` made, for use in another process."""
    (split,) = list_splits(workspace)
    return split


def weights(workspace: Workspace, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return all weights of a model by name, and its song vectors as `songs`."""
    result = load_safetensors(workspace.read_bytes(manifest.path("model.safetensors")))
    return {**result, "songs": np.array(workspace.read_array(manifest.path("song_vectors.npy")))}
