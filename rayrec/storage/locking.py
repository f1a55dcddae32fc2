"""The lock of a workspace: only one run writes at a time. A second one is refused; the message names the first.

On a local disk the lock is a file lock, which the operating system releases when the process ends in any way. On
object storage the lock is an object that a conditional put creates only if it does not exist: if two runs start at the
same time, one is refused. A killed run leaves its object, and so does one that may not delete it. The next run on the
same machine takes it over at once: it sees that the process has ended, or that the lock is one of its own process that
no run there holds. A run on another machine or in another container watches it: a living run renews its lock every
`RENEW_SECONDS`, so a lock that does not change for `WATCH_SECONDS` is taken over. No clocks are compared.
`rayrec unlock` deletes a lock at once.

A run that is cut off from the storage for longer may lose its lock. It ends at its first renewal after that, up to
`RENEW_SECONDS` after the storage is back; in that time both runs may write.

Reading takes no lock. Neither does writing one small file: a split, or the record of the live release.
"""

import functools
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from rayrec.errors import BusyError, InputError, NotFoundError, StorageError
from rayrec.storage.object_storage import ConditionalWriter, conditional_writer
from rayrec.storage.workspace import LOCK, LOCK_HOLDER, Workspace

RENEW_SECONDS = 30.0  # between renewals of a lock on object storage
WATCH_SECONDS = 300.0  # time without a renewal after which the run of another machine counts as dead
LOST_LOCK = signal.SIGUSR2  # interrupts the main thread of a run
READS_PER_RENEWAL = 3  # of a lock that is watched

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

_own_tokens: set[str] = set()  # of the holders of this process that take, hold or give back a lock on object storage
_held_locks: dict[tuple[str, int], "_Lease | None"] = {}  # (workspace, thread) of this process -> its lock

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The run that holds the lock of a workspace."""

    host: str
    pid_namespace: int  # differs between containers with the same host name; 0 if the system has none
    pid: int
    process_start: str  # when the process started, see `_process_start`: after its end another may get its number
    command: str
    since: str  # ISO 8601, UTC
    token: str  # unique to this run
    renewals: int  # number of renewals of a lock on object storage: a lock that changes belongs to a living run

    @classmethod
    def of_this_run(cls, command: str) -> "Holder":
        """Return a holder that describes this process."""
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(
            host=socket.gethostname(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            command=command,
            since=since,
            token=uuid.uuid4().hex,
            renewals=0,
        )

    @property
    def is_on_this_machine(self) -> bool:
        """True if the run was on this machine, in this process namespace."""
        return (self.host, self.pid_namespace) == (socket.gethostname(), _pid_namespace())

    @property
    def is_known_dead(self) -> bool:
        """True if the run was on this machine, in this process namespace, and has ended."""
        if not self.is_on_this_machine:
            return False
        start = _process_start(self.pid)  # empty also if the system hides processes of other users (hidepid)
        if start and self.process_start and start != self.process_start:
            return True
        if self.pid == os.getpid():
            return self.token not in _own_tokens
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


def _process_start(pid: int) -> str:
    """Return the boot of the system and the start of a process in clock ticks; empty if /proc does not show it."""
    with suppress(OSError):
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{BOOT_ID.read_text().strip()} {ticks}"
    return ""


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

    Raises `BusyError` with the name of the run that holds the lock. On object storage the lock may be lost during the
    block: then `BusyError` ends the block, in the main thread at once, in another thread when the block is entered
    again or left.
    """
    key = (f"{workspace.filesystem.type_name}:{workspace.root}", threading.get_ident())
    if key in _held_locks:
        if (lease := _held_locks[key]) is not None:
            lease.require_held()
        yield
        return
    with (_file_lock if workspace.is_local else _object_lock)(workspace, Holder.of_this_run(command)) as new_lease:
        _held_locks[key] = new_lease
        try:
            yield
        finally:
            del _held_locks[key]


def _busy_error(workspace: Workspace, holder: Holder | None, advice: str) -> BusyError:
    return BusyError(f"workspace {workspace.uri} is in use by {holder or 'another run'}; {advice}")


def _read_holder(workspace: Workspace, path: str) -> Holder | None:
    try:
        return _parse_holder(workspace.read_bytes(path))
    except NotFoundError:
        return None


def _to_bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()


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
        with suppress(StorageError):  # for messages only: `rayrec clean` must run on a full disk, too
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


def _take(workspace: Workspace, writer: ConditionalWriter, path: str, holder: Holder) -> None:
    """Create the lock, or take over that of a dead run. Raises `BusyError` if another run holds it."""
    if _write_if_unchanged(writer, path, _to_bytes(holder), ""):
        return
    content, version = writer.read(path)
    current_holder = _parse_holder(content)
    is_free = not content or (current_holder is not None and current_holder.is_known_dead)
    if current_holder is not None and not current_holder.is_on_this_machine:
        seen_version = version
        content, version = _watch(writer, path, current_holder, version)
        current_holder = _parse_holder(content)
        is_free = version in ("", seen_version)  # its run has deleted it, or does not renew it
    # Of several runs that watched a lock, only one replaces the version that all of them saw.
    if not (is_free and _write_if_unchanged(writer, path, _to_bytes(holder), version)):
        raise _busy_error(workspace, current_holder, "wait until it ends; if it was killed, run `rayrec unlock`")


