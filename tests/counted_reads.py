"""A workspace that logs how many bytes of each file are read, in any process.

Ray's workers cannot import test modules, so a test with Ray calls `ship` first.
"""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import ray.cloudpickle

from rayrec.storage.workspace import Workspace


def ship() -> None:
    """Make pickled objects of this module carry its code."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class CountedFile(io.FileIO):
    """A file for reading that appends its name and the bytes read to a log when it is closed."""

    def __init__(self, file: str, log: str) -> None:
        super().__init__(file)
        self._log, self._bytes = log, 0

    def read(self, size: int | None = -1, /) -> bytes:
        """Read like any file, and count the bytes."""
        data = super().read(size)
        self._bytes += len(data)
        return data

    def close(self) -> None:
        """Write the number of bytes to the log, and close the file."""
        if not self.closed:
            with Path(self._log).open("a", encoding="utf-8") as log:
                log.write(json.dumps([self.name, self._bytes]) + "\n")
        super().close()


class CountedWorkspace(Workspace):
    """A local workspace that logs its reads in the file `log`, which is outside of it."""

    def __init__(self, uri: str | Path, log: str | Path) -> None:
        super().__init__(uri)
        self._log = str(log)

    def __reduce__(self) -> tuple[type[Workspace], tuple[str, str]]:  # type: ignore[override]
        return CountedWorkspace, (self.root, self._log)

    def open_input(self, path: str) -> pa.NativeFile:
        """Open a file whose reads are counted."""
        return CountedFile(self.full(path), self._log)

    def reads(self) -> list[tuple[str, int]]:
        """Return (file, bytes read) of each file opened since the last call, and delete the log."""
        log = Path(self._log)
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [(str(file), int(count)) for file, count in map(json.loads, lines)]
