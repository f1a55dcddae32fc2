"""The simulated cluster on cases computed by hand, and the work and costs that it simulates."""

from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules

import pytest

from rayrec import importing, jobs
from rayrec.bench.simulate_bench import (
    DataScale,
    MeasuredRun,
    SimulatedCluster,
    SimulatedStage,
    Work,
    fit_lines,
    job_graph,
    simulate,
)
from rayrec.errors import InputError
from rayrec.jobs.runtime import UnitTime

CLUSTER = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.0)


def simulate_one(work: Work, cluster: SimulatedCluster = CLUSTER) -> SimulatedStage:
    (stage,) = simulate([work], cluster)
    return stage


def test_units_take_turns_on_all_cores() -> None:
    stage = simulate_one(Work(stage="s", name="w", units=80, cpu_seconds=2.0))
    assert stage.seconds == pytest.approx(80 / 8 * 2)
    assert (stage.busy, stage.idle, stage.bottleneck) == (pytest.approx(1), pytest.approx(0), "cores")


def test_the_last_round_leaves_cores_idle() -> None:
    stage = simulate_one(Work(stage="s", name="w", units=9, cpu_seconds=2.0))
    assert stage.seconds == pytest.approx(4)
    assert stage.idle == pytest.approx(1 - 9 / 16)
    assert simulate_one(Work(stage="s", name="w", units=2, cpu_seconds=2.0)).bottleneck == "few units"


def test_a_process_loads_once_and_work_on_one_node_leaves_the_others_idle() -> None:
    assert simulate_one(
        Work(stage="s", name="w", units=80, cpu_seconds=2.0, setup_seconds=5.0)
    ).seconds == pytest.approx(25)
    stage = simulate_one(Work(stage="s", name="w", units=8, cpu_seconds=3.0, one_node=True))
    assert stage.seconds == pytest.approx(6)
    assert (stage.idle, stage.bottleneck) == (pytest.approx(0.5), "one node")


def test_where_a_node_takes_one_unit_at_a_time_the_workers_are_the_bottleneck() -> None:
    stage = simulate_one(Work(stage="s", name="w", units=8, cpu_seconds=3.0, per_node=1))
    assert stage.seconds == pytest.approx(8 / 2 * 3)
    assert (stage.busy, stage.bottleneck) == (pytest.approx(1 / 4), "workers")


def test_requests_wait_for_their_latency_and_for_what_the_storage_answers() -> None:
    slow_storage = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.1, requests_per_second=1e9)
    stage = simulate_one(Work(stage="s", name="w", units=8, cpu_seconds=1.0, requests=30), slow_storage)
    assert stage.seconds == pytest.approx(1 + 30 * 0.1)
    assert stage.bottleneck == "object storage"
    limited_storage = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.0, requests_per_second=10)
    assert simulate_one(
        Work(stage="s", name="w", units=8, cpu_seconds=0.0, requests=30), limited_storage
    ).seconds == pytest.approx(24)


def test_bytes_share_the_network_of_their_node() -> None:
    narrow_cluster = SimulatedCluster(nodes=1, cores=4, task_seconds=0.0, latency=0.0, node_bytes_per_second=100.0)
    assert simulate_one(
        Work(stage="s", name="w", units=4, cpu_seconds=0.0, data_bytes=50.0), narrow_cluster
    ).seconds == pytest.approx(2)


def test_the_works_of_a_stage_run_one_after_another() -> None:
    works = [
        Work(stage="a", name="first", units=8, cpu_seconds=1.0),
        Work(stage="b", name="other", units=8, cpu_seconds=5.0),
        Work(stage="a", name="second", units=1, cpu_seconds=2.0),
    ]
    assert [(stage.stage, stage.seconds) for stage in simulate(works, CLUSTER)] == [("a", 3.0), ("b", 5.0)]


def test_a_lost_node_costs_its_units_and_the_time_without_it() -> None:
    cluster = SimulatedCluster(nodes=2, cores=1, task_seconds=0.0, latency=0.0, replace_seconds=4.0)
    stage = simulate_one(Work(stage="s", name="w", units=20, cpu_seconds=2.0), cluster)
    # One node is lost at 10 s, at the end of its fifth unit, which is lost too: 11 units are left.
    # The other node does two of them until 14 s, then both do nine.
    assert stage.seconds == pytest.approx(20)
    assert stage.lost_node_seconds == pytest.approx(14 + 5 * 2 - 20)


def test_a_node_lost_from_work_that_runs_together_stops_all_of_it_until_it_is_replaced() -> None:
    cluster = SimulatedCluster(nodes=6, cores=2, task_seconds=0.0, latency=0.0, replace_seconds=240.0)
    work = Work(stage="s", name="w", units=20, cpu_seconds=100.0, nodes=4, together=True, per_node=1)
    stage = simulate_one(work, cluster)
    assert stage.seconds == pytest.approx(20 / 4 * 100)
    # One node is lost at 250 s, in the middle of the third units: all four begin again at 490 s.
    assert stage.lost_node_seconds == pytest.approx(50 + 240)


