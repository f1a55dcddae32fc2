"""Run a plain worker over buckets: the unit of work, of retry and of resume of every job over all users."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import ray
from ray.data import ActorPoolStrategy

from rayrec.jobs.cluster import cluster_cpus


class BucketWorker(Protocol):
    """A class whose constructor loads what it needs and whose call does one unit of work."""

    def __call__(self, unit: Any, /) -> Any:
        """Do one unit and return a small result; what is large goes to the workspace, atomically."""
        ...


class _Adapter:
    """Hands Ray Data's one-row batches to a worker."""

    def __init__(self, make_worker: Callable[..., BucketWorker], arguments: dict[str, Any]) -> None:
        loaded = {
            name: ray.get(value) if isinstance(value, ray.ObjectRef) else value for name, value in arguments.items()
        }
        self.worker = make_worker(**loaded)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        return {"result": [self.worker(unit) for unit in batch["item"]]}


def run_buckets(
    make_worker: Callable[..., BucketWorker],
    units: Iterable[Any],
    *,
    arguments: dict[str, Any],
    num_gpus: float = 0,
    concurrency: int | None = None,
) -> Iterator[Any]:
    """Yield the result of each unit as it is done, in any order.

    `arguments` go to the worker's constructor; object references among them are resolved in the
    worker, so large arrays are shared and not copied. One CPU is left to Ray Data where there are
    more than two, so that a lost node does not strand the pool.
    """
    units = list(units)
    if not units:
        return
    cpus = cluster_cpus()
    workers = min(concurrency or max(1, cpus - 1 if cpus > 2 else cpus), len(units))
    results = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(
        _Adapter,
        fn_constructor_args=(make_worker, arguments),
        batch_size=1,
        num_cpus=1,
        num_gpus=num_gpus,
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
    )
    for row in results.iter_rows():
        yield row["result"]
