"""The memory watch: it sees what is held, in this process and in those below it, and tells roles apart."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from rayrec.bench.private_memory import DRIVER, OTHER, WORKER, Found, MemoryWatch, growth, sample


class TestWatch:
    def test_private_memory_of_the_driver_is_seen(self) -> None:
        # A process of its own: this one may give back what earlier tests held while we look.
        code = f"""
import numpy as np
from rayrec.bench.private_memory import MemoryWatch
with MemoryWatch(interval=0.01) as before:
    pass
with MemoryWatch(interval=0.01) as watch:
    held = np.ones(64 << 17)  # 64 MiB
    watch._end.wait(0.2)
print(held.nbytes >> 20, watch.peaks_mb[{DRIVER!r}] - before.peaks_mb[{DRIVER!r}])
"""
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert int(told[0]) == 64
        assert float(told[1]) == pytest.approx(64, abs=8)

    def test_child_processes_count_too(self) -> None:
        code = "import sys; held = bytearray(b'x') * (32 << 20); print('held', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            (found,) = [process for process in sample() if process.pid == child.pid]
            assert (found.role, found.private_mb > 32) == (OTHER, True)
            child.communicate()

    @pytest.mark.skipif(sys.platform != "linux", reason="reads the memory map of a process")
    def test_the_object_store_counts_for_nobody(self, tmp_path: Path) -> None:
        def held(name: str) -> float:
            with (tmp_path / name).open("w+b") as file:
                file.truncate(32 << 20)
                with mmap.mmap(file.fileno(), 32 << 20) as area:
                    area.write(b"x" * (32 << 20))
                    return sample()[0].private_mb

        before = sample()[0].private_mb
        assert held("other") - before == pytest.approx(32, abs=4)
        assert held("plasmaXYZ") - before == pytest.approx(0, abs=4)

    def test_peaks_are_the_highest_of_each_role_and_the_total_of_one_moment(self) -> None:
        watch = MemoryWatch()
        watch.record([Found(1, DRIVER, 10.0), Found(2, WORKER, 5.0), Found(3, WORKER, 7.0)])
        watch.record([Found(1, DRIVER, 12.0), Found(2, WORKER, 6.0)])
        assert watch.peaks_mb == {DRIVER: 12.0, WORKER: 7.0}
        assert watch.total_mb == 22.0


def test_growth_compares_each_figure_of_two_runs() -> None:
    small, large = {"taste driver": 100.0, "taste worker": 50.0}, {"taste driver": 105.0, "taste worker": 60.0}
    assert growth(small, large) == pytest.approx({"taste driver": 0.05, "taste worker": 0.2})
