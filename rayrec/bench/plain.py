"""A process of its own for the plain loops, as nice as Ray's workers are.

Ray runs its workers at nice 15 unless told otherwise: a plain loop at nice 0 beside them would win
by its priority alone. A process of its own also keeps the two ways from warming each other's caches.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # what Ray's workers are given too


class PlainProcess:
    """Runs functions of importable modules, one at a time, in one process that stays up for the with block."""

    def __init__(self, nice: int) -> None:
        self._executor = ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=_level, initargs=(nice,)
        )

    def __enter__(self) -> "PlainProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work(*arguments)`; its errors come out here."""
        return self._executor.submit(work, *arguments).result()


def niceness() -> int:
    """How nice this process is."""
    return os.nice(0)


def _level(wanted: int) -> None:
    os.environ.update(ONE_THREAD)
    os.nice(max(0, wanted - niceness()))
