"""The simulated cluster against times worked out by hand."""

import pytest

from rayrec.bench.cluster_simulation import SimulatedCluster, SimulatedStage, Work, simulate

CLUSTER = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.0)


def one(work: Work, cluster: SimulatedCluster = CLUSTER) -> SimulatedStage:
    (stage,) = simulate([work], cluster)
    return stage


def test_units_take_turns_on_all_cores() -> None:
    stage = one(Work(stage="s", name="w", units=80, cpu_seconds=2.0))
    assert stage.seconds == pytest.approx(80 / 8 * 2)
    assert (stage.busy, stage.idle, stage.bottleneck) == (pytest.approx(1), pytest.approx(0), "cores")


def test_the_last_round_leaves_cores_idle() -> None:
    stage = one(Work(stage="s", name="w", units=9, cpu_seconds=2.0))
    assert stage.seconds == pytest.approx(4)
    assert stage.idle == pytest.approx(1 - 9 / 16)
    assert one(Work(stage="s", name="w", units=2, cpu_seconds=2.0)).bottleneck == "few units"


def test_a_process_loads_once_and_work_on_one_node_leaves_the_others_idle() -> None:
    assert one(Work(stage="s", name="w", units=80, cpu_seconds=2.0, setup_seconds=5.0)).seconds == pytest.approx(25)
    alone = one(Work(stage="s", name="w", units=8, cpu_seconds=3.0, one_node=True))
    assert alone.seconds == pytest.approx(6)
    assert (alone.idle, alone.bottleneck) == (pytest.approx(0.5), "one node")


def test_where_a_node_takes_one_unit_at_a_time_the_workers_are_the_bottleneck() -> None:
    stage = one(Work(stage="s", name="w", units=8, cpu_seconds=3.0, per_node=1))
    assert stage.seconds == pytest.approx(8 / 2 * 3)
    assert (stage.busy, stage.bottleneck) == (pytest.approx(1 / 4), "workers")


def test_requests_wait_for_their_latency_and_for_what_the_storage_answers() -> None:
    slow = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.1, requests_per_second=1e9)
    stage = one(Work(stage="s", name="w", units=8, cpu_seconds=1.0, requests=30), slow)
    assert stage.seconds == pytest.approx(1 + 30 * 0.1)
    assert stage.bottleneck == "object storage"
    full = SimulatedCluster(nodes=2, cores=4, task_seconds=0.0, latency=0.0, requests_per_second=10)
    assert one(Work(stage="s", name="w", units=8, cpu_seconds=0.0, requests=30), full).seconds == pytest.approx(24)


def test_bytes_share_the_line_of_their_node() -> None:
    narrow = SimulatedCluster(nodes=1, cores=4, task_seconds=0.0, latency=0.0, node_bytes_per_second=100.0)
    assert one(Work(stage="s", name="w", units=4, cpu_seconds=0.0, data_bytes=50.0), narrow).seconds == pytest.approx(2)


def test_kinds_and_stages_follow_each_other() -> None:
    works = [
        Work(stage="a", name="first", units=8, cpu_seconds=1.0),
        Work(stage="b", name="other", units=8, cpu_seconds=5.0),
        Work(stage="a", name="second", units=1, cpu_seconds=2.0),
    ]
    assert [(stage.stage, stage.seconds) for stage in simulate(works, CLUSTER)] == [("a", 3.0), ("b", 5.0)]


def test_a_lost_node_costs_its_units_and_the_time_without_it() -> None:
    cluster = SimulatedCluster(nodes=2, cores=1, task_seconds=0.0, latency=0.0, replace_seconds=4.0)
    stage = one(Work(stage="s", name="w", units=20, cpu_seconds=2.0), cluster)
    # Lost at 10, at the end of its fifth unit: 11 units are left. The other does two until 14, then both do nine.
    assert stage.seconds == pytest.approx(20)
    assert stage.lost_node_seconds == pytest.approx(14 + 5 * 2 - 20)


def test_spot_nodes_that_go_all_the_time_still_finish_and_say_what_was_lost() -> None:
    calm = SimulatedCluster(nodes=4, cores=2, task_seconds=0.0, latency=0.0, replace_seconds=60.0)
    spot = SimulatedCluster(
        nodes=4, cores=2, task_seconds=0.0, latency=0.0, replace_seconds=60.0, losses_per_node_hour=6.0
    )
    work = Work(stage="s", name="w", units=400, cpu_seconds=60.0, spread=0.2)
    steady, lossy = one(work, calm), one(work, spot)
    assert lossy.seconds > 1.05 * steady.seconds
    assert 0 < lossy.lost < 0.2
    assert steady.lost == 0
    assert one(work, spot) == lossy
