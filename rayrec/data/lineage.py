"""What a workspace holds, what was made from what, and what of it may be deleted."""

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
    """Plain values: the data set's figures or None, the splits, every artifact by kind, current and live ids.

    Times of plays are ms UTC, sizes bytes. An artifact's `figures` are the plain numbers that its stage reported. The
    `created_at` of a split is when it was last requested.
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
    """Bytes and time of the last change of a file."""
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
    """What to keep."""

    keep: int = Field(3, ge=1, description="Releases requested last to keep beside the live one and the one before it")
    hours: float = Field(24.0, ge=0, description="Keep files changed within this many hours")


def find_garbage(workspace: Workspace, config: CleanConfig) -> list[Garbage]:
    """What no release in use refers to: live, live before, reported by a replica, or among those requested last.

    What was made after the newest release stays too, and what later commands start from; of the recommendations for all
    users those of each model in use that were requested last. Everything stays for some hours, with what it was made
    of: a reader may still use what was replaced. Raises `InputError` where there is no release, since nothing says then
    what is of use.
    """
    all_releases = releases.list_releases(workspace)
    if not all_releases:
        raise InputError(
            f"workspace {workspace.uri} has no release, so nothing says what is of use; run `rayrec release create`"
        )
    limit = datetime.now(timezone.utc) - timedelta(hours=config.hours)
    last = artifacts.by_request(workspace, releases.KIND, [each.id for each in all_releases])[-config.keep :]
    state = releases.read_active(workspace)
    # A rollback makes the last of the history live.
    names = {*last, state["active"], *state["history"][-1:], *_answering(workspace)}
    # Something younger is on its way to a release of its own, and so may be what was found in the cache.
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
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="in no release to keep"))
            elif _last_change(workspace, folder) < before:
                garbage.append(Garbage(path=folder, bytes=workspace.size(folder), reason="unfinished"))
    return [*garbage, *_replaced_parts(workspace, limit)]


@writes("clean")
def delete_garbage(workspace: Workspace, garbage: Iterable[Garbage], config: CleanConfig) -> list[Garbage]:
    """Delete of what `find_garbage` found all that is garbage still, by the same settings; what was deleted.

    No job may be running: it is refused, or this is. What came into use since is left alone, such as a release that was
    made live. Releases go first, and of each artifact the manifest: what is left of a killed clean is unfinished.
    Raises `InputError` where there is no release.
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
    """Ids of the releases that replicas answer with or load, for arms of an experiment, too, as they report."""
    ids: set[str] = set()
    for path in workspace.files(REPLICAS):
        try:
            report = workspace.read_json(path)
        except (NotFoundError, DamagedArtifactError):  # deleted in between, or not a report
            continue
        ids |= {report.get("release"), report.get("loading"), *report.get("arms", [])}
    return ids


def _current(workspace: Workspace) -> list[Manifest]:
    """What releases are made of, each the artifact of its kind that was requested last."""
    latest = (artifacts.latest(workspace, kind) for kind in releases.PART_KINDS)
    return [manifest for manifest in latest if manifest is not None]


def _used(workspace: Workspace, kept: Iterable[Manifest]) -> set[tuple[str, str]]:
    """Kind and id of some artifacts and of everything that they were made of, directly or not."""
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
    """Kind and id of the recommendations of each model in use that were requested last."""
    made = {manifest.id: manifest for manifest in artifacts.listing(workspace, artifacts.RECOMMENDATIONS)}
    last = {
        made[each].inputs["models"]: each
        for each in artifacts.by_request(workspace, artifacts.RECOMMENDATIONS, list(made))
    }
    return {(artifacts.RECOMMENDATIONS, each) for model, each in last.items() if ("models", model) in used}


def _replaced_parts(workspace: Workspace, limit: datetime) -> list[Garbage]:
    """Histories that were joined, and lists of users that a later part replaced."""
    if not workspace.exists(DATASET_MANIFEST):
        return []
    dataset = read_dataset_manifest(workspace)
    needed = _needed(dataset)
    folders = [USERS]
    if dataset.joined_at and datetime.fromisoformat(dataset.joined_at) < limit:
        folders.append(HISTORIES)
    return [
        Garbage(path=path, bytes=size, reason="replaced by a later part" if folder == USERS else "joined")
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
