"""Costs of units from two runs: planted lines come back, and hours follow them."""

import pytest

from rayrec.bench.cluster_simulation import SimulatedCluster, simulate
from rayrec.bench.simulate_bench import DataScale, MeasuredRun, fit_lines, job_graph
from rayrec.jobs.runtime import UnitTime

BUCKETS, DRIVER = 8, 3.0
BY_PLAYS = {
    "PieceImporter": 1e-6,
    "BucketMerger": 2e-6,
    "GroupCounter": 3e-6,
    "RangeMerger": 1e-6,
    "BucketTastes": 5e-6,
}
BY_SONGS = {"SongRange": 1e-6, "_build": 2e-6, "build_and_save": 1e-6}
READ, QUERY, USER = 1e-7, 0.02, 0.004
FIXED = 0.1


def planted(times: int) -> MeasuredRun:
    """A run whose units cost what the constants above say."""
    size = DataScale(
        users=1_000 * times,
        plays=60_000 * times,
        songs=2_000 * times,
        buckets=BUCKETS,
        queries=400 * times,
        rank_queries=400 * times,
        pieces=BUCKETS,
    )
    plays = size.plays / BUCKETS
    costs = {name: (BUCKETS, FIXED + each * plays) for name, each in BY_PLAYS.items()}
    costs["RangeMerger"] = (1, FIXED + BY_PLAYS["RangeMerger"] * size.plays)
    costs |= {name: (1, FIXED + each * size.songs) for name, each in BY_SONGS.items()}
    costs["fit_vectors"] = (1, 4e-6 * size.plays)
    costs["_fit"] = (1, 2.0)
    costs["QueryCounter"] = (BUCKETS, READ * plays)
    costs["ExampleCollector"] = (BUCKETS, READ * plays + QUERY * size.rank_queries / BUCKETS)
    costs["BucketEvaluator"] = (BUCKETS, READ * plays + QUERY * size.queries / BUCKETS)
    costs["BucketRecommendations"] = (BUCKETS, FIXED + USER * size.users / BUCKETS)
    units = {
        name: [UnitTime(worker=name, cpu_seconds=seconds, setup_seconds=0.5)] * count
        for name, (count, seconds) in costs.items()
    }
    of_stage = {
        "import": ("PieceImporter", "SongRange", "BucketMerger"),
        "retrieval": ("GroupCounter", "RangeMerger", "_build"),
        "taste": ("BucketTastes",),
        "evaluate": ("QueryCounter", "BucketEvaluator"),
        "recommend": ("BucketRecommendations",),
    }
    seconds = {
        stage: DRIVER + sum(unit.cpu_seconds + unit.setup_seconds for name in names for unit in units[name])
        for stage, names in of_stage.items()
    }
    return MeasuredRun(size=size, units=units, seconds=seconds, train_plays_per_second=10_000.0, history_bytes=8.5)


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    return [planted(1), planted(4)]


def test_lines_are_those_that_were_planted(runs: list[MeasuredRun]) -> None:
    lines = fit_lines(runs)
    for name, each in {**BY_PLAYS, **BY_SONGS, "BucketRecommendations": USER}.items():
        assert lines[name].each == pytest.approx(each), name
        assert lines[name].fixed == pytest.approx(FIXED), name
    for name in ("ExampleCollector", "BucketEvaluator"):
        assert lines[name].each == pytest.approx(QUERY), name
        assert lines[name].fixed == pytest.approx(0, abs=1e-9), name
    assert all(line.setup == 0.5 for line in lines.values())


def test_the_hours_of_large_data_follow_the_lines(runs: list[MeasuredRun]) -> None:
    size = DataScale(
        users=10**6,
        plays=10**9,
        songs=10**5,
        buckets=512,
        queries=100_000,
        rank_queries=40_000,
        pieces=512,
    )
    fast = SimulatedCluster(
        nodes=16, cores=8, task_seconds=0.0, latency=0.0, requests_per_second=1e12, node_bytes_per_second=1e15
    )
    found = {stage.stage: stage for stage in simulate(job_graph(size, fit_lines(runs), runs, fast, epochs=4), fast)}
    rounds = 512 / 128
    assert found["taste"].seconds == pytest.approx(DRIVER + rounds * (FIXED + 5e-6 * 10**9 / 512) + 0.5)
    assert found["recommend"].seconds == pytest.approx(DRIVER + rounds * (FIXED + USER * 10**6 / 512) + 0.5)
    reading, answering = READ * 10**9 / 512, QUERY * 100_000 / 512
    counted = reading + 0.5  # of a few buckets, at once
    assert found["evaluate"].seconds == pytest.approx(DRIVER + counted + rounds * (reading + answering) + 0.5)
    assert found["embed"].seconds == pytest.approx(2 * 4 * 4e-6 * 10**9 / 8, rel=0.01)
    assert found["train"].seconds == pytest.approx(2 * 4 * 10**9 / 10_000 / 16, rel=0.01)
    assert found["train"].bottleneck == "workers"  # one a node
    # What follows the last checkpoint, ten minutes at most, and the wait for another node shared by sixteen.
    assert found["train"].lost_node_seconds < 2 * 600 + 240
    assert found["embed"].bottleneck == "one node"


def test_where_requests_take_long_object_storage_is_the_bottleneck(runs: list[MeasuredRun]) -> None:
    size = runs[1].size
    slow = SimulatedCluster(nodes=4, cores=2, task_seconds=0.0, latency=1.0)
    found = {stage.stage: stage for stage in simulate(job_graph(size, fit_lines(runs), runs, slow), slow)}
    assert found["taste"].storage > 0.5
    assert found["taste"].seconds > 6
