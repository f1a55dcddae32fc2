"""The TOML file of a run: its sections, its paths, and what is refused before any work begins."""

from pathlib import Path

import pytest

from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError
from rayrec.jobs.pipeline import read_configs


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_every_stage_after_the_data_runs_with_its_defaults() -> None:
    configs = read_configs({})
    assert list(configs) == ["embed", "train", "retrieval", "rank", "taste", "index", "evaluate", "release"]
    assert configs["embed"] == EmbedConfig()


def test_the_stages_run_in_the_order_of_the_data_not_of_the_file() -> None:
    sections = {"release": {}, "train": {"epochs": 1}, "split": {"test_days": 3}, "generate": {"users": 9}}
    configs = read_configs(sections)
    assert list(configs) == [
        *("generate", "split", "embed", "train", "retrieval", "rank"),
        *("taste", "index", "evaluate", "release"),
    ]
    assert (configs["train"].epochs, configs["split"].test_days, configs["generate"].users) == (1, 3.0, 9)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    text = """
        [import]
        format = "csv"
        paths = ["plays.csv", "/data/more.csv", "s3://bucket/plays.csv"]
        columns = {user = "user_id", song = "song_id", played_at = "ts"}
        [embed]
        vectors = "vectors.npy"
    """
    configs = read_configs(write(tmp_path, text))
    assert configs["import"].paths == (str(tmp_path / "plays.csv"), "/data/more.csv", "s3://bucket/plays.csv")
    assert configs["import"].columns["user"] == "user_id"
    assert configs["embed"].vectors == str(tmp_path / "vectors.npy")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tain]\nepochs = 1", "unknown section 'tain'; expected one of import, generate"),
        ("epochs = 1", "unknown section 'epochs'"),
        ("train = 3", r"train = 3; expected a section \[train\]"),
        ("[train]\nepoch = 1", r"run.toml \[train\]: unknown setting 'epoch'"),
        ("[train]\nepochs = 'many'", r"\[train\]: epochs is 'many'; expected an integer of at least 1"),
        ("[train]\nepochs = 0", "epochs is 0"),
        ("[import]\nformat = 'csv'", r"\[import\].*paths"),
        ("[import]\nformat='csv'\npaths=['a']\n[generate]", r"both \[import\] and \[generate\]"),
        ("[train", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_configs(write(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_configs(tmp_path / "none.toml")
