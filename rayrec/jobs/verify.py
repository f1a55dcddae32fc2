"""Checks a workspace in bounded memory: one file, or one bucket of users, at a time."""

import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS, DESCRIPTIONS_FILE
from rayrec.data.dataset import Dataset, bucket_of, read_pending_deletions
from rayrec.data.histories import Histories
from rayrec.data.split import list_splits
from rayrec.display import Progress, progress
from rayrec.errors import NotFoundError, RayrecError
from rayrec.importing.merging import FORGOTTEN_USER
from rayrec.jobs.forget import SCRATCH
from rayrec.model.train_config import SONG_VECTORS
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import (
    DatasetManifest,
    Manifest,
    dataset_checksums,
    read_songs,
    read_staged_manifests,
    sha256,
)
from rayrec.storage.workspace import (
    CURRENT_FILE,
    DATASET,
    DATASET_MANIFEST,
    FORGOTTEN,
    HISTORIES,
    IMPORT_STAGING,
    IMPRESSIONS,
    LOCK,
    LOCK_HOLDER,
    SONGS_TABLE,
    Workspace,
    split_file,
)

UNREADABLE = (RayrecError, OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError, RuntimeError)
ROWS = 5_000  # rows of taste vectors or embeddings that are checked at once
TOLERANCE = 1e-3  # by which the length of a normalized vector may differ from 1
STORED = (".npy", ".safetensors", ".parquet", ".faiss", ".arrow")  # types of files that need a checksum in a manifest


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A problem, or a note, about one path."""

    path: str  # path of a file or folder in the workspace
    text: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A data set, split or artifact that was checked."""

    kind: str  # dataset, splits or one of artifacts.KINDS
    id: str
    files: int  # number of files compared with their checksums
    problems: int  # number of problems


@dataclass(kw_only=True)
class Audit:
    """The findings so far. Problems make a workspace unsound, notes do not."""

    workspace: Workspace
    bar: Progress
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    checked: list[Checked] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)  # paths of manifests, and of files with a checksum in a manifest
    damaged: set[str] = field(default_factory=set)  # paths that are missing or differ from their checksum

    @property
    def is_sound(self) -> bool:
        """True if there are no problems."""
        return not self.problems

    def problem(self, path: str, text: str) -> None:
        """Add a problem of a file or folder."""
        self.problems.append(Finding(path=path, text=text))

    def note(self, path: str, text: str) -> None:
        """Add a note about a file or folder."""
        self.notes.append(Finding(path=path, text=text))

    def require(self, holds: bool, path: str, text: str) -> None:
        """Add a problem unless `holds`."""
        if not holds:
            self.problem(path, text)

    @contextmanager
    def reading(self, path: str) -> Iterator[None]:
        """Context manager that turns the errors of reading in its block into a problem of `path`."""
        try:
            yield
        except UNREADABLE as error:
            self.problem(path, f"cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}")

    def compare(self, files: dict[str, str]) -> int:
        """Compare `files`, path -> sha256, with their checksums; return the number of files."""
        for path, expected in files.items():
            if path in self.covered:
                continue
            self.covered.add(path)
            self.bar.advance(note=path[-60:])
            if not self.workspace.exists(path):
                self.damaged.add(path)
                self.problem(path, "is missing")
                continue
            with self.reading(path):
                if sha256(self.workspace, path) != expected:
                    self.damaged.add(path)
                    self.problem(path, "does not match its checksum")
        return len(files)

    @contextmanager
    def checking(self, kind: str, item: str, files: int) -> Iterator[None]:
        """Context manager for the checks of one item; adds the item to `checked`."""
        problems_before = len(self.problems)
        yield
        self.checked.append(Checked(kind=kind, id=item, files=files, problems=len(self.problems) - problems_before))

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "sound": self.is_sound,
            "problems": [asdict(finding) for finding in self.problems],
            "notes": [asdict(finding) for finding in self.notes],
            "checked": [asdict(item) for item in self.checked],
        }


