"""Two runs at once: the second is refused and told of the first; what a killed run left blocks nobody."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrec.errors import BusyError
from rayrec.jobs.verifying.verify import verify_workspace
from rayrec.storage import locking
from rayrec.storage.locking import exclusive, writes
from rayrec.storage.workspace import LOCK_HOLDER, Workspace

HOLD = """
import sys, time
from rayrec.storage.locking import exclusive
from rayrec.storage.workspace import Workspace
with exclusive(Workspace(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_run(workspace: Workspace) -> Iterator[subprocess.Popen]:
    """A process that holds the workspace."""
    with subprocess.Popen([sys.executable, "-c", HOLD, workspace.uri], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_told_of_the_first(workspace: Workspace, other_run: subprocess.Popen) -> None:
    with (
        pytest.raises(BusyError, match=rf"in use by `rayrec train` \(process {other_run.pid} on .+, since 20"),
        exclusive(workspace, "taste"),
    ):
        pass
    assert other_run.poll() is None
    Workspace(workspace.uri).read_json(LOCK_HOLDER)  # readers are not locked out


def test_what_a_killed_run_left_blocks_nobody(workspace: Workspace, other_run: subprocess.Popen) -> None:
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    assert workspace.read_json(LOCK_HOLDER)["pid"] == other_run.pid
    with exclusive(workspace, "taste"):
        assert workspace.read_json(LOCK_HOLDER)["pid"] == os.getpid()
    assert not workspace.exists(LOCK_HOLDER)


def test_a_run_may_hold_it_again_within_itself_but_another_thread_not(workspace: Workspace) -> None:
    @writes("inner")
    def stage(workspace: Workspace, number: int) -> int:
        return number + 1

    refused: list[BusyError] = []

    def elsewhere() -> None:
        try:
            stage(Workspace(workspace.uri), 1)
        except BusyError as error:
            refused.append(error)

    with exclusive(workspace, "run"):
        assert stage(workspace, 1) == 2
        assert workspace.read_json(LOCK_HOLDER)["command"] == "run"
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert "`rayrec run`" in str(refused[0])
    elsewhere()
    assert len(refused) == 1


def test_an_error_gives_it_back(workspace: Workspace) -> None:
    @writes("fails")
    def stage(workspace: Workspace) -> None:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            stage(workspace)


def test_a_path_where_nothing_was_and_nothing_came_of_it_stays_so(tmp_path: Path) -> None:
    with exclusive(Workspace(tmp_path / "mistyped"), "taste"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_files_of_a_lock_are_nothing_to_the_audit(workspace: Workspace) -> None:
    with exclusive(workspace, "run"):
        assert [note.path for note in verify_workspace(workspace).notes] == ["dataset/dataset.json"]


@pytest.mark.parametrize(
    "stage", ["import_data", "embed", "train", "taste", "build_index", "evaluate", "pipeline", "generate", "demo"]
)
def test_every_stage_that_writes_takes_it(stage: str) -> None:
    source = (Path(locking.__file__).parents[1] / "jobs" / f"{stage}.py").read_text()
    assert "\n@writes(" in source


class TestLease:
    """On object storage, whose part a local folder plays: its files are put whole, and have times."""

    @pytest.fixture(autouse=True)
    def quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(locking, "LEASE_SECONDS", 3.0)
        monkeypatch.setattr(locking, "BEAT_SECONDS", 0.3)
        monkeypatch.setattr(locking, "SETTLE_SECONDS", 0.2)

    @pytest.fixture
    def held_elsewhere(self, workspace: Workspace) -> locking.Holder:
        """A lease of another machine, written just now."""
        holder = locking.Holder(host="elsewhere", pid=7, command="train", since="2026-11-24T10:00:00", token="t")
        workspace.write_json(locking.LEASE, vars(holder))
        return holder

    def test_a_second_run_is_refused_and_a_lease_that_is_not_renewed_runs_out(
        self, workspace: Workspace, held_elsewhere: locking.Holder
    ) -> None:
        mine = locking.Holder.of_this_run("taste")
        with (
            pytest.raises(BusyError, match=r"`rayrec train` \(process 7 on elsewhere.*its lease is over in [1-3] s"),
            locking._lease(workspace, mine),
        ):
            pass
        time.sleep(3.1)
        with locking._lease(workspace, mine):
            assert workspace.read_json(locking.LEASE)["token"] == mine.token
        assert not workspace.exists(locking.LEASE)
        assert [path for path in os.listdir(workspace.full("")) if path.startswith(".lease")] == []

    def test_a_heartbeat_keeps_it(self, workspace: Workspace) -> None:
        mine = locking.Holder.of_this_run("train")
        with locking._lease(workspace, mine):
            time.sleep(3.5)  # longer than a lease lasts
            with (
                pytest.raises(BusyError),
                locking._lease(workspace, locking.Holder(**{**vars(mine), "host": "elsewhere", "token": "other"})),
            ):
                pass

    def test_the_lease_of_a_process_that_is_dead_on_this_machine_is_free_at_once(self, workspace: Workspace) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as process:
            pass
        dead = {**vars(locking.Holder.of_this_run("train")), "pid": process.pid}
        workspace.write_json(locking.LEASE, dead)
        with locking._lease(workspace, locking.Holder.of_this_run("taste")):
            pass

    def test_of_two_that_start_at_once_one_goes_on(self, workspace: Workspace) -> None:
        outcomes: list[str] = []

        def start(number: int) -> None:
            holder = locking.Holder(**{**vars(locking.Holder.of_this_run("taste")), "token": str(number)})
            try:
                with locking._lease(workspace, holder):
                    outcomes.append("held")
                    time.sleep(0.5)
            except BusyError:
                outcomes.append("refused")

        threads = [threading.Thread(target=start, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["held", *["refused"] * 4]

    @pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
    def test_a_run_that_lost_its_lease_stops(self, workspace: Workspace, interrupts: Any) -> None:
        """In the background of a shell too, where interrupts are ignored."""
        before = signal.signal(signal.SIGINT, interrupts)
        try:
            self._lose_the_lease(workspace)
        finally:
            signal.signal(signal.SIGINT, before)

    def test_a_lease_lost_by_a_thread_is_told_at_the_end(self, workspace: Workspace) -> None:
        found: list[BusyError] = []

        def work() -> None:
            try:
                with locking._lease(workspace, mine):
                    workspace.write_json(locking.LEASE, {**vars(mine), "command": "import", "token": "other"})
                    time.sleep(1)
            except BusyError as error:
                found.append(error)

        mine = locking.Holder.of_this_run("train")
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert "took over the lease of this run" in str(found[0])

    def _lose_the_lease(self, workspace: Workspace) -> None:
        mine = locking.Holder.of_this_run("train")

        def work() -> None:
            with locking._lease(workspace, mine):
                workspace.write_json(locking.LEASE, {**vars(mine), "command": "import", "token": "other"})
                time.sleep(10)

        began = time.monotonic()
        with pytest.raises(BusyError, match=r"`rayrec import` .* took over the lease of this run"):
            work()
        assert time.monotonic() - began < 8  # the wait was cut short
        assert workspace.read_json(locking.LEASE)["token"] == "other"
