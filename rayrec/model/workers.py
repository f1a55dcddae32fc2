"""What a training worker knows of the others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


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

    def gathered(self, rows: Tensor, total: int) -> Tensor:
        """All of `total` rows, of which row r is worker r mod W's, from each worker's own (n, ...)."""
        if self.workers == 1:
            return rows
        longest = -(-total // self.workers)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.workers)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def own(self, rows: Tensor) -> Tensor:
        """This worker's rows of a table that holds those of all, (N, ...); the table itself where it is alone."""
        return rows if self.workers == 1 else rows[self.rank :: self.workers].clone()

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers."""
        if self.workers > 1:
            dist.all_reduce(tensor)
