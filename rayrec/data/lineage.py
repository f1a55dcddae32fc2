"""The contents of a workspace, which artifact was made from which, and the files that may be deleted."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import pyarrow.fs as pafs
from pydantic import Field

from rayrec.config import Settings
from rayrec.data.dataset import Dataset
from rayrec.data.split import list_splits
from rayrec.errors import DamagedArtifactError, InputError, NotFoundError
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import DatasetManifest, Manifest, read_dataset_manifest, read_staged_manifests
from rayrec.storage.locking import writes
from rayrec.storage.workspace import DATASET, DATASET_MANIFEST, HISTORIES, REPLICAS, USERS, Workspace, split_file

DATASET_FIELDS = (
    "id",
    "plays_id",
    "ancestors",
    "source",
    "users",
    "plays",
    "songs",
    "playlists",
    "first_play",
    "last_play",
    "times",
    "created_at",
)


def status(workspace: Workspace) -> dict[str, Any]:
    """Return plain values: the data set's figures or None, the splits, every artifact by kind, current and live ids.

    Times of plays are in ms UTC, sizes in bytes. An artifact's `figures` are the numbers and texts that its stage
    reported. The `created_at` of a split is the time of its last request. `other_versions` is the number of artifacts
    that another version of rayrec made; they are not listed. The live release may be one of them, or missing.
    """
    return {
        "workspace": workspace.uri,
        "dataset": _dataset_status(workspace),
        "splits": [
            {
                "id": split.id,
                "dataset": split.dataset,
                **split.figures(),
                "held_out_share": split.held_out_share,
                "held_out_songs": split.held_out_songs,
                **_file_status(workspace, split_file(split.id)),
            }
            for split in list_splits(workspace)
        ],
        **{
            kind: [_artifact_status(workspace, item) for item in artifacts.listing(workspace, kind)]
            for kind in artifacts.KINDS
        },
        "current": artifacts.current_ids(workspace),
        "active": releases.read_active(workspace)["active"],
        "other_versions": sum(len(artifacts.ids_of_other_versions(workspace, kind)) for kind in artifacts.KINDS),
    }


def _dataset_status(workspace: Workspace) -> dict[str, Any] | None:
    try:
        manifest = Dataset(workspace).manifest
    except NotFoundError:
        return None
    values = {name: getattr(manifest, name) for name in DATASET_FIELDS}
    return {**values, "rejected": sum(manifest.rejected.values()), "bytes": workspace.size("dataset")}


def _file_status(workspace: Workspace, path: str) -> dict[str, Any]:
    """Return the size in bytes and the time of the last change of a file."""
    info = workspace.filesystem.get_file_info(workspace.full(path))
    changed_at = datetime.fromtimestamp((info.mtime_ns or 0) / 1e9, timezone.utc)
    return {"bytes": info.size, "created_at": changed_at.isoformat()}


def _artifact_status(workspace: Workspace, manifest: Manifest) -> dict[str, Any]:
    metrics = {name: value for name, value in manifest.metrics.items() if isinstance(value, int | float | str)}
    return {
        "id": manifest.id,
        "created_at": manifest.created_at,
        "bytes": workspace.size(manifest.folder),
        "inputs": manifest.inputs,
        "figures": metrics,
    }


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A folder or file that may be deleted."""

    path: str
    bytes: int
    reason: str


class CleanConfig(Settings):
    """What `rayrec clean` keeps."""

    keep: int = Field(
        3,
        ge=1,
        description="Number of newest releases to keep, in addition to the live one and the one before it; a "
        "release that was created again counts as new",
    )
    hours: float = Field(
        24.0, ge=0, le=100_000, description="Keep files changed within this many hours, 100,000 at most"
    )


