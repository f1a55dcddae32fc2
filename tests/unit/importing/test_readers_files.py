"""Finding the files of an import."""

import bz2
import gzip
from pathlib import Path

import pytest

from rayrec.errors import DamagedInputError, InputError
from rayrec.importing.readers.reader import find_files, open_plain, require_text


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
    assert file_names([tmp_path], ["*.csv"], tmp_path) == ["a.CSV", "b.csv", "deep/c.csv.gz", "deep/e.csv.bz2"]


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
