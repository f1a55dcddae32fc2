"""The workers of an import: plain classes that do one unit of input or one bucket per call."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from rayrec.data.parts import bucket_files, order_of_users, read_files, read_users
from rayrec.errors import InputError
from rayrec.importing.fragments import FragmentStore, UnitResult
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.merging import (
    Rows,
    drop_rare,
    rows_among,
    song_counts,
    sort_rows,
    to_histories,
    to_playlists,
    to_positions,
)
from rayrec.importing.readers.reader import Unit
from rayrec.importing.staging import Staging
from rayrec.importing.vocabulary import KEY, SongRows
from rayrec.storage.workspace import Workspace, histories_file, playlists_file, rejected_rows_file

USERS_PER_READ = 5_000


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """What the second pass knows from the first."""

    units: list[UnitResult]
    offsets: list[int]  # line of the file before each unit's first
    files: list[int]  # file of each unit
    sources: list[str]  # name of each file
    contexts: list[str]  # name of each bit
    has_skipped: bool
    in_lines: bool  # the order of a row is its place in its line
    part: int = 0  # of the histories, that plays become


class UnitImporter:
    """Reads units of input into fragments."""

    def __init__(self, staging: Staging, config: ImportConfig, units: list[Unit], buckets: int) -> None:
        self.store, self.reader, self.units, self.buckets = staging.fragments, config.reader(), units, buckets

    def __call__(self, unit: int) -> int:
        """Do one unit; bad input is noted rather than raised, so that the message arrives as it is."""
        try:
            self.store.write_unit(int(unit), self.reader.read(self.units[unit]), self.buckets)
        except InputError as error:
            self.store.write_error(int(unit), error)
        return int(unit)


def read_bucket(store: FragmentStore, merge: MergeSettings, bucket: int) -> tuple[Rows, int]:
    """The rows of a bucket, sorted, and how many duplicates were merged."""
    parts = (
        (file, offset, rows)
        for number, (unit, file, offset) in enumerate(zip(merge.units, merge.files, merge.offsets, strict=True))
        for rows in store.read_bucket(number, unit, bucket)
    )
    return sort_rows(parts, in_lines=merge.in_lines)


class SongCounter:
    """Counts the plays of each song in a bucket."""

    def __init__(self, staging: Staging, config: ImportConfig, merge: MergeSettings) -> None:
        self.staging, self.config, self.merge = staging, config, merge

    def __call__(self, bucket: int) -> int:
        """Write the counts of one bucket."""
        rows, _ = read_bucket(self.staging.fragments, self.merge, int(bucket))
        there = ThereAlready(self.staging.workspace, self.merge.part, int(bucket))
        keys, counts = song_counts(rows, self.config.min_user_plays, there.knows(rows.owners))
        table = pa.table({KEY: pa.array(keys, pa.uint64()), "count": pa.array(counts, pa.int64())})
        self.staging.workspace.write_table(self.staging.counts_file(int(bucket)), table)
        return int(bucket)


class ThereAlready:
    """What a bucket holds in the parts before the one that is made."""

    def __init__(self, workspace: Workspace, part: int, bucket: int) -> None:
        self.workspace, self.files = workspace, bucket_files(workspace, range(part), bucket)
        ids = [read_users(workspace, path) for path in self.files]
        self.users = pd.unique(np.concatenate([np.zeros(0, object), *ids]))  # in the order of first appearance

    def knows(self, owners: np.ndarray) -> np.ndarray:
        """bool (O,): the owners who have plays."""
        return np.asarray(pd.Index(owners).isin(self.users), dtype=bool)

    def without(self, rows: Rows, songs: SongRows) -> Rows:
        """The rows that are not there yet: exact duplicates of plays drop out."""
        if not self.files or not len(rows):
            return rows
        row_songs = songs.find(rows.key)
        repeated: np.ndarray = np.zeros(len(rows), dtype=bool)
        for path in self.files:
            for histories in read_files(self.workspace, [path], USERS_PER_READ):
                repeated[rows_among(rows, row_songs, histories)] = True
        return rows.keep(~repeated)


class BucketMerger:
    """Makes the histories (or playlists) of a bucket out of the fragments of all units."""

    def __init__(
        self, staging: Staging, config: ImportConfig, merge: MergeSettings, keys: np.ndarray, rows: np.ndarray
    ) -> None:
        self.staging, self.config, self.merge = staging, config, merge
        self.songs = SongRows(keys, rows)

    def __call__(self, bucket: int) -> int:
        """Write the files of one bucket, then its result."""
        number = int(bucket)
        there = ThereAlready(self.staging.workspace, self.merge.part, number)
        rows, merged = read_bucket(self.staging.fragments, self.merge, number)
        known = there.knows(rows.owners)
        distinct = there.without(rows, self.songs)
        merged += len(rows) - len(distinct)
        rows, dropped = drop_rare(distinct, self.songs, self.config.min_user_plays, self.config.drop_reasons, known)
        rows = to_positions(rows) if self.merge.in_lines else rows
        written = []
        if len(rows):
            written.append(self._write_rows(number, rows, there.users))
        if dropped.rows:
            written.append(rejected_rows_file(self.config.produces, self.merge.part, f"{number:05d}"))
            table = dropped.table(self.merge.sources)
            self.staging.workspace.write_table(self.staging.out(written[-1]), table)
        result = {
            "rows": len(rows),
            "owners": int(((rows.counts() > 0) & ~known).sum()),
            "merged": merged,
            "dropped": dropped.counts(),
            "first": int(rows.order.min()) if len(rows) else 0,
            "last": int(rows.order.max()) if len(rows) else 0,
            "files": {path: self.staging.checksum(path) for path in written},
        }
        self.staging.workspace.write_json(self.staging.bucket_file(number), result)
        return number

    def _write_rows(self, number: int, rows: Rows, known_users: np.ndarray) -> str:
        if self.config.produces == "playlists":
            path = playlists_file(number)
            self.staging.workspace.write_table(self.staging.out(path), to_playlists(rows, self.songs))
            return path
        path = histories_file(self.merge.part, number)
        histories = to_histories(rows, self.songs, self.merge.contexts, self.merge.has_skipped)
        if len(known_users):
            histories = histories.take(order_of_users(known_users, histories.user_ids))
        self.staging.write_histories(path, histories)
        return path
