"""The log of a server's answers and of what users did afterwards, as Parquet files that its replicas write.

There are two kinds of rows: answers (user, time, release, arm and songs) and events (plays, skips and likes that users
sent afterwards). Each replica collects rows in memory and writes them to a new file every few seconds, in a separate
thread, so that no answer waits for a disk or fails because of one. Rows of deleted users are hidden from all readers at
once, and left out of files written later; `erase_impressions` removes those in older files.
"""

import logging
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayrec.data.dataset import ForgottenUsers, read_forgotten
from rayrec.data.moments import EPOCH, format_iso, now_ms
from rayrec.data.windows import NEVER
from rayrec.errors import NotFoundError
from rayrec.storage.workspace import IMPRESSIONS, Workspace

Kind = Literal["answers", "events"]
Outcome = Literal["written", "dropped", "expired"]  # dropped: never written; expired: deleted to make room
KINDS: tuple[Kind, ...] = get_args(Kind)
FILE_ROWS = 10_000  # waiting rows that are written at once, before the usual interval ends
MEMORY_BYTES = 64 << 20  # limit of the rows that wait to be written, approximate
ROW_BYTES, SONG_BYTES = 1_000, 80  # approximate size in memory of one row, and of each song in it
RETRY_SECONDS = 1.0  # pause before rows that could not be written are tried again
JOINED_BYTES = 64 << 20  # maximum size of a file that a compaction makes
PRUNE_SHARE = 1 / 64  # share of the limit on disk that a replica writes before it checks the size of the log again

