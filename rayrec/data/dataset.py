"""The canonical data set of a workspace: its buckets of histories, its playlists, its catalog and its deleted users.

Each import of plays adds a part to the histories; readers merge the parts and return every user once. A part is written
once and never changed. It has one file per bucket, which may be empty. Users in a file are sorted by ascending id, so
that files can be merged while they are read. `rayrec compact` joins parts: one file of a bucket then holds the plays of
several parts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS, DESCRIPTIONS_FILE, Catalog, Content, described
from rayrec.data.histories import Histories, concatenate, user_hash
from rayrec.data.ragged import offsets_of
from rayrec.data.spelling import spell_id
from rayrec.data.windows import NEVER
from rayrec.display import html_values_table
from rayrec.errors import DamagedArtifactError, MismatchError, NotFoundError
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest, earlier_version, read_dataset_manifest, read_songs
from rayrec.storage.workspace import FORGOTTEN, PLAYLISTS, Workspace

PLAYS_PER_READ = 1_000_000  # approximate number of plays decoded at once; the plays of one user are never split
SONGS_COLUMN = 1  # index of the songs in a histories file, after the user id

PENDING_DELETIONS = (
    f"{FORGOTTEN}/waiting"  # one empty file, named DIGEST-MOMENT, per deletion whose rows are not erased yet
)
ERASED_FILE = f"{FORGOTTEN}/erased.json"  # users whose rows are erased: digest -> ms UTC of the last deletion
DIGEST_PURPOSE = b"rayrec forgotten"  # makes the digests differ from digests of the same ids in any other list


def read_files(workspace: Workspace, paths: Sequence[str], users_per_batch: int) -> Iterator[Histories]:
    """Yield the users of several files of a bucket in batches, each user once, by ascending id.

    Memory: one batch per file. A batch holds at most `users_per_batch` users, and fewer if they
    have many plays. Raises `DamagedArtifactError` for a file whose users are not sorted by id.
    """
    if len(paths) <= 1:
        for path in paths:
            yield from _read_file(workspace, path, users_per_batch)
        return
    readers = [_RowReader(path, _read_file(workspace, path, users_per_batch)) for path in paths]
    while last_ids := [last_id for reader in readers if (last_id := reader.last_id()) is not None]:
        # Every file has been read up to the lowest of these ids, so no later batch holds a user up to it.
        merged = merge_users([reader.take_up_to(min(last_ids)) for reader in readers])
        for start in range(0, len(merged), users_per_batch):
            yield merged.take(np.arange(start, min(start + users_per_batch, len(merged))))


def read_users(workspace: Workspace, path: str) -> np.ndarray:
    """object (U,): the ids of the users in one file, in the order of the file."""
    return np.asarray(workspace.read_table(path, [columns.USER]).column(columns.USER).to_numpy())


def read_overlap(workspace: Workspace, path: str, user_ids: np.ndarray, first: int, last: int) -> Iterator[Histories]:
    """Yield the row groups of a file that may hold plays of `user_ids` from `first` to `last` (ms UTC, inclusive).

    `user_ids`, object (U,), must be ascending.
    """
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for group_index in range(file.num_row_groups):
            group = file.metadata.row_group(group_index)
            low, high = _column_range(group, columns.USER)
            earliest, latest = _column_range(group, columns.PLAYED_AT)
            if earliest is not None and (earliest > last or latest < first):
                continue
            if low is not None and np.searchsorted(user_ids, low) == np.searchsorted(user_ids, high, side="right"):
                continue
            yield Histories.from_arrow(file.read_row_group(group_index))


def _column_range(group: pq.RowGroupMetaData, name: str) -> tuple[Any, Any]:
    """Return the minimum and the maximum of a column of a row group; None for both if the file does not store them."""
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema.split(".")[0] == name:
            stats = column.statistics
            return (stats.min, stats.max) if stats is not None and stats.has_min_max else (None, None)
    return None, None


def find_users(workspace: Workspace, path: str, user_ids: np.ndarray) -> Iterator[Histories]:
    """Yield the rows of `user_ids`, object (U,) ascending, in one file; row groups without these users are skipped."""
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for group_index in range(file.num_row_groups):
            low, high = _column_range(file.metadata.row_group(group_index), columns.USER)
            if low is not None and np.searchsorted(user_ids, low) == np.searchsorted(user_ids, high, side="right"):
                continue
            ids = file.read_row_group(group_index, columns=[columns.USER]).column(columns.USER)
            is_requested = pc.is_in(ids, value_set=pa.array(user_ids, ids.type))
            if pc.any(is_requested).as_py():
                yield Histories.from_arrow(file.read_row_group(group_index).filter(is_requested))


def merge_users(parts: Sequence[Histories]) -> Histories:
    """Return each user of the parts once, by ascending id, with all plays in the order of time.

    Plays of the same moment stay in the order of the parts. If only some parts have contexts, skips or likes,
    the plays of the other parts count as without contexts, not skipped and not liked. A like that is in two parts is
    kept once.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    combined = concatenate(_with_same_columns(parts))
    merged = _merge_by_user(combined)
    return merged if combined.likes is None else replace(merged, likes=_unique_likes(_merge_by_user(combined.likes)))


