"""Speed-ups and costs that are computed from runs with planted figures."""

import re

import pytest

from rayrec.bench.bench_config import AnswersBenchConfig, ScaleBenchConfig, ServeBenchConfig
from rayrec.bench.rounds import Measured
from rayrec.bench.scale_bench import ChainRun, costs, extrapolate_hours, scale_figures, speedups
from rayrec.errors import InputError


def run_with_start(plays: float, *, start: float = 5.0, play_seconds: float = 2e-6) -> dict[str, Measured]:
    """Return a run of one stage that takes `start` seconds to start and `play_seconds` seconds per play."""
    return {"taste": Measured(plays, start + plays * play_seconds)}


def test_a_further_play_costs_the_same_whatever_the_start() -> None:
    cost = costs([run_with_start(plays) for plays in (1e5, 1e6, 1e7)])["taste"]
    assert cost["plays"] == [1e5, 1e6, 1e7]
    assert cost["microseconds_per_further_play"] == pytest.approx([2.0, 2.0])
    assert cost["growth"] == pytest.approx(0.0)
    assert cost["microseconds_per_play"] == pytest.approx([52.0, 7.0, 2.5])


def test_a_play_that_costs_more_among_many_shows_as_growth() -> None:
    cost = costs([run_with_start(1e5), run_with_start(1e6), {"taste": Measured(1e7, 5 + 1e7 * 3e-6)}])["taste"]
    first_cost, last_cost = 2.0, (5 + 30 - 5 - 2) / 9
    assert cost["growth"] == pytest.approx(last_cost / first_cost - 1)
    assert cost["growth"] > 0.5


def test_two_sizes_say_nothing_of_growth() -> None:
    assert costs([run_with_start(1e5), run_with_start(1e6)])["taste"]["growth"] is None


def test_a_speedup_is_of_further_plays_of_two_workers_against_one_whatever_the_start() -> None:
    def runs(start: float, play_seconds: float) -> tuple[dict[str, Measured], dict[str, Measured]]:
        return tuple(run_with_start(plays, start=start, play_seconds=play_seconds) for plays in (1e5, 1e6))  # type: ignore[return-value]

    assert speedups({1: runs(5, 4e-6), 4: runs(9, 1e-6), 2: runs(7, 2.5e-6)}) == {"taste": pytest.approx(1.6)}
    assert speedups({1: runs(5, 4e-6), 2: runs(5, 0.0)}) == {"taste": None}
    assert speedups({1: runs(5, 4e-6)}) == {"taste": None}


def test_extrapolated_hours_are_marked_as_such() -> None:
    report = extrapolate_hours(costs([run_with_start(1e5), run_with_start(1e6)]))
    assert report["extrapolated"] is True
    assert report["cpu_hours"]["taste"] == pytest.approx(1e9 * 2e-6 / 3600)


def test_the_cost_of_embed_is_of_all_epochs_and_its_rate_counts_each_token_once_per_epoch() -> None:
    stages = ("import", "embed", "train", "taste")
    runs = [
        ChainRun(stages={stage: Measured(plays, plays * 8e-6) for stage in stages}, peaks_mb={"driver": 1.0})
        for plays in (1e5, 1e6, 1e7)
    ]
    report = scale_figures(ScaleBenchConfig(embed_epochs=2), {1: (runs[0], runs[1])}, runs)
    assert report["cost"]["embed"]["microseconds_per_further_play"] == pytest.approx([8.0, 8.0])
    assert report["extrapolated"]["cpu_hours"]["embed"] == pytest.approx(1e9 * 8e-6 / 3600)
    assert report["rates"]["embed_tokens_per_second_per_cpu"] == pytest.approx(2 / 8e-6)
    assert report["rates"]["taste_plays_per_second_per_cpu"] == pytest.approx(1 / 8e-6)


@pytest.mark.parametrize("changes", [{"users": (10,)}, {"users": (20, 10)}, {"workers": (2, 1)}])
def test_sizes_out_of_order_are_refused(changes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(InputError, match="first"):
        ScaleBenchConfig(**changes)


@pytest.mark.parametrize("config", [AnswersBenchConfig, ServeBenchConfig])
@pytest.mark.parametrize("songs", [(), (2_000, 500), (500, 500), (500, 2_000, 1_000)])
def test_catalogs_that_are_not_smallest_first_are_refused(
    config: type[AnswersBenchConfig] | type[ServeBenchConfig], songs: tuple[int, ...]
) -> None:
    expected = rf"songs is {re.escape(str(list(songs)))}; expected one or more integers, smallest first"
    with pytest.raises(InputError, match=expected):
        config(songs=songs)


@pytest.mark.parametrize("config", [AnswersBenchConfig, ServeBenchConfig])
@pytest.mark.parametrize("songs", [(500,), (500, 2_000, 10_000)])
def test_one_catalog_and_catalogs_that_are_smallest_first_are_accepted(
    config: type[AnswersBenchConfig] | type[ServeBenchConfig], songs: tuple[int, ...]
) -> None:
    assert config(songs=songs).songs == songs
