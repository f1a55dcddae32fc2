"""Artifacts, folders whose manifest is written last and names what they were made of, and the manifest of the data set.

An artifact's id is the fingerprint of its stage, config and inputs, so the same work finds its
own earlier result (or its unfinished files) again. Repeating it on purpose makes a new attempt,
`<fingerprint>.2`, and leaves the first untouched for the releases that use it.

The manifest of the data set says what it holds, what it came from, and which data sets it descends from.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from rayrec.display import html_figures, html_table
from rayrec.errors import DamagedArtifactError, MismatchError, NotFoundError
from rayrec.storage.workspace import (
    CURRENT,
    DATASET,
    DATASET_MANIFEST,
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

FORMAT_VERSION = 3
BUCKET_COUNTS = b"rayrec counts"  # key of a Parquet file's metadata: JSON of what its bucket came to
RECOMMENDATIONS = "recommendations"  # the kind of artifact that `rayrec recommend --all` writes
NOUNS = {  # kind -> what messages call one of it
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
MADE_BY = {  # kind -> the command that makes one of it
    "descriptions": "describe",
    "songs": "embed",
    "models": "train",
    "added_songs": "songs add",
    "retrieval": "retrieval",
    "rankers": "rank",
    "tastes": "taste",
    "indexes": "index",
    RECOMMENDATIONS: "recommend --all",
    "releases": "release create",
    "reports": "evaluate",
    "tunings": "tune",
}
FITTED = ("songs", "models", "retrieval", "rankers")  # kinds of what is learned from plays

SCHEMA_VERSION = 2
SKIP_BELOW = 0.5  # share of a song below which a play of it counts as skipped, unless the import says otherwise

Times = Literal["real", "positions"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an artifact is and where it came from. Stored as manifest.json, after all other files."""

    kind: str  # one of NOUNS but dataset
    id: str  # unique within its kind
    config: dict[str, Any] = field(default_factory=dict)  # the stage's settings
    inputs: dict[str, str] = field(default_factory=dict)  # role -> id: dataset, split, songs, models, ...
    seed: int = 0  # of the stage's random numbers
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
        figures = {name: value for name, value in self.metrics.items() if isinstance(value, int | float | str)}
        verdict = str(figures.pop("verdict", ""))
        inputs = {f"from {noun(role)}": used for role, used in self.inputs.items()}
        named = {name.replace("_", " "): value for name, value in figures.items()}
        parts = [f"<p>{escape(verdict)}</p>"] if verdict else []
        parts.append(html_figures(noun(self.kind).capitalize(), {"id": self.id, **inputs, **named}))
        for name, rows in self.metrics.items():
            if isinstance(rows, list) and rows and isinstance(rows[0], dict):
                headers = [key for key, value in rows[0].items() if not isinstance(value, list | dict)]
                cells = [[row.get(header) for header in headers] for row in rows]
                parts.append(html_table(name.replace("_", " ").capitalize(), headers, cells))
        return "".join(parts)


def noun(kind: str) -> str:
    """What messages call an artifact of a kind."""
    return NOUNS.get(kind, kind)


