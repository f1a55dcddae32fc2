"""Artifacts and the manifest of the data set.

An artifact is a folder. Its manifest is written last and names the inputs that the artifact was made from. An
artifact's id is the fingerprint of its stage, config and inputs, so the same work finds its earlier result (or its
unfinished files). A deliberate repetition makes a new attempt, `<fingerprint>.2`, and does not touch the first one,
which releases may use.

The manifest of the data set describes its content, its origin, and the data sets that it descends from.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal

from rayrec.display import html_table, html_values_table
from rayrec.errors import DamagedArtifactError, MismatchError, NotFoundError
from rayrec.storage.workspace import (
    CURRENT_FILE,
    DATASET,
    DATASET_MANIFEST,
    ID,
    IMPORT_STAGING,
    LINEAGES,
    SONGS_TABLE,
    Workspace,
    artifact_dir,
    earlier_manifest,
    histories_file,
    later_songs_file,
    users_file,
)

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 6
BUCKET_COUNTS = b"rayrec counts"  # key of a Parquet file's metadata: JSON with the counts of its bucket
RECOMMENDATIONS = "recommendations"  # the kind of artifact that `rayrec recommend --all` writes
NOUNS = {  # kind -> name of one artifact in messages
    "dataset": "data set",
    "descriptions": "song metadata",
    "songs": "song embeddings",
    "models": "model",
    "added_songs": "added songs",
    "retrieval": "retrievers",
    "rankers": "rankers",
    "tastes": "taste vectors",
    "indexes": "index",
    RECOMMENDATIONS: "recommendations",
    "releases": "release",
    "reports": "report",
    "tunings": "tuning",
}
COMMANDS = {  # kind -> command that makes such an artifact
    "descriptions": "describe",
    "songs": "embed",
    "models": "train",
    "added_songs": "songs add",
    "retrieval": "retrieval",
    "rankers": "rank",
    "tastes": "taste",
    "indexes": "index",
    RECOMMENDATIONS: "recommend --all",
    "reports": "evaluate",
    "tunings": "tune",
    "releases": "release create",
}
KINDS = tuple(COMMANDS)  # every kind of artifact, in the order in which `status` and `verify` list them
FITTED = ("songs", "models", "retrieval", "rankers")  # kinds that are learned from plays

SCHEMA_VERSION = 4
SKIP_BELOW = 0.5  # default share of a song below which a play of it counts as skipped

Times = Literal["real", "positions"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Description of an artifact and its origin. Stored as manifest.json, after all other files."""

    kind: str  # one of NOUNS, except dataset
    id: str  # unique within its kind
    config: dict[str, Any] = field(default_factory=dict)  # the stage's settings
    inputs: dict[str, str] = field(default_factory=dict)  # role -> id: dataset, split, songs, models, ...
    seed: int = 0  # seed of the stage's random numbers
    metrics: dict[str, Any] = field(default_factory=dict)  # figures that the stage reports
    files: dict[str, str] = field(default_factory=dict)  # file name in the folder -> sha256
    created_at: str = ""  # ISO 8601, UTC
    format_version: int = FORMAT_VERSION

    @property
    def folder(self) -> str:
        """The artifact's folder, relative to the workspace."""
        return artifact_dir(self.kind, self.id)

    def path(self, name: str) -> str:
        """The path of one of the artifact's files."""
        return f"{self.folder}/{name}"

    def _repr_html_(self) -> str:
        figures = {
            name.replace("_", " "): value
            for name, value in self.metrics.items()
            if isinstance(value, int | float | str)
        }
        verdict = {"verdict": figures.pop("verdict")} if "verdict" in figures else {}
        inputs = {f"from {noun(role)}": input_id for role, input_id in self.inputs.items()}
        values = {**verdict, "id": self.id, **inputs, **figures}
        tables = [html_values_table(noun(self.kind).capitalize(), values)]
        for name, rows in self.metrics.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                headers = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
                cells = [[row.get(header) for header in headers] for row in rows]
                tables.append(html_table(name.replace("_", " ").capitalize(), headers, cells))
        return "".join(tables)


def noun(kind: str) -> str:
    """Return the name of an artifact of this kind in messages."""
    return NOUNS.get(kind, kind)


