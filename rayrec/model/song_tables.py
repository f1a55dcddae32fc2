"""Tables of song vectors in training: only the rows that a step looks up are read, and moved on by Adam.

A step's cost does not depend on the size of the catalog. n rows of songs that one worker keeps, U or V rows of a step,
D embedding.
"""

import math

import torch
from torch import Tensor

from rayrec.model.workers import RowRequests, fetch_rows, return_gradients

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

    def state(self) -> Tensor:
        """float64 (2,): where it stands, for a checkpoint."""
        return torch.tensor([self.taken, self.log_total], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from what `state` gave."""
        self.taken, self.log_total = int(state[0]), float(state[1])


class SongTable:
    """A worker's rows of a table that stays as it is. Of W workers each has every W-th row."""

    learning_rate = 0.0

    def __init__(self, table_nD: Tensor) -> None:
        self._table = table_nD

    def look_up(self, songs_U: Tensor, requests: RowRequests | None) -> Tensor:
        """float32 (U, D): the rows of songs, each of which comes once."""
        return self._table.index_select(0, songs_U) if requests is None else fetch_rows(self._table, requests)

    def step(self, songs_U: Tensor, looked_up_UD: Tensor, requests: RowRequests | None) -> None:
        """Move the rows that were looked up on by their gradient, of all workers together."""

    def averaged(self) -> Tensor:
        """float32 (n, D): the rows as they were on average over the last steps."""
        return self._table

    def is_finite(self) -> bool:
        """False where a number of this worker's rows is none."""
        return bool(self._table.isfinite().all())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What a checkpoint keeps: what is the same for all workers, and what has an entry for each of these rows."""
        return {}, {}

    def load(self, common: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""


class RowAdam(SongTable):
    """Adam on the rows of a table that have a gradient; the others stay as they are, moments and all.

    With it, the average of the rows over the last steps. An average of a row that stays as it is moves in a way that is
    known, so it too is brought up to date only when the row is looked up.
    """

    def __init__(self, table_nD: Tensor, learning_rate: float, averaged_steps: int) -> None:
        """`table_nD` float32 (n, D) is changed in place; `learning_rate` may be changed between steps."""
        super().__init__(table_nD)
        self.learning_rate = learning_rate
        self.steps = torch.zeros((), device=table_nD.device)
        self._decay = Decay(averaged_steps)
        # Means of gradients and of their squares, and the averages of rows if there are any: (2 or 3, n, D).
        self._kept = table_nD.new_zeros(3 if averaged_steps else 2, *table_nD.shape)
        if averaged_steps:
            self._kept[2] = table_nD
            self._seen = torch.zeros(len(table_nD), dtype=torch.float64, device=table_nD.device)  # log decay till then

    def look_up(self, songs_U: Tensor, requests: RowRequests | None) -> Tensor:
        """The same as a leaf that takes a gradient."""
        return super().look_up(songs_U, requests).requires_grad_()

    def step(self, songs_U: Tensor, looked_up_UD: Tensor, requests: RowRequests | None) -> None:
        """As in `SongTable`."""
        gradient_UD = looked_up_UD.grad
        if gradient_UD is None:  # the rows are moved on by their momentum
            gradient_UD = torch.zeros_like(looked_up_UD)
        if requests is None:
            self._step(songs_U, looked_up_UD.detach(), gradient_UD)
        else:
            rows_VD = self._table.index_select(0, requests.rows_V)
            self._step(requests.rows_V, rows_VD, return_gradients(gradient_UD, requests))

    def _step(self, rows_V: Tensor, values_VD: Tensor, gradient_VD: Tensor) -> None:
        slots = self._kept.index_select(1, rows_V)
        if self._decay.steps:
            torch.lerp(values_VD, slots[2], self._since(rows_V), out=slots[2])
            self._seen.index_fill_(0, rows_V, self._decay.log_total)
            self._decay.step()
        self.steps.add_(1)
        torch._fused_adam_(  # what torch.optim.Adam calls
            [values_VD],
            [gradient_VD],
            [slots[0]],
            [slots[1]],
            [],
            [self.steps],
            lr=self.learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        self._table.index_copy_(0, rows_V, values_VD)
        self._kept.index_copy_(1, rows_V, slots)

    def averaged(self) -> Tensor:
        """As in `SongTable`."""
        if not self._decay.steps:
            return self._table
        since = self._since(torch.arange(len(self._table), device=self._table.device))
        return torch.lerp(self._table, self._kept[2], since)

    def _since(self, rows_V: Tensor) -> Tensor:
        """float32 (V, 1): what is left of the averages of rows, which have stood still since they were looked up."""
        return (self._decay.log_total - self._seen.index_select(0, rows_V)).exp_().float().unsqueeze(1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As in `SongTable`."""
        common = {"steps": self.steps}
        if self._decay.steps:
            common["decay"] = self._decay.state()
        return common, self._slots()

    def load(self, common: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
        """As in `SongTable`."""
        for name, values in self._slots().items():
            values.copy_(rows[name])
        self.steps.copy_(common["steps"])
        if self._decay.steps:
            self._decay.load(common["decay"])

    def _slots(self) -> dict[str, Tensor]:
        slots = dict(zip(("mean", "square", "average"), self._kept, strict=False))
        return {"table": self._table} | slots | ({"seen": self._seen} if self._decay.steps else {})
