"""Workers over buckets on a real cluster."""

import os
import signal
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import ray.cloudpickle

from rayrec.errors import DamagedArtifactError, RayrecError
from rayrec.jobs.rank import RankerUnit
from rayrec.jobs.runtime import RETRIES, node_memory, run_buckets, unit_times

pytestmark = pytest.mark.usefixtures("cluster")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file


class Adder:
    """Adds the sum of `number` to every unit; with `refuse` it raises an error at unit 3."""

    def __init__(self, number: np.ndarray, *, refuse: bool = False) -> None:
        self.number, self.refuse = number, refuse

    def __call__(self, unit: int) -> dict[str, int]:
        if self.refuse and unit == 3:
            raise DamagedArtifactError("bucket 3 is damaged; run its command again")
        return {"unit": int(unit), "sum": int(unit + self.number.sum())}


def test_every_unit_is_done_once() -> None:
    results = list(run_buckets(Adder, range(7), arguments={"number": np.ones(10)}))
    assert sorted((result["unit"], result["sum"]) for result in results) == [(unit, unit + 10) for unit in range(7)]


def test_two_jobs_do_not_share_a_worker() -> None:
    for number in (1, 2):
        results = run_buckets(Adder, range(4), arguments={"number": np.array([number])})
        assert sorted(result["sum"] for result in results) == [number, number + 1, number + 2, number + 3]


def test_without_units_nothing_is_done() -> None:
    assert list(run_buckets(Adder, [], arguments={"number": np.ones(1)})) == []


def test_an_error_of_rayrec_comes_out_as_it_was_raised() -> None:
    with pytest.raises(DamagedArtifactError, match="bucket 3 is damaged"):
        list(run_buckets(Adder, range(5), arguments={"number": np.ones(1), "refuse": True}))


class Working:
    """Works 0.3 s at each unit and returns when it began and ended."""

    def __call__(self, unit: int) -> tuple[float, float]:
        started = time.time()
        time.sleep(0.3)
        return started, time.time()


@pytest.mark.parametrize("share", [0.6, 5.0])
def test_a_node_works_at_no_more_units_than_its_memory_holds(share: float) -> None:
    spans = sorted(run_buckets(Working, range(3), arguments={}, memory=int(share * node_memory())))
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


class Computing:
    """Uses 0.1 s of CPU time per unit, and 0.3 s when it is created."""

    def __init__(self) -> None:
        compute(0.3)

    def __call__(self, unit: int) -> int:
        compute(0.1)
        return unit


def compute(seconds: float) -> None:
    deadline = time.process_time() + seconds
    while time.process_time() < deadline:
        pass


def test_the_cpu_times_of_units_and_of_worker_setup_are_recorded_separately() -> None:
    with unit_times() as times:
        list(run_buckets(Computing, range(6), arguments={}))
    assert [unit_time.worker for unit_time in times] == ["Computing"] * 6
    assert all(0.1 <= unit_time.cpu_seconds < 0.2 for unit_time in times)
    setup_seconds = [unit_time.setup_seconds for unit_time in times if unit_time.setup_seconds >= 0.3]
    assert 1 <= len(setup_seconds) <= 2  # one per worker process
    assert sum(unit_time.setup_seconds for unit_time in times) - sum(setup_seconds) < 0.1
    list(run_buckets(Computing, range(2), arguments={}))
    assert len(times) == 6


class Dying:
    """Kills its process, as the out-of-memory killer does, in the first `deadly[unit]` attempts at a unit."""

    def __init__(self, folder: str, deadly: dict[int, int]) -> None:
        self.folder, self.deadly = Path(folder), deadly

    def __call__(self, unit: int) -> int:
        with (self.folder / f"{os.getpid()}").open("a") as log:
            log.write(f"{unit}\n")
        if count_attempts(self.folder)[unit] <= self.deadly.get(unit, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        return unit


def count_attempts(folder: Path) -> Counter[int]:
    """Return how often each unit was begun."""
    return Counter(int(line) for file in folder.iterdir() for line in file.read_text().split())


def test_a_unit_whose_worker_is_killed_is_done_again_and_no_other(tmp_path: Path) -> None:
    results = run_buckets(Dying, range(6), arguments={"folder": str(tmp_path), "deadly": {2: RETRIES}})
    assert sorted(results) == list(range(6))
    counts = count_attempts(tmp_path)
    assert counts.pop(2) == RETRIES + 1
    assert set(counts.values()) == {1}


def test_a_unit_that_kills_every_worker_is_named_and_the_others_are_done(tmp_path: Path) -> None:
    results = run_buckets(Dying, range(6), arguments={"folder": str(tmp_path), "deadly": {1: 99, 4: 99}})
    assert sorted(next(results) for _ in range(4)) == [0, 2, 3, 5]
    with pytest.raises(RayrecError, match=r"bucket 1, 4 of 6 failed: .* killed 4 times, .* memory"):
        next(results)
    assert count_attempts(tmp_path)[1] == count_attempts(tmp_path)[4] == RETRIES + 1


class AlwaysDying:
    """Kills its process at every unit."""

    def __call__(self, unit: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_rankers_whose_workers_are_killed_are_named_by_what_they_rank() -> None:
    units = [RankerUnit("artists", "folder", "served"), RankerUnit("", "folder", "next")]
    with pytest.raises(RayrecError, match=r"ranker next, served without artists of 2 failed: .* killed 4 times"):
        list(run_buckets(AlwaysDying, units, arguments={}, called="ranker"))


class Buggy:
    """Has a bug: it divides by zero at unit 1."""

    def __call__(self, unit: int) -> float:
        return 1 / (unit - 1)


def test_a_bug_comes_out_with_its_unit_and_its_traceback() -> None:
    with pytest.raises(
        RuntimeError, match=r"bucket 1 failed in its worker:\n(.|\n)*ZeroDivisionError: division by zero"
    ):
        list(run_buckets(Buggy, range(3), arguments={}))
