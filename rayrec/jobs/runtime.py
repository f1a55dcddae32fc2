"""How jobs run on Ray: a cluster for the length of a job, workers over buckets, one task with a whole node."""

import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol

# Before ray is imported: no usage report, and no spinning OpenMP threads, which cost a factor of
# 30 where another process wants the core.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch takes memory; WORKER_ENVIRONMENT says why

import ray
from ray.data import DataContext
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

from rayrec.errors import InputError, RayrecError, ray_not_started

CONNECT_SECONDS = 5.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and empty settings
HTTP2_SETTINGS = b"\x04"  # type of the frame with which every HTTP/2 server begins

RETRIES = 3  # times that a unit is done again whose worker or node was lost
MAX_WAITING = 1_000  # units handed to Ray at once
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A worker that runs for long gives freed memory back, not to one of many arenas. Single runs of the
    # taste job at 500,000 users peaked at 420 MiB with both, at 494 and 507 without.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    # Huge pages for large tensors. A training step frees hundreds of MB that the next one needs again: in small pages
    # the kernel took 12.9 of 34 CPU seconds of a training to hand them out, in huge ones 3.8 of 21.
    "THP_MEM_ALLOC_ENABLE": "1",
}


@contextmanager
def ray_cluster(address: str | None = None, **options: Any) -> Iterator[None]:
    """A with block on Ray: the running connection, else `address` or RAY_ADDRESS, else a private local cluster.

    Only what this block connected is shut down at its end. Ray's own logs and bars stay quiet.

    Raises `InputError` for an address where no Ray cluster answers, and `RayrecError` where Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)
    local = {} if address else {"include_dashboard": False, **options}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            # "local" and not None: plain init attaches to whatever died here last and hangs.
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
            **local,
        )
    except Exception as error:
        where = [f"the Ray cluster at {address} cannot be used"] if address else []
        raise ray_not_started(error, *where) from error
    quiet_data()
    try:
        yield
    finally:
        ray.shutdown()


def require_cluster(address: str, timeout: float = CONNECT_SECONDS) -> None:
    """Raise `InputError` unless something at `host:port` or `ray://host:port` speaks gRPC, as Ray's head does.

    Ray itself tries for a quarter of an hour. `auto` and `local` pass.
    """
    if address in ("auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    try:
        if "://" in host or not host:
            raise ValueError("expected host:port or ray://host:port")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout) as connection:
            connection.settimeout(timeout)
            connection.sendall(HTTP2_GREETING)
            answer = connection.recv(9)
        if answer[3:4] != HTTP2_SETTINGS:
            raise ValueError("another program answers there")
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS={address} points to no Ray cluster: {error}; start one with `ray start --head`, give its "
            "address, or unset RAY_ADDRESS to use this machine"
        ) from error


def require_one_node(advice: str) -> None:
    """Raise `InputError`, with advice, where the Ray that jobs will run on has several living nodes."""
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return  # it will be a private one on this machine
    with ray_cluster():
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if nodes > 1:
        raise InputError(f"Ray runs on {nodes} nodes, and the workspace is a temporary folder of one of them; {advice}")


def quiet_data() -> None:
    """Ray Data without its own progress bars and log lines; ours stand on stderr."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors come out as exceptions


def cluster_cpus() -> int:
    """CPUs of the whole cluster."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


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


@dataclass(frozen=True, kw_only=True)
class UnitTime:
    """What one unit of work took in its process."""

    worker: str  # name of its class, or of its function where that has a node to itself
    cpu_seconds: float
    setup_seconds: float = 0.0  # CPU time of the worker's constructor, where this unit was its first


_times: list[UnitTime] | None = None


@contextmanager
def unit_times() -> Iterator[list[UnitTime]]:
    """A list that holds the time of each unit that ends in this block, for benchmarks."""
    global _times
    times: list[UnitTime] = []
    _times = times
    try:
        yield times
    finally:
        _times = None


def _run_unit(make_worker: Callable[..., BucketWorker], stored: list[ray.ObjectRef], unit: Any) -> tuple[Any, UnitTime]:
    key, began = stored[0].hex(), time.process_time()
    ready = began
    try:
        if key not in _made:
            _made.clear()
            _made[key] = make_worker(**ray.get(stored[0]))
            ready = time.process_time()
        result = _made[key](unit)
    except RayrecError as error:
        result = error  # as a value: of what is raised Ray keeps no more than the text
    except Exception:
        result = _Failed(traceback.format_exc())
    seconds = time.process_time() - ready
    name = getattr(make_worker, "__name__", type(make_worker).__name__)
    return result, UnitTime(worker=name, cpu_seconds=seconds, setup_seconds=ready - began)


def run_buckets(
    make_worker: Callable[..., BucketWorker],
    units: Iterable[Any],
    *,
    arguments: dict[str, Any],
    cpus: int = 1,
    num_gpus: float = 0,
    concurrency: int | None = None,
    memory: int = 0,
    called: str = "bucket",
) -> Iterator[Any]:
    """Yield the result of each unit as it is done, in any order. An error of ours comes out as it was raised.

    A unit takes `cpus` CPUs of its node and `memory` bytes, so a node works at no more units than its memory holds.
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
        num_cpus=cpus,
        num_gpus=num_gpus,
        memory=min(memory, node_memory()) or None,  # a unit that needs more than any node has runs alone on one
        max_retries=RETRIES,
        scheduling_strategy="SPREAD",
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
                result, spent = ray.get(done)
            except RayError:  # its worker or node was lost once more than it may be
                lost.append(unit)
                continue
            if isinstance(result, RayrecError):
                raise result
            if isinstance(result, _Failed):
                raise RuntimeError(f"{called} {unit} failed in its worker:\n{result.trace}")
            if _times is not None:
                _times.append(spent)
            yield result
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if lost:
        named = ", ".join(map(str, sorted(lost)[:10])) + (", ..." if len(lost) > 10 else "")
        raise RayrecError(
            f"{called} {named} of {total} failed: the worker was killed {RETRIES + 1} times, probably out of memory. "
            "Completed work is kept: run the command again with fewer workers or on nodes with more memory"
        )


def _timed(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """What `work` yields, then what it took."""

    @wraps(work)
    def run(*arguments: Any) -> Iterator[Any]:
        began = time.process_time()
        yield from work(*arguments)
        yield UnitTime(worker=work.__name__, cpu_seconds=time.process_time() - began)

    return run


def node_memory() -> int:
    """Bytes that Ray gives the tasks of the living node that has the most for them, at least 0."""
    return max([0, *(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])])


def node_cpus() -> int:
    """CPUs of the largest living node, at least 1."""
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])


def run_on_node(work: Callable[..., Iterator[Any]], *arguments: Any, cpus: int) -> Iterator[Any]:
    """Yield what `work(*arguments)` yields, as it comes, from a task that holds `cpus` CPUs of one node.

    An error of ours comes out as it was raised there, without Ray's wrapping. Raises `RayrecError`
    where its worker dies `RETRIES` times more than once.
    """
    task = ray.remote(_timed(work)).options(num_cpus=cpus, num_returns="streaming", max_retries=RETRIES)
    try:
        for reference in task.remote(*arguments):
            item = ray.get(reference)
            if not isinstance(item, UnitTime):
                yield item
            elif _times is not None:
                _times.append(item)
    except RayTaskError as error:
        if isinstance(error.cause, RayrecError):
            raise error.cause from error
        raise
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise RayrecError(
            f"{work.__name__} failed: its worker was killed {RETRIES + 1} times, probably out of memory. "
            "Run the command again on a node with more memory"
        ) from error
