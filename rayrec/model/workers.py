"""What a training worker knows of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Rows = TypeVar("Rows", np.ndarray, Tensor)


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of how many workers this is."""

    rank: int = 0
    workers: int = 1

    def total(self, value: float) -> float:
        """The sum of a number over all workers."""
        return self.totals([value])[0]

    def totals(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over all workers."""
        if self.workers == 1:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def own(self, rows: Rows) -> Rows:
        """This worker's of the rows of all: row r is worker r mod W's; a view."""
        return rows[self.rank :: self.workers]

    def interleaved(self, rows: Tensor, total: int) -> Tensor | None:
        """The first worker gets `total` rows in their order, (total, ...), from each worker's own (n, ...); the others
        None. All workers take part."""
        if self.workers == 1:
            return rows
        longest = -(-total // self.workers)
        padded = torch.nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, longest - len(rows)])
        parts = None if self.rank else [torch.empty_like(padded) for _ in range(self.workers)]
        dist.gather(padded.contiguous(), parts)
        return None if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers."""
        if self.workers > 1:
            dist.all_reduce(tensor)
