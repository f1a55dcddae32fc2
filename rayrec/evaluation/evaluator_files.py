"""An evaluator in files that all processes of a node map into memory: its arrays are there once a node."""

from __future__ import annotations

import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from rayrec.recommend.index import INDEX_FILE, import_faiss
from rayrec.storage.workspace import Workspace, stored_at

ARRAYS_FILE = "arrays.bin"
ALIGNED = 64  # bytes, at a multiple of which each array begins

EvaluatorType = TypeVar("EvaluatorType")  # Evaluator or PrefixEvaluator


@dataclass(frozen=True, kw_only=True)
class EvaluatorFiles(Generic[EvaluatorType]):
    """An evaluator without its arrays, a few KB whatever the catalog, and where the arrays lie."""

    workspace: Workspace
    folder: str  # of arrays and indexes that no artifact holds
    pickled: bytes
    sizes: tuple[int, ...]  # bytes of each array in the file of arrays

    def load(self) -> EvaluatorType:
        """The evaluator. Its arrays are memory-mapped; on a bucket from the one copy of this node."""
        # Copy on write, since torch knows no read-only tensors.
        mapped = np.memmap(self.workspace.local_file(f"{self.folder}/{ARRAYS_FILE}"), np.uint8, "c").data
        arrays, begin = [], 0
        for size in self.sizes:
            arrays.append(mapped[begin : begin + size])
            begin += size + _padding(size)
        evaluator: EvaluatorType = pickle.loads(self.pickled, buffers=arrays)
        return evaluator


@contextmanager
def evaluator_files(
    workspace: Workspace, folder: str, evaluator: EvaluatorType
) -> Iterator[EvaluatorFiles[EvaluatorType]]:
    """The files of an evaluator, for as long as the block lasts.

    Arrays that were mapped from files of the workspace are not written again.
    """
    stream = io.BytesIO()
    arrays: list[pickle.PickleBuffer] = []
    try:
        _Pickler(workspace, folder, stream, arrays).dump(evaluator)
        sizes = []
        with workspace.open_output(f"{folder}/{ARRAYS_FILE}") as file:
            for array in arrays:
                with array.raw() as data:
                    sizes.append(data.nbytes)
                    file.write(data)
                file.write(bytes(_padding(sizes[-1])))
        yield EvaluatorFiles(workspace=workspace, folder=folder, pickled=stream.getvalue(), sizes=tuple(sizes))
    finally:
        workspace.delete(folder)


def _padding(size: int) -> int:
    """Bytes behind an array of so many, at least one: an empty file cannot be mapped."""
    return ALIGNED - size % ALIGNED


class _Pickler(pickle.Pickler):
    """Gives arrays, tensors and indexes out as files instead of copying them into the pickle."""

    def __init__(
        self, workspace: Workspace, folder: str, stream: io.BytesIO, arrays: list[pickle.PickleBuffer]
    ) -> None:
        import torch  # only once needed

        super().__init__(stream, protocol=5, buffer_callback=arrays.append)
        self._workspace, self._folder, self._indexes = workspace, folder, 0
        self._tensor, self._index = torch.Tensor, import_faiss().Index

    def reducer_override(self, value: Any) -> Any:
        """How to make a value again in another process, NotImplemented for those that pickle handles well."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if type(value) is self._tensor and value.device.type == "cpu":
            return _to_tensor, (value.detach().numpy(),)
        if isinstance(value, self._index):
            return self._save_index(value)
        return NotImplemented

    def _array(self, array: np.ndarray) -> Any:
        stored = stored_at(array)
        if stored is not None:
            return Workspace.read_array, stored
        # A memory map itself would be copied into the pickle, a plain view of it is not.
        return (np.asarray, (np.asarray(array),)) if isinstance(array, np.memmap) else NotImplemented

    def _save_index(self, index: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        self._indexes += 1
        path = f"{self._folder}/{self._indexes}/{INDEX_FILE}"
        with tempfile.TemporaryDirectory(prefix="rayrec-") as folder:
            local = Path(folder) / INDEX_FILE
            import_faiss().write_index(index, str(local))
            self._workspace.put_file(local, path)
        return _read_index, (self._workspace, path)


def _to_tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array)


def _read_index(workspace: Workspace, path: str) -> Any:
    faiss = import_faiss()
    return faiss.read_index(str(workspace.local_file(path)), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))
