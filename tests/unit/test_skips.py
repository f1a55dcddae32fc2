"""The reason of every skip says what is missing and how to enable the test."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parents[1]
SKIP_FUNCTIONS = {"skip", "skipif", "importorskip"}


def reasons(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and reason of every skip in a file; the reason is empty if the skip has none."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SKIP_FUNCTIONS:
            reason_keywords = [item.value for item in node.keywords if item.arg == "reason"]
            reason_nodes = reason_keywords or (node.args[:1] if node.func.attr == "skip" else [])
            yield node.lineno, ast.unparse(reason_nodes[0]) if reason_nodes else ""


def test_every_skip_says_what_is_missing_and_how_to_enable_it() -> None:
    reason_of_skip = {
        f"{path.relative_to(TESTS)}:{line}": reason
        for path in sorted(TESTS.rglob("*.py"))
        for line, reason in reasons(path)
    }
    assert len(reason_of_skip) > 10
    unclear = {
        location: reason for location, reason in reason_of_skip.items() if not reason.lstrip("f\"'").startswith("no ")
    }
    assert not unclear, "write `no WHAT IS MISSING: HOW TO ENABLE IT`"
    assert not {location: reason for location, reason in reason_of_skip.items() if ": " not in reason}
