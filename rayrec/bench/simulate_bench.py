"""`rayrec bench simulate`: hours of every stage on a large cluster, from the cost of its units on this machine.

All stages run here on two sizes of generated data, and the CPU time of each unit of work is recorded. The cost of a
unit at any other size lies on the straight line through the two. An event simulation of the cluster then processes the
units, with its cores, its object storage and lost nodes. It does not use the formulas of `rayrec plan`; the hours of
`rayrec plan`, computed with rates of the same runs, are reported next to its own.
"""

import heapq
import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from rayrec.bench.bench_config import SimulateBenchConfig
from rayrec.bench.rounds import PlainProcess
from rayrec.bench.scale_bench import write_plays
from rayrec.bench.stage_benches import bench_dataset
from rayrec.config import Settings
from rayrec.data.dataset import Dataset
from rayrec.data.split import SplitConfig
from rayrec.data.windows import divisors
from rayrec.display import progress
from rayrec.embeddings.word2vec import MAX_WORKERS, EmbedConfig
from rayrec.errors import InputError
from rayrec.evaluation.protocol import COUNTED_BUCKETS, EvaluateConfig
from rayrec.importing.import_plan import MAX_BUCKETS, MAX_PIECES, MIN_BUCKETS, ImportConfig, bucket_groups
from rayrec.importing.staging import PLAYS_PER_ROW_GROUP
from rayrec.importing.vocabulary import key_ranges
from rayrec.jobs.pipeline import ReleaseConfig, Stages
from rayrec.jobs.planning.plan import make_plan
from rayrec.jobs.planning.plan_inputs import ClusterFile, DataSize, NodeType, PlanConfig
from rayrec.jobs.recommend_all import recommend_all
from rayrec.jobs.runtime import UnitTime, ray_cluster, unit_times
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend.answer import RecommendConfig
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.stored_retrieval import song_ranges
from rayrec.recommend.two_step import KINDS as RANKERS
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage.releases import active_release
from rayrec.storage.workspace import HISTORIES, Workspace

MAX_UNIT_LOSSES = 5.0  # mean lost nodes during a unit of work that runs together; it is begun e ** 5 = 148 times


@dataclass(frozen=True, kw_only=True)
class Work:
    """Units of work of one kind, which begin when all units of the kind before have ended."""

    stage: str
    name: str
    units: int
    cpu_seconds: float  # per unit
    setup_seconds: float = 0.0  # additional CPU time of a core's first unit, whose process must load its data
    requests: float = 0.0  # per unit, to object storage, one after another
    data_bytes: float = 0.0  # per unit, from and to object storage
    one_node: bool = False  # True if all units run on the cores of one node
    nodes: int | None = None  # nodes that run units; by default all
    together: bool = False  # True if a lost node stops the units of all nodes until it is replaced
    per_node: int | None = None  # units at once on a node; by default one per core
    spread: float = 0.0  # standard deviation of the units' seconds over their mean


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """The nodes of a cluster, and its object storage."""

    nodes: int
    cores: int  # per node
    task_seconds: float = 0.005  # to send a unit to a process and its result back
    latency: float = 0.03  # seconds per request to object storage
    requests_per_second: float = 20_000.0  # that the storage answers, for all nodes together
    node_bytes_per_second: float = 1.2e9  # between a node and the storage
    losses_per_node_hour: float = 0.0  # of spot nodes, per node
    replace_seconds: float = 240.0  # until a new node replaces a lost one


@dataclass(frozen=True, kw_only=True)
class SimulatedStage:
    """The time of a stage. Shares are of the time of all cores during the stage."""

    stage: str
    seconds: float
    busy: float  # share spent on computing
    storage: float  # share spent on waiting for object storage
    lost: float  # share spent on work that was lost with a node
    idle: float
    bottleneck: str  # cores, object storage, one node, workers (fewer than cores), or few units
    lost_node_seconds: float  # by which the stage takes longer if a node is lost in its middle


