"""The manifest of the data set: what it holds, what it came from, and which data sets it descends from."""

from dataclasses import asdict, dataclass, field
from typing import Literal

from rayrec.errors import DamagedArtifactError, NotFoundError
from rayrec.storage.workspace import DATASET_MANIFEST, Workspace, earlier_manifest

SCHEMA_VERSION = 1

Times = Literal["real", "positions"]


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """dataset/dataset.json, written after everything it speaks of."""

    id: str  # changes with every import
    lineage: str = ""  # id of the data set whose rows of songs it shares, itself where empty
    ancestors: list[str] = field(
        default_factory=list
    )  # ids of those whose parts and songs it begins with, oldest first
    source: str  # the format it came from
    buckets: int  # fixed at the first import
    parts: int  # parts of the histories, numbered from 0
    users: int
    plays: int
    songs: int
    playlists: int = 0
    playlist_entries: int = 0
    first_play: int = 0  # ms UTC
    last_play: int = 0  # ms UTC
    times: Times = "real"  # positions: times say in which order a user's plays came, and nothing else
    contexts: list[str] = field(default_factory=list)  # name of each bit, at most 31
    has_skipped: bool = False
    read: int = 0  # rows read by the import, with --append by all of them
    merged: int = 0  # exact duplicates merged
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    config: dict[str, object] = field(default_factory=dict)  # of the import
    appended: list[dict[str, object]] = field(default_factory=list)  # part by part: settings, plan, rows and plays
    files: dict[str, str] = field(default_factory=dict)  # path below dataset/ -> sha256
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION

    def descends_from(self, dataset_id: str) -> bool:
        """True for the data set itself and those that it begins with: what was made of them stays of use.

        Song rows agree, songs from their number on are new, and their plays are the first parts.
        """
        return dataset_id == self.id or dataset_id in self.ancestors


def read_manifest(workspace: Workspace, path: str = DATASET_MANIFEST) -> DatasetManifest:
    """The manifest at a path, the present data set's by default.

    Raises `NotFoundError` where nothing was imported and `DamagedArtifactError` for another schema version.
    """
    if path == DATASET_MANIFEST and not workspace.exists(path):
        raise NotFoundError(
            f"workspace {workspace.uri} holds no data set; run `rayrec import` or `rayrec generate` first"
        )
    raw = workspace.read_json(path)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise DamagedArtifactError(
            f"{path} has schema version {raw.get('schema_version')}, "
            f"this rayrec reads {SCHEMA_VERSION}; import the data again"
        )
    return DatasetManifest(**raw)


def write_manifest(workspace: Workspace, manifest: DatasetManifest) -> None:
    """Write dataset.json: from now on the data set exists."""
    workspace.write_json(DATASET_MANIFEST, asdict(manifest))


def earlier_version(workspace: Workspace, manifest: DatasetManifest, dataset_id: str) -> DatasetManifest:
    """The manifest of the data set itself or of one that it descends from."""
    return manifest if dataset_id == manifest.id else read_manifest(workspace, earlier_manifest(dataset_id))
