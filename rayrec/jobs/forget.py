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
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import (
    Dataset,
    ForgottenUsers,
    mark_erased,
    mark_forgotten,
    read_pending_deletions,
    user_digest,
)
from rayrec.data.impressions import erase_impressions
from rayrec.data.moments import now_ms
from rayrec.data.spelling import EXPECTED_ID, spell_id
from rayrec.display import progress
from rayrec.errors import DamagedArtifactError, InputError
from rayrec.importing.merging import FORGOTTEN_USER
from rayrec.importing.staging import finish_publishing
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.model.taste_table import PLAYS
from rayrec.online.state_codec import pack_state
from rayrec.online.state_store import StoreUnavailableError, open_user_store
from rayrec.online.user_state import UserState
from rayrec.storage import artifacts
from rayrec.storage.artifacts import (
    BUCKET_COUNTS,
    DatasetManifest,
    Manifest,
    read_dataset_manifest,
    read_lineages,
)
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
NAMING_SETTINGS = ("paths", "user")  # settings of an import that may name a user
NAMING_COUNTS = ("damaged", "outliers", "warnings")  # fields of an `ImportSummary` that may name a user, by a file
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
    in files until `erase_forgotten` has run. Raises `InputError` for an invalid user ID and for a store that cannot be
    opened; then no user is hidden. Raises `StoreUnavailableError` if the store does not answer after they are hidden.
    """
    spelled_ids = [spell_id(user_id) for user_id in user_ids]
    for raw_id, user_id in zip(user_ids, spelled_ids, strict=True):
        if user_id is None:
            raise InputError(f"{raw_id!r} is not a user ID; {EXPECTED_ID}")
    unique_ids, at = list(dict.fromkeys(filter(None, spelled_ids))), now_ms()
    dataset = Dataset(workspace)
    state_store = open_user_store(workspace, store, dataset.lineage)
    with nullcontext() if state_store is None else closing(state_store):
        mark_forgotten(workspace, unique_ids, at)
        if state_store is not None:
            try:
                state_store.forget(unique_ids, pack_state(UserState(forgotten_at=at)), read_lineages(workspace))
            except StoreUnavailableError as error:
                raise StoreUnavailableError(
                    f"{str(error).removesuffix('; try again')}; the users are deleted from the workspace, but not from "
                    "this store: run the same command again"
                ) from error
    return len(unique_ids)


def erase_forgotten(workspace: Workspace, *, reading: Sequence[str] = ()) -> Erased:
    """Erase the rows of users deleted since the last erasure from all files, and update the manifests.

    Every stage that reads users runs it first, so that nothing is made from deleted users. Ids of data sets and
    artifacts stay the same, and all other rows are kept. The texts of rejected rows are emptied, since they may contain
    ids of the users. An unfinished import starts over, and so does an unfinished fit of embeddings, a network,
    retrievers or rankers. The paths `reading`, which the caller is about to import, are kept. Raises
    `DamagedArtifactError` for a file that did not match its checksum before the erasure.
    """
    waiting_users = read_pending_deletions(workspace)
    if not waiting_users and not workspace.exists(READY):
        return Erased()
    return _erase(workspace, reading)


@writes("compact")
def _erase(workspace: Workspace, kept_paths: Sequence[str]) -> Erased:
    finish_publishing(workspace)
    _finish(workspace)
    waiting_users = read_pending_deletions(workspace)
    if not waiting_users:
        return Erased()
    workspace.delete(IMPORT_STAGING)
    _delete_unfinished_fits(workspace)
    _delete_sent_plays(workspace, kept_paths)
    folders = [*USER_TABLES, REJECTED_ROWS]
    paths = [path for folder in folders for path in workspace.files(folder) if path.endswith(".parquet")]
    for folder in (DATASET, *USER_TABLES):
        _delete_temporary(workspace, folder)
    erased_files: dict[str, ErasedFile] = {}
    with ray_cluster(), progress("Deleted users", len(paths)) as bar:
        arguments = {"workspace": workspace, "forgotten": waiting_users}
        for result in run_buckets(FileEraser, paths, arguments=arguments, called="file"):
            if result is not None:
                erased_files[result.path] = result
            bar.advance()
    impression_rows = erase_impressions(workspace)
    _ManifestWriter(workspace, waiting_users, erased_files).write()
    workspace.write_json(READY, dict(waiting_users.moments))
    _finish(workspace)
    files_with_users = [file for file in erased_files.values() if file.users]
    return Erased(
        users=len(waiting_users),
        rows=impression_rows + sum(len(file.users) for file in files_with_users),
        files=len(files_with_users),
    )


def _finish(workspace: Workspace) -> None:
    """Move the files of a complete erasure into place, if there is one. A killed call can be repeated."""
    if workspace.exists(READY):
        for path in workspace.files(f"{SCRATCH}/out"):
            workspace.move(path, path.removeprefix(f"{SCRATCH}/out/"))
        mark_erased(workspace, ForgottenUsers(workspace.read_json(READY)))
        workspace.delete(READY)
    workspace.delete(SCRATCH)


def _scratch_path(path: str) -> str:
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


def _delete_sent_plays(workspace: Workspace, kept_paths: Sequence[str]) -> None:
    """Delete the tables of plays that killed calls of fit and update in Python left, except `kept_paths`."""
    _delete_temporary(workspace, SENT_PLAYS)
    for path in workspace.files(SENT_PLAYS):
        if workspace.uri_of(path) not in kept_paths:
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
    old_checksum: str  # sha256
    new_checksum: str  # sha256
    users: dict[str, int] = field(default_factory=dict)  # digest of a user -> plays or songs of the erased row


class FileEraser:
    """Rewrites files without the rows of deleted users, one file at a time."""

    def __init__(self, workspace: Workspace, forgotten: ForgottenUsers) -> None:
        self._workspace, self._forgotten = workspace, forgotten

    def __call__(self, path: str) -> ErasedFile | None:
        """Write the new version of one file into the scratch folder; return None if the file does not change."""
        if path.startswith(f"{REJECTED_ROWS}/"):
            return self._empty_texts(path)
        with self._workspace.open_input(path) as stream:
            file = pq.ParquetFile(stream)
            group_masks = [self._kept_rows(file, group) for group in range(file.num_row_groups)]
            if all(mask.all() for mask in group_masks):
                return None
            users, new_checksum = self._write(path, file, group_masks)
        old_checksum = artifacts.sha256(self._workspace, path)
        return ErasedFile(path=path, old_checksum=old_checksum, new_checksum=new_checksum, users=users)

    def _kept_rows(self, file: pq.ParquetFile, group: int) -> np.ndarray:
        """bool (U,): the rows of a row group that stay."""
        ids = file.read_row_group(group, columns=[columns.USER]).column(columns.USER)
        mask: np.ndarray = ~self._forgotten.holds(pc.fill_null(ids, "").to_pylist())
        return mask

    def _write(self, path: str, file: pq.ParquetFile, masks: list[np.ndarray]) -> tuple[dict[str, int], str]:
        users: dict[str, int] = {}
        metric, column = next(entry for folder, entry in USER_TABLES.items() if path.startswith(f"{folder}/"))
        metadata = file.metadata.metadata or {}
        schema = file.schema_arrow.remove_metadata()
        with (
            self._workspace.open_output(_scratch_path(path)) as stream,
            pq.ParquetWriter(stream, schema, compression="zstd") as writer,
        ):
            for group, mask in enumerate(masks):
                table = file.read_row_group(group).replace_schema_metadata(None)
                deleted_rows = table.filter(pa.array(~mask))
                digests = map(user_digest, deleted_rows.column(columns.USER).to_pylist())
                users |= dict(zip(digests, _amounts(deleted_rows, column), strict=True))
                remaining_rows = table.filter(pa.array(mask))
                if remaining_rows.num_rows:
                    writer.write_table(remaining_rows, row_group_size=remaining_rows.num_rows)
            if BUCKET_COUNTS in metadata:
                counts = Counter(json.loads(metadata[BUCKET_COUNTS]))
                counts.subtract({"users": len(users), metric: sum(users.values())})
                writer.add_key_value_metadata({BUCKET_COUNTS.decode(): json.dumps(counts)})
        return users, stream.sha256

    def _empty_texts(self, path: str) -> ErasedFile | None:
        """Empty the texts of all rejected rows, and file names with a deleted user's id; keep reason and line.

        The list of deleted users holds digests of ids, and a text cannot be searched for a digest.
        """
        table = self._workspace.read_table(path)
        sources = table.column("source").combine_chunks().dictionary_encode()
        names = pa.array(self._forgotten.scrub(sources.dictionary.to_pylist()), pa.string())
        new_columns = {"source": names.take(sources.indices), "text": pa.array([""] * len(table), pa.string())}
        clean_table = table
        for name, values in new_columns.items():
            column_index = columns.REJECTED.names.index(name)
            clean_table = clean_table.set_column(column_index, columns.REJECTED.field(name), values)
        if clean_table.equals(table):
            return None
        old_checksum = artifacts.sha256(self._workspace, path)
        return ErasedFile(
            path=path,
            old_checksum=old_checksum,
            new_checksum=self._workspace.write_table(_scratch_path(path), clean_table),
        )


def _amounts(rows: pa.Table, column: str) -> list[int]:
    """Return the contribution of each row: the number or the length of the list in `column`, 0 without a column."""
    if not column:
        return [0] * rows.num_rows
    values = rows.column(column)
    is_list = pa.types.is_list(values.type)
    amounts: list[int] = (pc.list_value_length(values) if is_list else values).to_pylist()
    return amounts


class _ManifestWriter:
    """Writes the new manifests of data sets, artifacts and releases whose files were rewritten."""

    def __init__(self, workspace: Workspace, forgotten: ForgottenUsers, erased_files: Mapping[str, ErasedFile]) -> None:
        self._workspace, self._forgotten, self._erased_files = workspace, forgotten, erased_files
        # sha256 of all new files, also manifests
        self._digests = {path: file.new_checksum for path, file in erased_files.items()}
        self._content_checksums: dict[str, str] = {}  # path of a new manifest of a data set -> its content's checksum
        self._losses_by_dataset: dict[str, Counter[str]] = {}  # data set -> users and plays lost by its taste vectors

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
        changed_files = [self._erased_files[path] for path in files if path in self._erased_files]
        if not changed_files:
            return
        losses = _count_losses(changed_files, USER_TABLES[manifest.kind][0])
        if manifest.kind == "tastes":
            self._losses_by_dataset.setdefault(manifest.inputs["dataset"], losses)
        metrics = {name: value - losses[name] if name in losses else value for name, value in manifest.metrics.items()}
        new_manifest = replace(manifest, metrics=metrics, files=self._new_checksums(manifest.files, manifest.folder))
        self._write_json(manifest.path("manifest.json"), asdict(new_manifest))

    def _write_datasets(self, dataset: DatasetManifest) -> None:
        self._require_sound({f"{DATASET}/{name}": digest for name, digest in dataset.files.items()})
        last_part = {
            histories_file(first, bucket, last): last
            for first, last in dataset.spans
            for bucket in range(dataset.buckets)
        }
        erased_histories = {path: file for path, file in self._erased_files.items() if path in last_part}
        ancestor_paths = [earlier_manifest(name) for name in dataset.ancestors]
        other_paths = sorted(set(self._workspace.files(EARLIER)) - set(ancestor_paths))
        # In this order, since each manifest holds the checksums of the earlier ones.
        for path in [*other_paths, *ancestor_paths]:
            manifest = read_dataset_manifest(self._workspace, path)
            if path in other_paths or dataset.splits_at(manifest.parts):
                manifest_files = [file for name, file in erased_histories.items() if last_part[name] < manifest.parts]
                losses = Counter() if path in other_paths else _count_losses(manifest_files, "plays")
            else:  # joined with later parts: their plays cannot be distinguished
                losses = self._losses_by_dataset.get(manifest.plays_id, Counter())
            self._write_dataset(path, manifest, losses)
        self._write_dataset(DATASET_MANIFEST, dataset, _count_losses(erased_histories.values(), "plays"))

    def _write_dataset(self, path: str, manifest: DatasetManifest, losses: Counter[str]) -> None:
        rejected = dict(manifest.rejected)
        if losses["plays"]:
            rejected[FORGOTTEN_USER] = rejected.get(FORGOTTEN_USER, 0) + losses["plays"]
        last_import: dict[str, Any] = self._scrub_fields(manifest.last_import, NAMING_COUNTS)
        if "reasons" in last_import:
            reasons = [self._scrub_fields(reason, ("source",)) for reason in last_import["reasons"]]
            last_import["reasons"] = [{**reason, "text": ""} for reason in reasons]
        new_manifest = replace(
            manifest,
            users=manifest.users - losses["users"],
            plays=manifest.plays - losses["plays"],
            rejected=rejected,
            config={
                kind: self._scrub_fields(settings, NAMING_SETTINGS) if isinstance(settings, dict) else settings
                for kind, settings in manifest.config.items()
            },
            appended=[self._scrub_fields(settings, NAMING_SETTINGS) for settings in manifest.appended],
            last_import=last_import,
            files=self._new_checksums(manifest.files, DATASET),
        )
        if new_manifest != manifest:
            self._write_json(path, asdict(new_manifest))
            self._content_checksums[path] = artifacts.content_checksum(new_manifest)

    def _scrub_fields(self, values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """Return `values` with the fields `names` scrubbed: any other text may equal an id by chance."""
        return {name: self._forgotten.scrub(value) if name in names else value for name, value in values.items()}

    def _write_release(self, release: Manifest, dataset: DatasetManifest | None) -> None:
        path, dataset_id = release.path(CHECKSUMS), release.inputs["dataset"]
        checksums = dict(self._workspace.read_json(path))
        content = checksums[DATASET_MANIFEST]
        if dataset is not None and dataset.descends_from(dataset_id):
            manifest_path = DATASET_MANIFEST if dataset_id == dataset.id else earlier_manifest(dataset_id)
            content = self._content_checksums.get(manifest_path, content)
        new_checksums = {**self._new_checksums(checksums, ""), DATASET_MANIFEST: content}
        if new_checksums == checksums:
            return
        self._write_json(path, new_checksums)
        new_release = replace(release, files=self._new_checksums(release.files, release.folder))
        self._write_json(release.path("manifest.json"), asdict(new_release))

    def _require_sound(self, files: Mapping[str, str]) -> None:
        """Raise `DamagedArtifactError` for a file that was damaged before: it must not get a new checksum."""
        for path, expected in files.items():
            if path in self._erased_files and self._erased_files[path].old_checksum != expected:
                raise DamagedArtifactError(
                    f"{path} does not match the checksum in its manifest; restore the file, or run its command again "
                    "with --force"
                )

    def _new_checksums(self, files: Mapping[str, str], folder: str) -> dict[str, str]:
        """Return `files`, path below `folder` -> sha256, with the checksums after the erasure."""
        return {name: self._digests.get(posixpath.join(folder, name), digest) for name, digest in files.items()}

    def _write_json(self, path: str, value: dict[str, Any]) -> None:
        self._digests[path] = self._workspace.write_json(_scratch_path(path), value)


def _count_losses(erased_files: Iterable[ErasedFile], metric: str) -> Counter[str]:
    """Return the number of different users in `erased_files`, and how much of `metric` was erased with them."""
    file_list = list(erased_files)
    users = {user for file in file_list for user in file.users}
    return Counter({"users": len(users), metric: sum(sum(file.users.values()) for file in file_list)})
