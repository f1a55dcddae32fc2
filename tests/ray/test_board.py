"""The board: an actor that passes the progress of training workers to the driver's progress bar."""

import threading
import time
from collections.abc import Callable

import pytest
import ray

from rayrec.jobs.trainer import new_board, shown

pytestmark = pytest.mark.usefixtures("cluster")


def test_the_bar_moves_with_what_workers_write_and_shows_the_last_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    advances: list[tuple[float, str | None]] = []
    monkeypatch.setattr("rayrec.display.Progress.advance", lambda bar, amount, note: advances.append((amount, note)))
    board = new_board()
    board.show_validation.remote("recall@20 0.3")
    board.show.remote(40.0, "epoch 2")
    with shown(board, 100.0):
        _wait_for(lambda: bool(advances))
    assert advances[0] == (40.0, "epoch 2 recall@20 0.3")
    assert sum(amount for amount, _ in advances) == 40.0


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_board_that_is_lost_ends_the_bar_and_not_the_job() -> None:
    board = new_board()
    ray.kill(board)
    with shown(board, 100.0):
        assert _is_drawing()
        _wait_for(lambda: not _is_drawing())
        assert not _is_drawing()


def _is_drawing() -> bool:
    return any(thread.name.endswith("(draw)") for thread in threading.enumerate())


def _wait_for(ready: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.1)
