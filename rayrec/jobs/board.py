"""Carries the progress of a worker, which has no terminal, to the driver's bar."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from rayrec.progress import progress


@ray.remote
class Board:
    """An actor that a worker writes to and the driver looks at."""

    def __init__(self) -> None:
        self._plays, self._note, self._judged = 0.0, "", ""

    def show(self, plays: float, note: str) -> None:
        """Plays done in the epoch under way, and a few words on it."""
        self._plays, self._note = plays, note

    def judge(self, text: str) -> None:
        """What the last validation said."""
        self._judged = text

    def look(self) -> tuple[float, str]:
        """Plays done, and what to show behind the bar."""
        return self._plays, f"{self._note} {self._judged}".strip()


@contextmanager
def shown(board: Any, title: str, total: float) -> Iterator[None]:
    """Draw the board as a bar on stderr while the block runs; `total` is what is shown as all of it."""
    stop = threading.Event()

    def draw() -> None:
        with progress(title, total) as bar:
            drawn = 0.0
            while not stop.wait(0.5):
                plays, note = ray.get(board.look.remote())
                bar.advance(plays - drawn, note)
                drawn = plays

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