def test_work_on_spot_nodes_that_are_often_lost_finishes_and_reports_the_lost_share() -> None:
    calm_cluster = SimulatedCluster(nodes=4, cores=2, task_seconds=0.0, latency=0.0, replace_seconds=60.0)
    spot_cluster = SimulatedCluster(
        nodes=4, cores=2, task_seconds=0.0, latency=0.0, replace_seconds=60.0, losses_per_node_hour=6.0
    )
    work = Work(stage="s", name="w", units=400, cpu_seconds=60.0, spread=0.2)
    steady_stage, lossy_stage = simulate_one(work, calm_cluster), simulate_one(work, spot_cluster)
    assert lossy_stage.seconds > 1.05 * steady_stage.seconds
    assert 0 < lossy_stage.lost < 0.2
    assert steady_stage.lost == 0
    assert simulate_one(work, spot_cluster) == lossy_stage


def test_each_lost_node_costs_work_that_runs_together_the_unfinished_units_of_all_nodes() -> None:
    spot_cluster = SimulatedCluster(
        nodes=4, cores=1, task_seconds=0.0, latency=0.0, replace_seconds=60.0, losses_per_node_hour=2.0
    )
    separate_work = Work(stage="s", name="w", units=400, cpu_seconds=60.0)
    separate_stage = simulate_one(separate_work, spot_cluster)
    joint_stage = simulate_one(replace(separate_work, together=True), spot_cluster)
    assert joint_stage.lost > 2 * separate_stage.lost > 0
    assert joint_stage.seconds > separate_stage.seconds


def test_losses_that_let_work_that_runs_together_hardly_ever_end_are_refused() -> None:
    spot_cluster = SimulatedCluster(nodes=64, cores=1, losses_per_node_hour=1.0)
    work = Work(stage="train", name="w", units=64, cpu_seconds=600.0, together=True, per_node=1)
    with pytest.raises(InputError, match=r"train on 64 nodes loses 10\.7 nodes on average .* expected at most 5"):
        simulate_one(work, spot_cluster)
    assert simulate_one(replace(work, nodes=16), spot_cluster).seconds > 600


BUCKETS, DRIVER_SECONDS = 8, 3.0
PLAY_SECONDS = {
    "PieceImporter": 1e-6,
    "BucketMerger": 2e-6,
    "GroupCounter": 3e-6,
    "RangeMerger": 1e-6,
    "BucketTastes": 5e-6,
}
FIT_WORKERS = ("fit_vectors", "GroupCounter", "RangeMerger", "build_retrieval")  # run in both fits, over all data
SONG_SECONDS = {"SongRange": 1e-6, "build_retrieval": 2e-6, "build_and_save": 1e-6}
READ_SECONDS, QUERY_SECONDS, USER_SECONDS = 1e-7, 0.02, 0.004
FIXED_SECONDS = 0.1


def planted_run(times: int) -> MeasuredRun:
    """Return a run with a validation range on data of `times` the size; its units cost what the constants above say."""
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
    costs = {name: (BUCKETS, FIXED_SECONDS + cost * plays) for name, cost in PLAY_SECONDS.items()}
    costs["RangeMerger"] = (1, FIXED_SECONDS + PLAY_SECONDS["RangeMerger"] * size.plays)
    costs |= {name: (1, FIXED_SECONDS + cost * size.songs) for name, cost in SONG_SECONDS.items()}
    costs["fit_vectors"] = (1, 4e-6 * size.plays)
    costs["RankerTrainer"] = (3, 2.0)
    costs["QueryCounter"] = (BUCKETS, READ_SECONDS * plays)
    costs["ExampleCollector"] = (BUCKETS, READ_SECONDS * plays + QUERY_SECONDS * size.rank_queries / BUCKETS)
    costs["BucketEvaluator"] = (BUCKETS, READ_SECONDS * plays + QUERY_SECONDS * size.queries / BUCKETS)
    costs["BucketRecommendations"] = (BUCKETS, FIXED_SECONDS + USER_SECONDS * size.users / BUCKETS)
    costs |= {name: (2 * costs[name][0], costs[name][1]) for name in FIT_WORKERS}
    units = {
        name: [UnitTime(worker=name, cpu_seconds=seconds, setup_seconds=0.5)] * count
        for name, (count, seconds) in costs.items()
    }
    stage_workers = {
        "import": ("PieceImporter", "SongRange", "BucketMerger"),
        "retrieval": ("GroupCounter", "RangeMerger", "build_retrieval"),
        "taste": ("BucketTastes",),
        "evaluate": ("QueryCounter", "BucketEvaluator"),
        "recommend": ("BucketRecommendations",),
    }
    seconds = {
        stage: DRIVER_SECONDS + sum(unit.cpu_seconds + unit.setup_seconds for name in names for unit in units[name])
        for stage, names in stage_workers.items()
    }
    return MeasuredRun(size=size, units=units, seconds=seconds, train_plays_per_second=10_000.0, history_bytes=8.5)


@pytest.fixture(scope="module")
def runs() -> list[MeasuredRun]:
    return [planted_run(1), planted_run(4)]