def check_dataset(audit: Audit, dataset: Dataset, staged_manifests: Sequence[DatasetManifest]) -> None:
    """Check everything below dataset/; see `read_staged_manifests`."""
    manifest = dataset.manifest
    files = {f"{DATASET}/{path}": digest for path, digest in manifest.files.items()}
    with audit.reading(SONGS_TABLE):
        files = dataset_checksums(audit.workspace, manifest, staged_manifests)
    with audit.checking("dataset", manifest.id, len(files)):
        audit.compare(files)
        with audit.reading(SONGS_TABLE):
            _check_song_table(audit, dataset)
        totals = _Totals()
        for bucket in range(manifest.buckets):
            audit.bar.advance(note=f"bucket {bucket}")
            path = f"{HISTORIES}/part=*/bucket={bucket:05d}"
            with audit.reading(path):
                _check_bucket(audit, dataset, bucket, path, totals)
        totals.compare(audit, dataset)
        _check_playlists(audit, dataset)
        for ancestor in manifest.ancestors:
            with audit.reading(DATASET_MANIFEST):
                audit.require(
                    dataset.earlier(ancestor).id == ancestor,
                    DATASET_MANIFEST,
                    f"ancestor {ancestor} has another id in its manifest",
                )


def check_splits(audit: Audit, dataset: Dataset) -> None:
    """Check that all splits can be read and belong to a known data set."""
    for split in list_splits(audit.workspace):
        with audit.checking("splits", split.id, 0):
            if not dataset.descends_from(split.dataset):
                audit.note(split_file(split.id), f"belongs to data set {split.dataset}, which no longer exists")


def _check_song_table(audit: Audit, dataset: Dataset) -> None:
    table = read_songs(audit.workspace, dataset.manifest)
    rows, ids = table.column(columns.SONG).to_numpy(), table.column(columns.SONG_ID)
    audit.require(
        len(table) == dataset.num_songs,
        SONGS_TABLE,
        f"has {len(table)} songs, but the manifest says {dataset.num_songs}",
    )
    audit.require(bool((rows == np.arange(len(rows))).all()), SONGS_TABLE, "rows are not numbered 0, 1, 2 ...")
    audit.require(pc.count_distinct(ids).as_py() == len(table), SONGS_TABLE, "a song ID occurs twice")


class _Totals:
    """Totals over all buckets."""

    def __init__(self) -> None:
        self.users = self.plays = 0
        self.first_play, self.last_play = np.iinfo(np.int64).max, np.iinfo(np.int64).min

    def add(self, histories: Histories) -> None:
        self.users += len(histories)
        self.plays += histories.num_plays
        if histories.num_plays:
            self.first_play = min(self.first_play, int(histories.played_at.min()))
            self.last_play = max(self.last_play, int(histories.played_at.max()))

    def compare(self, audit: Audit, dataset: Dataset) -> None:
        manifest = dataset.manifest
        counts = {"users": self.users, "plays": self.plays}
        if self.plays and FORGOTTEN_USER not in manifest.rejected:
            counts |= {"first_play": self.first_play, "last_play": self.last_play}
        elif self.plays:  # erasing users keeps the range, so that artifacts made for its end stay valid
            is_within = manifest.first_play <= self.first_play and self.last_play <= manifest.last_play
            audit.require(is_within, DATASET_MANIFEST, "a play is outside the time range of the manifest")
        for name, value in counts.items():
            expected = getattr(manifest, name)
            audit.require(value == expected, DATASET_MANIFEST, f"{name} is {expected}, but {value} in the histories")
        if manifest.read and not manifest.playlists:
            accounted_rows = manifest.plays + manifest.likes + manifest.merged + sum(manifest.rejected.values())
            audit.require(
                manifest.read == accounted_rows,
                DATASET_MANIFEST,
                f"says {manifest.read} rows were read, but plays, likes, duplicates and rejected rows total "
                f"{accounted_rows}",
            )


def _check_bucket(audit: Audit, dataset: Dataset, bucket: int, path: str, totals: _Totals) -> None:
    checked_users: set[str] = set()  # of one bucket only, to bound the memory
    for histories in dataset.read_bucket(bucket):
        totals.add(histories)
        users = set(histories.user_ids.tolist())
        audit.require(len(users) == len(histories) and not users & checked_users, path, "a user occurs twice")
        checked_users |= users
        misplaced_ids = histories.user_ids[bucket_of(histories.user_ids, dataset.manifest.buckets) != bucket]
        if len(misplaced_ids):
            audit.problem(path, f"user {misplaced_ids[0]} belongs to another bucket")
        all_known = not histories.num_plays or bool(
            (histories.songs.min() >= 0) & (histories.songs.max() < dataset.num_songs)
        )
        audit.require(all_known, path, "a play has a song that is not in the song table")
        same_user = np.diff(histories.rows) == 0
        is_ordered = (np.diff(histories.played_at) >= 0) | ~same_user
        audit.require(bool(is_ordered.all()), path, "plays are not sorted by time")
        liked_songs = np.zeros(0, np.int32) if histories.likes is None else histories.likes.songs
        audit.require(
            bool(((liked_songs >= 0) & (liked_songs < dataset.num_songs)).all()),
            path,
            "a like has a song that is not in the song table",
        )


