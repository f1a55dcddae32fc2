"""The canonical data set of a workspace: its buckets of histories, its playlists and its catalog."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.catalog import DESCRIPTIONS, DESCRIPTIONS_FILE, Catalog, described
from rayrec.data.content import Content
from rayrec.data.forgotten import read_waiting
from rayrec.data.histories import Histories, user_hash
from rayrec.data.parts import find_users, merge_users, read_files, read_users, with_columns
from rayrec.data.spelling import spell_id
from rayrec.errors import MismatchError, NotFoundError
from rayrec.notebook import html_figures
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.dataset_manifest import DatasetManifest, earlier_version, read_manifest, read_songs
from rayrec.storage.workspace import PLAYLISTS, Workspace


class Dataset:
    """Reads the data set of a workspace, bucket by bucket.

    Raises `NotFoundError` where nothing was imported and `DamagedArtifactError` for another schema version.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.manifest = read_manifest(workspace)

    def _repr_html_(self) -> str:
        names = ("id", "source", "plays", "users", "songs", "playlists")
        return html_figures("Data set", {name: getattr(self.manifest, name) for name in names})

    @property
    def num_songs(self) -> int:
        """N: rows of the song table."""
        return self.manifest.songs

    @property
    def lineage(self) -> str:
        """The same for all data sets that agree on the rows of the songs they share."""
        return self.manifest.lineage or self.manifest.id

    def bucket_of(self, user_ids: np.ndarray) -> np.ndarray:
        """int64 (U,): the bucket that holds each user."""
        return bucket_of(user_ids, self.manifest.buckets)

    def descends_from(self, dataset_id: str) -> bool:
        """True for the data set itself and those that it begins with: what was made of them stays of use.

        Song rows agree, songs from their number on are new, and their plays are the first parts.
        """
        return self.manifest.descends_from(dataset_id)

    def earlier(self, dataset_id: str) -> DatasetManifest:
        """The manifest of the data set itself or of one that it descends from."""
        return earlier_version(self.workspace, self.manifest, dataset_id)

    def read_bucket(self, bucket: int, users_per_batch: int = 5_000, *, first_part: int = 0) -> Iterator[Histories]:
        """The histories of one bucket in batches, each user once, by ascending id.

        With `first_part` the plays of that part and later ones alone, of users who have any. A batch holds at most
        `users_per_batch` users, fewer where histories are long: memory is bounded by 1 M plays of each
        part and the longest history.
        """
        files = self.manifest.histories_files(bucket, first_part)
        for histories in read_files(self.workspace, files, users_per_batch):
            if first_part and histories.likes is not None:  # some may only have liked songs since
                histories = histories.take(histories.lengths > 0)
            yield self._with_columns(histories)

    def bucket_users(self, bucket: int, first_part: int = 0, *, parts: int | None = None) -> np.ndarray:
        """object (U,), ascending: the users of a bucket with plays or likes in `first_part` up to `parts`."""
        files = self.manifest.histories_files(bucket, first_part, parts)
        ids = [read_users(self.workspace, path) for path in files]
        return np.unique(np.concatenate([np.zeros(0, dtype=object), *ids]))

    def read_all(self, users_per_batch: int = 5_000) -> Iterator[Histories]:
        """The histories of all buckets in batches."""
        for bucket in range(self.manifest.buckets):
            yield from self.read_bucket(bucket, users_per_batch)

    def history(self, user_id: str) -> Histories:
        """One user's history. Raises `NotFoundError` for a user who is not there."""
        return self.histories([user_id])

    def histories(self, user_ids: Sequence[str]) -> Histories:
        """Those of users, in their order; a file is opened once. Raises `NotFoundError` for one who is not there.

        Deleted users are not there, whether their plays are erased already or not.
        """
        ids = np.array([spell_id(user_id) or user_id for user_id in user_ids], dtype=object)
        buckets = self.bucket_of(ids)
        parts: list[Histories] = []
        for bucket in np.unique(buckets).tolist():
            for path in self.manifest.histories_files(bucket):
                parts += find_users(self.workspace, path, np.unique(ids[buckets == bucket]))
        merged = merge_users(parts)
        deleted = read_waiting(self.workspace).holds(merged.user_ids)
        row_of = {user_id: row for row, user_id in enumerate(merged.user_ids.tolist()) if not deleted[row]}
        for user_id in ids.tolist():
            if user_id not in row_of:
                raise NotFoundError(
                    f"User {user_id!r} not found in the data set; check the ID or import the user's plays"
                )
        return self._with_columns(merged.take(np.array([row_of[user_id] for user_id in ids.tolist()], dtype=np.int64)))

    def _with_columns(self, histories: Histories) -> Histories:
        """With the columns of the data set, also where an earlier part came without them."""
        if self.manifest.parts == 1:
            return histories
        made = self.manifest
        return with_columns(histories, contexts=bool(made.contexts), skipped=made.has_skipped, likes=made.has_likes)

    def read_playlists(self, playlists_per_batch: int = 5_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Playlists in batches: songs int32 (P,) and offsets int64 (playlists + 1,)."""
        for path in self.playlist_files():
            yield from self.read_playlist_file(path, playlists_per_batch)

    def playlist_files(self) -> list[str]:
        """The files that hold the playlists, sorted."""
        return self.workspace.files(PLAYLISTS)

    def read_playlist_file(
        self, path: str, playlists_per_batch: int = 5_000
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The playlists of one file, as `read_playlists` gives them."""
        with self.workspace.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=playlists_per_batch):
                lists = batch.column(columns.SONGS)
                offsets = lists.offsets.to_numpy().astype(np.int64)
                yield lists.flatten().to_numpy(), offsets - offsets[0]

    def catalog(self) -> Catalog:
        """The song table, in memory, with what songs were described by.

        Without songs that an unfinished import has put behind it.
        """
        table = read_songs(self.workspace, self.manifest)
        for description in self.descriptions():
            table = described(table, self.workspace.read_table(description.path(DESCRIPTIONS_FILE)))
        return Catalog(table)

    def model(self, model_id: str | None = None) -> Manifest:
        """A model of this data set, or of one that it descends from; the current one unless named.

        Raises `NotFoundError` where there is none, `MismatchError` for one of other data.
        """
        model = (
            artifacts.load(self.workspace, "models", model_id)
            if model_id
            else artifacts.newest(self.workspace, "models", "train")
        )
        if not self.descends_from(model.inputs["dataset"]):
            raise MismatchError(
                f"model {model.id} was trained on data set {model.inputs['dataset']}, the workspace has "
                f"{self.manifest.id}; run `rayrec embed` and `rayrec train` first"
            )
        return model

    def newest_base(self, kind: str, fits: Callable[[Manifest], bool]) -> tuple[int, Manifest | None]:
        """The artifact to continue from, and the part from which on plays are new to it; (0, None) where there is none.

        It is the newest of those that know the most parts of this data set's plays. An artifact whose last part was
        joined with later ones is not among them, since the new plays cannot be read alone.
        """
        known = [
            (self.earlier(artifact.inputs["dataset"]).parts, artifact)
            for artifact in artifacts.listing(self.workspace, kind)
            if self.descends_from(artifact.inputs["dataset"]) and fits(artifact)
        ]
        readable = [(parts, artifact) for parts, artifact in known if self.manifest.splits_at(parts)]
        return max(reversed(readable), key=lambda each: each[0], default=(0, None))

    def descriptions(self) -> list[Manifest]:
        """What songs were described by, of this data set or those that it descends from, oldest first."""
        told = artifacts.listing(self.workspace, DESCRIPTIONS)
        return [each for each in told if self.descends_from(each.inputs["dataset"])]

    def content(self) -> Content:
        """The content vectors of the catalog's songs."""
        table = read_songs(self.workspace, self.manifest, [columns.SONG_ID])
        return Content.load(self.workspace, self.descriptions(), columns.one_array(table.column(columns.SONG_ID)))


def bucket_of(user_ids: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (U,): the bucket of each user among `buckets`, by a hash that never changes."""
    return (user_hash(user_ids) % np.uint64(buckets)).astype(np.int64)
