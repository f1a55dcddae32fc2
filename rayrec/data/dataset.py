"""The canonical data set of a workspace: its manifest, its songs and its buckets of histories."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec import artifacts
from rayrec.artifacts import Manifest
from rayrec.data import columns
from rayrec.data.histories import Histories, user_hash
from rayrec.data.parts import bucket_files, find_user, merge_users, read_files, read_users, with_columns
from rayrec.errors import DamagedArtifactError, InputError, NotFoundError
from rayrec.workspace import DATASET_MANIFEST, PLAYLISTS, SONGS_TABLE, Workspace, earlier_manifest

SCHEMA_VERSION = 1
DESCRIPTIONS = "descriptions"  # the kind of what `rayrec describe` was told of songs
DESCRIPTIONS_FILE = "descriptions.parquet"  # in its folder: columns.DESCRIPTIONS

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
    set_aside: dict[str, int] = field(default_factory=dict)  # reason -> rows
    config: dict[str, object] = field(default_factory=dict)  # of the import
    appended: list[dict[str, object]] = field(default_factory=list)  # part by part: settings, plan, rows and plays
    files: dict[str, str] = field(default_factory=dict)  # path below dataset/ -> sha256
    created_at: str = ""
    schema_version: int = SCHEMA_VERSION


class Dataset:
    """Reads the data set of a workspace, bucket by bucket.

    Raises `NotFoundError` where nothing was imported and `DamagedArtifactError` for another schema version.
    """

    def __init__(self, workspace: Workspace) -> None:
        if not workspace.exists(DATASET_MANIFEST):
            raise NotFoundError(
                f"workspace {workspace.uri} holds no data set; run `rayrec import` or `rayrec generate` first"
            )
        self.workspace = workspace
        self.manifest = read_manifest(workspace, DATASET_MANIFEST)

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
        return dataset_id == self.manifest.id or dataset_id in self.manifest.ancestors

    def earlier(self, dataset_id: str) -> DatasetManifest:
        """The manifest of the data set itself or of one that it descends from."""
        if dataset_id == self.manifest.id:
            return self.manifest
        return read_manifest(self.workspace, earlier_manifest(dataset_id))

    def read_bucket(self, bucket: int, users_per_batch: int = 5_000, *, first_part: int = 0) -> Iterator[Histories]:
        """The histories of one bucket in batches, each user once, in the order in which users first appeared.

        With `first_part` the plays of that part and later ones alone. A batch holds at most
        `users_per_batch` users, fewer where histories are long: memory is bounded by 1 M plays of each
        part and the longest history.
        """
        earlier = bucket_files(self.workspace, range(first_part), bucket)
        files = bucket_files(self.workspace, range(first_part, self.manifest.parts), bucket)
        for histories in read_files(self.workspace, files, users_per_batch, earlier):
            yield self._told(histories)

    def bucket_users(self, bucket: int, first_part: int = 0, *, parts: int | None = None) -> np.ndarray:
        """object (U,): the ids of the users of one bucket with plays in `first_part` up to `parts`, each once."""
        files = bucket_files(self.workspace, range(first_part, parts or self.manifest.parts), bucket)
        ids = [read_users(self.workspace, path) for path in files]
        return np.asarray(pd.unique(np.concatenate([np.zeros(0, dtype=object), *ids])))

    def read_all(self, users_per_batch: int = 5_000) -> Iterator[Histories]:
        """The histories of all buckets in batches."""
        for bucket in range(self.manifest.buckets):
            yield from self.read_bucket(bucket, users_per_batch)

    def history(self, user_id: str) -> Histories:
        """One user's history. Raises `NotFoundError` for a user who is not there."""
        bucket = int(self.bucket_of(np.array([user_id], dtype=object))[0])
        files = bucket_files(self.workspace, range(self.manifest.parts), bucket)
        found = [row for path in files if (row := find_user(self.workspace, path, user_id)) is not None]
        if not found:
            raise NotFoundError(
                f"user {user_id!r} has no plays in the data set; check the id or import the plays first"
            )
        return self._told(merge_users(found))

    def _told(self, histories: Histories) -> Histories:
        """With the columns of the data set, also where an earlier part came without them."""
        if self.manifest.parts == 1:
            return histories
        return with_columns(histories, contexts=bool(self.manifest.contexts), skipped=self.manifest.has_skipped)

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

    def catalog(self) -> "Catalog":
        """The song table, in memory, with what songs were described by.

        Without songs that an unfinished import has put behind it.
        """
        table = self.workspace.read_table(SONGS_TABLE).slice(0, self.num_songs)
        told = self.descriptions()
        if told is not None:
            table = _described(table, self.workspace.read_table(told.path(DESCRIPTIONS_FILE)))
        return Catalog(table)

    def descriptions(self) -> Manifest | None:
        """What songs were last described by, of this data set or one that it descends from; None where by nothing."""
        told = artifacts.listing(self.workspace, DESCRIPTIONS)
        return next((each for each in reversed(told) if self.descends_from(each.inputs["dataset"])), None)


class Catalog:
    """The songs: rows, ids, titles and artists; release days and markets where they were described."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def song_ids(self, rows: np.ndarray) -> list[str]:
        """The outside ids of song rows."""
        taken: list[str] = self.table.column(columns.SONG_ID).take(pa.array(rows)).to_pylist()
        return taken

    def titles(self, rows: np.ndarray) -> list[str]:
        """`Artist – Title` of song rows, or the id where there is no title."""
        picked = self.table.take(pa.array(rows)).to_pylist()
        return [
            " – ".join(part for part in (row[columns.ARTIST], row[columns.TITLE]) if part) or row[columns.SONG_ID]
            if row[columns.TITLE]
            else row[columns.SONG_ID]
            for row in picked
        ]

    def rows(self, song_ids: list[str]) -> np.ndarray:
        """int32: the rows of outside ids. Raises `InputError` that names the unknown ones."""
        found = pc.index_in(pa.array(song_ids, pa.string()), value_set=self.table.column(columns.SONG_ID))
        unknown = [song for song, row in zip(song_ids, found.to_pylist(), strict=True) if row is None]
        if unknown:
            raise InputError(
                f"{len(unknown)} of {len(song_ids)} songs are not in the catalog: {', '.join(unknown[:5])}; "
                "check the ids against dataset/songs.parquet"
            )
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int32)


def _described(songs: pa.Table, told: pa.Table) -> pa.Table:
    """The song table with release days and markets, and with the titles and artists that were told before its own."""
    ids = (table.column(columns.SONG_ID).combine_chunks() for table in (songs, told))
    places = pc.index_in(next(ids), value_set=next(ids))
    for told_field in columns.DESCRIPTIONS:
        if told_field.name == columns.SONG_ID:
            continue
        values = told.column(told_field.name).combine_chunks().take(places)
        if told_field.name in songs.column_names:
            values = pc.coalesce(values, songs.column(told_field.name))
            songs = songs.set_column(songs.column_names.index(told_field.name), told_field, values)
        else:
            songs = songs.append_column(told_field, values)
    return songs


def bucket_of(user_ids: np.ndarray, buckets: int) -> np.ndarray:
    """int64 (U,): the bucket of each user among `buckets`, by a hash that never changes."""
    return (user_hash(user_ids) % np.uint64(buckets)).astype(np.int64)


def read_manifest(workspace: Workspace, path: str) -> DatasetManifest:
    """The manifest at a path. Raises `DamagedArtifactError` for another schema version."""
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
