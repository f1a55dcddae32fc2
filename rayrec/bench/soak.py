"""`rayrec bench soak`: mixed load while replicas are killed: failures, lost plays and growth of memory."""

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rayrec.bench import rounds
from rayrec.bench.answers_bench import answers_world
from rayrec.bench.bench_config import SoakBenchConfig
from rayrec.bench.redis_servers import RedisCluster, redis_cluster
from rayrec.bench.serve_bench import Traffic, application, replicas, store_users
from rayrec.client import ApiError, ApiUnavailableError, AsyncClient, Retry
from rayrec.data.moments import parse_moment
from rayrec.jobs.runtime import ray_cluster
from rayrec.online.user_state import LAST_PLAYS
from rayrec.storage.workspace import Workspace

PLAYED_AT, GAP_MS = 1_700_000_000_000, 200_000  # ms UTC of a user's first play, and between two

CLIENTS, REPLICAS = 16, 2
SHARES = {"history": 0.6, "stored": 0.2, "plays": 0.2}  # of the requests
SETTLED = 0.2  # of the time, after which memory must not grow
READY_SECONDS = 20.0  # after which a new replica is taken to answer; before, the other one is left alone


@dataclass
class SoakCounts:
    """What the clients saw."""

    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # for good, after the retry
    plays: dict[str, dict[int, bool]] = field(default_factory=dict)  # user -> played_at, ms UTC -> acknowledged
    play_seconds: list[float] = field(default_factory=list)  # of the acknowledged plays, with their retries


def soak(place: Workspace, config: SoakBenchConfig) -> dict[str, Any]:
    """Load from 16 clients on two replicas, one of which is killed now and then.

    With a Redis Cluster as the store one of its primaries is killed halfway between, and started again when its
    replica has taken over. A client retries after a connection error or a 503: once, and on Redis Cluster as often as
    `rayrec.client` does by default, for a failover takes some seconds. `failure_share` is of the requests that failed
    all the same. Each play sent has a moment of its own, by which it is looked for among the stored ones in the end:
    `lost_plays` were acknowledged and are not there, `plays_counted_twice` are there once too often, acknowledged or
    not. `memory_mb` is that of all processes halfway between the kills, when all replicas are there again, and
    `memory_growth` its median in the second half of the time after the first fifth, over that in the first half.
    """
    with ray_cluster():
        dataset, _, _ = answers_world(place, config, config.songs)
    workspace, traffic = dataset.workspace, Traffic.of(dataset)
    with (
        tempfile.TemporaryDirectory(prefix="rayrec-store-") as folder,
        _store(config, Path(folder)) as (uri, cluster),
        application("serve", workspace, uri, REPLICAS) as url,
    ):
        store_users(url, traffic)
        counts, watched = asyncio.run(_run(url, traffic, config, cluster))
        lost, repeated = asyncio.run(_compare_stored(url, counts))
    total, failed = counts.requests.total(), counts.failed.total()
    return {
        "name": "soak",
        "unit": "requests",
        "store": config.store,
        "minutes": config.minutes,
        "requests": total,
        "per_second": total / (60 * config.minutes),
        "by_kind": dict(counts.requests),
        "failed": failed,
        "failed_by_reason": dict(counts.failed),
        "failure_share": failed / max(1, total),
        "slowest_play_ms": round(1000 * max(counts.play_seconds, default=0.0), 1),
        "median_play_ms": round(1000 * float(np.median(counts.play_seconds or [0.0])), 1),
        "acknowledged_plays": sum(sum(sent.values()) for sent in counts.plays.values()),
        "lost_plays": lost,
        "plays_counted_twice": repeated,
        **watched,
    }


@contextmanager
def _store(config: SoakBenchConfig, folder: Path) -> Iterator[tuple[str, RedisCluster | None]]:
    """The address of a new store, and the cluster where it is one."""
    if config.store == "sqlite":
        yield f"sqlite:///{folder}/soak.db", None
        return
    with redis_cluster(folder / "redis") as cluster:
        yield cluster.uri, cluster


async def _run(
    url: str, traffic: Traffic, config: SoakBenchConfig, cluster: RedisCluster | None
) -> tuple[SoakCounts, dict[str, Any]]:
    counts, end = SoakCounts(), time.monotonic() + 60 * config.minutes
    retries = 1 if cluster is None else Retry().retries
    async with AsyncClient(url, retry=Retry(retries=retries, timeout=30)) as client:
        work = asyncio.gather(*(_client(client, number, traffic, counts, end) for number in range(CLIENTS)))
        killed, failovers, used, _ = await asyncio.gather(
            _kill(config, end), _fail_over(config, end, cluster), _watch(config, end), work
        )
    return counts, {"killed": killed, "failovers": failovers, "memory_mb": used, "memory_growth": memory_growth(used)}


