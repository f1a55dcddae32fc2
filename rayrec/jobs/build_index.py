"""The index stage: faiss over the vectors that a model scores against, in one task on one node."""

import time
from collections.abc import Iterator
from dataclasses import asdict, replace

from rayrec.config import to_mapping
from rayrec.jobs.runtime import node_cpus, ray_cluster, run_on_node
from rayrec.progress import progress
from rayrec.recommend.index import INDEX_FILE, IndexConfig, IndexFigures, SongIndex, import_faiss
from rayrec.storage.artifacts import Manifest, fingerprint, load, new_id, newest, publish, reuse
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

MODEL_VECTORS = "song_vectors.npy"  # float32 (N, D) in a model's folder


@writes("index")
def build_index(
    workspace: Workspace, config: IndexConfig, *, model_id: str | None = None, repeat: bool = False
) -> Manifest:
    """Index the songs of a model, the newest unless named.

    Metrics: seconds of the whole job, and the fields of `IndexFigures`.
    Raises `NotFoundError` where there is no such model, `MissingDependencyError` without faiss.
    """
    model = load(workspace, "models", model_id) if model_id else newest(workspace, "models", "train")
    import_faiss()
    inputs = {"models": model.id}
    stage_id = fingerprint("index", to_mapping(config), inputs)
    index_id, complete = new_id(workspace, "indexes", stage_id, repeat=repeat)
    if complete:
        return reuse(workspace, "indexes", index_id)
    manifest = Manifest(kind="indexes", id=index_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.perf_counter()
    with ray_cluster(), progress("index"):
        cpus = node_cpus()
        arguments = (workspace, config, model.path(MODEL_VECTORS), manifest.path(INDEX_FILE), cpus)
        (figures,) = run_on_node(build_and_save, *arguments, cpus=cpus)
    metrics = {**asdict(figures), "seconds": time.perf_counter() - started}
    return publish(workspace, replace(manifest, metrics=metrics), [INDEX_FILE])


def build_and_save(
    workspace: Workspace, config: IndexConfig, vectors: str, path: str, threads: int
) -> Iterator[IndexFigures]:
    """Build the index of the vectors at one path and write it to another; yields its figures."""
    index = SongIndex.build(workspace.read_array(vectors), config, threads=threads)
    index.save(workspace, path)
    yield index.figures
