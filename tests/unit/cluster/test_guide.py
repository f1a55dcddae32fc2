"""All files, commands and options that the guide in cluster/README.md names exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
from cluster_files import CLUSTER, ROOT

from rayrec_cli.main import app

TEXT = (CLUSTER / "README.md").read_text(encoding="utf-8")
LINES = [line.split("  #")[0] for line in TEXT.replace("\\\n", " ").splitlines() if line.startswith("rayrec ")]
FILE_NAMES = sorted(set(re.findall(r"`((?:kuberay/)?[A-Za-z-]+\.yaml|Dockerfile)`", TEXT)))


def options(words: list[str]) -> tuple[set[str], list[str]]:
    """Return the options of the command that `words` begin with, and the words after its name."""
    command = typer.main.get_command(app)
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}, words


@pytest.mark.parametrize("line", LINES)
def test_every_command_is_there_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "submit":
        words = words[1:]
    known_options, arguments = options(words)
    assert {word for word in arguments if re.match(r"--?[a-z]", word)} <= known_options


@pytest.mark.parametrize("number", [0, 1])
def test_the_registry_and_the_bucket_of_each_cloud_replace_all_placeholders(tmp_path: Path, number: int) -> None:
    values = re.findall(r"^REGISTRY=\S+ BUCKET=(\S+)$", TEXT, re.MULTILINE)
    assert values == ["s3://your-bucket", "gs://your-bucket"]
    assignment = re.findall(r"^REGISTRY=.*$", TEXT, re.MULTILINE)[number]
    (replacement,) = re.findall(r"^sed .*$", TEXT, re.MULTILINE)
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    subprocess.run(["/bin/sh", "-c", f"{assignment}\n{replacement}"], cwd=tmp_path, check=True)
    texts = {path.name: path.read_text("utf-8") for path in (tmp_path / "cluster").rglob("*.yaml")}
    for text in texts.values():
        assert not re.findall(r"registry\.example\.com|REPLACE-with-your-bucket", text)
        assert set(re.findall(r"\b\w+://your-bucket\b", text)) <= {values[number]}
    assert f"workspace: {values[number]}/rayrec" in texts["serve.yaml"]


def test_the_guide_goes_through_every_stage_and_fills_the_store() -> None:
    submitted = {line.split()[2] for line in LINES if line.startswith("rayrec submit")}
    assert submitted == {
        *("import", "split", "embed", "train", "retrieval", "rank", "taste", "index", "evaluate", "release"),
        *("fit", "states"),
    }


def test_the_guide_names_every_file_and_every_named_file_exists() -> None:
    for name in FILE_NAMES:
        assert (CLUSTER / name).exists(), name
    yaml_files = {path.relative_to(CLUSTER).as_posix() for path in CLUSTER.rglob("*.yaml")}
    assert yaml_files <= set(FILE_NAMES)
    for link in re.findall(r"\]\(\.\./([^)]+)\)", TEXT):
        assert (ROOT / link).exists()
