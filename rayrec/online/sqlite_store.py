"""User states in one SQLite file: the embedded store, for the replicas of one node.

The file has a write-ahead log with synchronous=FULL: a commit has reached the disk when it returns, so it survives the
death of the process and of the machine. Loads have separate connections with synchronous=NORMAL. Their commits reach
the disk with the next commit of another connection, such as the one that marks a bucket as loaded. Readers never wait
for a writer; writers, of any process, take turns. The file must be on a local disk, because the processes share memory
for the write-ahead log.
"""

import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from rayrec.errors import InputError
from rayrec.online.state_store import (
    NO_VERSION,
    Change,
    FullUser,
    OnlineSong,
    StateStore,
    Stored,
    StoreUnavailableError,
    event_days,
    sqlite_path,
    user_key,
)
from rayrec.storage.object_storage import without_secrets

FORMAT = 4  # version of the tables, in user_version; 0 in a new file
WAIT_SECONDS = 10.0  # maximum wait for other writers
PAGE_BYTES = 8_192  # a state takes 1.3 KB, so that a third of a page of 4 KB would stay empty
CACHE_BYTES = 128 << 20  # of a connection that loads users; with less, changed pages are written many times
LOG_BYTES = 128 << 20  # size of the write-ahead log at which such a connection copies it into the file
VARIABLES = 32_000 if sqlite3.sqlite_version_info >= (3, 32) else 900  # per statement; SQLite allows a few more
FORGOTTEN_AT_ONCE = 500  # users deleted in one transaction, during which other writers wait
PIECES = 1 << 24  # more than one user's log can have, because each piece holds all plays that leave a window together

# Users are numbered in the order in which they are added, so that both tables grow at the end.
# `piece` is number * PIECES + the position in the user's log.
TABLES = """
CREATE TABLE users (
    number INTEGER PRIMARY KEY, user BLOB NOT NULL UNIQUE, version INTEGER NOT NULL, state BLOB NOT NULL, heard BLOB);
CREATE TABLE log (piece INTEGER PRIMARY KEY, plays INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE events (
    day INTEGER NOT NULL, user BLOB NOT NULL, event INTEGER NOT NULL,
    PRIMARY KEY (day, user, event)) WITHOUT ROWID;
CREATE TABLE loads (
    load TEXT NOT NULL, bucket INTEGER NOT NULL, text TEXT NOT NULL, PRIMARY KEY (load, bucket));
CREATE TABLE songs (
    namespace TEXT NOT NULL, number INTEGER NOT NULL, song_id TEXT NOT NULL, version INTEGER NOT NULL,
    data BLOB NOT NULL, model TEXT NOT NULL, sums BLOB NOT NULL,
    PRIMARY KEY (namespace, number), UNIQUE (namespace, song_id));
CREATE INDEX changed_songs ON songs (namespace, version);
"""


USER_LOG_CONDITION = "piece >= ?1 AND piece < ?2"  # selects one user's log, with the values of `_piece_range`


class _ThreadConnections:
    """The connections of one thread. They are closed when it ends, since nothing else keeps this object."""

    def __init__(self) -> None:
        self.by_name: dict[str, sqlite3.Connection] = {}

    def close(self) -> None:
        """Close the connections."""
        for connection in list(self.by_name.values()):
            connection.close()

    def __del__(self) -> None:
        self.close()


