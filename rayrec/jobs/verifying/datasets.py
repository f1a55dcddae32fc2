"""The audit of the data set: checksums, counts that must agree, every user once and in the right bucket."""

import numpy as np
import pyarrow.compute as pc

from rayrec.data import columns
from rayrec.data.dataset import Dataset, bucket_of
from rayrec.data.histories import Histories
from rayrec.data.split import list_splits
from rayrec.jobs.verifying.audit import Audit
from rayrec.storage.workspace import DATASET, DATASET_MANIFEST, HISTORIES, SONGS_TABLE, split_file


def check_dataset(audit: Audit, dataset: Dataset) -> None:
    """Everything below dataset/."""
    manifest = dataset.manifest
    files = {f"{DATASET}/{path}": digest for path, digest in manifest.files.items()}
    with audit.looking_at("dataset", manifest.id, len(files)):
        audit.compare(files)
        with audit.reading(SONGS_TABLE):
            _check_songs(audit, dataset)
        totals = _Totals()
        for bucket in range(manifest.buckets):
            audit.bar.advance(note=f"bucket {bucket}")
            path = f"{HISTORIES}/part=*/bucket={bucket:05d}"
            with audit.reading(path):
                _check_bucket(audit, dataset, bucket, path, totals)
        totals.compare(audit, dataset)
        _check_playlists(audit, dataset)
        for ancestor in manifest.ancestors:
            with audit.reading(DATASET_MANIFEST):
                audit.require(
                    dataset.earlier(ancestor).id == ancestor, DATASET_MANIFEST, f"ancestor {ancestor} is another"
                )


def check_splits(audit: Audit, dataset: Dataset) -> None:
    """Splits read, and cut a data set that is known."""
    for split in list_splits(audit.workspace):
        with audit.looking_at("splits", split.id, 0):
            if not dataset.descends_from(split.dataset):
                audit.note(split_file(split.id), f"cuts data set {split.dataset}, which is not there any more")


def _check_songs(audit: Audit, dataset: Dataset) -> None:
    table = audit.workspace.read_table(SONGS_TABLE)
    rows, ids = table.column(columns.SONG).to_numpy(), table.column(columns.SONG_ID)
    audit.require(
        len(table) == dataset.num_songs, SONGS_TABLE, f"holds {len(table)} songs, the manifest says {dataset.num_songs}"
    )
    audit.require(bool((rows == np.arange(len(rows))).all()), SONGS_TABLE, "rows are not numbered 0, 1, 2 ...")
    audit.require(pc.count_distinct(ids).as_py() == len(table), SONGS_TABLE, "a song id is there twice")


class _Totals:
    """What all buckets hold together."""

    def __init__(self) -> None:
        self.users = self.plays = 0
        self.first, self.last = np.iinfo(np.int64).max, np.iinfo(np.int64).min

    def add(self, histories: Histories) -> None:
        self.users += len(histories)
        self.plays += histories.num_plays
        if histories.num_plays:
            self.first = min(self.first, int(histories.played_at.min()))
            self.last = max(self.last, int(histories.played_at.max()))

    def compare(self, audit: Audit, dataset: Dataset) -> None:
        manifest = dataset.manifest
        found = {"users": self.users, "plays": self.plays}
        if self.plays:
            found |= {"first_play": self.first, "last_play": self.last}
        for name, value in found.items():
            said = getattr(manifest, name)
            audit.require(value == said, DATASET_MANIFEST, f"says {name} {said}, the histories hold {value}")
        if manifest.read and not manifest.playlists:
            kept = manifest.plays + manifest.merged + sum(manifest.rejected.values())
            audit.require(
                manifest.read == kept,
                DATASET_MANIFEST,
                f"says that {manifest.read} rows were read, and what became of {kept}",
            )


def _check_bucket(audit: Audit, dataset: Dataset, bucket: int, path: str, totals: _Totals) -> None:
    seen: set[str] = set()  # of one bucket: a bounded part of all users
    for histories in dataset.read_bucket(bucket):
        totals.add(histories)
        users = set(histories.user_ids.tolist())
        audit.require(len(users) == len(histories) and not users & seen, path, "a user is there twice")
        seen |= users
        astray = histories.user_ids[bucket_of(histories.user_ids, dataset.manifest.buckets) != bucket]
        audit.require(not len(astray), path, f"user {astray[:1]} belongs into another bucket")
        known = not histories.num_plays or bool(
            (histories.songs.min() >= 0) & (histories.songs.max() < dataset.num_songs)
        )
        audit.require(known, path, "a play is of a song that is not in the song table")
        same_user = np.diff(histories.rows) == 0
        ordered = (np.diff(histories.played_at) >= 0) | ~same_user
        audit.require(bool(ordered.all()), path, "plays are not in the order of time")


def _check_playlists(audit: Audit, dataset: Dataset) -> None:
    path = f"{DATASET}/playlists"
    with audit.reading(path):
        playlists = entries = 0
        for songs, offsets in dataset.read_playlists():
            playlists, entries = playlists + len(offsets) - 1, entries + len(songs)
            known = not len(songs) or bool((songs.min() >= 0) & (songs.max() < dataset.num_songs))
            audit.require(known, path, "an entry is of a song that is not in the song table")
        said = (dataset.manifest.playlists, dataset.manifest.playlist_entries)
        audit.require(
            (playlists, entries) == said, path, f"holds {playlists} playlists of {entries} songs, expected {said}"
        )
