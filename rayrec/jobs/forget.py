"""Deletes users: hides them at once, and later erases them from every file of the workspace.

An erasure writes the files without the users' rows, and the manifests with the new checksums, into a scratch folder.
When all of them are written, it moves them into place. A killed erasure leaves the workspace unchanged, or the next
erasure completes it.
"""

import json
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset, ForgottenUsers, mark_erased, mark_forgotten, read_waiting, user_digest
from rayrec.data.impressions import erase_impressions
from rayrec.data.moments import now_ms
from rayrec.data.spelling import spell_id
from rayrec.display import progress
from rayrec.errors import DamagedArtifactError, InputError
from rayrec.importing.merging import FORGOTTEN_USER
from rayrec.importing.staging import finish_publishing
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.model.taste_table import PLAYS
from rayrec.online.state_codec import pack_state
from rayrec.online.state_store import StateStore, open_store, store_uri
from rayrec.online.user_state import UserState
from rayrec.storage import artifacts
from rayrec.storage.artifacts import BUCKET_COUNTS, DatasetManifest, Manifest, read_dataset_manifest
from rayrec.storage.locking import writes
from rayrec.storage.releases import CHECKSUMS, list_releases
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    FORGOTTEN,
    HISTORIES,
    IMPORT_STAGING,
    REJECTED_ROWS,
    SENT_PLAYS,
    STATES_FILE,
    USERS,
    Workspace,
    artifact_dir,
    earlier_manifest,
    histories_file,
)

LOGGER = logging.getLogger(__name__)
SCRATCH = f"{FORGOTTEN}/.erasing"
READY = f"{SCRATCH}/ready.json"  # written when all files are in the scratch folder; names the users whom they erase
EARLIER = f"{DATASET}/earlier"
# The tables with one row per user: folder of Parquet files with a column user_id -> the figure in their manifest to
# which a row contributes, and the column that holds the contribution. Both are empty if no manifest has such a figure.
USER_TABLES: dict[str, tuple[str, str]] = {
    HISTORIES: ("plays", columns.SONGS),
    USERS: ("", ""),
    "tastes": ("plays", PLAYS),
    artifacts.RECOMMENDATIONS: ("songs", columns.SONG_IDS),
}
TEMPORARY = re.compile(r"^\..+\.[0-9a-f]{32}$")  # temporary files that a killed process leaves


@dataclass(frozen=True, kw_only=True)
class Erased:
    """The result of an erasure."""

    users: int = 0  # deleted users whose rows had not been erased before
    rows: int = 0  # rows erased from all files
    files: int = 0  # files that held such rows, without those of the impression log


def forget_users(workspace: Workspace, user_ids: Sequence[str], *, store: str | None = None) -> int:
    """Hide users, known or not, from all commands and delete them from the store; return the number of users.

    `store` is an address as in `store_uri`; without it the workspace's own store is used, if there is one. From now on
    the users get the answers of unknown users, and their plays from before this moment are rejected. Their rows stay
    in files until `erase_forgotten` has run. Raises `InputError` for an invalid user ID.
    """
    ids = [spell_id(user_id) for user_id in user_ids]
    for raw_id, user_id in zip(user_ids, ids, strict=True):
        if user_id is None:
            raise InputError(f"{raw_id!r} is not a valid user ID; expected text that is not empty")
    known, at = list(dict.fromkeys(filter(None, ids))), now_ms()
    dataset = Dataset(workspace)
    mark_forgotten(workspace, known, at)
    opened = open_own_store(workspace, store, dataset.lineage)
    if opened is not None:
        try:
            opened.forget(known, pack_state(UserState(forgotten_at=at)))
        finally:
            opened.close()
    return len(known)


def open_own_store(workspace: Workspace, store: str | None, lineage: str) -> StateStore | None:
    """Open `store`; if it is None, the workspace's own store, or return None if there is none."""
    if store is None and not (workspace.is_local and workspace.exists(STATES_FILE)):
        return None
    return open_store(store_uri(workspace, store), lineage)


def erase_forgotten(workspace: Workspace, *, reading: Sequence[str] = ()) -> Erased:
    """Erase the rows of users deleted since the last erasure from all files, and update the manifests.

    Every stage that reads users runs it first, so that nothing is made from deleted users. Ids of data sets and
    artifacts stay the same, and all other rows are kept. The texts of rejected rows are emptied, since they may contain
    ids of the users. An unfinished import starts over, and so does an unfinished fit of embeddings, a network,
    retrievers or rankers. The paths `reading`, which the caller is about to import, are kept. Raises
    `DamagedArtifactError` for a file that did not match its checksum before the erasure.
    """
    waiting = read_waiting(workspace)
    if not waiting and not workspace.exists(READY):
        return Erased()
    return _erase(workspace, reading)


