"""The manifest of the data set: what it holds, what it came from, and which data sets it descends from."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

from rayrec.errors import DamagedArtifactError, MismatchError, NotFoundError
from rayrec.storage.workspace import (
    DATASET,
    DATASET_MANIFEST,
    SONGS_TABLE,
    Workspace,
    earlier_manifest,
    histories_file,
    later_songs_file,
    users_file,
)

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2

Times = Literal["real", "positions"]


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


def read_manifest(workspace: Workspace, path: str = DATASET_MANIFEST) -> DatasetManifest:
    """The manifest at a path, the present data set's by default.

    Raises `NotFoundError` where nothing was imported and `DamagedArtifactError` for another schema version.
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
        raw[name] = [tuple(pair) for pair in raw.get(name, [])]
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


def write_manifest(workspace: Workspace, manifest: DatasetManifest) -> None:
    """Write dataset.json: from now on the data set exists."""
    workspace.write_json(DATASET_MANIFEST, asdict(manifest))


def earlier_version(workspace: Workspace, manifest: DatasetManifest, dataset_id: str) -> DatasetManifest:
    """The manifest of the data set itself or of one that it descends from."""
    return manifest if dataset_id == manifest.id else read_manifest(workspace, earlier_manifest(dataset_id))