def _watch(writer: ConditionalWriter, path: str, holder: Holder, version: str) -> tuple[bytes, str]:
    """Return content and version of a lock as soon as the version changes, or after `WATCH_SECONDS`."""
    print(
        f"Warning: the lock of `rayrec {holder.command}` on host {holder.host}: waiting up to {WATCH_SECONDS:.0f} s to "
        "see whether that run is alive",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + WATCH_SECONDS
    while True:
        time.sleep(RENEW_SECONDS / READS_PER_RENEWAL)
        is_last = time.monotonic() >= deadline
        content, current_version = writer.read(path)
        if is_last or current_version != version:
            return content, current_version


class _Lease:
    """Renews a lock on object storage in a thread until `stop`, and ends the run if the lock is not its own any more.

    A renewal that fails, for example without network, is tried again after `RENEW_SECONDS`. The main thread is
    interrupted as by Ctrl-C, which also ends its waiting for Ray, but by a signal of its own: background processes
    ignore that of Ctrl-C.
    """

    def __init__(self, workspace: Workspace, writer: ConditionalWriter, path: str, holder: Holder) -> None:
        self._workspace, self._writer, self._path, self._holder = workspace, writer, path, holder
        self._is_in_main_thread = threading.current_thread() is threading.main_thread()
        self._is_lost = False
        self._stopped = threading.Event()
        if self._is_in_main_thread:
            self._earlier_handler = signal.signal(LOST_LOCK, signal.default_int_handler)
        self._thread = threading.Thread(target=self._renew, name="rayrec-lock", daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._stopped.wait(RENEW_SECONDS):
            try:
                content, version = self._writer.read(self._path)
                current_holder = _parse_holder(content)
                if current_holder is None or current_holder.token != self._holder.token:
                    break
                renewed_holder = replace(current_holder, renewals=current_holder.renewals + 1)
                self._writer.replace(self._path, _to_bytes(renewed_holder), version)
            except Exception:  # of any client, such as one without network
                continue
        else:
            return
        self._is_lost = True
        if self._is_in_main_thread:
            signal.pthread_kill(threading.main_thread().ident or 0, LOST_LOCK)

    def stop(self) -> None:
        """End the renewals."""
        self._stopped.set()
        try:
            self._thread.join()
        finally:
            if self._is_in_main_thread:
                signal.signal(LOST_LOCK, self._earlier_handler)

    def require_held(self, cause: BaseException | None = None) -> None:
        """Raise `BusyError` if the run has lost its lock; `cause` is the error that ended the run, if any."""
        if self._is_lost:
            raise BusyError(
                f"`rayrec {self._holder.command}` has lost its lock of workspace {self._workspace.uri}: it could not "
                f"renew it for {WATCH_SECONDS:.0f} seconds and another run took it over, or `rayrec unlock` deleted "
                "it; run the command again when no other run writes there"
            ) from cause


@contextmanager
def _object_lock(workspace: Workspace, holder: Holder) -> Iterator[_Lease]:
    writer, path = conditional_writer(workspace.filesystem), workspace.full(LOCK_HOLDER)
    _own_tokens.add(holder.token)
    try:
        _take(workspace, writer, path, holder)
        with _renewed(workspace, writer, path, holder) as lease:
            yield lease
    finally:
        _own_tokens.discard(holder.token)


@contextmanager
def _renewed(workspace: Workspace, writer: ConditionalWriter, path: str, holder: Holder) -> Iterator[_Lease]:
    """Renew a lock on object storage in a with block, and give it back at the end."""
    lease = _Lease(workspace, writer, path, holder)
    try:
        try:
            yield lease
        finally:
            lease.stop()
        lease.require_held()
    except BusyError:
        raise
    except BaseException as error:
        lease.require_held(error)  # a lost lock is the reason for an interrupt
        raise
    finally:
        _give_back(workspace, holder)


def _give_back(workspace: Workspace, holder: Holder) -> None:
    """Delete the lock of a run unless another run holds it now. A failure is only a warning: the work is done."""
    try:
        current_holder = _read_holder(workspace, LOCK_HOLDER)
        if current_holder is not None and current_holder.token == holder.token:
            workspace.delete(LOCK_HOLDER)
    except (StorageError, OSError) as error:  # the client has repeated the request
        print(
            f"Warning: the lock of workspace {workspace.uri} was not deleted: {error}. The next run on this machine "
            f"takes it over at once, one on another machine after {WATCH_SECONDS:.0f} s",
            file=sys.stderr,
            flush=True,
        )


def lock_holder(workspace: Workspace) -> Holder | None:
    """Return the holder of the lock of a workspace on object storage, perhaps a killed run; None without a lock."""
    return None if workspace.is_local else _read_holder(workspace, LOCK_HOLDER)


def unlock(workspace: Workspace) -> None:
    """Delete the lock of a workspace on object storage, even while a job holds it, which then ends with an error."""
    if not workspace.is_local:
        workspace.delete(LOCK_HOLDER)