def _check_playlists(audit: Audit, dataset: Dataset) -> None:
    path = f"{DATASET}/playlists"
    with audit.reading(path):
        playlists = entries = 0
        for songs, offsets in dataset.read_playlists():
            playlists, entries = playlists + len(offsets) - 1, entries + len(songs)
            all_known = not len(songs) or bool((songs.min() >= 0) & (songs.max() < dataset.num_songs))
            audit.require(all_known, path, "a playlist contains a song that is not in the song table")
        expected = (dataset.manifest.playlists, dataset.manifest.playlist_entries)
        audit.require(
            (playlists, entries) == expected,
            path,
            f"has {playlists} playlists with {entries} songs, but the manifest says {expected[0]} with {expected[1]}",
        )


def check_artifacts(audit: Audit, dataset: Dataset | None) -> None:
    """Check every artifact of every kind: its files, its inputs and its content."""
    content_checks: dict[str, Callable[[Audit, Manifest, Dataset | None], None]] = {
        DESCRIPTIONS: _check_descriptions,
        "songs": _check_embeddings,
        "models": _check_model,
        "added_songs": _check_added_songs,
        "tastes": _check_tastes,
        "indexes": _check_index,
        artifacts.RECOMMENDATIONS: _check_recommendations,
        "releases": _check_release,
    }
    for kind in artifacts.KINDS:
        for artifact_id in audit.workspace.folders(kind):
            path = f"{kind}/{artifact_id}/manifest.json"
            if not audit.workspace.exists(path):
                audit.note(f"{kind}/{artifact_id}", "is unfinished; run its command again, or delete it")
                continue
            audit.covered.add(path)
            with audit.reading(path):
                manifest = artifacts.load_manifest(audit.workspace, kind, artifact_id)
                with audit.checking(kind, artifact_id, len(manifest.files)):
                    is_matching = (manifest.kind, manifest.id) == (kind, artifact_id)
                    audit.require(is_matching, path, f"is the manifest of {manifest.kind} {manifest.id}")
                    audit.compare({manifest.path(file): digest for file, digest in manifest.files.items()})
                    _check_inputs(audit, manifest, dataset)
                    is_damaged = any(manifest.path(file) in audit.damaged for file in manifest.files)
                    if kind in content_checks and not is_damaged:
                        with audit.reading(manifest.folder):
                            content_checks[kind](audit, manifest, dataset)


