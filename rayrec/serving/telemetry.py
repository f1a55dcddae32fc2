"""Prometheus metrics of a replica, OpenTelemetry spans of its requests, and the access log."""

import json
import logging
import logging.handlers
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

from opentelemetry import propagate, trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import MetricWrapperBase

from rayrec.data.moments import format_iso, now_ms
from rayrec.errors import InputError

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# Seconds per stage of the current request; each request has its own context. None outside of requests.
request_stages: ContextVar[dict[str, float] | None] = ContextVar("request_stages", default=None)
LABELS_KEPT = 1_000  # cached combinations of a metric and its labels


class Metrics:
    """The metrics of one replica."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, replica: str) -> None:
        self.replica, self._registry = replica, CollectorRegistry()
        self._requests = self._counter("requests", "Requests answered.", "route", "status")
        self._latency = self._histogram(
            "request_seconds", "Duration of whole requests in the replica, in seconds.", SECONDS, "route"
        )
        self._stages = self._histogram(
            "stage_seconds", "Duration of each stage of a request, in seconds.", SECONDS, "stage"
        )
        self._batch_users = self._histogram("batch_users", "Number of users per call.", USERS)
        self._paths = self._counter("answers", "Answers by how their songs were retrieved.", "path")
        self._cache = self._gauge("cache_lookups", "Look-ups in a cache of the live release.", "cache", "outcome")
        self._plays = self._counter("plays", "New plays by outcome.", "outcome")
        self._log_rows = self._counter("log_rows", "Rows of the impression log by outcome.", "log", "outcome")
        self._waiting = self._gauge("waiting", "Calls that run on the worker thread or wait for it.")
        self._release = self._gauge("release", "1 for the release that answers.", "release", "model")
        self._child = lru_cache(maxsize=LABELS_KEPT)(self._make_child)

    def _make_child(self, metric: MetricWrapperBase, *labels: str) -> Any:
        """Return a metric with its labels. `_child` caches the result, since this look-up takes as long as counting."""
        return metric.labels(self.replica, *labels)

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"rayrec_{name}", description, ("replica", *labels), registry=self._registry)

    def _gauge(self, name: str, description: str, *labels: str) -> Gauge:
        return Gauge(f"rayrec_{name}", description, ("replica", *labels), registry=self._registry)

    def _histogram(self, name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"rayrec_{name}", description, ("replica", *labels), registry=self._registry, buckets=buckets)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request that has ended, and record its duration."""
        self._child(self._requests, route, str(status)).inc()
        self._child(self._latency, route).observe(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the time of a stage, and add it to the stages of the current request."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._child(self._stages, name).observe(seconds)
            stages = request_stages.get()
            if stages is not None:
                stages[name] = stages.get(name, 0.0) + seconds

    def batch(self, users: int) -> None:
        """Record the number of users of a call."""
        self._child(self._batch_users).observe(users)

    def path(self, name: str) -> None:
        """Count an answer by how its songs were retrieved."""
        self._child(self._paths, name).inc()

    def plays(self, outcome: str, count: int) -> None:
        """Count new plays by outcome."""
        self._child(self._plays, outcome).inc(count)

    def logged(self, log: str, outcome: str, rows: int) -> None:
        """Count rows of the impression log by outcome."""
        self._child(self._log_rows, log, outcome).inc(rows)

    def release(self, release_id: str, model_id: str) -> None:
        """Set the release that answers from now on."""
        self._release.clear()
        self._release.labels(self.replica, release_id, model_id).set(1)

    def watch_waiting(self, count_calls: Callable[[], float]) -> None:
        """Call `count_calls` whenever the metrics are read; it returns the number of calls that run or wait."""
        self._waiting.labels(self.replica).set_function(count_calls)

    def watch_cache(self, name: str, count_lookups: Callable[[str], float]) -> None:
        """Call `count_lookups` whenever the metrics are read; it returns the `hits` or `misses` of the cache."""
        for outcome in ("hits", "misses"):
            self._cache.labels(self.replica, name, outcome).set_function(partial(count_lookups, outcome))

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@contextmanager
def request_span(method: str, headers: Mapping[str, str]) -> Iterator[trace.Span]:
    """Open a span in the trace that the headers name, or in a new trace.

    The tracer provider of the process exports the span; without a provider nothing is exported.
    """
    tracer, caller_context = trace.get_tracer("rayrec"), propagate.extract(headers)
    with tracer.start_as_current_span(method, caller_context, kind=trace.SpanKind.SERVER) as span:
        yield span


def end_span(span: trace.Span, method: str, route: str, status: int) -> None:
    """Name a span after its route and set its status; HTTP status 500 and above is an error."""
    if span.is_recording():
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.request.method": method, "http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(trace.StatusCode.ERROR)


def trace_id(headers: Mapping[str, str]) -> str | None:
    """Return the id of the trace that the headers name; None if they name none."""
    match = TRACEPARENT.fullmatch(headers.get("traceparent", ""))
    return match.group(1) if match else None


class AccessLog:
    """Writes one JSON line per request, with the route instead of the path, since paths contain user ids."""

    def __init__(self, target: str) -> None:
        """`target` is the path of a file, which may be moved at any time, or `-` for standard error.

        Raises `InputError` if the file cannot be written.
        """
        try:
            handler: logging.Handler = (
                logging.StreamHandler(sys.stderr) if target == "-" else logging.handlers.WatchedFileHandler(target)
            )
        except OSError as error:
            raise InputError(f"access log {target} cannot be written: {error.strerror}; give another file") from error
        self._log = logging.Logger("rayrec.access", logging.INFO)
        self._log.addHandler(handler)

    def write(self, **fields: Any) -> None:
        """Write one line, without fields that are None. A line that cannot be written is lost."""
        given_fields = {name: value for name, value in fields.items() if value is not None}
        self._log.info("%s", json.dumps({"at": format_iso(now_ms()), **given_fields}))

    def close(self) -> None:
        """Close the file."""
        for handler in self._log.handlers:
            handler.close()
