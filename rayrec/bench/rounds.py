"""Two ways of doing the same work, timed in alternating rounds, with their memory; and the file of measured rates.

What counts is the ratio within a round. Machines share their cores and change their pace. Within a round both ways meet
about the same machine, and every other round starts with the other way, so that a drift favors neither.

Private memory is USS, the memory that would be freed if the process ended, without Ray's object store: that is one
block of shared memory of a fixed size for the whole node, whose pages Linux books as private to the
process that happened to touch them alone.

The file of rates is JSON: `rates` (name -> work a second on one CPU), `machine` (what they were measured on)
and `commit` (of the last measurement; null where rayrec is not a checkout). Each benchmark that is
saved to it brings its own rates and leaves the others.
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
    """Work done, in the benchmark's unit, and the seconds that it took."""

    work: float
    seconds: float

    @property
    def per_second(self) -> float:
        """Work a second."""
        return self.work / max(self.seconds, 1e-9)


Way = Callable[[], Measured]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What a benchmark found: our way against the plain loop."""

    name: str
    unit: str  # of work: plays, users, queries, tokens
    ratio: float  # ours / plain work a second, median over the rounds
    ratio_low: float  # the lowest of any round
    ratio_high: float
    per_second: float  # ours, median over the rounds
    plain_per_second: float
    peak_mb: float  # private memory (USS) of all our processes together at its highest, MiB
    rounds: int
    extra: dict[str, Any] = field(default_factory=dict)  # further figures of this benchmark

    def to_json(self) -> dict[str, Any]:
        """One flat object; the further figures stand beside the common ones."""
        common = asdict(self)
        extra = common.pop("extra")
        return {**common, **extra}


def compare(
    name: str, unit: str, ours: Way, plain: Way, *, rounds: int, peak_mb: float = 0.0, **extra: Any
) -> BenchResult:
    """Run both ways `rounds` times, ours first in even rounds and the plain loop first in odd ones."""
    pairs = []
    for number in range(rounds):
        if number % 2 == 0:
            mine, theirs = ours(), plain()
        else:
            theirs, mine = plain(), ours()
        pairs.append((mine, theirs))
    ratios = [mine.per_second / max(theirs.per_second, 1e-9) for mine, theirs in pairs]
    return BenchResult(
        name=name,
        unit=unit,
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
        per_second=median(mine.per_second for mine, _ in pairs),
        plain_per_second=median(theirs.per_second for _, theirs in pairs),
        peak_mb=peak_mb,
        rounds=rounds,
        extra=extra,
    )


def measure(name: str, unit: str, ours: Way, plain: Way, *, rounds: int, **extra: Any) -> BenchResult:
    """One round of ours for its memory, unmeasured otherwise, and then the rounds that count; with a bar."""
    with progress(f"bench {name}", 2 * rounds + 1) as bar:

        def shown(way: Way) -> Measured:
            bar.advance()
            return way()

        with MemoryWatch() as watch:
            shown(ours)
        ways = partial(shown, ours), partial(shown, plain)
        return compare(name, unit, *ways, rounds=rounds, peak_mb=watch.total_mb, **extra)


Result = TypeVar("Result")

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # what Ray's workers are given too


class PlainProcess:
    """Runs functions of importable modules, one at a time, in one process that stays up for the with block."""

    def __init__(self, nice: int) -> None:
        self._executor = ProcessPoolExecutor(
            max_workers=1, mp_context=get_context("spawn"), initializer=_level, initargs=(nice,)
        )

    def __enter__(self) -> "PlainProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._executor.shutdown()

    def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of `work(*arguments)`; its errors come out here."""
        return self._executor.submit(work, *arguments).result()


def niceness() -> int:
    """How nice this process is."""
    return os.nice(0)


def _level(nice: int) -> None:
    os.environ.update(ONE_THREAD)
    os.nice(max(0, nice - niceness()))


MIB = 1 << 20
DRIVER, WORKER, OTHER = "driver", "worker", "other"
OBJECT_STORE = "/plasma"  # in the path of the store's mapping
WORKER_TITLE = "ray::"  # how the titles of processes begin that run Ray tasks and actors


@dataclass(frozen=True)
class ProcessMemory:
    """One process as it was when we looked."""

    pid: int
    role: str  # driver, worker (of Ray, at work or waiting) or other
    private_mb: float


