"""Compare two ways of doing the same work in alternating rounds, measure memory, and keep a file of measured rates.

The result is the ratio within a round, because the speed of a machine with shared cores changes over time. Within a
round both ways run under about the same conditions. Every second round starts with the other way, so that a slow change
of speed favors neither.

Private memory is USS, the memory that is freed when the process ends, without Ray's object store. The object store is
one block of shared memory of a fixed size per node; Linux counts a page of it as private to a process if no other
process has used the page.

The file of rates is JSON: `rates` (name -> work per second on one CPU), `machine` (where they were measured) and
`commit` (of the last measurement; null if rayrec does not run from a git checkout). A benchmark that is saved to the
file replaces its own rates and keeps all others.
"""

import json
import os
import platform
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, TypeVar

import psutil

import rayrec
from rayrec.display import progress
from rayrec.errors import InputError


@dataclass(frozen=True)
class Measured:
    """An amount of work, in the benchmark's unit, and the seconds that it took."""

    work: float
    seconds: float

    @property
    def per_second(self) -> float:
        """Work per second."""
        return self.work / max(self.seconds, 1e-9)


Way = Callable[[], Measured]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The result of a benchmark that compares our way with the plain loop."""

    name: str
    unit: str  # of work: plays, users, queries, tokens
    ratio: float  # our work per second over that of the plain loop, median over the rounds
    ratio_low: float  # the lowest ratio of a round
    ratio_high: float
    per_second: float  # ours, median over the rounds
    plain_per_second: float
    peak_mb: float  # highest private memory (USS) of all our processes together, MiB
    rounds: int
    extra: dict[str, Any] = field(default_factory=dict)  # further figures of this benchmark

    def to_json(self) -> dict[str, Any]:
        """Return one flat dict with the common figures and those of `extra`."""
        common = asdict(self)
        extra = common.pop("extra")
        return {**common, **extra}


def compare(
    name: str, unit: str, our_way: Way, plain_way: Way, *, rounds: int, peak_mb: float = 0.0, **extra: Any
) -> BenchResult:
    """Run both ways `rounds` times, ours first in even rounds and the plain loop first in odd ones."""
    pairs = []
    for round_number in range(rounds):
        if round_number % 2 == 0:
            our_run, plain_run = our_way(), plain_way()
        else:
            plain_run, our_run = plain_way(), our_way()
        pairs.append((our_run, plain_run))
    ratios = [our_run.per_second / max(plain_run.per_second, 1e-9) for our_run, plain_run in pairs]
    return BenchResult(
        name=name,
        unit=unit,
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        per_second=median(our_run.per_second for our_run, _ in pairs),
        plain_per_second=median(plain_run.per_second for _, plain_run in pairs),
        peak_mb=peak_mb,
        rounds=rounds,
        extra=extra,
    )


def measure(name: str, unit: str, our_way: Way, plain_way: Way, *, rounds: int, **extra: Any) -> BenchResult:
    """Run `our_way` once to measure its memory, then `compare` both ways. Shows a progress bar."""
    with progress(f"bench {name}", 2 * rounds + 1) as bar:

        def run_with_progress(way: Way) -> Measured:
            bar.advance()
            return way()

        with MemoryWatch() as watch:
            run_with_progress(our_way)
        ways = partial(run_with_progress, our_way), partial(run_with_progress, plain_way)
        return compare(name, unit, *ways, rounds=rounds, peak_mb=watch.total_mb, **extra)


Result = TypeVar("Result")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # also in the environment of Ray's workers


class PlainProcess:
    """A separate process that runs functions of importable modules, one at a time, until the with block ends."""

    def __init__(self, nice: int) -> None:
        self._executor = ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=_prepare_process, initargs=(nice,)
        )

    def __enter__(self) -> "PlainProcess":
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._executor.shutdown()

    def run(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run `function(*arguments)` in the process and return its result; its errors are raised here."""
        return self._executor.submit(function, *arguments).result()


def niceness() -> int:
    """Return the niceness (scheduling priority) of this process."""
    return os.nice(0)


def _prepare_process(nice: int) -> None:
    os.environ.update(ONE_THREAD)
    os.nice(max(0, nice - niceness()))


MIB = 1 << 20
DRIVER, WORKER, OTHER = "driver", "worker", "other"
OBJECT_STORE = "/plasma"  # part of the path of the object store's memory mapping
WORKER_TITLE = "ray::"  # start of the titles of processes that run Ray tasks and actors


@dataclass(frozen=True)
class ProcessMemory:
    """The memory of one process at one moment."""

    pid: int
    role: str  # driver, worker (of Ray, busy or idle) or other
    private_mb: float


