"""The one interface of all stores of user states.

A store holds, for each user, the state, which is replaced whole, and the log, to which pieces are added. Both are
bytes that it does not look into. What `put` has returned from is there after the death of any process, as far
as each store's own page says.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from rayrec.errors import InputError, RayrecError
from rayrec.storage.workspace import STATES_FILE, Workspace

NOT_THERE = 0  # the version of a user who is not in the store; real ones count from 1


class StoreUnavailableError(RayrecError):
    """The store cannot be reached, or not in time. What was sent may have been stored or not: send it again."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a store holds of one user."""

    version: int  # changes with every put
    state: bytes


@dataclass(frozen=True, kw_only=True)
class Whole:
    """State and log of one user, of one moment."""

    stored: Stored
    log: list[bytes]  # pieces, the first added first


@dataclass(frozen=True, kw_only=True)
class Change:
    """What to put in place of what a store holds of one user."""

    user_id: str
    state: bytes
    expected: int  # the version that it goes on from; NOT_THERE makes a new user
    append: bytes | None = None  # a piece to add to the log
    restart: bool = False  # empty the log first


class StateStore(ABC):
    """The users of one namespace. Safe to use from many threads; many processes may open the same store.

    Data sets whose rows of songs differ must not share a namespace. Every method raises
    `StoreUnavailableError` where the store does not answer.
    """

    @abstractmethod
    def get(self, user_id: str) -> Stored | None:
        """A user's state; None where the user is not there."""

    @abstractmethod
    def read(self, user_id: str) -> Whole | None:
        """A user's state and log as they were at one moment; None where the user is not there."""

    @abstractmethod
    def put(self, changes: Sequence[Change]) -> list[bool]:
        """Change the users whose versions are as expected, state and log together; which ones were changed.

        False, and nothing is changed of that user, where the version is another: somebody else was first.
        """

    @abstractmethod
    def count(self) -> int:
        """How many users there are."""

    @abstractmethod
    def note(self, name: str) -> str | None:
        """What was noted under a name."""

    @abstractmethod
    def write_note(self, name: str, text: str) -> None:
        """Note a text under a name."""

    @abstractmethod
    def close(self) -> None:
        """Give connections back. Nothing else may be called after."""


def store_uri(workspace: Workspace, uri: str | None) -> str:
    """The address that was given, else that of an SQLite file in the workspace.

    Raises `InputError` where the workspace is a bucket and no address was given.
    """
    if uri is not None:
        return uri
    if not workspace.is_local:
        raise InputError(
            f"workspace {workspace.uri} is a bucket, which holds no SQLite file; name a store: sqlite:///PATH, "
            "or redis://HOST:PORT/0 for replicas on many nodes"
        )
    return absolute_uri(f"sqlite:///{quote(workspace.full(STATES_FILE))}")


def absolute_uri(uri: str) -> str:
    """The address of an SQLite file with its whole path; others as they are."""
    parts = urlsplit(uri)
    if parts.scheme != "sqlite" or parts.netloc or len(parts.path) < 2:
        return uri
    return f"sqlite:///{quote(str(Path(unquote(parts.path)[1:]).absolute()))}"


def open_store(uri: str, namespace: str) -> StateStore:
    """The store at sqlite:///path or redis://host:port/number (rediss:// with TLS), made where it is new.

    Raises `InputError` for another address, for one that holds something else, and where a package is missing.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        from rayrec.online.stores.sqlite_store import SqliteStore

        return SqliteStore.from_uri(uri, namespace)
    if scheme in ("redis", "rediss"):
        from rayrec.online.stores.redis_store import RedisStore

        return RedisStore.from_uri(uri, namespace)
    raise InputError(f"store {uri!r} is not known; give sqlite:///PATH or redis://HOST:PORT/0")