def _merge_by_user(histories: Histories) -> Histories:
    """Merge the rows of each user into one, with users by ascending id and plays in the order of time."""
    user_ids, user_rows = np.unique(histories.user_ids, return_inverse=True)
    play_users = user_rows[histories.rows]
    order = np.lexsort((histories.played_at, play_users))
    counts = np.bincount(play_users, minlength=len(user_ids))
    return Histories(
        user_ids=user_ids,
        offsets=offsets_of(counts),
        **histories.columns_at(order),
    )


def _unique_likes(likes: Histories) -> Histories:
    """Remove likes that repeat the user, the song and the moment of an earlier like."""
    keys = np.stack([likes.rows, likes.played_at, likes.songs])
    is_first = np.zeros(likes.num_plays, dtype=bool)
    is_first[np.unique(keys, axis=1, return_index=True)[1]] = True
    return likes.keep(is_first)


def with_columns(histories: Histories, *, contexts: bool, skipped: bool, likes: bool) -> Histories:
    """Add each requested column that the histories lack: empty contexts, no skips, no likes."""
    if contexts and histories.contexts is None:
        histories = replace(histories, contexts=np.zeros(histories.num_plays, dtype=np.int32))
    if skipped and histories.skipped is None:
        histories = replace(histories, skipped=np.zeros(histories.num_plays, dtype=np.bool_))
    if likes and histories.likes is None:
        empty = [()] * len(histories)
        histories = replace(histories, likes=Histories.from_lists(empty, empty, histories.user_ids.tolist()))
    return histories


class _RowReader:
    """Reads the rows of one file and checks that they are sorted by ascending user id."""

    def __init__(self, path: str, batches: Iterator[Histories]) -> None:
        self._path, self._batches = path, batches
        self._batch = Histories.from_lists([], [])

    def last_id(self) -> str | None:
        """Return the last user of the current batch, after reading a batch if needed; None at the end of the file."""
        if not len(self._batch):
            previous_id, self._batch = self._last_of_batch(), next(self._batches, self._batch)
            ids = self._batch.user_ids
            if (ids[1:] <= ids[:-1]).any() or (previous_id is not None and len(ids) and ids[0] <= previous_id):
                raise DamagedArtifactError(
                    f"{self._path} is damaged: its users are not unique and sorted by ID; import the data again with "
                    "--force"
                )
        return self._last_of_batch()

    def take_up_to(self, user_id: str) -> Histories:
        """Remove the rows up to and including `user_id` from the current batch, and return them."""
        end = int(np.searchsorted(self._batch.user_ids, user_id, side="right"))
        batch, self._batch = self._batch.take(np.arange(end)), self._batch.take(np.arange(end, len(self._batch)))
        return batch

    def _last_of_batch(self) -> str | None:
        return str(self._batch.user_ids[-1]) if len(self._batch) else None


def _read_file(workspace: Workspace, path: str, users_per_batch: int) -> Iterator[Histories]:
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for groups in _row_group_runs(file.metadata):
            for batch in file.iter_batches(batch_size=users_per_batch, row_groups=groups):
                if batch.num_rows:
                    yield Histories.from_arrow(batch)


