"""Carries the progress of a worker, which has no terminal, to the driver's bar."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayrec.progress import Progress, progress


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


class LocalBoard:
    """What a training in this process writes to: it draws at once on a bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._drawn, self._judged = bar, 0.0, ""

    def show(self, plays: float, note: str) -> None:
        """As in `Board`."""
        self._bar.advance(plays - self._drawn, f"{note} {self._judged}".strip())
        self._drawn = plays

    def judge(self, text: str) -> None:
        """As in `Board`."""
        self._judged = text


def new_board() -> Any:
    """A board on the driver's node: another node may be lost while the job goes on."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return Board.options(num_cpus=0, scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextmanager
def shown(board: Any, title: str, total: float) -> Iterator[None]:
    """Draw the board as a bar on stderr while the block runs; `total` is what is shown as all of it."""
    stop = threading.Event()

    def draw() -> None:
        with progress(title, total) as bar:
            drawn = 0.0
            while not stop.wait(0.5):
                try:
                    plays, note = ray.get(board.look.remote())
                except RayActorError:
                    return  # a bar is no reason to fail
                bar.advance(plays - drawn, note)
                drawn = plays

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)
