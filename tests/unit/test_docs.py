"""Commands, options, links and names in README and docs exist; generated pages are up to date."""

import ast
import importlib
import re
import runpy
import shlex
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer

import rayrec
import rayrec.client
from rayrec.serving.run import REQUEST_SECONDS
from rayrec_cli.main import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GENERATED = ("cli.md", "python.md")
PAGES = sorted(
    [
        *(path for path in (ROOT / "docs").glob("*.md") if path.name not in GENERATED),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "cluster/README.md")),
    ]
)
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
PAGE_NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}


def command_lines(text: str) -> list[str]:
    """Return the rayrec commands in blocks and sentences of a page, without comments and surrounding shell code."""
    text = text.replace("\\\n", " ")
    commands = re.findall(r"(?:^|\$ |&& |`)(rayrec [^\n`&|]*)", text, flags=re.MULTILINE)
    return [line.split("  #")[0] for line in commands if re.match(r"rayrec (-|[a-z])", line) and "─" not in line]


LINES = sorted(
    {
        (PAGE_NAMES[page], line)
        for page in PAGES
        for line in command_lines(page.read_text("utf-8"))
        if not re.match(r"rayrec (is|needs|turns) ", line)
    }
)
LINKS = [
    (PAGE_NAMES[page], link)
    for page in PAGES
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    if "://" not in link
]
BLOCKS = [
    (PAGE_NAMES[page], block)
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
]


