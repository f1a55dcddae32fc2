"""Two ways of doing the same work, timed in alternating rounds; what counts is the ratio within a round.

Machines share their cores and change their pace. Within a round both ways meet about the same
machine, and every other round starts with the other way, so that a drift favours neither.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

from rayrec.bench.private_memory import MemoryWatch
from rayrec.progress import progress


@dataclass(frozen=True)
class Measured:
    """Work done, in the benchmark's unit, and the seconds that it took."""

    work: float
    seconds: float

    @property
    def per_second(self) -> float:
        """Work a second."""
        return self.work / max(self.seconds, 1e-9)


Way = Callable[[], Measured]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a benchmark found: our way against the plain loop."""

    name: str
    unit: str  # of work: plays, users, queries, tokens
    ratio: float  # ours / plain work a second, median over the rounds
    ratio_low: float  # the lowest of any round
    ratio_high: float
    per_second: float  # ours, median over the rounds
    plain_per_second: float
    peak_mb: float  # private memory (USS) of all our processes together at its highest, MiB
    rounds: int
    extra: dict[str, Any] = field(default_factory=dict)  # further figures of this benchmark

    def to_json(self) -> dict[str, Any]:
        """One flat object; the further figures stand beside the common ones."""
        common = asdict(self)
        extra = common.pop("extra")
        return {**common, **extra}


def compare(
    name: str, unit: str, ours: Way, plain: Way, *, rounds: int, peak_mb: float = 0.0, **extra: Any
) -> BenchResult:
    """Run both ways `rounds` times, ours first in even rounds and the plain loop first in odd ones."""
    pairs = []
    for number in range(rounds):
        if number % 2 == 0:
            mine, theirs = ours(), plain()
        else:
            theirs, mine = plain(), ours()
        pairs.append((mine, theirs))
    ratios = [mine.per_second / max(theirs.per_second, 1e-9) for mine, theirs in pairs]
    return BenchResult(
        name=name,
        unit=unit,
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        per_second=median(mine.per_second for mine, _ in pairs),
        plain_per_second=median(theirs.per_second for _, theirs in pairs),
        peak_mb=peak_mb,
        rounds=rounds,
        extra=extra,
    )


def measure(name: str, unit: str, ours: Way, plain: Way, *, rounds: int, **extra: Any) -> BenchResult:
    """One round of ours for its memory, unmeasured otherwise, and then the rounds that count; with a bar."""
    with progress(f"bench {name}", 2 * rounds + 1) as bar:

        def shown(way: Way) -> Measured:
            bar.advance()
            return way()

        with MemoryWatch() as watch:
            shown(ours)
        ways = partial(shown, ours), partial(shown, plain)
        return compare(name, unit, *ways, rounds=rounds, peak_mb=watch.total_mb, **extra)


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
