"""Runs jobs on Ray: a cluster for the duration of a job, workers over buckets, one task that has a node to itself."""

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

# These are set before ray is imported: no usage reports, and no spinning OpenMP threads, which are 30 times slower if
# another process needs the core.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # before torch allocates memory; reason: WORKER_ENVIRONMENT

import ray
from ray.data import DataContext
from ray.exceptions import (
    AuthenticationError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rayrec.errors import InputError, RayrecError, ray_not_started, token_rejected

LOGGER = logging.getLogger(__name__)
CONNECT_SECONDS = 5.0
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # and an empty settings frame
HTTP2_SETTINGS = b"\x04"  # type of the frame with which every HTTP/2 server begins

RETRIES = 3  # times that a unit is repeated if its worker or node is lost
KILLED = (WorkerCrashedError, OutOfMemoryError, NodeDiedError)  # errors of Ray for a lost worker or node
SHOWN_CHARACTERS = 300  # of the text of another error
MAX_WAITING = 1_000  # units submitted to Ray at once
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    # A long-running worker returns freed memory to the system instead of keeping it in arenas: docs/benchmarks.md.
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "MALLOC_ARENA_MAX": "2",
    # The kernel allocates the hundreds of MB that each training step frees faster as huge pages: docs/benchmarks.md.
    "THP_MEM_ALLOC_ENABLE": "1",
}

_is_private = False  # True while this process uses a local cluster that `ray_cluster` has started


@contextmanager
def ray_cluster(address: str | None = None, **options: Any) -> Iterator[None]:
    """Context manager that connects to Ray: to `address` or RAY_ADDRESS, else to a private local cluster.

    If the process is connected already, it uses that connection and leaves it open; otherwise it disconnects at the
    end. Ray's own logs and progress bars are turned off. `options` are passed to `ray.init` for a local cluster.

    Raises `InputError` if no Ray cluster answers at the address or if it rejects the token, and `RayrecError` if Ray
    does not start.
    """
    if ray.is_initialized():
        quiet_data()
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        require_cluster(address)
    local = {} if address else {"include_dashboard": False, **options}
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            # With None instead of "local", init attaches to the last cluster of this machine and hangs if it is dead.
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env={"env_vars": WORKER_ENVIRONMENT},
            **local,
        )
    except Exception as error:
        # Of a rejected token Ray raises a ConnectionError whose cause is a RuntimeError with the error in its text.
        if isinstance(error, AuthenticationError) or AuthenticationError.__name__ in str(error.__cause__):
            raise token_rejected(address or "local") from error
        details = [f"the Ray cluster at {address} cannot be used"] if address else []
        raise ray_not_started(error, *details) from error
    quiet_data()
    global _is_private
    _is_private = address in (None, "", "local")
    try:
        yield
    finally:
        _is_private = False
        ray.shutdown()


def require_cluster(address: str) -> None:
    """Raise `InputError` unless a server at `host:port` or `ray://host:port` speaks gRPC, as Ray's head node does.

    Ray itself would try for 15 minutes. `auto` and `local` are not checked, nor is any address
    if RAY_USE_TLS is 1.
    """
    if address in ("auto", "local") or os.environ.get("RAY_USE_TLS") == "1":
        return
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    try:
        if "://" in host or not host:
            raise ValueError("expected host:port or ray://host:port")
        with socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(CONNECT_SECONDS)
            connection.sendall(HTTP2_GREETING)
            response = connection.recv(9)
        if response[3:4] != HTTP2_SETTINGS:
            raise ValueError("another program answers there")
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS={address} points to no Ray cluster: {error}; start one with `ray start --head`, set "
            "RAY_ADDRESS to the address of a running one, or unset it to use this machine"
        ) from error


def require_one_node() -> None:
    """Raise `InputError` if the Ray cluster of the jobs has several living nodes: only one has a temporary folder."""
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        return  # the jobs start a private cluster on this machine
    with ray_cluster():
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    if nodes > 1:
        raise InputError(
            f"Ray runs on {nodes} nodes, but the workspace is a temporary folder on one of them; use "
            'Recommender(workspace="s3://bucket/prefix"), or a folder that all nodes share'
        )


