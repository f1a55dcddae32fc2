"""Files of object storage on the local disk: one copy per node, made once, of the current version."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from filelock import FileLock, Timeout

from rayrec.errors import DamagedArtifactError, StorageError
from rayrec.storage import object_storage
from rayrec.storage.artifacts import sha256
from rayrec.storage.workspace import Workspace


@pytest.fixture
def remote(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace whose file system says that it is not local."""
    monkeypatch.setenv(object_storage.CACHE_VARIABLE, str(tmp_path / "cache"))
    local = Workspace(workspace.uri)
    for name in ("a", "b"):
        local.write_array(f"{name}.npy", np.arange(1000))
    workspace.filesystem = pafs.SubTreeFileSystem("/", workspace.filesystem)
    workspace.root = workspace.root.removeprefix("/")
    assert not workspace.is_local
    return workspace


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name.partition("-")[2] for path in (tmp_path / "cache").iterdir() if path.suffix == ".npy")


def test_a_file_that_threads_read_at_once_is_copied_once_and_mapped_by_all(
    remote: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_names: list[str] = []
    cached_file = object_storage.cached_file

    def slow_cached_file(
        version: str, name: str, make: Callable[[Path], object], is_whole: Callable[[Path], bool] = Path.exists
    ) -> Path:
        def make_slowly(target: Path) -> None:
            copied_names.append(name)
            time.sleep(0.2)
            make(target)

        return cached_file(version, name, make_slowly, is_whole)

    monkeypatch.setattr(object_storage, "cached_file", slow_cached_file)
    arrays: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: arrays.append(remote.read_array("a.npy"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert copied_names.count("a.npy") == 1
    assert all(isinstance(array, np.memmap) and array[999] == 999 for array in arrays)
    assert len({array.filename for array in arrays if isinstance(array, np.memmap)}) == 1
    assert copies(tmp_path) == ["a.npy"]


def test_a_new_version_is_copied_anew(remote: Workspace) -> None:
    old_array = remote.read_array("a.npy")
    local = Workspace(f"/{remote.root}")
    local.write_array("a.npy", np.arange(1000) * 2)
    assert remote.read_array("a.npy")[3] == 6
    assert old_array[3] == 3


def test_a_copy_that_does_not_match_its_checksum_is_refused_and_not_kept(remote: Workspace, tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifactError, match=r"a\.npy does not match its checksum"):
        remote.read_array("a.npy", "0" * 64)
    assert copies(tmp_path) == []


def test_bytes_that_were_damaged_on_their_way_are_fetched_again(remote: Workspace) -> None:
    path = Path(f"/{remote.root}/a.npy")
    original, times = path.read_bytes(), (1_700_000_000, 1_700_000_000)
    for content in (original[:-1] + b"x", original):
        path.write_bytes(content)
        os.utime(path, times)  # by size and time, the version is the same
        if content != original:
            with pytest.raises(DamagedArtifactError):
                remote.read_array("a.npy", hashlib.sha256(original).hexdigest())
    assert remote.read_array("a.npy", hashlib.sha256(original).hexdigest())[999] == 999


def test_a_copy_that_was_cut_off_or_changed_is_made_again(remote: Workspace) -> None:
    remote.write_array("large.npy", np.arange(200_000))  # over a megabyte: its checksum is kept with the copy
    os.utime(f"/{remote.root}/large.npy", (1_700_000_000, 1_700_000_000))
    expected = sha256(remote, "large.npy")
    original = remote.local_file("large.npy", expected).read_bytes()
    for content in (b"", original[:-1], bytes(len(original))):
        remote.local_file("large.npy").write_bytes(content)
        assert remote.local_file("large.npy", expected).read_bytes() == original
        remote.local_file("large.npy").write_bytes(content)
        assert remote.sha256_on_node("large.npy") == expected
        assert remote.local_file("large.npy").read_bytes() == original


def test_a_copy_that_is_made_again_gets_the_checksum_of_its_bytes(remote: Workspace) -> None:
    original, times = Path(f"/{remote.root}/large.npy"), (1_700_000_000, 1_700_000_000)
    for factor in (1, 2):
        remote.write_array("large.npy", np.arange(200_000) * factor)  # over a megabyte: its checksum is kept
        os.utime(original, times)  # by size and time, the version is the same
        copy = remote.local_file("large.npy", hashlib.sha256(original.read_bytes()).hexdigest())
        assert copy.read_bytes() == original.read_bytes()
        copy.write_bytes(b"")


def test_a_process_can_open_its_copy_while_another_one_that_found_it_bad_before_makes_it_again(
    remote: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process comes between the check and the repair of the first one if the lock is free then."""
    copy = remote.local_file("a.npy")
    original = copy.read_bytes()
    os.utime(copy, (time.time(), 0))  # not the time of its original: both processes see a bad copy
    fsync, stat = os.fsync, Path.stat
    other_process_came = threading.Event()
    can_open: list[bool] = []

    def let_other_process_in(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        state = stat(path, follow_symlinks=follow_symlinks)
        if path == copy and not other_process_came.is_set():
            with suppress(Timeout), FileLock(f"{copy}.lock", timeout=0):
                other_process_came.set()
            if other_process_came.is_set():
                remote.local_file("a.npy")
        return state

    def open_before_rename(descriptor: int) -> None:
        can_open.append(os.path.exists(copy))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", let_other_process_in)
        patch.setattr(os, "fsync", open_before_rename)
        assert remote.local_file("a.npy").read_bytes() == original
    assert can_open
    assert all(can_open)


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc, which has the names of open files: run it on Linux")
def test_a_copy_survives_a_power_cut(remote: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole copy is on the disk before it gets its name."""
    synced_sizes: dict[str, int] = {}
    renamed_paths: list[Path] = []
    fsync, rename = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        synced_sizes[os.readlink(f"/proc/self/fd/{descriptor}")] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> Path:
        assert synced_sizes[str(source)] == source.stat().st_size
        renamed_paths.append(target)
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_rename)
    assert remote.local_file("a.npy") in renamed_paths


def test_copies_that_nobody_has_used_for_days_go_when_the_next_is_made(remote: Workspace, tmp_path: Path) -> None:
    remote.read_array("a.npy")
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, (0, 0))
    remote.read_array("b.npy")
    assert copies(tmp_path) == ["b.npy"]


def test_a_copy_that_fills_the_disk_is_deleted_and_the_error_names_the_cache(remote: Workspace, tmp_path: Path) -> None:
    remote.read_array("a.npy")

    def fill_disk(target: Path) -> None:
        target.write_bytes(b"half of the file")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"no space left for big\.npy in the cache .*set RAYREC_CACHE to"):
        object_storage.cached_file("version", "big.npy", fill_disk)
    assert copies(tmp_path) == ["a.npy"]  # it was used within the hour
    assert not list((tmp_path / "cache").glob("*.part"))


def test_copies_that_nobody_has_used_for_an_hour_give_way_on_a_full_disk(remote: Workspace, tmp_path: Path) -> None:
    old_copy = remote.local_file("a.npy")
    two_hours_ago = time.time() - 7_200
    os.utime(old_copy, (two_hours_ago, two_hours_ago))

    def copy_if_there_is_space(target: Path) -> None:
        if old_copy.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        target.write_bytes(b"all of the file")

    assert object_storage.cached_file("version", "big.npy", copy_if_there_is_space).read_bytes() == b"all of the file"
    assert copies(tmp_path) == ["big.npy"]


def test_a_copy_that_takes_hours_to_make_does_not_give_way_to_another_one_on_a_full_disk(remote: Workspace) -> None:
    del remote  # sets the folder of the cache

    def fill_disk(_target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def make_for_hours(target: Path) -> None:
        target.write_bytes(b"first part, ")
        os.utime(target, (time.time() - 7_200, time.time()))  # made two hours ago, written now
        with pytest.raises(StorageError, match=r"no space left for other\.npy"):
            object_storage.cached_file("version", "other.npy", fill_disk)
        with target.open("ab") as stream:
            stream.write(b"last part")

    assert object_storage.cached_file("version", "big.npy", make_for_hours).read_bytes() == b"first part, last part"


@pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc, which lists mapped files: run on Linux")
def test_copies_in_use_stay_on_a_full_disk(remote: Workspace, tmp_path: Path) -> None:
    live_array = remote.read_array("a.npy")  # mapped, as by a replica that was started long ago
    for path in (tmp_path / "cache").iterdir():
        os.utime(path, (0, 0))

    def fill_disk(_target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match=r"no space left for big\.npy"):
        object_storage.cached_file("version", "big.npy", fill_disk)
    assert copies(tmp_path) == ["a.npy"]
    assert live_array[3] == 3
