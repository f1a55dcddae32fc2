"""Finding the files of an import."""

import bz2
import gzip
from pathlib import Path

import pyarrow.fs as pafs
import pytest
from s3 import s3_server

from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers.accounts import account_of
from rayrec.importing.readers.reader import file_name, find_files, open_plain, require_text


def touch(folder: Path, *file_names: str) -> None:
    for name in file_names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def test_packed_files_are_unpacked_and_one_that_is_cut_or_misnamed_is_named(tmp_path: Path) -> None:
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress)):
        path = tmp_path / f"p.csv{suffix}"
        packed = pack(b"user,song\n" * 1_000)
        path.write_bytes(packed)
        with open_plain(str(path)) as stream:
            assert stream.read() == b"user,song\n" * 1_000
        for content in (packed[:-3], b"user,song\n", packed[:20] + b"x" + packed[21:]):
            path.write_bytes(content)
            with (
                pytest.raises(DamagedInputError, match=r"p\.csv\..* is not a valid (gzip|bzip2) file"),
                open_plain(str(path)) as stream,
            ):
                stream.read()
        plain = tmp_path / "p.csv"
        plain.write_bytes(packed)
        with pytest.raises(DamagedInputError, match=f"give it a name that ends in {suffix}"):
            require_text(str(plain))


def file_names(paths: list[Path], patterns: list[str], root: Path) -> list[str]:
    return [str(Path(file.source).relative_to(root)) for file in find_files([str(path) for path in paths], patterns)]


def test_a_folder_gives_its_matching_files_and_those_of_its_subfolders_by_name(tmp_path: Path) -> None:
    touch(tmp_path, "b.csv", "a.CSV", "deep/c.csv.gz", "deep/e.csv.bz2", "d.txt", ".hidden.csv", "_done.csv")
    touch(tmp_path, "_delta_log/0.csv", "deep/_temporary/0/part.csv", ".ipynb_checkpoints/b.csv")
    assert file_names([tmp_path], ["*.csv"], tmp_path) == ["a.CSV", "b.csv", "deep/c.csv.gz", "deep/e.csv.bz2"]
    assert file_names([tmp_path / "_delta_log"], ["*.csv"], tmp_path) == ["_delta_log/0.csv"]


def test_a_named_file_is_taken_whatever_its_name_and_once(tmp_path: Path) -> None:
    touch(tmp_path, "plays.txt", "z.csv")
    result = file_names([tmp_path / "plays.txt", tmp_path / "z.csv", tmp_path], ["*.csv"], tmp_path)
    assert result == ["plays.txt", "z.csv"]


def test_a_missing_path_and_an_empty_folder_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file or folder .* does not exist"):
        find_files([str(tmp_path / "nothing")], ["*.csv"])
    with pytest.raises(InputError, match=r"contains no file named \*\.csv"):
        find_files([str(tmp_path)], ["*.csv"])


def test_local_sources_are_absolute_for_workers_in_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "plays.csv")
    monkeypatch.chdir(tmp_path)
    assert find_files(["plays.csv"], ["*.csv"])[0].source == str(tmp_path / "plays.csv")


def test_a_uri_that_cannot_be_opened_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot be opened"):
        find_files(["nosuch://bucket/key"], ["*.csv"])


def test_object_storage_files_of_any_name_are_found_and_read_and_uris_keep_their_options() -> None:
    names = ["My Folder/\u00e4 b%20.csv", "My Folder/[1] a?b#c.csv.gz", "My Folder/plain.csv"]
    with s3_server() as server:
        filesystem, root = pafs.FileSystem.from_uri(server.uri("plays"))
        for name in names:
            with filesystem.open_output_stream(f"{root}/{name}", compression=None) as stream:
                content = name.encode()
                stream.write(gzip.compress(content) if name.endswith(".gz") else content)
        # As in a URI, and as the consoles of storage services write it.
        for uri in (server.uri("plays"), server.uri("plays/My%20Folder"), server.uri("plays/My Folder")):
            files = find_files([uri], ["*.csv"])
            contents = []
            for file in files:
                with open_plain(file.source) as stream:
                    contents.append(stream.read().decode())
            assert sorted(contents) == sorted(names)
            assert [file_name(file.source) for file in files] == [Path(name).name for name in contents]
            assert find_files([file.source for file in files], ["*.csv"]) == files


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/ann/Spotify Extended Streaming History/endsong.json",
        "s3://bucket/ann/Spotify%20Extended%20Streaming%20History/endsong.json?endpoint_override=127.0.0.1:1&scheme=http",
        "/data/ann/Spotify Extended Streaming History/endsong.json",
    ],
)
def test_the_account_of_an_export_is_its_folder_on_object_storage_too(source: str) -> None:
    assert account_of(source) == "ann"
    assert account_of(source.replace("ann", "J\u00f6rg%3F")) == ("J\u00f6rg?" if "://" in source else "J\u00f6rg%3F")