@writes("compact")
def _erase(workspace: Workspace, reading: Sequence[str]) -> Erased:
    finish_publishing(workspace)
    _finish(workspace)
    waiting = read_waiting(workspace)
    if not waiting:
        return Erased()
    workspace.delete(IMPORT_STAGING)
    _delete_unfinished_fits(workspace)
    _delete_sent_plays(workspace, reading)
    folders = [*USER_TABLES, REJECTED_ROWS]
    paths = [path for folder in folders for path in workspace.files(folder) if path.endswith(".parquet")]
    for folder in (DATASET, *USER_TABLES):
        _delete_temporary(workspace, folder)
    erased: dict[str, ErasedFile] = {}
    with ray_cluster(), progress("Deleted users", len(paths)) as bar:
        arguments = {"workspace": workspace, "forgotten": waiting}
        for result in run_buckets(FileEraser, paths, arguments=arguments, called="file"):
            if result is not None:
                erased[result.path] = result
            bar.advance()
    logged = erase_impressions(workspace)
    _Manifests(workspace, waiting, erased).write()
    workspace.write_json(READY, dict(waiting.moments))
    _finish(workspace)
    held = [each for each in erased.values() if each.users]
    return Erased(users=len(waiting), rows=logged + sum(len(each.users) for each in held), files=len(held))


def _finish(workspace: Workspace) -> None:
    """Move the files of a complete erasure into place, if there is one. A killed call can be repeated."""
    if workspace.exists(READY):
        for path in workspace.files(f"{SCRATCH}/out"):
            workspace.move(path, path.removeprefix(f"{SCRATCH}/out/"))
        mark_erased(workspace, ForgottenUsers(workspace.read_json(READY)))
        workspace.delete(READY)
    workspace.delete(SCRATCH)


def _out(path: str) -> str:
    return f"{SCRATCH}/out/{path}"


def _delete_unfinished_fits(workspace: Workspace) -> None:
    """Delete the files of killed fits: they hold validation plays, and counts from which no user can be removed."""
    for kind in artifacts.FITTED:
        for name in workspace.folders(kind):
            folder = artifact_dir(kind, name)
            if not workspace.exists(f"{folder}/manifest.json"):
                LOGGER.warning(
                    "%s was unfinished and had plays of deleted users: it is deleted and starts over", folder
                )
                workspace.delete(folder)


def _delete_sent_plays(workspace: Workspace, reading: Sequence[str]) -> None:
    """Delete the tables of plays that killed calls of fit and update in Python left, except the paths in `reading`."""
    _delete_temporary(workspace, SENT_PLAYS)
    for path in workspace.files(SENT_PLAYS):
        if workspace.uri_of(path) not in reading:
            workspace.delete(path)


def _delete_temporary(workspace: Workspace, folder: str) -> None:
    """Delete the temporary files of killed processes. No other job may be running."""
    selector = pafs.FileSelector(workspace.full(folder), allow_not_found=True, recursive=True)
    for info in workspace.filesystem.get_file_info(selector):
        if info.type == pafs.FileType.File and TEMPORARY.match(info.base_name):
            workspace.delete(posixpath.relpath(info.path, workspace.root))


@dataclass(frozen=True, kw_only=True)
class ErasedFile:
    """A file that was rewritten without rows or texts of deleted users."""

    path: str
    before: str  # sha256 of the old file
    after: str  # sha256 of the new file
    users: dict[str, int] = field(default_factory=dict)  # digest of a user -> plays or songs of the erased row