def test_lines_are_those_that_were_planted(runs: list[MeasuredRun]) -> None:
    lines = fit_lines(runs)
    for name, cost in {**PLAY_SECONDS, **SONG_SECONDS, "BucketRecommendations": USER_SECONDS}.items():
        assert lines[name].each == pytest.approx(cost), name
        assert lines[name].fixed == pytest.approx(FIXED_SECONDS), name
    for name in ("ExampleCollector", "BucketEvaluator"):
        assert lines[name].each == pytest.approx(QUERY_SECONDS), name
        assert lines[name].fixed == pytest.approx(0, abs=1e-9), name
    assert lines["fit_vectors"].each == pytest.approx(4e-6)
    assert all(line.setup == 0.5 for line in lines.values())


def test_the_simulation_of_a_measured_run_computes_as_long_as_the_run_did(runs: list[MeasuredRun]) -> None:
    run = runs[-1]
    one_core = SimulatedCluster(nodes=1, cores=1, task_seconds=0.0, latency=0.0, requests_per_second=1e12)
    works = job_graph(run.size, fit_lines(runs), runs, one_core, epochs=1)
    seconds = {stage.stage: stage.seconds for stage in simulate(works, one_core)}
    assert seconds["embed"] == pytest.approx(sum(unit.cpu_seconds for unit in run.units["fit_vectors"]))
    retrieval_seconds = sum(unit.cpu_seconds for name in FIT_WORKERS[1:] for unit in run.units[name])
    simulated_seconds = (
        sum(work.units * work.cpu_seconds for work in works if work.stage == "retrieval") - DRIVER_SECONDS
    )
    assert simulated_seconds == pytest.approx(retrieval_seconds)


def test_every_unit_is_a_worker_of_a_job(runs: list[MeasuredRun]) -> None:
    works = job_graph(runs[-1].size, fit_lines(runs), runs, CLUSTER)
    units = {work.name for work in works if work.stage not in ("embed", "train")} - {"driver"}
    names = [
        f"{package.__name__}.{info.name}" for package in (jobs, importing) for info in iter_modules(package.__path__)
    ]
    modules = [import_module(name) for name in names]
    assert units <= {name for module in modules for name in vars(module)}
    assert "RankerTrainer" in units


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
    fast_cluster = SimulatedCluster(
        nodes=16, cores=8, task_seconds=0.0, latency=0.0, requests_per_second=1e12, node_bytes_per_second=1e15
    )
    stages = {
        stage.stage: stage
        for stage in simulate(job_graph(size, fit_lines(runs), runs, fast_cluster, epochs=4), fast_cluster)
    }
    rounds = 512 / 128
    assert stages["taste"].seconds == pytest.approx(
        DRIVER_SECONDS + rounds * (FIXED_SECONDS + 5e-6 * 10**9 / 512) + 0.5
    )
    assert stages["recommend"].seconds == pytest.approx(
        DRIVER_SECONDS + rounds * (FIXED_SECONDS + USER_SECONDS * 10**6 / 512) + 0.5
    )
    read_seconds, answer_seconds = READ_SECONDS * 10**9 / 512, QUERY_SECONDS * 100_000 / 512
    count_seconds = read_seconds + 0.5  # the queries of a few buckets, all at once
    assert stages["evaluate"].seconds == pytest.approx(
        DRIVER_SECONDS + count_seconds + rounds * (read_seconds + answer_seconds) + 0.5
    )
    assert stages["embed"].seconds == pytest.approx(2 * 4 * 4e-6 * 10**9 / 8, rel=0.01)
    assert stages["train"].seconds == pytest.approx(2 * 4 * 10**9 / 10_000 / 16, rel=0.01)
    assert stages["train"].bottleneck == "workers"  # one worker per node
    # A lost node costs the work since the last checkpoint, about ten minutes at most, and a share of the wait for a
    # new node. The bound is generous.
    assert stages["train"].lost_node_seconds < 2 * 600 + 240
    assert stages["embed"].bottleneck == "one node"


def test_nodes_without_a_training_worker_do_not_speed_up_a_training(runs: list[MeasuredRun]) -> None:
    size = replace(runs[-1].size, plays=10**9)

    def train_seconds(nodes: int) -> float:
        cluster = SimulatedCluster(nodes=nodes, cores=8, task_seconds=0.0, latency=0.0, requests_per_second=1e12)
        works = [work for work in job_graph(size, fit_lines(runs), runs, cluster) if work.stage == "train"]
        (stage,) = simulate(works, cluster)
        return stage.seconds

    assert train_seconds(100) == pytest.approx(train_seconds(64))
    assert train_seconds(64) == pytest.approx(train_seconds(32) / 2, rel=0.02)


def test_where_requests_take_long_object_storage_is_the_bottleneck(runs: list[MeasuredRun]) -> None:
    size = runs[1].size
    slow_cluster = SimulatedCluster(nodes=4, cores=2, task_seconds=0.0, latency=1.0)
    stages = {
        stage.stage: stage for stage in simulate(job_graph(size, fit_lines(runs), runs, slow_cluster), slow_cluster)
    }
    assert stages["taste"].storage > 0.5
    assert stages["taste"].seconds > 6
