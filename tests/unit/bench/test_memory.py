"""The memory watch: it sees what is held, in this process and in those below it, and tells roles apart."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rayrec.bench.memory import DRIVER, MemoryWatch, growth, role, sample


class TestWatch:
    def test_private_memory_of_the_driver_is_seen(self) -> None:
        with MemoryWatch(interval=0.01) as before:
            pass
        with MemoryWatch(interval=0.01) as watch:
            held = np.ones(64 << 17)  # 64 MiB
            watch._end.wait(0.1)
        assert held.nbytes == 64 << 20
        assert watch.peaks_mb[DRIVER] - before.peaks_mb[DRIVER] == pytest.approx(64, abs=8)

    def test_child_processes_count_too(self) -> None:
        code = "import sys; held = bytearray(b'x') * (32 << 20); print('held', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            assert max(sample()["other"]) > 32
            child.communicate()

    def test_peaks_are_the_highest_of_each_role_and_the_total_of_one_moment(self) -> None:
        watch = MemoryWatch()
        watch._record({DRIVER: [10.0], "worker A": [5.0, 7.0]})
        watch._record({DRIVER: [12.0], "worker A": [6.0]})
        assert watch.peaks_mb == {DRIVER: 12.0, "worker A": 7.0}
        assert watch.total_mb == 22.0


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ray::MapWorker(MapBatches(_Adapter)).submit", "worker MapWorker"),
        ("ray::IDLE", "idle"),
        (f"{os.sep}usr/bin/raylet --node", "other"),
    ],
)
def test_roles_come_from_the_titles_of_processes(command: str, expected: str) -> None:
    assert role(command) == expected


def test_growth_compares_the_driver_and_workers_that_ran_in_both() -> None:
    small = {DRIVER: 100.0, "worker A": 50.0, "worker B": 10.0, "other": 1.0, "idle": 5.0}
    large = {DRIVER: 105.0, "worker A": 60.0, "other": 9.0, "idle": 50.0}
    assert growth(small, large) == pytest.approx({DRIVER: 0.05, "worker A": 0.2})
