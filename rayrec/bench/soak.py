"""`rayrec bench soak`: failures, lost plays and memory growth under mixed load while replicas are killed."""

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

PLAYED_AT, GAP_MS = 1_700_000_000_000, 200_000  # ms UTC of a client's first play; ms between two of its plays

CLIENTS, REPLICAS = 16, 2
SHARES = {"history": 0.6, "stored": 0.2, "plays": 0.2}  # kind of request -> share of all requests
SETTLED = 0.2  # share of the time at the start that memory growth ignores
READY_SECONDS = 20.0  # age at which a replica counts as ready; no replica is killed unless two are ready


@dataclass
class SoakCounts:
    """Requests, failures and plays, counted by the clients."""

    requests: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)  # reason -> requests that failed after all retries
    plays: dict[str, dict[int, bool]] = field(default_factory=dict)  # user -> played_at, ms UTC -> acknowledged
    play_seconds: list[float] = field(default_factory=list)  # per acknowledged play, with its retries


def soak(place: Workspace, config: SoakBenchConfig) -> dict[str, Any]:
    """Put load from 16 clients on two replicas, one of which is killed every `kill_seconds`.

    With a Redis Cluster as the store, one of its primaries is killed halfway between two kills of replicas, and started
    again once its replica has taken over. A client retries after a connection error or a status 502, 503 or 504: once,
    or with Redis Cluster as often as `rayrec.client` does by default, because a failover takes some seconds.

    `failure_share` is the share of requests that failed after all retries. The `played_at` of each sent play is unique
    for its user and identifies the play among the stored ones at the end: `lost_plays` were acknowledged but are not
    stored, `plays_counted_twice` are stored once too often, acknowledged or not. `memory_mb` is the private memory of
    all processes of the application, sampled halfway between two kills, when all replicas run again. `memory_growth` is
    the median of the second half of these samples over that of the first half, without the first fifth of all samples.
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
    """Yield the address of a new store, and its Redis Cluster, which is None for SQLite."""
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
    """Send the requests of one client until `end`.

    Its plays are of users of its own, who have `LAST_PLAYS` plays each, one user after the other. Its other requests
    only read.
    """
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
    """Return True if a call succeeded, after the client's retries; count the failure otherwise."""
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
    """Kill a replica every `kill_seconds` if another one is ready; return the number of kills."""
    killed = 0
    while time.monotonic() + config.kill_seconds < end:
        await asyncio.sleep(config.kill_seconds)
        running = replicas()
        if sum(time.time() - replica.create_time() > READY_SECONDS for replica in running) > 1:
            random.choice(running).kill()
            killed += 1
    return killed


async def _fail_over(config: SoakBenchConfig, end: float, cluster: RedisCluster | None) -> int:
    """Kill a primary of the cluster regularly, about halfway between the kills of replicas; return how many."""
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
    """Return samples of the private memory, MiB, of the application's processes, taken halfway between the kills."""
    used = []
    await asyncio.sleep(config.kill_seconds / 2)
    while time.monotonic() < end:
        used.append(await asyncio.to_thread(_memory))
        await asyncio.sleep(config.kill_seconds)
    return used or [await asyncio.to_thread(_memory)]


def memory_growth(used: list[float]) -> float:
    """Return the median of the second half of the samples over that of the first half, without the first fifth."""
    settled = used[int(SETTLED * len(used)) :]
    half = (len(settled) + 1) // 2
    return float(np.median(settled[-half:]) / max(np.median(settled[:half]), 1e-9))


def _memory() -> float:
    return sum(process.private_mb for process in rounds.sample() if process.role != rounds.DRIVER)


async def _compare_stored(url: str, counts: SoakCounts) -> tuple[int, int]:
    """Return the sums of `compare_plays` over all users."""
    lost = repeated = 0
    async with AsyncClient(url, retry=Retry(timeout=60)) as client:
        for user, sent in counts.plays.items():
            try:
                stored = (await client.user_plays(user, LAST_PLAYS))["plays"]  # all plays: no user has more
            except ApiError as error:
                if error.status != 404:
                    raise
                stored = []
            differences = compare_plays(sent, [parse_moment(play["played_at"]) for play in stored])
            lost, repeated = lost + differences[0], repeated + differences[1]
    return lost, repeated


def compare_plays(sent: Mapping[int, bool], stored: Sequence[int]) -> tuple[int, int]:
    """Return how many acknowledged plays of a user are not stored, and how many stored plays exceed those sent.

    `sent` maps the played_at of each sent play, ms UTC, to True if the play was acknowledged; `stored` is the played_at
    of each stored play.
    """
    times = Counter(stored)
    lost = sum(acknowledged and not times[at] for at, acknowledged in sent.items())
    return lost, sum(count - (at in sent) for at, count in times.items())