class SqliteStore(StateStore):
    """A store in an SQLite file. Each thread has a separate connection, and a second one if it loads users.

    The connections of a thread are closed when it ends: a server's thread pool ends idle threads and starts new ones.
    """

    one_writer = True

    def __init__(self, path: str | Path, namespace: str) -> None:
        """Raises `InputError` if the file cannot be opened or was not made by rayrec."""
        self._path, self._namespace = Path(path), namespace
        self._thread_values = threading.local()
        self._thread_connections: WeakSet[_ThreadConnections] = WeakSet()
        self._cleared_day = 0  # the last day on which old events were deleted
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._prepare()
        except (OSError, sqlite3.DatabaseError) as error:
            raise InputError(
                f"store {self._path} cannot be opened: {error}; give a store made by rayrec, or a path that does not "
                "exist yet"
            ) from error

    def __reduce__(self) -> tuple[type["SqliteStore"], tuple[Path, str]]:
        return SqliteStore, (self._path, self._namespace)

    @classmethod
    def from_uri(cls, uri: str, namespace: str) -> "SqliteStore":
        """Open the store at sqlite:///relative/path or sqlite:////absolute/path."""
        path = sqlite_path(uri)
        if path is None:
            raise InputError(
                f"store {without_secrets(uri)!r} has no path; give sqlite:///relative/path or sqlite:////absolute/path"
            )
        return cls(path, namespace)

    def get(self, users: Mapping[str, Sequence[int]]) -> list[Stored | None]:
        """As in `StateStore`."""
        with self._transaction("DEFERRED") as connection:
            return [self._get(connection, self._key(user_id), events) for user_id, events in users.items()]

    def read(self, user_ids: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        """As in `StateStore`."""
        with self._transaction("DEFERRED") as connection:
            return [self._read(connection, self._key(user_id), plays) for user_id in user_ids]

    def put(self, changes: Sequence[Change], *, loading: bool = False) -> list[bool]:
        """As in `StateStore`; all changes are one transaction, with one wait for the disk, or none with `loading`."""
        keys = [self._key(change.user_id) for change in changes]
        with self._transaction("IMMEDIATE", loading=loading) as connection:
            self._clear_events(connection)
            new_changes = {
                key: change for key, change in zip(keys, changes, strict=True) if change.expected == NO_VERSION
            }
            for key in self._existing_keys(connection, list(new_changes)):
                del new_changes[key]
            self._put_new(connection, new_changes)
            return [
                new_changes.get(key) is change or (change.expected != NO_VERSION and self._put(connection, key, change))
                for key, change in zip(keys, changes, strict=True)
            ]

    def forget(self, user_ids: Sequence[str], state: bytes, namespaces: Collection[str] = ()) -> None:
        """As in `StateStore`; the deleted bytes are overwritten with zeros."""
        keys = [user_key(name, user_id) for user_id in user_ids for name in {self._namespace, *namespaces}]
        for start in range(0, len(keys), FORGOTTEN_AT_ONCE):
            with self._transaction("IMMEDIATE") as connection:
                for key in keys[start : start + FORGOTTEN_AT_ONCE]:
                    connection.execute(f"DELETE FROM log WHERE {USER_LOG_CONDITION}", _piece_range(connection, key))
                    connection.execute(
                        "INSERT INTO users (user, version, state) VALUES (?1, 1, ?2) "
                        "ON CONFLICT (user) DO UPDATE SET version = version + 1, state = ?2, heard = NULL",
                        (key, state),
                    )
        self._empty_log()

    def rewrite(self) -> None:
        """As in `StateStore`. Deletions overwrite their bytes, so that only the write-ahead log may still hold some.

        Old events, which are not looked up any more, are deleted first.
        """
        with self._transaction("IMMEDIATE") as connection:
            self._clear_events(connection)
        if not self._empty_log():
            raise StoreUnavailableError(f"store {self._path} is busy with readers; try again later")

    def loaded(self, load: str) -> dict[int, str]:
        """As in `StateStore`."""
        with self._connection() as connection:
            return dict(connection.execute("SELECT bucket, text FROM loads WHERE load = ?", (self._load_name(load),)))

    def mark_loaded(self, load: str, bucket: int, text: str) -> None:
        """As in `StateStore`."""
        with self._connection() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (self._load_name(load), bucket, text))

    def add_songs(self, songs: Mapping[str, bytes], most: int, first_number: int) -> list[bool] | None:
        """As in `StateStore`; one transaction."""
        with self._transaction("IMMEDIATE") as connection:
            rows = connection.execute("SELECT song_id, data != x'' FROM songs WHERE namespace = ?", (self._namespace,))
            is_open_by_id = {song_id: bool(is_open) for song_id, is_open in rows}
            is_added = [not is_open_by_id.get(song_id, False) for song_id in songs]
            if any(is_added) and sum(is_open_by_id.values()) + sum(is_added) > most:
                return None
            version = self._songs_version(connection) + 1
            row = connection.execute("SELECT MAX(number) FROM songs WHERE namespace = ?", (self._namespace,)).fetchone()
            next_number = first_number if row[0] is None else max(first_number, row[0] + 1)
            for song_id, data, is_new in zip(songs, songs.values(), is_added, strict=True):
                if is_new and song_id in is_open_by_id:
                    connection.execute(
                        "UPDATE songs SET version = ?, data = ? WHERE namespace = ? AND song_id = ?",
                        (version, data, self._namespace, song_id),
                    )
                elif is_new:
                    values = (self._namespace, next_number, song_id, version, data, "", b"")
                    connection.execute("INSERT INTO songs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                    next_number += 1
            return is_added

    def songs_since(self, version: int) -> tuple[int, list[OnlineSong]]:
        """As in `StateStore`; reads only one row of an index if nothing changed."""
        with self._transaction("DEFERRED") as connection:
            current_version = self._songs_version(connection)
            if current_version == version:
                return current_version, []
            rows = connection.execute(
                "SELECT number, song_id, data, model, sums FROM songs WHERE namespace = ? AND version > ? "
                "ORDER BY number",
                (self._namespace, version),
            )
            column_names = ("number", "song_id", "data", "model", "sums")
            return current_version, [OnlineSong(**dict(zip(column_names, row, strict=True))) for row in rows]

    def count_song_plays(self, model: str, sums: Mapping[int, bytes]) -> None:
        """As in `StateStore`; one transaction."""
        with self._transaction("IMMEDIATE") as connection:
            version = self._songs_version(connection) + 1
            for number, added_sums in sums.items():
                key = (self._namespace, number)
                row = connection.execute(
                    "SELECT model, sums FROM songs WHERE namespace = ? AND number = ? AND data != x''", key
                ).fetchone()
                if row is None:
                    continue
                total_sums = np.frombuffer(added_sums)
                if row[0] == model and len(row[1]) == len(added_sums):
                    total_sums = total_sums + np.frombuffer(row[1])
                connection.execute(
                    "UPDATE songs SET version = ?, model = ?, sums = ? WHERE namespace = ? AND number = ?",
                    (version, model, total_sums.tobytes(), *key),
                )

    def close_songs(self, numbers: Sequence[int]) -> None:
        """As in `StateStore`; one transaction."""
        with self._transaction("IMMEDIATE") as connection:
            version = self._songs_version(connection) + 1
            connection.executemany(
                "UPDATE songs SET version = ?, data = x'', model = '', sums = x'' WHERE namespace = ? AND number = ?",
                [(version, self._namespace, number) for number in numbers],
            )

    def close(self) -> None:
        """As in `StateStore`."""
        for connections in list(self._thread_connections):
            connections.close()

    def _empty_log(self) -> bool:
        """Empty the write-ahead log, which keeps old pages; False if readers used it for too long."""
        with self._connection() as connection:
            ((busy, _, _),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return not busy

    def _key(self, user_id: str) -> bytes:
        return user_key(self._namespace, user_id)

    def _load_name(self, load: str) -> str:
        return f"{self._namespace}:{load}"

    def _songs_version(self, connection: sqlite3.Connection) -> int:
        row = connection.execute("SELECT MAX(version) FROM songs WHERE namespace = ?", (self._namespace,)).fetchone()
        return int(row[0] or 0)

    def _prepare(self) -> None:
        with self._transaction("IMMEDIATE") as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if version == 0 and tables == 0:
                for statement in TABLES.split(";")[:-1]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            elif version != FORMAT:
                raise sqlite3.DatabaseError(f"its format is {version}, this rayrec reads {FORMAT}")

    def _get(self, connection: sqlite3.Connection, key: bytes, events: Sequence[int] = ()) -> Stored | None:
        row = connection.execute("SELECT version, state FROM users WHERE user = ?", (key,)).fetchone()
        if row is None:
            return None
        known_events: set[int] = set()
        for start in range(0, len(events), VARIABLES):
            chunk = events[start : start + VARIABLES]
            placeholders = ", ".join("?" * len(chunk))
            rows = connection.execute(
                f"SELECT event FROM events WHERE day IN (?, ?, ?) AND user = ? AND event IN ({placeholders})",
                (*event_days(), key, *chunk),
            )
            known_events.update(event for (event,) in rows)
        return Stored(version=row[0], state=row[1], events=frozenset(known_events))

    def _read(self, connection: sqlite3.Connection, key: bytes, plays: int | None) -> FullUser | None:
        stored = self._get(connection, key)
        if stored is None:
            return None
        pieces: list[bytes] = []
        count = 0
        piece_range = _piece_range(connection, key)
        rows = connection.execute(
            f"SELECT plays, data FROM log WHERE {USER_LOG_CONDITION} ORDER BY piece DESC", piece_range
        )
        while (plays is None or count < plays) and (row := rows.fetchone()) is not None:
            count += row[0]
            pieces.append(row[1])
        rows.close()
        heard = connection.execute("SELECT heard FROM users WHERE user = ?", (key,)).fetchone()[0]
        return FullUser(stored=stored, log=pieces[::-1], heard=heard)

    def _existing_keys(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> Iterator[bytes]:
        """Yield the keys of users who are in the store."""
        for start in range(0, len(keys), VARIABLES):
            chunk = keys[start : start + VARIABLES]
            placeholders = ", ".join("?" * len(chunk))
            yield from (
                key for (key,) in connection.execute(f"SELECT user FROM users WHERE user IN ({placeholders})", chunk)
            )

    def _put_new(self, connection: sqlite3.Connection, changes: Mapping[bytes, Change]) -> None:
        """Insert users who are not in the store, sorted by key, so that each page of the index is changed only once."""
        changes = dict(sorted(changes.items()))
        (first_number,) = connection.execute("SELECT COALESCE(MAX(number), 0) + 1 FROM users").fetchone()
        rows = [
            (number, key, change.state, change.heard)
            for number, (key, change) in enumerate(changes.items(), first_number)
        ]
        _insert(connection, "users", "(?, ?, 1, ?, ?)", rows)
        pieces = [
            (number * PIECES + index, piece.plays, piece.data)
            for number, change in enumerate(changes.values(), first_number)
            for index, piece in enumerate(change.append)
        ]
        _insert(connection, "log", "(?, ?, ?)", pieces)
        for key, change in changes.items():
            if change.events:
                self._put_events(connection, key, change)

    def _put(self, connection: sqlite3.Connection, key: bytes, change: Change) -> bool:
        cursor = connection.execute(
            "UPDATE users SET version = version + 1, state = ? WHERE user = ? AND version = ?",
            (change.state, key, change.expected),
        )
        if cursor.rowcount != 1:
            return False
        if change.restart:
            connection.execute(f"DELETE FROM log WHERE {USER_LOG_CONDITION}", _piece_range(connection, key))
            connection.execute("UPDATE users SET heard = NULL WHERE user = ?", (key,))
        if change.heard is not None:
            connection.execute("UPDATE users SET heard = ? WHERE user = ?", (change.heard, key))
        if change.append:
            query = f"SELECT COALESCE(MAX(piece) + 1, ?1) FROM log WHERE {USER_LOG_CONDITION}"
            (first_piece,) = connection.execute(query, _piece_range(connection, key)).fetchone()
            pieces = [
                (piece_number, piece.plays, piece.data) for piece_number, piece in enumerate(change.append, first_piece)
            ]
            _insert(connection, "log", "(?, ?, ?)", pieces)
        self._put_events(connection, key, change)
        return True

    def _put_events(self, connection: sqlite3.Connection, key: bytes, change: Change) -> None:
        if change.events:
            today = event_days()[0]
            connection.executemany(
                "INSERT OR IGNORE INTO events VALUES (?, ?, ?)", [(today, key, event) for event in change.events]
            )

    def _clear_events(self, connection: sqlite3.Connection) -> None:
        """Delete the events of days that are not looked up any more, once per day."""
        today = event_days()[0]
        if self._cleared_day != today:
            connection.execute("DELETE FROM events WHERE day < ?", (today - 1,))
            self._cleared_day = today

    @contextmanager
    def _connection(self, *, loading: bool = False) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection. Without `_transaction`, each statement is a transaction by itself."""
        try:
            connections: _ThreadConnections | None = getattr(self._thread_values, "connections", None)
            if connections is None:
                connections = self._thread_values.connections = _ThreadConnections()
                self._thread_connections.add(connections)
            name = "loading" if loading else "connection"
            connection = connections.by_name.get(name)
            if connection is None:
                connection = sqlite3.connect(
                    self._path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
                )
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # has an effect only in a new file
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute(f"PRAGMA synchronous = {'NORMAL' if loading else 'FULL'}")
                connection.execute("PRAGMA secure_delete = ON")  # a deleted user's bytes must not stay in free pages
                if loading:  # cache all pages that thousands of users change, and copy the log into the file late
                    connection.execute(f"PRAGMA cache_size = -{CACHE_BYTES >> 10}")
                    connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_BYTES // PAGE_BYTES}")
                connections.by_name[name] = connection
            yield connection
        except sqlite3.OperationalError as error:
            raise StoreUnavailableError(f"store {self._path} does not answer: {error}; try again") from error

    @contextmanager
    def _transaction(self, kind: str, *, loading: bool = False) -> Iterator[sqlite3.Connection]:
        with self._connection(loading=loading) as connection:
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise


def _piece_range(connection: sqlite3.Connection, key: bytes) -> tuple[int, int]:
    """Return where the pieces of a user begin in the log, and where those of the next user begin.

    An unknown user has number 0, for which there are no pieces, because numbers begin at 1.
    """
    row = connection.execute("SELECT number FROM users WHERE user = ?", (key,)).fetchone()
    number = 0 if row is None else int(row[0])
    return number * PIECES, (number + 1) * PIECES


def _insert(connection: sqlite3.Connection, table: str, row_placeholders: str, rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows, as many per statement as possible, because other Python threads can work while a statement runs."""
    size = VARIABLES // row_placeholders.count("?")
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        placeholders = ", ".join([row_placeholders] * len(chunk))
        connection.execute(
            f"INSERT INTO {table} VALUES {placeholders}", [value for values in chunk for value in values]
        )
