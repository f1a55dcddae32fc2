"""Progress bars on stderr for work of over two seconds, and HTML tables for notebooks.

If stderr is not a terminal, no bar is drawn. With RAYREC_PROGRESS_LINES=1 a line is printed instead, at most every
ten seconds, for the log of a job.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

DELAY_SECONDS = 2.0
LINES_VARIABLE = "RAYREC_PROGRESS_LINES"
LINE_SECONDS = 10.0  # between two lines of one progress bar


class Progress:
    """The progress bar of one task. `advance` is cheap enough to call for every batch."""

    def __init__(self, title: str, total: float | None) -> None:
        self._title, self._total = title, total
        self._completed = 0.0
        self._note = ""
        self._started = self._last_line_at = time.monotonic()
        self._lines = os.environ.get(LINES_VARIABLE) == "1" and not sys.stderr.isatty()
        self._bars: Bars | None = None

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Add `amount` to the completed work; `note` is shown after the bar and stays until the next note."""
        self._completed += amount
        self._note = self._note if note is None else note
        if self._lines:
            self._print_line_if_due()
            return
        if self._bars is None and sys.stderr.isatty() and time.monotonic() - self._started > DELAY_SECONDS:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.add_task(self._title, total=self._total, note="")
            self._bars.start()
        if self._bars is not None:
            self._bars.update(self._bars.task_ids[0], completed=self._completed, note=self._note)

    def _print_line_if_due(self) -> None:
        now = time.monotonic()
        if now - self._last_line_at < LINE_SECONDS:
            return
        self._last_line_at = now
        total_text = (
            "" if self._total is None else f" of {self._total:,.0f} ({self._completed / max(self._total, 1):.0%})"
        )
        line = f"{self._title}: {self._completed:,.0f}{total_text}, {now - self._started:,.0f} s {self._note}"
        print(line.rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bars is not None:
            self._bars.stop()


@contextmanager
def progress(title: str, total: float | None = None) -> Iterator[Progress]:
    """Show a progress bar during a with block; `total` is the amount of work, None if unknown."""
    bar = Progress(title, total)
    try:
        yield bar
    finally:
        bar.close()


TABLE = """\
<b>{{ title }}</b><table>
{% if headers %}<tr>{% for header in headers %}<th>{{ header }}</th>{% endfor %}</tr>{% endif %}
{% for row in rows %}
<tr>{% for cell in row %}<td style="text-align:{{ 'left' if loop.first else 'right' }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
"""


def html_values_table(title: str, values: Mapping[str, Any]) -> str:
    """Return an HTML table of names and values, one per row, below a title."""
    return html_table(title, (), list(values.items()))


def html_table(title: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table below a title; the first column is aligned to the left, the others to the right."""
    from jinja2 import Environment  # imported here, since only notebooks need it

    template = Environment(autoescape=True, trim_blocks=True).from_string(TABLE)
    cells = [[_cell(value) for value in row] for row in rows]
    return template.render(title=title, headers=headers, rows=cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)
