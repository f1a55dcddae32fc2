"""The one interface of all stores of user states.

A store holds of each user the state and the set of heard songs, which are replaced whole, the log, to which pieces are
added, and the events of the last days. State, set and pieces are bytes that it does not look into. What `put` has
returned from survives the death of any process, as far as each store's own page says.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

from rayrec.errors import InputError, RayrecError
from rayrec.storage.workspace import STATES_FILE, Workspace

NOT_THERE = 0  # the version of a user who is not in the store; real ones count from 1
DAY_SECONDS = 86_400


class StoreUnavailableError(RayrecError):
    """The store cannot be reached, or not in time. What was sent may have been stored or not: send it again."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a store holds of one user, without the log."""

    version: int  # changes with every put
    state: bytes
    events: frozenset[int] = frozenset()  # of the events that were looked up, those stored within the last day


@dataclass(frozen=True, kw_only=True)
class WholeUser:
    """All of one user, of one moment."""

    stored: Stored
    log: list[bytes]  # pieces, the one added first at the beginning
    heard: bytes | None


@dataclass(frozen=True, slots=True)
class Piece:
    """Plays to add to a log."""

    plays: int
    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What to put in place of what a store holds of one user."""

    user_id: str
    state: bytes
    expected: int  # the version that it goes on from; NOT_THERE makes a new user
    append: Sequence[Piece] = ()  # pieces to add to the log
    restart: bool = False  # empty log and heard songs first
    heard: bytes | None = None  # replaces the heard songs; None leaves them
    events: Sequence[int] = ()  # int64 each: found by `get` for at least a day from now


@dataclass(frozen=True, kw_only=True)
class OnlineSong:
    """A song that was added while a release was live."""

    number: int  # among all songs that were ever added to the namespace, from 0: plays of it are stored under it
    song_id: str
    data: bytes  # what is known of it; empty: a release has it, and it is kept for its number alone
    model: str  # whose plays of it were summed last
    sums: bytes  # float64 numbers; empty: no play was counted


class StateStore(ABC):
    """The users of one namespace, and the songs that were added online. Many processes may open the same store.

    Safe to use from many threads; a copy that is pickled opens the store anew. Data sets whose rows of songs differ
    must not share a namespace. Every method raises `StoreUnavailableError` where the store does not answer.
    """

    one_writer: ClassVar[bool]  # whether one process at a time can put users into it

    @abstractmethod
    def get(self, users: Mapping[str, Sequence[int]]) -> list[Stored | None]:
        """The states of users, and which of some events of each are stored; None for users who are not there."""

    @abstractmethod
    def read(self, user_ids: Sequence[str], *, plays: int | None = None) -> list[WholeUser | None]:
        """Users whole, each as of one moment; None for users who are not there.

        With `plays` only the last pieces of each log are read, as many as hold so many plays.
        """

    @abstractmethod
    def put(self, changes: Sequence[Change], *, loading: bool = False) -> list[bool]:
        """Change the users whose versions are as expected, all of a user together; which ones were changed.

        False, and nothing is changed of that user, where the version is another: somebody else was first. `loading` is
        for thousands of users at a time: the death of the machine may undo them until a `mark_loaded` has returned.
        """

    @abstractmethod
    def forget(self, user_ids: Sequence[str], state: bytes) -> None:
        """Delete all of some users, whatever the version, and leave `state` in its place. May be repeated.

        Their events stay as long as others do: a play that is sent again must not bring the user back.
        """

    @abstractmethod
    def rewrite(self) -> None:
        """Rewrite what is on disk, so that nothing is left there of users who were deleted. Others may use it on."""

    @abstractmethod
    def loaded(self, load: str) -> dict[int, str]:
        """Buckets that a load has finished, each with the text that was noted."""

    @abstractmethod
    def mark_loaded(self, load: str, bucket: int, text: str) -> None:
        """Note that a load has finished a bucket: all users it put before now survive as `put` promises."""

    @abstractmethod
    def add_songs(self, songs: Mapping[str, bytes], most: int) -> list[bool] | None:
        """Add songs by id; which ones were added: those whose ids are there already stay as they are.

        None, and none is added, where there would be more than `most`. A song that was closed is opened again.
        """

    @abstractmethod
    def songs_since(self, version: int) -> tuple[int, list[OnlineSong]]:
        """The version of all songs, and those that changed after `version`, 0 for all, by ascending numbers."""

    @abstractmethod
    def count_song_plays(self, model: str, sums: Mapping[int, bytes]) -> None:
        """Add float64 numbers of equal length to the sums of songs, by number; those of another model give way.

        Songs that are closed are passed over.
        """

    @abstractmethod
    def close_songs(self, numbers: Sequence[int]) -> None:
        """Keep the numbers and ids of songs alone: a release has them."""

    @abstractmethod
    def close(self) -> None:
        """Give connections back. Nothing else may be called after."""


def user_key(namespace: str, user_id: str) -> bytes:
    """16 bytes that stand for a user in a store: any id has the same length, and none can be read from it."""
    return blake2b(f"{namespace}\0{user_id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def event_days() -> tuple[int, int, int]:
    """Today, counted from 1970, and the days beside it.

    Events stand by the day of their writer's clock. Yesterday's are looked up, so each is found for at least a day,
    and tomorrow's, for a writer whose clock is ahead.
    """
    today = int(time.time()) // DAY_SECONDS
    return today, today - 1, today + 1


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


def store_exists(uri: str) -> bool:
    """False for an SQLite file that is not there yet."""
    parts = urlsplit(uri)
    return parts.scheme != "sqlite" or Path(unquote(parts.path)[1:]).exists()


def open_store(uri: str, namespace: str) -> StateStore:
    """The store at sqlite:///path or redis://host:port/number (rediss:// with TLS), made where it is new.

    Raises `InputError` for another address, for one that holds something else, and where a package is missing.
    """
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        from rayrec.online.sqlite_store import SqliteStore

        return SqliteStore.from_uri(uri, namespace)
    if scheme in ("redis", "rediss"):
        from rayrec.online.redis_store import RedisStore

        return RedisStore.from_uri(uri, namespace)
    raise InputError(f"store {uri!r} is not known; give sqlite:///PATH or redis://HOST:PORT/0")
