"""Run a plain worker over buckets: the unit of work, of retry and of resume of every job over all users."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from rayrec.errors import RayrecError

RETRIES = 3  # times that a unit is done again whose worker or node was lost
MAX_WAITING = 1_000  # units handed to Ray at once


class BucketWorker(Protocol):
    """A class whose constructor loads what it needs and whose call does one unit of work."""

    def __call__(self, unit: Any, /) -> Any:
        """Do one unit and return a small result; what is large goes to the workspace, atomically."""
        ...


# The worker that this process made last: tasks of one job come to the same processes again, and
# constructing a worker (loading a model, say) may take longer than a unit. Tasks and not actors,
# since a pool as large as the CPUs left hangs when a node is lost, and tasks are simply run again.
_made: dict[str, BucketWorker] = {}


@dataclass(frozen=True)
class _Failed:
    """An error of no kind of ours, as a worker met it."""

    trace: str


def _run_unit(make_worker: Callable[..., BucketWorker], stored: list[ray.ObjectRef], unit: Any) -> Any:
    key = stored[0].hex()
    try:
        if key not in _made:
            _made.clear()
            _made[key] = make_worker(**ray.get(stored[0]))
        return _made[key](unit)
    except RayrecError as error:
        return error  # as a value: of what is raised Ray keeps no more than the text
    except Exception:
        return _Failed(traceback.format_exc())


def run_buckets(
    make_worker: Callable[..., BucketWorker],
    units: Iterable[Any],
    *,
    arguments: dict[str, Any],
    num_gpus: float = 0,
    concurrency: int | None = None,
    called: str = "bucket",
) -> Iterator[Any]:
    """Yield the result of each unit as it is done, in any order. An error of ours comes out as it was raised.

    `arguments` go to the worker's constructor through the object store: arrays among them are shared
    by the workers of a node, not copied, and read-only. A unit whose worker dies is done again, at
    most `RETRIES` times. Raises `RayrecError` for those that are lost even so, once all others are
    done; `called` is what it calls a unit.
    """
    left = list(units)
    total = len(left)
    if not left:
        return
    # In a list, since Ray would resolve a bare reference for each task.
    stored = [ray.put(arguments)]
    task = ray.remote(_run_unit).options(
        num_cpus=1, num_gpus=num_gpus, max_retries=RETRIES, scheduling_strategy="SPREAD"
    )
    at_once = min(concurrency or MAX_WAITING, total)  # those without a free CPU wait: an autoscaler sees the demand
    running: dict[ray.ObjectRef, Any] = {}
    lost: list[Any] = []
    left.reverse()
    try:
        while left or running:
            while left and len(running) < at_once:
                unit = left.pop()
                running[task.remote(make_worker, stored, unit)] = unit
            (done, *_), _ = ray.wait(list(running))
            unit = running.pop(done)
            try:
                result = ray.get(done)
            except RayError:  # its worker or node was lost once more than it may be
                lost.append(unit)
                continue
            if isinstance(result, RayrecError):
                raise result
            if isinstance(result, _Failed):
                raise RuntimeError(f"{called} {unit} failed in its worker:\n{result.trace}")
            yield result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if lost:
        named = ", ".join(map(str, sorted(lost)[:10])) + (", ..." if len(lost) > 10 else "")
        raise RayrecError(
            f"{called} {named} of {total} failed: the worker was killed {RETRIES + 1} times, probably out of memory. "
            "The others are done and kept: run the same command again, with fewer workers at once or on nodes with "
            "more memory"
        )