def simulate(works: Sequence[Work], cluster: SimulatedCluster, seed: int = 0) -> list[SimulatedStage]:
    """Simulate the stages of `works` one after the other, in the order in which they first appear.

    Raises `InputError` if nodes are lost so often that work that runs together would hardly ever end.
    """
    for work in works:
        _require_rare_losses(work, cluster)
    rng = np.random.default_rng(seed)
    stages = []
    for name in dict.fromkeys(work.stage for work in works):
        stage_works = [work for work in works if work.stage == name]
        runs = [_simulate_units(work, cluster, rng) for work in stage_works]
        seconds = sum(run.seconds for run in runs)
        core_seconds = cluster.nodes * cluster.cores * max(seconds, 1e-9)
        busy, storage, lost = (
            sum(getattr(run, field) for run in runs) / core_seconds for field in ("busy", "storage", "lost")
        )
        lost_node_seconds = 0.0
        if cluster.nodes > 1:
            stable_cluster = replace(cluster, losses_per_node_hour=0.0)
            longest_index = max(range(len(stage_works)), key=lambda index: runs[index].seconds)
            normal_seconds = _simulate_units(
                stage_works[longest_index], stable_cluster, np.random.default_rng(seed)
            ).seconds
            seconds_with_loss = _simulate_units(
                stage_works[longest_index], stable_cluster, np.random.default_rng(seed), lost_at=normal_seconds / 2
            ).seconds
            lost_node_seconds = max(0.0, seconds_with_loss - normal_seconds)
        idle = max(0.0, 1 - busy - storage - lost)
        stages.append(
            SimulatedStage(
                stage=name,
                seconds=seconds,
                busy=busy,
                storage=storage,
                lost=lost,
                idle=idle,
                bottleneck=_bottleneck(stage_works, runs, busy, storage),
                lost_node_seconds=lost_node_seconds,
            )
        )
    return stages


def _require_rare_losses(work: Work, cluster: SimulatedCluster) -> None:
    nodes = work.nodes or cluster.nodes
    unit_losses = nodes * cluster.losses_per_node_hour * work.cpu_seconds / 3600
    if work.together and unit_losses > MAX_UNIT_LOSSES:
        raise InputError(
            f"{work.stage} on {nodes} nodes loses {unit_losses:.1f} nodes on average per unit of "
            f"{work.cpu_seconds:.0f} seconds and begins the unit again each time; expected at most "
            f"{MAX_UNIT_LOSSES:g}: use fewer --losses or --nodes"
        )


def _bottleneck(stage_works: Sequence[Work], runs: Sequence["_Run"], busy: float, storage: float) -> str:
    one_node_seconds = sum(run.seconds for work, run in zip(stage_works, runs, strict=True) if work.one_node)
    if one_node_seconds > 0.5 * sum(run.seconds for run in runs):
        return "one node"
    if all(work.per_node for work in stage_works):
        return "workers"
    if busy + storage < 0.5:
        return "few units"
    return "cores" if busy >= storage else "object storage"


@dataclass
class _Run:
    """Seconds that the units of one kind took, and their core seconds by use."""

    seconds: float = 0.0
    busy: float = 0.0
    storage: float = 0.0
    lost: float = 0.0


