"""A release to measure the application with: songs at random, and a network that learned nothing.

As fast as a real one: neither the songs' places nor the weights' values change the work. It has no memory.
"""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch

from rayrec.bench.index_bench import song_vectors
from rayrec.data import columns
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.data.histories import Histories
from rayrec.model.checkpoint import save_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.model.taste_table import taste_table, tastes_file
from rayrec.model.train_config import FeatureSpec, Horizon, ModelConfig, TrainConfig
from rayrec.recommend.index import INDEX_FILE, IndexConfig, SongIndex
from rayrec.storage import releases
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.dataset_manifest import DatasetManifest, write_manifest
from rayrec.storage.workspace import SONGS_TABLE, Workspace, histories_file

DIM = 64
PLAYED_AT = 1_700_000_000_000  # ms UTC


def song_name(row: int) -> str:
    """The id of a song."""
    return f"song-{row}"


def write_bench_release(workspace: Workspace, songs: int, seed: int) -> None:
    """A live release over `songs` songs; nothing happens where the workspace holds one already."""
    if releases.active_release(workspace) is not None:
        return
    dataset = _write_dataset(workspace, songs)
    vectors = song_vectors(songs, DIM, seed)
    made_of = {"dataset": dataset.manifest.id}
    embedding = Manifest(kind="songs", id="bench", inputs=made_of)
    workspace.write_array(embedding.path("vectors.npy"), vectors)
    publish(workspace, embedding, ["vectors.npy"])
    model = _network(vectors, seed)
    network = Manifest(kind="models", id="bench", inputs={**made_of, "songs": embedding.id}, seed=seed)
    publish(workspace, network, save_model(workspace, network.folder, model, np.ones(songs, dtype=np.bool_)))
    _write_tastes(workspace, dataset, network, model)
    index = SongIndex.build(np.asarray(workspace.read_array(network.path("song_vectors.npy"))), IndexConfig(seed=seed))
    manifest = Manifest(kind="indexes", id="bench", inputs={"models": network.id}, metrics=asdict(index.figures))
    index.save(workspace, manifest.path(INDEX_FILE))
    publish(workspace, manifest, [INDEX_FILE])
    releases.create_release(workspace)


def _write_dataset(workspace: Workspace, songs: int) -> Dataset:
    histories = Histories.from_lists([[0, 1]], [[PLAYED_AT, PLAYED_AT + 60_000]])
    workspace.write_table(histories_file(0, int(bucket_of(histories.user_ids, 1)[0])), histories.to_arrow())
    table = {
        columns.SONG: pa.array(range(songs), pa.int32()),
        columns.SONG_ID: [song_name(row) for row in range(songs)],
        columns.TITLE: [f"Title {row}" for row in range(songs)],
        columns.ARTIST: [f"Artist {row // 8}" for row in range(songs)],
    }
    workspace.write_table(SONGS_TABLE, pa.table(table, schema=columns.SONGS_TABLE))
    manifest = DatasetManifest(
        id="bench", source="bench", buckets=1, parts=1, users=1, plays=2, songs=songs, first_play=PLAYED_AT,
        last_play=PLAYED_AT + 60_000,
    )  # fmt: skip
    write_manifest(workspace, manifest)
    return Dataset(workspace)


def _network(vectors: np.ndarray, seed: int) -> TasteModel:
    torch.manual_seed(seed)
    shape = TrainConfig()
    config = ModelConfig(
        num_songs=len(vectors),
        embedding_dim=DIM,
        hidden_dim=shape.hidden_dim,
        num_layers=shape.num_layers,
        cell=shape.cell,
        dropout=0.0,
        features=FeatureSpec(),
        horizons={"short": Horizon(min_offset=1, max_offset=1), "long": Horizon(min_offset=25, max_offset=50)},
        song_table="frozen",
    )
    return TasteModel(config, torch.from_numpy(vectors)).eval()


def _write_tastes(workspace: Workspace, dataset: Dataset, network: Manifest, model: TasteModel) -> None:
    tastes = Manifest(kind="tastes", id="bench", inputs={"dataset": dataset.manifest.id, "models": network.id})
    for batch in dataset.read_bucket(0):
        table = taste_table(TasteEncoder(model), batch, dataset.manifest.last_play)
        workspace.write_table(tastes_file(tastes.folder, 0), table)
    publish(workspace, tastes, [path.removeprefix(tastes.folder + "/") for path in workspace.files(tastes.folder)])
