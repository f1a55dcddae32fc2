"""Progress in a log: a line now and then, and nothing where nobody asked."""

import pytest

from rayrec import display
from rayrec.display import LINES_VARIABLE, progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that progress reads, to be set."""
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


def test_nothing_is_told_where_nobody_asked(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LINES_VARIABLE, raising=False)
    with progress("Training", 2_000) as bar:
        clock[0] = 200
        bar.advance(100)
    assert capsys.readouterr().err == ""