def _simulate_units(
    work: Work, cluster: SimulatedCluster, rng: np.random.Generator, lost_at: float | None = None
) -> _Run:
    """Simulate the units of one kind; at second `lost_at`, if given, the first node is lost."""
    nodes = 1 if work.one_node else work.nodes or cluster.nodes
    queued_sizes = deque(np.maximum(0.1, 1 + work.spread * rng.standard_normal(work.units)).tolist())
    cores_per_node = work.per_node or cluster.cores
    free_cores = [(node, core) for core in range(cores_per_node) for node in range(nodes)][::-1]
    running_units: dict[tuple[int, int], tuple[int, float, float]] = {}  # core -> unit number, relative size, start
    ready_cores: set[tuple[int, int]] = set()  # cores whose process has loaded its data
    lost_nodes: set[int] = set()
    event_numbers, run = count(), _Run()
    events: list[tuple[float, int, str, tuple[int, int], int]] = []

    def schedule(event_time: float, kind: str, core: tuple[int, int], unit: int = -1) -> None:
        heapq.heappush(events, (event_time, next(event_numbers), kind, core, unit))

    def schedule_loss(now: float, node: int) -> None:
        if cluster.losses_per_node_hour:
            schedule(now + rng.exponential(3600 / cluster.losses_per_node_hour), "lost", (node, 0))

    for node in range(nodes):
        schedule_loss(0.0, node)
    if lost_at is not None:
        schedule(lost_at, "lost", (0, 0))
    now = answered_at = 0.0  # when the storage will have answered all requests so far
    unit_seconds: dict[int, tuple[float, float]] = {}  # unit -> seconds of computing and of waiting
    while queued_sizes or running_units:
        while queued_sizes and free_cores and not (work.together and lost_nodes):
            core, size = free_cores.pop(), queued_sizes.popleft()
            compute_seconds = (
                cluster.task_seconds + size * work.cpu_seconds + (0 if core in ready_cores else work.setup_seconds)
            )
            answered_at = max(answered_at, now) + work.requests / cluster.requests_per_second
            transfer = work.data_bytes * size / (cluster.node_bytes_per_second / cluster.cores)
            wait_seconds = max(work.requests * cluster.latency, answered_at - now) + transfer
            unit = next(event_numbers)
            running_units[core], unit_seconds[unit] = (unit, size, now), (compute_seconds, wait_seconds)
            schedule(now + compute_seconds + wait_seconds, "end", core, unit)
        now, _, kind, core, unit = heapq.heappop(events)
        if kind == "end" and core in running_units and running_units[core][0] == unit:
            del running_units[core]
            compute_seconds, wait_seconds = unit_seconds.pop(unit)
            run.busy, run.storage = run.busy + compute_seconds, run.storage + wait_seconds
            ready_cores.add(core)
            free_cores.append(core)
        elif kind == "lost" and core[0] not in lost_nodes:
            lost_nodes.add(core[0])
            for core_id in [core_id for core_id in running_units if work.together or core_id[0] == core[0]]:
                unit, size, started = running_units.pop(core_id)
                run.lost += now - started
                queued_sizes.appendleft(size)
                free_cores.append(core_id)
            free_cores = [core_id for core_id in free_cores if core_id[0] != core[0]]
            ready_cores = {core_id for core_id in ready_cores if not work.together and core_id[0] != core[0]}
            schedule(now + cluster.replace_seconds, "back", core)
        elif kind == "back":
            lost_nodes.discard(core[0])
            free_cores += [(core[0], core_id) for core_id in range(cores_per_node)]
            schedule_loss(now, core[0])
    run.seconds = now
    return run


BUCKETS = 8
SIZES = (1, 4)  # multiples of `measured_users` and `measured_songs`
QUERIES = 400  # of evaluate and of rank on the smaller data set, four times as many on the larger
TREES = 50
PLAYS_PER_BUCKET = 2_000_000  # in a large import: 64 MiB of text
GIB = 1 << 30
FITS = ("selection", "final")  # fits of a run that has a validation range
FITTED = ("fit_vectors", "GroupCounter", "RangeMerger", "build_retrieval")  # workers whose units run again in each fit
CHECKED_STAGES = (
    "import",
    "retrieval",
    "taste",
    "evaluate",
    "recommend",
)  # stages whose units are shared by several nodes


@dataclass(frozen=True, kw_only=True)
class DataScale:
    """The size of the data of one run."""

    users: int
    plays: int
    songs: int
    buckets: int
    queries: int  # of evaluate
    rank_queries: int
    pieces: int  # of the input of an import


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """One run of all stages on this machine."""

    size: DataScale
    units: dict[str, list[UnitTime]]  # worker -> its units; those of FITTED are of both fits
    seconds: dict[str, float]  # stage -> seconds from start to end
    train_plays_per_second: float
    history_bytes: float  # bytes per stored play


@dataclass(frozen=True, kw_only=True)
class Line:
    """CPU seconds of a unit as a straight line: `fixed`, plus `each` per play, song, query or user in the unit.

    `setup` is the additional CPU seconds of the first unit of a process, `spread` the standard deviation of the units
    over their mean.
    """

    fixed: float
    each: float
    setup: float
    spread: float

    def at(self, amount: float) -> float:
        """Return the CPU seconds of a unit that holds `amount` plays, songs, queries or users."""
        return self.fixed + self.each * amount