def _check_inputs(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    for role, input_id in manifest.inputs.items():
        if role == "dataset" and not (dataset and dataset.descends_from(input_id)):
            audit.note(manifest.folder, f"was made from data set {input_id}, which no longer exists")
        if role in artifacts.KINDS and not audit.workspace.exists(f"{role}/{input_id}/manifest.json"):
            audit.note(manifest.folder, f"was made from {role} {input_id}, which no longer exists")


def _source_manifest(dataset: Dataset | None, manifest: Manifest) -> DatasetManifest | None:
    """Return the manifest of the data set that an artifact was made from; None if it is unknown."""
    dataset_id = manifest.inputs.get("dataset", "")
    return dataset.earlier(dataset_id) if dataset and dataset.descends_from(dataset_id) else None


def _check_vectors(audit: Audit, path: str, vectors: np.ndarray, song_count: int | None) -> None:
    """Check that `vectors` are float32 (N, D) with one row per song, each finite and of length 1, or zeros."""
    is_valid = vectors.ndim == 2 and vectors.dtype == np.float32
    audit.require(is_valid, path, f"is {vectors.dtype} {vectors.shape}, not float32 (N, D)")
    audit.require(
        song_count is None or len(vectors) == song_count, path, f"has {len(vectors)} rows for {song_count} songs"
    )
    for start in range(0, len(vectors), ROWS):
        if not _are_normalized(vectors[start : start + ROWS]):
            last = min(start + ROWS, len(vectors)) - 1
            audit.problem(path, f"rows {start} to {last} contain a row that is neither of length 1 nor all zeros")
            return


def _are_normalized(vectors: np.ndarray) -> bool:
    lengths = np.linalg.norm(vectors, axis=1)
    return bool(((np.abs(lengths - 1) < TOLERANCE) | (lengths == 0)).all())  # false for NaN, too


def _check_descriptions(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    path = manifest.path(DESCRIPTIONS_FILE)
    table = audit.workspace.read_table(path, columns=[columns.SONG_ID])
    duplicates = len(table) - pc.count_distinct(table.column(columns.SONG_ID)).as_py()
    audit.require(not duplicates, path, "a song is described twice")


def _check_embeddings(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    source = _source_manifest(dataset, manifest)
    for file in manifest.files:
        if file.endswith(".npy"):
            vectors = audit.workspace.read_array(manifest.path(file))
            _check_vectors(audit, manifest.path(file), vectors, source.songs if source else None)


def _check_model(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    from safetensors.numpy import load_file

    source = _source_manifest(dataset, manifest)
    path = manifest.path(SONG_VECTORS)
    _check_vectors(audit, path, audit.workspace.read_array(path), source.songs if source else None)
    for file in manifest.files:
        if file.endswith(".safetensors"):
            for name, values in load_file(audit.workspace.local_file(manifest.path(file))).items():
                is_finite = values.dtype.kind != "f" or bool(np.isfinite(values).all())
                audit.require(is_finite, manifest.path(file), f"{name} contains NaN or infinity")


def _check_added_songs(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    from rayrec.model.added_songs import AVERAGED, INPUTS, OUTPUTS, ROWS

    source = _source_manifest(dataset, manifest)
    rows = audit.workspace.read_array(manifest.path(ROWS))
    is_within = not len(rows) or (rows[0] >= 0 and (source is None or rows[-1] < source.songs))
    audit.require(
        bool((np.diff(rows) > 0).all() and is_within),
        manifest.path(ROWS),
        "does not contain ascending row numbers of the song table",
    )
    for name in (OUTPUTS, AVERAGED, INPUTS):
        vectors = audit.workspace.read_array(manifest.path(name))
        is_valid = vectors.ndim == 2 and len(vectors) == len(rows) and bool(np.isfinite(vectors).all())
        audit.require(
            is_valid,
            manifest.path(name),
            f"has shape {vectors.shape}; expected a finite vector per song, {len(rows)} in all",
        )


def _check_tastes(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    """Check that each user occurs once, in the right bucket, with normalized vectors and a finite state.

    Users and plays must be those of the histories.
    """
    source = _source_manifest(dataset, manifest)
    users = plays = 0
    for file in manifest.files:
        path = manifest.path(file)
        bucket = int(posixpath.dirname(file).rpartition("=")[2])
        audit.bar.advance(note=path[-60:])
        id_chunks: list[np.ndarray] = [np.zeros(0, dtype=object)]
        for table in _batches(audit, path):
            id_chunks.append(table.column(columns.USER).to_numpy())
            plays += int(table.column("plays").to_numpy().sum())
            _check_taste_rows(audit, path, table)
        user_ids = np.concatenate(id_chunks)
        users += len(user_ids)
        audit.require(len(set(user_ids)) == len(user_ids), path, "a user occurs twice")
        if source and dataset:
            is_misplaced = len(user_ids) > 0 and bool((bucket_of(user_ids, source.buckets) != bucket).any())
            audit.require(not is_misplaced, path, "a user belongs to another bucket")
            # If later parts were joined with these, the histories hold later users too.
            is_separate = dataset.manifest.splits_at(source.parts)
            expected = set(dataset.bucket_users(bucket, parts=source.parts if is_separate else None))
            expected = expected if is_separate else expected & set(user_ids)
            missing_count, unexpected_count = len(expected.difference(user_ids)), len(set(user_ids) - expected)
            audit.require(
                not (missing_count or unexpected_count),
                path,
                f"{missing_count} users are missing, and {unexpected_count} users have no plays",
            )
    if source:
        audit.require(
            (users, plays) == (source.users, source.plays),
            manifest.folder,
            f"has {users} users with {plays} plays, but the data set has {source.users} with {source.plays}",
        )


def _check_recommendations(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    """Check that each user occurs once, in the right bucket, with at most k songs, best first, and their scores."""
    source = _source_manifest(dataset, manifest)
    counts = {"users": 0, "songs": 0}
    for file in manifest.files:
        path = manifest.path(file)
        bucket = int(posixpath.dirname(file).rpartition("=")[2])
        audit.bar.advance(note=path[-60:])
        checked_users: set[str] = set()  # of one bucket only, to bound the memory
        for table in _batches(audit, path):
            user_ids = table.column(columns.USER).to_numpy()
            audit.require(
                len(set(user_ids)) == len(user_ids) and not checked_users.intersection(user_ids),
                path,
                "a user occurs twice",
            )
            checked_users.update(user_ids)
            is_misplaced = source is not None and bool((bucket_of(user_ids, source.buckets) != bucket).any())
            audit.require(not is_misplaced, path, "a user belongs to another bucket")
            songs, scores = (table.column(name).combine_chunks() for name in (columns.SONG_IDS, columns.SCORES))
            lengths = pc.list_value_length(songs).to_numpy()
            is_valid = (
                bool((lengths <= manifest.config["k"]).all()) and lengths.tolist() == np.diff(scores.offsets).tolist()
            )
            audit.require(
                is_valid, path, f"a row has more than {manifest.config['k']} songs, or not as many scores as songs"
            )
            values, rows = scores.flatten().to_numpy(), pc.list_parent_indices(scores).to_numpy()
            counts["users"] += len(user_ids)
            counts["songs"] += len(values)
            if columns.PROBABILITIES in table.column_names:  # explored songs are at random places
                is_ranked = table.column(columns.PROBABILITIES).combine_chunks().flatten().is_null().to_numpy(False)
                values, rows = values[is_ranked], rows[is_ranked]
            is_sorted = not np.any((np.diff(rows) == 0) & (np.diff(values) > 0))
            audit.require(is_sorted, path, "songs are not sorted by score")
    expected = {name: manifest.metrics[name] for name in counts}
    audit.require(
        counts == expected,
        manifest.folder,
        f"has {counts['users']} users with {counts['songs']} songs, but its manifest says {expected['users']} with "
        f"{expected['songs']}",
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
                audit.require(bool(np.isfinite(values).all()), path, "a state contains NaN or infinity")
            else:
                audit.require(_are_normalized(values), path, f"{name} holds a row that is not of length 1")


def _check_index(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    from rayrec.recommend.index import INDEX_FILE, SongIndex

    path = manifest.path(INDEX_FILE)
    vectors_path = f"models/{manifest.inputs['models']}/{SONG_VECTORS}"
    if not audit.workspace.exists(vectors_path) or vectors_path in audit.damaged:
        audit.note(path, f"cannot be compared: {vectors_path} is missing or damaged")
        return
    vectors = audit.workspace.read_array(vectors_path)
    index = SongIndex.load(audit.workspace, manifest, vectors)
    count = 0
    for songs, stored_vectors in index.stored():
        count += len(songs)
        precision = float(np.finfo(stored_vectors.dtype).eps)
        all_known = bool(((songs >= 0) & (songs < len(vectors))).all())
        if not all_known or not np.allclose(vectors[songs], stored_vectors, rtol=precision, atol=1e-7):
            audit.problem(path, f"differs from {vectors_path}")
            return
    expected = int(np.count_nonzero(vectors.any(axis=1)))
    audit.require(count == expected, path, f"has {count} songs, but {vectors_path} has {expected} vectors")


def _check_release(audit: Audit, manifest: Manifest, dataset: Dataset | None) -> None:
    if dataset is None or not dataset.descends_from(manifest.inputs["dataset"]):
        if releases.is_active(audit.workspace, manifest.id):
            audit.problem(manifest.folder, f"is live, but its data set {manifest.inputs['dataset']} no longer exists")
        return
    files = releases.release_files(audit.workspace, manifest)
    # The manifests of parts are listed in no manifest: only the release has their checksums.
    audit.covered -= {path for path in files if path.endswith("/manifest.json")}
    audit.compare(files)
    parts: dict[str, Any] = {}
    for kind in releases.PART_KINDS:
        if kind in releases.OPTIONAL_KINDS and kind not in manifest.inputs:
            continue
        part_folder = f"{kind}/{manifest.inputs[kind]}"
        if not audit.workspace.exists(f"{part_folder}/manifest.json"):
            audit.problem(manifest.folder, f"{part_folder} is missing")
            continue
        parts[kind] = artifacts.load_manifest(audit.workspace, kind, manifest.inputs[kind])
    with audit.reading(manifest.folder):
        releases.require_matching_parts(dataset.manifest, manifest.inputs, parts.values())


def verify_workspace(workspace: Workspace) -> Audit:
    """Compare every file with its checksum and every count with the data, and check the content of every artifact.

    Problems: a file that is missing, differs or is listed in no manifest; a user who is missing or occurs twice;
    vectors that are not finite and normalized; an index that does not belong to its model; a release whose parts do not
    fit together. Notes: files that unfinished jobs have left, and artifacts made from something that no longer exists.
    """
    with progress("verify") as bar:
        audit = Audit(workspace=workspace, bar=bar)
        dataset = None
        with audit.reading(DATASET_MANIFEST):
            try:
                dataset = Dataset(workspace)
            except NotFoundError:
                audit.note(DATASET_MANIFEST, "is missing: the workspace has no data set, or it is being replaced")
        staged_manifests: list[DatasetManifest] = []
        with audit.reading(IMPORT_STAGING):
            staged_manifests = read_staged_manifests(workspace)
        if dataset is not None:
            check_dataset(audit, dataset, staged_manifests)
            with audit.reading("splits"):
                check_splits(audit, dataset)
        check_artifacts(audit, dataset)
        with audit.reading(releases.ACTIVE):
            releases.active_release(workspace)
        _check_leftovers(audit, dataset, staged_manifests)
    return audit


def _check_leftovers(audit: Audit, dataset: Dataset | None, staged_manifests: Sequence[DatasetManifest]) -> None:
    """Check the files that no manifest lists: problems if they look like artifacts, notes if a job left them."""
    ancestor_manifests = [dataset.earlier(ancestor_id) for ancestor_id in dataset.manifest.ancestors] if dataset else []
    earlier_files = {f"{DATASET}/{path}" for manifest in ancestor_manifests for path in manifest.files}
    staged_files = {f"{DATASET}/{path}" for manifest in staged_manifests for path in manifest.files}
    unfinished_folders = tuple(f"{note.path}/" for note in audit.notes)
    selector = pafs.FileSelector(audit.workspace.root, allow_not_found=True, recursive=True)
    staged_count = replaced_count = erasing_count = 0
    for info in audit.workspace.filesystem.get_file_info(selector):
        path = posixpath.relpath(info.path, audit.workspace.root)
        if info.type != pafs.FileType.File or path in audit.covered or path.startswith(unfinished_folders):
            continue
        if path.startswith(f"{IMPORT_STAGING}/") or path in staged_files:
            staged_count += 1
        elif path.startswith(f"{SCRATCH}/"):
            erasing_count += 1
        elif path in (CURRENT_FILE, LOCK, LOCK_HOLDER) or path.startswith(f"{IMPRESSIONS}/"):
            continue
        elif "/." in f"/{path}":
            audit.note(path, "is a leftover temporary file; it can be deleted")
        elif path in earlier_files:
            replaced_count += 1
        elif path.endswith(STORED):
            audit.problem(path, "is listed in no manifest")
    if erasing_count:
        audit.note(
            SCRATCH, f"has {erasing_count} files of an unfinished deletion of users; `rayrec compact` continues it"
        )
    waiting_count = len(read_pending_deletions(audit.workspace))
    if waiting_count:
        audit.note(
            FORGOTTEN,
            f"lists {waiting_count} deleted users whose rows are not erased yet; `rayrec compact` erases them",
        )
    if replaced_count:
        audit.note(DATASET, f"has {replaced_count} files that later parts have replaced; `rayrec clean` deletes them")
    if staged_count:
        audit.note(
            IMPORT_STAGING,
            f"has {staged_count} files of an unfinished import or compaction, or has already moved them into place; "
            "the next command that changes the data set publishes, reuses or deletes them",
        )