def _row_group_runs(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Yield lists of consecutive row groups that hold at most PLAYS_PER_READ plays together, or one large row group.

    A batch is read from one list only. Because row groups are cut by plays, a batch of users with long histories holds
    fewer users.
    """
    groups: list[int] = []
    plays = 0
    for group in range(metadata.num_row_groups):
        group_plays = metadata.row_group(group).column(SONGS_COLUMN).num_values
        if groups and plays + group_plays > PLAYS_PER_READ:
            yield groups
            groups, plays = [], 0
        groups.append(group)
        plays += group_plays
    if groups:
        yield groups


def _with_same_columns(parts: Sequence[Histories]) -> list[Histories]:
    """Return the parts with the same columns, and without totals."""
    has_contexts = any(part.contexts is not None for part in parts)
    has_skipped = any(part.skipped is not None for part in parts)
    has_likes = any(part.likes is not None for part in parts)
    return [
        replace(with_columns(part, contexts=has_contexts, skipped=has_skipped, likes=has_likes), totals=None)
        for part in parts
    ]


class Dataset:
    """Reads the data set of a workspace, bucket by bucket.

    Raises `NotFoundError` if nothing was imported, and `DamagedArtifactError` if the schema version is another one.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.manifest = read_dataset_manifest(workspace)

    def _repr_html_(self) -> str:
        names = ("id", "source", "plays", "users", "songs", "playlists")
        return html_values_table("Data set", {name: getattr(self.manifest, name) for name in names})

    @property
    def num_songs(self) -> int:
        """N: the number of rows of the song table."""
        return self.manifest.songs

    @property
    def lineage(self) -> str:
        """An id that is equal for data sets in which each common song has the same row."""
        return self.manifest.lineage or self.manifest.id

    def bucket_of(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the bucket that holds each user."""
        return bucket_of(user_ids, self.manifest.buckets)

    def descends_from(self, dataset_id: str) -> bool:
        """True if `dataset_id` is this data set or an earlier version of it, whose artifacts can still be used.

        Songs of the earlier version keep their rows, new songs follow after them, and its plays are the first parts.
        """
        return self.manifest.descends_from(dataset_id)

    def earlier(self, dataset_id: str) -> DatasetManifest:
        """Return the manifest of this data set or of one that it descends from."""
        return earlier_version(self.workspace, self.manifest, dataset_id)

    def plays_id_of(self, dataset_id: str) -> str:
        """Return the id of the plays of a data set that this one descends from; `dataset_id` itself for another one."""
        return self.earlier(dataset_id).plays_id if self.descends_from(dataset_id) else dataset_id

    def read_bucket(self, bucket: int, users_per_batch: int = 5_000, *, first_part: int = 0) -> Iterator[Histories]:
        """Yield the histories of one bucket in batches, each user once, by ascending id.

        With `first_part`, read only the plays of that part and later ones, and only users who have such plays. A batch
        holds at most `users_per_batch` users, fewer if histories are long: memory is bounded by 1 million plays per
        part plus the longest history.
        """
        files = self.manifest.histories_files(bucket, first_part)
        for histories in read_files(self.workspace, files, users_per_batch):
            if first_part and histories.likes is not None:  # drop users who have likes but no plays in these parts
                histories = histories.take(histories.lengths > 0)
            yield self._with_columns(histories)

    def bucket_users(self, bucket: int, parts: int | None = None) -> np.ndarray:
        """object (U,), ascending: the users of a bucket with plays or likes in the first `parts` parts, or in all."""
        files = self.manifest.histories_files(bucket, parts=parts)
        ids = [read_users(self.workspace, path) for path in files]
        return np.unique(np.concatenate([np.zeros(0, dtype=object), *ids]))

    def read_all(self, users_per_batch: int = 5_000) -> Iterator[Histories]:
        """Yield the histories of all buckets in batches."""
        for bucket in range(self.manifest.buckets):
            yield from self.read_bucket(bucket, users_per_batch)

    def history(self, user_id: str) -> Histories:
        """Return one user's history. Raises `NotFoundError` for a user without plays and likes."""
        history = self.histories([user_id])
        if not (history.num_plays or (history.likes is not None and history.likes.num_plays)):
            raise NotFoundError(f"user {user_id!r} not found in the data set; check the ID or import the user's plays")
        return history

    def histories(self, user_ids: Sequence[str]) -> Histories:
        """Return the histories of `user_ids`, in that order; unknown users have no plays. Each file is opened once.

        Deleted users are unknown, even if their plays are not erased yet.
        """
        ids = np.array([spell_id(user_id) or user_id for user_id in user_ids], dtype=object)
        buckets = self.bucket_of(ids)
        parts: list[Histories] = []
        for bucket in np.unique(buckets).tolist():
            for path in self.manifest.histories_files(bucket):
                parts += find_users(self.workspace, path, np.unique(ids[buckets == bucket]))
        merged = merge_users(parts)
        is_deleted = read_pending_deletions(self.workspace).holds(merged.user_ids)
        merged = merged.take(~is_deleted)
        missing_ids = np.setdiff1d(ids, merged.user_ids).tolist()
        empty = [()] * len(missing_ids)
        all_histories = concatenate(_with_same_columns([merged, Histories.from_lists(empty, empty, missing_ids)]))
        row_of = {user_id: row for row, user_id in enumerate(all_histories.user_ids.tolist())}
        return self._with_columns(
            all_histories.take(np.array([row_of[user_id] for user_id in ids.tolist()], dtype=np.int64))
        )

    def _with_columns(self, histories: Histories) -> Histories:
        """Add the columns of the data set that the parts of these histories lack."""
        if self.manifest.parts == 1:
            return histories
        manifest = self.manifest
        return with_columns(
            histories, contexts=bool(manifest.contexts), skipped=manifest.has_skipped, likes=manifest.has_likes
        )

    def read_playlists(self, playlists_per_batch: int = 5_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield playlists in batches: songs int32 (P,) and offsets int64 (playlists + 1,)."""
        for path in self.playlist_files():
            yield from self.read_playlist_file(path, playlists_per_batch)

    def playlist_files(self) -> list[str]:
        """The files that hold the playlists, sorted."""
        return self.workspace.files(PLAYLISTS)

    def read_playlist_file(
        self, path: str, playlists_per_batch: int = 5_000
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the playlists of one file in the form of `read_playlists`."""
        with self.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=playlists_per_batch):
                lists = batch.column(columns.SONGS)
                offsets = lists.offsets.to_numpy().astype(np.int64)
                yield lists.flatten().to_numpy(), offsets - offsets[0]

    def catalog(self) -> Catalog:
        """Return the song table, in memory, with the descriptions of songs.

        Songs that an unfinished import has already appended to the table are left out.
        """
        table = read_songs(self.workspace, self.manifest)
        descriptions = self.descriptions()
        if descriptions:
            paths = [description.path(DESCRIPTIONS_FILE) for description in descriptions]
            table = described(table, [self.workspace.read_table(path) for path in paths])
        return Catalog(table)

    def model(self, model_id: str | None = None) -> Manifest:
        """Return a model of this data set or of one that it descends from; the current model by default.

        Raises `NotFoundError` if there is none, and `MismatchError` for a model of other data.
        """
        model = (
            artifacts.load_manifest(self.workspace, "models", model_id)
            if model_id is not None
            else artifacts.newest(self.workspace, "models")
        )
        if not self.descends_from(model.inputs["dataset"]):
            raise MismatchError(
                f"model {model.id} was trained on data set {model.inputs['dataset']}, but the workspace holds "
                f"{self.manifest.id}; run `rayrec embed` and `rayrec train` first"
            )
        return model

    def newest_base(self, kind: str, fits: Callable[[Manifest], bool]) -> tuple[int, Manifest | None]:
        """Return the first part that is new to the artifact to continue from, and that artifact; (0, None) without one.

        It is the newest of the artifacts that know the most parts of this data set's plays. An artifact is left out if
        its last part was joined with later ones, because the new plays cannot be read alone.
        """
        candidates = [
            (self.earlier(artifact.inputs["dataset"]).parts, artifact)
            for artifact in artifacts.listing(self.workspace, kind)
            if self.descends_from(artifact.inputs["dataset"]) and fits(artifact)
        ]
        readable = [(parts, artifact) for parts, artifact in candidates if self.manifest.splits_at(parts)]
        return max(reversed(readable), key=lambda candidate: candidate[0], default=(0, None))

    def descriptions(self) -> list[Manifest]:
        """Return the descriptions of songs, of this data set and of those that it descends from, oldest first."""
        manifests = artifacts.listing(self.workspace, DESCRIPTIONS)
        return [manifest for manifest in manifests if self.descends_from(manifest.inputs["dataset"])]

    def content(self) -> Content:
        """Return the content vectors of the catalog's songs."""
        table = read_songs(self.workspace, self.manifest, [columns.SONG_ID])
        return Content.load(self.workspace, self.descriptions(), columns.one_array(table.column(columns.SONG_ID)))


def bucket_of(user_ids: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (U,): the bucket of each user among `buckets`, by a hash that never changes."""
    return (user_hash(user_ids) % np.uint64(buckets)).astype(np.int64)


@dataclass(frozen=True)
class ForgottenUsers:
    """Deleted users: they are hidden at once, and their old plays are never accepted again.

    An entry is a digest of a user's id and the moment of the deletion. Imports, loads and requests reject plays up to
    that moment; later plays are those of a new user. A new entry is an empty file, so that any process can add one
    without a lock. After a compaction has erased the users' rows, their entries move to one list.

    The digest has no key: every replica and every later import must compute the same digest, and a key that all of them
    read would be stored next to the list. The digest hides an id from a reader of the list, but not from someone who
    guesses the id.
    """

    moments: Mapping[str, int]  # digest of a user's id -> ms UTC of the last deletion

    def __len__(self) -> int:
        return len(self.moments)

    def until(self, user_ids: Iterable[str]) -> np.ndarray:
        """int64 (U,): ms UTC of each user's last deletion, NEVER for users who were not deleted."""
        ids = list(user_ids)
        if not self.moments:
            return np.full(len(ids), NEVER)
        return np.array([self.moments.get(user_digest(user_id), NEVER) for user_id in ids], dtype=np.int64)

    def holds(self, user_ids: Iterable[str]) -> np.ndarray:
        """bool (U,): which users were deleted."""
        is_deleted: np.ndarray = self.until(user_ids) != NEVER
        return is_deleted

    def scrub(self, value: Any) -> Any:
        """Return a JSON value with an empty text for each text that is a deleted user's id or a path with one."""
        if isinstance(value, str):
            return "" if self._names_deleted_user(value) else value
        if isinstance(value, Mapping):
            return {self.scrub(key): self.scrub(item) for key, item in value.items()}
        return [self.scrub(item) for item in value] if isinstance(value, list | tuple) else value

    def _names_deleted_user(self, text: str) -> bool:
        parts = [text, *text.split("/")]
        # A file may be named after its user, followed by extensions such as .csv.gz.
        parts += [part[:index] for part in parts for index, letter in enumerate(part) if letter == "." and index]
        return any(user_digest(user_id) in self.moments for part in parts if (user_id := spell_id(part)) is not None)


NO_FORGOTTEN_USERS = ForgottenUsers({})


def user_digest(user_id: str) -> str:
    """Return 32 hex digits that identify a user; the id cannot be derived from them."""
    return blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=16, person=DIGEST_PURPOSE).hexdigest()


def mark_forgotten(workspace: Workspace, user_ids: Sequence[str], at: int) -> None:
    """Record that users, known or unknown, were deleted at the moment `at`, ms UTC. They are hidden from now on."""
    for user_id in user_ids:
        workspace.write_bytes(f"{PENDING_DELETIONS}/{user_digest(user_id)}-{at}", b"")


def read_pending_deletions(workspace: Workspace) -> ForgottenUsers:
    """Return the deleted users whose rows are not erased yet, from one listing of files."""
    return _latest_deletions(_parse_entry(path) for path in workspace.files(PENDING_DELETIONS))


def read_forgotten(workspace: Workspace) -> ForgottenUsers:
    """Return all deleted users."""
    erased = workspace.read_json(ERASED_FILE) if workspace.exists(ERASED_FILE) else {}
    return _latest_deletions([*erased.items(), *read_pending_deletions(workspace).moments.items()])


def mark_erased(workspace: Workspace, waiting: ForgottenUsers) -> None:
    """Record that the rows of the users in `waiting` are erased. Newer entries stay. Safe to repeat if interrupted."""
    erased = workspace.read_json(ERASED_FILE) if workspace.exists(ERASED_FILE) else {}
    workspace.write_json(ERASED_FILE, dict(_latest_deletions([*erased.items(), *waiting.moments.items()]).moments))
    for path in workspace.files(PENDING_DELETIONS):
        digest, at = _parse_entry(path)
        if at <= waiting.moments.get(digest, NEVER):
            workspace.delete(path)


def _parse_entry(path: str) -> tuple[str, int]:
    digest, _, at = path.rpartition("/")[2].partition("-")
    return digest, int(at)


def _latest_deletions(entries: Iterable[tuple[str, int]]) -> ForgottenUsers:
    last_deletions: dict[str, int] = {}
    for digest, at in entries:
        last_deletions[digest] = max(at, last_deletions.get(digest, NEVER))
    return ForgottenUsers(last_deletions)
