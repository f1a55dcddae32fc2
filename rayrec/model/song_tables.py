"""Tables of song vectors in training: only the rows that a step looks up are read, and moved on by Adam.

A step's cost does not depend on the size of the catalog. U songs of a step, D embedding.
"""

import math

import torch
from torch import Tensor

BETAS = (0.9, 0.999)  # Adam's decay of the mean of gradients and of their squares
EPSILON = 1e-8  # Adam's


class Decay:
    """The weight of earlier steps in an average over about the last `steps` ones, step by step.

    It begins with the few steps that there are: the start of a training does not stay in its average.
    """

    def __init__(self, steps: int) -> None:
        """`steps` 0: no average."""
        self.steps, self.taken, self.log_total = steps, 0, 0.0

    def step(self) -> float:
        """The factor of one more step."""
        factor = min(1 - 1 / self.steps, (1 + self.taken) / (10 + self.taken))
        self.taken += 1
        self.log_total += math.log(factor) if factor else -math.inf
        return factor


class RowAdam:
    """Adam on the rows of a table that have a gradient; the others stay as they are, moments and all.

    With it, the average of the rows over the last steps. An average of a row that stays as it is moves in a way that
    is known, so it too is brought up to date only when the row is looked up.
    """

    def __init__(self, table: Tensor, learning_rate: float, averaged_steps: int) -> None:
        """`table` float32 (N, D) is changed in place."""
        self._table, self._learning_rate = table, learning_rate
        self.mean, self.square = torch.zeros_like(table), torch.zeros_like(table)
        self.steps = 0
        self._decay = Decay(averaged_steps)
        if averaged_steps:
            self._average = table.clone()
            self._seen = torch.zeros(len(table), dtype=torch.float64, device=table.device)  # log decay till then

    def look_up(self, songs_U: Tensor) -> Tensor:
        """float32 (U, D): the rows of songs, each of which comes once, as a leaf that takes a gradient."""
        return self._table.index_select(0, songs_U).requires_grad_()

    def step(self, songs_U: Tensor, gradient_UD: Tensor) -> None:
        """Move rows on by their gradient."""
        self.steps += 1
        if self._decay.steps:
            self._average.index_copy_(0, songs_U, self._averages(songs_U))
            self._seen.index_fill_(0, songs_U, self._decay.log_total)
            self._decay.step()
        first, second = BETAS
        mean = self.mean.index_select(0, songs_U).lerp_(gradient_UD, 1 - first)
        square = self.square.index_select(0, songs_U).mul_(second).addcmul_(gradient_UD, gradient_UD, value=1 - second)
        self.mean.index_copy_(0, songs_U, mean)
        self.square.index_copy_(0, songs_U, square)
        # The bias corrections of both moments, taken together.
        rate = self._learning_rate * (1 - second**self.steps) ** 0.5 / (1 - first**self.steps)
        self._table.index_add_(0, songs_U, mean.div_(square.sqrt_().add_(EPSILON)), alpha=-rate)

    def averaged(self) -> Tensor:
        """float32 (N, D): the table as it was on average."""
        if not self._decay.steps:
            return self._table
        return self._averages(torch.arange(len(self._table), device=self._table.device))

    def _averages(self, songs_U: Tensor) -> Tensor:
        """float32 (U, D): the averages of rows up to now."""
        since = (self._decay.log_total - self._seen.index_select(0, songs_U)).exp().float().unsqueeze(1)
        return torch.lerp(self._table.index_select(0, songs_U), self._average.index_select(0, songs_U), since)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        kept = {"mean": self.mean, "square": self.square, "steps": torch.tensor(self.steps)}
        if self._decay.steps:
            told = torch.tensor([self._decay.taken, self._decay.log_total], dtype=torch.float64)
            kept |= {"average": self._average, "seen": self._seen, "decay": told}
        return kept

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.mean.copy_(state["mean"])
        self.square.copy_(state["square"])
        self.steps = int(state["steps"])
        if self._decay.steps:
            self._average.copy_(state["average"])
            self._seen.copy_(state["seen"])
            self._decay.taken, self._decay.log_total = int(state["decay"][0]), float(state["decay"][1])
