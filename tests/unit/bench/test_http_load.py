"""The load generators against a server that counts requests, and the summaries against figures computed by hand."""

import asyncio
import itertools
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayrec.bench import rounds, serve_bench, soak
from rayrec.bench.bench_config import ServeBenchConfig, SoakBenchConfig
from rayrec.bench.serve_bench import Load, put_under_load, summarize_slices
from rayrec.bench.soak import SoakCounts, attempt, compare_plays, memory_growth
from rayrec.client import ApiError, ApiUnavailableError
from rayrec.errors import InputError, RayrecError
from rayrec.storage.workspace import Workspace


class CountingHandler(BaseHTTPRequestHandler):
    """Records the requests that it gets; answers every request to /bad with 503."""

    protocol_version = "HTTP/1.1"
    requests: list[tuple[str, str, bytes]] = []  # noqa: RUF012

    def do_POST(self) -> None:
        """Answer a POST."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.requests.append((self.command, self.headers.get("Content-Type", ""), body))
        self.send_response(503 if self.path == "/bad" else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    CountingHandler.requests = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), CountingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["wrk", "httpx"])
def generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "wrk" and not shutil.which("wrk"):
        pytest.skip("no wrk: install Debian's package wrk")
    monkeypatch.setattr(serve_bench, "generator", lambda: request.param)
    return str(request.param)


def test_all_bodies_are_sent_and_answers_counted(url: str, generator: str) -> None:
    load = put_under_load(url, [{"k": number} for number in range(3)], 2, 1.0)
    assert load.answered > 0
    assert load.errors == 0
    assert 0 < load.p50_ms <= load.p99_ms < 30_000
    assert load.per_second == pytest.approx(load.answered / load.seconds)
    assert {body for _, _, body in CountingHandler.requests} == {b'{"k": 0}', b'{"k": 1}', b'{"k": 2}'}
    assert {(method, kind) for method, kind, _ in CountingHandler.requests} == {("POST", "application/json")}
    assert load.answered <= len(CountingHandler.requests) <= load.answered + 4


def test_without_bodies_get_requests_are_sent(url: str, generator: str) -> None:
    assert put_under_load(url, [], 1, 1.0).answered > 0
    assert {method for method, _, _ in CountingHandler.requests} == {"GET"}


def test_refused_requests_are_errors_and_no_work(url: str, generator: str) -> None:
    load = put_under_load(f"{url}/bad", [{}], 1, 1.0)
    assert load.errors == load.answered > 0
    assert load.per_second == 0


def _load(per_second: float, p50_ms: float, errors: int = 0) -> Load:
    return Load(answered=round(per_second) + errors, seconds=1.0, p50_ms=p50_ms, p99_ms=9.0, errors=errors)


def test_ratios_are_medians_of_those_within_a_round() -> None:
    rounds = [
        {
            "bare history 1": _load(100, 2.0),
            "serve history 1": _load(90, 2.0 * factor),
            "bare history 16": _load(200, 5.0),
            "serve history 16": _load(200 * factor, 6.0, errors=1),
            "bare noop 1": _load(900, 0.2),
            "bare stored 1": _load(500, 0.2 + factor),
        }
        for factor in (1.0, 3.0, 1.5)
    ]
    summary = summarize_slices(rounds)
    assert summary["p50_ratio"] == pytest.approx(1.5)
    assert summary["throughput_ratio"] == pytest.approx(1.5)
    assert summary["stored_over_noop_ms"] == pytest.approx(1.5)
    assert summary["errors"] == 3
    assert summary["loads"]["serve history 16"] == {"per_second": 300.0, "p50_ms": 6.0, "p99_ms": 9.0, "errors": 3}


def test_numbers_of_clients_without_1_and_16_are_refused() -> None:
    with pytest.raises(InputError, match="expected integers that include 1 and 16"):
        ServeBenchConfig(clients=(1, 64))


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (None, {}),
        (ApiError({"status": 422, "title": "Unprocessable"}), {"422": 1}),
        (ApiUnavailableError("gone"), {"NoneType": 1}),
    ],
)
def test_a_call_that_fails_after_its_retries_is_counted_by_reason(
    error: Exception | None, failed: dict[str, int]
) -> None:
    async def call() -> None:
        if error:
            raise error

    counts = SoakCounts()
    assert asyncio.run(attempt(call(), counts)) is (error is None)
    assert dict(counts.failed) == failed


@pytest.mark.parametrize(
    ("stored", "differences"),
    [
        ([1, 2], (0, 0)),
        ([1, 2, 3], (0, 0)),  # the third was stored, and its answer lost
        ([1], (1, 0)),
        ([1, 1, 3], (1, 1)),  # three, as many as were sent: totals would not show the faults
        ([1, 2, 3, 3], (0, 1)),
        ([1, 2, 4], (0, 1)),  # play 4 was never sent
        ([], (2, 0)),
    ],
)
def test_every_acknowledged_play_must_be_stored_once_and_no_other_twice(
    stored: list[int], differences: tuple[int, int]
) -> None:
    assert compare_plays({1: True, 2: True, 3: False}, stored) == differences


@pytest.mark.parametrize(
    ("used", "grown"),
    [
        ([100.0], 1.0),
        ([100.0, 110.0], 1.1),
        ([10.0, 50.0, *[100.0] * 8], 1.0),  # memory fills up at first
        ([0.0, 0.0, 100.0, 70.0, 100.0, 100.0, 120.0, 120.0, 90.0, 120.0], 1.2),  # 70 and 90: a replica was new
    ],
)
def test_memory_grows_by_what_the_second_half_holds_over_the_first(used: list[float], grown: float) -> None:
    assert memory_growth(used) == pytest.approx(grown)


class RunningReplica:
    """A replica without a process; it runs until it is killed."""

    def __init__(self, pid: int, started: float) -> None:
        self.pid, self._started, self.is_running = pid, started, True

    def create_time(self) -> float:
        """Return when it started, in seconds since 1970."""
        return self._started

    def kill(self) -> None:
        """End it."""
        self.is_running = False


def test_the_oldest_replica_is_never_killed_and_all_memory_samples_are_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    all_replicas = [RunningReplica(pid, started) for pid, started in ((1, 300.0), (2, 100.0), (3, 200.0), (4, 100.0))]
    monkeypatch.setattr(soak, "replicas", lambda: [replica for replica in all_replicas if replica.is_running])
    monkeypatch.setattr(rounds, "anonymous_mb", lambda replica: float(replica.pid))
    config = SoakBenchConfig(kill_seconds=0.01)

    ticks = itertools.count()  # a clock that moves by one second at each look
    monkeypatch.setattr(soak, "time", SimpleNamespace(time=time.time, monotonic=lambda: float(next(ticks))))

    async def kill_and_sample() -> tuple[int, list[float]]:
        return await asyncio.gather(soak.kill_replicas(config, 100.0), soak.sample_memory(config, 100.0))

    kill_count, samples_mb = asyncio.run(kill_and_sample())
    assert [replica.pid for replica in all_replicas if replica.is_running] == [2]
    assert (kill_count, set(samples_mb)) == (3, {2.0})


def test_the_limit_of_the_start_ends_an_application_that_does_not_answer_and_is_lifted_once_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    popen, make_timer = subprocess.Popen, threading.Timer
    programs = iter(["input()", "print('http://127.0.0.1:1', flush=True); input()"])
    timers: list[threading.Timer] = []

    def launch(_: list[str], **options: Any) -> "subprocess.Popen[str]":
        return popen([sys.executable, "-c", next(programs)], **options)

    def record_timer(*arguments: Any) -> threading.Timer:
        timers.append(make_timer(*arguments))
        return timers[-1]

    monkeypatch.setattr(serve_bench.subprocess, "Popen", launch)
    monkeypatch.setattr(serve_bench.threading, "Timer", record_timer)
    arguments = ("bare", Workspace(str(tmp_path)), f"sqlite:///{tmp_path}/states.db")
    with monkeypatch.context() as patch:
        patch.setattr(serve_bench, "START_SECONDS", 0.1)
        with pytest.raises(RayrecError, match="did not start: no output"), serve_bench.application(*arguments):
            pass
    with serve_bench.application(*arguments):
        assert timers[1].finished.is_set()  # cancelled, long before its limit
