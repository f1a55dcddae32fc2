"""Spans of requests in the traces of their callers (W3C Trace Context), by OpenTelemetry."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import propagate, trace

TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@contextmanager
def request_span(method: str, headers: Mapping[str, str]) -> Iterator[trace.Span]:
    """A span of the trace that the headers name, or of a new one.

    It goes where the process's tracer provider sends it, and nowhere without one.
    """
    tracer, caller = trace.get_tracer("rayrec"), propagate.extract(headers)
    with tracer.start_as_current_span(method, caller, kind=trace.SpanKind.SERVER) as span:
        yield span


def end_span(span: trace.Span, method: str, route: str, status: int) -> None:
    """Give a span the name of its route, and its status."""
    if span.is_recording():
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})


def trace_id(headers: Mapping[str, str]) -> str | None:
    """The id of the trace that the headers name."""
    match = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return match.group(1) if match else None
