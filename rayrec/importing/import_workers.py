"""The workers of an import: plain classes that do one piece of input or one group of buckets per call."""

import tempfile
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.forgotten import NOBODY, ForgottenUsers
from rayrec.data.parts import read_overlap, read_users
from rayrec.importing.fragments import BucketGroup, PieceResult
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.merging import (
    FORGOTTEN_USER,
    MergedRows,
    PlaysAndLikes,
    all_likes,
    drop_rare,
    rows_among,
    song_counts,
    sort_rows,
    to_histories,
    to_playlists,
    to_positions,
    usable_likes,
)
from rayrec.importing.readers.reader import Unit
from rayrec.importing.staging import Staging, write_histories
from rayrec.importing.vocabulary import KEY, SongMerger, SongRows
from rayrec.storage.dataset_manifest import DatasetManifest
from rayrec.storage.workspace import Workspace, histories_file, playlists_file, rejected_rows_file, users_file


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What the second pass knows from the first."""

    pieces: list[list[int]]  # units of each piece of input
    offsets: list[int]  # line of the file before each unit's first
    files: list[int]  # file of each unit
    sources: list[str]  # name of each file
    contexts: list[str]  # name of each bit
    has_skipped: bool
    has_likes: bool
    in_lines: bool  # the order of a row is its place in its line
    base: DatasetManifest | None = None  # the data set that plays are appended to
    forgotten: ForgottenUsers = NOBODY  # whose plays from before their deletion are left out

    @property
    def part(self) -> int:
        """The part of the histories that plays become."""
        return self.base.parts if self.base else 0

    def rows_of(self, group: BucketGroup, bucket: int) -> PlaysAndLikes:
        """The rows of a bucket, sorted, those of deleted users too."""
        parts = (
            (
                [self.files[unit] for unit in self.pieces[piece]],
                [self.offsets[unit] for unit in self.pieces[piece]],
                rows,
            )
            for piece, rows in group.read(bucket)
        )
        return sort_rows(parts, in_lines=self.in_lines)


class PieceImporter:
    """Reads pieces of input into fragments."""

    def __init__(
        self, staging: Staging, config: ImportConfig, units: list[Unit], pieces: list[list[int]], buckets: int
    ) -> None:
        self.store, self.reader, self.units, self.pieces = staging.fragments, config.reader(), units, pieces
        self.buckets, self.with_lines = buckets, config.needs_lines

    def __call__(self, piece: int) -> tuple[int, PieceResult]:
        """Do one piece; bad input is noted rather than raised, so that the others are read too."""
        batches = (self.reader.read(self.units[unit]) for unit in self.pieces[piece])
        return piece, self.store.write_piece(piece, batches, self.buckets, with_lines=self.with_lines)


class SongRange:
    """Merges the songs of all pieces in a range of keys."""

    def __init__(self, staging: Staging, config: ImportConfig, offsets: np.ndarray) -> None:
        self.staging, self.offsets = staging, offsets  # int64 (pieces, ranges + 1)

    def __call__(self, key_range: int) -> int:
        """Write the songs of one range."""
        merger = SongMerger()
        for piece, offsets in enumerate(self.offsets):
            songs = self.staging.fragments.read_songs(piece, offsets, key_range)
            if songs is not None:
                merger.add(songs)
        self.staging.workspace.write_table(self.staging.songs_file(key_range), merger.table())
        return key_range


class _GroupWorker:
    """Does the buckets of a group one after another, out of one read a piece."""

    def __init__(
        self, staging: Staging, config: ImportConfig, merge: MergeSettings, offsets: np.ndarray, buckets: Set[int]
    ) -> None:
        self.staging, self.config, self.merge = staging, config, merge
        self.offsets, self.buckets = offsets, buckets  # int64 (pieces, all buckets + 1); those that are not done

    def __call__(self, group: tuple[int, int]) -> list[tuple[int, Any]]:
        """Do the buckets from the first to the last of a group that are not done; each with its result."""
        first, last = group
        with tempfile.TemporaryFile(prefix="rayrec-") as spool:
            rows = self.staging.fragments.read_group(self.offsets, first, last, spool)
            return [(bucket, self.run(bucket, rows)) for bucket in range(first, last + 1) if bucket in self.buckets]

    def run(self, bucket: int, group: BucketGroup) -> Any:
        """Do one bucket."""
        raise NotImplementedError


class KeyCounter(_GroupWorker):
    """Counts the plays of each song in a bucket."""

    def run(self, bucket: int, group: BucketGroup) -> None:
        """Write the counts of one bucket."""
        rows = self.merge.rows_of(group, bucket).without_forgotten(self.merge.forgotten).plays
        earlier = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        keys, counts = song_counts(rows, self.config.min_user_plays, earlier.knows(rows.owners))
        table = pa.table({KEY: pa.array(keys, pa.uint64()), "count": pa.array(counts, pa.int64())})
        self.staging.workspace.write_table(self.staging.counts_file(bucket), table)


class EarlierParts:
    """What a bucket holds in the parts before the one that is made."""

    def __init__(self, workspace: Workspace, base: DatasetManifest | None, bucket: int) -> None:
        self.workspace, self.base, self.bucket = workspace, base, bucket
        path = base.current_users_file(bucket) if base else None
        # object (U,), ascending
        self.users = read_users(workspace, path) if path else np.zeros(0, dtype=object)

    def knows(self, owners: np.ndarray) -> np.ndarray:
        """bool (O,): the owners who have plays."""
        return np.isin(owners, self.users)

    def without(self, rows: MergedRows, songs: SongRows) -> MergedRows:
        """The rows that are not there yet: exact duplicates of plays drop out.

        Only files of parts whose time range meets that of the rows are read, and of them only row groups
        that may hold plays of that time by these users.
        """
        known = rows.keep(self.knows(rows.owners)[rows.owner])
        if self.base is None or not len(known):
            return rows
        first, last = int(known.order.min()), int(known.order.max())
        files = self.base.files_between(self.bucket, first, last)
        row_songs = songs.find(rows.key)
        repeated: np.ndarray = np.zeros(len(rows), dtype=bool)
        owners = known.owners[np.unique(known.owner)]
        for path in files:
            for histories in read_overlap(self.workspace, path, owners, first, last):
                repeated[rows_among(rows, row_songs, histories)] = True
        return rows.keep(~repeated)


class BucketMerger(_GroupWorker):
    """Makes the histories (or playlists) of a bucket out of the fragments of all pieces."""

    def __init__(
        self,
        staging: Staging,
        config: ImportConfig,
        merge: MergeSettings,
        offsets: np.ndarray,
        buckets: Set[int],
        keys: np.ndarray,
        rows: np.ndarray,
    ) -> None:
        super().__init__(staging, config, merge, offsets, buckets)
        self.songs = SongRows(keys, rows)

    def run(self, bucket: int, group: BucketGroup) -> dict[str, Any]:
        """Write the files of one bucket, then its result."""
        earlier = EarlierParts(self.staging.workspace, self.merge.base, bucket)
        everything = self.merge.rows_of(group, bucket)
        found = everything.without_forgotten(self.merge.forgotten)
        of_deleted = len(everything) - len(found)
        known = earlier.knows(found.plays.owners)
        distinct = earlier.without(found.plays, self.songs)
        merged = everything.merged + len(found.plays) - len(distinct)
        rows, dropped = drop_rare(distinct, self.songs, self.config.min_user_plays, self.config.drop_reasons, known)
        rows = to_positions(rows) if self.merge.in_lines else rows
        is_new = (rows.counts() > 0) & ~known
        too_rare = self.config.drop_reasons[1]
        liked = usable_likes(found, (rows.counts() > 0) | known, self.songs, too_rare, dropped)
        files = self._write_rows(bucket, rows, all_likes(liked) if self.merge.has_likes else None)
        if self.config.produces == "plays" and (is_new.any() or not self.merge.part):
            path = users_file(self.merge.part, bucket)
            user_ids = np.union1d(earlier.users, rows.owners[is_new])
            files[path] = self._write_table(path, pa.table({columns.USER: pa.array(user_ids, pa.string())}))
        if dropped.rows:
            path = rejected_rows_file(self.config.produces, self.merge.part, f"{bucket:05d}")
            files[path] = self._write_table(path, dropped.table(self.merge.sources))
        result = {
            "rows": len(rows),
            "likes": len(liked.likes),
            "owners": int(is_new.sum()),
            "merged": merged,
            "dropped": dropped.counts() | ({FORGOTTEN_USER: of_deleted} if of_deleted else {}),
            "first": int(rows.order.min()) if len(rows) else 0,
            "last": int(rows.order.max()) if len(rows) else 0,
            "files": files,
        }
        self.staging.workspace.write_json(self.staging.bucket_file(bucket), result)
        return result

    def _write_rows(self, bucket: int, rows: MergedRows, likes: MergedRows | None) -> dict[str, str]:
        if self.config.produces == "playlists":
            path = playlists_file(bucket)
            return {path: self._write_table(path, to_playlists(rows, self.songs))} if len(rows) else {}
        path = histories_file(self.merge.part, bucket)
        histories = to_histories(rows, self.songs, self.merge.contexts, has_skipped=self.merge.has_skipped, likes=likes)
        return {path: write_histories(self.staging.workspace, self.staging.out(path), [histories])}

    def _write_table(self, path: str, table: pa.Table) -> str:
        return self.staging.workspace.write_table(self.staging.out(path), table)
