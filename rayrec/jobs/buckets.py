"""Run a plain worker over buckets: the unit of work, of retry and of resume of every job over all users."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import ray
from ray.data import TaskPoolStrategy

from rayrec.errors import RayrecError
from rayrec.jobs.cluster import cluster_cpus


class BucketWorker(Protocol):
    """A class whose constructor loads what it needs and whose call does one unit of work."""

    def __call__(self, unit: Any, /) -> Any:
        """Do one unit and return a small result; what is large goes to the workspace, atomically."""
        ...


# The worker that this process made last: tasks of one job come to the same processes again, and
# constructing a worker (loading a model, say) may take longer than a unit. Tasks and not actors,
# since a pool as large as the CPUs left hangs when a node is lost, and tasks are simply run again.
_made: dict[str, BucketWorker] = {}


def _run_unit(
    batch: dict[str, np.ndarray], make_worker: Callable[..., BucketWorker], stored: list[ray.ObjectRef]
) -> dict[str, list[Any]]:
    key = stored[0].hex()
    try:
        if key not in _made:
            _made.clear()
            _made[key] = make_worker(**ray.get(stored[0]))
        return {"result": [_made[key](unit) for unit in batch["item"]]}
    except RayrecError as error:
        return {"result": [error]}  # as a value: what Ray Data raises holds no more of it than its text


def run_buckets(
    make_worker: Callable[..., BucketWorker],
    units: Iterable[Any],
    *,
    arguments: dict[str, Any],
    num_gpus: float = 0,
    concurrency: int | None = None,
) -> Iterator[Any]:
    """Yield the result of each unit as it is done, in any order. An error of ours comes out as it was raised.

    `arguments` go to the worker's constructor through the object store: arrays among them are shared
    by the workers of a node, not copied, and read-only.
    """
    units = list(units)
    if not units:
        return
    cpus = cluster_cpus()
    workers = min(concurrency or cpus, len(units))
    stored = ray.put(arguments)
    results = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _run_unit,
        fn_args=(make_worker, [stored]),  # in a list, since Ray Data would resolve a bare reference for each task
        batch_size=1,
        num_cpus=1,
        num_gpus=num_gpus,
        compute=TaskPoolStrategy(size=workers),
    )
    for row in results.iter_rows():
        if isinstance(row["result"], RayrecError):
            raise row["result"]
        yield row["result"]
