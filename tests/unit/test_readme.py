"""The README speaks of commands and options that are there."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from rayrec_cli.main import app

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8").replace("\\\n", " ")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
LINES = sorted(set(re.findall(r"(?:\$ |`)(rayrec [^\n`]*)", TEXT)))


def options(words: list[str]) -> set[str]:
    """The options that a command knows, and those of the command that it submits."""
    command, words = typer.main.get_command(app), list(words)
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    submitted = [place for place, word in enumerate(words) if command.name == "submit" and word in COMMANDS]
    return known | (options(words[submitted[0] :]) if submitted else set())


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_readme_is_there_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= options(words)


def test_the_readme_shows_every_stage() -> None:
    shown = {line.split()[1] for line in LINES}
    assert shown >= {"generate", "import", "split", "embed", "train", "taste", "index", "release", "recommend", "run"}
    assert shown >= {"evaluate", "status", "bench"}
