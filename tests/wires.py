"""A fake process group: this process is one worker of eight, for tests that count the bytes that it sends."""

from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

WORKERS = 8


class Wire:
    """Replaces the process group of eight workers: all others send this worker the same requests as it sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.sent = 0.0  # bytes to other workers
        monkeypatch.setattr(dist, "new_group", lambda backend: None)
        monkeypatch.setattr(dist, "all_to_all_single", self._all_to_all)
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)
        monkeypatch.setattr(dist, "get_backend", lambda: "gloo")

    def _all_to_all(
        self,
        output: Tensor,
        values: Tensor,
        output_sizes: list[int] | None = None,
        input_sizes: list[int] | None = None,
        group: Any = None,
    ) -> None:
        self.calls.append("all_to_all")
        sizes = input_sizes or [len(values) // WORKERS] * WORKERS
        self.sent += sum(sizes[1:]) * values[:1].nbytes
        local_part = values[: sizes[0]]
        output.fill_(1)
        for part in output.split(output_sizes or [len(output) // WORKERS] * WORKERS):
            part[: len(local_part)] = local_part[: len(part)]

    def _all_reduce(self, tensor: Tensor) -> None:
        self.calls.append("all_reduce")
        self.sent += 2 * (WORKERS - 1) / WORKERS * tensor.nbytes  # all-reduce in a ring
