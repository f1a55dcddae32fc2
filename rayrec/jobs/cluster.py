"""Connect to a Ray cluster, or start a quiet one on this machine for the length of a job."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before ray is imported: no usage report, and no spinning OpenMP threads, which cost a factor of
# 30 where another process wants the core.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import ray
from ray.data import DataContext

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A worker that runs for long gives freed memory back, not to one of many arenas. Single runs of the
    # taste job at 500,000 users peaked at 420 MiB with both, at 494 and 507 without.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
}


@contextmanager
def ray_cluster(address: str | None = None, **options: Any) -> Iterator[None]:
    """A with block on Ray: the running connection, else `address` or RAY_ADDRESS, else a private local cluster.

    Only what this block connected is shut down at its end. Ray's own logs and bars stay quiet.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    local = {} if address else {"include_dashboard": False, **options}
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        # "local" and not None: plain init attaches to whatever died here last and hangs.
        address=address or "local",
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": WORKER_ENVIRONMENT},
        **local,
    )
    quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def quiet_data() -> None:
    """Ray Data without its own progress bars and log lines; ours stand on stderr."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come out as exceptions


def cluster_cpus() -> int:
    """CPUs of the whole cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))
