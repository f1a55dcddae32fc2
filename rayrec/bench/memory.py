"""Private memory of this process and of all below it, sampled while something runs.

USS, the memory that would be freed if the process ended: what workers share, such as Ray's object
store, counts for none of them.
"""

import re
import threading
from collections import defaultdict
from types import TracebackType

import psutil

MIB = 1 << 20
DRIVER = "driver"
WORKER_TITLE = re.compile(r"^ray::([\w.]+)")  # how Ray's workers title their process


class MemoryWatch:
    """Samples in a thread for the length of a with block; the figures stand afterwards."""

    def __init__(self, interval: float = 0.5) -> None:
        self.total_mb = 0.0  # highest sum over all processes at one moment
        self.peaks_mb: dict[str, float] = {}  # role -> highest of any process in it; see `role`
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
            self._record(sample())
            if self._end.wait(self._interval):
                return

    def _record(self, found: dict[str, list[float]]) -> None:
        self.total_mb = max(self.total_mb, sum(map(sum, found.values())))
        for role, sizes in found.items():
            self.peaks_mb[role] = max(self.peaks_mb.get(role, 0.0), *sizes)


def sample() -> dict[str, list[float]]:
    """MiB of USS of every process in the tree, by role: driver, each kind of Ray worker, and other."""
    found: dict[str, list[float]] = defaultdict(list)
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            title = DRIVER if process == this else role(" ".join(process.cmdline()))
            found[title].append(process.memory_full_info().uss / MIB)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended while we looked
    return found


def role(command: str) -> str:
    """`worker MapWorker` from the title of a Ray worker at work, `idle` of one that waits, `other` for the rest."""
    match = WORKER_TITLE.match(command)
    if match is None:
        return "other"
    return "idle" if match[1] == "IDLE" else f"worker {match[1]}"


def growth(small: dict[str, float], large: dict[str, float]) -> dict[str, float]:
    """By how much, as a share, the driver and each kind of worker seen in both grew from one run to the other."""
    compared = [title for title in small if title in large and (title == DRIVER or title.startswith("worker"))]
    return {title: large[title] / small[title] - 1 for title in compared}
