"""The HTTP clients against servers that hang up, refuse or answer."""

import asyncio
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict

import httpx
import pytest
from served import service, write_release, write_world

from rayrec import client as client_module
from rayrec.client import ApiError, ApiUnavailableError, AsyncClient, Client, Retry
from rayrec.serving.routes import create_app
from rayrec.storage.workspace import Workspace

# Optional arguments that a method needs in a call; its required arguments come from SAMPLES, by name.
OPTIONAL_ARGUMENTS = {"recommend": {"user_id": "ann"}, "rank": {"user_id": "ann"}}
SAMPLES: dict[str, Any] = {
    "user_id": "ann",
    "song_id": "song-1",
    "songs": ["song-1"],
    "plays": [{"user_id": "ann", "song_id": "song-1", "event_id": "e"}],
    "requests": [{"user_id": "ann"}],
    "users": [{"history": ["song-1"]}],
    "query": "abba",
}
BUSY = {"status": 503, "title": "Busy", "detail": "try later"}


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "FIRST_WAIT_SECONDS", 0.001)


@contextmanager
def server(answers: list[Callable[[BaseHTTPRequestHandler], None]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Run a server that gives each answer once; yield its URL and the list of the requests that it received."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            requests.append({"path": self.path, **json.loads(self.rfile.read(int(self.headers["Content-Length"])))})
            answers.pop(0)(self)

        def do_GET(self) -> None:
            requests.append({"path": self.path, "authorization": self.headers.get("Authorization")})
            answers.pop(0)(self)

        def do_DELETE(self) -> None:
            requests.append({"path": self.path, "method": self.command})
            answers.pop(0)(self)

        def log_message(self, *words: Any) -> None:
            """Log nothing."""

    http_server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http_server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}", requests
    finally:
        http_server.shutdown()
        http_server.server_close()


def answer(code: int, body: Any) -> Callable[[BaseHTTPRequestHandler], None]:
    """Return an answer with a status code and a JSON body."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        content = json.dumps(body).encode()
        handler.send_response(code)
        handler.send_header("Retry-After", "0")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return send


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.connection.close()


@pytest.mark.parametrize("first", [answer(503, BUSY), answer(502, {}), hang_up])
def test_a_play_is_sent_again_with_the_same_event_id(first: Any) -> None:
    with server([first, first, answer(200, {"taken": 1})]) as (url, requests), Client(url) as client:
        assert client.play("ann", "song-1") == {"taken": 1}
    assert len(requests) == 3
    assert requests[0] == requests[1] == requests[2]
    (play,) = requests[0]["plays"]
    assert (play["user_id"], play["song_id"], len(play["event_id"])) == ("ann", "song-1", 36)
    assert "played_at" not in play


def test_the_asynchronous_client_retries_too() -> None:
    async def call(url: str) -> Any:
        async with AsyncClient(url) as client:
            return await client.recommend(user_id="ann", k=2), await client.taste("ann")

    with server([hang_up, answer(200, {"songs": []}), answer(200, {"plays": 3})]) as (url, requests):
        assert asyncio.run(call(url)) == ({"songs": []}, {"plays": 3})
    assert [request["path"] for request in requests] == ["/v1/recommendations"] * 2 + ["/v1/users/ann/taste"]


def test_a_user_of_any_id_is_deleted_by_both_clients_even_where_an_answer_is_lost() -> None:
    async def forget(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.forget("a/b ü.")

    with server([hang_up, answer(204, {}), answer(204, {})]) as (url, requests):
        with Client(url) as client:
            client.forget("a/b ü.")
        asyncio.run(forget(url))
    assert requests == [{"path": "/v1/users/a%2Fb%20%C3%BC%2E", "method": "DELETE"}] * 3


def test_each_method_requests_its_endpoint() -> None:
    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    with server([answer(200, {"songs": []})] * 4) as (url, requests), Client(url) as client:
        client.rank(["a", "b"], user_id="ann", at=at)
        client.recommend(history=["a"], k=5, cursor="abc")
        client.popular(k=3, artists=["Abba", "Cher"])
        client.new(market="SE")
    assert requests[0] == {
        "path": "/v1/rank",
        "user_id": "ann",
        "songs": ["a", "b"],
        "at": "2026-01-20T18:24:00+00:00",
    }
    assert requests[1] == {"path": "/v1/recommendations", "history": ["a"], "k": 5, "cursor": "abc"}
    assert [request["path"] for request in requests[2:]] == [
        "/v1/songs/popular?k=3&artists=Abba&artists=Cher",
        "/v1/songs/new?market=SE",
    ]

    async def call(url: str) -> None:
        async with AsyncClient(url) as client:
            await client.rank(["a", "b"], user_id="ann", at=at)
            await client.recommend(history=["a"], k=5, cursor="abc")
            await client.popular(k=3, artists=["Abba", "Cher"])
            await client.new(market="SE")

    with server([answer(200, {"songs": []})] * 4) as (url, async_requests):
        asyncio.run(call(url))
    assert async_requests == requests


def test_an_option_of_none_is_not_sent_by_either_client() -> None:
    play = {"user_id": "ann", "song_id": "a", "event_id": "e"}
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("popular", (), {"cursor": None, "k": 20}),
        ("new", (), {"market": None, "k": None}),
        ("user_recommendations", ("ann",), {"cursor": None}),
        ("recommend", (), {"user_id": "ann", "k": None}),
        ("recommend_batch", ([{"user_id": "ann", "k": None}],), {}),
        ("plays", ([{**play, "played_at": None, "type": None}],), {}),
    ]
    expected: list[dict[str, Any]] = [
        {"path": "/v1/songs/popular?k=20", "authorization": None},
        {"path": "/v1/songs/new", "authorization": None},
        {"path": "/v1/users/ann/recommendations", "authorization": None},
        {"path": "/v1/recommendations", "user_id": "ann"},
        {"path": "/v1/recommendations/batch", "requests": [{"user_id": "ann"}]},
        {"path": "/v1/plays", "plays": [play]},
    ]

    async def call_all(url: str) -> None:
        async with AsyncClient(url) as client:
            for name, arguments, options in calls:
                await getattr(client, name)(*arguments, **options)

    with server([answer(200, {})] * 12) as (url, requests):
        with Client(url) as client:
            for name, arguments, options in calls:
                getattr(client, name)(*arguments, **options)
        asyncio.run(call_all(url))
    assert requests == expected * 2


def test_a_refusal_is_raised_at_once_and_a_busy_server_after_the_last_retry() -> None:
    refusal = answer(422, {"status": 422, "title": "Unprocessable Content", "detail": "k is 0"})
    with server([refusal]) as (url, requests), Client(url) as client:
        with pytest.raises(ApiError, match="422 Unprocessable Content: k is 0") as raised:
            client.recommend(history=["song-1"], k=0)
        assert raised.value.status == 422
    assert len(requests) == 1
    retry = Retry(retries=2)
    with (
        server([answer(503, BUSY)] * 3) as (url, requests),
        Client(url, retry=retry) as client,
        pytest.raises(ApiError, match="503 Busy: try later"),
    ):
        client.recommend(history=["song-1"])
    assert len(requests) == 3


def test_the_text_of_an_error_names_the_first_invalid_fields_once() -> None:
    fields = [{"where": f"plays.{number}.k", "detail": "too small"} for number in range(9)]
    problem = {"status": 422, "title": "Unprocessable Content", "detail": "The request is invalid"}
    text = "422 Unprocessable Content: The request is invalid; plays.0.k: too small; plays.1.k: too small"
    assert str(ApiError({**problem, "errors": fields})).startswith(text)
    assert str(ApiError({**problem, "errors": fields})).count("too small") == 3
    named = {**problem, "detail": "at: too early", "errors": [{"where": "at", "detail": "too early"}]}
    assert str(ApiError(named)) == "422 Unprocessable Content: at: too early"
    assert str(ApiError({**problem, "errors": "k"})) == "422 Unprocessable Content: The request is invalid"


@pytest.mark.parametrize("body", [{"message": "Forbidden"}, {"status": "error"}, ["Forbidden"], "Forbidden"])
def test_json_of_a_gateway_that_is_no_problem_document_gives_an_error_with_the_status(body: Any) -> None:
    with server([answer(403, body)]) as (url, _), Client(url) as client:
        with pytest.raises(ApiError, match="403 Forbidden") as raised:
            client.forget("ann")
        assert raised.value.status == 403


@pytest.mark.parametrize(
    ("code", "headers", "body", "message"),
    [
        (301, {"Location": "https://music.example/", "Content-Type": "text/html"}, "<html>", "https://music.example/"),
        (308, {"Location": "https://music.example/"}, "", "308 Permanent Redirect"),
        (200, {"Content-Type": "text/html"}, "<html>log in", "text/html where a JSON object is expected"),
        (200, {}, "", "no Content-Type"),
        (200, {"Content-Type": "application/json"}, '"ok"', "JSON object"),
    ],
)
def test_an_answer_of_something_else_than_the_server_is_an_error_so_that_no_play_is_lost_unseen(
    code: int, headers: dict[str, str], body: str, message: str
) -> None:
    def send(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body.encode())

    async def require_errors(url: str) -> None:
        async with AsyncClient(url) as client:
            for call in (client.play("ann", "song-1"), client.forget("ann")):
                with pytest.raises(ApiError, match=message):
                    await call

    with server([send] * 4) as (url, requests):
        with Client(url) as client:
            for call in (partial(client.play, "ann", "song-1"), partial(client.forget, "ann")):
                with pytest.raises(ApiError, match=message):
                    call()
        asyncio.run(require_errors(url))
    assert len(requests) == 4


def test_the_error_names_a_server_that_does_not_answer() -> None:
    retry = Retry(retries=1)
    with (
        Client("http://127.0.0.1:9", retry=retry) as client,
        pytest.raises(ApiUnavailableError, match=r"http://127.0.0.1:9 does not answer"),
    ):
        client.release()


def test_ids_are_escaped_moments_have_a_zone_and_the_key_is_sent() -> None:
    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    with server([answer(200, {})] * 2) as (url, requests), Client(url, key="k" * 16) as client:
        client.taste("a/b ..?", at)
        client.play("ann", "x", at, event_id="e")
        with pytest.raises(ValueError, match="has no zone"):
            client.taste("ann", datetime(2026, 1, 20))
        with pytest.raises(ValueError, match="either a user_id or a history"):
            client.recommend()
    assert requests[0]["path"].startswith("/v1/users/a%2Fb%20%2E%2E%3F/taste?at=2026-01-20T18%3A24%3A00%2B00%3A00")
    assert requests[0]["authorization"] == "Bearer " + "k" * 16
    assert requests[1]["plays"][0]["played_at"] == "2026-01-20T18:24:00+00:00"


def test_plays_of_a_history_may_have_datetimes_with_a_zone() -> None:
    moment = "2026-01-20T18:24:00+00:00"
    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    history = [{"song_id": "a", "played_at": at}, {"song_id": "b", "played_at": 5}]
    encoded_history = [{"song_id": "a", "played_at": moment}, {"song_id": "b", "played_at": 5}]
    with server([answer(200, {})] * 4) as (url, requests), Client(url) as client:
        client.recommend(history=history, k=2)
        client.rank(["a"], history=history)
        client.recommend_batch([{"history": history}, {"history": ["a"]}])
        client.tastes([{"history": history}])
        with pytest.raises(ValueError, match="has no zone"):
            client.recommend(history=[{"song_id": "a", "played_at": datetime(2026, 1, 20)}])
    assert requests[0]["history"] == requests[1]["history"] == encoded_history
    assert requests[2]["requests"] == [{"history": encoded_history}, {"history": ["a"]}]
    assert requests[3]["users"] == [{"history": encoded_history}]


def methods(client_class: type) -> dict[str, inspect.Signature]:
    """Return name -> signature of the methods of a client class that send requests."""
    excluded = ("close", "aclose")
    functions = inspect.getmembers(client_class, inspect.isfunction)
    return {
        name: inspect.signature(function) for name, function in functions if name[0] != "_" and name not in excluded
    }


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document of the server."""
    workspace = Workspace(tmp_path_factory.mktemp("client") / "workspace")
    write_world(workspace, users=5)
    write_release(workspace, ranked=False)
    with service(workspace) as replica:
        return create_app(replica).openapi()


@pytest.fixture
def called_routes(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[type], dict[str, tuple[str, str]]]:
    """A function that calls each method of a client class; it returns name -> (HTTP method, path of the document)."""
    routes = sorted((method, path) for path, operations in document["paths"].items() for method in operations)
    requests: list[tuple[str, str]] = []

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append((request.method.lower(), request.url.raw_path.decode().partition("?")[0]))
        return httpx.Response(200, json={})

    transport = httpx.MockTransport(handle)
    monkeypatch.setattr(client_module.httpx, "Client", partial(httpx.Client, transport=transport))
    monkeypatch.setattr(client_module.httpx, "AsyncClient", partial(httpx.AsyncClient, transport=transport))

    def call_all(client_class: type) -> dict[str, tuple[str, str]]:
        called: dict[str, tuple[str, str]] = {}
        for name, signature in methods(client_class).items():
            required = [
                parameter.name
                for parameter in list(signature.parameters.values())[1:]
                if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            ]
            arguments = {**{argument: SAMPLES[argument] for argument in required}, **OPTIONAL_ARGUMENTS.get(name, {})}
            requests.clear()
            if client_class is Client:
                with Client("http://app") as client:
                    getattr(client, name)(**arguments)
            else:
                asyncio.run(_call_once(name, arguments))
            ((method, url),) = requests
            called[name] = next(
                route for route in routes if route[0] == method and re.fullmatch(_pattern(route[1]), url)
            )
        return called

    return call_all


def _pattern(path: str) -> str:
    return re.sub(r"\{\w+\}", "[^/]+", path)


def test_every_route_of_the_openapi_document_has_a_method_in_both_clients(
    document: dict[str, Any], called_routes: Callable[[type], dict[str, tuple[str, str]]]
) -> None:
    routes = {(method, path) for path, operations in document["paths"].items() for method in operations}
    for client_class in (Client, AsyncClient):
        assert set(called_routes(client_class).values()) == routes


def test_the_answer_types_of_both_clients_have_the_fields_and_types_of_the_openapi_document(
    document: dict[str, Any], called_routes: Callable[[type], dict[str, tuple[str, str]]]
) -> None:
    for client_class in (Client, AsyncClient):
        compared = 0
        for name, (method, path) in called_routes(client_class).items():
            answer_type = get_type_hints(getattr(client_class, name))["return"]
            content = document["paths"][path][method]["responses"].get("200", {}).get("content", {})
            if is_typeddict(answer_type):
                schema = content["application/json"]["schema"]
                assert type_shape(answer_type) == schema_shape(schema, document["components"]["schemas"]), name
                compared += 1
            else:
                assert "application/json" not in content or not content["application/json"]["schema"], name
        assert compared >= 18


JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def type_shape(hint: Any) -> Any:
    """Return the fields and JSON types of a type hint; equal to the `schema_shape` of the same type."""
    if is_typeddict(hint):
        return {name: type_shape(field) for name, field in sorted(get_type_hints(hint).items())}
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return sorted(map(repr, arguments))
    if get_origin(hint) is list:
        return ("list", type_shape(arguments[0]))
    if get_origin(hint) is dict:
        return ("dict", type_shape(arguments[1]))
    if arguments:
        return ("any of", sorted((type_shape(argument) for argument in arguments), key=repr))
    return JSON_TYPES[hint]


def schema_shape(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """Return the fields and JSON types of a JSON schema, whose references are to `schemas`."""
    if "$ref" in schema:
        return schema_shape(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas)
    if "anyOf" in schema:
        return ("any of", sorted((schema_shape(part, schemas) for part in schema["anyOf"]), key=repr))
    if "const" in schema or "enum" in schema:
        return sorted(map(repr, schema.get("enum", [schema.get("const")])))
    if schema["type"] == "array":
        return ("list", schema_shape(schema["items"], schemas))
    if "properties" in schema:
        return {name: schema_shape(field, schemas) for name, field in sorted(schema["properties"].items())}
    if schema["type"] == "object":
        return ("dict", schema_shape(schema["additionalProperties"], schemas))
    return schema["type"]


async def _call_once(name: str, arguments: dict[str, Any]) -> None:
    async with AsyncClient("http://app") as client:
        await getattr(client, name)(**arguments)


def test_both_clients_have_the_same_methods() -> None:
    synchronous, asynchronous = methods(Client), methods(AsyncClient)
    assert synchronous == asynchronous


def test_a_client_that_is_closed_sends_nothing_more() -> None:
    async def call(url: str) -> None:
        client = AsyncClient(url)
        assert await client.health() == {"status": "ok"}
        await client.aclose()
        with pytest.raises(RuntimeError, match="closed"):
            await client.health()

    with server([answer(200, {"status": "ok"})] * 2) as (url, requests):
        client = Client(url)
        assert client.health() == {"status": "ok"}
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.health()
        asyncio.run(call(url))
    assert len(requests) == 2


def test_pages_are_returned_as_text_and_lists_are_sent_as_the_api_expects() -> None:
    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/html; charset=utf-8")
        handler.send_header("Content-Length", "6")
        handler.end_headers()
        handler.wfile.write(b"<html>")

    at = datetime(2026, 1, 20, 18, 24, tzinfo=timezone.utc)
    answers = [page, *[answer(200, {})] * 4]
    with server(answers) as (url, requests), Client(url) as client:
        assert client.report() == "<html>"
        client.user_plays("a/b", k=3)
        client.recommend_batch([{"user_id": "ann", "at": at}, {"history": ["a"]}])
        client.tastes([{"history": ["a"], "at": at}])
        client.user_recommendations("ann", k=2, at=at, exclude=["a", "b"])
    assert requests[1]["path"] == "/v1/users/a%2Fb/plays?k=3"
    moment = "2026-01-20T18:24:00+00:00"
    assert requests[2]["requests"] == [{"user_id": "ann", "at": moment}, {"history": ["a"]}]
    assert requests[3]["users"] == [{"history": ["a"], "at": moment}]
    assert requests[4]["path"].startswith(
        "/v1/users/ann/recommendations?k=2&at=2026-01-20T18%3A24%3A00%2B00%3A00&exclude=a"
    )