class MemoryWatch:
    """Samples the memory of processes in a thread during a with block; read the figures after the block."""

    def __init__(self, interval: float = 0.5) -> None:
        self.total_mb = 0.0  # highest sum over all processes at one moment, MiB
        self.peaks_mb: dict[str, float] = {}  # role -> highest memory of any process of that role, MiB
        self._interval = interval
        self._end_event = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_end, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_event.set()
        self._thread.join()

    def _sample_until_end(self) -> None:
        while True:
            self.record(sample())
            if self._end_event.wait(self._interval):
                return

    def record(self, processes: list[ProcessMemory]) -> None:
        """Update the peaks with the processes of one sample."""
        self.total_mb = max(self.total_mb, sum(process.private_mb for process in processes))
        for process in processes:
            self.peaks_mb[process.role] = max(self.peaks_mb.get(process.role, 0.0), process.private_mb)


def sample() -> list[ProcessMemory]:
    """Return the memory of this process, which is the driver, and of all its descendants on this machine."""
    processes = []
    current_process = psutil.Process()
    for process in (current_process, *current_process.children(recursive=True)):
        try:
            role = WORKER if " ".join(process.cmdline()).startswith(WORKER_TITLE) else OTHER
            role = DRIVER if process == current_process else role
            processes.append(ProcessMemory(process.pid, role, _private_bytes(process) / MIB))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # the process has ended meanwhile
    return processes


def anonymous_mb(process: psutil.Process) -> float:
    """Return the memory of a process in MiB, without pages of files that it maps.

    All processes that map a file share its pages, so they are left out even if only one process maps it.
    """
    return float(sum(mapping.anonymous for mapping in process.memory_maps()) / MIB)


def _private_bytes(process: psutil.Process) -> int:
    """Return the private memory of a process in bytes; on Linux without Ray's object store."""
    private_bytes = int(process.memory_full_info().uss)
    if not psutil.LINUX:
        return private_bytes
    store_mappings = [mapping for mapping in process.memory_maps() if OBJECT_STORE in mapping.path]
    return private_bytes - sum(mapping.private_clean + mapping.private_dirty for mapping in store_mappings)


def growth(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """Return by how much each figure is higher in the larger run, as a share: 0.1 means 10 % higher."""
    return {name: large[name] / small[name] - 1 for name in small}


GIB = 1 << 30
CPU_NAMES = Path("/proc/cpuinfo")
# benchmark -> name of the rate that is its `per_second` divided by its number of workers
RATE_OF = {
    "train": "train_plays_per_second_per_cpu",
    "taste": "taste_plays_per_second_per_cpu",
    "embed": "embed_tokens_per_second_per_cpu",
}


def rates_of(result: dict[str, Any]) -> dict[str, float]:
    """Return the rates of a benchmark's result: its `rates`, or its work per second and worker. May be empty."""
    if "rates" in result:
        return dict(result["rates"])
    name = RATE_OF.get(result["name"])
    return {name: result["per_second"] / result.get("workers", 1)} if name else {}


def check_rates_file(path: str | Path) -> None:
    """Raise `InputError` if `save_rates` would refuse the file or could not write it; call this before measuring."""
    target = Path(path)
    _read_rates(target)
    temporary_path = _temporary_path(target)
    try:
        temporary_path.touch()
        temporary_path.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; pass another file to --save") from error


def save_rates(path: str | Path, result: dict[str, Any]) -> None:
    """Merge the rates of a benchmark's result into the file, which is created if it does not exist.

    Raises `InputError` if the file is not a rates file or holds rates of another machine.
    """
    target = Path(path)
    rates = {**_read_rates(target), **rates_of(result)}
    content = {"rates": dict(sorted(rates.items())), "machine": machine(), "commit": commit()}
    temporary_path = _temporary_path(target)
    temporary_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary_path.replace(target)


def _temporary_path(target: Path) -> Path:
    """Return the temporary path at which a file is written before it is renamed to `target`."""
    return target.with_name(f".{target.name}.{os.getpid()}")


def machine() -> dict[str, Any]:
    """Return a description of this machine: cpus, cpu (its name), memory_gib and system."""
    cpu_info_lines = CPU_NAMES.read_text(encoding="utf-8").splitlines() if CPU_NAMES.exists() else []
    cpu_names = [line.partition(":")[2].strip() for line in cpu_info_lines if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "cpu": cpu_names[0] if cpu_names else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """Return the short commit of the git checkout that rayrec runs from; None without a checkout or without git."""
    command = ["git", "-C", str(Path(rayrec.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read_rates(path: Path) -> dict[str, float]:
    """Return the rates in the file, empty if it does not exist. Raises `InputError` if the file cannot be used."""
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder; pass a file to --save")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates, file_machine = dict(content["rates"]), dict(content["machine"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; pass another file to --save") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a rates file; pass another file to --save") from error
    if file_machine != machine():
        raise InputError(f"{path} holds rates of another machine ({file_machine}); pass another file to --save")
    return rates
