"""The access log and traces of requests, and which web pages may send requests (CORS)."""

import json
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import AT, Client, service

from rayrec.errors import InputError
from rayrec.serving.middleware import Keys, load_keys
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import Service
from rayrec.storage.workspace import Workspace

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
BODY = {"history": ["song-3"], "k": 2, "at": AT}
PAGE_HEADERS = {"Origin": "https://music.example"}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_access_log_has_a_line_for_each_request_and_no_id_of_a_user(world: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    with service(world, access_log=str(path)) as replica:
        app = Client(replica)
        app.post("/v1/recommendations", BODY, headers={"X-Request-ID": "mine", "traceparent": TRACEPARENT})
        app.get("/v1/users/secret-user/taste")
        app.get("/nothing%0Aforged")
        app.get("/openapi.json")
        first, second, third, fourth = read_lines(path)
        path.rename(tmp_path / "rotated.log")
        app.get("/healthz")
    assert (first["method"], first["route"], first["status"]) == ("POST", "/v1/recommendations", 200)
    assert (first["request_id"], first["trace_id"]) == ("mine", TRACE)
    assert 0 < first["ms"] < 60_000
    assert first["at"].endswith("Z")
    assert (second["route"], second["status"]) == ("/v1/users/{user_id}/taste", 404)
    assert (third["route"], third["status"]) == ("none", 404)
    assert (fourth["route"], fourth["status"]) == ("/openapi.json", 200)
    assert "trace_id" not in second
    assert [line["route"] for line in read_lines(path)] == ["/healthz"]
    assert "secret-user" not in (tmp_path / "rotated.log").read_text("utf-8")


def test_an_access_log_that_cannot_be_written_is_refused_at_the_start(world: Workspace, tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="cannot be written"),
        service(world, access_log=str(tmp_path / "none" / "access.log")),
    ):
        pass


def test_a_request_is_a_span_of_its_callers_trace(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    with service(world) as replica:
        app = Client(replica)
        app.post("/v1/recommendations", BODY, headers={"traceparent": TRACEPARENT})
        app.get("/readyz", headers={"traceparent": "nonsense"})
    first, second = exporter.get_finished_spans()
    assert first.context is not None
    assert first.parent is not None
    assert second.context is not None
    assert f"{first.context.trace_id:032x}" == TRACE
    assert f"{first.parent.span_id:016x}" == "b7ad6b7169203331"
    assert first.name == "POST /v1/recommendations"
    assert dict(first.attributes or {})["http.response.status_code"] == 200
    assert second.parent is None
    assert second.context.trace_id != first.context.trace_id


def test_the_span_of_a_crash_is_an_error_and_holds_it(world: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(Service, "recommend", crash)
    with service(world) as replica:
        assert Client(replica).post("/v1/recommendations", BODY).status_code == 500
    (span,) = exporter.get_finished_spans()
    assert dict(span.attributes or {})["http.response.status_code"] == 500
    assert span.status.status_code == trace.StatusCode.ERROR
    assert [dict(event.attributes or {})["exception.message"] for event in span.events] == ["planted"]


def keys() -> Keys:
    return load_keys(ServeConfig(host="0.0.0.0"), {"RAYREC_API_KEYS": "read:reader-0123456789"})


def test_pages_of_named_origins_may_call_the_api_and_others_not(world: Workspace) -> None:
    with service(world, keys(), cors_origins=("https://music.example",)) as replica:
        app, key_headers = Client(replica), {"Authorization": "Bearer reader-0123456789"}
        preflight_headers = {
            **PAGE_HEADERS,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization",
        }
        preflight = app.request("OPTIONS", "/v1/recommendations", headers=preflight_headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == PAGE_HEADERS["Origin"]
        assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
        answer = app.post("/v1/recommendations", BODY, headers={**PAGE_HEADERS, **key_headers})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == PAGE_HEADERS["Origin"]
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
        refused = app.post("/v1/recommendations", BODY, headers=PAGE_HEADERS)  # the page may read the error
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, PAGE_HEADERS["Origin"])
        other = app.post("/v1/recommendations", BODY, headers={"Origin": "https://other.example", **key_headers})
        assert "access-control-allow-origin" not in other.headers
        assert (
            app.request(
                "OPTIONS", "/v1/plays", headers={**preflight_headers, "Origin": "https://other.example"}
            ).status_code
            == 400
        )


def test_by_default_no_page_of_another_origin_may_call_the_api(world: Workspace) -> None:
    with service(world) as replica:
        answer = Client(replica).post("/v1/recommendations", BODY, headers=PAGE_HEADERS)
        assert "access-control-allow-origin" not in answer.headers
