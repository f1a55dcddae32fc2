"""User states in one SQLite file: the embedded store, for the replicas of one node.

Write-ahead log with synchronous=FULL: a commit has reached the disk when it returns, so it survives the death of
the process and of the machine. Readers never wait for a writer; writers, of any process, take turns. The file must
lie on a local disk: the write-ahead log needs memory that its processes share.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from rayrec.errors import InputError
from rayrec.online.state_store import (
    NOT_THERE,
    Change,
    OnlineSong,
    StateStore,
    Stored,
    StoreUnavailableError,
    WholeUser,
    event_days,
    user_key,
)

FORMAT = 3  # of the tables, in user_version; 0 is a file that was just made
WAIT_SECONDS = 10.0  # for other writers, at most
PAGE_BYTES = 8_192  # a state takes 1.3 KB: of pages of 4 KB a third would stay empty
VARIABLES = 500  # of one statement: SQLite allows 999 in old builds

TABLES = """
CREATE TABLE users (user BLOB PRIMARY KEY, version INTEGER NOT NULL, state BLOB NOT NULL, heard BLOB);
CREATE TABLE log (
    user BLOB NOT NULL, place INTEGER NOT NULL, plays INTEGER NOT NULL, data BLOB NOT NULL,
    PRIMARY KEY (user, place));
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


