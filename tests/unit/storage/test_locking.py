"""Two runs at once: the second is refused and the error names the first; the lock of a killed run blocks nobody."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from rayrec.errors import BusyError, InputError, StorageError
from rayrec.jobs.verify import verify_workspace
from rayrec.storage import locking
from rayrec.storage.locking import exclusive, writes
from rayrec.storage.object_storage import GcsWriter, conditional_writer
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
    """A process that holds the lock of the workspace."""
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
    "stage",
    ["import_data", "compact", "embed", "train", "taste", "build_index", "evaluate", "pipeline", "generate"],
)
def test_every_stage_that_writes_takes_it(stage: str) -> None:
    source = (Path(locking.__file__).parents[1] / "jobs" / f"{stage}.py").read_text()
    assert "\n@writes(" in source


def test_the_demo_takes_it_too() -> None:
    source = (Path(locking.__file__).parents[1] / "jobs" / "pipeline.py").read_text()
    assert '\n@writes("demo")' in source


def test_google_storage_is_locked_by_generation() -> None:
    """The HTTP client is fake and replays answers of the JSON API."""
    http = pytest.importorskip("googleapiclient.http", reason="no googleapiclient: pip install 'rayrec[gcp]'")
    found = [
        ({"status": "200"}, '{"generation": "5"}'),  # created
        ({"status": "412"}, "{}"),  # exists already
        ({"status": "200"}, '{"generation": "5"}'),
        ({"status": "200"}, "content"),
        ({"status": "404"}, "{}"),  # does not exist
        ({"status": "200"}, '{"generation": "6"}'),  # replaced
        ({"status": "412"}, "{}"),  # another writer came first
        ({"status": "403"}, '{"error": {"message": "no rights"}}'),
    ]
    sequence = http.HttpMockSequence(found)
    writer = GcsWriter(sequence)
    assert writer.create("bucket/a/lock", b"1")
    assert not writer.create("bucket/a/lock", b"1")
    assert writer.read("bucket/a/lock") == (b"content", "5")
    assert writer.read("bucket/a/lock") == (b"", "")
    assert writer.replace("bucket/a/lock", b"2", "5")
    assert not writer.replace("bucket/a/lock", b"2", "5")
    with pytest.raises(StorageError, match="bucket/a/lock could not be read or written"):
        writer.create("bucket/a/lock", b"1")
    asked = [uri for uri, *_ in sequence.request_sequence]
    assert "ifGenerationMatch=0" in asked[0]
    assert "generation=5" in asked[3]
    assert "ifGenerationMatch=5" in asked[5]


def test_a_file_system_without_conditional_puts_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be locked"):
        conditional_writer(pafs.LocalFileSystem())
