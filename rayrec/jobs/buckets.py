"""Run a plain worker over buckets: the unit of work, of retry and of resume of every job over all users."""

import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import ray
from ray.data import TaskPoolStrategy
from ray.util.annotations import RayDeprecationWarning

from rayrec.errors import RayrecError
from rayrec.jobs.cluster import cluster_cpus

RETRIES = 3  # times that a unit is done again whose worker or node was lost


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


def _run_unit(
    batch: dict[str, np.ndarray], make_worker: Callable[..., BucketWorker], stored: list[ray.ObjectRef]
) -> dict[str, list[Any]]:
    key = stored[0].hex()
    (unit,) = batch["item"].tolist()
    try:
        if key not in _made:
            _made.clear()
            _made[key] = make_worker(**ray.get(stored[0]))
        return {"unit": [unit], "result": [_made[key](unit)]}
    except RayrecError as error:
        return {"unit": [unit], "result": [error]}  # as a value: what Ray Data raises holds no more of it than its text
    except Exception:
        return {"unit": [unit], "result": [_Failed(traceback.format_exc())]}


def run_buckets(
    make_worker: Callable[..., BucketWorker],
    units: Iterable[int],
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
    units = list(units)
    if not units:
        return
    lost = set(units)
    workers = min(concurrency or cluster_cpus(), len(units))
    stored = ray.put(arguments)
    source = ray.data.from_items(units, override_num_blocks=len(units))
    source.context.max_errored_blocks = -1  # the others go on
    source.context.execution_no_progress_timeout_s = -1  # a large bucket may take longer than Ray Data's half hour
    with warnings.catch_warnings():
        # Ray 2.60 announces the end of options like max_retries and has no other word for it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        results = source.map_batches(
            _run_unit,
            fn_args=(make_worker, [stored]),  # in a list, since Ray Data would resolve a bare reference for each task
            batch_size=1,
            num_cpus=1,
            num_gpus=num_gpus,
            max_retries=RETRIES,  # Ray Data's own number has no end
            compute=TaskPoolStrategy(size=workers),
        )
    for row in results.iter_rows():
        if isinstance(row["result"], RayrecError):
            raise row["result"]
        if isinstance(row["result"], _Failed):
            raise RuntimeError(f"{called} {row['unit']} failed in its worker:\n{row['result'].trace}")
        lost.discard(row["unit"])
        yield row["result"]
    if lost:
        named = ", ".join(map(str, sorted(lost)[:10])) + (", ..." if len(lost) > 10 else "")
        raise RayrecError(
            f"{called} {named} of {len(units)} failed: the worker was killed {RETRIES + 1} times, probably out of "
            "memory. Completed work is kept: run the command again with fewer workers or on nodes with more memory"
        )
