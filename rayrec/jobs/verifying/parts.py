"""The audit of artifacts: what is in their files, and that they fit what they were made of."""

import posixpath
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS, DESCRIPTIONS_FILE
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.jobs.verifying.audit import Audit
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.dataset_manifest import DatasetManifest

ROWS = 5_000  # of tastes or vectors looked at at once
TOLERANCE = 1e-3  # of the length of a normalized vector
MODEL_VECTORS = "song_vectors.npy"
KINDS = (DESCRIPTIONS, "songs", "models", "tastes", "indexes", "reports", "releases")


def check_artifacts(audit: Audit, dataset: Dataset | None) -> None:
    """Every artifact of every kind: its files, its inputs and its content."""
    content: dict[str, Callable[[Audit, Manifest, Dataset | None], None]] = {
        DESCRIPTIONS: _check_descriptions,
        "songs": _check_songs,
        "models": _check_model,
        "tastes": _check_tastes,
        "indexes": _check_index,
        "releases": _check_release,
    }
    for kind in KINDS:
        for name in audit.workspace.folders(kind):
            path = f"{kind}/{name}/manifest.json"
            if not audit.workspace.exists(path):
                audit.note(f"{kind}/{name}", "is unfinished; run its command again, or delete it")
                continue
            audit.covered.add(path)
            with audit.reading(path):
                manifest = artifacts.load(audit.workspace, kind, name)
                with audit.looking_at(kind, name, len(manifest.files)):
                    audit.require((manifest.kind, manifest.id) == (kind, name), path, f"is of {manifest.id}")
                    audit.compare({manifest.path(file): digest for file, digest in manifest.files.items()})
                    _check_inputs(audit, manifest, dataset)
                    damaged = any(manifest.path(file) in audit.damaged for file in manifest.files)
                    if kind in content and not damaged:
                        with audit.reading(manifest.folder):
                            content[kind](audit, manifest, dataset)


