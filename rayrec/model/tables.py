"""Tables of song vectors in training: only the rows that a step looks up are read, and moved on by Adam.

A step's cost does not depend on the size of the catalog. U songs of a step, D embedding.
"""

import torch
from torch import Tensor

BETAS = (0.9, 0.999)  # Adam's decay of the mean of gradients and of their squares
EPSILON = 1e-8  # Adam's


class RowAdam:
    """Adam on the rows of a table that have a gradient; the others stay as they are, moments and all."""

    def __init__(self, table: Tensor, learning_rate: float) -> None:
        """`table` float32 (N, D) is changed in place."""
        self._table, self._learning_rate = table, learning_rate
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.steps = 0

    def look_up(self, songs_U: Tensor) -> Tensor:
        """float32 (U, D): the rows of songs, each of which comes once, as a leaf that takes a gradient."""
        return self._table.index_select(0, songs_U).requires_grad_()

    def step(self, songs_U: Tensor, gradient_UD: Tensor) -> None:
        """Move rows on by their gradient."""
        self.steps += 1
        first, second = BETAS
        mean = self.mean.index_select(0, songs_U).lerp_(gradient_UD, 1 - first)
        square = self.square.index_select(0, songs_U).mul_(second).addcmul_(gradient_UD, gradient_UD, value=1 - second)
        self.mean.index_copy_(0, songs_U, mean)
        self.square.index_copy_(0, songs_U, square)
        # The bias corrections of both moments, taken together.
        rate = self._learning_rate * (1 - second**self.steps) ** 0.5 / (1 - first**self.steps)
        self._table.index_add_(0, songs_U, mean.div_(square.sqrt_().add_(EPSILON)), alpha=-rate)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = int(state["steps"])