def find_garbage(workspace: Workspace, config: CleanConfig) -> list[Garbage]:
    """Return the artifacts and files that no release in use refers to.

    A release is in use if it is live, if a rollback would make it live, if a replica reports it, or if it is among the
    most recently requested ones. Artifacts made after the newest release are also kept, and so are the artifacts that
    later commands start from, and the most recently requested recommendations for all users of each model in use.
    Everything is kept for `config.hours` with the artifacts it was made from, because a reader may still use it.
    Artifacts of another version of rayrec are in use only while a replica reports a release of such a version. Raises
    `InputError` if there is no release, because then nothing shows what is in use.
    """
    all_releases = releases.list_releases(workspace)
    if not all_releases:
        raise InputError(
            f"workspace {workspace.uri} has no release, so it is unknown which files are in use; "
            "run `rayrec fit` or `rayrec release create`"
        )
    cutoff = datetime.now(timezone.utc) - timedelta(hours=config.hours)
    # Artifacts made later may go into the next release. So may older ones that a stage reused: see `_current_parts`.
    artifact_cutoff = min(cutoff, _created_at(all_releases[-1]))
    kinds = (releases.KIND, artifacts.RECOMMENDATIONS, *releases.PART_KINDS)
    manifests = {kind: {manifest.id: manifest for manifest in artifacts.listing(workspace, kind)} for kind in kinds}
    recent = [
        manifest
        for kind_manifests in manifests.values()
        for manifest in kind_manifests.values()
        if _created_at(manifest) >= artifact_cutoff
    ]
    used_artifacts = _used_artifacts(
        workspace, [*kept_releases(workspace, config), *recent, *_current_parts(workspace)]
    )
    used_artifacts |= _last_recommendations(workspace, used_artifacts)
    other_version_ids = {kind: artifacts.ids_of_other_versions(workspace, kind) for kind in artifacts.KINDS}
    garbage = []
    for kind in kinds:
        for artifact_id in workspace.folders(kind):
            if (kind, artifact_id) in used_artifacts or artifact_id in other_version_ids[kind]:
                continue
            folder = f"{kind}/{artifact_id}"
            if artifact_id in manifests[kind]:
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="in no release that is kept"))
            elif _last_change(workspace, folder) < artifact_cutoff:
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="unfinished"))
    if _reported_release_ids(workspace).isdisjoint(other_version_ids[releases.KIND]):
        folders = [f"{kind}/{artifact_id}" for kind in artifacts.KINDS for artifact_id in other_version_ids[kind]]
        garbage += [
            Garbage(path=folder, bytes=workspace.size(folder), reason="made by another version of rayrec")
            for folder in folders
            if _last_change(workspace, folder) < artifact_cutoff
        ]
    return [*garbage, *_replaced_parts(workspace, cutoff)]


def kept_releases(workspace: Workspace, config: CleanConfig) -> list[Manifest]:
    """Return the releases that `rayrec clean` keeps with the settings `config`, oldest first; see `find_garbage`."""
    all_releases = releases.list_releases(workspace)
    release_ids = [manifest.id for manifest in all_releases]
    cutoff = datetime.now(timezone.utc) - timedelta(hours=config.hours)
    state = releases.read_active(workspace)
    kept_ids = {
        *artifacts.sort_by_last_request(workspace, releases.KIND, release_ids)[-config.keep :],
        *release_ids[-1:],
        *(manifest.id for manifest in all_releases if _created_at(manifest) >= cutoff),
        state["active"],
        *state["history"][-1:],  # a rollback makes it live
        *_reported_release_ids(workspace),
    }
    return [manifest for manifest in all_releases if manifest.id in kept_ids]


@writes("clean")
def delete_garbage(workspace: Workspace, garbage: Iterable[Garbage], config: CleanConfig) -> list[Garbage]:
    """Delete the items of `garbage` that `find_garbage` still returns for the same settings; return the deleted items.

    Items that are in use now are kept, such as a release that was made live. No job can run at the same time: the
    one that starts second is refused. Releases are deleted before their parts, and the manifest of an artifact before
    its files, so that a killed clean leaves only unfinished artifacts. The list of earlier releases is written after
    the releases are deleted: on a full disk this frees the space for it. After a clean that was killed in between,
    the next one removes the missing ids. Raises `InputError` if there is no release.
    """
    paths = {item.path for item in garbage}
    unused = [item for item in find_garbage(workspace, config) if item.path in paths]
    unused_releases = [item for item in unused if item.path.startswith(f"{releases.KIND}/")]
    _delete(workspace, unused_releases)
    state = releases.read_active(workspace)
    history = [
        release_id for release_id in state["history"] if workspace.exists(f"{releases.KIND}/{release_id}/manifest.json")
    ]
    if history != state["history"]:
        releases.write_active(workspace, state["active"], history, state["rolled_back"])
    _delete(workspace, [item for item in unused if item not in unused_releases])
    return unused


