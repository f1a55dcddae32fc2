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
import psutil

from rayrec.bench import rounds
from rayrec.bench.answers_bench import build_answers_release
from rayrec.bench.bench_config import SoakBenchConfig
from rayrec.bench.redis_servers import RedisCluster, redis_cluster
from rayrec.bench.serve_bench import Traffic, application, replicas, store_users
from rayrec.client import ApiError, ApiUnavailableError, AsyncClient, Retry
from rayrec.data.moments import parse_timestamp
from rayrec.jobs.runtime import ray_cluster
from rayrec.recommend.base import LATEST_PLAYS
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


def soak(bench_workspace: Workspace, config: SoakBenchConfig) -> dict[str, Any]:
    """Put load from 16 clients on two replicas. The newer one is killed every `kill_seconds`, the older one never.

    With a Redis Cluster as the store, one of its primaries is killed halfway between two kills of replicas, and started
    again once its replica has taken over. A client retries after a connection error or a status 502, 503 or 504: once,
    or with Redis Cluster as often as `rayrec.client` does by default, because a failover takes some seconds.

    `failure_share` is the share of requests that failed after all retries. The `played_at` of each sent play is unique
    for its user and identifies the play among the stored ones at the end: `lost_plays` were acknowledged but are not
    stored, `plays_counted_twice` are stored once too often, acknowledged or not. `memory_mb` is the memory of the
    older replica alone, without pages of files that it maps, sampled halfway between two kills: it answers from start
    to end, so a leak shows. `memory_growth` is the median of the second half of these samples over that of the first
    half, without the first fifth of all samples.
    """
    with ray_cluster():
        dataset, _, _ = build_answers_release(bench_workspace, config, config.songs)
    workspace, traffic = dataset.workspace, Traffic.of(dataset)
    with (
        tempfile.TemporaryDirectory(prefix="rayrec-store-") as folder,
        _temporary_store(config, Path(folder)) as (uri, cluster),
        application("serve", workspace, uri, REPLICAS) as url,
    ):
        store_users(url, traffic)
        counts, run_metrics = asyncio.run(_run_load(url, traffic, config, cluster))
        lost_count, repeated_count = asyncio.run(_compare_stored(url, counts))
    request_count, failed_count = counts.requests.total(), counts.failed.total()
    return {
        "name": "soak",
        "unit": "requests",
        "store": config.store,
        "minutes": config.minutes,
        "requests": request_count,
        "per_second": request_count / (60 * config.minutes),
        "by_kind": dict(counts.requests),
        "failed": failed_count,
        "failed_by_reason": dict(counts.failed),
        "failure_share": failed_count / max(1, request_count),
        "slowest_play_ms": round(1000 * max(counts.play_seconds, default=0.0), 1),
        "median_play_ms": round(1000 * float(np.median(counts.play_seconds or [0.0])), 1),
        "acknowledged_plays": sum(sum(sent_plays.values()) for sent_plays in counts.plays.values()),
        "lost_plays": lost_count,
        "plays_counted_twice": repeated_count,
        **run_metrics,
    }


@contextmanager
def _temporary_store(config: SoakBenchConfig, folder: Path) -> Iterator[tuple[str, RedisCluster | None]]:
    """Yield the address of a new store, and its Redis Cluster, which is None for SQLite."""
    if config.store == "sqlite":
        yield f"sqlite:///{folder}/soak.db", None
        return
    with redis_cluster(folder / "redis") as cluster:
        yield cluster.uri, cluster


async def _run_load(
    url: str, traffic: Traffic, config: SoakBenchConfig, cluster: RedisCluster | None
) -> tuple[SoakCounts, dict[str, Any]]:
    counts, end_time = SoakCounts(), time.monotonic() + 60 * config.minutes
    retries = 1 if cluster is None else Retry().retries
    async with AsyncClient(url, retry=Retry(retries=retries, timeout=30)) as client:
        client_runs = asyncio.gather(
            *(_run_client(client, number, traffic, counts, end_time) for number in range(CLIENTS))
        )
        kill_count, failover_count, samples_mb, _ = await asyncio.gather(
            kill_replicas(config, end_time),
            _fail_over_primaries(config, end_time, cluster),
            sample_memory(config, end_time),
            client_runs,
        )
    return counts, {
        "killed": kill_count,
        "failovers": failover_count,
        "memory_mb": samples_mb,
        "memory_growth": memory_growth(samples_mb),
    }


