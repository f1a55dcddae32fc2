"""A plan's figures, compared with values computed by hand, and the problems that it reports."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from worlds import write_dataset

from rayrec import Workspace
from rayrec.data.histories import Histories
from rayrec.errors import InputError
from rayrec.jobs.planning.plan import Plan, StagePlan, make_plan
from rayrec.jobs.planning.plan_inputs import BUILT_IN_FROM, GIB, ClusterFile, DataSize, NodeType, PlanConfig, read_rates
from rayrec_cli.main import main

CPU = NodeType(name="cpu", cpus=8, gpus=0, memory=64 * GIB, disk=500 * 10**9, gpu_memory=None, most=4)
GPU = NodeType(name="gpu", cpus=8, gpus=2, memory=64 * GIB, disk=500 * 10**9, gpu_memory=24 * GIB, most=2)
HEAD = NodeType(name="head", cpus=0, gpus=0, memory=8 * GIB, disk=None, gpu_memory=None, most=1, head=True)
SMALL = ClusterFile(name="small", nodes=[HEAD, CPU, GPU], most_nodes=5)
DATA = DataSize(users=10**6, plays=10**8, songs=10**5, buckets=64, largest_bucket=2 * 10**6, looked_at=True)
RATES = {
    "import_plays_per_second_per_cpu": 1_000.0,
    "embed_tokens_per_second_per_cpu": 1_000.0,
    "train_plays_per_second_per_cpu": 1_000.0,
    "retrieval_plays_per_second_per_cpu": 1_000.0,
    "taste_plays_per_second_per_cpu": 1_000.0,
}
ROOT = Path(__file__).parents[4]


def new_plan(config: PlanConfig | None = None, data: DataSize = DATA, cluster: ClusterFile = SMALL) -> Plan:
    """A plan with rates of 1,000 plays or tokens per second and CPU."""
    return make_plan(data, cluster, config or PlanConfig(), RATES)


def stage(plan: Plan, name: str) -> StagePlan:
    """The stage `name` of a plan."""
    return next(item for item in plan.stages if item.stage == name)


def test_stages_over_users_take_all_cpus_and_hours_by_their_rate() -> None:
    taste = stage(new_plan(), "taste")
    assert (taste.nodes, taste.workers, taste.batches) == (4, 32, 64)
    assert taste.hours == pytest.approx(3_125 / 3600)  # 100 million plays at 32,000 per second


def test_nodes_of_several_types_each_give_their_own_cpus() -> None:
    large = replace(CPU, name="large", cpus=64, memory=180 * GIB, most=1)
    small = replace(CPU, name="small", cpus=8, memory=45 * GIB, most=9)
    mixed_cluster = ClusterFile(name="mixed", nodes=[HEAD, large, small], most_nodes=10)
    taste = stage(new_plan(data=replace(DATA, buckets=1_000), cluster=mixed_cluster), "taste")
    assert (taste.nodes, taste.workers) == (10, 64 + 9 * 8)
    assert taste.node == "large"  # with less memory per CPU, so that its memory is checked
    assert taste.memory_there == 180 * GIB


def test_cpus_of_the_head_change_nothing_where_other_nodes_have_cpus() -> None:
    head_with_cpus = replace(HEAD, cpus=4)
    plan = new_plan(cluster=replace(SMALL, nodes=[head_with_cpus, CPU, GPU]))
    assert (plan.stages, plan.problems) == (new_plan().stages, [])


def test_a_cluster_that_is_only_a_head_has_the_cpus_of_the_head() -> None:
    one_node = ClusterFile(name="one", nodes=[replace(HEAD, cpus=16, memory=64 * GIB)], most_nodes=0)
    plan = new_plan(cluster=one_node)
    assert (stage(plan, "taste").nodes, stage(plan, "taste").workers) == (1, 16)
    assert (stage(plan, "train").nodes, stage(plan, "train").workers) == (1, 1)
    assert plan.problems == []
    one_node_with_gpus = replace(one_node, nodes=[replace(GPU, most=1, head=True)])
    plan_on_gpus = new_plan(PlanConfig(gpu=True), cluster=one_node_with_gpus)
    assert (stage(plan_on_gpus, "train").nodes, stage(plan_on_gpus, "train").workers) == (1, 2)
    assert plan_on_gpus.problems == []


def test_no_more_cpus_work_than_there_are_buckets() -> None:
    taste = stage(new_plan(data=replace(DATA, buckets=16)), "taste")
    assert (taste.nodes, taste.workers) == (2, 16)
    assert taste.hours == pytest.approx(6_250 / 3600)


def test_the_workers_of_a_node_share_the_song_table() -> None:
    few, many = (stage(new_plan(data=replace(DATA, songs=songs)), "taste").memory for songs in (10**6, 10**7))
    assert many - few == 9 * 10**6 * 64 * 4  # once per node, shared by its eight workers


def test_requests_are_as_many_as_buckets_and_ranges_need() -> None:
    plan = new_plan(data=DataSize.assumed(users=10**8, plays=2 * 10**10, songs=10**7))
    assert 500_000 < (stage(plan, "import").requests or 0) < 1_000_000
    assert 4096 * 4 < (stage(plan, "taste").requests or 0) < 4096 * 40
    assert 10**6 < (stage(plan, "retrieval").requests or 0) < 2 * 10**6
    for name in ("embed", "train", "rank", "evaluate", "recommend"):
        assert 4096 * 4 < (stage(plan, name).requests or 0) < 4096 * 1000, name


def test_an_evaluation_takes_longer_for_more_queries_and_for_slower_reading() -> None:
    def hours(queries: int, read_rate: float) -> float:
        rates = {**RATES, "read_plays_per_second_per_cpu": read_rate, "evaluate_queries_per_second_per_cpu": 10.0}
        return stage(make_plan(DATA, SMALL, PlanConfig(queries=queries), rates), "evaluate").hours or 0.0

    assert 0 < hours(640, 10_000.0) < hours(64_000, 10_000.0) < hours(64_000, 1_000.0)


def test_recommendations_of_all_users_take_all_cpus_and_are_stored() -> None:
    rates = {**RATES, "recommend_users_per_second_per_cpu": 100.0}
    ten, twenty = (make_plan(DATA, SMALL, PlanConfig(k=k), rates) for k in (10, 20))
    assert stage(ten, "recommend").hours == pytest.approx(312.5 / 3600)  # a million users at 3,200 per second
    assert 10**8 < ten.storage["recommendations"] < twenty.storage["recommendations"] < 10**9


def test_the_store_of_states_grows_with_users_plays_and_the_network() -> None:
    plan = new_plan()
    assert plan.to_mapping()["states"] == plan.states
    for larger_plan in (
        new_plan(PlanConfig(hidden_dim=256)),
        new_plan(PlanConfig(dim=128)),
        new_plan(data=replace(DATA, users=2 * DATA.users)),
        new_plan(data=replace(DATA, plays=2 * DATA.plays)),
    ):
        assert larger_plan.states > plan.states
        assert larger_plan.storage["tastes"] > plan.storage["tastes"]


def test_an_evaluation_maps_tables_and_retrieval_once_a_node_and_leaves_the_object_store_alone() -> None:
    evaluation = stage(new_plan(data=replace(DATA, songs=3 * 10**7)), "evaluate")
    assert 30 * GIB < evaluation.memory < 8 * 30 * GIB
    assert evaluation.store == 0


def test_a_retrieval_of_many_songs_and_few_plays_needs_what_joining_the_ranges_takes() -> None:
    data = replace(DATA, users=10**4, plays=10**6, songs=10**8, buckets=4, largest_bucket=10**6 // 4)
    # 250 MiB of an idle worker, 2 MB, and 170 bytes for each of 100 million songs.
    assert stage(new_plan(data=data), "retrieval").memory == 262_144_000 + 2_000_000 + 17_000_000_000


def test_keys_of_songs_that_do_not_fit_into_the_object_store_are_a_problem() -> None:
    few, many = (new_plan(data=replace(DATA, songs=songs)) for songs in (10**7, 3 * 10**9))
    assert 0 < (stage(few, "import").store or 0) < (stage(many, "import").store or 0)
    assert [any("import puts" in text for text in plan.problems) for plan in (few, many)] == [False, True]


def test_a_disk_that_does_not_hold_two_releases_is_a_problem_of_the_server() -> None:
    """Each nightly release is copied while replicas answer with the one before."""
    rates = {**RATES, "answers_per_second_per_cpu": 100.0}
    serving = make_plan(DATA, SMALL, PlanConfig(), rates).serving
    assert serving is not None
    small_disk, large_disk = (
        replace(SMALL, nodes=[HEAD, replace(CPU, disk=int(releases * serving.shared_memory))]) for releases in (2, 3)
    )
    message = "the server keeps copies of 2 releases, .* on the disk of a cpu node"
    problems = [make_plan(DATA, cluster, PlanConfig(), rates).problems for cluster in (small_disk, large_disk)]
    assert [any(re.search(message, text) for text in texts) for texts in problems] == [True, False]


@pytest.mark.parametrize(("rate", "replicas", "nodes"), [(1.0, 1, 1), (700.0, 10, 2), (701.0, 11, 2)])
def test_replicas_answer_a_rate_of_requests_and_are_idle_a_third_of_the_time(
    rate: float, replicas: int, nodes: int
) -> None:
    rates = {**RATES, "answers_per_second_per_cpu": 100.0}
    serving = make_plan(DATA, SMALL, PlanConfig(serve_rate=rate), rates).serving
    assert (serving.replicas, serving.nodes) == (replicas, nodes)
    assert serving.node_memory > serving.replicas_per_node * serving.replica_memory + serving.shared_memory


def test_training_without_gpus_holds_the_tables_over_the_nodes_and_a_batch_on_each_worker() -> None:
    training = stage(new_plan(PlanConfig(workers=4)), "train")
    assert (training.node, training.nodes, training.workers) == ("cpu", 4, 4)
    assert training.hours == pytest.approx(600_000 / 3600)  # 24 epochs of 100 million plays at 4,000 per second
    packed_training = stage(new_plan(PlanConfig(workers=8)), "train")
    assert (packed_training.nodes, packed_training.hours) == (4, pytest.approx(300_000 / 3600))
    songs = 100 * DATA.songs
    training_of_many, packed_training_of_many = (
        stage(new_plan(PlanConfig(workers=n), replace(DATA, songs=songs)), "train") for n in (4, 8)
    )
    table_size = training_of_many.memory - training.memory
    assert table_size > 2 * 4 * (songs - DATA.songs) * 64 * 4 / 4  # two tables, moments and average; a quarter per node
    count_bytes = 20 * (songs - DATA.songs)  # for all songs on each worker: each node has a second worker here
    assert packed_training_of_many.memory - packed_training.memory == pytest.approx(table_size + count_bytes, rel=0.001)


@pytest.mark.parametrize("gpu", [False, True])
def test_the_memory_of_training_falls_with_the_workers_down_to_twenty_bytes_a_song(gpu: bool) -> None:
    many_nodes = replace(SMALL, nodes=[HEAD, replace(CPU, most=64), replace(GPU, gpus=1, most=64)], most_nodes=64)

    def memory(songs: int, workers: int) -> int:
        plan = new_plan(PlanConfig(workers=workers, gpu=gpu, nodes=64), replace(DATA, songs=songs), many_nodes)
        assert stage(plan, "train").nodes == workers
        return stage(plan, "train").memory

    growth = {workers: memory(2 * 10**7, workers) - memory(10**7, workers) for workers in (1, 2, 8, 64)}
    song_bytes = {workers: (growth[workers] / 10**7 - 20) * workers for workers in growth}
    assert song_bytes == pytest.approx(dict.fromkeys(growth, song_bytes[1]))
    assert song_bytes[1] == pytest.approx((10 if gpu else 14) * 64 * 4 + 16)


def test_training_on_gpus_has_one_worker_per_gpu_and_says_that_their_rate_is_unknown() -> None:
    plan = new_plan(PlanConfig(gpu=True))
    training = stage(plan, "train")
    assert (training.node, training.nodes, training.workers) == ("gpu", 2, 4)
    assert any("no GPU rate" in note for note in plan.notes)
    rates = {**RATES, "train_plays_per_second_per_gpu": 50_000.0}
    with_rate = stage(make_plan(DATA, SMALL, PlanConfig(gpu=True), rates), "train")
    assert with_rate.hours == pytest.approx(12_000 / 3600)  # 24 epochs of 100 million plays at 200,000 per second


def test_without_a_validation_range_there_is_one_fit() -> None:
    one_fit, two_fits = (new_plan(PlanConfig(validation=has_validation)) for has_validation in (False, True))
    for name in ("embed", "train", "retrieval"):
        assert stage(two_fits, name).hours == pytest.approx(2 * (stage(one_fit, name).hours or 0)), name
    assert stage(one_fit, "retrieval").hours == pytest.approx(3_125 / 3600)  # 100 million plays at 32,000 per second
    assert two_fits.storage["song embeddings"] == 2 * one_fit.storage["song embeddings"] > 0


def test_built_in_rates_fill_in_and_are_marked() -> None:
    plan = make_plan(DATA, SMALL, PlanConfig(), {"taste_plays_per_second_per_cpu": 5.0})
    assert stage(plan, "taste").rate_from == "the file of rates"
    assert stage(plan, "train").rate_from == BUILT_IN_FROM
    assert any("rayrec bench scale --save FILE" in note for note in plan.notes)
    assert any("evaluate is planned for `--models two-step,taste`" in note for note in plan.notes)
    assert stage(plan, "index").hours is None
    assert not any("built-in" in note for note in new_plan().notes)


@pytest.mark.parametrize(
    ("data", "cluster", "config", "message"),
    [
        ({"largest_bucket": 10**8}, SMALL, {}, "import needs .* on a cpu node, .* more --buckets, fewer CPUs per node"),
        ({"songs": 3 * 10**8}, SMALL, {}, "taste needs .* on a cpu node"),
        ({"songs": 10**8}, SMALL, {}, "import needs .* of memory on the head node for the songs, and head has 8.0 GiB"),
        ({"plays": 10**11}, SMALL, {}, "embed writes a corpus of .* to the disk of a cpu node"),
        (
            {"songs": 4 * 10**7},
            SMALL,
            {"gpu": True},
            "on each of 4 GPUs for song tables, optimizer state and averages, .* use more or larger",
        ),
        ({}, replace(SMALL, nodes=[HEAD, CPU]), {"gpu": True}, "has no node type with a GPU"),
        ({}, SMALL, {"batch": 2, "workers": 4}, "batch is 2, less than one window for each of 4"),
        ({}, SMALL, {"workers": 16, "nodes": 1}, "train has 16 workers, and the CPU nodes \\(1\\) have 8 CPUs"),
        ({}, SMALL, {"workers": 64}, "train has 64 workers, and the CPU nodes \\(4\\) have 32 CPUs"),
        ({}, SMALL, {"workers": 8, "gpu": True}, "8 workers with a GPU each, and cluster small has at most 4 GPUs"),
        ({}, replace(SMALL, most_nodes=1), {"workers": 4, "gpu": True}, "has at most 2 GPUs"),
        ({}, SMALL, {"nodes": 5}, "--nodes is 5, and cluster small has at most 4 CPU nodes"),
        ({}, replace(SMALL, most_nodes=3), {"nodes": 4}, "has at most 3 CPU nodes"),
        ({}, SMALL, {"workers": 3}, "workers is 3; expected a divisor of the 64 shards: 1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_what_will_not_fit_is_a_problem(
    data: dict[str, int], cluster: ClusterFile, config: dict[str, int], message: str
) -> None:
    plan = new_plan(PlanConfig(**config), replace(DATA, **data), cluster)
    assert any(re.search(message, text) for text in plan.problems), plan.problems


def test_what_fits_has_no_problems() -> None:
    assert new_plan().problems == []
    assert new_plan(PlanConfig(gpu=True)).problems == []
    assert new_plan(PlanConfig(workers=32)).problems == []
    assert new_plan(PlanConfig(workers=8, nodes=1)).problems == []
    assert new_plan(PlanConfig(workers=4, gpu=True)).problems == []


def test_cpus_for_training_are_those_of_the_largest_nodes() -> None:
    larger_node = replace(CPU, name="larger", cpus=64, memory=512 * GIB, most=1)
    mixed_cluster = replace(SMALL, nodes=[HEAD, CPU, larger_node])
    assert new_plan(PlanConfig(workers=64, nodes=1), cluster=mixed_cluster).problems == []
    assert new_plan(PlanConfig(workers=64, nodes=4), cluster=mixed_cluster).problems == []


@pytest.mark.parametrize(
    ("rate", "nodes", "songs", "message"),
    [
        (100.0, 1, DATA.songs, None),
        (2_000.0, 4, DATA.songs, None),
        (2_000.0, 3, DATA.songs, "the server needs 4 nodes for 2000 requests per second, and the plan has 3"),
        (100.0, 1, 2 * 10**8, "one replica of the server needs .* on a cpu node, which has 64.0 GiB"),
    ],
)
def test_a_server_that_does_not_fit_on_the_nodes_is_a_problem(
    rate: float, nodes: int, songs: int, message: str | None
) -> None:
    rates = {**RATES, "answers_per_second_per_cpu": 100.0}
    plan = make_plan(replace(DATA, songs=songs), SMALL, PlanConfig(serve_rate=rate, nodes=nodes), rates)
    server_problems = [text for text in plan.problems if "the server" in text]
    assert len(server_problems) == (message is not None)
    assert all(re.search(message or "", text) for text in server_problems)


@pytest.mark.parametrize(("gpus", "problems"), [(8, 0), (4, 0), (2, 1), (1, 1)])
def test_a_hundred_million_songs_are_trained_on_eight_gpus_of_80_gb_and_not_on_one(gpus: int, problems: int) -> None:
    """A table has 25.6 GB. Training holds two, each with two moments and an average; validation adds four tables."""
    machine = NodeType(name="gpus", cpus=96, gpus=gpus, memory=1_000 * GIB, disk=None, gpu_memory=80 * 10**9, most=1)
    plan = new_plan(
        PlanConfig(gpu=True), replace(DATA, songs=10**8), replace(SMALL, nodes=[HEAD, CPU, machine], most_nodes=5)
    )
    assert (stage(plan, "train").node, stage(plan, "train").workers) == ("gpus", gpus)
    training_problems = [text for text in plan.problems if text.startswith("train ")]
    assert len(training_problems) == problems, training_problems


def test_counts_alone_give_buckets_as_an_import_would() -> None:
    data = DataSize.assumed(users=10**8, plays=2 * 10**10, songs=10**7)
    assert data.buckets == 4096
    assert data.largest_bucket == pytest.approx(1.25 * 2 * 10**10 / 4096, rel=1e-3)
    assert DataSize.assumed(users=10, plays=100, songs=5).buckets == 16


def test_counts_are_given_together_and_at_least_1() -> None:
    with pytest.raises(InputError, match="plays is 0; expected an integer of at least 1"):
        PlanConfig(users=10, plays=0, songs=5)
    with pytest.raises(InputError, match="--users, --plays and --songs belong together"):
        PlanConfig(users=10, songs=5)


def test_rates_are_read_as_bench_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"rates": RATES, "machine": {"cpus": 2}, "commit": "abc"}))
    assert read_rates(str(path)) == RATES
    for text, message in [("[]", "has no rates"), ('{"rates": {"a": 0}}', "expected a number above 0")]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_rates(str(path))


def test_the_command_line_says_problems_by_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--json", "plan", "--cluster", str(ROOT / "cluster" / "aws.yaml"), "--songs", "1000000"]
    assert main([*command, "--users", "1000000", "--plays", "100000000"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["hours"] > 0
    assert report["storage"]["histories"] == 850_000_000
    assert main([*command, "--users", "1000000", "--plays", "10000000000000"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]
    assert main([*command, "--users", "5"]) == 2
    assert "--users, --plays and --songs belong together; give all of them, or none" in capsys.readouterr().err


def test_a_plan_reports_the_skew_of_the_data_set(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [3, 40_000, 5, 20, 7, 11, 2, 9]
    songs = [np.arange(length) % 50 for length in lengths]
    times = [np.arange(length) * 60_000 for length in lengths]
    users = [f"user-{number}" for number in range(len(lengths))]
    write_dataset(workspace, Histories.from_lists(songs, times, user_ids=users), num_songs=50)
    cluster = str(ROOT / "cluster" / "kuberay" / "raycluster.yaml")
    assert main(["--workspace", workspace.uri, "plan", "--cluster", cluster, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["skew"]["longest_histories"][0] == ["user-1", 40_000]
    assert report["data"]["largest_bucket"] == report["skew"]["largest_buckets"][0][1] > 0.8 * sum(lengths)
    assert report["data"]["looked_at"] is True