class FileEraser:
    """Rewrites files without the rows of deleted users, one file at a time."""

    def __init__(self, workspace: Workspace, forgotten: ForgottenUsers) -> None:
        self._workspace, self._forgotten = workspace, forgotten

    def __call__(self, path: str) -> ErasedFile | None:
        """Write the new version of one file into the scratch folder; return None if the file does not change."""
        if path.startswith(f"{REJECTED_ROWS}/"):
            return self._without_texts(path)
        with self._workspace.open_input(path) as stream:
            file = pq.ParquetFile(stream)
            group_masks = [self._kept(file, group) for group in range(file.num_row_groups)]
            if all(mask.all() for mask in group_masks):
                return None
            users, after = self._write(path, file, group_masks)
        before = artifacts.sha256(self._workspace, path)
        return ErasedFile(path=path, before=before, after=after, users=users)

    def _kept(self, file: pq.ParquetFile, group: int) -> np.ndarray:
        """bool (U,): the rows of a row group that stay."""
        ids = file.read_row_group(group, columns=[columns.USER]).column(columns.USER)
        mask: np.ndarray = ~self._forgotten.holds(pc.fill_null(ids, "").to_pylist())
        return mask

    def _write(self, path: str, file: pq.ParquetFile, masks: list[np.ndarray]) -> tuple[dict[str, int], str]:
        users: dict[str, int] = {}
        figure, column = next(how for folder, how in USER_TABLES.items() if path.startswith(f"{folder}/"))
        metadata = file.metadata.metadata or {}
        schema = file.schema_arrow.remove_metadata()
        with (
            self._workspace.open_output(_out(path)) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for group, mask in enumerate(masks):
                table = file.read_row_group(group).replace_schema_metadata(None)
                gone = table.filter(pa.array(~mask))
                digests = map(user_digest, gone.column(columns.USER).to_pylist())
                users |= dict(zip(digests, _amounts(gone, column), strict=True))
                left = table.filter(pa.array(mask))
                if left.num_rows:
                    writer.write_table(left, row_group_size=left.num_rows)
            if BUCKET_COUNTS in metadata:
                counts = Counter(json.loads(metadata[BUCKET_COUNTS]))
                counts.subtract({"users": len(users), figure: sum(users.values())})
                writer.add_key_value_metadata({BUCKET_COUNTS.decode(): json.dumps(counts)})
        return users, stream.sha256

    def _without_texts(self, path: str) -> ErasedFile | None:
        """Empty the texts of all rejected rows, and file names with a deleted user's id; keep reason and line.

        The list of deleted users holds digests of ids, and a text cannot be searched for a digest.
        """
        table = self._workspace.read_table(path)
        sources = table.column("source").combine_chunks().dictionary_encode()
        names = pa.array(self._forgotten.scrub(sources.dictionary.to_pylist()), pa.string())
        data = {"source": names.take(sources.indices), "text": pa.array([""] * len(table), pa.string())}
        clean = table
        for name, values in data.items():
            place = columns.REJECTED.names.index(name)
            clean = clean.set_column(place, columns.REJECTED.field(name), values)
        if clean.equals(table):
            return None
        before = artifacts.sha256(self._workspace, path)
        return ErasedFile(path=path, before=before, after=self._workspace.write_table(_out(path), clean))


def _amounts(rows: pa.Table, column: str) -> list[int]:
    """Return the contribution of each row: the number or the length of the list in `column`, 0 without a column."""
    if not column:
        return [0] * rows.num_rows
    values = rows.column(column)
    lists = pa.types.is_list(values.type)
    amounts: list[int] = (pc.list_value_length(values) if lists else values).to_pylist()
    return amounts


class _Manifests:
    """Writes the new manifests of data sets, artifacts and releases whose files were rewritten."""

    def __init__(self, workspace: Workspace, forgotten: ForgottenUsers, erased: Mapping[str, ErasedFile]) -> None:
        self._workspace, self._forgotten, self._erased = workspace, forgotten, erased
        self._digests = {path: each.after for path, each in erased.items()}  # sha256 of all new files, also manifests
        self._of_tastes: dict[str, Counter[str]] = {}  # data set -> users and plays lost by its taste vectors

    def write(self) -> None:
        """Write changed manifests into the scratch folder. Raises `DamagedArtifactError` as `erase_forgotten` does."""
        for kind in ("tastes", artifacts.RECOMMENDATIONS):
            for manifest in artifacts.listing(self._workspace, kind):
                self._write_artifact(manifest)
        dataset = read_dataset_manifest(self._workspace) if self._workspace.exists(DATASET_MANIFEST) else None
        if dataset is not None:
            self._write_datasets(dataset)
        for release in list_releases(self._workspace):
            self._write_release(release, dataset)

    def _write_artifact(self, manifest: Manifest) -> None:
        files = {manifest.path(name): digest for name, digest in manifest.files.items()}
        self._require_sound(files)
        changed = [self._erased[path] for path in files if path in self._erased]
        if not changed:
            return
        lost = _lost(changed, USER_TABLES[manifest.kind][0])
        if manifest.kind == "tastes":
            self._of_tastes.setdefault(manifest.inputs["dataset"], lost)
        metrics = {name: value - lost[name] if name in lost else value for name, value in manifest.metrics.items()}
        renewed = replace(manifest, metrics=metrics, files=self._renewed(manifest.files, manifest.folder))
        self._write_json(manifest.path("manifest.json"), asdict(renewed))

    def _write_datasets(self, dataset: DatasetManifest) -> None:
        self._require_sound({f"{DATASET}/{name}": digest for name, digest in dataset.files.items()})
        last_part = {
            histories_file(first, bucket, last): last
            for first, last in dataset.spans
            for bucket in range(dataset.buckets)
        }
        histories = {path: each for path, each in self._erased.items() if path in last_part}
        present = [earlier_manifest(name) for name in dataset.ancestors]
        others = sorted(set(self._workspace.files(EARLIER)) - set(present))
        for path in [*others, *present]:  # in this order, since each holds the checksums of the earlier ones
            manifest = read_dataset_manifest(self._workspace, path)
            if path in others or dataset.splits_at(manifest.parts):
                mine = [each for name, each in histories.items() if last_part[name] < manifest.parts]
                lost = Counter() if path in others else _lost(mine, "plays")
            else:  # joined with later parts: their plays cannot be distinguished
                lost = self._of_tastes.get(manifest.plays_id, Counter())
            self._write_dataset(path, manifest, lost)
        self._write_dataset(DATASET_MANIFEST, dataset, _lost(histories.values(), "plays"))

    def _write_dataset(self, path: str, manifest: DatasetManifest, lost: Counter[str]) -> None:
        rejected = dict(manifest.rejected)
        if lost["plays"]:
            rejected[FORGOTTEN_USER] = rejected.get(FORGOTTEN_USER, 0) + lost["plays"]
        last_import: dict[str, Any] = self._forgotten.scrub(manifest.last_import)
        if "reasons" in last_import:
            last_import["reasons"] = [{**each, "text": ""} for each in last_import["reasons"]]
        renewed = replace(
            manifest,
            users=manifest.users - lost["users"],
            plays=manifest.plays - lost["plays"],
            rejected=rejected,
            config=self._forgotten.scrub(manifest.config),
            appended=self._forgotten.scrub(manifest.appended),
            last_import=last_import,
            files=self._renewed(manifest.files, DATASET),
        )
        if renewed != manifest:
            self._write_json(path, asdict(renewed))

    def _write_release(self, release: Manifest, dataset: DatasetManifest | None) -> None:
        path, made_of = release.path(CHECKSUMS), release.inputs["dataset"]
        checksums = dict(self._workspace.read_json(path))
        renewed = self._renewed(checksums, "")
        if dataset is not None and made_of != dataset.id and DATASET_MANIFEST in checksums:
            known = dataset.descends_from(made_of)
            digest = self._digests.get(earlier_manifest(made_of)) if known else None
            renewed[DATASET_MANIFEST] = digest or checksums[DATASET_MANIFEST]
        if renewed == checksums:
            return
        self._write_json(path, renewed)
        new_release = replace(release, files=self._renewed(release.files, release.folder))
        self._write_json(release.path("manifest.json"), asdict(new_release))

    def _require_sound(self, files: Mapping[str, str]) -> None:
        """Raise `DamagedArtifactError` for a file that was damaged before: it must not get a new checksum."""
        for path, expected in files.items():
            if path in self._erased and self._erased[path].before != expected:
                raise DamagedArtifactError(
                    f"{path} does not match the checksum in its manifest; restore the file, or run its command again "
                    "with --force"
                )

    def _renewed(self, files: Mapping[str, str], folder: str) -> dict[str, str]:
        """Return `files`, path below `folder` -> sha256, with the checksums after the erasure."""
        return {name: self._digests.get(posixpath.join(folder, name), digest) for name, digest in files.items()}

    def _write_json(self, path: str, value: dict[str, Any]) -> None:
        self._digests[path] = self._workspace.write_json(_out(path), value)


def _lost(files: Iterable[ErasedFile], figure: str) -> Counter[str]:
    """Return the number of different users erased from `files`, and how much of `figure` was erased with them."""
    lost = list(files)
    users = {user for each in lost for user in each.users}
    return Counter({"users": len(users), figure: sum(sum(each.users.values()) for each in lost)})
