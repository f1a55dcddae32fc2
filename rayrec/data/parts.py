"""The parts of the histories: each import of plays leaves one, readers see every user once.

A part is written once and never changed. Within a bucket the rows of a part stand in the order in
which the bucket's users first appeared, over all parts, so that parts are merged as they stream.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.histories import Histories, concatenate
from rayrec.errors import DamagedArtifactError
from rayrec.storage.workspace import Workspace, histories_file

PLAYS_PER_READ = 1_000_000  # plays decoded at once, about; a user's plays are never cut
SONGS_COLUMN = 1  # of a histories file: behind the user's id


def bucket_files(workspace: Workspace, parts: range, bucket: int) -> list[str]:
    """The files that a bucket has in some parts: a part without plays of its users has none."""
    paths = (histories_file(part, bucket) for part in parts)
    return [path for path in paths if workspace.exists(path)]


def read_files(
    workspace: Workspace, paths: Sequence[str], users_per_batch: int, earlier: Sequence[str] = ()
) -> Iterator[Histories]:
    """The users of some parts of a bucket in batches, each user once. `earlier` are the files of the parts before.

    Memory: a batch of each part, and the ids of the bucket's users where there are several parts. A
    batch holds at most `users_per_batch` users, and fewer where they have many plays.
    Raises `DamagedArtifactError` for a part whose users stand in another order.
    """
    if len(paths) <= 1:
        for path in paths:
            yield from _read_file(workspace, path, users_per_batch)
        return
    everything = [*earlier, *paths]
    places = _places(everything, [read_users(workspace, path) for path in everything])[len(earlier) :]
    streams = [_Rows(_read_file(workspace, path, users_per_batch)) for path in paths]
    for leading, stream in enumerate(streams):
        while (first := stream.next_batch()) is not None:
            taken, taken_places = [first], [places[leading][stream.read - len(first) : stream.read]]
            last = taken_places[0][-1]
            for other, place in zip(streams[leading + 1 :], places[leading + 1 :], strict=True):
                end = int(np.searchsorted(place, last, side="right"))
                taken_places.append(place[other.read : end])
                taken.append(other.take(end - other.read))
            yield merge_users(taken, np.concatenate(taken_places))


def read_users(workspace: Workspace, path: str) -> np.ndarray:
    """object (U,): the ids of the users of one file, in its order."""
    with workspace.open_input(path) as stream:
        table = pq.ParquetFile(stream).read(columns=[columns.USER])
    return np.asarray(table.column(columns.USER).to_numpy())


def find_user(workspace: Workspace, path: str, user_id: str) -> Histories | None:
    """One user's row of a file, out of the row group that holds it."""
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=[columns.USER]).column(columns.USER)
            place = ids.index(pa.scalar(user_id, ids.type)).as_py()
            if place >= 0:
                return Histories.from_arrow(file.read_row_group(group).slice(place, 1))
    return None


def merge_users(parts: Sequence[Histories], places: np.ndarray | None = None) -> Histories:
    """Each user of the parts once, with all plays in the order of time.

    Users come in the order of `places`, int64, one for each row of the parts, the same for the same
    user; without them in the order of first appearance. Plays of the same moment stay in the order of
    the parts. What one part does not tell (contexts, skips) is none and false where another does.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    joined = concatenate(_alike(parts))
    codes = pd.factorize(joined.user_ids)[0] if places is None else places
    _, first, user = np.unique(codes, return_index=True, return_inverse=True)
    owner = user[joined.rows]
    order = np.lexsort((joined.played_at, owner))
    counts = np.bincount(owner, minlength=len(first))
    return Histories(
        user_ids=joined.user_ids[first],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        songs=joined.songs[order],
        played_at=joined.played_at[order],
        contexts=None if joined.contexts is None else joined.contexts[order],
        skipped=None if joined.skipped is None else joined.skipped[order],
    )


def with_columns(histories: Histories, *, contexts: bool, skipped: bool) -> Histories:
    """The histories with contexts and skips where they are asked for: none and false where they are not told."""
    if contexts and histories.contexts is None:
        histories = replace(histories, contexts=np.zeros(histories.num_plays, dtype=np.int32))
    if skipped and histories.skipped is None:
        histories = replace(histories, skipped=np.zeros(histories.num_plays, dtype=np.bool_))
    return histories


def order_of_users(known: np.ndarray, user_ids: np.ndarray) -> np.ndarray:
    """int64 (U,): the order in which a new part holds `user_ids`: as they stand in `known`, then the new ones."""
    place = pd.Index(known).get_indexer(pd.Index(user_ids))
    return np.argsort(np.where(place < 0, len(known), place), kind="stable")


class _Rows:
    """The rows of a stream of batches, as many at a time as asked for."""

    def __init__(self, batches: Iterator[Histories]) -> None:
        self._batches = batches
        self._rest = Histories.from_lists([], [])
        self.read = 0  # rows handed out so far

    def next_batch(self) -> Histories | None:
        """What is left of the last batch, else the next one; None at the end."""
        batch = self._rest if len(self._rest) else next(self._batches, None)
        self._rest = Histories.from_lists([], [])
        self.read += 0 if batch is None else len(batch)
        return batch

    def take(self, count: int) -> Histories:
        """The next `count` rows."""
        taken = []
        while count > 0:
            batch = self.next_batch()
            if batch is None:
                raise AssertionError("a part has fewer rows than users")
            if len(batch) > count:
                self._rest = batch.take(np.arange(count, len(batch)))
                self.read -= len(self._rest)
                batch = batch.take(np.arange(count))
            taken.append(batch)
            count -= len(batch)
        return concatenate(taken)


def _read_file(workspace: Workspace, path: str, users_per_batch: int) -> Iterator[Histories]:
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for groups in _spans(file.metadata):
            for batch in file.iter_batches(batch_size=users_per_batch, row_groups=groups):
                yield Histories.from_arrow(batch)


def _spans(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Row groups that follow each other, as many as hold PLAYS_PER_READ plays: a batch never leaves its span.

    Row groups are cut by plays, so that a batch of users with long histories holds fewer of them.
    """
    held: list[int] = []
    plays = 0
    for group in range(metadata.num_row_groups):
        values = metadata.row_group(group).column(SONGS_COLUMN).num_values
        if held and plays + values > PLAYS_PER_READ:
            yield held
            held, plays = [], 0
        held.append(group)
        plays += values
    if held:
        yield held


def _places(paths: Sequence[str], ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each part, int64 (U,), the place of its users in the order of first appearance over all parts."""
    codes, _ = pd.factorize(np.concatenate(ids))
    places = np.split(codes, np.cumsum([len(part) for part in ids])[:-1])
    for path, place in zip(paths, places, strict=True):
        if (np.diff(place) <= 0).any():
            raise DamagedArtifactError(
                f"the users of {path} are not in the order of the earlier parts, each once; import the data again"
            )
    return places


def _alike(parts: Sequence[Histories]) -> list[Histories]:
    """The parts with the same columns."""
    has_contexts = any(part.contexts is not None for part in parts)
    has_skipped = any(part.skipped is not None for part in parts)
    return [replace(with_columns(part, contexts=has_contexts, skipped=has_skipped), totals=None) for part in parts]
