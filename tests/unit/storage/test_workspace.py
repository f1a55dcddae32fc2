"""The workspace: files are whole or absent, paths are below one root, and missing files give clear errors."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayrec.errors import DamagedArtifactError, InputError, NotFoundError
from rayrec.importing.readers.reader import find_files
from rayrec.jobs.submit import shared_workspace
from rayrec.storage.artifacts import sha256
from rayrec.storage.workspace import Workspace, artifact_dir, histories_file, playlists_file, split_file


def test_what_is_written_is_read(workspace: Workspace) -> None:
    workspace.write_bytes("a/b.bin", b"\x00\x01")
    workspace.write_json("a/c.json", {"title": "Für Elise", "n": [1, 2]})
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    workspace.write_array("a/d.npy", array)
    table = pa.table({"x": [1, 2, 3], "y": ["a", "b", None]})
    workspace.write_table("a/e.parquet", table)
    assert workspace.read_bytes("a/b.bin") == b"\x00\x01"
    assert workspace.read_json("a/c.json") == {"title": "Für Elise", "n": [1, 2]}
    np.testing.assert_array_equal(workspace.read_array("a/d.npy"), array)
    assert workspace.read_table("a/e.parquet").equals(table)
    assert workspace.read_table("a/e.parquet", columns=["y"]).column_names == ["y"]
    assert workspace.files("a") == ["a/b.bin", "a/c.json", "a/d.npy", "a/e.parquet"]


def test_a_file_has_its_own_uri_before_the_options(workspace: Workspace) -> None:
    remote = Workspace("s3://bucket/a/b/?endpoint_override=localhost:9000&scheme=http")
    assert remote.uri_of("c/d.parquet") == "s3://bucket/a/b/c/d.parquet?endpoint_override=localhost:9000&scheme=http"
    assert Workspace("s3://bucket/a?region=north").uri_of("f") == "s3://bucket/a/f?region=north"
    assert workspace.uri_of("c/d.parquet") == f"{workspace.root}/c/d.parquet"


def test_a_write_that_fails_leaves_the_existing_file_and_no_leftovers(workspace: Workspace) -> None:
    workspace.write_bytes("f", b"old")
    with pytest.raises(RuntimeError, match="half way"), workspace.open_output("f") as stream:  # noqa: PT012
        stream.write(b"new")
        raise RuntimeError("half way")
    assert workspace.read_bytes("f") == b"old"
    assert [path.name for path in Path(workspace.root).iterdir()] == ["f"]


def test_a_file_appears_only_when_it_is_whole(workspace: Workspace) -> None:
    with workspace.open_output("folder/f") as stream:
        stream.write(b"part")
        assert not workspace.exists("folder/f")
        assert workspace.files("folder") == []
    assert workspace.read_bytes("folder/f") == b"part"


def test_arrays_on_disk_are_read_only_and_never_pickled(workspace: Workspace) -> None:
    workspace.write_array("a.npy", np.arange(3))
    with pytest.raises(ValueError, match="read-only"):
        workspace.read_array("a.npy")[0] = 1
    with pytest.raises(ValueError, match="allow_pickle"):
        workspace.write_array("b.npy", np.array([{}], dtype=object))
    assert not workspace.exists("b.npy")


@pytest.mark.parametrize("content", [b"", b'{"id": "a", "pl', b"\xff\xfe{}"])
def test_a_json_file_that_is_cut_off_or_something_else_is_damaged(workspace: Workspace, content: bytes) -> None:
    workspace.write_bytes("dataset/dataset.json", content)
    with pytest.raises(
        DamagedArtifactError, match=r"dataset/dataset.json is not JSON \(.*\); restore it from a backup"
    ):
        workspace.read_json("dataset/dataset.json")


@pytest.mark.parametrize("read", ["read_bytes", "read_json", "read_array", "read_table"])
def test_a_missing_file_is_named(workspace: Workspace, read: str) -> None:
    with pytest.raises(NotFoundError, match=r"gone/x not found in workspace .*; `rayrec verify` lists"):
        getattr(workspace, read)("gone/x")
    with pytest.raises(NotFoundError, match="gone/x"):
        workspace.local_file("gone/x")


def test_files_and_folders_are_listed_moved_and_deleted(workspace: Workspace) -> None:
    for name in ("k/2/f", "k/1/f", "k/1/.hidden", "k/g"):
        workspace.write_bytes(name, b"12")
    assert workspace.files("k") == ["k/1/f", "k/2/f", "k/g"]
    assert workspace.folders("k") == ["1", "2"]
    assert (workspace.size("k"), workspace.size("k/g"), workspace.size("none")) == (6, 2, 0)
    workspace.move("k/g", "new/folder/g")
    assert workspace.files("new") == ["new/folder/g"]
    workspace.delete("k")
    workspace.delete("new/folder/g")
    workspace.delete("was/never/there")
    assert workspace.files("k") == workspace.files("new") == workspace.folders("none") == []


def test_a_local_file_is_copied_in_and_has_a_local_path(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"content")
    workspace.put_file(tmp_path / "here", "deep/there")
    assert workspace.local_file("deep/there").read_bytes() == b"content"


def test_a_workspace_travels_to_workers_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickled = pickle.dumps(Workspace("relative"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert pickle.loads(pickled).root == str(tmp_path / "relative")


def test_a_file_or_an_unknown_scheme_is_no_workspace(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file; expected a folder"):
        Workspace(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be opened"):
        Workspace("ftp://host/folder")


def test_a_uri_of_a_file_system_works_as_a_path_does(tmp_path: Path) -> None:
    Workspace(f"file://{tmp_path}/w").write_bytes("f", b"1")
    assert Workspace(tmp_path / "w").read_bytes("f") == b"1"


def test_paths_are_spelled_as_the_layout_says() -> None:
    assert histories_file(1, 23) == "dataset/histories/part=0001/bucket=00023/histories.parquet"
    assert playlists_file(4) == "dataset/playlists/playlists-00004.parquet"
    assert split_file("s") == "splits/s.json"
    assert artifact_dir("models", "m") == "models/m"


FULL_DISK_PROGRAM = """
import resource, sys
from rayrec.storage.workspace import Workspace
from rayrec.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
workspace = Workspace(sys.argv[1])
workspace.write_bytes("small", b"fits")
try:
    with workspace.open_output("large") as stream:
        for _ in range(100):
            stream.write(b"x" * 10_000)
