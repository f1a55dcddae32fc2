"""Tables in HTML for `_repr_html_`: what a notebook shows of an object."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def html_figures(title: str, values: Mapping[str, Any]) -> str:
    """Names and values, one a row, below a title."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td>{escape(_cell(value))}</td></tr>"
        for name, value in values.items()
    )
    return f"<b>{escape(title)}</b><table>{rows}</table>"


def html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table below a title; the first column is aligned to the left."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td style='text-align:{'right' if place else 'left'}'>{escape(_cell(cell))}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<b>{escape(title)}</b><table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)