class MemoryWatch:
    """Samples in a thread for the length of a with block; the figures stand afterwards."""

    def __init__(self, interval: float = 0.5) -> None:
        self.total_mb = 0.0  # highest sum over all processes at one moment
        self.peaks_mb: dict[str, float] = {}  # driver, worker, other -> highest of any such process
        self._interval = interval
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_end, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _sample_until_end(self) -> None:
        while True:
            self.record(sample())
            if self._end.wait(self._interval):
                return

    def record(self, processes: list[ProcessMemory]) -> None:
        """Take in what one look found."""
        self.total_mb = max(self.total_mb, sum(process.private_mb for process in processes))
        for process in processes:
            self.peaks_mb[process.role] = max(self.peaks_mb.get(process.role, 0.0), process.private_mb)


def sample() -> list[ProcessMemory]:
    """This process, the driver, and every process below it on this machine."""
    processes = []
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            role = WORKER if " ".join(process.cmdline()).startswith(WORKER_TITLE) else OTHER
            role = DRIVER if process == this else role
            processes.append(ProcessMemory(process.pid, role, _private(process) / MIB))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended while we looked
    return processes


def anonymous_mb(process: psutil.Process) -> float:
    """MiB of a process without pages of files: these are shared by all who map them, even where it is one alone."""
    return float(sum(area.anonymous for area in process.memory_maps()) / MIB)


def _private(process: psutil.Process) -> int:
    """Bytes."""
    private = int(process.memory_full_info().uss)
    if not psutil.LINUX:
        return private
    store = [area for area in process.memory_maps() if OBJECT_STORE in area.path]
    return private - sum(area.private_clean + area.private_dirty for area in store)


def growth(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """By how much, as a share, each figure of a smaller run grew in a larger one."""
    return {name: large[name] / small[name] - 1 for name in small}


GIB = 1 << 30
CPU_NAMES = Path("/proc/cpuinfo")
# benchmark -> the rate that its `per_second` is, over the workers that it ran
RATE_OF = {
    "train": "train_plays_per_second_per_cpu",
    "taste": "taste_plays_per_second_per_cpu",
    "embed": "embed_tokens_per_second_per_cpu",
}


def rates_of(result: dict[str, Any]) -> dict[str, float]:
    """The rates in what a benchmark told: its own `rates`, or its work a second; empty for index and memory."""
    if "rates" in result:
        return dict(result["rates"])
    name = RATE_OF.get(result["name"])
    return {name: result["per_second"] / result.get("workers", 1)} if name else {}


def check_rates_file(path: str | Path) -> None:
    """Raise `InputError` for a file that `save_rates` would refuse or could not write: before hours of measuring."""
    target = Path(path)
    _read(target)
    written = _unfinished(target)
    try:
        written.touch()
        written.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}; pass another file to --save") from error


def save_rates(path: str | Path, result: dict[str, Any]) -> None:
    """Merge the rates of what a benchmark told into the file, which is made where there is none.

    Raises `InputError` for a file that is none of ours or holds rates of another machine.
    """
    target = Path(path)
    rates = {**_read(target), **rates_of(result)}
    content = {"rates": dict(sorted(rates.items())), "machine": machine(), "commit": commit()}
    written = _unfinished(target)
    written.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    written.replace(target)


def _unfinished(target: Path) -> Path:
    """Where a file is written before it takes its place."""
    return target.with_name(f".{target.name}.{os.getpid()}")


def machine() -> dict[str, Any]:
    """This machine: cpus, cpu (its name), memory_gib and system."""
    names = CPU_NAMES.read_text(encoding="utf-8").splitlines() if CPU_NAMES.exists() else []
    named = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return {
        "cpus": os.cpu_count(),
        "cpu": named[0] if named else platform.processor(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The short commit of the checkout that rayrec runs from; None where it is none, or git is not there."""
    words = ["git", "-C", str(Path(rayrec.__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> dict[str, float]:
    """The rates that are there."""
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: folder {path.parent} does not exist")
    if path.is_dir():
        raise InputError(f"{path} is a folder; pass a file to --save")
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rates, where = dict(content["rates"]), dict(content["machine"])
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; pass another file to --save") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a rates file; pass another file to --save") from error
    if where != machine():
        raise InputError(f"{path} holds rates of another machine ({where}); pass another file to --save")
    return rates
