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
from rayrec.storage.artifacts import DatasetManifest, Manifest, read_dataset_manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import DATASET, DATASET_MANIFEST, HISTORIES, REPLICAS, USERS, Workspace, split_file

KINDS = (
    "descriptions",
    "songs",
    "models",
    "added_songs",
    "retrieval",
    "rankers",
    "tastes",
    "indexes",
    "recommendations",
    "reports",
    "tunings",
    "releases",
)
DATASET_FIGURES = (
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
    reported. The `created_at` of a split is the time of its last request.
    """
    active = releases.active_release(workspace)
    return {
        "workspace": workspace.uri,
        "dataset": _dataset(workspace),
        "splits": [
            {
                "id": split.id,
                "dataset": split.dataset,
                **split.figures(),
                "held_out_share": split.held_out_share,
                "held_out_songs": split.held_out_songs,
                **_file(workspace, split_file(split.id)),
            }
            for split in list_splits(workspace)
        ],
        **{kind: [_artifact(workspace, item) for item in artifacts.listing(workspace, kind)] for kind in KINDS},
        "current": artifacts.current_ids(workspace),
        "active": None if active is None else active.id,
    }


def _dataset(workspace: Workspace) -> dict[str, Any] | None:
    try:
        manifest = Dataset(workspace).manifest
    except NotFoundError:
        return None
    figures = {name: getattr(manifest, name) for name in DATASET_FIGURES}
    return {**figures, "rejected": sum(manifest.rejected.values()), "bytes": workspace.size("dataset")}


def _file(workspace: Workspace, path: str) -> dict[str, Any]:
    """Return the size in bytes and the time of the last change of a file."""
    info = workspace.filesystem.get_file_info(workspace.full(path))
    changed = datetime.fromtimestamp((info.mtime_ns or 0) / 1e9, timezone.utc)
    return {"bytes": info.size, "created_at": changed.isoformat()}


def _artifact(workspace: Workspace, manifest: Manifest) -> dict[str, Any]:
    figures = {name: value for name, value in manifest.metrics.items() if isinstance(value, int | float | str)}
    return {
        "id": manifest.id,
        "created_at": manifest.created_at,
        "bytes": workspace.size(manifest.folder),
        "inputs": manifest.inputs,
        "figures": figures,
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
        description="Number of most recently requested releases to keep, in addition to the live one and the one "
        "before it",
    )
    hours: float = Field(24.0, ge=0, description="Keep files changed within this many hours")


def find_garbage(workspace: Workspace, config: CleanConfig) -> list[Garbage]:
    """Return the artifacts and files that no release in use refers to.

    A release is in use if it is live, if a rollback would make it live, if a replica reports it, or if it is among the
    most recently requested ones. Artifacts made after the newest release are also kept, and so are the artifacts that
    later commands start from, and the most recently requested recommendations for all users of each model in use.
    Everything is kept for `config.hours` with the artifacts it was made from, because a reader may still use it. Raises
    `InputError` if there is no release, because then nothing shows what is in use.
    """
    all_releases = releases.list_releases(workspace)
    if not all_releases:
        raise InputError(
            f"workspace {workspace.uri} has no release, so it is unknown which files are in use; "
            "run `rayrec release create`"
        )
    limit = datetime.now(timezone.utc) - timedelta(hours=config.hours)
    last = artifacts.by_request(workspace, releases.KIND, [each.id for each in all_releases])[-config.keep :]
    state = releases.read_active(workspace)
    # A rollback makes the last release of the history live.
    names = {*last, state["active"], *state["history"][-1:], *_answering(workspace)}
    # Artifacts made later may go into the next release. So may older ones that a stage reused: see `_current`.
    before = min(limit, _moment(all_releases[-1]))
    kinds = (releases.KIND, artifacts.RECOMMENDATIONS, *releases.PART_KINDS)
    complete = {kind: {each.id: each for each in artifacts.listing(workspace, kind)} for kind in kinds}
    young = [each for of_kind in complete.values() for each in of_kind.values() if _moment(each) >= before]
    kept = [each for each in all_releases if each.id in names]
    used = _used(workspace, [*kept, *young, *_current(workspace)])
    used |= _last_recommendations(workspace, used)
    garbage = []
    for kind in kinds:
        for name in workspace.folders(kind):
            if (kind, name) in used:
                continue
            folder = f"{kind}/{name}"
            if name in complete[kind]:
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="in no release that is kept"))
            elif _last_change(workspace, folder) < before:
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="unfinished"))
    return [*garbage, *_replaced_parts(workspace, limit)]


@writes("clean")
def delete_garbage(workspace: Workspace, garbage: Iterable[Garbage], config: CleanConfig) -> list[Garbage]:
    """Delete the items of `garbage` that `find_garbage` still returns for the same settings; return the deleted items.

    Items that are in use now are kept, such as a release that was made live. No job can run at the same time: the
    one that starts second is refused. Releases are deleted first, and the manifest of an artifact before its files, so
    that a killed clean leaves only unfinished artifacts. Raises `InputError` if there is no release.
    """
    found = {item.path for item in garbage}
    still = [item for item in find_garbage(workspace, config) if item.path in found]
    gone = {item.path.partition("/")[2] for item in still if item.path.startswith(f"{releases.KIND}/")}
    state = releases.read_active(workspace)
    if gone & set(state["history"]):
        releases.write_active(workspace, state["active"], [name for name in state["history"] if name not in gone])
    for item in still:
        workspace.delete(f"{item.path}/manifest.json")
        workspace.delete(item.path)
    return still


def _answering(workspace: Workspace) -> set[str]:
    """Return the ids of the releases that replicas report to use or to load, including those of experiment arms."""
    ids: set[str] = set()
    for path in workspace.files(REPLICAS):
        try:
            report = workspace.read_json(path)
        except (NotFoundError, DamagedArtifactError):  # deleted in between, or not a report
            continue
        ids |= {report.get("release"), report.get("loading"), *report.get("arms", [])}
    return ids


def _current(workspace: Workspace) -> list[Manifest]:
    """Return the most recently requested artifact of each kind that releases are made of."""
    latest = (artifacts.latest(workspace, kind) for kind in releases.PART_KINDS)
    return [manifest for manifest in latest if manifest is not None]


def _used(workspace: Workspace, kept: Iterable[Manifest]) -> set[tuple[str, str]]:
    """Return kind and id of the artifacts `kept` and of all artifacts that they were made from, directly or not."""
    used: set[tuple[str, str]] = set()
    todo = list(kept)
    while todo:
        manifest = todo.pop()
        if (manifest.kind, manifest.id) in used:
            continue
        used.add((manifest.kind, manifest.id))
        for kind, made_of in manifest.inputs.items():
            if kind in releases.PART_KINDS and workspace.exists(f"{kind}/{made_of}/manifest.json"):
                todo.append(artifacts.load_manifest(workspace, kind, made_of))
    return used


def _last_recommendations(workspace: Workspace, used: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Return kind and id of the most recently requested recommendations of each model in use."""
    made = {manifest.id: manifest for manifest in artifacts.listing(workspace, artifacts.RECOMMENDATIONS)}
    last = {
        made[each].inputs["models"]: each
        for each in artifacts.by_request(workspace, artifacts.RECOMMENDATIONS, list(made))
    }
    return {(artifacts.RECOMMENDATIONS, each) for model, each in last.items() if ("models", model) in used}


def _replaced_parts(workspace: Workspace, limit: datetime) -> list[Garbage]:
    """Return the files of histories that joined ones replaced, and of lists of users that a later part replaced."""
    if not workspace.exists(DATASET_MANIFEST):
        return []
    dataset = read_dataset_manifest(workspace)
    needed = _needed(dataset)
    folders = [USERS]
    if dataset.joined_at and datetime.fromisoformat(dataset.joined_at) < limit:
        folders.append(HISTORIES)
    return [
        Garbage(path=path, bytes=size, reason=f"replaced by a {'newer' if folder == USERS else 'joined'} file")
        for folder in folders
        for path, size in sorted(workspace.sizes(folder).items())
        if path not in needed
    ]


def _needed(dataset: DatasetManifest) -> set[str]:
    needed = {f"{DATASET}/{path}" for path in dataset.files}
    for bucket in range(dataset.buckets):
        needed |= {*dataset.histories_files(bucket), dataset.current_users_file(bucket)}
    return needed


def _moment(manifest: Manifest) -> datetime:
    return datetime.fromisoformat(manifest.created_at)


def _last_change(workspace: Workspace, folder: str) -> datetime:
    selector = pafs.FileSelector(workspace.full(folder), allow_not_found=True, recursive=True)
    changes = [info.mtime_ns or 0 for info in workspace.filesystem.get_file_info(selector)]
    return datetime.fromtimestamp(max(changes, default=0) / 1e9, timezone.utc)