_TIMESTAMP = pa.timestamp("ms", tz="UTC")
SCHEMAS: Mapping[Kind, pa.Schema] = {
    "answers": pa.schema(
        [
            pa.field("recommendation_id", pa.string(), nullable=False),
            pa.field("request_id", pa.string()),
            pa.field("user_id", pa.string()),  # null if the request had a history instead
            pa.field("moment", _TIMESTAMP, nullable=False),  # when the request was answered
            pa.field("at", _TIMESTAMP, nullable=False),  # the moment that the request is for
            pa.field("release", pa.string(), nullable=False),
            pa.field("experiment", pa.string()),
            pa.field("arm", pa.string()),
            pa.field("first", pa.int32(), nullable=False),  # number of songs of earlier pages of the ranking
            pa.field("song_ids", pa.list_(pa.string()), nullable=False),
            pa.field("explored", pa.list_(pa.bool_())),  # which of the songs were drawn instead of ranked
            pa.field("probability", pa.list_(pa.float64())),  # that an explored song is shown; null for other songs
        ]
    ),
    "events": pa.schema(
        [
            pa.field("event_id", pa.string(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("song_id", pa.string(), nullable=False),
            pa.field("type", pa.string(), nullable=False),  # play, skip or like
            pa.field("moment", _TIMESTAMP, nullable=False),  # when the event was sent
            pa.field("played_at", _TIMESTAMP, nullable=False),
            pa.field("skipped", pa.bool_(), nullable=False),
            pa.field("share_listened", pa.float64()),
            pa.field("recommendation_id", pa.string()),
        ]
    ),
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LogBounds:
    """The limits of a log."""

    seconds: float  # between two files of a replica; a killed replica loses at most the rows of this time
    rows: int  # maximum in the memory of a replica, in addition to the limit `MEMORY_BYTES`
    disk_bytes: int  # maximum of all files; the oldest files are deleted


class ImpressionLog:
    """Collects the rows of one replica and writes them. `add` never waits for a write and raises no errors."""

    def __init__(
        self,
        workspace: Workspace,
        writer: str,
        bounds: LogBounds,
        count: Callable[[Kind, Outcome, int], None] = lambda kind, outcome, rows: None,
    ) -> None:
        """`writer` is unique among the replicas; `count` receives a kind, an outcome and the number of its rows."""
        self._workspace, self._bounds, self._count = workspace, bounds, count
        self._writer = re.sub(r"[^A-Za-z0-9]+", "-", writer)
        self._rows_lock = threading.Lock()  # guards the rows
        self._files_lock = threading.Lock()  # guards the files
        self._rows: dict[Kind, deque[tuple[dict[str, Any], int]]] = {kind: deque() for kind in KINDS}  # with sizes
        self._waiting_bytes = self._file_count = 0
        self._unchecked_bytes = math.inf  # bytes written since the size of the log was checked
        self._due, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="rayrec-impressions", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of rows that are not written yet."""
        return sum(map(len, self._rows.values()))

    def add(self, kind: Kind, row: dict[str, Any]) -> bool:
        """Add a row of the kind's schema, with moments in ms UTC; False if it is dropped because too many rows wait."""
        size = ROW_BYTES + SONG_BYTES * len(row.get("song_ids", ()))
        with self._rows_lock:
            has_room = self.waiting < self._bounds.rows and self._waiting_bytes + size <= MEMORY_BYTES
            if has_room:
                self._rows[kind].append((row, size))
                self._waiting_bytes += size
        if not has_room:
            self._count(kind, "dropped", 1)
        if self.waiting >= min(FILE_ROWS, self._bounds.rows // 2):
            self._due.set()
        return has_room

    def flush(self) -> None:
        """Write the waiting rows. If a file cannot be written, its rows stay and are written with the next file."""
        with self._files_lock:
            for kind in KINDS:
                self._write(kind)
            if self._unchecked_bytes >= PRUNE_SHARE * self._bounds.disk_bytes:
                self._unchecked_bytes = 0.0
                for kind, expired in prune(self._workspace, self._bounds.disk_bytes).items():
                    self._count(kind, "expired", expired)

    def close(self) -> None:
        """Write the waiting rows and stop the thread."""
        self._closed.set()
        self._due.set()
        self._thread.join()
        for kind, rows in self._rows.items():
            self._count(kind, "dropped", len(rows))

    def _write(self, kind: Kind) -> None:
        with self._rows_lock:
            rows = list(self._rows[kind])
        table = pa.Table.from_pylist([row for row, _ in rows], schema=SCHEMAS[kind])
        table = _without_deleted(table, read_forgotten(self._workspace)) if rows else table
        if table.num_rows:
            first_ms = pc.min(table.column("moment")).value
            day = (EPOCH + timedelta(milliseconds=first_ms)).date().isoformat()
            path = f"{IMPRESSIONS}/{kind}/day={day}/{first_ms:013d}-{self._writer}-{self._file_count:06d}.parquet"
            self._workspace.write_table(path, table)
            self._file_count += 1
            self._unchecked_bytes += self._workspace.size(path)
        with self._rows_lock:
            for _ in rows:
                self._waiting_bytes -= self._rows[kind].popleft()[1]
        self._count(kind, "written", table.num_rows)

    def _run(self) -> None:
        while True:
            self._due.wait(self._bounds.seconds)
            self._due.clear()
            is_closing = self._closed.is_set()
            try:
                self.flush()
            except Exception as error:  # requests must be answered, whatever is wrong with the storage
                log.warning("cannot write the impression log, %d rows are waiting: %s", self.waiting, error)
                self._closed.wait(RETRY_SECONDS)
            if is_closing:
                return


def read_impressions(workspace: Workspace, kind: Kind, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield the rows of one kind, one table per file, oldest file first, without rows of deleted users."""
    forgotten = read_forgotten(workspace)
    needed_columns = columns and list(dict.fromkeys([*columns, "user_id", "moment"]))
    for path in log_files(workspace, kind):
        try:
            table = _without_deleted(workspace.read_table(path, needed_columns), forgotten)
        except NotFoundError:  # deleted to make room since it was listed
            continue
        yield table.select(columns) if columns else table


def log_files(workspace: Workspace, kind: Kind | None = None) -> dict[str, int]:
    """Return the files of one kind, or of both kinds, with their sizes in bytes, oldest first."""
    sizes = workspace.sizes(f"{IMPRESSIONS}/{kind}" if kind else IMPRESSIONS)
    files = [path for path in sizes if path.endswith(".parquet")]
    return {path: sizes[path] for path in sorted(files, key=lambda path: path.rpartition("/")[2])}


def prune(workspace: Workspace, max_bytes: int) -> dict[Kind, int]:
    """Delete the oldest files until the log has at most `max_bytes`; return the number of rows lost of each kind."""
    files = log_files(workspace)
    total, expired = sum(files.values()), dict.fromkeys(KINDS, 0)
    for path, size in files.items():
        if total <= max_bytes:
            break
        try:
            with workspace.open_input(path) as stream:
                rows = pq.ParquetFile(stream).metadata.num_rows
        except NotFoundError:  # another replica has deleted it
            rows = 0
        workspace.delete(path)
        expired[_kind(path)] += rows
        total -= size
    return expired


def erase_impressions(workspace: Workspace) -> int:
    """Delete the rows of deleted users from all files; return their number."""
    forgotten, erased = read_forgotten(workspace), 0
    for path in log_files(workspace):
        try:
            users = workspace.read_table(path, ["user_id", "moment"])
            remaining_rows = _without_deleted(users, forgotten).num_rows
            if remaining_rows == users.num_rows:
                continue
            if remaining_rows:
                workspace.write_table(path, _without_deleted(workspace.read_table(path), forgotten))
            else:
                workspace.delete(path)
        except NotFoundError:  # deleted to make room since it was listed
            continue
        erased += users.num_rows - remaining_rows
    return erased


def compact_impressions(workspace: Workspace) -> None:
    """Join the files of each day before today into a few.

    Only one process may do so at a time. If it is killed, some rows may be stored twice, with the same ids.
    """
    today = f"day={format_iso(now_ms())[:10]}"
    for kind in KINDS:
        groups: dict[tuple[str, int], dict[str, int]] = {}
        for path, size in log_files(workspace, kind).items():
            folder, group = path.rpartition("/")[0], 0
            while (folder, group) in groups and sum(groups[folder, group].values()) + size > JOINED_BYTES:
                group += 1
            if not folder.endswith(today):  # replicas still write to the folder of today
                groups.setdefault((folder, group), {})[path] = size
        for files in groups.values():
            if len(files) > 1:
                _merge_files(workspace, list(files))


def _merge_files(workspace: Workspace, paths: list[str]) -> None:
    """Put the rows of all files into the first one."""
    try:
        table = pa.concat_tables([workspace.read_table(path) for path in paths])
    except NotFoundError:  # deleted to make room since they were listed
        return
    workspace.write_table(paths[0], table)
    for path in paths[1:]:
        workspace.delete(path)


def _without_deleted(table: pa.Table, forgotten: ForgottenUsers) -> pa.Table:
    """Return a table without the rows of deleted users up to their deletion."""
    if not forgotten:
        return table
    users = table.column("user_id").combine_chunks().dictionary_encode()
    deletion_times = pa.array(forgotten.until(users.dictionary.to_pylist()), pa.int64())
    limits = pc.fill_null(pc.take(deletion_times, users.indices), NEVER)
    return table.filter(pc.greater(table.column("moment").cast(pa.int64()).combine_chunks(), limits))


def _kind(path: str) -> Kind:
    kind: Kind = "answers" if path.startswith(f"{IMPRESSIONS}/answers/") else "events"
    return kind
