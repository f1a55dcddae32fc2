"""Runs jobs over buckets in this process, one bucket after another, for tests of their reads and writes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import pyarrow as pa
import pytest

from rayrec.jobs import (
    build_index,
    compact,
    embed,
    evaluate,
    fit,
    forget,
    generate,
    import_data,
    pipeline,
    rank,
    recommend_all,
    retrieval,
    taste,
    train,
    trainer,
    update,
)
from rayrec.storage.workspace import Workspace

JOBS = (
    *(build_index, compact, embed, evaluate, fit, forget, generate, import_data, pipeline, rank, recommend_all),
    *(retrieval, taste, train, trainer, update),
)

REQUESTS = {"move": 2}  # a copy and a delete
IN_WORKER: list[bool] = []  # not empty while a worker runs; other reads are those of the driver


def run_here(
    make_worker: Callable[..., Any], units: Iterable[int], *, arguments: dict[str, Any], **_: Any
) -> Iterator[Any]:
    """Do the work of `run_buckets` with one worker in this process."""

    def run_as_worker(work: Callable[[], Any]) -> Any:
        IN_WORKER.append(True)
        try:
            return work()
        finally:
            IN_WORKER.pop()

    worker = run_as_worker(lambda: make_worker(**arguments))
    for unit in list(units):
        yield run_as_worker(lambda unit=unit: worker(unit))


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all stages run in this process from now on; trainings only with `workers=0`."""
    replacements: dict[str, Any] = {
        "run_buckets": run_here,
        "ray_cluster": nullcontext,
        "run_on_node": lambda work, *arguments, cpus: work(*arguments),
        "node_cpus": lambda: 1,
    }
    for job in JOBS:
        for name, replacement in replacements.items():
            if hasattr(job, name):
                monkeypatch.setattr(job, name, replacement)


class CountingFileSystem:
    """Counts the requests that workspaces would send to an object storage, and the bytes that they read.

    Opening a file to read is a request for its size, as on S3; each read, listing, write and deletion is a request.
    """

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.bytes_read = self.driver_bytes_read = 0
        self.path_bytes: Counter[str] = Counter()  # bytes read, by path

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Count all requests and reads from now on."""
        open_input = Workspace.open_input

        def open_counted_input(workspace: Workspace, path: str) -> pa.NativeFile:
            self.requests["size"] += 1
            return pa.PythonFile(_CountedReads(open_input(workspace, path), path, self), mode="r")

        def counting_method(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                self.requests[name] += REQUESTS.get(name, 1)
                return method(*arguments, **options)

            return run

        monkeypatch.setattr(Workspace, "open_input", open_counted_input)
        for name in ("open_output", "delete", "move", "exists", "sizes", "folders"):
            monkeypatch.setattr(Workspace, name, counting_method(name, getattr(Workspace, name)))

    @property
    def total(self) -> int:
        """Number of all requests."""
        return self.requests.total()


class _CountedReads:
    """A file whose reads are added to `counts`."""

    def __init__(self, file: pa.NativeFile, path: str, counts: CountingFileSystem) -> None:
        self._file, self._path, self._counts = file, path, counts
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._file.read() if size is None or size < 0 else self._file.read(size)
        self._counts.requests["read"] += 1
        self._counts.bytes_read += len(data)
        self._counts.path_bytes[self._path] += len(data)
        self._counts.driver_bytes_read += 0 if IN_WORKER else len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        self.closed = True
        self._file.close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False
