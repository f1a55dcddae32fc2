"""The embed stage: song embeddings by word2vec in one task on one node, or from a file.

The task requests one CPU per thread, by default all CPUs of the largest node. Ray then places it on a node that has
these CPUs free, and runs nothing else on them. `rayrec.embeddings.word2vec` says why one node is used, and what to do
if that takes too long.
"""

import time
from dataclasses import replace
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import FitRange, Split, fit_range, require_split_of
from rayrec.display import progress
from rayrec.embeddings import word2vec
from rayrec.embeddings.vectors import FINAL, SELECTION, SongVectors, check_health
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.importing.vector_files import file_id
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.runtime import node_cpus, ray_cluster, run_on_node
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace


@writes("embed")
def embed(workspace: Workspace, config: EmbedConfig, *, split: Split | None = None, repeat: bool = False) -> Manifest:
    """Compute the song embeddings of a data set: vectors.npy, and with a validation range selection_vectors.npy.

    vectors.npy is fitted on all plays that a final fit may see, selection_vectors.npy without the validation range.
    Embeddings from the file `config.vectors` are used for both. Metrics: seconds, the figures of `fit_vectors` or
    `import_vectors` and those of `check_health`.

    Raises `MismatchError` for a split of another data set, `InputError` for settings or files that
    do not fit the data.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    inputs = {"dataset": dataset.manifest.id}
    if split is not None:
        require_split_of(dataset, split)
        inputs["split"] = split.id
    if config.vectors is not None:
        inputs["vectors"] = file_id(config.vectors)
    # Compaction and described songs change the id of the data set, but not the plays.
    fingerprint_inputs = {**inputs, "dataset": dataset.manifest.plays_id}
    if config.vectors is not None:  # the file may have vectors of songs that were described since
        fingerprint_inputs["num_songs"] = str(dataset.num_songs)
    fingerprint_id = artifacts.fingerprint("embed", to_mapping(config), fingerprint_inputs)
    songs_id, complete = artifacts.new_id(workspace, "songs", fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, "songs", songs_id)
    manifest = Manifest(kind="songs", id=songs_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.perf_counter()
    fit_ranges = {FINAL: fit_range(split)}
    if split is not None and split.has_validation:
        fit_ranges[SELECTION] = split.selection
    if config.vectors is None:
        word2vec.choose_source(dataset, config)  # raises here, before a cluster is started
        fit_metrics = _fit_all(workspace, config, manifest, fit_ranges)
    else:
        paths = [manifest.path(name) for name in fit_ranges]
        fit_metrics = word2vec.import_vectors(workspace, config, fit_ranges[FINAL], paths)
    counts = fit_metrics.pop("counts")
    vectors = SongVectors(workspace.read_array(manifest.path(FINAL)))
    metrics = {**fit_metrics, **check_health(vectors, counts, dataset.catalog(), config.seed)}
    metrics["seconds"] = time.perf_counter() - started
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), fit_ranges)


def _fit_all(
    workspace: Workspace, config: EmbedConfig, manifest: Manifest, fit_ranges: dict[str, FitRange]
) -> dict[str, Any]:
    """Fit one range after another, with one progress bar over all epochs; return the figures of the final fit."""
    final_metrics: dict[str, Any] = {}
    with ray_cluster(), progress("Song embeddings, epochs", total=len(fit_ranges) * config.epochs) as bar:
        cpus = min(config.workers or node_cpus(), node_cpus())
        for name, allowed in fit_ranges.items():
            arguments = (workspace, config, allowed, config.workers or cpus, manifest.path(name))
            for fit_metrics in run_on_node(word2vec.fit_vectors, *arguments, cpus=cpus):
                if fit_metrics is None:
                    bar.advance()
                elif name == FINAL:
                    final_metrics = fit_metrics
    return final_metrics
