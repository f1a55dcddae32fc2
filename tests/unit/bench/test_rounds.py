"""The harness: ratios of planted ways of working, by construction and not by a clock."""

import os
from collections.abc import Callable, Iterator

import pytest

from rayrec.bench.bench_config import MemoryBenchConfig, ServeBenchConfig, TrainBenchConfig, check_name
from rayrec.bench.rounds import Measured, PlainProcess, Way, compare, niceness
from rayrec.errors import InputError


def paced(speeds: Iterator[float], log: list[str], name: str) -> Way:
    """A way that does 100 units at each of the given speeds in turn."""

    def run() -> Measured:
        log.append(name)
        return Measured(100.0, 100.0 / next(speeds))

    return run


@pytest.fixture
def ways() -> Callable[[list[float], list[float]], tuple[Way, Way, list[str]]]:
    def make(ours: list[float], plain: list[float]) -> tuple[Way, Way, list[str]]:
        log: list[str] = []
        return paced(iter(ours), log, "ours"), paced(iter(plain), log, "plain"), log

    return make


class TestCompare:
    def test_ratio_is_the_median_of_the_rounds_with_its_spread(self, ways) -> None:  # type: ignore[no-untyped-def]
        ours, plain, _ = ways([90, 10, 80, 95, 100], [100, 100, 100, 100, 100])
        result = compare("train", "plays", ours, plain, rounds=5)
        assert (result.ratio, result.ratio_low, result.ratio_high) == pytest.approx((0.9, 0.1, 1.0))
        assert (result.per_second, result.plain_per_second) == pytest.approx((90, 100))

    def test_a_machine_that_slows_down_changes_no_ratio(self, ways) -> None:  # type: ignore[no-untyped-def]
        pace = [100.0, 50, 25, 12, 6]
        ours, plain, _ = ways([0.8 * speed for speed in pace], pace)
        result = compare("train", "plays", ours, plain, rounds=5)
        assert result.ratio_low == pytest.approx(0.8)
        assert result.ratio_high == pytest.approx(0.8)

    def test_every_other_round_starts_with_the_other_way(self, ways) -> None:  # type: ignore[no-untyped-def]
        ours, plain, log = ways([1] * 3, [1] * 3)
        compare("train", "plays", ours, plain, rounds=3)
        assert log == ["ours", "plain", "plain", "ours", "ours", "plain"]

    def test_ways_may_do_different_amounts_of_work(self) -> None:
        result = compare("x", "plays", lambda: Measured(300, 3), lambda: Measured(1_000, 5), rounds=1)
        assert result.ratio == pytest.approx(0.5)

    def test_json_is_flat_and_holds_the_further_figures(self) -> None:
        result = compare("x", "plays", lambda: Measured(1, 1), lambda: Measured(1, 1), rounds=2, peak_mb=7.0, feed=5.5)
        told = result.to_json()
        assert told.keys() == {
            "name", "unit", "ratio", "ratio_low", "ratio_high", "per_second", "plain_per_second", "peak_mb", "rounds",
            "feed",
        }  # fmt: skip
        assert (told["feed"], told["peak_mb"], told["rounds"]) == (5.5, 7.0, 2)


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


def test_it_is_as_nice_as_asked_in_another_process_with_one_thread() -> None:
    own = niceness()
    with PlainProcess(own + 3) as plain:
        assert plain.run(niceness) == own + 3
        assert plain.run(os.getpid) == plain.run(os.getpid) != os.getpid()
        assert plain.run(threads) == "1"
        with pytest.raises(ValueError, match="planted"):
            plain.run(fail)
    assert niceness() == own
