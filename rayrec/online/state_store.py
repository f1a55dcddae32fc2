"""The interface of all stores of user states.

For each user, a store holds the state and the set of heard songs, which are replaced as a whole; the log of plays, to
which pieces are appended; and the events of the last days. State, set and pieces are bytes that the store does not
interpret. Once `put` has returned, its changes survive the death of any process, within the limits that the module of
each store describes.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

from rayrec.errors import InputError, RayrecError
from rayrec.storage.object_storage import without_secrets
from rayrec.storage.workspace import STATES_FILE, Workspace

NO_VERSION = 0  # the version of a user who is not in the store; versions in the store begin at 1
DAY_SECONDS = 86_400


class StoreUnavailableError(RayrecError):
    """The store does not answer, or not in time. It is unknown whether the data was stored: send it again."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The stored data of one user, without the log and the heard songs."""

    version: int  # changes with every put
    state: bytes
    events: frozenset[int] = frozenset()  # the requested events that were stored within the last day


@dataclass(frozen=True, kw_only=True)
class FullUser:
    """The stored data of one user, all from the same moment."""

    stored: Stored
    log: list[bytes]  # pieces, oldest first
    heard: bytes | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a log: plays that are appended together."""

    plays: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A change of the stored data of one user."""

    user_id: str
    state: bytes
    expected: int  # the version that this change replaces; NO_VERSION adds a new user
    append: Sequence[Piece] = ()  # pieces to append to the log
    restart: bool = False  # empty the log and the heard songs first
    heard: bytes | None = None  # replaces the heard songs; None keeps them
    events: Sequence[int] = ()  # int64 each: `get` finds them for at least a day


@dataclass(frozen=True, kw_only=True)
class OnlineSong:
    """A song that was added while a release was live."""

    number: int  # among all songs ever added to the namespace; stored plays refer to the song by it
    song_id: str
    data: bytes  # metadata; empty if the song is closed: all releases in use have it, and only number and id are kept
    model: str  # id of the model to which `sums` belong
    sums: bytes  # float64 numbers, sums over the song's plays; empty if no play was counted


