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

HOLDER_PROGRAM = """
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
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER_PROGRAM, workspace.uri], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_the_error_names_the_first(
    workspace: Workspace, other_run: subprocess.Popen
) -> None:
    with (
        pytest.raises(BusyError, match=rf"in use by `rayrec train` \(process {other_run.pid} on .+, since 20"),
        exclusive(workspace, "taste"),
    ):
        pass
    assert other_run.poll() is None
    Workspace(workspace.uri).read_json(LOCK_HOLDER)  # readers are not locked out


def test_the_lock_of_a_killed_run_blocks_nobody(workspace: Workspace, other_run: subprocess.Popen) -> None:
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.wait()
    assert workspace.read_json(LOCK_HOLDER)["pid"] == other_run.pid
    with exclusive(workspace, "taste"):
        assert workspace.read_json(LOCK_HOLDER)["pid"] == os.getpid()
    assert not workspace.exists(LOCK_HOLDER)


def test_a_run_may_take_its_lock_again_but_another_thread_may_not(workspace: Workspace) -> None:
    @writes("inner")
    def stage(workspace: Workspace, number: int) -> int:
        return number + 1

    errors: list[BusyError] = []

    def run_stage() -> None:
        try:
            stage(Workspace(workspace.uri), 1)
        except BusyError as error:
            errors.append(error)

    with exclusive(workspace, "run"):
        assert stage(workspace, 1) == 2
        assert workspace.read_json(LOCK_HOLDER)["command"] == "run"
        thread = threading.Thread(target=run_stage)
        thread.start()
        thread.join()
    assert "`rayrec run`" in str(errors[0])
    run_stage()
    assert len(errors) == 1


def test_an_error_releases_the_lock(workspace: Workspace) -> None:
    @writes("fails")
    def stage(workspace: Workspace) -> None:
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            stage(workspace)


def test_a_lock_on_a_missing_workspace_leaves_no_folder(tmp_path: Path) -> None:
    with exclusive(Workspace(tmp_path / "mistyped"), "taste"):
        pass
    assert os.listdir(tmp_path) == []


def test_verify_ignores_the_files_of_a_lock(workspace: Workspace) -> None:
    with exclusive(workspace, "run"):
        assert [note.path for note in verify_workspace(workspace).notes] == ["dataset/dataset.json"]


@pytest.mark.parametrize(
    "stage",
    ["import_data", "compact", "embed", "train", "taste", "build_index", "evaluate", "pipeline", "generate"],
)
def test_every_stage_that_writes_takes_the_lock(stage: str) -> None:
    source = (Path(locking.__file__).parents[1] / "jobs" / f"{stage}.py").read_text()
    assert "\n@writes(" in source


def test_the_demo_takes_the_lock() -> None:
    source = (Path(locking.__file__).parents[1] / "jobs" / "pipeline.py").read_text()
    assert '\n@writes("demo")' in source


def test_google_storage_is_locked_by_generation() -> None:
    """The HTTP client is fake and replays answers of the JSON API."""
    http = pytest.importorskip("googleapiclient.http", reason="no googleapiclient: pip install 'rayrec[gcp]'")
    responses = [
        ({"status": "200"}, '{"generation": "5"}'),  # created
        ({"status": "412"}, "{}"),  # exists already
        ({"status": "200"}, '{"generation": "5"}'),
        ({"status": "200"}, "content"),
        ({"status": "404"}, "{}"),  # does not exist
        ({"status": "200"}, '{"generation": "6"}'),  # replaced
        ({"status": "412"}, "{}"),  # another writer came first
        ({"status": "403"}, '{"error": {"message": "no rights"}}'),
    ]
    sequence = http.HttpMockSequence(responses)
    writer = GcsWriter(sequence)
    assert writer.create("bucket/a/lock", b"1")
    assert not writer.create("bucket/a/lock", b"1")
    assert writer.read("bucket/a/lock") == (b"content", "5")
    assert writer.read("bucket/a/lock") == (b"", "")
    assert writer.replace("bucket/a/lock", b"2", "5")
    assert not writer.replace("bucket/a/lock", b"2", "5")
    with pytest.raises(StorageError, match="bucket/a/lock could not be read or written"):
        writer.create("bucket/a/lock", b"1")
    requested_uris = [uri for uri, *_ in sequence.request_sequence]
    assert "ifGenerationMatch=0" in requested_uris[0]
    assert "generation=5" in requested_uris[3]
    assert "ifGenerationMatch=5" in requested_uris[5]


def test_a_file_system_without_conditional_puts_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be locked"):
        conditional_writer(pafs.LocalFileSystem())
