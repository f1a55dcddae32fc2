"""`rayrec bench serve`: compares the application behind Ray Serve with the same on bare uvicorn, under load.

Rounds are cut into short slices, in which the two take turns, and every ratio is computed within a slice, because the
speed of a machine with shared cores changes over time. wrk generates the load if it is installed, because a client in
Python would be slower than the server that it measures; otherwise httpx does.
"""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc

from rayrec.bench import rounds
from rayrec.bench.answers_bench import K, build_answers_release, measure_answers
from rayrec.bench.bare_server import MAX_WAITING
from rayrec.bench.bench_config import ServeBenchConfig
from rayrec.bench.rounds import BenchResult, Measured, PlainProcess, compare, niceness
from rayrec.client import Client, Retry
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.display import progress
from rayrec.errors import RayrecError
from rayrec.jobs.runtime import ray_cluster
from rayrec.serving.serve_config import MAX_PLAYS
from rayrec.storage.workspace import Workspace

PLAYS = 50  # at most, of each history that is sent and of each stored user
QUERIES = 200  # queries whose CPU time is measured
BODIES = 200  # different requests
USERS = 100
PLAY_ROUNDS = 8  # rounds of `bench_history_lengths` per round of the other loads, because they are short
START_SECONDS = 600.0  # limit of the start of an application, which loads a release
SLICE_SECONDS = 1.0  # of a load before the next one: other work on the machine changes from second to second
# One thread for numeric work in each process, as in the replicas.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
REPLICA_TITLE = "ray::ServeReplica"  # start of the process titles of replicas
MEMORY_REPLICAS, MEMORY_SECONDS = (1, 4), 5.0  # numbers of replicas to compare; seconds of load before measuring
LONG_USERS = 8  # users with many plays, who take turns
GAP_MS = 200_000  # ms between two plays of a user


