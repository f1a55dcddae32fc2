"""What commands print: tables of 80 columns for people, one JSON object for programs."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rayrec.errors import RayrecError

GAP = (0, 1, 0, 0)  # between columns, beside the box's own space


@dataclass(frozen=True)
class Shown:
    """The outcome of a command: `data` under --json, `views` one below the other otherwise."""

    data: dict[str, Any]
    views: list[RenderableType] = field(default_factory=list)
    exit_code: int = 0  # of the command line, where the work was done and its answer is no
    error: RayrecError | None = None  # why the work was not done, where there is something to show beside it


def error_data(error: BaseException, message: str | None = None, kind: str | None = None) -> dict[str, Any]:
    """An error as --json prints it: what kind, what came, and what to do."""
    text, _, hint = (str(error) if message is None else message).rpartition("; ")
    if not text:
        text, hint = hint, ""
    name = type(error).__name__.removesuffix("Error")
    kind = kind or re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {"error": {"kind": kind, "message": " ".join(text.split()), "hint": " ".join(hint.split())}}


def show(shown: Shown, *, as_json: bool) -> None:
    """Write the outcome to stdout."""
    if as_json:
        show_json(shown.data)
        return
    console = Console(highlight=False)
    for position, view in enumerate(shown.views):
        if position:
            console.print()
        console.print(Text(view) if isinstance(view, str) else view)


def show_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout, escaped where the terminal or file takes no UTF-8."""
    ascii_only = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8"
    sys.stdout.write(json.dumps(_finite(data), ensure_ascii=ascii_only, allow_nan=False) + "\n")


def print_error(message: str) -> None:
    """One line on stderr that begins with a capital letter, unless with a name."""
    first = message.partition(" ")[0]
    if first.isalpha() and first.islower() and first != "rayrec":
        message = first.capitalize() + message[len(first) :]
    print("rayrec:", " ".join(message.split()), file=sys.stderr)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not have: NaN and the infinite ones."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def note(text: str) -> None:
    """One line on stderr, for people who watch."""
    Console(stderr=True, highlight=False).print(escape(text))


def number(value: Any, digits: int = 3) -> str:
    """A value as people read it: 343,183 and 0.412; the integer part of a float gets its separators too."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else digits}f}"
    return "–" if value is None else str(value)


def size(num_bytes: int) -> str:
    """Bytes as people read them: 1.4 MB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def day(iso: str) -> str:
    """The date and minute of an ISO 8601 time."""
    return iso[:16].replace("T", " ")


def table(
    title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]], *, left: Sequence[str] = ()
) -> RenderableType:
    """A table whose columns are right-aligned, the first and those in `left` excepted.

    Where 80 columns are too few, the left ones are cut short; numbers never are.
    """
    shown_table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=GAP)
    cells = [[value if isinstance(value, str) else number(value) for value in row] for row in rows]
    for index, header in enumerate(headers):
        is_left = index == 0 or header in left
        # rich shrinks the columns that may wrap; it is the texts in them that forbid it
        shown_table.add_column(header, justify="left" if is_left else "right", no_wrap=not is_left)
    for row in cells:
        shown_table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    return _titled(title, shown_table)


def figures(title: str, values: dict[str, Any]) -> RenderableType:
    """Names and values, one a line; those that are no plain figures are left to a table of their own."""
    plain = {name: value for name, value in values.items() if isinstance(value, int | float | str)}
    shown_table = Table(box=None, show_header=False, pad_edge=False)
    shown_table.add_column(no_wrap=True)
    shown_table.add_column(justify="right", no_wrap=True)
    for name, value in plain.items():
        shown_table.add_row(Text("  " + name.replace("_", " ")), Text(number(value)))
    return _titled(title, shown_table)


def _titled(title: str, body: Table) -> RenderableType:
    """The title on a line of its own: rich would wrap it to the width of the table."""
    return Group(Text(title, style="bold"), body) if title else body
