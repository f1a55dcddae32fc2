"""Texts for users use the terms of the field: no string that they can see contains a banned word."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("rayrec", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
# Files whose docstrings are shown in the OpenAPI document or in the help of the command line.
SHOWN_FILES = {ROOT / "rayrec" / name for name in ("serving/schemas.py", "serving/routes.py", "bench/bench_config.py")}
TEXT_FILES = [
    *sorted((ROOT / "rayrec").rglob("*.html")),
    *sorted((ROOT / "rayrec").rglob("*.j2")),
    *sorted(path for path in (ROOT / "examples").iterdir() if path.is_file()),
]
BANNED = (
    *("told", "tells?", "judged?", "judges", "wish", "asked", "anew", "whoever", "nobody", "somebody", "beforehand"),
    *("set aside", "the whole way", "as it happens", "of late", "say which", "says which", "do it again", "at hand"),
    *("on our side", "any more", "goes? on", "could not be done", "leave it out", "broke off"),
    *("dearest", "astray", "tally", "crew", "song vectors", "a memory", "knows? no", "strike", "the mix", "kept apart"),
    *("meets", "stands for", "where it holds", "take in", "is at fault", "hears of", "surely", "would have it"),
    "listeners?",  # users
    *("neighbours?", "favours?"),  # the spelling is American
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
PATTERN = re.compile(rf"\b({'|'.join(BANNED)})\b", re.IGNORECASE)


def literal(node: ast.AST) -> str:
    """Return the text of a string or an f-string, with `{}` for each expression; "" for other nodes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_command(node: ast.AST) -> bool:
    """Return True for a function whose docstring is the help of a command."""
    names = [call.func for call in getattr(node, "decorator_list", []) if isinstance(call, ast.Call)]
    return any(isinstance(name, ast.Name) and name.id == "command" for name in names)


def sentences(source: str, docstrings: bool = False) -> Iterator[tuple[int, str]]:
    """Yield line and text of each string of several words; unless `docstrings`, skip docstrings that are no help."""
    tree = ast.parse(source)
    hidden_ids: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and not docstrings and not is_command(node):
            for item in node.body:  # the docstring, and strings below fields
                if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant):
                    hidden_ids.add(id(item.value))
        if isinstance(node, ast.JoinedStr):
            hidden_ids |= {id(part) for part in node.values}
    for node in ast.walk(tree):
        text = literal(node)
        if " " in text.strip() and id(node) not in hidden_ids:
            yield node.lineno, text  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_for_users_holds_a_banned_word(path: Path) -> None:
    texts = sentences(path.read_text("utf-8"), docstrings=path in SHOWN_FILES)
    problems = [f"line {line}: {text!r}" for line, text in texts if PATTERN.search(text)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", TEXT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_templates_and_examples_hold_no_banned_word(path: Path) -> None:
    lines = enumerate(path.read_text("utf-8").splitlines(), 1)
    problems = [f"line {number}: {line}" for number, line in lines if PATTERN.search(line)]
    assert not problems, "\n".join(problems)


def test_the_words_are_found_in_errors_help_and_f_strings_and_in_docstrings_where_they_are_shown() -> None:
    source = '''
"""Told to readers of the code alone."""
def fail(name):
    """Judged by nobody."""
    raise ValueError(f"{name} was asked for")

@command(app, "go")
def go():
    """Do it again."""
    help = "Say which."
'''
    texts = {text for _, text in sentences(source) if PATTERN.search(text)}
    assert texts == {"Do it again.", "{} was asked for", "Say which."}
    texts_with_docstrings = {text for _, text in sentences(source, docstrings=True) if PATTERN.search(text)}
    assert texts_with_docstrings - texts == {"Told to readers of the code alone.", "Judged by nobody."}


# A name says what a variable holds or what a function does, not that something was told or found. See also `PATTERN`
# for texts.
VAGUE_NAMES = {
    *("told", "asked", "wish", "made", "found", "got", "begun", "began", "gone", "chosen", "said", "joined", "look"),
    *("beside", "mine", "theirs", "ours", "likeness", "chance", "chances", "tally", "crew", "whole", "worth"),
    *("here", "there", "which", "what", "who", "how", "some", "everything", "nothing", "anything", "once", "again"),
}


def vague_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each function, argument, assigned variable and attribute that is in VAGUE_NAMES."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                line = node.lineno
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                line = node.lineno
            case _:
                continue
        if name in VAGUE_NAMES:
            yield line, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_argument_variable_or_attribute_has_a_vague_name(path: Path) -> None:
    problems = [f"line {line}: {name}" for line, name in vague_names(path.read_text("utf-8"))]
    assert not problems, "\n".join(problems)


def test_vague_names_are_found_in_functions_arguments_loops_assignments_and_attributes() -> None:
    source = """
class Song:
    beside: int

    def look(self, told, *, once=False):
        found = self.again = 1
        for chosen, row in told:
            pass
        return found

first = lambda who: who
"""
    names = [
        (3, "beside"),
        (5, "look"),
        (5, "told"),
        (5, "once"),
        (6, "found"),
        (6, "again"),
        (7, "chosen"),
        (11, "who"),
    ]
    assert sorted(vague_names(source)) == sorted(names)
