"""The benchmark harness: ratios of planted measurements, which are known without a clock."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rayrec.bench.bench_config import MemoryBenchConfig, ServeBenchConfig, TrainBenchConfig, check_name
from rayrec.bench.rounds import (
    DRIVER,
    OTHER,
    WORKER,
    Measured,
    MemoryWatch,
    PlainProcess,
    ProcessMemory,
    Way,
    check_rates_file,
    commit,
    compare,
    growth,
    machine,
    niceness,
    rates_of,
    sample,
    save_rates,
)
from rayrec.errors import InputError


def paced_way(speeds: Iterator[float], log: list[str], name: str) -> Way:
    """Return a way that does 100 units of work per run, each run at the next of `speeds`, and logs `name`."""

    def run() -> Measured:
        log.append(name)
        return Measured(100.0, 100.0 / next(speeds))

    return run


@pytest.fixture
def ways() -> Callable[[list[float], list[float]], tuple[Way, Way, list[str]]]:
    def make(speeds: list[float], plain_speeds: list[float]) -> tuple[Way, Way, list[str]]:
        log: list[str] = []
        return paced_way(iter(speeds), log, "ours"), paced_way(iter(plain_speeds), log, "plain"), log

    return make


class TestCompare:
    def test_ratio_is_the_median_of_the_rounds_with_its_spread(self, ways) -> None:  # type: ignore[no-untyped-def]
        way, plain_way, _ = ways([90, 10, 80, 95, 100], [100, 100, 100, 100, 100])
        result = compare("train", "plays", way, plain_way, rounds=5)
        assert (result.ratio, result.ratio_low, result.ratio_high) == pytest.approx((0.9, 0.1, 1.0))
        assert (result.per_second, result.plain_per_second) == pytest.approx((90, 100))

    def test_a_machine_that_slows_down_changes_no_ratio(self, ways) -> None:  # type: ignore[no-untyped-def]
        pace = [100.0, 50, 25, 12, 6]
        way, plain_way, _ = ways([0.8 * speed for speed in pace], pace)
        result = compare("train", "plays", way, plain_way, rounds=5)
        assert result.ratio_low == pytest.approx(0.8)
        assert result.ratio_high == pytest.approx(0.8)

    def test_every_other_round_starts_with_the_other_way(self, ways) -> None:  # type: ignore[no-untyped-def]
        way, plain_way, log = ways([1] * 3, [1] * 3)
        compare("train", "plays", way, plain_way, rounds=3)
        assert log == ["ours", "plain", "plain", "ours", "ours", "plain"]

    def test_ways_may_do_different_amounts_of_work(self) -> None:
        result = compare("x", "plays", lambda: Measured(300, 3), lambda: Measured(1_000, 5), rounds=1)
        assert result.ratio == pytest.approx(0.5)

    def test_json_is_flat_and_holds_the_further_figures(self) -> None:
        result = compare("x", "plays", lambda: Measured(1, 1), lambda: Measured(1, 1), rounds=2, peak_mb=7.0, feed=5.5)
        report = result.to_json()
        assert report.keys() == {
            "name", "unit", "ratio", "ratio_low", "ratio_high", "per_second", "plain_per_second", "peak_mb", "rounds",
            "feed",
        }  # fmt: skip
        assert (report["feed"], report["peak_mb"], report["rounds"]) == (5.5, 7.0, 2)


class TestConfig:
    def test_an_unknown_benchmark_is_refused_by_name(self) -> None:
        check_name("train")
        with pytest.raises(InputError, match=r"Unknown benchmark 'trian'; expected one of train, taste, .*scale"):
            check_name("trian")

    def test_sizes_that_compare_nothing_are_refused(self) -> None:
        with pytest.raises(InputError, match="rounds is 0"):
            TrainBenchConfig(rounds=0)
        with pytest.raises(InputError, match="users is"):
            MemoryBenchConfig(users=(500, 500))

    def test_quick_sizes_stand_where_none_was_given(self) -> None:
        config = ServeBenchConfig(clients=(1, 2, 16), seed=3).with_quick_sizes()
        assert config == ServeBenchConfig.quick().replace(clients=(1, 2, 16), seed=3)
        assert config.songs == (500,)


def threads() -> str:
    return os.environ["OMP_NUM_THREADS"]


def fail() -> None:
    raise ValueError("planted")


def test_a_plain_process_has_the_given_niceness_and_one_thread() -> None:
    current_niceness = niceness()
    with PlainProcess(current_niceness + 3) as plain:
        assert plain.run(niceness) == current_niceness + 3
        assert plain.run(os.getpid) == plain.run(os.getpid) != os.getpid()
        assert plain.run(threads) == "1"
        with pytest.raises(ValueError, match="planted"):
            plain.run(fail)
    assert niceness() == current_niceness


class TestWatch:
    def test_private_memory_of_the_driver_is_seen(self) -> None:
        # In a new process, because this one may release memory of earlier tests during the measurement.
        code = f"""
import time
import numpy as np
from rayrec.bench.rounds import MemoryWatch
class CountingWatch(MemoryWatch):
    samples = 0
    def record(self, processes):
        super().record(processes)
        self.samples += 1
