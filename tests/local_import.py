"""Imports in this process: the real job, with a plain loop in place of the cluster."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from rayrec.jobs import import_data as job


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import_data` and `append_plays` run without Ray until the end of the test."""

    def run(make_worker: Any, units: Iterable[int], *, arguments: dict[str, Any], called: str) -> Iterator[Any]:
        worker = make_worker(**arguments)
        for unit in units:
            yield worker(unit)

    monkeypatch.setattr(job, "run_buckets", run)
    monkeypatch.setattr(job, "ray_cluster", contextlib.nullcontext)