def fingerprint(stage: str, config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Twelve hex digits that change when the stage, its config or its inputs change."""
    text = json.dumps([FORMAT_VERSION, stage, config, inputs], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def new_id(workspace: Workspace, kind: str, print_id: str, *, repeat: bool) -> tuple[str, bool]:
    """The id to work under, and whether its artifact is already complete.

    That is the last complete attempt, whether or not earlier ones were deleted. With `repeat` complete artifacts are
    left alone, and the attempt after them is begun or continued.
    """
    matches = [re.fullmatch(rf"{re.escape(print_id)}(?:\.(\d+))?", name) for name in workspace.folders(kind)]
    attempts = {int(match[1] or 1): match[0] for match in matches if match}
    newest_first = sorted(attempts, reverse=True)
    complete = (
        each for each in newest_first if workspace.exists(f"{artifact_dir(kind, attempts[each])}/manifest.json")
    )
    last_complete = next(complete, 0)
    if last_complete and not repeat:
        return attempts[last_complete], True
    attempt = max([last_complete + 1, *attempts])
    return print_id if attempt == 1 else f"{print_id}.{attempt}", False


def sha256(workspace: Workspace, path: str) -> str:
    """The checksum of a stored file, read in blocks."""
    digest = hashlib.sha256()
    with workspace.open_input(path) as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def publish(
    workspace: Workspace, manifest: Manifest, names: Iterable[str], checksums: Mapping[str, str] | None = None
) -> Manifest:
    """Stamp the time and write the manifest: the artifact exists and is the current one.

    `names` are those of its files; `checksums` are the sha256 that their writers returned. Files without one are read.
    What writers that were killed have left in its folder is deleted.
    """
    known = checksums or {}
    workspace.delete_unfinished(manifest.folder)
    files = {name: known.get(name) or sha256(workspace, manifest.path(name)) for name in sorted(names)}
    stamped = Manifest(**{**asdict(manifest), "files": files, "created_at": datetime.now(timezone.utc).isoformat()})
    workspace.write_json(stamped.path("manifest.json"), asdict(stamped))
    make_current(workspace, manifest.kind, manifest.id)
    return stamped


def reuse(workspace: Workspace, kind: str, artifact_id: str) -> Manifest:
    """The artifact that an earlier run of the same work made; it becomes the current one."""
    manifest = load_manifest(workspace, kind, artifact_id)
    make_current(workspace, kind, artifact_id)
    return manifest


def requested_ids(workspace: Workspace) -> dict[str, list[str]]:
    """Kind -> ids of artifacts or splits, each where it was requested last: made then or found in the cache."""
    return dict(workspace.read_json(CURRENT)) if workspace.exists(CURRENT) else {}


def current_ids(workspace: Workspace) -> dict[str, str]:
    """Kind -> id of the artifact or split that was requested last."""
    return {kind: ids[-1] for kind, ids in requested_ids(workspace).items()}


def make_current(workspace: Workspace, kind: str, artifact_id: str) -> None:
    """Later stages start from this artifact unless another one is named."""
    ids = requested_ids(workspace)
    others = [other for other in ids.get(kind, []) if other != artifact_id]
    if ids.get(kind, []) != [*others, artifact_id]:
        workspace.write_json(CURRENT, {**ids, kind: [*others, artifact_id]})


def by_request(workspace: Workspace, kind: str, artifact_ids: Sequence[str]) -> list[str]:
    """Some ids, given oldest first, in the order of their last request; those that were never requested come first."""
    places = {each: place for place, each in enumerate(requested_ids(workspace).get(kind, []))}
    return sorted(artifact_ids, key=lambda each: places.get(each, -1))


def last_requested(workspace: Workspace, kind: str, artifact_ids: Sequence[str]) -> str | None:
    """Of some ids, oldest first, the one that was requested last, else the last; None where there are none."""
    return next(reversed(by_request(workspace, kind, artifact_ids)), None)


def load_manifest(workspace: Workspace, kind: str, artifact_id: str) -> Manifest:
    """The manifest of one artifact.

    Raises `NotFoundError` where there is none (an unfinished artifact has none either) and
    `DamagedArtifactError` for a manifest that is no JSON or has another format version.
    """
    path = f"{artifact_dir(kind, artifact_id)}/manifest.json"
    if not workspace.exists(path):
        known = ", ".join(m.id for m in listing(workspace, kind)) or "none"
        raise NotFoundError(f"{noun(kind)} {artifact_id!r} not found in workspace {workspace.uri}; existing: {known}")
    raw = workspace.read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise DamagedArtifactError(
            f"{path} has format version {raw.get('format_version')}, this rayrec reads {FORMAT_VERSION}; "
            f"delete the folder {artifact_dir(kind, artifact_id)} and run `rayrec {MADE_BY[kind]}`"
        )
    return Manifest(**raw)


def listing(workspace: Workspace, kind: str) -> list[Manifest]:
    """All complete artifacts of a kind, oldest first."""
    manifests = [
        load_manifest(workspace, kind, name)
        for name in workspace.folders(kind)
        if workspace.exists(f"{artifact_dir(kind, name)}/manifest.json")
    ]
    return sorted(manifests, key=lambda manifest: manifest.created_at)


def latest(
    workspace: Workspace, kind: str, fits: Callable[[Manifest], bool] = lambda manifest: True
) -> Manifest | None:
    """Of the artifacts of a kind that fit the one that was requested last; None where none does."""
    fitting = {manifest.id: manifest for manifest in listing(workspace, kind) if fits(manifest)}
    chosen = last_requested(workspace, kind, list(fitting))
    return None if chosen is None else fitting[chosen]


def newest(workspace: Workspace, kind: str) -> Manifest:
    """The current artifact of a kind. Raises `NotFoundError` that names the command to run first."""
    manifest = latest(workspace, kind)
    if manifest is None:
        raise NotFoundError(f"workspace {workspace.uri} has no {noun(kind)}; run `rayrec {MADE_BY[kind]}` first")
    return manifest


def verify(workspace: Workspace, manifest: Manifest, names: Iterable[str] | None = None, *, once: bool = False) -> None:
    """Compare every file, or those of some names, with its checksum; with `once` a node reads each file once.

    Raises `DamagedArtifactError` for the first that differs.
    """
    for name in manifest.files if names is None else names:
        path, expected = manifest.path(name), manifest.files[name]
        if not workspace.exists(path):
            raise DamagedArtifactError(f"{path} is missing; create {noun(manifest.kind)} {manifest.id} again")
        if (workspace.sha256_on_node(path) if once else sha256(workspace, path)) != expected:
            raise DamagedArtifactError(
                f"{path} does not match the checksum in its manifest; create {noun(manifest.kind)} {manifest.id} again"
            )


@dataclass(frozen=True, kw_only=True)
class DatasetManifest:
    """dataset/dataset.json, written after everything it speaks of."""

    id: str  # changes with every import, and where parts are joined
    lineage: str = ""  # id of the data set whose rows of songs it shares, itself where empty
    ancestors: list[str] = field(
        default_factory=list
    )  # ids of those whose parts and songs it begins with, oldest first
    source: str  # the format it came from
    buckets: int  # fixed at the first import
    parts: int  # imports of plays so far; each made a part of the histories, numbered from 0
    joined: list[tuple[int, int]] = field(default_factory=list)  # first and last of parts that share their files
    joined_from: str = ""  # id of the data set of the same plays before parts were joined, itself where empty
    joined_at: str = ""  # ISO 8601, UTC, when parts were last joined
    part_times: list[tuple[int, int]] = field(default_factory=list)  # ms UTC of the first and last play of each part
    users_parts: list[int] = field(default_factory=list)  # bucket by bucket the part whose users file is current
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
    has_likes: bool = False
    read: int = 0  # rows read by the import, with --append by all of them
    merged: int = 0  # exact duplicates merged
    likes: int = 0  # rows read that were likes and no plays
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    config: dict[str, object] = field(default_factory=dict)  # of the import
    last_import: dict[str, object] = field(default_factory=dict)  # summary.ImportSummary
    appended: list[dict[str, object]] = field(default_factory=list)  # part by part: settings, plan, rows and plays
    files: dict[str, str] = field(default_factory=dict)  # path below dataset/ -> sha256
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION

    def descends_from(self, dataset_id: str) -> bool:
        """True for the data set itself and those that it begins with: what was made of them stays of use.

        Song rows agree, songs from their number on are new, and their plays are the first parts.
        """
        return dataset_id == self.id or dataset_id in self.ancestors

    @property
    def skip_below(self) -> float:
        """The share of a song below which a play of it counts as skipped, as the first import of plays says."""
        plays = self.config.get("plays")
        return float(plays.get("skip_below", SKIP_BELOW)) if isinstance(plays, dict) else SKIP_BELOW

    @property
    def plays_id(self) -> str:
        """The id of the plays: the same before and after parts are joined."""
        return self.joined_from or self.id

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First and last part of each set of histories files, one file a bucket, in order."""
        ends, spans, part = dict(self.joined), [], 0
        while part < self.parts:
            spans.append((part, ends.get(part, part)))
            part = spans[-1][1] + 1
        return spans

    def histories_files(self, bucket: int, first_part: int = 0, parts: int | None = None) -> list[str]:
        """The files of a bucket that hold the plays of `first_part` up to `parts`, oldest first.

        Raises `MismatchError` where one of them holds other parts too.
        """
        parts = self.parts if parts is None else parts
        spans = [(first, last) for first, last in self.spans if last >= first_part and first < parts]
        if spans and (spans[0][0] < first_part or spans[-1][1] >= parts):
            raise MismatchError(
                f"parts {first_part} to {parts - 1} of the histories were joined with others by `rayrec compact`; "
                "recompute what was made from them with --force"
            )
        return [histories_file(first, bucket, last) for first, last in spans]

    def files_between(self, bucket: int, first: int, last: int) -> list[str]:
        """The files of a bucket that may hold plays from `first` up to and with `last`, ms UTC."""
        return [
            histories_file(start, bucket, end)
            for start, end in self.spans
            if any(begin <= last and stop >= first for begin, stop in self.part_times[start : end + 1])
        ]

    def current_users_file(self, bucket: int) -> str:
        """The file of the ids of all users of a bucket."""
        return users_file(self.users_parts[bucket] if self.users_parts else 0, bucket)

    def splits_at(self, part: int) -> bool:
        """True where the plays before a part, and those from it on, can be read alone."""
        return part == self.parts or part in [first for first, _ in self.spans]


def read_dataset_manifest(workspace: Workspace, path: str = DATASET_MANIFEST) -> DatasetManifest:
    """The manifest at a path, the present data set's by default.

    Raises `NotFoundError` where nothing was imported and `DamagedArtifactError` for a file that is no JSON or has
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
            f"this rayrec reads {SCHEMA_VERSION}; import the data again"
        )
    for name in ("joined", "part_times"):
        raw[name] = [tuple(pair) for pair in raw[name]]
    return DatasetManifest(**raw)


def read_songs(workspace: Workspace, manifest: DatasetManifest, names: list[str] | None = None) -> "pa.Table":
    """The song table of a data set, columns.SONGS_TABLE or some of its columns, in the order of rows.

    An import writes all songs into songs.parquet, also those that had files of their own. Songs that an unfinished
    import has put behind those of the data set are left out.
    """
    import pyarrow as pa  # commands that only look at the manifest start without it

    tables = [workspace.read_table(SONGS_TABLE, names)]
    rows = len(tables[0])
    while rows < manifest.songs and (path := later_songs_file(rows)).removeprefix(f"{DATASET}/") in manifest.files:
        tables.append(workspace.read_table(path, names))
        rows += len(tables[-1])
    return pa.concat_tables(tables).slice(0, manifest.songs)


def write_dataset_manifest(workspace: Workspace, manifest: DatasetManifest) -> None:
    """Write dataset.json: from now on the data set exists."""
    workspace.write_json(DATASET_MANIFEST, asdict(manifest))


def earlier_version(workspace: Workspace, manifest: DatasetManifest, dataset_id: str) -> DatasetManifest:
    """The manifest of the data set itself or of one that it descends from."""
    return manifest if dataset_id == manifest.id else read_dataset_manifest(workspace, earlier_manifest(dataset_id))
