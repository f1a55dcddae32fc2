"""`rayrec bench serve --soak`: mixed load while replicas are killed; what fails, what is lost, what grows."""

import asyncio
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from rayrec.bench import private_memory
from rayrec.bench.bench_config import BenchConfig
from rayrec.bench.serve_bench import USERS, K, application, histories, store_users
from rayrec.bench.serve_release import PLAYED_AT, song_name, write_bench_release
from rayrec.storage.workspace import Workspace

if TYPE_CHECKING:
    import httpx

CLIENTS, REPLICAS = 16, 2
SHARES = {"history": 0.6, "stored": 0.2, "plays": 0.2}  # of the requests
REPLICA_TITLE = "ray::ServeReplica"  # how the titles of replicas' processes begin
SETTLED = 0.2  # of the time, after which memory must not grow
READY_SECONDS = 20.0  # after which a new replica is taken to answer; before, the other one is left alone


@dataclass
class Told:
    """What the clients saw."""

    requests: Counter[str] = field(default_factory=Counter)
    retried: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # for good, after the retry
    acknowledged: Counter[str] = field(default_factory=Counter)  # plays by user


def soak(workspace: Workspace | None, config: BenchConfig | None, *, quick: bool = False) -> dict[str, Any]:
    """Load from 16 clients on two replicas, one of which is killed now and then.

    A client tries once more after a connection error or a 503, as ours are told to: plays carry event
    ids, all else only reads. `failure_share` is of the requests that failed all the same, `lost_plays` of plays that
    were acknowledged and are not in the store. `memory_mb` is that of all processes halfway between the kills, when
    all replicas are there again, and `memory_growth` its median in the second half of the time after the first fifth,
    over that in the first half.
    """
    config = config or (BenchConfig.quick() if quick else BenchConfig())
    songs = config.serve_songs[0]
    with tempfile.TemporaryDirectory(prefix="rayrec-bench-") as folder:
        place = Workspace(f"{workspace.uri if workspace else folder}/bench/serve-{songs}")
        write_bench_release(place, songs, config.seed)
        with application("serve", place, Path(folder) / "soak.db", REPLICAS) as url:
            store_users(url, songs)
            told, watched = asyncio.run(_run(url, songs, config))
            lost = asyncio.run(_lost(url, told))
    total, failed = told.requests.total(), told.failed.total()
    return {
        "name": "soak",
        "unit": "requests",
        "minutes": config.soak_minutes,
        "requests": total,
        "per_second": total / (60 * config.soak_minutes),
        "by_kind": dict(told.requests),
        "retried": told.retried,
        "failed": failed,
        "failed_by_reason": dict(told.failed),
        "failure_share": failed / max(1, total),
        "acknowledged_plays": told.acknowledged.total(),
        "lost_plays": lost,
        **watched,
    }


async def _run(url: str, songs: int, config: BenchConfig) -> tuple[Told, dict[str, Any]]:
    import httpx

    told, end = Told(), time.monotonic() + 60 * config.soak_minutes
    bodies = histories(np.random.default_rng(config.seed), songs)
    async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as connection:
        work = asyncio.gather(*(_client(connection, number, bodies, songs, told, end) for number in range(CLIENTS)))
        killed, used, _ = await asyncio.gather(_kill(config, end), _watch(config, end), work)
    return told, {"killed": killed, "memory_mb": used, "memory_growth": growth(used)}


async def _client(
    connection: "httpx.AsyncClient", number: int, bodies: list[dict[str, Any]], songs: int, told: Told, end: float
) -> None:
    """One client: its own user plays on, everything else is read."""
    choices, user, plays = random.Random(number), f"soak-{number}", 0
    while time.monotonic() < end:
        kind = choices.choices(list(SHARES), list(SHARES.values()))[0]
        told.requests[kind] += 1
        if kind != "plays":
            asked = (
                choices.choice(bodies) if kind == "history" else {"user_id": f"user-{choices.randrange(USERS)}", "k": K}
            )
            await send(connection, "/v1/recommendations", asked, told)
            continue
        play = {"event_id": f"{user}-{plays}", "user_id": user, "song_id": song_name(choices.randrange(songs))}
        taken = await send(
            connection, "/v1/plays", {"plays": [{**play, "played_at": PLAYED_AT + plays * 200_000}]}, told
        )
        told.acknowledged[user] += taken
        plays += 1


async def send(connection: "httpx.AsyncClient", path: str, body: dict[str, Any], told: Told) -> bool:
    """POST, once more after a connection error or a 503; whether it was answered with success."""
    import httpx

    reason = ""
    for attempt in range(2):
        told.retried += attempt
        try:
            response = await connection.post(path, json=body)
        except httpx.TransportError as error:
            reason = type(error).__name__
            continue
        if response.status_code < 400:
            return True
        reason = str(response.status_code)
        if response.status_code != 503:
            break
        await asyncio.sleep(min(float(response.headers.get("Retry-After", 1)), 2.0))
    told.failed[reason] += 1
    return False


async def _kill(config: BenchConfig, end: float) -> int:
    """Kill a replica now and then, while another one answers; how many."""
    killed = 0
    while time.monotonic() + config.soak_kill_seconds < end:
        await asyncio.sleep(config.soak_kill_seconds)
        found = replicas()
        if sum(time.time() - replica.create_time() > READY_SECONDS for replica in found) > 1:
            random.choice(found).kill()
            killed += 1
    return killed


def replicas() -> list[psutil.Process]:
    """The replicas below this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(REPLICA_TITLE) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


async def _watch(config: BenchConfig, end: float) -> list[float]:
    """Private memory, MiB, of the application's processes, halfway between the kills."""
    used = []
    await asyncio.sleep(config.soak_kill_seconds / 2)
    while time.monotonic() < end:
        used.append(await asyncio.to_thread(_memory))
        await asyncio.sleep(config.soak_kill_seconds)
    return used or [await asyncio.to_thread(_memory)]


def growth(used: list[float]) -> float:
    """The median memory of the second half of the samples over that of the first, without those of the first fifth."""
    settled = used[int(SETTLED * len(used)) :]
    half = (len(settled) + 1) // 2
    return float(np.median(settled[-half:]) / max(np.median(settled[:half]), 1e-9))


def _memory() -> float:
    return sum(process.private_mb for process in private_memory.sample() if process.role != private_memory.DRIVER)


async def _lost(url: str, told: Told) -> int:
    """Plays that were acknowledged and are not there. Raises where the application does not say how many are."""
    import httpx

    lost = 0
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as connection:
        for user, plays in told.acknowledged.items():
            response = await connection.get(f"/v1/users/{user}/taste")
            there = 0 if response.status_code == 404 else response.raise_for_status().json()["plays"]
            lost += max(0, plays - there)
    return lost
