"""The parts of the histories: each import of plays leaves one, readers see every user once.

A part is written once and never changed, and has a file of every bucket, perhaps without rows. In a
file users stand by ascending id, so that files are merged as they stream. Parts may be joined: then
one file of a bucket holds the plays of several.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.histories import Histories, concatenate
from rayrec.errors import DamagedArtifactError
from rayrec.storage.workspace import Workspace

PLAYS_PER_READ = 1_000_000  # plays decoded at once, about; a user's plays are never cut
SONGS_COLUMN = 1  # of a histories file: behind the user's id


def read_files(workspace: Workspace, paths: Sequence[str], users_per_batch: int) -> Iterator[Histories]:
    """The users of some files of a bucket in batches, each user once, by ascending id.

    Memory: a batch of each file. A batch holds at most `users_per_batch` users, and fewer where they
    have many plays. Raises `DamagedArtifactError` for a file whose users are not in that order.
    """
    if len(paths) <= 1:
        for path in paths:
            yield from _read_file(workspace, path, users_per_batch)
        return
    streams = [_Rows(path, _read_file(workspace, path, users_per_batch)) for path in paths]
    while lasts := [last for stream in streams if (last := stream.last_id()) is not None]:
        # Up to here every file has been read: no later batch holds these users.
        merged = merge_users([stream.take_up_to(min(lasts)) for stream in streams])
        for start in range(0, len(merged), users_per_batch):
            yield merged.take(np.arange(start, min(start + users_per_batch, len(merged))))


def read_users(workspace: Workspace, path: str) -> np.ndarray:
    """object (U,): the ids of the users of one file, in its order."""
    return np.asarray(workspace.read_table(path, [columns.USER]).column(columns.USER).to_numpy())


def read_overlap(workspace: Workspace, path: str, user_ids: np.ndarray, first: int, last: int) -> Iterator[Histories]:
    """Of a file the row groups that may hold plays of some users from `first` up to and with `last`, ms UTC.

    `user_ids`, object (U,), are ascending.
    """
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            low, high = _range(group, columns.USER)
            begin, end = _range(group, columns.PLAYED_AT)
            if begin is not None and (begin > last or end < first):
                continue
            if low is not None and np.searchsorted(user_ids, low) == np.searchsorted(user_ids, high, side="right"):
                continue
            yield Histories.from_arrow(file.read_row_group(number))


def _range(group: pq.RowGroupMetaData, name: str) -> tuple[Any, Any]:
    """The least and the greatest value of a column of a row group; None where the file does not say."""
    for place in range(group.num_columns):
        column = group.column(place)
        if column.path_in_schema.split(".")[0] == name:
            stats = column.statistics
            return (stats.min, stats.max) if stats is not None and stats.has_min_max else (None, None)
    return None, None


def find_users(workspace: Workspace, path: str, user_ids: np.ndarray) -> Iterator[Histories]:
    """The rows of some users of a file, out of the row groups that hold any; `user_ids`, object (U,), are ascending."""
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for group in range(file.num_row_groups):
            low, high = _range(file.metadata.row_group(group), columns.USER)
            if low is not None and np.searchsorted(user_ids, low) == np.searchsorted(user_ids, high, side="right"):
                continue
            ids = file.read_row_group(group, columns=[columns.USER]).column(columns.USER)
            held = pc.is_in(ids, value_set=pa.array(user_ids, ids.type))
            if pc.any(held).as_py():
                yield Histories.from_arrow(file.read_row_group(group).filter(held))


def merge_users(parts: Sequence[Histories]) -> Histories:
    """Each user of the parts once, by ascending id, with all plays in the order of time.

    Plays of the same moment stay in the order of the parts. What one part does not tell (contexts,
    skips, likes) is none and false where another does. A like that two parts hold is one.
    """
    parts = [part for part in parts if len(part)]
    if len(parts) == 1:
        return parts[0]
    joined = concatenate(_alike(parts))
    merged = _by_user(joined)
    return merged if joined.likes is None else replace(merged, likes=_distinct(_by_user(joined.likes)))


def _by_user(joined: Histories) -> Histories:
    """The plays of rows that may be of the same user, in the order of users and time."""
    user_ids, user = np.unique(joined.user_ids, return_inverse=True)
    owner = user[joined.rows]
    order = np.lexsort((joined.played_at, owner))
    counts = np.bincount(owner, minlength=len(user_ids))
    return Histories(
        user_ids=user_ids,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        songs=joined.songs[order],
        played_at=joined.played_at[order],
        contexts=None if joined.contexts is None else joined.contexts[order],
        skipped=None if joined.skipped is None else joined.skipped[order],
    )


def _distinct(likes: Histories) -> Histories:
    """Likes by user and time without those of a song and a moment that came before."""
    order = np.lexsort((likes.songs, likes.played_at, likes.rows))
    keys = np.stack([likes.rows, likes.played_at, likes.songs])[:, order]
    first = np.ones(likes.num_plays, dtype=bool)
    first[order[1:]] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    return likes.keep(first)


def with_columns(histories: Histories, *, contexts: bool, skipped: bool, likes: bool) -> Histories:
    """The histories with what is asked for: none and false where they do not tell."""
    if contexts and histories.contexts is None:
        histories = replace(histories, contexts=np.zeros(histories.num_plays, dtype=np.int32))
    if skipped and histories.skipped is None:
        histories = replace(histories, skipped=np.zeros(histories.num_plays, dtype=np.bool_))
    if likes and histories.likes is None:
        nothing = [()] * len(histories)
        histories = replace(histories, likes=Histories.from_lists(nothing, nothing, histories.user_ids.tolist()))
    return histories


class _Rows:
    """The rows of one file, by ascending user id."""

    def __init__(self, path: str, batches: Iterator[Histories]) -> None:
        self._path, self._batches = path, batches
        self._batch = Histories.from_lists([], [])

    def last_id(self) -> str | None:
        """The last user of the batch at hand, read where there is none; None at the end of the file."""
        if not len(self._batch):
            last, self._batch = self._last(), next(self._batches, self._batch)
            ids = self._batch.user_ids
            if (ids[1:] <= ids[:-1]).any() or (last is not None and len(ids) and ids[0] <= last):
                raise DamagedArtifactError(
                    f"the users of {self._path} are not by ascending id, each once; import the data again"
                )
        return self._last()

    def take_up_to(self, user_id: str) -> Histories:
        """The rows at hand up to a user."""
        end = int(np.searchsorted(self._batch.user_ids, user_id, side="right"))
        taken, self._batch = self._batch.take(np.arange(end)), self._batch.take(np.arange(end, len(self._batch)))
        return taken

    def _last(self) -> str | None:
        return str(self._batch.user_ids[-1]) if len(self._batch) else None


def _read_file(workspace: Workspace, path: str, users_per_batch: int) -> Iterator[Histories]:
    with workspace.open_input(path) as stream:
        file = pq.ParquetFile(stream)
        for groups in _spans(file.metadata):
            for batch in file.iter_batches(batch_size=users_per_batch, row_groups=groups):
                if batch.num_rows:
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


def _alike(parts: Sequence[Histories]) -> list[Histories]:
    """The parts with the same columns."""
    has_contexts = any(part.contexts is not None for part in parts)
    has_skipped = any(part.skipped is not None for part in parts)
    has_likes = any(part.likes is not None for part in parts)
    return [
        replace(with_columns(part, contexts=has_contexts, skipped=has_skipped, likes=has_likes), totals=None)
        for part in parts
    ]
