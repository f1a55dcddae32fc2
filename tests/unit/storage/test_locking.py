"""Two runs at once: the second is refused and the error names the first; the lock of a killed run blocks nobody."""

import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs
import pytest

import rayrec
from rayrec.errors import BusyError, InputError, StorageError
from rayrec.jobs.verify import verify_workspace
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


def test_a_run_on_a_full_disk_holds_its_lock_without_a_name(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_nothing(workspace: Workspace, path: str, value: object) -> str:
        raise StorageError("no space left")

    monkeypatch.setattr(Workspace, "write_json", write_nothing)
    with exclusive(workspace, "clean"):
        result = subprocess.run(
            [sys.executable, "-c", HOLDER_PROGRAM, workspace.uri], capture_output=True, text=True, check=False
        )
    assert "in use by another run" in result.stderr


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


# Stages that only read, write one small file or a store of user states, or run other stages, which take the lock.
STAGES_WITHOUT_LOCK = {
    *("inspect_files", "verify_release", "list_releases", "answer", "report_experiment", "status", "verify_workspace"),
    *("find_garbage", "split_dataset", "create_release", "activate_release", "rollback", "load_states", "forget_users"),
    *("unlock", "tune"),
}


@pytest.mark.parametrize("name", sorted(set(rayrec.STAGES) - STAGES_WITHOUT_LOCK))
def test_every_stage_that_writes_takes_the_lock(workspace: Workspace, name: str) -> None:
    stage = getattr(rayrec, name)
    _, *parameters = inspect.signature(stage).parameters.values()
    # The stage is refused before it reads its arguments.
    arguments = {parameter.name: None for parameter in parameters if parameter.default is inspect.Parameter.empty}
    with exclusive(workspace, "other"), ThreadPoolExecutor(1) as executor:
        result = executor.submit(stage, workspace, **arguments)
        with pytest.raises(BusyError, match="in use by `rayrec other`"):
            result.result()


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
        ({"status": "404"}, '{"error": {"message": "no bucket"}}'),
        ({"status": "404"}, '{"error": {"message": "deleted meanwhile"}}'),
    ]
    sequence = http.HttpMockSequence(responses)
    writer = GcsWriter(sequence)
    assert writer.create("bucket/a/lock", b"1")
    assert not writer.create("bucket/a/lock", b"1")
    assert writer.read("bucket/a/lock") == (b"content", "5")
    assert writer.read("bucket/a/lock") == (b"", "")
    assert writer.replace("bucket/a/lock", b"2", "5")
    assert not writer.replace("bucket/a/lock", b"2", "5")
    with pytest.raises(StorageError, match=r"bucket/a/lock could not be read or written.*storage\.objectAdmin"):
        writer.create("bucket/a/lock", b"1")
    with pytest.raises(InputError, match="bucket bucket does not exist; create it"):
        writer.create("bucket/a/lock", b"1")
    assert not writer.replace("bucket/a/lock", b"2", "5")
    requested_uris = [uri for uri, *_ in sequence.request_sequence]
    assert "ifGenerationMatch=0" in requested_uris[0]
    assert "generation=5" in requested_uris[3]
    assert "ifGenerationMatch=5" in requested_uris[5]


def test_a_file_system_without_conditional_puts_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be locked"):
        conditional_writer(pafs.LocalFileSystem())