except StorageError as error:
    print(error)
"""


def test_a_full_disk_is_reported_and_leaves_the_existing_file_and_no_leftovers(workspace: Workspace) -> None:
    workspace.write_bytes("large", b"old")
    output = subprocess.run(
        [sys.executable, "-c", FULL_DISK_PROGRAM, workspace.uri],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    assert "no space left to write large in" in output
    assert "completed work is kept" in output
    assert workspace.read_bytes("large") == b"old"
    assert sorted(path.name for path in Path(workspace.root).iterdir()) == ["large", "small"]


def test_what_is_written_survives_a_power_cut(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is synced before it gets its name, its folder after that, and so is the parent of each new folder."""
    root = Path(workspace.root)
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        calls.append(("sync", "." if path == str(root) else os.path.relpath(path, root)))
        fsync(descriptor)

    def record_rename(source: Path, target: str) -> Path:
        calls.append(("rename", os.path.relpath(target, root)))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_rename)
    workspace.write_bytes("a/b/f", b"content")
    calls_before, calls_after = calls[: calls.index(("rename", "a/b/f"))], calls[calls.index(("rename", "a/b/f")) + 1 :]
    assert {("sync", "."), ("sync", "a")} <= set(calls_before)
    assert calls_before[-1][1].startswith("a/b/.f.")
    assert calls_after == [("sync", "a/b")]
    calls.clear()
    workspace.move("a/b/f", "c/f")
    assert calls == [("sync", "."), ("sync", "c")]


def test_writers_return_the_checksum_of_what_they_wrote(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "here").write_bytes(b"content" * 1_000_000)
    checksums = {
        "a.bin": workspace.write_bytes("a.bin", b"content"),
        "b.json": workspace.write_json("b.json", {"n": 1}),
        "c.npy": workspace.write_array("c.npy", np.arange(100_000)),
        "d.parquet": workspace.write_table("d.parquet", pa.table({"x": range(1000)})),
        "e.bin": workspace.put_file(tmp_path / "here", "e.bin"),
    }
    assert checksums == {path: sha256(workspace, path) for path in checksums}


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:se%2Fcret@bucket/a?region=eu-west-1",
        "s3://AKIA@bucket/a",
        "s3://:secret@bucket/a",
        "s3://AKIA:abc/se+cret@bucket/a",
        "s3://AKIA:abc?se#cret@bucket/a",
        "s3://bucket/a?endpoint_override=http://AKIA:secret@host",
    ],
)
def test_a_uri_with_credentials_is_refused_without_showing_them(uri: str) -> None:
    openers: list[Callable[[str], object]] = [Workspace, lambda uri: find_files([uri], ("*",)), shared_workspace]
    for open_uri in openers:
        with pytest.raises(InputError, match=r"s3://\.\.\.@(bucket/a|host).* contains credentials") as error:
            open_uri(uri)
        assert not any(part in str(error.value) for part in ("AKIA", "abc", "cret", "eu-west"))


def test_the_error_of_a_uri_with_unknown_options_shows_no_values() -> None:
    openers: list[Callable[[str], object]] = [Workspace, lambda uri: find_files([uri], ("*",))]
    for open_uri in openers:
        with pytest.raises(
            InputError, match=r"s3://bucket/a\?access_key=\.\.\.&secret_key=\.\.\. cannot be opened;"
        ) as error:
            open_uri("s3://bucket/a?access_key=AKIA&secret_key=Se/cret")
        assert not any(part in str(error.value) for part in ("AKIA", "Se", "/cret"))


def test_an_at_sign_in_the_name_of_an_object_is_no_password() -> None:
    assert Workspace("s3://bucket/a@b/c:d@e?region=eu-west-1").root == "bucket/a@b/c:d@e"
    assert Workspace("gs://anonymous@bucket/a").root == "bucket/a"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is an empty text, perhaps of a variable that is not set"),
        (" ", "is an empty text"),
        ("s3:/bucket/x", "begins with s3: but not with s3://"),
        (Path("gs://bucket/x"), "begins with gs: but not with gs://"),
        ("s3://", "no bucket; expected s3://bucket/prefix"),
        ("s3://?region=eu-west-1", "no bucket; expected s3://bucket/prefix"),
        ("gs://", "no bucket; expected s3://bucket/prefix"),
        ("s3:///x?region=eu-west-1", "cannot be opened"),
        ("s3://bucket//x?region=eu-west-1", "has an empty name between slashes"),
        ("s3://bucket/x//y?region=eu-west-1", "has an empty name between slashes"),
        ("~nosuchuser/x", "cannot be opened.*expected the path of a folder"),
        ("a\0b", "cannot be opened.*expected the path of a folder"),
        ("a" * 300, "cannot be opened.*expected the path of a folder"),
    ],
)
def test_a_text_that_names_no_folder_and_no_prefix_is_no_workspace(uri: str | Path, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workspace(uri)
