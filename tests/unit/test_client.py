"""The HTTP client against servers that break, refuse and answer."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from rayrec import client as client_module
from rayrec.client import ApiError, ApiUnavailableError, AsyncClient, Client, Retry

BUSY = {"status": 503, "title": "Busy", "detail": "try later"}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.001)


@contextmanager
def server(answers: list[Callable[[BaseHTTPRequestHandler], None]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives each answer once, and what it received."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append({"path": self.path, **json.loads(self.rfile.read(int(self.headers["Content-Length"])))})
            answers.pop(0)(self)

        def do_GET(self) -> None:
            bodies.append({"path": self.path, "authorization": self.headers.get("Authorization")})
            answers.pop(0)(self)

        def do_DELETE(self) -> None:
            bodies.append({"path": self.path, "method": self.command})
            answers.pop(0)(self)

        def log_message(self, *words: Any) -> None:
            """Says nothing."""

    made = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", bodies
    finally:
        made.shutdown()
        made.server_close()


def status(code: int, body: dict[str, Any]) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer."""

    def give(handler: BaseHTTPRequestHandler) -> None:
        content = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Retry-After", "0")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return give


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without a word."""
    handler.connection.close()


@pytest.mark.parametrize("first", [status(503, BUSY), status(502, {}), hang_up])
def test_a_play_is_sent_again_with_the_same_event_id(first: Any) -> None:
    with server([first, first, status(200, {"taken": 1})]) as (url, bodies), Client(url) as client:
        assert client.play("ann", "song-1") == {"taken": 1}
    assert len(bodies) == 3
    assert bodies[0] == bodies[1] == bodies[2]
    (play,) = bodies[0]["plays"]
    assert (play["user_id"], play["song_id"], len(play["event_id"])) == ("ann", "song-1", 36)
    assert "played_at" not in play


def test_the_asynchronous_client_retries_too() -> None:
    async def call(url: str) -> Any:
        async with AsyncClient(url) as client:
            return await client.recommend(user_id="ann", k=2), await client.taste("ann")

    with server([hang_up, status(200, {"songs": []}), status(200, {"plays": 3})]) as (url, bodies):
        assert asyncio.run(call(url)) == ({"songs": []}, {"plays": 3})
    assert [body["path"] for body in bodies] == ["/v1/recommendations"] * 2 + ["/v1/users/ann/taste"]


def test_a_user_of_any_id_is_deleted_by_both_clients_even_where_an_answer_is_lost() -> None:
    async def forget(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.forget("a/b ü.")

    with server([hang_up, status(204, {}), status(204, {})]) as (url, bodies):
        with Client(url) as client:
            client.forget("a/b ü.")
        asyncio.run(forget(url))
    assert bodies == [{"path": "/v1/users/a%2Fb%20%C3%BC%2E", "method": "DELETE"}] * 3


def test_each_method_asks_its_endpoint() -> None:
    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    with server([status(200, {"songs": []})] * 4) as (url, bodies), Client(url) as client:
        client.rank(["a", "b"], user_id="ann", at=at)
        client.recommend(history=["a"], k=5, cursor="abc")
        client.popular(k=3, artists=["Abba", "Cher"])
        client.new(market="SE")
    assert bodies[0] == {
        "path": "/v1/rank",
        "user_id": "ann",
        "songs": ["a", "b"],
        "at": "2026-01-20T18:24:00+00:00",
    }
    assert bodies[1] == {"path": "/v1/recommendations", "history": ["a"], "k": 5, "cursor": "abc"}
    assert [body["path"] for body in bodies[2:]] == [
        "/v1/songs/popular?k=3&artists=Abba&artists=Cher",
        "/v1/songs/new?market=SE",
    ]

    async def ask(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.rank(["a", "b"], user_id="ann", at=at)
            await client.recommend(history=["a"], k=5, cursor="abc")
            await client.popular(k=3, artists=["Abba", "Cher"])
            await client.new(market="SE")

    with server([status(200, {"songs": []})] * 4) as (url, bodies_of_async):
        asyncio.run(ask(url))
    assert bodies_of_async == bodies


def test_a_refusal_is_raised_at_once_and_a_busy_server_after_the_last_retry() -> None:
    refusal = status(422, {"status": 422, "title": "Unprocessable Content", "detail": "k is 0"})
    with server([refusal]) as (url, bodies), Client(url) as client:
        with pytest.raises(ApiError, match="422 Unprocessable Content: k is 0") as raised:
            client.recommend(history=["song-1"], k=0)
        assert raised.value.status == 422
    assert len(bodies) == 1
    retry = Retry(retries=2)
    with (
        server([status(503, BUSY)] * 3) as (url, bodies),
        Client(url, retry=retry) as client,
        pytest.raises(ApiError, match="503 Busy: try later"),
    ):
        client.recommend(history=["song-1"])
    assert len(bodies) == 3


def test_a_server_that_is_not_there_is_named() -> None:
    retry = Retry(retries=1)
    with (
        Client("http://127.0.0.1:9", retry=retry) as client,
        pytest.raises(ApiUnavailableError, match=r"http://127.0.0.1:9 does not answer"),
    ):
        client.release()


def test_ids_are_escaped_moments_have_a_zone_and_the_key_is_sent() -> None:
    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    with server([status(200, {})] * 2) as (url, bodies), Client(url, key="k" * 16) as client:
        client.taste("a/b ..?", at)
        client.play("ann", "x", at, event_id="e")
        with pytest.raises(ValueError, match="has no zone"):
            client.taste("ann", datetime(2026, 1, 20))
        with pytest.raises(ValueError, match="either a user_id or a history"):
            client.recommend()
    assert bodies[0]["path"].startswith("/v1/users/a%2Fb%20%2E%2E%3F/taste?at=2026-01-20T18%3A24%3A00%2B00%3A00")
    assert bodies[0]["authorization"] == "Bearer " + "k" * 16
    assert bodies[1]["plays"][0]["played_at"] == "2026-01-20T18:24:00+00:00"
