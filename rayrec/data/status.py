"""What a workspace holds."""

from typing import Any

from rayrec.data.dataset import Dataset
from rayrec.data.split import list_splits
from rayrec.errors import NotFoundError
from rayrec.storage import artifacts
from rayrec.storage.releases import active_release
from rayrec.storage.workspace import Workspace

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

    Times of plays are ms UTC, sizes bytes. An artifact's `figures` are the plain numbers that its stage reported.
    """
    active = active_release(workspace)
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


def _artifact(workspace: Workspace, manifest: artifacts.Manifest) -> dict[str, Any]:
    figures = {name: value for name, value in manifest.metrics.items() if isinstance(value, int | float | str)}
    return {
        "id": manifest.id,
        "created_at": manifest.created_at,
        "bytes": workspace.size(manifest.folder),
        "inputs": manifest.inputs,
        "figures": figures,
    }