async def _run_client(
    client: AsyncClient, client_number: int, traffic: Traffic, counts: SoakCounts, end_time: float
) -> None:
    """Send the requests of one client until `end_time`.

    Its plays are of users of its own, who have `LATEST_PLAYS` plays each, one user after the other. Its other requests
    only read.
    """
    rng, play_count, stored_requests = random.Random(client_number), 0, traffic.stored
    while time.monotonic() < end_time:
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        counts.requests[kind] += 1
        if kind == "history":
            await attempt(client.recommend(**rng.choice(traffic.histories)), counts)
        elif kind == "stored":
            await attempt(client.recommend(**rng.choice(stored_requests)), counts)
        else:
            user_id, played_at = f"soak-{client_number}-{play_count // LATEST_PLAYS}", PLAYED_AT + play_count * GAP_MS
            play = {"event_id": f"{user_id}-{play_count}", "user_id": user_id, "song_id": rng.choice(traffic.song_ids)}
            request = client.plays([{**play, "played_at": played_at}])
            started, acknowledged = time.monotonic(), await attempt(request, counts)
            counts.plays.setdefault(user_id, {})[played_at] = acknowledged
            counts.play_seconds += [time.monotonic() - started] if acknowledged else []
            play_count += 1


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


def oldest_replica(running_replicas: Sequence[psutil.Process]) -> psutil.Process:
    """Return the replica that has run the longest, whose memory is measured."""
    return min(running_replicas, key=lambda replica: (replica.create_time(), replica.pid))


async def kill_replicas(config: SoakBenchConfig, end_time: float) -> int:
    """Kill a replica every `kill_seconds` if another one is ready, never the oldest; return the number of kills."""
    kill_count = 0
    while time.monotonic() + config.kill_seconds < end_time:
        await asyncio.sleep(config.kill_seconds)
        running_replicas = replicas()
        if sum(time.time() - replica.create_time() > READY_SECONDS for replica in running_replicas) > 1:
            running_replicas.remove(oldest_replica(running_replicas))
            random.choice(running_replicas).kill()
            kill_count += 1
    return kill_count


async def _fail_over_primaries(config: SoakBenchConfig, end_time: float, cluster: RedisCluster | None) -> int:
    """Kill a primary of the cluster regularly, about halfway between the kills of replicas; return how many."""
    failover_count, rng = 0, random.Random(config.seed)
    await asyncio.sleep(config.kill_seconds / 2)
    while cluster is not None and time.monotonic() < end_time:
        primary = rng.choice(await asyncio.to_thread(cluster.primaries))
        await asyncio.to_thread(cluster.fail_over, primary)
        await asyncio.to_thread(primary.start)
        failover_count += 1
        await asyncio.sleep(config.kill_seconds)
    return failover_count


async def sample_memory(config: SoakBenchConfig, end_time: float) -> list[float]:
    """Return samples of the memory of the oldest replica, MiB, taken halfway between the kills.

    All samples are of one replica: if it ends by itself, they begin anew with the next oldest one.
    """
    samples_mb: list[float] = []
    measured_replica = None
    await asyncio.sleep(config.kill_seconds / 2)
    while not samples_mb or time.monotonic() < end_time:
        replica = oldest_replica(await asyncio.to_thread(replicas))
        if replica != measured_replica:
            samples_mb, measured_replica = [], replica
        samples_mb.append(await asyncio.to_thread(rounds.anonymous_mb, replica))
        await asyncio.sleep(config.kill_seconds)
    return samples_mb


def memory_growth(samples_mb: list[float]) -> float:
    """Return the median of the second half of the samples over that of the first half, without the first fifth."""
    settled_mb = samples_mb[int(SETTLED * len(samples_mb)) :]
    half_length = (len(settled_mb) + 1) // 2
    return float(np.median(settled_mb[-half_length:]) / max(np.median(settled_mb[:half_length]), 1e-9))


async def _compare_stored(url: str, counts: SoakCounts) -> tuple[int, int]:
    """Return the sums of `compare_plays` over all users."""
    lost_count = repeated_count = 0
    async with AsyncClient(url, retry=Retry(timeout=60)) as client:
        for user_id, sent_plays in counts.plays.items():
            try:
                stored_plays = (await client.user_plays(user_id, LATEST_PLAYS))["plays"]  # all plays: no user has more
            except ApiError as error:
                if error.status != 404:
                    raise
                stored_plays = []
            differences = compare_plays(sent_plays, [parse_timestamp(play["played_at"]) for play in stored_plays])
            lost_count, repeated_count = lost_count + differences[0], repeated_count + differences[1]
    return lost_count, repeated_count


def compare_plays(sent_plays: Mapping[int, bool], stored_times: Sequence[int]) -> tuple[int, int]:
    """Return how many acknowledged plays of a user are not stored, and how many stored plays exceed those sent.

    `sent_plays` maps the played_at of each sent play, ms UTC, to True if the play was acknowledged; `stored_times` is
    the played_at of each stored play.
    """
    stored_counts = Counter(stored_times)
    lost_count = sum(acknowledged and not stored_counts[played_at] for played_at, acknowledged in sent_plays.items())
    return lost_count, sum(count - (played_at in sent_plays) for played_at, count in stored_counts.items())
