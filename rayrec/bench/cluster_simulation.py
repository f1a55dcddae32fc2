"""A cluster that works through a job's units one event after another: cores, object storage, nodes that are lost.

Knows nothing of `rayrec plan` and its formulas. A library of discrete events (SimPy) would be a dependency for the one
loop below.
"""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Work:
    """Units of one kind, which all begin when those of the kind before have ended."""

    stage: str
    name: str
    units: int
    cpu_seconds: float  # of a unit
    setup_seconds: float = 0.0  # CPU time of a core's first unit: what its process loads
    requests: float = 0.0  # of a unit to object storage, one after another
    data_bytes: float = 0.0  # of a unit, from and to object storage
    one_node: bool = False  # whether all units run on the cores of one node
    per_node: int | None = None  # units at once on a node, where not one a core
    spread: float = 0.0  # standard deviation of the units' seconds over their mean


@dataclass(frozen=True, kw_only=True)
class SimulatedCluster:
    """Nodes and the storage beside them."""

    nodes: int
    cores: int  # of a node
    task_seconds: float = 0.005  # to hand a unit to a process and its result back
    latency: float = 0.03  # seconds of a request to object storage
    requests_per_second: float = 20_000.0  # that the storage answers, over all nodes
    node_bytes_per_second: float = 1.2e9  # between a node and the storage
    losses_per_node_hour: float = 0.0  # of spot nodes
    replace_seconds: float = 240.0  # until another node stands in for a lost one


@dataclass(frozen=True, kw_only=True)
class SimulatedStage:
    """What a stage took. Shares are of all cores over its whole time."""

    stage: str
    seconds: float
    busy: float  # share that computed
    storage: float  # share that waited for object storage
    lost: float  # share whose work was lost with a node
    idle: float
    bottleneck: str  # cores, object storage, one node, workers (fewer than cores), or few units
    lost_node_seconds: float  # that the stage takes longer where a node is lost in its middle


def simulate(works: Sequence[Work], cluster: SimulatedCluster, seed: int = 0) -> list[SimulatedStage]:
    """The stages in the order in which they first appear, each after the one before."""
    random = np.random.default_rng(seed)
    stages = []
    for name in dict.fromkeys(work.stage for work in works):
        kinds = [work for work in works if work.stage == name]
        runs = [_run(work, cluster, random) for work in kinds]
        seconds = sum(run.seconds for run in runs)
        cores = cluster.nodes * cluster.cores * max(seconds, 1e-9)
        busy, storage, lost = (sum(getattr(run, part) for run in runs) / cores for part in ("busy", "storage", "lost"))
        later = 0.0
        if cluster.nodes > 1:
            calm = replace(cluster, losses_per_node_hour=0.0)
            longest = max(range(len(kinds)), key=lambda place: runs[place].seconds)
            whole = _run(kinds[longest], calm, np.random.default_rng(seed)).seconds
            hit = _run(kinds[longest], calm, np.random.default_rng(seed), lost_at=whole / 2).seconds
            later = max(0.0, hit - whole)
        idle = max(0.0, 1 - busy - storage - lost)
        stages.append(
            SimulatedStage(
                stage=name,
                seconds=seconds,
                busy=busy,
                storage=storage,
                lost=lost,
                idle=idle,
                bottleneck=_bottleneck(kinds, runs, busy, storage),
                lost_node_seconds=later,
            )
        )
    return stages


def _bottleneck(kinds: Sequence[Work], runs: Sequence["_Run"], busy: float, storage: float) -> str:
    alone = sum(run.seconds for work, run in zip(kinds, runs, strict=True) if work.one_node)
    if alone > 0.5 * sum(run.seconds for run in runs):
        return "one node"
    if all(work.per_node for work in kinds):
        return "workers"
    if busy + storage < 0.5:
        return "few units"
    return "cores" if busy >= storage else "object storage"


@dataclass
class _Run:
    """Seconds of one kind of units, and core seconds by what they were spent on."""

    seconds: float = 0.0
    busy: float = 0.0
    storage: float = 0.0
    lost: float = 0.0


def _run(work: Work, cluster: SimulatedCluster, random: np.random.Generator, lost_at: float | None = None) -> _Run:
    """Work through the units of one kind; `lost_at` is a moment at which the first node is lost."""
    nodes = 1 if work.one_node else cluster.nodes
    queue = deque(np.maximum(0.1, 1 + work.spread * random.standard_normal(work.units)).tolist())
    cores = work.per_node or cluster.cores
    free = [(node, core) for core in range(cores) for node in range(nodes)][::-1]
    running: dict[tuple[int, int], tuple[int, float, float]] = {}  # core -> number of the unit, its size, its start
    ready: set[tuple[int, int]] = set()  # cores whose process has loaded what it needs
    gone: set[int] = set()
    numbers, run = count(), _Run()
    events: list[tuple[float, int, str, tuple[int, int], int]] = []

    def later(moment: float, kind: str, core: tuple[int, int], unit: int = -1) -> None:
        heapq.heappush(events, (moment, next(numbers), kind, core, unit))

    def next_loss(now: float, node: int) -> None:
        if cluster.losses_per_node_hour:
            later(now + random.exponential(3600 / cluster.losses_per_node_hour), "lost", (node, 0))

    for node in range(nodes):
        next_loss(0.0, node)
    if lost_at is not None:
        later(lost_at, "lost", (0, 0))
    now = answered = 0.0  # when the storage will have answered all that it was asked
    spent: dict[int, tuple[float, float]] = {}  # unit -> seconds of computing and of waiting
    while queue or running:
        while queue and free:
            core, size = free.pop(), queue.popleft()
            computing = cluster.task_seconds + size * work.cpu_seconds + (0 if core in ready else work.setup_seconds)
            answered = max(answered, now) + work.requests / cluster.requests_per_second
            transfer = work.data_bytes * size / (cluster.node_bytes_per_second / cluster.cores)
            waiting = max(work.requests * cluster.latency, answered - now) + transfer
            unit = next(numbers)
            running[core], spent[unit] = (unit, size, now), (computing, waiting)
            later(now + computing + waiting, "end", core, unit)
        now, _, kind, core, unit = heapq.heappop(events)
        if kind == "end" and core in running and running[core][0] == unit:
            del running[core]
            computing, waiting = spent.pop(unit)
            run.busy, run.storage = run.busy + computing, run.storage + waiting
            ready.add(core)
            free.append(core)
        elif kind == "lost" and core[0] not in gone:
            gone.add(core[0])
            for place in [place for place in running if place[0] == core[0]]:
                unit, size, began = running.pop(place)
                run.lost += now - began
                queue.appendleft(size)
            free = [place for place in free if place[0] != core[0]]
            ready = {place for place in ready if place[0] != core[0]}
            later(now + cluster.replace_seconds, "back", core)
        elif kind == "back":
            gone.discard(core[0])
            free += [(core[0], place) for place in range(cores)]
            next_loss(now, core[0])
    run.seconds = now
    return run