with MemoryWatch(interval=0.01) as before:
    pass
with CountingWatch(interval=0.01) as watch:
    held = np.ones(64 << 17)  # 64 MiB
    num_samples = watch.samples
    while watch.samples < num_samples + 2:  # the first of them may have begun before
        time.sleep(0.01)
print(held.nbytes >> 20, watch.peaks_mb[{DRIVER!r}] - before.peaks_mb[{DRIVER!r}])
"""
        output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert int(output[0]) == 64
        assert float(output[1]) == pytest.approx(64, abs=8)

    def test_child_processes_count_too(self) -> None:
        code = "import sys; held = bytearray(b'x') * (32 << 20); print('held', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            (child_memory,) = [process for process in sample() if process.pid == child.pid]
            assert (child_memory.role, child_memory.private_mb > 32) == (OTHER, True)
            child.communicate()

    @pytest.mark.skipif(sys.platform != "linux", reason="no /proc/self/smaps: run it on Linux")
    def test_the_object_store_counts_as_memory_of_no_process(self, tmp_path: Path) -> None:
        def memory_with_file(name: str) -> float:
            with (tmp_path / name).open("w+b") as file:
                file.truncate(32 << 20)
                with mmap.mmap(file.fileno(), 32 << 20) as area:
                    area.write(b"x" * (32 << 20))
                    return sample()[0].private_mb

        before = sample()[0].private_mb
        assert memory_with_file("other") - before == pytest.approx(32, abs=4)
        assert memory_with_file("plasmaXYZ") - before == pytest.approx(0, abs=4)

    def test_peaks_are_the_highest_of_each_role_and_the_total_of_one_moment(self) -> None:
        watch = MemoryWatch()
        watch.record([ProcessMemory(1, DRIVER, 10.0), ProcessMemory(2, WORKER, 5.0), ProcessMemory(3, WORKER, 7.0)])
        watch.record([ProcessMemory(1, DRIVER, 12.0), ProcessMemory(2, WORKER, 6.0)])
        assert watch.peaks_mb == {DRIVER: 12.0, WORKER: 7.0}
        assert watch.total_mb == 22.0


def test_growth_compares_each_figure_of_two_runs() -> None:
    small, large = {"taste driver": 100.0, "taste worker": 50.0}, {"taste driver": 105.0, "taste worker": 60.0}
    assert growth(small, large) == pytest.approx({"taste driver": 0.05, "taste worker": 0.2})


TRAIN = {"name": "train", "per_second": 80_000.0}
EMBED = {"name": "embed", "per_second": 1_000_000.0, "workers": 2}
SCALE = {"name": "scale", "per_second": 1.0, "rates": {"import_plays_per_second_per_cpu": 5.0}}


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (TRAIN, {"train_plays_per_second_per_cpu": 80_000.0}),
        (EMBED, {"embed_tokens_per_second_per_cpu": 500_000.0}),
        ({"name": "taste", "per_second": 7.0}, {"taste_plays_per_second_per_cpu": 7.0}),
        (SCALE, {"import_plays_per_second_per_cpu": 5.0}),
        ({"name": "index", "per_second": 9.0}, {}),
    ],
)
def test_a_benchmark_tells_its_rates_for_one_cpu(result: dict[str, Any], expected: dict[str, float]) -> None:
    assert rates_of(result) == expected


def test_each_benchmark_brings_its_own_rates_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for result in (TRAIN, EMBED, {**TRAIN, "per_second": 90_000.0}):
        save_rates(path, result)
    content = json.loads(path.read_text())
    assert content["rates"] == {
        "embed_tokens_per_second_per_cpu": 500_000.0,
        "train_plays_per_second_per_cpu": 90_000.0,
    }
    assert content["machine"] == machine()
    assert content["commit"] == commit()
    assert [file.name for file in tmp_path.iterdir()] == ["rates.json"]


def test_the_machine_is_described() -> None:
    description = machine()
    assert description["cpus"] >= 1
    assert description["memory_gib"] > 0
    assert description["cpu"]
    assert description["system"]


def test_rates_of_two_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    save_rates(path, TRAIN)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "machine": {"cpus": 96}}))
    for call in (lambda: save_rates(path, EMBED), lambda: check_rates_file(path)):
        with pytest.raises(InputError, match=r"rates of another machine .*96.*pass another file"):
            call()


@pytest.mark.parametrize("text", ["", "[]", '{"rates": 3, "machine": {}}', '{"plays": 1}'])
def test_a_file_of_something_else_is_never_overwritten(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a rates file"):
        save_rates(path, TRAIN)
    assert path.read_text() == text


def test_a_missing_folder_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written: folder .*absent does not exist"):
        check_rates_file(tmp_path / "absent" / "rates.json")


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder; pass a file to --save"):
        check_rates_file(tmp_path)
    with pytest.raises(InputError, match=r"cannot be written: File name too long; pass another file to --save"):
        check_rates_file(tmp_path / ("r" * 255))
    check_rates_file(tmp_path / "rates.json")
    assert not list(tmp_path.iterdir())
