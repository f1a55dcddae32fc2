"""What runs at several sizes and with several workers say: speed-ups, and what a further play costs.

A job has costs that do not grow with its plays: its start, loading a model. They weigh on a small run
and say nothing of a large one, so cost is told as that of a further play: the seconds that a
larger run took more, over the plays that it had more. Speed-ups are those of further plays too.
"""

from itertools import pairwise
from typing import Any

from rayrec.bench.rounds import Measured

EXTRAPOLATED_PLAYS = 1e9
MICROSECONDS = 1e6

Stages = dict[str, Measured]  # stage -> plays (or tokens) and seconds


def further(smaller: Measured, larger: Measured) -> float:
    """Seconds of a further play."""
    return (larger.seconds - smaller.seconds) / (larger.work - smaller.work)


def speedups(by_workers: dict[int, tuple[Stages, Stages]]) -> dict[str, dict[str, float | None]]:
    """Stage -> number of workers -> further plays a second, as a multiple of those of the fewest workers.

    From a smaller and a larger run with each number of workers. None where the larger took no longer: both were
    over as soon as they had started.
    """
    found: dict[str, dict[str, float | None]] = {}
    for stage in next(iter(by_workers.values()))[0]:
        costs = {
            number: further(smaller[stage], larger[stage]) for number, (smaller, larger) in sorted(by_workers.items())
        }
        alone = costs[min(costs)]
        found[stage] = {str(number): alone / cost if min(alone, cost) > 0 else None for number, cost in costs.items()}
    return found


def costs(by_size: list[Stages]) -> dict[str, dict[str, Any]]:
    """Stage -> plays and microseconds_per_play of each run, smallest first, microseconds_per_further_play between
    one and the next, and growth: by which share the last of these is above the one before (None with two sizes).
    """
    found = {}
    for stage in by_size[0]:
        runs = [run[stage] for run in by_size]
        each = [MICROSECONDS * further(smaller, larger) for smaller, larger in pairwise(runs)]
        found[stage] = {
            "plays": [run.work for run in runs],
            "microseconds_per_play": [MICROSECONDS / run.per_second for run in runs],
            "microseconds_per_further_play": each,
            "growth": each[-1] / each[-2] - 1 if len(each) > 1 else None,
        }
    return found


def extrapolated(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Hours of one CPU for a billion plays at the cost of the last further play; nobody has measured them."""
    hours = {
        stage: EXTRAPOLATED_PLAYS * cost["microseconds_per_further_play"][-1] / MICROSECONDS / 3600
        for stage, cost in found.items()
    }
    return {"extrapolated": True, "plays": EXTRAPOLATED_PLAYS, "cpu_hours": hours}