def _delete(workspace: Workspace, items: Iterable[Garbage]) -> None:
    for item in items:
        workspace.delete(f"{item.path}/manifest.json")
        workspace.delete(item.path)


def _reported_release_ids(workspace: Workspace) -> set[str]:
    """Return the ids of the releases that replicas report to use or to load, including those of experiment arms."""
    ids: set[str] = set()
    for path in workspace.files(REPLICAS):
        try:
            report = workspace.read_json(path)
        except (NotFoundError, DamagedArtifactError):  # deleted in between, or not a report
            continue
        ids |= {report.get("release"), report.get("loading"), *report.get("arms", [])}
    return ids


def _current_parts(workspace: Workspace) -> list[Manifest]:
    """Return the most recently requested artifact of each kind that releases are made of."""
    latest = (artifacts.latest(workspace, kind) for kind in releases.PART_KINDS)
    return [manifest for manifest in latest if manifest is not None]


def _used_artifacts(workspace: Workspace, manifests: Iterable[Manifest]) -> set[tuple[str, str]]:
    """Return kind and id of the artifacts `manifests` and of all that they were made from, directly or not."""
    used: set[tuple[str, str]] = set()
    pending = list(manifests)
    while pending:
        manifest = pending.pop()
        if (manifest.kind, manifest.id) in used:
            continue
        used.add((manifest.kind, manifest.id))
        for kind, input_id in manifest.inputs.items():
            if kind in releases.PART_KINDS and workspace.exists(f"{kind}/{input_id}/manifest.json"):
                pending.append(artifacts.load_manifest(workspace, kind, input_id))
    return used


def _last_recommendations(workspace: Workspace, used_artifacts: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return kind and id of the most recently requested recommendations of each model in use."""
    manifests = {manifest.id: manifest for manifest in artifacts.listing(workspace, artifacts.RECOMMENDATIONS)}
    last_by_model = {
        manifests[artifact_id].inputs["models"]: artifact_id
        for artifact_id in artifacts.sort_by_last_request(workspace, artifacts.RECOMMENDATIONS, list(manifests))
    }
    return {
        (artifacts.RECOMMENDATIONS, artifact_id)
        for model_id, artifact_id in last_by_model.items()
        if ("models", model_id) in used_artifacts
    }


def _replaced_parts(workspace: Workspace, cutoff: datetime) -> list[Garbage]:
    """Return the files of histories that joined ones replaced, and of lists of users that a later part replaced."""
    if not workspace.exists(DATASET_MANIFEST):
        return []
    dataset = read_dataset_manifest(workspace)
    # A killed run may have moved files of the next data set into place.
    needed_paths = _needed_paths(dataset).union(*map(_needed_paths, read_staged_manifests(workspace)))
    folders = [USERS]
    if dataset.joined_at and datetime.fromisoformat(dataset.joined_at) < cutoff:
        folders.append(HISTORIES)
    return [
        Garbage(path=path, bytes=size, reason=f"replaced by a {'newer' if folder == USERS else 'joined'} file")
        for folder in folders
        for path, size in sorted(workspace.sizes(folder).items())
        if path not in needed_paths
    ]


def _needed_paths(dataset: DatasetManifest) -> set[str]:
    needed_paths = {f"{DATASET}/{path}" for path in dataset.files}
    for bucket in range(dataset.buckets):
        needed_paths |= {*dataset.histories_files(bucket), dataset.current_users_file(bucket)}
    return needed_paths


def _created_at(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created_at)


def _last_change(workspace: Workspace, folder: str) -> datetime:
    selector = pafs.FileSelector(workspace.full(folder), allow_not_found=True, recursive=True)
    changes = [info.mtime_ns or 0 for info in workspace.filesystem.get_file_info(selector)]
    return datetime.fromtimestamp(max(changes, default=0) / 1e9, timezone.utc)