def _check_inputs(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    for role, made_of in manifest.inputs.items():
        if role == "dataset" and not (dataset and dataset.descends_from(made_of)):
            audit.note(manifest.folder, f"was made of data set {made_of}, which no longer exists")
        if role in KINDS and not audit.workspace.exists(f"{role}/{made_of}/manifest.json"):
            audit.note(manifest.folder, f"was made of {role} {made_of}, which no longer exists")


def _known(dataset: Dataset | None, manifest: Manifest) -> DatasetManifest | None:
    """The data set that an artifact was made of, where it is known."""
    made_of = manifest.inputs.get("dataset", "")
    return dataset.earlier(made_of) if dataset and dataset.descends_from(made_of) else None


def _check_vectors(audit: Audit, path: str, vectors: np.ndarray, songs: int | None) -> None:
    """float32 (N, D): one row a song, finite, of length 1 or zeros."""
    fits = vectors.ndim == 2 and vectors.dtype == np.float32
    audit.require(fits, path, f"is {vectors.dtype} {vectors.shape}, not float32 (N, D)")
    audit.require(songs is None or len(vectors) == songs, path, f"has {len(vectors)} rows for {songs} songs")
    for start in range(0, len(vectors), ROWS):
        if not _are_normalized(vectors[start : start + ROWS]):
            audit.problem(path, f"a row from {start} on is neither finite and of length 1 nor zeros")
            return


def _are_normalized(vectors: np.ndarray) -> bool:
    lengths = np.linalg.norm(vectors, axis=1)
    return bool(((np.abs(lengths - 1) < TOLERANCE) | (lengths == 0)).all())  # false for NaN, too


def _check_descriptions(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    path = manifest.path(DESCRIPTIONS_FILE)
    table = audit.workspace.read_table(path, columns=columns.DESCRIPTIONS.names)
    twice = len(table) - pc.count_distinct(table.column(columns.SONG_ID)).as_py()
    audit.require(not twice, path, "a song is described twice")


def _check_songs(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    known = _known(dataset, manifest)
    for file in manifest.files:
        if file.endswith(".npy"):
            vectors = audit.workspace.read_array(manifest.path(file))
            _check_vectors(audit, manifest.path(file), vectors, known.songs if known else None)


def _check_model(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    from safetensors.numpy import load_file

    known = _known(dataset, manifest)
    path = manifest.path(MODEL_VECTORS)
    _check_vectors(audit, path, audit.workspace.read_array(path), known.songs if known else None)
    for file in manifest.files:
        if file.endswith(".safetensors"):
            with audit.workspace.local_copy(manifest.path(file)) as local:
                for name, values in load_file(local).items():
                    finite = values.dtype.kind != "f" or bool(np.isfinite(values).all())
                    audit.require(finite, manifest.path(file), f"{name} holds a number that is not finite")


def _check_tastes(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    """Every user once, in the right bucket; vectors normalized, states finite; as many plays as the histories hold."""
    known = _known(dataset, manifest)
    users = plays = 0
    for file in manifest.files:
        path = manifest.path(file)
        bucket = int(posixpath.dirname(file).rpartition("=")[2])
        audit.bar.advance(note=path[-60:])
        seen: list[np.ndarray] = [np.zeros(0, dtype=object)]
        for table in _batches(audit, path):
            seen.append(table.column(columns.USER).to_numpy())
            plays += int(table.column("plays").to_numpy().sum())
            _check_taste_rows(audit, path, table)
        ids = np.concatenate(seen)
        users += len(ids)
        audit.require(len(set(ids)) == len(ids), path, "a user occurs twice")
        if known and dataset:
            astray = len(ids) > 0 and bool((bucket_of(ids, known.buckets) != bucket).any())
            audit.require(not astray, path, "a user belongs to another bucket")
            expected = set(dataset.bucket_users(bucket, parts=known.parts))
            missing, strange = len(expected.difference(ids)), len(set(ids) - expected)
            audit.require(not (missing or strange), path, f"lacks {missing} users and has {strange} without plays")
    if known:
        audit.require(
            (users, plays) == (known.users, known.plays),
            manifest.folder,
            f"holds {users} users with {plays} plays, the data set {known.users} with {known.plays}",
        )


def _batches(audit: Audit, path: str) -> Iterator[pa.Table]:
    with audit.workspace.open_input(path) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(ROWS):
            yield pa.Table.from_batches([batch])


def _check_taste_rows(audit: Audit, path: str, table: pa.Table) -> None:
    for name in table.column_names:
        if table.num_rows and (name.startswith("taste_") or name == "state"):
            values = table.column(name).combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)
            if name == "state":
                audit.require(bool(np.isfinite(values).all()), path, "a state holds a number that is not finite")
            else:
                audit.require(_are_normalized(values), path, f"{name} holds a row that is not of length 1")


def _check_index(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    from rayrec.recommend.index import INDEX_FILE, SongIndex

    path = manifest.path(INDEX_FILE)
    vectors_path = f"models/{manifest.inputs['models']}/{MODEL_VECTORS}"
    if not audit.workspace.exists(vectors_path) or vectors_path in audit.damaged:
        audit.note(path, f"cannot be compared: {vectors_path} is missing or damaged")
        return
    vectors = audit.workspace.read_array(vectors_path)
    index = SongIndex.load(audit.workspace, manifest, vectors)
    count = 0
    for songs, stored in index.stored():
        count += len(songs)
        precision = float(np.finfo(stored.dtype).eps)
        known = bool(((songs >= 0) & (songs < len(vectors))).all())
        if not known or not np.allclose(vectors[songs], stored, rtol=precision, atol=1e-7):
            audit.problem(path, f"differs from {vectors_path}")
            return
    expected = int(np.count_nonzero(vectors.any(axis=1)))
    audit.require(count == expected, path, f"holds {count} songs, {vectors_path} has {expected} vectors")


def _check_release(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    if dataset is None or not dataset.descends_from(manifest.inputs["dataset"]):
        if releases.is_active(audit.workspace, manifest.id):
            audit.problem(manifest.folder, f"is live, and its data set {manifest.inputs['dataset']} is gone")
        return
    files = releases.files_of(audit.workspace, manifest)
    # Manifests of parts are no files of a manifest: here alone is their checksum.
    audit.covered -= {path for path in files if path.endswith("/manifest.json")}
    audit.compare(files)
    parts: dict[str, Any] = {}
    for kind in releases.PART_KINDS:
        part = f"{kind}/{manifest.inputs[kind]}"
        if not audit.workspace.exists(f"{part}/manifest.json"):
            audit.problem(manifest.folder, f"{part} is missing")
            continue
        parts[kind] = artifacts.load(audit.workspace, kind, manifest.inputs[kind])
    with audit.reading(manifest.folder):
        releases.require_fit(dataset.manifest, manifest.inputs, parts.values())