class StateStore(ABC):
    """The users of one namespace, and the songs that were added online. Many processes may open the same store.

    An instance can be used from many threads; a pickled copy opens the store again. Data sets in which songs have
    different rows must not share a namespace. Every method raises `StoreUnavailableError` if the store does not answer.
    """

    one_writer: ClassVar[bool]  # whether only one process at a time can put users into the store

    @abstractmethod
    def get(self, users: Mapping[str, Sequence[int]]) -> list[Stored | None]:
        """Return the state of each user, with those of the given events that are stored; None for unknown users."""

    @abstractmethod
    def read(self, user_ids: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        """Return all stored data of each user, each from one moment; None for unknown users.

        With `plays`, only the last pieces of each log are read, as many as are needed for this number of plays.
        """

    @abstractmethod
    def put(self, changes: Sequence[Change], *, loading: bool = False) -> list[bool]:
        """Apply the changes of users who have the expected version; return for each change whether it was applied.

        A change is applied as a whole or not at all. It is not applied if the user has another version, because another
        writer was first. `loading` is for thousands of users at a time: if the machine dies before the next
        `mark_loaded` has returned, the changes may be lost.
        """

    @abstractmethod
    def forget(self, user_ids: Sequence[str], state: bytes, namespaces: Collection[str] = ()) -> None:
        """Delete all data of users, whatever their versions, and store `state` in its place. Safe to repeat.

        This is done in the store's own namespace and in `namespaces`, those of replaced data sets: a server may still
        answer from one. Their events are kept as long as those of other users, so that a play that is sent again does
        not bring the user back.
        """

    @abstractmethod
    def rewrite(self) -> None:
        """Rewrite the files of the store, so that they hold no data of deleted users. The store stays usable."""

    @abstractmethod
    def loaded(self, load: str) -> dict[int, str]:
        """Return the buckets that a load has finished, each with the text given to `mark_loaded`."""

    @abstractmethod
    def mark_loaded(self, load: str, bucket: int, text: str) -> None:
        """Record that a load has finished a bucket. All users that it has put then survive the death of the machine."""

    @abstractmethod
    def add_songs(self, songs: Mapping[str, bytes], most: int, first_number: int) -> list[bool] | None:
        """Add songs by id; return which ones were added. Open songs with these ids stay unchanged.

        Returns None, and adds no song, if more than `most` songs would be open. A closed song is opened again. New
        songs get the numbers after the highest one in the store, from `first_number` on.
        """

    @abstractmethod
    def songs_since(self, version: int) -> tuple[int, list[OnlineSong]]:
        """Return the current version of the songs, and the songs changed after `version` (0: all), by ascending number.

        Any change of a song increases the version.
        """

    @abstractmethod
    def count_song_plays(self, model: str, sums: Mapping[int, bytes]) -> None:
        """Add float64 numbers to the sums of songs, by number; sums of another model or length are replaced.

        Closed songs are skipped.
        """

    @abstractmethod
    def close_songs(self, numbers: Sequence[int]) -> None:
        """Close songs that all releases in use have by now: keep only their numbers and ids."""

    @abstractmethod
    def close(self) -> None:
        """Close all connections. No other method may be called afterwards."""


def user_key(namespace: str, user_id: str) -> bytes:
    """Return 16 bytes that identify a user in a store. The user's id cannot be derived from them."""
    return blake2b(f"{namespace}\0{user_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def event_days() -> tuple[int, int, int]:
    """Return today, in days since 1970, then yesterday and tomorrow.

    Events are stored under the day of the writer's clock. Events of yesterday are also looked up, so that each is found
    for at least a day, and events of tomorrow, because a writer's clock may be ahead.
    """
    today = int(time.time()) // DAY_SECONDS
    return today, today - 1, today + 1


def store_uri(workspace: Workspace, uri: str | None) -> str:
    """Return `uri`, or the address of an SQLite file in the workspace if `uri` is None.

    Raises `InputError` if `uri` is None and the workspace is in object storage.
    """
    if uri is not None:
        return uri
    if not workspace.is_local:
        raise InputError(
            f"workspace {workspace.uri} is in object storage, which cannot hold an SQLite file; give a store: "
            "sqlite:///PATH, or redis://HOST:PORT/0 for replicas on many nodes"
        )
    return absolute_uri(f"sqlite:///{quote(workspace.full(STATES_FILE))}")


def open_user_store(workspace: Workspace, store: str | None, lineage: str) -> StateStore | None:
    """Open `store`; if it is None, the workspace's own store, or return None if there is none."""
    if store is None and not (workspace.is_local and workspace.exists(STATES_FILE)):
        return None
    return open_store(store_uri(workspace, store), lineage)


def absolute_uri(uri: str) -> str:
    """Return the address of an SQLite file with its absolute path; other addresses unchanged."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{quote(str(path.absolute()))}"


def sqlite_path(uri: str) -> Path | None:
    """Return the path in sqlite:///PATH; None for any other address."""
    path = unquote(urlsplit(uri).path)[1:] if uri.startswith("sqlite:///") else ""
    return Path(path) if path else None


def store_exists(uri: str) -> bool:
    """Return False for an SQLite file that does not exist yet, True for any other address."""
    path = sqlite_path(uri)
    return path is None or path.exists()


def open_store(uri: str, namespace: str) -> StateStore:
    """Open the store at sqlite:///path or redis://host:port/number (rediss:// with TLS), and create it if it is new.

    Raises `InputError` for another address, for a file that is not a store, and if a package is missing.
    """
    if uri.startswith("sqlite:"):
        from rayrec.online.sqlite_store import SqliteStore

        return SqliteStore.from_uri(uri, namespace)
    if uri.startswith(("redis:", "rediss:")):
        from rayrec.online.redis_store import RedisStore

        return RedisStore.from_uri(uri, namespace)
    raise InputError(f"unknown store address {without_secrets(uri)!r}; give sqlite:///PATH or redis://HOST:PORT/0")
