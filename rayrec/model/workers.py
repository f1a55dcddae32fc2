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

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers."""
        if self.workers > 1:
            dist.all_reduce(tensor)