def bench_simulate(bench_workspace: Workspace, config: SimulateBenchConfig) -> dict[str, Any]:
    """Measure the stages on this machine and simulate them on a cluster; with `check`, compare with three local nodes.

    `stages` has for each stage hours, plan_hours (of `rayrec plan` with the rates of the same runs), the shares busy,
    storage, lost and idle of the cores' time, bottleneck and lost_node_seconds. `check` has measured and simulated
    seconds on three local nodes, and their ratio. Raises `InputError` if `losses` are so many that a training would
    hardly ever end.
    """
    runs = [_measure_run(bench_workspace, config, multiple) for multiple in SIZES]
    lines = fit_lines(runs)
    size = DataScale(
        users=config.users,
        plays=config.plays,
        songs=config.songs,
        buckets=min(MAX_BUCKETS, max(MIN_BUCKETS, -(-config.plays // PLAYS_PER_BUCKET))),
        queries=100_000,
        rank_queries=RankConfig().queries,
        pieces=min(MAX_PIECES, max(1, config.plays // PLAYS_PER_BUCKET)),
    )
    cluster = SimulatedCluster(
        nodes=config.nodes,
        cores=config.cores,
        latency=config.latency,
        requests_per_second=config.requests_per_second,
        losses_per_node_hour=config.losses,
    )
    works = job_graph(size, lines, runs, cluster, epochs=config.epochs)
    simulated_stages = simulate(works, cluster, config.seed)
    planned_hours = _planned_hours(size, cluster, runs[-1], config)
    result: dict[str, Any] = {
        "name": "simulate",
        "unit": "hours",
        "users": size.users,
        "plays": size.plays,
        "songs": size.songs,
        "nodes": cluster.nodes,
        "cores": cluster.cores,
        "hours": sum(stage.seconds for stage in simulated_stages) / 3600,
        "stages": [_row(stage, planned_hours) for stage in simulated_stages],
    }
    if config.check:
        result["check"] = _check(bench_workspace, config, lines, runs)
    return result


def fit_lines(runs: Sequence[MeasuredRun]) -> dict[str, Line]:
    """Return for each worker the line through its units in the smaller and in the larger run.

    For ExampleCollector and BucketEvaluator, whose lines are per query, the time to read plays is subtracted first;
    `job_graph` adds it again.
    """
    small, large = runs
    read_seconds = _slope("QueryCounter", small, large, 0.0)
    return {
        worker: _line(worker, small, large, read_seconds if worker in ("ExampleCollector", "BucketEvaluator") else 0.0)
        for worker in large.units
        if worker in small.units
    }


def _line(worker: str, small: MeasuredRun, large: MeasuredRun, read_seconds: float) -> Line:
    slope = _slope(worker, small, large, read_seconds)
    costs = np.array([unit.cpu_seconds for unit in large.units[worker]])
    amount, unit_plays = _measured_amount(worker, large), large.size.plays / len(costs)
    return Line(
        fixed=max(0.0, float(costs.mean()) - slope * amount - read_seconds * unit_plays),
        each=slope,
        setup=max(unit.setup_seconds for unit in large.units[worker]),
        spread=float(costs.std() / max(costs.mean(), 1e-9)),
    )


def _slope(worker: str, small: MeasuredRun, large: MeasuredRun, read_seconds: float) -> float:
    """Return the CPU seconds of one more play, song, query or user in a unit.

    `read_seconds` is the CPU seconds to read a play, which are subtracted first.
    """
    means, amounts = [], []
    for run in (small, large):
        units = run.units[worker]
        means.append(float(np.mean([unit.cpu_seconds for unit in units])) - read_seconds * run.size.plays / len(units))
        amounts.append(_measured_amount(worker, run))
    return max(0.0, (means[1] - means[0]) / max(amounts[1] - amounts[0], 1e-9))


def _measured_amount(worker: str, run: MeasuredRun) -> float:
    """Return the amount that a unit of a worker held in a run; each fit divides the whole data among its own units."""
    return held(worker, run.size, len(run.units[worker]) / (len(FITS) if worker in FITTED else 1))


def held(worker: str, size: DataScale, units: float) -> float:
    """Return the amount that one of `units` units of a worker holds.

    The amount is songs, queries, users or plays, whichever the time of the worker depends on.
    """
    if worker in ("build_retrieval", "build_and_save", "SongRange"):
        return size.songs / units
    if worker == "RankerTrainer":
        return float(size.rank_queries)
    by_worker = {
        "ExampleCollector": size.rank_queries,
        "BucketEvaluator": size.queries,
        "BucketRecommendations": size.users,
    }
    return by_worker.get(worker, size.plays) / units


def job_graph(
    size: DataScale,
    lines: Mapping[str, Line],
    runs: Sequence[MeasuredRun],
    cluster: SimulatedCluster,
    *,
    epochs: int = 20,
) -> list[Work]:
    """Return the units of every stage on data of `size`.

    There is a validation range, so that song embeddings, network and retrieval are fitted twice.
    """
    largest_run, range_count = runs[-1], len(song_ranges(size.songs, size.plays))
    group_count = len(bucket_groups(range_count, size.buckets))
    merge_count = len(bucket_groups(size.pieces, size.buckets))
    bucket_plays, bucket_bytes = size.plays / size.buckets, largest_run.history_bytes * size.plays / size.buckets
    # Requests per bucket: size, end, 3 columns per row group.
    read_requests = 2 + 3 * -(-bucket_plays // PLAYS_PER_ROW_GROUP)
    threads = min(cluster.cores, MAX_WORKERS)

    def work(stage: str, name: str, units: int, requests: float, data_bytes: float, **options: Any) -> Work:
        line = lines[name]
        amount_units = size.buckets if name == "QueryCounter" else units  # QueryCounter reads only some of the buckets
        read_seconds = (
            lines["QueryCounter"].each * bucket_plays if name in ("ExampleCollector", "BucketEvaluator") else 0.0
        )
        return Work(
            stage=stage,
            name=name,
            units=units,
            cpu_seconds=line.at(held(name, size, amount_units)) + read_seconds,
            setup_seconds=line.setup,
            spread=line.spread,
            requests=requests,
            data_bytes=data_bytes,
            **options,
        )

    embed_seconds = lines["fit_vectors"].each * size.plays * epochs
    train_workers = max(divisor for divisor in divisors(TrainConfig().shards) if divisor <= cluster.nodes)
    train_seconds = size.plays * epochs / largest_run.train_plays_per_second / train_workers
    train_pieces = max(1, round(train_seconds / (60 * TrainConfig().checkpoint_minutes)))  # each ends with a checkpoint
    works = [
        work("import", "PieceImporter", size.pieces, 40, 40 * size.plays / size.pieces),
        work("import", "SongRange", key_ranges(size.buckets), 2 * size.pieces, 9 * size.songs),
        work("import", "BucketMerger", merge_count, 2 * size.pieces, 9 * size.plays / merge_count),
    ]
    for fit in FITS:
        works += [
            Work(stage="embed", name=fit, units=threads, cpu_seconds=embed_seconds / threads, one_node=True),
            Work(
                stage="train",
                name=fit,
                units=train_workers * train_pieces,
                cpu_seconds=train_seconds / train_pieces,
                requests=epochs * read_requests * size.buckets / train_workers / train_pieces,
                data_bytes=epochs * bucket_bytes * size.buckets / train_workers / train_pieces,
                nodes=train_workers,
                together=True,
                per_node=1,
            ),
            work(
                "retrieval",
                "GroupCounter",
                group_count,
                read_requests * size.buckets / group_count,
                bucket_bytes * size.buckets / group_count,
            ),
            work("retrieval", "RangeMerger", range_count, 2 * group_count, 12 * 10 * size.plays / range_count),
            work("retrieval", "build_retrieval", 1, 2 * range_count, 0, one_node=True),
        ]
    works += [
        work("rank", "ExampleCollector", size.buckets, read_requests + 4, bucket_bytes),
        work("rank", "RankerTrainer", len(RANKERS), 2 * size.buckets, 0),
        work("taste", "BucketTastes", size.buckets, read_requests + 1, bucket_bytes),
        work("index", "build_and_save", 1, 16, 0, one_node=True),
        work("evaluate", "QueryCounter", min(size.buckets, COUNTED_BUCKETS), read_requests, bucket_bytes),
        work("evaluate", "BucketEvaluator", size.buckets, 3 * read_requests, 3 * bucket_bytes),
        work("recommend", "BucketRecommendations", size.buckets, read_requests + 2, bucket_bytes),
    ]
    driver_works = [
        Work(stage=stage, name="driver", units=1, cpu_seconds=seconds, one_node=True)
        for stage, seconds in _driver_seconds(runs, size.plays).items()
    ]
    return [*works, *driver_works]


def _driver_seconds(runs: Sequence[MeasuredRun], plays: int) -> dict[str, float]:
    """Return stage -> seconds of the driver on data of `plays` plays.

    Interpolates between the measured sizes. Outside of them the seconds are those of the nearest size, because the
    driver does not read plays.
    """
    play_counts, seconds_by_run = [run.size.plays for run in runs], [driver_seconds(run) for run in runs]
    return {
        stage: float(np.interp(plays, play_counts, [run[stage] for run in seconds_by_run]))
        for stage in seconds_by_run[0]
    }


def driver_seconds(run: MeasuredRun) -> dict[str, float]:
    """Return stage -> seconds in which no unit ran, on one CPU: planning, starting processes, publishing."""
    workers_of_stage = {
        "import": ("PieceImporter", "SongRange", "BucketMerger"),
        "retrieval": ("GroupCounter", "RangeMerger", "build_retrieval"),
        "taste": ("BucketTastes",),
        "evaluate": ("QueryCounter", "BucketEvaluator"),
        "recommend": ("BucketRecommendations",),
    }
    return {
        stage: max(
            0.0,
            run.seconds[stage]
            - sum(unit.cpu_seconds + unit.setup_seconds for worker in workers for unit in run.units.get(worker, [])),
        )
        for stage, workers in workers_of_stage.items()
    }


def _generated_dataset(bench_workspace: Workspace, config: SimulateBenchConfig, multiple: int) -> Dataset:
    """Return generated data, `multiple` times as large as the smaller of the measured data sets."""
    return bench_dataset(
        bench_workspace,
        users=config.measured_users * multiple,
        songs=config.measured_songs * multiple,
        plays=config.measured_plays,
        seed=config.seed,
    )


def _measure_run(bench_workspace: Workspace, config: SimulateBenchConfig, multiple: int) -> MeasuredRun:
    """Run all stages on one size of data, on a cluster of one CPU, from a separate process."""
    with ray_cluster():
        plays_folder = write_plays(_generated_dataset(bench_workspace, config, multiple))
    workspace = Workspace(f"{bench_workspace.uri}/simulate-{multiple}")
    with PlainProcess(0) as driver:
        return driver.run(run_stages, plays_folder, workspace, QUERIES * multiple, config.seed, 1, None)


def run_stages(
    plays_folder: str, workspace: Workspace, queries: int, seed: int, cpus: int, address: str | None
) -> MeasuredRun:
    """Run the stages on the Parquet files in `plays_folder` and measure the time of each unit.

    Must be called in a separate process. Runs on the cluster at `address`, or on a local one with `cpus` CPUs. Leaves
    the workspace empty.
    """
    os.environ.pop("RAY_ADDRESS", None)
    configs: dict[str, Settings] = {
        "import": ImportConfig(format="parquet", paths=(plays_folder,), buckets=BUCKETS),
        "split": SplitConfig(),
        "embed": EmbedConfig(epochs=1, source="histories", seed=seed),
        "train": TrainConfig(epochs=1, seed=seed),
        "retrieval": RetrievalConfig(),
        "rank": RankConfig(queries=queries, trees=TREES),
        "taste": TasteConfig(),
        "index": IndexConfig(),
        "evaluate": EvaluateConfig(queries=queries, models=("two-step", "taste"), offsets=0, bootstrap_samples=0),
        "release": ReleaseConfig(),
    }
    units: defaultdict[str, list[UnitTime]] = defaultdict(list)
    seconds: dict[str, float] = {}
    train_rate = 1.0
    workspace.delete("")

    @contextmanager
    def measure_stage(stage: str) -> Iterator[None]:
        started = time.perf_counter()
        with unit_times() as stage_units:
            yield
        seconds[stage] = time.perf_counter() - started
        for unit in stage_units:
            units[unit.worker].append(unit)

    options = {} if address else {"num_cpus": cpus}
    with ray_cluster(address, **options), progress("Stages", len(configs)) as bar:
        stages = Stages(workspace)
        for name, config in configs.items():
            with measure_stage(name):
                outcome = stages.run(name, config)
            train_rate = float(outcome.figures.get("plays_per_second", train_rate)) if name == "train" else train_rate
            bar.advance()
        release = active_release(workspace)
        assert release is not None
        with measure_stage("recommend"):
            recommend_all(workspace, RecommendConfig(k=100), release.inputs)
        import_metrics = stages.outcomes[0].figures
    size = DataScale(
        users=import_metrics["users"],
        plays=import_metrics["plays"],
        songs=import_metrics["songs"],
        buckets=BUCKETS,
        queries=queries,
        rank_queries=queries,
        pieces=len(units["PieceImporter"]),
    )
    bytes_per_play = workspace.size(HISTORIES) / max(1, size.plays)
    workspace.delete("")
    return MeasuredRun(
        size=size, units=dict(units), seconds=seconds, train_plays_per_second=train_rate, history_bytes=bytes_per_play
    )


def _check(
    bench_workspace: Workspace, config: SimulateBenchConfig, lines: Mapping[str, Line], runs: Sequence[MeasuredRun]
) -> dict[str, Any]:
    """Run stages on three local nodes, a head without CPUs and two nodes of one CPU each, and simulate the same."""
    from ray.cluster_utils import Cluster

    multiple = 2
    with ray_cluster():
        plays_folder = write_plays(_generated_dataset(bench_workspace, config, multiple))
    local_cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            local_cluster.add_node(num_cpus=1)
        workspace = Workspace(f"{bench_workspace.uri}/simulate-check")
        with PlainProcess(0) as driver:
            local_run = driver.run(
                run_stages, plays_folder, workspace, QUERIES * multiple, config.seed, 0, local_cluster.address
            )
    finally:
        local_cluster.shutdown()
    # Local files have no latency and are as fast as memory.
    cluster = SimulatedCluster(nodes=2, cores=1, latency=0.0, requests_per_second=1e9, node_bytes_per_second=1e12)
    works = [work for work in job_graph(local_run.size, lines, runs, cluster) if work.stage in CHECKED_STAGES]
    simulated_seconds = sum(stage.seconds for stage in simulate(works, cluster, config.seed))
    measured_seconds = sum(local_run.seconds[stage] for stage in CHECKED_STAGES)
    return {
        "stages": list(CHECKED_STAGES),
        "measured_seconds": measured_seconds,
        "simulated_seconds": simulated_seconds,
        "ratio": simulated_seconds / measured_seconds,
    }


def _planned_hours(
    size: DataScale, cluster: SimulatedCluster, run: MeasuredRun, config: SimulateBenchConfig
) -> dict[str, float]:
    """Return stage -> hours of `rayrec plan`, with the rates of the larger run."""

    def rate(work: float, *workers: str) -> float:
        return work / max(1e-9, sum(unit.cpu_seconds for worker in workers for unit in run.units[worker]))

    measured_size = run.size
    rates = {
        "import_plays_per_second_per_cpu": rate(measured_size.plays, "PieceImporter", "SongRange", "BucketMerger"),
        "embed_tokens_per_second_per_cpu": rate(len(FITS) * measured_size.plays, "fit_vectors"),
        "train_plays_per_second_per_cpu": run.train_plays_per_second,
        "retrieval_plays_per_second_per_cpu": rate(len(FITS) * measured_size.plays, "GroupCounter", "RangeMerger"),
        "taste_plays_per_second_per_cpu": rate(measured_size.plays, "BucketTastes"),
        "read_plays_per_second_per_cpu": rate(measured_size.plays, "QueryCounter"),
        "rank_queries_per_second_per_cpu": rate(measured_size.rank_queries, "ExampleCollector", "RankerTrainer"),
        "evaluate_queries_per_second_per_cpu": rate(measured_size.queries, "BucketEvaluator"),
        "recommend_users_per_second_per_cpu": rate(measured_size.users, "BucketRecommendations"),
    }
    node = NodeType(
        name="node",
        cpus=cluster.cores,
        gpus=0,
        memory=8 * GIB * cluster.cores,
        disk=None,
        gpu_memory=None,
        most=cluster.nodes,
    )
    data = DataSize.assumed(size.users, size.plays, size.songs, size.buckets)
    epochs = config.epochs
    plan = make_plan(
        data,
        ClusterFile(name="simulated", nodes=[node], most_nodes=cluster.nodes),
        PlanConfig(queries=size.queries, embed_epochs=epochs, epochs=epochs),
        rates,
    )
    return {stage.stage: stage.hours for stage in plan.stages if stage.hours is not None}


def _row(stage: SimulatedStage, planned_hours: Mapping[str, float]) -> dict[str, Any]:
    row = asdict(stage)
    return {
        "stage": row.pop("stage"),
        "hours": row.pop("seconds") / 3600,
        "plan_hours": planned_hours.get(stage.stage),
        **row,
    }