def require_gpu() -> None:
    """Raise `InputError` if the private cluster of the jobs has no GPU; Ray itself would wait without an end.

    If the cluster at RAY_ADDRESS has none, only log a warning: it may start nodes with GPUs when a job needs them. Call
    it within `ray_cluster`.
    """
    if ray.cluster_resources().get("GPU", 0) >= 1:
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address in ("", "local"):
        raise InputError(
            "--gpu needs a GPU, and Ray finds none on this machine; omit --gpu, or set RAY_ADDRESS to the address of a "
            "Ray cluster with GPUs"
        )
    LOGGER.warning(
        "no node of the Ray cluster at %s has a GPU; the job waits until it starts one. If it cannot, stop the job and "
        "omit --gpu",
        address,
    )


def quiet_data() -> None:
    """Turn off the progress bars and log lines of Ray Data; rayrec shows its own on stderr."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised as exceptions


def is_private_cluster() -> bool:
    """Return True within `ray_cluster` if it has started the cluster for this process, so that no node is added."""
    return _is_private


def cluster_cpus() -> int:
    """Return the number of CPUs of the whole cluster, at least 1."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


class BucketWorker(Protocol):
    """A class whose constructor loads what it needs and whose call does one unit of work."""

    def __call__(self, unit: Any, /) -> Any:
        """Process one unit and return a small result; large results are written to the workspace, atomically."""
        ...


# The worker that this process constructed last. The tasks of a job run in the same processes, and constructing a
# worker, which may load a model, can take longer than a unit. Units are tasks instead of actors: a pool of actors on
# all free CPUs hangs if a node is lost, while Ray runs tasks again.
_cached_worker: dict[str, BucketWorker] = {}


@dataclass(frozen=True)
class _Failure:
    """An error in a worker that is not a `RayrecError`."""

    trace: str


@dataclass(frozen=True, kw_only=True)
class UnitTime:
    """The CPU time of one unit of work in its process."""

    worker: str  # name of the worker's class, or of the function that `run_on_node` runs
    cpu_seconds: float
    setup_seconds: float = 0.0  # CPU time of the worker's constructor, if this unit was its first


_recorded_times: list[UnitTime] | None = None


@contextmanager
def unit_times() -> Iterator[list[UnitTime]]:
    """Context manager that gives a list of the times of all units that end in its block, for benchmarks."""
    global _recorded_times
    times: list[UnitTime] = []
    _recorded_times = times
    try:
        yield times
    finally:
        _recorded_times = None


