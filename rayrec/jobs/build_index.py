"""The index stage: builds a faiss index of the song embeddings of a model, in one task on one node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Queries
from rayrec.display import progress
from rayrec.jobs.runtime import node_cpus, ray_cluster, run_on_node
from rayrec.model.train_config import SONG_VECTORS
from rayrec.recommend.index import INDEX_FILE, IndexConfig, IndexMetrics, SongIndex, require_one_faiss
from rayrec.storage.artifacts import Manifest, fingerprint, load_manifest, new_id, newest, publish, reuse
from rayrec.storage.locking import writes
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace

if TYPE_CHECKING:
    from rayrec.recommend.taste_recommender import TasteRecommender

USERS_AT_ONCE = 250


@writes("index")
def build_index(
    workspace: Workspace, config: IndexConfig, *, model_id: str | None = None, repeat: bool = False
) -> Manifest:
    """Build the index of the songs of a model, by default the model requested last.

    Metrics: seconds of the whole job, and the fields of `IndexMetrics`.
    Raises `NotFoundError` if the model does not exist, `MissingDependencyError` without faiss.
    """
    model = load_manifest(workspace, "models", model_id) if model_id is not None else newest(workspace, "models")
    require_one_faiss()
    inputs = {"models": model.id}
    fingerprint_id = fingerprint("index", to_mapping(config), inputs)
    index_id, complete = new_id(workspace, "indexes", fingerprint_id, repeat=repeat)
    if complete:
        return reuse(workspace, "indexes", index_id)
    manifest = Manifest(kind="indexes", id=index_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.perf_counter()
    with ray_cluster(), progress("index"):
        cpus = node_cpus()
        arguments = (workspace, config, model, manifest.path(INDEX_FILE), cpus)
        (index_metrics,) = run_on_node(build_and_save, *arguments, cpus=cpus)
    metrics = {**asdict(index_metrics), "seconds": time.perf_counter() - started}
    return publish(workspace, replace(manifest, metrics=metrics), [INDEX_FILE])


def build_and_save(
    workspace: Workspace, config: IndexConfig, model: Manifest, path: str, threads: int
) -> Iterator[IndexMetrics]:
    """Build the index of a model's vectors and write it to `path`; yield its figures."""
    vectors = workspace.read_array(model.path(SONG_VECTORS))
    queries = taste_queries(workspace, model, config.queries) if config.kind_for(len(vectors)) == "ivf" else None
    index = SongIndex.build(vectors, config, queries=queries, threads=threads)
    index.save(workspace, path)
    yield index.figures


def index_network(dataset: Dataset, network: TasteRecommender, config: IndexConfig, *, threads: int = 1) -> SongIndex:
    """Build an index of the songs of a network; nprobe is chosen on taste vectors of the data set's users."""
    is_ivf = config.kind_for(network.num_songs) == "ivf"
    queries = sampled_tastes(dataset, network, config.queries) if is_ivf else None
    return SongIndex.build(network.song_vectors, config, queries=queries, threads=threads)


def taste_queries(workspace: Workspace, model: Manifest, count: int) -> np.ndarray | None:
    """Return the `sampled_tastes` of a model; None if the model's data set no longer exists in the workspace."""
    from rayrec.recommend.taste_recommender import TasteRecommender  # imports torch, so only when needed

    if not workspace.exists(DATASET_MANIFEST):
        return None
    dataset = Dataset(workspace)
    if not dataset.descends_from(model.inputs.get("dataset", "")):
        return None
    return sampled_tastes(dataset, TasteRecommender.load(workspace, model.id), count)


def sampled_tastes(dataset: Dataset, network: TasteRecommender, count: int) -> np.ndarray | None:
    """Return float32 (at most `count`, D): taste vectors of users for both horizons; None without users.

    nprobe is chosen on taste vectors, because they are distributed differently from song embeddings.
    """
    from rayrec.recommend.two_step import HORIZONS

    vectors, remaining_users = [], -(-count // len(HORIZONS))
    for bucket in range(dataset.manifest.buckets):
        for histories in dataset.read_bucket(bucket, min(remaining_users, USERS_AT_ONCE)):
            ends = Queries.at_end(histories, histories.played_at[histories.offsets[1:] - 1])
            vectors.append(np.concatenate(list(network.vectors_of(histories, ends, HORIZONS).values())))
            remaining_users -= len(histories)
            if remaining_users <= 0:
                return np.concatenate(vectors)[:count]
    return np.concatenate(vectors) if vectors else None