def options(words: list[str]) -> set[str]:
    """Return the options of the command in `words`; for `submit`, also those of the submitted command."""
    command, words = GROUP, list(words)
    option_names = {"--help"}
    while hasattr(command, "commands"):
        option_names |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        while words and words[0].startswith("-"):  # an option before the command, with its value
            words = words[1 if words[0] in ("--json", "--debug", "--version") else 2 :]
        if not words:
            return option_names
        command = command.commands[words.pop(0)]
    option_names |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    submitted_positions = [
        position for position, word in enumerate(words) if command.name == "submit" and word in COMMANDS
    ]
    return option_names | (options(words[submitted_positions[0] :]) if submitted_positions else set())


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_command_in_the_docs_exists_with_its_options(page: str, line: str) -> None:
    words = shlex.split(re.sub(r"\$\([^)]*\)", "OUTPUT", line))[1:]  # not the options of other programs
    assert {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)} <= options(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_with_options_begin_with_rayrec_so_that_their_options_are_tested(page: Path) -> None:
    spans = [span.split() for span in re.findall(r"`(\S[^`\n]*)`", page.read_text("utf-8"))]
    command_spans = [span for span in spans if span[0] in COMMANDS and span[:2] != ["serve", "deploy"]]  # Ray Serve's
    assert not [span for span in command_spans if any(word.startswith("--") for word in span)]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_every_link_leads_to_a_file_and_a_heading_of_the_project(page: str, link: str) -> None:
    path, _, anchor = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    assert target.exists()
    assert not anchor or anchor in anchors(target)


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_python_in_pages_imports_names_that_exist(page: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


BANNED_PATTERN = runpy.run_path(str(ROOT / "tests" / "unit" / "test_words.py"))["PATTERN"]


READ_PAGES = [*PAGES, *(ROOT / "docs" / name for name in GENERATED), ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize("page", READ_PAGES, ids=lambda page: page.name)
def test_pages_hold_no_banned_word(page: Path) -> None:
    lines = enumerate(page.read_text("utf-8").splitlines(), 1)
    assert not [f"line {number}: {line}" for number, line in lines if BANNED_PATTERN.search(line)]


def test_the_readme_shows_every_stage() -> None:
    names = {line.split()[1] for page, line in LINES if page == "README.md"}
    assert names >= {"generate", "import", "split", "embed", "train", "retrieval", "rank", "taste", "index", "evaluate"}
    assert names >= {"release", "states", "serve", "status", "bench"}


def test_the_readme_is_short() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 150
    text = re.sub(r"<!-- figures: .*?<!-- end -->", "", text, flags=re.DOTALL)  # tables that `make figures` writes
    assert not [line for line in text.splitlines() if len(line) > 130]


def test_the_readme_has_its_sections_in_order() -> None:
    headings = ["Install", "Try it", "Your own plays", "From Python", "Serve", "Every day", "Commands", "Results"]
    text = README.read_text("utf-8")
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [*headings, "How it works", "Limits", "More"]
    assert "](docs/page.png)" in text.partition("## Install")[0]


def test_the_picture_of_the_page_is_small() -> None:
    assert (ROOT / "docs" / "page.png").stat().st_size < 200_000


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_up_to_date(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    assert (ROOT / "docs" / name).read_text("utf-8") == pages[name], "run `make docs`"


def test_every_command_is_a_function_of_rayrec_or_listed_as_command_line_only() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    paths = {path.removeprefix("rayrec ") for path, _ in generator["commands"](GROUP, "rayrec")}
    excluded = {path for path in paths if path.split()[0] in generator["COMMAND_LINE_ONLY"]}
    assert paths - excluded == set(generator["COMMANDS"])
    assert {path.split()[0] for path in excluded} == set(generator["COMMAND_LINE_ONLY"])
    functions = [name for names in generator["COMMANDS"].values() for name in names]
    assert sorted(functions) == sorted(rayrec.STAGES)
    assert all(callable(getattr(rayrec, name)) for name in functions)


def test_the_systemd_unit_stops_only_the_server_itself_and_waits_for_its_requests() -> None:
    text = (ROOT / "docs" / "operations.md").read_text("utf-8")
    (unit,) = re.findall(r"^```\n(\[Service\]\n.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    settings = dict(line.split("=", 1) for line in unit.splitlines()[1:])
    assert settings["KillMode"] == "mixed"
    assert int(settings["TimeoutStopSec"]) > REQUEST_SECONDS


def test_examples_use_only_public_names_of_rayrec() -> None:
    for path in (ROOT / "examples").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("rayrec.")], path.name
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "rayrec":
                module = rayrec if node.module == "rayrec" else rayrec.client
                assert node.module in ("rayrec", "rayrec.client"), path.name
                assert all(hasattr(module, alias.name) for alias in node.names), path.name
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_"), path.name
                if isinstance(node.value, ast.Name) and node.value.id == "rayrec":
                    assert node.attr in rayrec.__all__, f"{path.name}: {node.attr}"


def test_a_table_of_figures_has_means_over_seeds_and_replaces_only_the_table_of_its_mark() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    runs = [
        [
            {"model": model, "target": target, "metric": metric, "k": k, "users": users, "value": value}
            for model, value in (("good", 0.4), ("bad", 0.5 + 0.02 * seed))
            for target in ("served", "next", "next_repeat")
            for metric in ("recall", "mrr")
            for k, users in ((20, "all"), (10, "all"), (20, "new"))
        ]
        for seed in (0, 1, 2)
    ]
    table = script["markdown_table"](runs, ["bad", "good"])
    assert table.splitlines()[2:] == [
        f"| bad | {' | '.join(['0.520 (0.500–0.540)'] * 5)} |",  # no column for offsets, which have no figures
        "| good | 0.400 | 0.400 | 0.400 | 0.400 | 0.400 |",
    ]
    page = "a\n<!-- figures: one -->\nold\n<!-- end -->\nb\n<!-- figures: two -->\nkept\n<!-- end -->\n"
    new_page = script["replaced"](page, "one", table)
    assert new_page == page.replace("old", table)
    with pytest.raises(ValueError, match="0 tables"):
        script["replaced"](page, "three", table)


def test_without_real_data_only_the_table_of_generated_plays_is_measured_and_the_others_name_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    page = tmp_path / "page.md"
    page.write_text("".join(f"{script['mark'](table.name)}\nold\n<!-- end -->\n" for table in script["TABLES"]))
    measured_names: list[str] = []

    def measure(table: Any, data_path: Path, seed: int) -> list[dict[str, Any]]:
        measured_names.append(table.name)
        row = {"target": "served", "metric": "recall", "k": 20, "users": "all", "value": 0.5}
        return [{"model": model, **row} for model in script["MODELS"]]

    script_globals = script["main"].__globals__
    monkeypatch.setitem(script_globals, "measure", measure)
    monkeypatch.setitem(script_globals, "PAGES", (page,))
    monkeypatch.delenv("RAYREC_REAL_DATA", raising=False)
    script["main"]()
    assert measured_names == ["demo"]
    names = [table.name for table in script["TABLES"] if table.name != "demo"]
    reasons = [f"{name}: RAYREC_REAL_DATA is not set; the table stays as it is" for name in names]
    assert len(names) == 4
    assert capsys.readouterr().err.splitlines() == reasons
    assert page.read_text().count("old") == 4
    assert "| two-step | 0.500 |" in page.read_text()
    monkeypatch.setenv("RAYREC_REAL_DATA", str(tmp_path))
    script["main"]()
    assert f"30music: there is no {tmp_path / '30music-sample10'}" in capsys.readouterr().err


def test_figures_of_changed_code_are_not_those_of_the_code_before(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    git = partial(subprocess.run, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-a", "-m"]
    for name in ("rayrec/model.py", "cli/main.py", "docs.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git(["git", "init", "-q"])
    git(["git", "add", "."])
    git([*commit, "first"])
    states = [script["code_state"](tmp_path)]
    for name, text in (
        ("rayrec/model.py", "2"),
        ("rayrec/model.py", "3"),
        ("cli/main.py", "2"),
        ("rayrec/new é.py", "1"),
        ("rayrec/new é.py", "2"),
    ):
        (tmp_path / name).write_text(text)
        states.append(script["code_state"](tmp_path))
    git(["git", "add", "."])
    git([*commit, "second"])
    states.append(script["code_state"](tmp_path))
    assert len(set(states)) == 7
    (tmp_path / "docs.md").write_text("2")
    git([*commit, "text only"])
    assert script["code_state"](tmp_path) == states[-1]


def test_marks_and_tables_of_figures_correspond_and_their_commands_have_known_options() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "figures.py"))
    marks = {page: re.findall(r"<!-- figures: (\S+) -->", page.read_text("utf-8")) for page in PAGES}
    assert {page for page, names in marks.items() if names} == set(script["PAGES"])
    assert {name for names in marks.values() for name in names} == {table.name for table in script["TABLES"]}
    for table in script["TABLES"]:
        for command in table.commands:
            words = shlex.split(command.format(data="plays.csv", folder="plays", seed=0))
            assert {word for word in words if word.startswith("--")} <= options(words)
