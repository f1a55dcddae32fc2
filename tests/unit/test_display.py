"""Progress in a log: a line every ten seconds if enabled, otherwise nothing; tables in a notebook."""

import re

import pytest

from rayrec import display
from rayrec.display import LINES_VARIABLE, html_table, html_values_table, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list with the time that progress reads; a test sets it."""
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_every_ten_seconds(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(LINES_VARIABLE, "1")
    with progress("Training", 2_000) as bar:
        for moment in (103, 109, 111, 115, 122):
            clock[0] = moment
            bar.advance(100, note="recall@20 0.4")
    assert capsys.readouterr().err.splitlines() == [
        "Training: 300 of 2,000 (15%), 11 s recall@20 0.4",
        "Training: 500 of 2,000 (25%), 22 s recall@20 0.4",
    ]


def test_nothing_is_printed_without_the_variable(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LINES_VARIABLE, raising=False)
    with progress("Training", 2_000) as bar:
        clock[0] = 200
        bar.advance(100)
    assert capsys.readouterr().err == ""


def test_a_table_for_a_notebook_escapes_its_texts() -> None:
    html = html_table("Songs & more", ["song", "plays"], [["<b>", 2400], ["b", None], ["c", 0.25]])
    rows = [re.sub(r"<[^>]*>", "|", row) for row in html.split("<tr>")]
    assert [row.replace("\n", "") for row in rows] == [
        "|Songs &amp; more||",
        "|song||plays||",
        "|&lt;b&gt;||2,400||",
        "|b||–||",
        "|c||0.250|||",
    ]


def test_values_are_a_table_without_a_header() -> None:
    html = html_values_table("Data", {"plays": 1_000_000})
    assert "<th" not in html
    assert '<td style="text-align:left">plays</td><td style="text-align:right">1,000,000</td>' in html
