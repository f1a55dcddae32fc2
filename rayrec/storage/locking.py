"""One writing run on a workspace at a time: the second is refused with a message that names the first.

On a local disk it is a lock on a file, which the system takes back when its process dies, however it
dies. Object storage has no locks, and pyarrow no conditional put: there it is a lease, an object that
its holder writes anew every 15 seconds and that counts for nothing a minute after it was last written.

How sure a lease is: whoever wants it looks whether it is free, writes its own, waits two seconds
and looks whether it is still its own. Two runs that start at once both write, the later write
stays, and the other one sees that. Both would go on only where one of them is held up for over two
seconds between its look and its write; the heartbeat of the run that has lost the lease then stops
that run within 15 seconds. Ages are measured by the clock of the storage, from the times of its
objects, so the clocks of machines do not matter.

Reading takes no lock, nor does what writes one small file: splits, and releases going live or back.
"""

import functools
import json
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from rayrec.errors import BusyError, InputError, NotFoundError
from rayrec.storage.workspace import LEASE, LOCK, LOCK_HOLDER, Workspace

LEASE_SECONDS = 60.0  # after which a lease that was not written anew is over
BEAT_SECONDS = 15.0  # from one writing to the next
SETTLE_SECONDS = 2.0  # from writing a lease to believing it

_held: set[tuple[str, int]] = set()  # workspaces and the threads of this process that hold them

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who writes to a workspace."""

    host: str
    pid: int
    command: str
    since: str  # ISO 8601, UTC
    token: str  # of this one run

    @classmethod
    def of_this_run(cls, command: str) -> "Holder":
        """This process."""
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(host=socket.gethostname(), pid=os.getpid(), command=command, since=since, token=uuid.uuid4().hex)

    @property
    def is_known_dead(self) -> bool:
        """True where it ran on this machine and does not any more."""
        if self.host != socket.gethostname():
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
    with (_file_lock if workspace.is_local else _lease)(workspace, Holder.of_this_run(command)):
        _held.add(key)
        try:
            yield
        finally:
            _held.discard(key)


def _busy(workspace: Workspace, holder: Holder | None, advice: str) -> BusyError:
    return BusyError(f"workspace {workspace.uri} is in use by {holder or 'another run'}; {advice}")


def _read_holder(workspace: Workspace, path: str) -> Holder | None:
    """None where nobody is named, or by something that is no holder."""
    try:
        return Holder(**json.loads(workspace.read_bytes(path)))
    except (NotFoundError, ValueError, TypeError):
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


@contextmanager
def _lease(workspace: Workspace, holder: Holder) -> Iterator[None]:
    first = _read_holder(workspace, LEASE)
    if first is not None and not first.is_known_dead:
        left = LEASE_SECONDS - _age(workspace, holder)
        if left > 0:
            raise _busy(workspace, first, f"wait until it ends; if it was killed, its lease expires in {left:.0f} s")
    workspace.write_json(LEASE, asdict(holder))
    threading.Event().wait(SETTLE_SECONDS)
    first = _read_holder(workspace, LEASE)
    if first != holder:
        raise _busy(workspace, first, "it started at the same time; wait for it")
    beat = _Heartbeat(workspace, holder)
    try:
        with beat:
            yield
    except _LeaseLost:
        pass  # told below, as where it is only seen at the end
    finally:
        if _read_holder(workspace, LEASE) == holder:
            workspace.delete(LEASE)
    if beat.lost is not None:
        raise _busy(workspace, beat.lost, "it took over the expired lease of this run")


class _LeaseLost(BaseException):
    """Ends whatever the main thread does; no `except Exception` on the way holds it up."""


def _age(workspace: Workspace, holder: Holder) -> float:
    """Seconds since the lease was written, by the clock of the storage: that of an object written now."""
    probe = f"{LEASE}.{holder.token}"
    workspace.write_bytes(probe, b"")
    now, then = (workspace.modified(path) for path in (probe, LEASE))
    workspace.delete(probe)
    return now - then if then else LEASE_SECONDS


class _Heartbeat(threading.Thread):
    """Writes the lease anew for the length of a with block; where another run has taken it, the block is left.

    By a signal, which ends a wait in the main thread too. Not by an interrupt: a run in the background of
    a shell is started with those ignored. A block in another thread is left at its end.
    """

    SIGNAL = signal.SIGUSR1

    def __init__(self, workspace: Workspace, holder: Holder) -> None:
        super().__init__(name="rayrec lease", daemon=True)
        self.lost: Holder | None = None  # to whom
        self._workspace, self._holder, self._stopped = workspace, holder, threading.Event()
        self._in_main = threading.current_thread() is threading.main_thread()
        self._handler: Any = None  # of the signal before

    def __enter__(self) -> "_Heartbeat":
        if self._in_main:
            self._handler = signal.signal(self.SIGNAL, _leave)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End, and wait for a beat in progress."""
        self._stopped.set()
        self.join()
        if self._in_main:
            signal.signal(self.SIGNAL, self._handler)

    def run(self) -> None:
        """Beat until stopped. A storage that fails now is asked again at the next beat."""
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                first = _read_holder(self._workspace, LEASE)
                if first is not None and first != self._holder:
                    self.lost = first
                    if self._in_main:
                        signal.pthread_kill(threading.main_thread().ident or 0, self.SIGNAL)
                    return
                self._workspace.write_json(LEASE, asdict(self._holder))
            except OSError:
                continue


def _leave(*_: object) -> None:
    raise _LeaseLost