class SqliteStore(StateStore):
    """Each thread has a connection of its own."""

    def __init__(self, path: str | Path, namespace: str) -> None:
        """Raises `InputError` where the file cannot be opened or is none of ours."""
        self._path, self._namespace = Path(path), namespace
        self._own = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._cleared = 0  # the day on which old events were deleted last
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._prepare()
        except (OSError, sqlite3.DatabaseError) as error:
            raise InputError(
                f"store {self._path} cannot be opened: {error}; name a file that rayrec made, or a new one"
            ) from error

    @classmethod
    def from_uri(cls, uri: str, namespace: str) -> "SqliteStore":
        """From sqlite:///relative/path or sqlite:////absolute/path."""
        parts = urlsplit(uri)
        path = unquote(parts.path)[1:]
        if parts.netloc or not path:
            raise InputError(f"store {uri!r} names no file; give sqlite:///PATH, four slashes where it is absolute")
        return cls(path, namespace)

    def get(self, users: Mapping[str, Sequence[int]]) -> list[Stored | None]:
        """As in `StateStore`."""
        with self._transaction("DEFERRED") as connection:
            return [self._get(connection, self._key(user_id), events) for user_id, events in users.items()]

    def read(self, user_ids: Sequence[str], *, plays: int | None = None) -> list[WholeUser | None]:
        """As in `StateStore`."""
        with self._transaction("DEFERRED") as connection:
            return [self._read(connection, self._key(user_id), plays) for user_id in user_ids]

    def put(self, changes: Sequence[Change]) -> list[bool]:
        """As in `StateStore`; one transaction, and one wait for the disk, for all."""
        keys = [self._key(change.user_id) for change in changes]
        with self._transaction("IMMEDIATE") as connection:
            self._clear_events(connection)
            new = {key: change for key, change in zip(keys, changes, strict=True) if change.expected == NOT_THERE}
            for key in self._stored(connection, list(new)):
                del new[key]
            self._put_new(connection, new)
            return [
                new.get(key) is change or (change.expected != NOT_THERE and self._put(connection, key, change))
                for key, change in zip(keys, changes, strict=True)
            ]

    def forget(self, user_ids: Sequence[str], state: bytes) -> None:
        """As in `StateStore`; the deleted bytes are overwritten with zeros."""
        keys = [self._key(user_id) for user_id in user_ids]
        for begin in range(0, len(keys), VARIABLES):  # other writers wait for a transaction
            with self._transaction("IMMEDIATE") as connection:
                for key in keys[begin : begin + VARIABLES]:
                    connection.execute("DELETE FROM log WHERE user = ?", (key,))
                    for day in event_days():
                        connection.execute("DELETE FROM events WHERE day = ? AND user = ?", (day, key))
                    connection.execute(
                        "INSERT INTO users VALUES (?1, 1, ?2, NULL) "
                        "ON CONFLICT (user) DO UPDATE SET version = version + 1, state = ?2, heard = NULL",
                        (key, state),
                    )
        self._empty_log()

    def rewrite(self) -> None:
        """As in `StateStore`: deleted bytes are overwritten when they are deleted, what may be left is the log."""
        if not self._empty_log():
            raise StoreUnavailableError(f"store {self._path} is read all the while; try again when fewer use it")

    def loaded(self, load: str) -> dict[int, str]:
        """As in `StateStore`."""
        with self._connection() as connection:
            return dict(connection.execute("SELECT bucket, text FROM loads WHERE load = ?", (self._load(load),)))

    def mark_loaded(self, load: str, bucket: int, text: str) -> None:
        """As in `StateStore`."""
        with self._connection() as connection:
            connection.execute("INSERT OR REPLACE INTO loads VALUES (?, ?, ?)", (self._load(load), bucket, text))

    def add_songs(self, songs: Mapping[str, bytes], most: int) -> list[bool] | None:
        """As in `StateStore`; one transaction."""
        with self._transaction("IMMEDIATE") as connection:
            rows = connection.execute("SELECT song_id, data != x'' FROM songs WHERE namespace = ?", (self._namespace,))
            known = {song_id: bool(is_open) for song_id, is_open in rows}
            added = [not known.get(song_id, False) for song_id in songs]
            if any(added) and sum(known.values()) + sum(added) > most:
                return None
            version, numbers = self._songs_version(connection) + 1, len(known)
            for song_id, data, is_new in zip(songs, songs.values(), added, strict=True):
                if is_new and song_id in known:
                    connection.execute(
                        "UPDATE songs SET version = ?, data = ? WHERE namespace = ? AND song_id = ?",
                        (version, data, self._namespace, song_id),
                    )
                elif is_new:
                    values = (self._namespace, numbers, song_id, version, data, "", b"")
                    connection.execute("INSERT INTO songs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                    numbers += 1
            return added

    def songs_since(self, version: int) -> tuple[int, list[OnlineSong]]:
        """As in `StateStore`; where nothing changed one row of an index is read."""
        with self._transaction("DEFERRED") as connection:
            now = self._songs_version(connection)
            if now == version:
                return now, []
            rows = connection.execute(
                "SELECT number, song_id, data, model, sums FROM songs WHERE namespace = ? AND version > ? "
                "ORDER BY number",
                (self._namespace, version),
            )
            names = ("number", "song_id", "data", "model", "sums")
            return now, [OnlineSong(**dict(zip(names, row, strict=True))) for row in rows]

    def count_song_plays(self, model: str, sums: Mapping[int, bytes]) -> None:
        """As in `StateStore`; one transaction."""
        with self._transaction("IMMEDIATE") as connection:
            version = self._songs_version(connection) + 1
            for number, added in sums.items():
                key = (self._namespace, number)
                row = connection.execute(
                    "SELECT model, sums FROM songs WHERE namespace = ? AND number = ? AND data != x''", key
                ).fetchone()
                if row is None:
                    continue
                total = np.frombuffer(added)
                if row[0] == model and len(row[1]) == len(added):
                    total = total + np.frombuffer(row[1])
                connection.execute(
                    "UPDATE songs SET version = ?, model = ?, sums = ? WHERE namespace = ? AND number = ?",
                    (version, model, total.tobytes(), *key),
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
        while self._connections:
            self._connections.pop().close()

    def _empty_log(self) -> bool:
        """Empty the write-ahead log, where older pages stay; False where readers held it for too long."""
        with self._connection() as connection:
            ((busy, _, _),) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return not busy

    def _key(self, user_id: str) -> bytes:
        return user_key(self._namespace, user_id)

    def _load(self, load: str) -> str:
        return f"{self._namespace}:{load}"

    def _songs_version(self, connection: sqlite3.Connection) -> int:
        newest = connection.execute("SELECT MAX(version) FROM songs WHERE namespace = ?", (self._namespace,)).fetchone()
        return int(newest[0] or 0)

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
        known: set[int] = set()
        for begin in range(0, len(events), VARIABLES):
            some = events[begin : begin + VARIABLES]
            places = ", ".join("?" * len(some))
            rows = connection.execute(
                f"SELECT event FROM events WHERE day IN (?, ?, ?) AND user = ? AND event IN ({places})",
                (*event_days(), key, *some),
            )
            known.update(event for (event,) in rows)
        return Stored(version=row[0], state=row[1], events=frozenset(known))

    def _read(self, connection: sqlite3.Connection, key: bytes, plays: int | None) -> WholeUser | None:
        stored = self._get(connection, key)
        if stored is None:
            return None
        pieces: list[bytes] = []
        count = 0
        rows = connection.execute("SELECT plays, data FROM log WHERE user = ? ORDER BY place DESC", (key,))
        while (plays is None or count < plays) and (row := rows.fetchone()) is not None:
            count += row[0]
            pieces.append(row[1])
        rows.close()
        heard = connection.execute("SELECT heard FROM users WHERE user = ?", (key,)).fetchone()[0]
        return WholeUser(stored=stored, log=pieces[::-1], heard=heard)

    def _stored(self, connection: sqlite3.Connection, keys: Sequence[bytes]) -> Iterator[bytes]:
        """Those of some users who are in the store."""
        for begin in range(0, len(keys), VARIABLES):
            some = keys[begin : begin + VARIABLES]
            places = ", ".join("?" * len(some))
            yield from (key for (key,) in connection.execute(f"SELECT user FROM users WHERE user IN ({places})", some))

    def _put_new(self, connection: sqlite3.Connection, users: Mapping[bytes, Change]) -> None:
        """Users who are not in the store, by their keys."""
        connection.executemany(
            "INSERT INTO users VALUES (?, 1, ?, ?)", [(key, user.state, user.heard) for key, user in users.items()]
        )
        pieces = [
            (key, place, piece.plays, piece.data)
            for key, user in users.items()
            for place, piece in enumerate(user.append)
        ]
        connection.executemany("INSERT INTO log VALUES (?, ?, ?, ?)", pieces)
        for key, user in users.items():
            self._put_events(connection, key, user)

    def _put(self, connection: sqlite3.Connection, key: bytes, change: Change) -> bool:
        done = connection.execute(
            "UPDATE users SET version = version + 1, state = ? WHERE user = ? AND version = ?",
            (change.state, key, change.expected),
        )
        if done.rowcount != 1:
            return False
        if change.restart:
            connection.execute("DELETE FROM log WHERE user = ?", (key,))
            connection.execute("UPDATE users SET heard = NULL WHERE user = ?", (key,))
        if change.heard is not None:
            connection.execute("UPDATE users SET heard = ? WHERE user = ?", (change.heard, key))
        for piece in change.append:
            connection.execute(
                "INSERT INTO log SELECT ?1, COALESCE(MAX(place) + 1, 0), ?2, ?3 FROM log WHERE user = ?1",
                (key, piece.plays, piece.data),
            )
        self._put_events(connection, key, change)
        return True

    def _put_events(self, connection: sqlite3.Connection, key: bytes, change: Change) -> None:
        if change.events:
            today = event_days()[0]
            connection.executemany(
                "INSERT OR IGNORE INTO events VALUES (?, ?, ?)", [(today, key, event) for event in change.events]
            )

    def _clear_events(self, connection: sqlite3.Connection) -> None:
        """Delete the events of days that nobody looks up any more, once a day."""
        today = event_days()[0]
        if self._cleared != today:
            connection.execute("DELETE FROM events WHERE day < ?", (today - 1,))
            self._cleared = today

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection; what is run on it alone is a transaction of its own."""
        try:
            connection: sqlite3.Connection | None = getattr(self._own, "connection", None)
            if connection is None:
                connection = sqlite3.connect(
                    self._path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False
                )
                self._connections.append(connection)
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")  # of a new file
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA secure_delete = ON")  # a deleted user's bytes must not stay in free pages
                self._own.connection = connection
            yield connection
        except sqlite3.OperationalError as error:
            raise StoreUnavailableError(f"store {self._path} does not answer: {error}; try again") from error

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