def _run_unit(
    make_worker: Callable[..., BucketWorker], stored_arguments: list[ray.ObjectRef], unit: Any
) -> tuple[Any, UnitTime]:
    key, started = stored_arguments[0].hex(), time.process_time()
    setup_ended = started
    try:
        if key not in _cached_worker:
            _cached_worker.clear()
            _cached_worker[key] = make_worker(**ray.get(stored_arguments[0]))
            setup_ended = time.process_time()
        result = _cached_worker[key](unit)
    except RayrecError as error:
        result = error  # returned as a value: of a raised error Ray keeps only the text
    except Exception:
        result = _Failure(traceback.format_exc())
    seconds = time.process_time() - setup_ended
    name = getattr(make_worker, "__name__", type(make_worker).__name__)
    return result, UnitTime(worker=name, cpu_seconds=seconds, setup_seconds=setup_ended - started)


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
    """Yield the result of each unit when it is done, in any order. A `RayrecError` in a worker is raised unchanged.

    A unit takes `cpus` CPUs and `memory` bytes of its node, so that a node runs only as many units as its memory holds.
    At most `concurrency` units, by default `MAX_WAITING`, are submitted at once. `arguments` are passed to the worker's
    constructor through the object store: arrays among them are read-only, and the workers of a node share them without
    a copy. A unit whose worker dies is repeated at most `RETRIES` times. If units still fail, or Ray cannot run them,
    raises `RayrecError` with the last reason after all other units are done; `called` is the word for a unit in it.
    """
    remaining_units = list(units)
    total = len(remaining_units)
    if not remaining_units:
        return
    # In a list, because Ray would resolve a bare reference for each task.
    stored_arguments = [ray.put(arguments)]
    task = ray.remote(_run_unit).options(
        num_cpus=cpus,
        num_gpus=num_gpus,
        memory=min(memory, node_memory()) or None,  # a unit that needs more than any node has runs alone on a node
        max_retries=RETRIES,
        scheduling_strategy="SPREAD",
    )
    max_running = min(concurrency or MAX_WAITING, total)  # tasks without a free CPU wait, and an autoscaler sees them
    running_units: dict[ray.ObjectRef, Any] = {}
    lost_units: list[Any] = []
    last_error: RayError | None = None
    remaining_units.reverse()
    try:
        while remaining_units or running_units:
            while remaining_units and len(running_units) < max_running:
                unit = remaining_units.pop()
                running_units[task.remote(make_worker, stored_arguments, unit)] = unit
            (finished, *_), _ = ray.wait(list(running_units))
            unit = running_units.pop(finished)
            try:
                result, unit_time = ray.get(finished)
            except RayError as error:
                lost_units.append(unit)
                last_error = error
                continue
            if isinstance(result, RayrecError):
                raise result
            if isinstance(result, _Failure):
                raise RuntimeError(f"{called} {unit} failed in its worker:\n{result.trace}")
            if _recorded_times is not None:
                _recorded_times.append(unit_time)
            yield result
    finally:
        for reference in running_units:
            ray.cancel(reference, force=True)
    if lost_units:
        unit_names = ", ".join(map(str, sorted(lost_units)[:10])) + (", ..." if len(lost_units) > 10 else "")
        if isinstance(last_error, KILLED):
            reason = f"the worker was killed {RETRIES + 1} times, probably out of memory"
            advice = "run the command again with fewer workers or on nodes with more memory"
        else:
            cause = last_error.cause if isinstance(last_error, RayTaskError) else last_error
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:SHOWN_CHARACTERS]}"
            advice = "fix this and run the command again"
        raise RayrecError(
            f"{called} {unit_names} of {total} failed: {reason}. Completed work is kept: {advice}"
        ) from last_error


def _with_unit_time(work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Return a function that yields the items of `work`, then a `UnitTime`."""

    @wraps(work)
    def run(*arguments: Any) -> Iterator[Any]:
        started = time.process_time()
        yield from work(*arguments)
        yield UnitTime(worker=work.__name__, cpu_seconds=time.process_time() - started)

    return run


def node_memory() -> int:
    """Return the most bytes of memory that Ray offers to tasks on a living node, at least 0."""
    return max([0, *(int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"])])


def node_cpus() -> int:
    """Return the number of CPUs of the largest living node, at least 1."""
    return max([1, *(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])])


def run_on_node(work: Callable[..., Iterator[Any]], *arguments: Any, cpus: int) -> Iterator[Any]:
    """Run `work(*arguments)` in a task that holds `cpus` CPUs of one node; yield its items as they arrive.

    A `RayrecError` in the task is raised unchanged, without Ray's wrapper. Raises `RayrecError` if its worker dies more
    than `RETRIES` times.
    """
    task = ray.remote(_with_unit_time(work)).options(num_cpus=cpus, num_returns="streaming", max_retries=RETRIES)
    try:
        for reference in task.remote(*arguments):
            item = ray.get(reference)
            if not isinstance(item, UnitTime):
                yield item
            elif _recorded_times is not None:
                _recorded_times.append(item)
    except RayTaskError as error:
        if isinstance(error.cause, RayrecError):
            raise error.cause from error
        raise
    except KILLED as error:
        raise RayrecError(
            f"{work.__name__} failed: its worker was killed {RETRIES + 1} times, probably out of memory. "
            "Run the command again on a node with more memory"
        ) from error
