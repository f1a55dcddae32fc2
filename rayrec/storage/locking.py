"""One writing run on a workspace at a time: the second is refused with a message that names the first.

On a local disk it is a lock on a file, which the system takes back when its process dies, however it
dies. On object storage it is an object that is only ever created where it is not there, by a
conditional put: of two runs that start at once, one is refused. A run that was killed leaves its
object. The next run on the same machine takes it over; on another machine or in another container `rayrec unlock`
deletes it.

Reading takes no lock, nor does what writes one small file: splits, and releases going live or back.
"""

import functools
import json
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from rayrec.errors import BusyError, InputError, NotFoundError
from rayrec.storage.object_storage import ConditionalWriter, conditional_writer
from rayrec.storage.workspace import LOCK, LOCK_HOLDER, Workspace

_held: set[tuple[str, int]] = set()  # workspaces and the threads of this process that hold them

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who writes to a workspace."""

    host: str
    pid_namespace: int  # containers of one host name have their own; 0 where the system has none
    pid: int
    command: str
    since: str  # ISO 8601, UTC
    token: str  # of this one run

    @classmethod
    def of_this_run(cls, command: str) -> "Holder":
        """This process."""
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(
            host=socket.gethostname(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            command=command,
            since=since,
            token=uuid.uuid4().hex,
        )

    @property
    def is_known_dead(self) -> bool:
        """True where it ran on this machine, among the processes that are seen from here, and does not any more."""
        if (self.host, self.pid_namespace) != (socket.gethostname(), _pid_namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def __str__(self) -> str:
        return f"`rayrec {self.command}` (process {self.pid} on {self.host}, since {self.since})"


def _pid_namespace() -> int:
    with suppress(OSError):  # not Linux
        return os.stat("/proc/self/ns/pid").st_ino
    return 0


def writes(command: str) -> Callable[[Callable[Concatenate[Workspace, P], R]], Callable[Concatenate[Workspace, P], R]]:
    """A stage whose first argument is the workspace that it writes to, alone for as long as it runs."""

    def locked(stage: Callable[Concatenate[Workspace, P], R]) -> Callable[Concatenate[Workspace, P], R]:
        @functools.wraps(stage)
        def run(workspace: Workspace, /, *arguments: P.args, **options: P.kwargs) -> R:
            with exclusive(workspace, command):
                return stage(workspace, *arguments, **options)

        return run

    return locked


@contextmanager
def exclusive(workspace: Workspace, command: str) -> Iterator[None]:
    """A with block in which no other run writes to the workspace. Within it the same thread may ask again.

    Raises `BusyError` that names the run that holds it.
    """
    key = (f"{workspace.filesystem.type_name}:{workspace.root}", threading.get_ident())
    if key in _held:
        yield
        return
    with (_file_lock if workspace.is_local else _object_lock)(workspace, Holder.of_this_run(command)):
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def _busy(workspace: Workspace, holder: Holder | None, advice: str) -> BusyError:
    return BusyError(f"workspace {workspace.uri} is in use by {holder or 'another run'}; {advice}")


def _read_holder(workspace: Workspace, path: str) -> Holder | None:
    try:
        return _holder_of(workspace.read_bytes(path))
    except NotFoundError:
        return None


def _holder_of(content: bytes) -> Holder | None:
    """None where nobody is named, or by something that is no holder."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


@contextmanager
def _file_lock(workspace: Workspace, holder: Holder) -> Iterator[None]:
    root = Path(workspace.full(""))
    is_new = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / LOCK, timeout=0).acquire()
    except Timeout:
        # What a killed run left names it until the next one comes; the lock alone decides.
        first = _read_holder(workspace, LOCK_HOLDER)
        raise _busy(workspace, first, "wait for it or stop it") from None
    except OSError as error:
        raise InputError(f"workspace {workspace.uri} is not writable: {error}; choose another one") from error
    with lock:
        workspace.write_json(LOCK_HOLDER, asdict(holder))
        try:
            yield
        finally:
            workspace.delete(LOCK_HOLDER)
            if is_new and os.listdir(root) == [LOCK]:  # a mistyped path: nothing was there, nothing came of it
                (root / LOCK).unlink()
                root.rmdir()


def _put(writer: ConditionalWriter, path: str, content: bytes, version: str) -> bool:
    """Write an object over a known version, or where there is none; false where another content is there."""
    written = writer.replace(path, content, version) if version else writer.create(path, content)
    # A put whose answer was lost is sent again by the client, and refused because the first one was stored.
    return written or writer.read(path)[0] == content


@contextmanager
def _object_lock(workspace: Workspace, holder: Holder) -> Iterator[None]:
    writer = conditional_writer(workspace.filesystem)
    path, content = workspace.full(LOCK_HOLDER), json.dumps(asdict(holder)).encode()
    if not _put(writer, path, content, ""):
        current, version = writer.read(path)
        first = _holder_of(current)
        is_free = not current or (first is not None and first.is_known_dead)
        if not (is_free and _put(writer, path, content, version)):
            raise _busy(workspace, first, "wait until it ends; if it was killed, run `rayrec unlock`")
    try:
        yield
    finally:
        if _read_holder(workspace, LOCK_HOLDER) == holder:
            workspace.delete(LOCK_HOLDER)


def lock_holder(workspace: Workspace) -> Holder | None:
    """Who holds the lock of a workspace on object storage, or what a killed run has left of it; None where nobody."""
    return None if workspace.is_local else _read_holder(workspace, LOCK_HOLDER)


def unlock(workspace: Workspace) -> None:
    """Delete the lock of a workspace on object storage, even while a job holds it."""
    if not workspace.is_local:
        workspace.delete(LOCK_HOLDER)
