"""Run one plain generator as one Ray task that has the CPUs of a whole node to itself."""

from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from rayrec.errors import RayrecError
from rayrec.jobs.buckets import RETRIES


def node_cpus() -> int:
    """CPUs of the largest living node, at least 1."""
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])


def run_on_node(work: Callable[..., Iterator[Any]], *arguments: Any, cpus: int) -> Iterator[Any]:
    """Yield what `work(*arguments)` yields, as it comes, from a task that holds `cpus` CPUs of one node.

    An error of ours comes out as it was raised there, without Ray's wrapping. Raises `RayrecError`
    where its worker dies `RETRIES` times more than once.
    """
    task = ray.remote(work).options(num_cpus=cpus, num_returns="streaming", max_retries=RETRIES)
    try:
        for reference in task.remote(*arguments):
            yield ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayrecError):
            raise error.cause from error
        raise
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise RayrecError(
            f"{work.__name__} failed: its worker was killed {RETRIES + 1} times, probably out of memory. "
            "Run the command again on a node with more memory"
        ) from error
