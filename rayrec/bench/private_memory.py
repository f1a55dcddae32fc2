"""Private memory of this process and of all below it, sampled while something runs.

USS, the memory that would be freed if the process ended, without Ray's object store: that is one
block of shared memory of a fixed size for the whole node, whose pages Linux books as private to the
process that happened to touch them alone.
"""

import threading
from dataclasses import dataclass
from types import TracebackType

import psutil

MIB = 1 << 20
DRIVER, WORKER, OTHER = "driver", "worker", "other"
OBJECT_STORE = "/plasma"  # in the path of the store's mapping
WORKER_TITLE = "ray::"  # how the titles of processes begin that run Ray tasks and actors


@dataclass(frozen=True)
class Found:
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

    def record(self, processes: list[Found]) -> None:
        """Take in what one look found."""
        self.total_mb = max(self.total_mb, sum(process.private_mb for process in processes))
        for process in processes:
            self.peaks_mb[process.role] = max(self.peaks_mb.get(process.role, 0.0), process.private_mb)


def sample() -> list[Found]:
    """This process, the driver, and every process below it on this machine."""
    processes = []
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            role = WORKER if " ".join(process.cmdline()).startswith(WORKER_TITLE) else OTHER
            role = DRIVER if process == this else role
            processes.append(Found(process.pid, role, _private(process) / MIB))
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
