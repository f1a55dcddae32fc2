"""Limits on request bodies and on waiting requests, clients that disconnect, and crashes."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Client, service

from rayrec.serving.engine import Pool
from rayrec.serving.middleware import Middleware
from rayrec.serving.problems import OverloadedError
from rayrec.serving.service import Service
from rayrec.storage.workspace import Workspace

BODY = json.dumps({"history": ["song-1"]}).encode()


@pytest.fixture
def replica(world: Workspace) -> Iterator[Service]:
    with service(world, max_waiting=2, max_body=1000) as replica:
        yield replica


class Slow:
    """Delays the answers of a release until `may_answer` is set; `num_begun` counts the answers that have begun."""

    def __init__(self, replica: Service, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_answer, self.num_begun = threading.Event(), 0
        parts = replica.live.engine.parts  # type: ignore[attr-defined]
        original_answer = type(parts).answer

        def answer(this: Any, *args: Any) -> Any:
            self.num_begun += 1
            assert self.may_answer.wait(60)
            return original_answer(this, *args)

        monkeypatch.setattr(type(parts), "answer", answer)


class Call:
    """One ASGI request: the client disconnects when `disconnected` is set; `messages` are those of the response."""

    def __init__(self, app: Any, body: bytes = BODY) -> None:
        self.disconnected, self.messages = asyncio.Event(), []  # type: ignore[var-annotated]
        self._body: list[bytes] = [body]
        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/recommendations", "raw_path": b"/v1/recommendations"}
        scope |= {"headers": headers, "query_string": b"", "client": ("127.0.0.1", 1), "server": ("app", 80)}
        scope |= {"scheme": "http", "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0"}}
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int | None:
        return self.messages[0]["status"] if self.messages else None


async def wait_until(condition: Any) -> None:
    for _ in range(6_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to it")


def test_requests_beyond_the_limit_of_waiting_ones_get_a_503_that_says_when_to_try_again(
    replica: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, app = Slow(replica, monkeypatch), Client(replica).app

    async def scenario() -> None:
        calls = [Call(app) for _ in range(5)]
        await wait_until(lambda: sum(call.status == 503 for call in calls) == 3)
        slow.may_answer.set()
        await asyncio.gather(*(call.task for call in calls))
        assert sorted(call.status for call in calls) == [200, 200, 503, 503, 503]  # type: ignore[type-var]
        refused_call = next(call for call in calls if call.status == 503)
        headers = dict(refused_call.messages[0]["headers"])
        assert int(headers[b"retry-after"]) >= 1
        assert headers[b"content-type"] == b"application/problem+json"

    asyncio.run(scenario())


def test_a_client_that_goes_away_frees_its_place(replica: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, app, pool = Slow(replica, monkeypatch), Client(replica).app, replica.live.engine.pool

    async def scenario() -> None:
        running_call = Call(app)
        await wait_until(lambda: slow.num_begun == 1)
        waiting_call = Call(app)
        await wait_until(lambda: pool.waiting == 2)
        refused_call = Call(app)
        await refused_call.task
        assert refused_call.status == 503
        waiting_call.disconnected.set()
        await waiting_call.task
        assert waiting_call.status is None
        third_call = Call(app)
        await wait_until(lambda: pool.waiting == 2)
        slow.may_answer.set()
        await asyncio.gather(running_call.task, third_call.task)
        assert (running_call.status, third_call.status, slow.num_begun) == (200, 200, 2)

    asyncio.run(scenario())
    assert 'status="499"' in Client(replica).get("/metrics").text


def test_a_crash_is_an_answer_like_others_counted_as_500_and_logged_once(
    world: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(Service, "recommend", crash)
    origin, log = "https://music.example", tmp_path / "access.log"
    with service(world, cors_origins=(origin,), access_log=str(log)) as replica:
        client = Client(replica)
        response = client.post("/v1/recommendations", {"history": []}, headers={"Origin": origin, "X-Request-ID": "me"})
        metrics = client.get("/metrics").text
    assert (response.status_code, response.headers["content-type"]) == (500, "application/problem+json")
    assert response.headers["x-request-id"] == "me"
    assert response.headers["access-control-allow-origin"] == origin
    assert "total;dur=" in response.headers["server-timing"]
    assert 'route="/v1/recommendations",status="500"' in metrics
    assert 'status="499"' not in metrics
    entry = json.loads(log.read_text("utf-8").splitlines()[0])
    assert (entry["route"], entry["status"]) == ("/v1/recommendations", 500)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == "request me failed"
    assert "planted" in caplog.text


def test_a_crash_after_the_answer_has_begun_is_counted_as_500_and_left_to_the_server(replica: Service) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        raise RuntimeError("planted")

    async def scenario() -> None:
        call = Call(Middleware(app, replica))
        with pytest.raises(RuntimeError, match="planted"):
            await call.task
        assert [message["type"] for message in call.messages] == ["http.response.start", "http.response.body"]

    asyncio.run(scenario())
    assert 'route="none",status="500"' in Client(replica).get("/metrics").text


def test_health_answers_while_the_worker_is_busy(replica: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(replica, monkeypatch)
    client = Client(replica)

    async def scenario() -> None:
        call = Call(client.app)
        await wait_until(lambda: slow.num_begun == 1)
        response = await client.send("GET", "/healthz", {})
        assert (response.status_code, call.status) == (200, None)
        slow.may_answer.set()
        await call.task

    asyncio.run(scenario())


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_the_limit_is_refused_before_it_is_all_read(replica: Service, declared: bool) -> None:
    chunks_read = 0

    async def endless_body() -> Any:
        nonlocal chunks_read
        for _ in range(100):
            chunks_read += 1
            yield b" " * 500

    headers = {"Content-Type": "application/json"} | ({"Content-Length": "50000"} if declared else {})
    response = Client(replica).request("POST", "/v1/recommendations", content=endless_body(), headers=headers)
    assert response.status_code == 413
    assert chunks_read <= 4


def test_a_websocket_is_turned_away(replica: Service) -> None:
    messages: list[Any] = []

    async def scenario() -> None:
        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            messages.append(message)

        scope = {"type": "websocket", "path": "/v1/release", "headers": [], "query_string": b"", "subprotocols": []}
        await Client(replica).app(scope, receive, send)

    asyncio.run(scenario())
    assert [message["type"] for message in messages] == ["websocket.close"]


def test_a_pool_counts_no_call_twice() -> None:
    pool = Pool(3)

    async def scenario() -> None:
        may_end = threading.Event()
        tasks = [asyncio.ensure_future(pool.run(may_end.wait, 10)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError):
            await pool.run(int)
        tasks[2].cancel()
        await asyncio.sleep(0.05)
        assert pool.waiting == 2
        may_end.set()
        assert await asyncio.gather(*tasks[:2]) == [True, True]
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)
        await asyncio.sleep(0.05)
        assert pool.waiting == 0

    asyncio.run(scenario())
