"""Measures the private memory of the workers of jobs, and the bytes that they get through the object store.

Jobs run in this process; each worker runs in a process of its own, whose memory is sampled from outside.
"""

import gc
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss  # noqa: F401  (what workers import counts as held before)
import lightgbm  # noqa: F401
import numpy as np
import pandas as pd  # noqa: F401
import pytest
import torch
from without_ray import JOBS

from rayrec.jobs import train
from rayrec.jobs.runtime import WORKER_ENVIRONMENT
from rayrec.storage.workspace import Workspace

SAMPLE_SECONDS = 0.002
torch.set_num_threads(1)


def anonymous_bytes(pid: int) -> int:
    """Return the bytes of a process's memory that no file backs: mapped files exist once for all processes of a node.

    0 for a process that has just ended.
    """
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def growth(work: Callable[..., Any], *arguments: Any) -> tuple[int, int, Any]:
    """Run `work(*arguments)` in a fresh process; return its bytes before, the growth up to the peak, the result."""
    os.environ.update(WORKER_ENVIRONMENT)
    context = get_context("forkserver")  # imports the packages of workers once, then forks
    context.set_forkserver_preload([__name__])
    parent_end, child_end = context.Pipe()
    process = context.Process(target=_serve, args=(child_end,))
    process.start()
    child_end.close()  # so that the end of the process is noticed
    assert process.pid is not None
    parent_end.send((work, arguments))
    parent_end.recv()
    initial = peak = anonymous_bytes(process.pid)
    parent_end.send(None)
    while not parent_end.poll(SAMPLE_SECONDS):
        peak = max(peak, anonymous_bytes(process.pid))
    result = parent_end.recv()
    process.join()
    if isinstance(result, BaseException):
        raise result
    return initial, peak - initial, result


def _serve(connection: Connection) -> None:
    work, arguments = connection.recv()
    gc.collect()
    connection.send(None)
    connection.recv()
    try:
        connection.send(work(*arguments))
    except Exception as error:
        connection.send(error)


def answer_requests(uri: str, store: str, songs: int) -> None:
    """Do the work of a replica: recommend for histories, with and without an artist filter, and search songs."""
    from served import Client, service

    histories = np.random.default_rng(0).integers(songs, size=(100, 50)).tolist()
    artists = [f"Artist {number}" for number in range(7)]  # the names that `write_dataset` gives
    artist_filters = [[artist for bit, artist in enumerate(artists) if number >> bit & 1] for number in range(1, 101)]
    with service(Workspace(uri), store=store) as replica:
        client = Client(replica)
        for history, artist_filter in zip(histories, artist_filters, strict=True):
            body = {"history": [f"song-{row}" for row in history]}
            assert client.post("/v1/recommendations", body).status_code == 200
            assert client.post("/v1/recommendations", {**body, "artists": artist_filter}).status_code == 200
        assert client.get("/v1/songs?query=title").status_code == 200


def _run_units(make_worker: Callable[..., Any], arguments: dict[str, Any], units: list[Any]) -> list[Any]:
    worker = make_worker(**arguments)
    return [worker(unit) for unit in units]


def _list_results(work: Callable[..., Iterator[Any]], *arguments: Any) -> list[Any]:
    return list(work(*arguments))


class WatchedWorkers:
    """Bytes of the workers of jobs, by the name of the worker's class or of the function given to `run_on_node`."""

    def __init__(self) -> None:
        self.idle = 0  # of a process that has only imported the packages of workers
        self.private: dict[str, int] = {}  # at the peak, in addition to those of an idle process
        self.stored: dict[str, int] = {}  # in the object store: the arguments and the largest result

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Measure the workers of all jobs from now on."""
        replacements: dict[str, Any] = {
            "run_buckets": self._run_buckets,
            "run_on_node": self._run_on_node,
            "ray_cluster": nullcontext,
            "node_cpus": lambda: 1,
        }
        for job in JOBS:
            for name, replacement in replacements.items():
                if hasattr(job, name):
                    monkeypatch.setattr(job, name, replacement)
        train_worker = train.train_worker
        monkeypatch.setattr(train, "train_worker", lambda arguments: self._run("train_worker", train_worker, arguments))

    def _run_buckets(
        self, make_worker: Callable[..., Any], units: Iterable[Any], *, arguments: dict[str, Any], **_: Any
    ) -> Iterator[Any]:
        results = self._run(make_worker.__name__, _run_units, make_worker, arguments, list(units))
        sizes = [pickled_bytes(arguments), max(map(pickled_bytes, results), default=0)]
        self.stored[make_worker.__name__] = sum(sizes)
        yield from results

    def _run_on_node(self, work: Callable[..., Iterator[Any]], *arguments: Any, cpus: int) -> Iterator[Any]:
        yield from self._run(work.__name__, _list_results, work, *arguments)

    def _run(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        self.idle, added_bytes, result = growth(work, *arguments)
        self.private[name] = max(self.private.get(name, 0), added_bytes)
        return result


def pickled_bytes(value: Any) -> int:
    """Return the bytes that a value takes in the object store."""
    arrays: list[pickle.PickleBuffer] = []
    data = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    return len(data) + sum(array.raw().nbytes for array in arrays)