def fingerprint(
    stage: str, config: dict[str, Any], inputs: dict[str, str], *, format_version: int | None = None
) -> str:
    """Return twelve hex digits that change when the stage, its config, its inputs or the format version change.

    The format version is by default that of artifacts.
    """
    version = FORMAT_VERSION if format_version is None else format_version
    text = json.dumps([version, stage, config, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def new_id(workspace: Workspace, kind: str, fingerprint_id: str, *, repeat: bool) -> tuple[str, bool]:
    """Return the id to use for an artifact, and whether the artifact is already complete.

    The id is that of the last complete attempt if there is one, even if earlier attempts were deleted. With `repeat`,
    or without a complete attempt, it is the id of the next attempt, which an earlier run may have begun.
    """
    matches = [re.fullmatch(rf"{re.escape(fingerprint_id)}(?:\.(\d+))?", name) for name in workspace.folders(kind)]
    attempts = {int(match[1] or 1): match[0] for match in matches if match}
    newest_first = sorted(attempts, reverse=True)
    complete_attempts = (
        number for number in newest_first if workspace.exists(f"{artifact_dir(kind, attempts[number])}/manifest.json")
    )
    last_complete = next(complete_attempts, 0)
    if last_complete and not repeat:
        return attempts[last_complete], True
    attempt = max([last_complete + 1, *attempts])
    return fingerprint_id if attempt == 1 else f"{fingerprint_id}.{attempt}", False


def sha256(workspace: Workspace, path: str) -> str:
    """Return the sha256 of a stored file, which is read in blocks."""
    digest = hashlib.sha256()
    with workspace.open_input(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def publish(
    workspace: Workspace, manifest: Manifest, names: Iterable[str], checksums: Mapping[str, str] | None = None
) -> Manifest:
    """Write the manifest with the current time: from then on the artifact exists and is the current one.

    `names` are the names of its files. `checksums` maps names to the sha256 that the writers returned; files without
    one are read. Temporary files of killed writers are deleted from the folder.
    """
    known_checksums = checksums or {}
    workspace.delete_unfinished(manifest.folder)
    files = {name: known_checksums.get(name) or sha256(workspace, manifest.path(name)) for name in sorted(names)}
    published = Manifest(**{**asdict(manifest), "files": files, "created_at": datetime.now(timezone.utc).isoformat()})
    workspace.write_json(published.path("manifest.json"), asdict(published))
    make_current(workspace, manifest.kind, manifest.id)
    return published


def reuse(workspace: Workspace, kind: str, artifact_id: str) -> Manifest:
    """Make the artifact of an earlier run of the same work the current one, and return its manifest."""
    manifest = load_manifest(workspace, kind, artifact_id)
    make_current(workspace, kind, artifact_id)
    return manifest


def requested_ids(workspace: Workspace) -> dict[str, list[str]]:
    """Return kind -> ids of artifacts or splits in the order of their last request.

    An artifact is requested when a stage makes it or finds it already made.
    """
    return dict(workspace.read_json(CURRENT_FILE)) if workspace.exists(CURRENT_FILE) else {}


def current_ids(workspace: Workspace) -> dict[str, str]:
    """Return kind -> id of the artifact or split that was requested last."""
    return {kind: ids[-1] for kind, ids in requested_ids(workspace).items()}


def make_current(workspace: Workspace, kind: str, artifact_id: str) -> None:
    """Make an artifact the one that later stages start from by default."""
    ids = requested_ids(workspace)
    other_ids = [other_id for other_id in ids.get(kind, []) if other_id != artifact_id]
    if ids.get(kind, []) != [*other_ids, artifact_id]:
        workspace.write_json(CURRENT_FILE, {**ids, kind: [*other_ids, artifact_id]})


def sort_by_last_request(workspace: Workspace, kind: str, artifact_ids: Sequence[str]) -> list[str]:
    """Return `artifact_ids`, given oldest first, in the order of their last request; ids never requested come first."""
    positions = {artifact_id: position for position, artifact_id in enumerate(requested_ids(workspace).get(kind, []))}
    return sorted(artifact_ids, key=lambda artifact_id: positions.get(artifact_id, -1))


def last_requested(workspace: Workspace, kind: str, artifact_ids: Sequence[str]) -> str | None:
    """Return the one of `artifact_ids`, given oldest first, that was requested last.

    Returns the newest id if none was requested, and None if there are no ids.
    """
    return next(reversed(sort_by_last_request(workspace, kind, artifact_ids)), None)


def load_manifest(workspace: Workspace, kind: str, artifact_id: str) -> Manifest:
    """Load the manifest of one artifact.

    Raises `NotFoundError` if there is none, as for an unfinished artifact or a path in place of an id, and
    `DamagedArtifactError` for a manifest that is not JSON or has another format version.
    """
    path = f"{artifact_dir(kind, artifact_id)}/manifest.json"
    if not (ID.fullmatch(artifact_id) and workspace.exists(path)):
        existing_ids = ", ".join(manifest.id for manifest in listing(workspace, kind)) or "none"
        raise NotFoundError(
            f"{noun(kind)} {artifact_id!r} not found in workspace {workspace.uri}; existing: {existing_ids}"
        )
    raw = workspace.read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise DamagedArtifactError(
            f"{path} has format version {raw.get('format_version')}, but this version of rayrec reads "
            f"{FORMAT_VERSION}; run `rayrec fit`, which makes a release with all its parts, or "
            f"`rayrec {COMMANDS[kind]}` for this {noun(kind)} alone"
        )
    return Manifest(**raw)


def listing(workspace: Workspace, kind: str) -> list[Manifest]:
    """Return the manifests of all complete artifacts of a kind, oldest first.

    Artifacts of other format versions are left out, see `ids_of_other_versions`: no command can use them, and what a
    command makes again has another id.
    """
    manifests = [
        Manifest(**raw)
        for raw in _raw_manifests(workspace, kind).values()
        if raw.get("format_version") == FORMAT_VERSION
    ]
    return sorted(manifests, key=lambda manifest: manifest.created_at)


def ids_of_other_versions(workspace: Workspace, kind: str) -> list[str]:
    """Return the ids of the complete artifacts of a kind that have another format version."""
    raw_manifests = _raw_manifests(workspace, kind)
    return [name for name, raw in raw_manifests.items() if raw.get("format_version") != FORMAT_VERSION]


def _raw_manifests(workspace: Workspace, kind: str) -> dict[str, dict[str, Any]]:
    """Return id -> content of the manifest, of all complete artifacts of a kind."""
    paths = {name: f"{artifact_dir(kind, name)}/manifest.json" for name in workspace.folders(kind)}
    return {name: workspace.read_json(path) for name, path in paths.items() if workspace.exists(path)}


def latest(
    workspace: Workspace, kind: str, fits: Callable[[Manifest], bool] = lambda manifest: True
) -> Manifest | None:
    """Return the artifact that was requested last among those of a kind that fit; None if none fits."""
    matching = {manifest.id: manifest for manifest in listing(workspace, kind) if fits(manifest)}
    last_id = last_requested(workspace, kind, list(matching))
    return None if last_id is None else matching[last_id]


def newest(workspace: Workspace, kind: str) -> Manifest:
    """Return the current artifact of a kind. Raises `NotFoundError` with the command to run first if there is none."""
    manifest = latest(workspace, kind)
    if manifest is None:
        raise NotFoundError(f"workspace {workspace.uri} has no {noun(kind)}; run `rayrec {COMMANDS[kind]}` first")
    return manifest


def verify(
    workspace: Workspace, manifest: Manifest, names: Iterable[str] | None = None, *, once_per_node: bool = False
) -> None:
    """Compare the files of an artifact, all or those in `names`, with their checksums.

    With `once_per_node`, only one process of a node reads a file, for all processes of the node.
    Raises `DamagedArtifactError` for the first file that differs.
    """
    remedy = f"delete the folder {manifest.folder} and run `rayrec {COMMANDS[manifest.kind]}`"
    for name in manifest.files if names is None else names:
        path, expected = manifest.path(name), manifest.files[name]
        if not workspace.exists(path):
            raise DamagedArtifactError(f"{path} is missing; {remedy}")
        if (workspace.sha256_on_node(path) if once_per_node else sha256(workspace, path)) != expected:
            raise DamagedArtifactError(f"{path} does not match the checksum in its manifest; {remedy}")


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """The manifest of the data set, dataset/dataset.json. It is written after all files that it names."""

    id: str  # changes with every import, and when parts are joined
    lineage: str = ""  # id of the data set whose song rows it shares; empty: its own id
    # ids of the data sets whose parts and songs it begins with, oldest first
    ancestors: list[str] = field(default_factory=list)
    source: str  # the format of the imported files
    buckets: int  # fixed at the first import
    parts: int  # number of parts of the histories; each import of plays adds one, numbered from 0
    joined_parts: list[tuple[int, int]] = field(default_factory=list)  # (first, last) of parts with joined files
    joined_from: str = ""  # id of the data set with the same plays before parts were joined; empty: its own id
    joined_at: str = ""  # when parts were last joined, ISO 8601, UTC
    part_times: list[tuple[int, int]] = field(default_factory=list)  # ms UTC of the first and last play of each part
    users_parts: list[int] = field(default_factory=list)  # per bucket: the part whose users file is current
    users: int
    plays: int
    songs: int
    playlists: int = 0
    playlist_entries: int = 0
    first_play: int = 0  # ms UTC
    last_play: int = 0  # ms UTC
    times: Times = "real"  # positions: times give only the order of a user's plays
    contexts: list[str] = field(default_factory=list)  # name of each bit of the context masks, at most 31
    has_skipped: bool = False
    has_likes: bool = False
    read: int = 0  # rows read by the import and by later appends
    merged: int = 0  # exact duplicates merged
    likes: int = 0  # rows read that were likes but not plays
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    config: dict[str, object] = field(default_factory=dict)  # settings of the import
    last_import: dict[str, object] = field(default_factory=dict)  # import_plan.ImportSummary
    appended: list[dict[str, object]] = field(default_factory=list)  # per appended part: settings, plan, rows and plays
    files: dict[str, str] = field(default_factory=dict)  # path below dataset/ -> sha256
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION

    def descends_from(self, dataset_id: str) -> bool:
        """True if `dataset_id` is this data set or one that it extends, so that artifacts of it stay valid.

        Both data sets share song rows: songs beyond those of the earlier data set are new, and its plays are the first
        parts of this one.
        """
        return dataset_id == self.id or dataset_id in self.ancestors

    @property
    def skip_below(self) -> float:
        """The share of a song below which a play of it counts as skipped, from the first import of plays."""
        plays = self.config.get("plays")
        return float(plays.get("skip_below", SKIP_BELOW)) if isinstance(plays, dict) else SKIP_BELOW

    @property
    def plays_id(self) -> str:
        """The id of the plays: the same before and after parts are joined."""
        return self.joined_from or self.id

    @property
    def spans(self) -> list[tuple[int, int]]:
        """The (first, last) part of each set of histories files, in order. A set has one file per bucket."""
        last_parts, spans, part = dict(self.joined_parts), [], 0
        while part < self.parts:
            spans.append((part, last_parts.get(part, part)))
            part = spans[-1][1] + 1
        return spans

    def histories_files(self, bucket: int, first_part: int = 0, parts: int | None = None) -> list[str]:
        """Return the files of a bucket with the plays of the parts from `first_part` up to, not including, `parts`.

        The files come oldest first. Raises `MismatchError` if one of them holds other parts too.
        """
        parts = self.parts if parts is None else parts
        spans = [(first, last) for first, last in self.spans if last >= first_part and first < parts]
        if spans and (spans[0][0] < first_part or spans[-1][1] >= parts):
            raise MismatchError(
                f"parts {first_part} to {parts - 1} of the histories share files with other parts since "
                "`rayrec compact`; recompute what was made from them with --force"
            )
        return [histories_file(first, bucket, last) for first, last in spans]

    def files_between(self, bucket: int, first: int, last: int) -> list[str]:
        """Return the files of a bucket that may hold plays from `first` to `last`, both inclusive, ms UTC."""
        return [
            histories_file(first_part, bucket, last_part)
            for first_part, last_part in self.spans
            if any(
                first_time <= last and last_time >= first
                for first_time, last_time in self.part_times[first_part : last_part + 1]
            )
        ]

    def current_users_file(self, bucket: int) -> str:
        """Return the file with the ids of all users of a bucket."""
        return users_file(self.users_parts[bucket] if self.users_parts else 0, bucket)

    def splits_at(self, part: int) -> bool:
        """True if no file holds both plays before `part` and plays from `part` on."""
        return part == self.parts or part in [first for first, _ in self.spans]


# Fields of a data set manifest that say where its rows came from and when: they differ if the same rows are imported
# again.
ORIGIN_FIELDS = (
    *("source", "read", "merged", "likes", "rejected"),
    *("config", "last_import", "appended", "joined_at", "created_at"),
)


def content_checksum(manifest: DatasetManifest) -> str:
    """Return a sha256 of all fields of a data set manifest that are equal for every import of the same rows.

    The checksums of earlier manifests are left out, too: those manifests hold origins.
    """
    fields = {name: value for name, value in asdict(manifest).items() if name not in ORIGIN_FIELDS}
    fields["files"] = {path: digest for path, digest in manifest.files.items() if not path.startswith("earlier/")}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_dataset_manifest(workspace: Workspace, path: str = DATASET_MANIFEST) -> DatasetManifest:
    """Read a data set manifest, by default that of the current data set.

    Raises `NotFoundError` if nothing was imported, and `DamagedArtifactError` for a file that is not JSON or has
    another schema version.
    """
    if path == DATASET_MANIFEST and not workspace.exists(path):
        raise NotFoundError(
            f"workspace {workspace.uri} has no data set; run `rayrec import` or `rayrec generate` first"
        )
    raw = workspace.read_json(path)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise DamagedArtifactError(
            f"{path} has schema version {raw.get('schema_version')}, "
            f"but this version of rayrec reads {SCHEMA_VERSION}; delete the folder {DATASET} of the workspace and run "
            "`rayrec fit` or `rayrec import`"
        )
    for name in ("joined_parts", "part_times"):
        raw[name] = [tuple(pair) for pair in raw[name]]
    return DatasetManifest(**raw)


def read_staged_manifests(workspace: Workspace) -> list[DatasetManifest]:
    """Return the manifests of complete data sets that a killed run has published in part, or not yet."""
    paths = [f"{IMPORT_STAGING}/{name}/out/dataset.json" for name in workspace.folders(IMPORT_STAGING)]
    return [read_dataset_manifest(workspace, path) for path in paths if workspace.exists(path)]


def dataset_checksums(
    workspace: Workspace, manifest: DatasetManifest, staged_manifests: Iterable[DatasetManifest]
) -> dict[str, str]:
    """Return path in the workspace -> sha256 that the file must have, of the files of the current data set.

    A killed run may have moved the song table of one of `staged_manifests` into place, which also holds the songs of
    this data set: then its checksum applies.
    """
    checksums = {f"{DATASET}/{path}": digest for path, digest in manifest.files.items()}
    staged_digests = {staged.files.get(SONGS_TABLE.removeprefix(f"{DATASET}/")) for staged in staged_manifests}
    if (
        staged_digests
        and workspace.exists(SONGS_TABLE)
        and (digest := sha256(workspace, SONGS_TABLE)) in staged_digests
    ):
        checksums[SONGS_TABLE] = digest
    return checksums


def read_songs(workspace: Workspace, manifest: DatasetManifest, names: list[str] | None = None) -> "pa.Table":
    """Read the song table of a data set: columns.SONGS_TABLE, or the columns `names` of it, in the order of song rows.

    An import writes all songs into songs.parquet, including those that had separate files before. Songs that an
    unfinished import has appended are left out.
    """
    import pyarrow as pa  # imported here, so that commands that read only the manifest start faster

    tables = [workspace.read_table(SONGS_TABLE, names)]
    rows = len(tables[0])
    while rows < manifest.songs and (path := later_songs_file(rows)).removeprefix(f"{DATASET}/") in manifest.files:
        tables.append(workspace.read_table(path, names))
        rows += len(tables[-1])
    return pa.concat_tables(tables).slice(0, manifest.songs)


def write_dataset_manifest(workspace: Workspace, manifest: DatasetManifest) -> None:
    """Write dataset.json; from then on the data set exists."""
    record_lineage(workspace, manifest)
    workspace.write_json(DATASET_MANIFEST, asdict(manifest))


def record_lineage(workspace: Workspace, manifest: DatasetManifest) -> None:
    """Record the lineage of a data set, before it is published; the lineage stays known if it is replaced."""
    workspace.write_bytes(f"{LINEAGES}/{manifest.lineage or manifest.id}", b"")


def read_lineages(workspace: Workspace) -> list[str]:
    """Return the lineages of a workspace's data sets, including those that were replaced."""
    return [path.removeprefix(f"{LINEAGES}/") for path in workspace.files(LINEAGES)]


def earlier_version(workspace: Workspace, manifest: DatasetManifest, dataset_id: str) -> DatasetManifest:
    """Return the manifest of the data set itself, or read that of a data set that it descends from."""
    return manifest if dataset_id == manifest.id else read_dataset_manifest(workspace, earlier_manifest(dataset_id))
