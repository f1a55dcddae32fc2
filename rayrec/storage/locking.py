"""The lock of a workspace: only one run writes at a time. A second one is refused; the message names the first.

On a local disk the lock is a file lock, which the operating system releases when the process ends in any way. On
object storage the lock is an object that a conditional put creates only if it does not exist: if two runs start at the
same time, one is refused. A killed run leaves its object. The next run on the same machine takes it over; from another
machine or container, `rayrec unlock` deletes it.

Reading takes no lock. Neither does writing one small file: a split, or the record of the live release.
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

_held_locks: set[tuple[str, int]] = set()  # (workspace, thread) pairs of this process that hold a lock

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The run that holds the lock of a workspace."""

    host: str
    pid_namespace: int  # differs between containers with the same host name; 0 if the system has none
    pid: int
    command: str
    since: str  # ISO 8601, UTC
    token: str  # unique to this run

    @classmethod
    def of_this_run(cls, command: str) -> "Holder":
        """Return a holder that describes this process."""
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
        """True if the run was on this machine, in this process namespace, and its process has ended."""
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
    """Return a decorator for a stage; it locks the workspace, the first argument, while the stage runs."""

    def decorate(stage: Callable[Concatenate[Workspace, P], R]) -> Callable[Concatenate[Workspace, P], R]:
        @functools.wraps(stage)
        def run(workspace: Workspace, /, *arguments: P.args, **options: P.kwargs) -> R:
            with exclusive(workspace, command):
                return stage(workspace, *arguments, **options)

        return run

    return decorate


@contextmanager
def exclusive(workspace: Workspace, command: str) -> Iterator[None]:
    """Hold the lock of a workspace in a with block. The same thread may enter it again within the block.

    Raises `BusyError` with the name of the run that holds the lock.
    """
    key = (f"{workspace.filesystem.type_name}:{workspace.root}", threading.get_ident())
    if key in _held_locks:
        yield
        return
    with (_file_lock if workspace.is_local else _object_lock)(workspace, Holder.of_this_run(command)):
        _held_locks.add(key)
        try:
            yield
        finally:
            _held_locks.discard(key)


def _busy_error(workspace: Workspace, holder: Holder | None, advice: str) -> BusyError:
    return BusyError(f"workspace {workspace.uri} is in use by {holder or 'another run'}; {advice}")


def _read_holder(workspace: Workspace, path: str) -> Holder | None:
    try:
        return _parse_holder(workspace.read_bytes(path))
    except NotFoundError:
        return None


def _parse_holder(content: bytes) -> Holder | None:
    """Parse a holder; None if the content is empty or not a holder."""
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
        # The holder file may name a killed run; only the file lock decides.
        current_holder = _read_holder(workspace, LOCK_HOLDER)
        raise _busy_error(workspace, current_holder, "wait for it or stop it") from None
    except OSError as error:
        raise InputError(f"workspace {workspace.uri} is not writable: {error}; choose another one") from error
    with lock:
        workspace.write_json(LOCK_HOLDER, asdict(holder))
        try:
            yield
        finally:
            workspace.delete(LOCK_HOLDER)
            if is_new and os.listdir(root) == [LOCK]:  # nothing was written: the path may be mistyped
                (root / LOCK).unlink()
                root.rmdir()


def _write_if_unchanged(writer: ConditionalWriter, path: str, content: bytes, version: str) -> bool:
    """Replace the given version of an object, or create it if `version` is empty.

    Returns False if the object now has another content.
    """
    is_written = writer.replace(path, content, version) if version else writer.create(path, content)
    # If the response to a put is lost, the client sends it again; the storage refuses it since the first was stored.
    return is_written or writer.read(path)[0] == content


@contextmanager
def _object_lock(workspace: Workspace, holder: Holder) -> Iterator[None]:
    writer = conditional_writer(workspace.filesystem)
    path, content = workspace.full(LOCK_HOLDER), json.dumps(asdict(holder)).encode()
    if not _write_if_unchanged(writer, path, content, ""):
        current_content, version = writer.read(path)
        current_holder = _parse_holder(current_content)
        is_free = not current_content or (current_holder is not None and current_holder.is_known_dead)
        if not (is_free and _write_if_unchanged(writer, path, content, version)):
            raise _busy_error(workspace, current_holder, "wait until it ends; if it was killed, run `rayrec unlock`")
    try:
        yield
    finally:
        if _read_holder(workspace, LOCK_HOLDER) == holder:
            workspace.delete(LOCK_HOLDER)


def lock_holder(workspace: Workspace) -> Holder | None:
    """Return the holder of the lock of a workspace on object storage, perhaps a killed run; None without a lock."""
    return None if workspace.is_local else _read_holder(workspace, LOCK_HOLDER)


def unlock(workspace: Workspace) -> None:
    """Delete the lock of a workspace on object storage, even while a job holds it."""
    if not workspace.is_local:
        workspace.delete(LOCK_HOLDER)
