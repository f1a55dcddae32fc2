"""Object storage: files are whole or absent, failed requests are repeated, and lasting failures give a clear error."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from s3 import S3Server, s3_server

from rayrec.errors import BusyError, InputError, StorageError
from rayrec.storage import locking, object_storage
from rayrec.storage.locking import exclusive, lock_holder, unlock
from rayrec.storage.workspace import LOCK_HOLDER, Workspace

pytest.importorskip("moto.server", reason="no moto: pip install 'rayrec[dev]'")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running_server:
        yield running_server


@pytest.fixture
def remote(server: S3Server, request: pytest.FixtureRequest) -> Iterator[Workspace]:
    yield Workspace(server.uri(request.node.name))
    server.fail(0.0)
    server.deny()


def test_a_write_that_fails_leaves_the_existing_file(remote: Workspace) -> None:
    remote.write_bytes("f", b"old")
    with pytest.raises(RuntimeError, match="half way"), remote.open_output("f") as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError("half way")
    assert remote.read_bytes("f") == b"old"
    assert remote.files("") == ["f"]


def test_requests_that_fail_now_and_then_are_repeated(remote: Workspace, server: S3Server) -> None:
    server.fail(0.15)
    failed_before = server.counts()["failed"]
    arrays = {f"a/{number}.npy": np.full(50_000, number, dtype=np.float32) for number in range(12)}
    for path, array in arrays.items():
        remote.write_array(path, array)
    for path, array in arrays.items():
        np.testing.assert_array_equal(remote.read_array(path), array)
    assert remote.files("a") == sorted(arrays)
    assert server.counts()["failed"] > failed_before


def test_the_error_names_a_file_that_storage_does_not_accept_and_the_existing_file_stays(
    remote: Workspace, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(object_storage, "CLIENT_ATTEMPTS", 1)
    workspace = Workspace(remote.uri)
    workspace.write_bytes("f", b"old")
    server.fail(1.0)
    with pytest.raises(StorageError, match=r"/f was not written in 4 attempts.*completed work is kept"):
        workspace.write_bytes("f", b"new" * 1000)
    server.fail(0.0)
    assert workspace.read_bytes("f") == b"old"


def test_the_error_of_a_read_without_rights_names_them(remote: Workspace, server: S3Server) -> None:
    remote.write_json("a/f.json", {})
    server.deny("GET", "HEAD")
    reads: list[Callable[[], object]] = [
        lambda: remote.exists("a/f.json"),
        lambda: remote.files("a"),
        lambda: remote.folders(""),
        lambda: remote.is_empty,
        lambda: remote.read_json("a/f.json"),
        lambda: remote.local_file("a/f.json"),
    ]
    for read in reads:
        with pytest.raises(
            StorageError, match=r"could not be read or written: .*; give this machine's role s3:ListBucket"
        ):
            read()
    server.deny("GET", "HEAD", "PUT", "POST")
    with pytest.raises(StorageError, match=r"could not be read or written: .*; give this machine's role s3:ListBucket"):
        take_lock(remote)


def test_a_bucket_that_does_not_exist_is_no_locked_workspace(server: S3Server) -> None:
    missing = Workspace(server.uri("w").replace("s3://bucket/", "s3://no-such-bucket/"))
    with pytest.raises(InputError, match="bucket no-such-bucket does not exist; create it"):
        take_lock(missing)


OTHER_HOLDER = {
    "host": "elsewhere",
    "pid_namespace": 1,
    "pid": 7,
    "process_start": "",
    "command": "train",
    "since": "2026-11-24T10:00:00",
    "token": "t",
    "renewals": 0,
}


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are renewed after 0.05 s and watched for 1 s."""
    monkeypatch.setattr(locking, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(locking, "WATCH_SECONDS", 1.0)


def test_a_lock_is_taken_and_given_back(remote: Workspace) -> None:
    remote.write_json(LOCK_HOLDER, OTHER_HOLDER)
    unlock(remote)
    assert lock_holder(remote) is None
    with exclusive(remote, "taste"), exclusive(Workspace(remote.uri), "inner"):
        holder = lock_holder(remote)
        assert holder is not None
        assert holder.command == "taste"
    assert not remote.exists(LOCK_HOLDER)


def leave_lock(remote: Workspace) -> dict[str, Any]:
    """The lock that a run of this machine leaves when it is killed."""
    program = (
        "import os, sys; from rayrec.storage.locking import exclusive; from rayrec.storage.workspace import Workspace\n"
    )
    program += "with exclusive(Workspace(sys.argv[1]), 'train'): os.kill(os.getpid(), 9)"
    with subprocess.Popen([sys.executable, "-c", program, remote.uri]) as process:
        pass
    holder: dict[str, Any] = remote.read_json(LOCK_HOLDER)
    assert holder["pid"] == process.pid
    return holder


@pytest.mark.usefixtures("short_waits")
def test_the_lock_of_another_container_with_the_name_of_this_host_is_watched_whatever_its_process(
    remote: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = leave_lock(remote)
    holder["pid_namespace"] += 1
    remote.write_json(LOCK_HOLDER, holder)
    take_lock(remote)
    assert "waiting up to 1 s" in capsys.readouterr().err


# Holds the lock as another machine until its standard input ends.
HOLDER_ELSEWHERE = """
import sys
from types import SimpleNamespace
from rayrec.storage import locking
from rayrec.storage.workspace import Workspace
locking.socket = SimpleNamespace(gethostname=lambda: "elsewhere")
locking.RENEW_SECONDS = 0.05
with locking.exclusive(Workspace(sys.argv[1]), "train"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.usefixtures("short_waits")
def test_a_run_of_another_machine_is_left_alone_while_it_lives_and_its_lock_is_taken_over_once_it_is_dead(
    remote: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER_ELSEWHERE, remote.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with monkeypatch.context() as patch:
            patch.setattr(locking, "WATCH_SECONDS", 60.0)  # the first renewal is enough to refuse
            with pytest.raises(BusyError, match=rf"`rayrec train` \(process {process.pid} on elsewhere.*wait until"):
                take_lock(remote)
        assert process.poll() is None
        process.kill()
    capsys.readouterr()
    with exclusive(remote, "taste"):
        assert remote.read_json(LOCK_HOLDER)["command"] == "taste"
    lock = "the lock of `rayrec train` on host elsewhere"
    assert capsys.readouterr().err == f"Warning: {lock}: waiting up to 1 s to see whether that run is alive\n"
    assert not remote.exists(LOCK_HOLDER)


@pytest.mark.usefixtures("short_waits")
def test_a_lock_that_its_run_gives_back_while_it_is_watched_is_taken_at_once(
    remote: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locking, "WATCH_SECONDS", 3600.0)
    remote.write_json(LOCK_HOLDER, OTHER_HOLDER)
    outcomes: list[None] = []
    other_run = threading.Thread(target=lambda: outcomes.append(take_lock(remote)), daemon=True)
    other_run.start()
    while "to see whether that run is alive" not in capsys.readouterr().err:
        assert other_run.is_alive()
        time.sleep(0.01)
    unlock(remote)
    other_run.join(60)
    assert outcomes == [None]
    assert not remote.exists(LOCK_HOLDER)


def outcomes_of_four_runs(remote: Workspace) -> list[str]:
    """Let four runs take the lock at the same time; return "held" or "refused" for each, sorted.

    A run that holds the lock keeps it until the three others are refused.
    """
    outcomes: list[str] = []
    barrier, others_refused = threading.Barrier(4), threading.Event()

    def try_lock() -> None:
        barrier.wait()
        try:
            with exclusive(remote, "taste"):
                outcomes.append("held")
                others_refused.wait(300)
        except BusyError:
            outcomes.append("refused")
            if outcomes.count("refused") == 3:
                others_refused.set()

    with ThreadPoolExecutor(4) as pool:
        for run in [pool.submit(try_lock) for _ in range(4)]:
            run.result()
    return sorted(outcomes)


@pytest.mark.usefixtures("short_waits")
def test_of_several_runs_that_watch_the_lock_of_a_dead_run_one_takes_it(remote: Workspace) -> None:
    remote.write_json(LOCK_HOLDER, OTHER_HOLDER)
    assert outcomes_of_four_runs(remote) == ["held", *["refused"] * 3]


@pytest.mark.usefixtures("short_waits")
def test_a_run_that_loses_its_lock_is_interrupted_and_leaves_the_lock_of_the_other(remote: Workspace) -> None:
    uninterrupted_runs: list[str] = []
    error = pytest.raises(BusyError, match=r"`rayrec taste` has lost its lock .* run the command again")
    with error, exclusive(remote, "taste"):
        remote.write_json(LOCK_HOLDER, OTHER_HOLDER)
        time.sleep(60)
        uninterrupted_runs.append("run")
    assert remote.read_json(LOCK_HOLDER) == OTHER_HOLDER
    unlock(remote)
    with error, exclusive(remote, "taste"):
        unlock(remote)
        time.sleep(60)
        uninterrupted_runs.append("run")
    assert not remote.exists(LOCK_HOLDER)
    assert uninterrupted_runs == []


@pytest.mark.usefixtures("short_waits")
def test_a_run_in_a_thread_that_loses_its_lock_ends_at_its_next_stage(remote: Workspace) -> None:
    finished_stages = []

    def run_stages() -> None:
        with exclusive(remote, "run"):
            unlock(remote)
            for number in range(1000):
                with exclusive(remote, "stage"):
                    time.sleep(0.05)
                finished_stages.append(number)

    with ThreadPoolExecutor(1) as pool, pytest.raises(BusyError, match="`rayrec run` has lost its lock"):
        pool.submit(run_stages).result()
    assert len(finished_stages) < 1000


@pytest.mark.usefixtures("short_waits")
def test_renewals_that_fail_are_tried_again(
    remote: Workspace, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_storage, "CLIENT_ATTEMPTS", 1)

    def wait_for_renewals(count: int) -> int:
        while (holder := lock_holder(remote)) is None or holder.renewals < count:
            time.sleep(0.05)
        return holder.renewals

    with exclusive(remote, "taste"):
        first_renewals = wait_for_renewals(1)
        failed_before = server.counts()["failed"]
        server.fail(1.0)
        while server.counts()["failed"] < failed_before + 2:
            time.sleep(0.05)
        server.fail(0.0)
        wait_for_renewals(first_renewals + 2)
    assert not remote.exists(LOCK_HOLDER)


def test_the_lock_of_a_process_that_died_on_this_machine_is_taken_over_by_one_of_those_who_want_it(
    remote: Workspace,
) -> None:
    leave_lock(remote)
    assert outcomes_of_four_runs(remote) == ["held", *["refused"] * 3]


def test_a_lock_whose_put_is_sent_again_since_its_answer_was_lost_is_held(
    remote: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = object_storage.conditional_writer(remote.filesystem)
    for name in ("create", "replace"):
        put = getattr(writer, name)
        monkeypatch.setattr(writer, name, lambda *arguments, put=put: put(*arguments) and put(*arguments))
    monkeypatch.setattr("rayrec.storage.locking.conditional_writer", lambda filesystem: writer)
    with exclusive(remote, "taste"), ThreadPoolExecutor() as pool, pytest.raises(BusyError, match="`rayrec taste`"):
        pool.submit(take_lock, remote).result()
    assert not remote.exists(LOCK_HOLDER)
    leave_lock(remote)
    take_lock(remote)  # replaces the lock of a dead run
    assert not remote.exists(LOCK_HOLDER)


def take_lock(workspace: Workspace) -> None:
    with exclusive(workspace, "train"):
        pass


def test_a_lock_that_may_not_be_deleted_is_a_warning_and_the_next_run_takes_it_over(
    remote: Workspace, server: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.deny("DELETE")
    for _ in range(2):
        take_lock(remote)
        assert re.search(r"Warning: the lock of workspace .* was not deleted: .* role s3:", capsys.readouterr().err)
        assert remote.read_json(LOCK_HOLDER)["pid"] == os.getpid()
    server.deny()
    take_lock(remote)
    assert not remote.exists(LOCK_HOLDER)


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc, which has the starts of processes: run it on Linux")
def test_the_lock_of_a_dead_process_is_taken_over_though_another_process_has_its_number(remote: Workspace) -> None:
    with exclusive(remote, "taste"):
        own_holder = remote.read_json(LOCK_HOLDER)
    boot, ticks = own_holder["process_start"].split()
    for start in (f"another-boot {ticks}", f"{boot} 1"):
        remote.write_json(LOCK_HOLDER, {**own_holder, "pid": os.getppid(), "process_start": start})
        take_lock(remote)
        assert not remote.exists(LOCK_HOLDER)


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc, which has the starts of processes: run it on Linux")
def test_the_lock_of_a_living_process_that_the_system_hides_is_not_taken_over(
    remote: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `hidepid`, /proc does not show the processes of other users."""
    with exclusive(remote, "taste"):
        holder = {**remote.read_json(LOCK_HOLDER), "pid": os.getppid()}
    remote.write_json(LOCK_HOLDER, holder)
    read_text = Path.read_text

    def read_visible(path: Path, *arguments: Any, **options: Any) -> str:
        if path == Path(f"/proc/{os.getppid()}/stat"):
            raise FileNotFoundError(path)
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", read_visible)
    with pytest.raises(BusyError, match=rf"`rayrec taste` \(process {os.getppid()} on "):
        take_lock(remote)
    assert remote.read_json(LOCK_HOLDER) == holder


def test_a_lock_that_another_run_took_meanwhile_is_not_given_back(remote: Workspace) -> None:
    with exclusive(remote, "taste"):
        remote.write_json(LOCK_HOLDER, OTHER_HOLDER)  # as another run does after an unlock
    assert remote.read_json(LOCK_HOLDER) == OTHER_HOLDER
