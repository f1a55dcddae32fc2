"""User states in one SQLite file: the embedded store, for the replicas of one node.

Write-ahead log with synchronous=FULL: a commit has reached the disk when it returns, so it survives the death of
the process and of the machine. Readers never wait for a writer; writers, of any process, take turns. The file must
lie on a local disk: the write-ahead log needs memory that its processes share.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from rayrec.errors import InputError
from rayrec.online.stores.state_store import NOT_THERE, Change, StateStore, Stored, StoreUnavailableError, Whole

FORMAT = 1  # of the tables, in user_version; 0 is a file that was just made
WAIT_SECONDS = 10.0  # for other writers, at most

TABLES = """
CREATE TABLE states (
    namespace TEXT NOT NULL, user TEXT NOT NULL, version INTEGER NOT NULL, state BLOB NOT NULL,
    PRIMARY KEY (namespace, user));
CREATE TABLE log (
    namespace TEXT NOT NULL, user TEXT NOT NULL, place INTEGER NOT NULL, plays BLOB NOT NULL,
    PRIMARY KEY (namespace, user, place));
CREATE TABLE notes (
    namespace TEXT NOT NULL, name TEXT NOT NULL, text TEXT NOT NULL, PRIMARY KEY (namespace, name));
"""


class SqliteStore(StateStore):
    """Each thread has a connection of its own."""

    def __init__(self, path: str | Path, namespace: str) -> None:
        """Raises `InputError` where the file cannot be opened or is none of ours."""
        self._path, self._namespace = Path(path), namespace
        self._own = threading.local()
        self._connections: list[sqlite3.Connection] = []
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

    def get(self, user_id: str) -> Stored | None:
        """As in `StateStore`."""
        with self._connection() as connection:
            return self._get(connection, user_id)

    def read(self, user_id: str) -> Whole | None:
        """As in `StateStore`."""
        with self._transaction("DEFERRED") as connection:
            stored = self._get(connection, user_id)
            if stored is None:
                return None
            pieces = connection.execute(
                "SELECT plays FROM log WHERE namespace = ? AND user = ? ORDER BY place", (self._namespace, user_id)
            )
            return Whole(stored=stored, log=[piece for (piece,) in pieces])

    def put(self, changes: Sequence[Change]) -> list[bool]:
        """As in `StateStore`; one transaction, and one wait for the disk, for all."""
        with self._transaction("IMMEDIATE") as connection:
            return [self._put(connection, change) for change in changes]

    def count(self) -> int:
        """As in `StateStore`."""
        with self._connection() as connection:
            row = connection.execute("SELECT COUNT(*) FROM states WHERE namespace = ?", (self._namespace,)).fetchone()
            return int(row[0])

    def note(self, name: str) -> str | None:
        """As in `StateStore`."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT text FROM notes WHERE namespace = ? AND name = ?", (self._namespace, name)
            ).fetchone()
            return None if row is None else str(row[0])

    def write_note(self, name: str, text: str) -> None:
        """As in `StateStore`."""
        with self._connection() as connection:
            connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?, ?)", (self._namespace, name, text))

    def close(self) -> None:
        """As in `StateStore`."""
        while self._connections:
            self._connections.pop().close()

    def _prepare(self) -> None:
        with self._transaction("IMMEDIATE") as connection:
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            tables = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]
            if found == 0 and tables == 0:
                for statement in TABLES.split(";")[:-1]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {FORMAT}")
            elif found != FORMAT:
                raise sqlite3.DatabaseError(f"its format is {found}, this rayrec reads {FORMAT}")

    def _get(self, connection: sqlite3.Connection, user_id: str) -> Stored | None:
        row = connection.execute(
            "SELECT version, state FROM states WHERE namespace = ? AND user = ?", (self._namespace, user_id)
        ).fetchone()
        return None if row is None else Stored(version=row[0], state=row[1])

    def _put(self, connection: sqlite3.Connection, change: Change) -> bool:
        key = (self._namespace, change.user_id)
        if change.expected == NOT_THERE:
            done = connection.execute("INSERT OR IGNORE INTO states VALUES (?, ?, 1, ?)", (*key, change.state))
        else:
            done = connection.execute(
                "UPDATE states SET version = version + 1, state = ? WHERE namespace = ? AND user = ? AND version = ?",
                (change.state, *key, change.expected),
            )
        if done.rowcount != 1:
            return False
        if change.restart:
            connection.execute("DELETE FROM log WHERE namespace = ? AND user = ?", key)
        if change.append is not None:
            connection.execute(
                "INSERT INTO log SELECT ?1, ?2, COALESCE(MAX(place) + 1, 0), ?3 FROM log "
                "WHERE namespace = ?1 AND user = ?2",
                (*key, change.append),
            )
        return True

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
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
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