async def _client(client: AsyncClient, number: int, traffic: Traffic, counts: SoakCounts, end: float) -> None:
    """One client: a user of its own plays on, until the next one begins, everything else is read."""
    choices, plays, stored = random.Random(number), 0, traffic.stored
    while time.monotonic() < end:
        kind = choices.choices(list(SHARES), list(SHARES.values()))[0]
        counts.requests[kind] += 1
        if kind == "history":
            await attempt(client.recommend(**choices.choice(traffic.histories)), counts)
        elif kind == "stored":
            await attempt(client.recommend(**choices.choice(stored)), counts)
        else:
            user, played_at = f"soak-{number}-{plays // LAST_PLAYS}", PLAYED_AT + plays * GAP_MS
            play = {"event_id": f"{user}-{plays}", "user_id": user, "song_id": choices.choice(traffic.song_ids)}
            call = client.plays([{**play, "played_at": played_at}])
            began, acknowledged = time.monotonic(), await attempt(call, counts)
            counts.plays.setdefault(user, {})[played_at] = acknowledged
            counts.play_seconds += [time.monotonic() - began] if acknowledged else []
            plays += 1


async def attempt(call: Awaitable[Any], counts: SoakCounts) -> bool:
    """Whether a call, retried by the client, was answered with success."""
    try:
        await call
    except ApiUnavailableError as error:
        counts.failed[type(error.__cause__).__name__] += 1
        return False
    except ApiError as error:
        counts.failed[str(error.status)] += 1
        return False
    return True


async def _kill(config: SoakBenchConfig, end: float) -> int:
    """Kill a replica now and then, while another one answers; how many."""
    killed = 0
    while time.monotonic() + config.kill_seconds < end:
        await asyncio.sleep(config.kill_seconds)
        running = replicas()
        if sum(time.time() - replica.create_time() > READY_SECONDS for replica in running) > 1:
            random.choice(running).kill()
            killed += 1
    return killed


async def _fail_over(config: SoakBenchConfig, end: float, cluster: RedisCluster | None) -> int:
    """Kill a primary of the cluster now and then, halfway between the kills of replicas; how many."""
    failovers, choices = 0, random.Random(config.seed)
    await asyncio.sleep(config.kill_seconds / 2)
    while cluster is not None and time.monotonic() < end:
        primary = choices.choice(await asyncio.to_thread(cluster.primaries))
        await asyncio.to_thread(cluster.fail_over, primary)
        await asyncio.to_thread(primary.start)
        failovers += 1
        await asyncio.sleep(config.kill_seconds)
    return failovers


async def _watch(config: SoakBenchConfig, end: float) -> list[float]:
    """Private memory, MiB, of the application's processes, halfway between the kills."""
    used = []
    await asyncio.sleep(config.kill_seconds / 2)
    while time.monotonic() < end:
        used.append(await asyncio.to_thread(_memory))
        await asyncio.sleep(config.kill_seconds)
    return used or [await asyncio.to_thread(_memory)]


def memory_growth(used: list[float]) -> float:
    """The median memory of the second half of the samples over that of the first, without those of the first fifth."""
    settled = used[int(SETTLED * len(used)) :]
    half = (len(settled) + 1) // 2
    return float(np.median(settled[-half:]) / max(np.median(settled[:half]), 1e-9))


def _memory() -> float:
    return sum(process.private_mb for process in rounds.sample() if process.role != rounds.DRIVER)


async def _compare_stored(url: str, counts: SoakCounts) -> tuple[int, int]:
    """Of all users, as `compare_plays`."""
    lost = repeated = 0
    async with AsyncClient(url, retry=Retry(timeout=60)) as client:
        for user, sent in counts.plays.items():
            try:
                stored = (await client.user_plays(user, LAST_PLAYS))["plays"]  # all: a user has no more
            except ApiError as error:
                if error.status != 404:
                    raise
                stored = []
            differences = compare_plays(sent, [parse_moment(play["played_at"]) for play in stored])
            lost, repeated = lost + differences[0], repeated + differences[1]
    return lost, repeated


def compare_plays(sent: Mapping[int, bool], stored: Sequence[int]) -> tuple[int, int]:
    """How many acknowledged plays of a user are not stored, and how many stored ones are more than was sent.

    `sent` says of each played_at, ms UTC, whether it was acknowledged; `stored` are those of the stored plays.
    """
    times = Counter(stored)
    lost = sum(acknowledged and not times[at] for at, acknowledged in sent.items())
    return lost, sum(count - (at in sent) for at, count in times.items())