@dataclass(frozen=True, kw_only=True)
class Load:
    """The result of one load."""

    answered: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int  # failed connections, timeouts, and answers with a status of 400 or higher

    @property
    def per_second(self) -> float:
        """Requests answered per second, without errors."""
        return max(0, self.answered - self.errors) / max(self.seconds, 1e-9)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The requests that clients send, made from the plays of a data set."""

    histories: list[dict[str, Any]]  # requests for recommendations, each with another history
    stored_plays: list[list[dict[str, Any]]]  # plays of each stored user, as the API takes them
    song_ids: list[str]  # all songs of the catalog
    artists: list[str]

    @classmethod
    def of(cls, dataset: Dataset) -> "Traffic":
        """Make the requests from the first users of `dataset` who have plays."""
        histories, catalog = concatenate(list(_first_users(dataset))), dataset.catalog()
        user_song_ids = [
            catalog.song_ids(songs[-PLAYS:]) for songs in np.split(histories.songs, histories.offsets[1:-1])
        ]
        user_times = [times[-PLAYS:] for times in np.split(histories.played_at, histories.offsets[1:-1])]
        stored_plays = [
            [
                {
                    "event_id": f"{user}-{position}",
                    "user_id": f"user-{user}",
                    "song_id": song_id,
                    "played_at": played_at,
                }
                for position, (song_id, played_at) in enumerate(zip(songs, times.tolist(), strict=True))
            ]
            for user, (songs, times) in enumerate(zip(user_song_ids[:USERS], user_times[:USERS], strict=True))
        ]
        artists = pc.unique(catalog.table.column(columns.ARTIST)).drop_null().slice(0, USERS).to_pylist()
        return cls(
            histories=[{"history": songs, "k": K} for songs in user_song_ids[:BODIES]],
            stored_plays=stored_plays,
            song_ids=catalog.song_ids(np.arange(len(catalog))),
            artists=artists,
        )

    @property
    def stored(self) -> list[dict[str, Any]]:
        """Requests for recommendations for the stored users."""
        return [{"user_id": f"user-{user}", "k": K} for user in range(len(self.stored_plays))]

    @property
    def filtered(self) -> list[dict[str, Any]]:
        """The requests of `stored`, each with a filter to songs of another artist."""
        return [{**body, "artists": [artist]} for body, artist in zip(self.stored, cycle(self.artists), strict=False)]


def _first_users(dataset: Dataset) -> Iterator[Histories]:
    """Yield batches of users with plays until there are at least `BODIES` users, or all users if there are fewer."""
    user_count = 0
    for bucket in range(dataset.manifest.buckets):
        for batch in dataset.read_bucket(bucket, BODIES):
            yield batch.take(batch.lengths > 0)
            user_count += int((batch.lengths > 0).sum())
            if user_count >= BODIES:
                return


@dataclass(frozen=True)
class Case:
    """One measurement of a slice: one kind of request to one of the applications."""

    target: str  # bare or serve
    request: str  # history, stored or noop
    clients: int

    @property
    def name(self) -> str:
        """The name of the case in the figures."""
        return f"{self.target} {self.request} {self.clients}"


def bench_serve(bench_workspace: Workspace, config: ServeBenchConfig) -> dict[str, Any]:
    """Measure requests per second, p50, p99 and errors for each number of clients and each catalog.

    The release has the default recommender: network, retrieval and rankers. `p50_ratio` is p50 of Serve over p50 of
    bare uvicorn at 1 client, `throughput_ratio` requests per second of Serve over bare uvicorn at 16 clients. Both are
    of recommendations for histories of at most 50 plays, medians over slices of one second, and the worst of all
    catalogs. `stored_over_noop_ms` is the p50 of a recommendation to a stored user minus the p50 of an endpoint that
    does nothing, on bare uvicorn. `answer_cpu_ms` is the CPU time of an answer from the same release, as
    `rayrec bench answers` measures it; `stored_over_cpu_ms` is `stored_over_noop_ms` minus `answer_cpu_ms`.
    `plays_cost_ratio` is the time to store a play after 10,000 plays over that after 10 plays. `replica_growth_mb` is
    by how much the private memory of a replica grows from the smallest to the largest catalog, with 1 or with 4
    replicas, whichever is more. `build_seconds` of a catalog is 0 if an earlier run has built its release.
    """
    catalogs = [_bench_catalog(bench_workspace, songs, config) for songs in config.songs]
    return {
        "name": "serve",
        "unit": "requests",
        "p50_ratio": max(result["p50_ratio"] for result in catalogs),
        "throughput_ratio": min(result["throughput_ratio"] for result in catalogs),
        "stored_over_noop_ms": max(result["stored_over_noop_ms"] for result in catalogs),
        "answer_cpu_ms": max(result["answer_cpu_ms"] for result in catalogs),
        "stored_over_cpu_ms": max(result["stored_over_cpu_ms"] for result in catalogs),
        "plays_cost_ratio": max(result["plays_cost_ratio"] for result in catalogs),
        "replica_growth_mb": max(
            catalogs[-1]["replica_mb"][replica_count] - catalogs[0]["replica_mb"][replica_count]
            for replica_count in catalogs[0]["replica_mb"]
        ),
        "per_second": min(result["loads"]["serve history 16"]["per_second"] for result in catalogs),
        "errors": sum(result["errors"] for result in catalogs),
        "load_generator": generator(),
        "rounds": config.rounds,
        "catalogs": catalogs,
    }


def _bench_catalog(bench_workspace: Workspace, songs: int, config: ServeBenchConfig) -> dict[str, Any]:
    with ray_cluster():
        dataset, release, build_seconds = build_answers_release(bench_workspace, config, songs)
    with PlainProcess(niceness()) as process:
        cpu_ms = process.run(measure_answers, dataset, release.inputs, QUERIES)["cpu_ms"]
    workspace, traffic = dataset.workspace, Traffic.of(dataset)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rayrec-store-")))
        urls = {
            kind: stack.enter_context(application(kind, workspace, f"sqlite:///{folder}/{kind}.db"))
            for kind in ("bare", "serve")
        }
        for url in urls.values():
            store_users(url, traffic)
        loads = summarize_slices(_measure_slices(urls, traffic, config, label=f"{songs:,} songs"))
        cost_ratio = _plays_cost_ratio(urls["bare"], traffic, config)
    with tempfile.TemporaryDirectory(prefix="rayrec-store-") as store_folder:
        replica_mb = _replica_mb(workspace, traffic, Path(store_folder))
    return {
        "songs": songs,
        "build_seconds": round(build_seconds, 1),
        **loads,
        "answer_cpu_ms": cpu_ms,
        "stored_over_cpu_ms": loads["stored_over_noop_ms"] - cpu_ms,
        "plays_cost_ratio": cost_ratio,
        "replica_mb": replica_mb,
        "parts": sorted(release.inputs),
    }


def replicas() -> list[psutil.Process]:
    """Return the running replicas among the descendants of this process."""
    running_replicas = []
    for process in psutil.Process().children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith(REPLICA_TITLE) and process.status() != psutil.STATUS_ZOMBIE:
                running_replicas.append(process)
        except psutil.Error:
            continue
    return running_replicas


def _replica_mb(workspace: Workspace, traffic: Traffic, folder: Path) -> dict[str, float]:
    """Return the private memory, MiB, of the largest of 1 and of 4 replicas, after answers to stored users.

    Half of the requests have a filter, because replicas keep the masks of filters in memory.
    """
    largest_mb = {}
    for replica_count in MEMORY_REPLICAS:
        with application("serve", workspace, f"sqlite:///{folder}/memory-{replica_count}.db", replica_count) as url:
            store_users(url, traffic)
            bodies = [*traffic.stored, *traffic.filtered]
            put_under_load(f"{url}/v1/recommendations", bodies, 2 * replica_count, MEMORY_SECONDS)
            largest_mb[str(replica_count)] = max(map(rounds.anonymous_mb, replicas()))
    return largest_mb


def _measure_slices(
    urls: dict[str, str], traffic: Traffic, config: ServeBenchConfig, *, label: str
) -> list[dict[str, Load]]:
    """Return the loads of each slice by name of the case; every other slice runs the cases in reverse order."""
    bodies = {"history": traffic.histories, "stored": traffic.stored}
    cases = [Case(target, "history", clients) for clients in config.clients for target in ("bare", "serve")]
    cases += [Case("bare", "noop", 1), Case("bare", "stored", 1), Case("serve", "stored", 1)]
    slices: list[dict[str, Load]] = []
    slice_count = config.rounds * max(1, round(config.seconds / SLICE_SECONDS))
    with progress(f"bench serve, {label}", (slice_count + 1) * len(cases)) as bar:
        for slice_number in range(-1, slice_count):
            # The first, -1, fills caches and opens connections; it does not count.
            loads = {}
            for case in cases if slice_number % 2 else cases[::-1]:
                url = f"{urls[case.target]}/{'noop' if case.request == 'noop' else 'v1/recommendations'}"
                loads[case.name] = put_under_load(url, bodies.get(case.request, []), case.clients, SLICE_SECONDS)
                bar.advance()
            slices += [loads] if slice_number >= 0 else []
    return slices


def summarize_slices(slices: list[dict[str, Load]]) -> dict[str, Any]:
    """Return medians over slices, of the loads and of the ratios within each slice."""

    def ratio(field: str, clients: int) -> float:
        pairs = [
            (slice_loads[f"serve history {clients}"], slice_loads[f"bare history {clients}"]) for slice_loads in slices
        ]
        return float(median(getattr(serve, field) / max(getattr(bare, field), 1e-9) for serve, bare in pairs))

    fields = ("per_second", "p50_ms", "p99_ms")
    loads = {
        name: {field: round(median(getattr(slice_loads[name], field) for slice_loads in slices), 3) for field in fields}
        | {"errors": sum(slice_loads[name].errors for slice_loads in slices)}
        for name in slices[0]
    }
    differences_ms = [slice_loads["bare stored 1"].p50_ms - slice_loads["bare noop 1"].p50_ms for slice_loads in slices]
    return {
        "p50_ratio": ratio("p50_ms", 1),
        "throughput_ratio": ratio("per_second", 16),
        "stored_over_noop_ms": median(differences_ms),
        "errors": sum(load["errors"] for load in loads.values()),
        "loads": loads,
    }


def store_users(url: str, traffic: Traffic) -> None:
    """Send the plays of the stored users."""
    with Client(url, retry=Retry(timeout=60)) as client:
        for plays in traffic.stored_plays:
            client.plays(plays)


def _plays_cost_ratio(url: str, traffic: Traffic, config: ServeBenchConfig) -> float:
    song_ids, round_count = traffic.song_ids[:1_000], PLAY_ROUNDS * config.rounds
    with Client(url, retry=Retry(timeout=60)) as client:

        def post(body: dict[str, Any]) -> None:
            client.plays(body.get("plays", [body]))

        result = bench_history_lengths(post, song_ids, name="length", rounds=round_count, many=config.many_plays)
    return 1 / float(result.ratio)


@contextmanager
def application(kind: str, workspace: Workspace, store: str, replicas: int = 1) -> Iterator[str]:
    """Run an application in a separate process until the block ends, and yield its URL.

    `kind` is bare for bare uvicorn, or serve for `rayrec serve`; `store` is the address of the store of user states.
    Raises `RayrecError` with the last line of its output if it does not start.
    """
    command = [sys.executable, "-m", "rayrec.bench.bare_server", workspace.uri, store]
    if kind == "serve":
        command = [sys.executable, "-m", "rayrec_cli.main", "--workspace", workspace.uri, "serve", "--port", "0"]
        command += ["--store", store, "--replicas", str(replicas), "--max-waiting", str(MAX_WAITING)]
    environment = {**os.environ, **ENVIRONMENT}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        url = _read_url(kind, process)
        timer.cancel()  # the limit is only for the start
        yield url
    finally:
        timer.cancel()
        _stop(process)


def _read_url(kind: str, process: "subprocess.Popen[str]") -> str:
    """Return the URL that an application prints once it answers; a thread reads and drops later lines."""
    last_line, lines = "", process.stdout
    assert lines is not None
    for line in lines:
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        if match:
            threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
            return match[0]
        last_line = line.strip() or last_line
    raise RayrecError(f"the {kind} application did not start: {last_line or 'no output'}")


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.stdin:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


FEW, MANY = 10, 10_000  # plays per user in the two groups that are compared

Post = Callable[[dict[str, Any]], None]  # sends one body to /v1/plays; raises if it is not accepted


class _PlayingUsers:
    """Users with `plays` plays each in the store, who get more plays in turn."""

    def __init__(
        self, post: Post, song_ids: Sequence[str], id_prefix: str, users: int, plays: int, first_played_at: int
    ) -> None:
        self._song_ids = song_ids
        self._user_ids = [f"{id_prefix}-{number}" for number in range(users)]
        self._first_played_at = first_played_at
        self._play_counts = dict.fromkeys(self._user_ids, 0)
        pending_plays: list[dict[str, Any]] = []
        for user_id in self._user_ids:
            for _ in range(plays):
                pending_plays.append(self._next_play(user_id))
                if len(pending_plays) == MAX_PLAYS:
                    post({"plays": pending_plays})
                    pending_plays = []
        if pending_plays:
            post({"plays": pending_plays})

    def new_plays(self) -> Iterator[dict[str, Any]]:
        """Return an endless iterator over new plays, one of each user in turn."""
        return (self._next_play(self._user_ids[number % len(self._user_ids)]) for number in count())

    def _next_play(self, user_id: str) -> dict[str, Any]:
        play_number = self._play_counts[user_id]
        self._play_counts[user_id] += 1
        return {
            "event_id": f"{user_id}-{play_number}",
            "user_id": user_id,
            "song_id": self._song_ids[(play_number * 7919 + len(user_id)) % len(self._song_ids)],
            "played_at": self._first_played_at + play_number * GAP_MS,
        }


def bench_history_lengths(
    post: Post,
    song_ids: Sequence[str],
    *,
    name: str,
    rounds: int = 10,
    plays: int = 50,
    few: int = FEW,
    many: int = MANY,
) -> BenchResult:
    """Compare plays per second of users with `many` plays to those of users with `few` plays.

    Rounds of `plays` calls of `post` alternate, with one play per call. The ids of the created users begin with `name`.
    Each user with few plays gets only one more. The users with many plays take turns, so that sometimes the window of
    latest plays of a user is full and its older plays leave it.
    """
    first_played_at = time.time_ns() // 1_000_000 - (many + rounds * plays) * GAP_MS
    short_history_plays = _PlayingUsers(post, song_ids, f"{name}-few", rounds * plays, few, first_played_at).new_plays()
    long_history_plays = _PlayingUsers(post, song_ids, f"{name}-many", LONG_USERS, many, first_played_at).new_plays()

    def create_way(new_plays: Iterator[dict[str, Any]]) -> Callable[[], Measured]:
        def post_plays() -> Measured:
            bodies = [next(new_plays) for _ in range(plays)]
            started = time.perf_counter()
            for body in bodies:
                post(body)
            return Measured(plays, time.perf_counter() - started)

        return post_plays

    return compare(
        "plays-by-history",
        "plays",
        create_way(long_history_plays),
        create_way(short_history_plays),
        rounds=rounds,
        few_plays=few,
        many_plays=many,
    )


THREADS = 2  # of wrk, if there are at least as many clients
GRACE_SECONDS = 60.0  # after the end of a load, before a load generator that still runs is killed

SCRIPT = """
local bodies, place = {}, 0
function init(arguments)
  for line in io.lines(arguments[1]) do bodies[#bodies + 1] = line end
  place = math.random(0, #bodies)
  wrk.headers["Content-Type"] = "application/json"
end
function request()
  if #bodies == 0 then return wrk.format("GET") end
  place = place % #bodies + 1
  return wrk.format("POST", nil, nil, bodies[place])
end
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '\\n{"answered":%d,"seconds":%.6f,"p50_ms":%.4f,"p99_ms":%.4f,"errors":%d}\\n', summary.requests,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def generator() -> str:
    """Return the name of the load generator: wrk if it is installed, else httpx."""
    return "wrk" if shutil.which("wrk") else "httpx"


def put_under_load(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    """Send requests over `clients` connections for `seconds`: POST the bodies in turn, or GET if there are none."""
    if generator() == "wrk":
        return _load_with_wrk(url, bodies, clients, seconds)
    return asyncio.run(_load_with_httpx(url, bodies, clients, seconds))


def _load_with_wrk(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
        lua_path, bodies_path = Path(folder) / "load.lua", Path(folder) / "bodies"
        lua_path.write_text(SCRIPT)
        bodies_path.write_text("".join(json.dumps(body) + "\n" for body in bodies))
        command = ["wrk", "--threads", str(min(THREADS, clients)), "--connections", str(clients), "--timeout", "30s"]
        command += ["--duration", f"{max(1, round(seconds))}s", "--script", str(lua_path), url, "--", str(bodies_path)]
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False
        )
    if completed.returncode:
        raise RayrecError(f"wrk failed on {url}: {(completed.stderr or completed.stdout).strip()[:300]}")
    return Load(**json.loads(completed.stdout.strip().splitlines()[-1]))


async def _load_with_httpx(url: str, bodies: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    import httpx

    contents, body_numbers = [json.dumps(body).encode() for body in bodies], count()
    latencies: list[float] = []
    errors, started = 0, time.perf_counter()

    async def send_requests(client: httpx.AsyncClient) -> None:
        nonlocal errors
        while (request_started := time.perf_counter()) < started + seconds:
            content = contents[next(body_numbers) % len(contents)] if contents else None
            try:
                response = await client.request(
                    "POST" if contents else "GET", url, content=content, headers={"Content-Type": "application/json"}
                )
                errors += response.status_code >= 400
            except httpx.HTTPError:
                errors += 1
            latencies.append(time.perf_counter() - request_started)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(limits=limits, timeout=30, trust_env=False) as client:
        await asyncio.gather(*(send_requests(client) for _ in range(clients)))
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3
    seconds = time.perf_counter() - started
    return Load(answered=len(latencies), seconds=seconds, p50_ms=float(p50), p99_ms=float(p99), errors=errors)
