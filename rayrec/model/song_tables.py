"""Tables of song vectors, divided among the training workers: worker r mod W keeps row r.

A step reads, and updates with Adam, only the rows that it looks up, so its cost does not depend on the size of the
catalog. Workers exchange their requests for rows on the host, in a separate process group, while the previous step
runs. So a step knows all sizes in advance, and the host never waits for a device.

Shapes: n rows of songs that one worker keeps, U songs that a worker looks up, R rows that all workers request from it,
V distinct rows among these, D embedding dimensions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adam import adam

if TYPE_CHECKING:
    from rayrec.model.training import TrainingStep

Rows = TypeVar("Rows", np.ndarray, Tensor)
BETAS = (0.9, 0.999)  # Adam's decay of the mean of gradients and of their squares
EPSILON = 1e-8  # Adam's epsilon


@dataclass(frozen=True, kw_only=True)
class Share:
    """The rank of this worker and the number of workers."""

    rank: int = 0
    workers: int = 1

    def total(self, value: float) -> float:
        """Return the sum of `value` over all workers."""
        return self.totals([value])[0]

    def totals(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all workers."""
        if self.workers == 1:
            return [*values]
        tensor = torch.tensor(values, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return [*tensor.tolist()]  # one read from the device

    def own(self, rows: Rows) -> Rows:
        """Return this worker's part of all `rows`, as a view: worker r mod W keeps row r."""
        return rows[self.rank :: self.workers]

    def interleaved(self, rows: Tensor, total: int) -> Tensor | None:
        """Gather the rows of all workers in order, (total, ...), on the first worker; return None on the others.

        `rows`, (n, ...), are this worker's own. All workers must call this method.
        """
        if self.workers == 1:
            return rows
        max_rows = -(-total // self.workers)
        padded = torch.nn.functional.pad(rows, [0, 0] * (rows.dim() - 1) + [0, max_rows - len(rows)])
        parts = None if self.rank else [torch.empty_like(padded) for _ in range(self.workers)]
        dist.gather(padded.contiguous(), parts)
        return None if parts is None else torch.stack(parts, dim=1).flatten(0, 1)[:total]

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all workers."""
        if self.workers > 1:
            dist.all_reduce(tensor)


@dataclass(frozen=True, kw_only=True)
class RowRequests:
    """The rows of a table that workers request from each other in one step."""

    sent: list[int]  # number of rows that this worker requests from each worker; U in total
    received: list[int]  # number of rows that each worker requests from this worker; R in total
    rows_R: Tensor  # int64, the rows requested from this worker, as places among its rows
    rows_V: Tensor  # int64, the distinct values of `rows_R`, ascending
    positions_R: Tensor  # int64, the place of each of `rows_R` in `rows_V`


class RowExchange:
    """Exchanges rows with the other workers. All workers must make the same calls in the same order."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._host = dist.new_group(backend="gloo") if share.workers > 1 else None

    def agree(self, step: "TrainingStep", tables: list[str]) -> "TrainingStep":
        """Return the step with the requests for rows of `tables`, and targets weighted by the counts of all workers."""
        if self._share.workers == 1:
            return step
        workers = self._share.workers
        songs_of_tables = [step.songs[name].numpy() for name in tables]
        sent_counts = np.array([self._counts_by_worker(songs) for songs in songs_of_tables], dtype=np.int64).reshape(
            len(tables), workers
        )
        outgoing = np.concatenate([sent_counts.T, np.tile(step.counts, (workers, 1))], axis=1)
        incoming = torch.empty(outgoing.shape, dtype=torch.int64)
        dist.all_to_all_single(incoming, torch.from_numpy(outgoing), group=self._host)
        received_counts = incoming[:, : len(tables)].T.tolist()
        requests = {
            name: self._exchange_requests(songs // workers, sent_counts[index].tolist(), received_counts[index])
            for index, (name, songs) in enumerate(zip(tables, songs_of_tables, strict=True))
        }
        totals = incoming[:, len(tables) :].sum(dim=0).numpy()
        return replace(step, targets=step.targets.weighed(totals), requests=requests)

    def rows_of(self, table_nD: Tensor, songs: np.ndarray) -> Tensor:
        """(U, D): the rows of `songs`, int64 (U,), fetched from all workers; `table_nD` holds this worker's rows."""
        device = table_nD.device
        if self._share.workers == 1:
            return table_nD.index_select(0, torch.from_numpy(songs).to(device))
        workers = self._share.workers
        order = np.argsort(songs % workers, kind="stable")
        sent_counts = torch.from_numpy(self._counts_by_worker(songs))
        received_counts = torch.empty_like(sent_counts)
        dist.all_to_all_single(received_counts, sent_counts, group=self._host)
        requests = self._exchange_requests(songs[order] // workers, sent_counts.tolist(), received_counts.tolist())
        rows_by_worker_UD = fetch_rows(table_nD, replace(requests, rows_R=requests.rows_R.to(device)))
        return rows_by_worker_UD.index_select(0, torch.from_numpy(np.argsort(order)).to(device))

    def _counts_by_worker(self, songs: np.ndarray) -> np.ndarray:
        """int64 (W,): how many of the songs each worker keeps."""
        return np.bincount(songs % self._share.workers, minlength=self._share.workers)

    def _exchange_requests(self, rows_U: np.ndarray, sent_counts: list[int], received_counts: list[int]) -> RowRequests:
        rows_R = torch.empty(sum(received_counts), dtype=torch.int32)
        rows_sent = torch.from_numpy(rows_U.astype(np.int32))
        dist.all_to_all_single(rows_R, rows_sent, received_counts, sent_counts, group=self._host)
        rows_V, positions_R = np.unique(rows_R.numpy(), return_inverse=True)
        return RowRequests(
            sent=sent_counts,
            received=received_counts,
            rows_R=rows_R.long(),
            rows_V=torch.from_numpy(rows_V).long(),
            positions_R=torch.from_numpy(positions_R),
        )


def fetch_rows(table_ND: Tensor, requests: RowRequests) -> Tensor:
    """float32 (U, D): the rows that this worker requested from all workers; `table_ND` holds its own rows."""
    rows_UD = table_ND.new_empty(sum(requests.sent), table_ND.shape[1])
    dist.all_to_all_single(rows_UD, table_ND.index_select(0, requests.rows_R), requests.sent, requests.received)
    return rows_UD


def return_gradients(gradient_UD: Tensor, requests: RowRequests) -> Tensor:
    """float32 (V, D): the gradients of this worker's rows, summed over all workers.

    `gradient_UD` are the gradients of the rows that this worker looked up.
    """
    gradients_RD = gradient_UD.new_empty(sum(requests.received), gradient_UD.shape[1])
    dist.all_to_all_single(gradients_RD, gradient_UD.contiguous(), requests.received, requests.sent)
    return gradients_RD.new_zeros(len(requests.rows_V), gradients_RD.shape[1]).index_add_(
        0, requests.positions_R, gradients_RD
    )


class Decay:
    """The weight of all earlier steps in a running average of weights, step by step.

    The mean age of the steps in the average is `part` of the number of all steps. Step s counts for about s^η with
    η = 1 / part − 2: polynomial-decay averaging (Shamir and Zhang 2013, arXiv:1212.1824). So the start of a training
    fades out of its average, and the longer the training is, the more steps count.
    """

    def __init__(self, part: float) -> None:
        """`part` is in [0, 0.5]; 0 means no average."""
        self.part, self.steps, self.log_total = part, 0, 0.0

    def step(self) -> float:
        """Count one more step and return the weight of the average before it."""
        factor = (1 + self.steps) / (1 / self.part + self.steps)
        self.steps += 1
        self.log_total += math.log(factor) if factor else -math.inf
        return factor

    def state(self) -> Tensor:
        """float64 (2,): the number of steps and the log of the total decay, for a checkpoint."""
        return torch.tensor([self.steps, self.log_total], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Restore what `state` returned."""
        self.steps, self.log_total = int(state[0]), float(state[1])


class SongTable:
    """A worker's rows of a table that is not trained. Each of the W workers holds every W-th row."""

    learning_rate = 0.0

    def __init__(self, table_nD: Tensor) -> None:
        self._table = table_nD

    def look_up(self, songs_U: Tensor, requests: RowRequests | None) -> Tensor:
        """float32 (U, D): the rows of `songs_U`, which must be distinct."""
        return self._table.index_select(0, songs_U) if requests is None else fetch_rows(self._table, requests)

    def step(self, songs_U: Tensor, looked_up_UD: Tensor, requests: RowRequests | None) -> None:
        """Update the rows that were looked up by their gradients of all workers; this class leaves them unchanged."""

    def averaged(self) -> Tensor:
        """float32 (n, D): the averages of the rows over the last steps."""
        return self._table

    def is_finite(self) -> bool:
        """Return False if this worker's rows contain NaN or infinity."""
        return bool(self._table.isfinite().all())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the tensors for a checkpoint: those that all workers share, and those with an entry per own row."""
        return {}, {}

    def load(self, common: dict[str, Tensor]) -> None:
        """Restore the tensors that all workers share. The caller copies the rows into those that `state` returned."""


class RowAdam(SongTable):
    """Adam on the rows of a table that were looked up; all other rows and their moments stay unchanged.

    The class also keeps the average of the rows over the last steps. While a row stays unchanged, the change of its
    average is known, so the average is updated only when the row is looked up.
    """

    def __init__(self, table_nD: Tensor, learning_rate: float, averaged_part: float) -> None:
        """`table_nD`, float32 (n, D), is changed in place; `learning_rate` may be changed between steps."""
        super().__init__(table_nD)
        self.learning_rate = learning_rate
        self.steps = torch.zeros((), device=table_nD.device)
        self._decay = Decay(averaged_part)
        # Means of gradients and of their squares, and the averages of rows if they are computed: (2 or 3, n, D).
        self._slots = table_nD.new_zeros(3 if averaged_part else 2, *table_nD.shape)
        if averaged_part:
            self._slots[2] = table_nD
            # The log of the total decay when each row was last looked up.
            self._log_total_at_lookup = torch.zeros(len(table_nD), dtype=torch.float64, device=table_nD.device)

    def look_up(self, songs_U: Tensor, requests: RowRequests | None) -> Tensor:
        """Return the rows as in `SongTable`, as a leaf tensor that collects a gradient."""
        return super().look_up(songs_U, requests).requires_grad_()

    def step(self, songs_U: Tensor, looked_up_UD: Tensor, requests: RowRequests | None) -> None:
        """As in `SongTable`."""
        gradient_UD = looked_up_UD.grad
        if gradient_UD is None:  # momentum still moves the rows
            gradient_UD = torch.zeros_like(looked_up_UD)
        if requests is None:
            self._step(songs_U, looked_up_UD.detach(), gradient_UD)
        else:
            rows_VD = self._table.index_select(0, requests.rows_V)
            self._step(requests.rows_V, rows_VD, return_gradients(gradient_UD, requests))

    def _step(self, rows_V: Tensor, values_VD: Tensor, gradient_VD: Tensor) -> None:
        slots = self._slots.index_select(1, rows_V)
        if self._decay.part:
            torch.lerp(values_VD, slots[2], self._decay_since_lookup(rows_V), out=slots[2])
            self._log_total_at_lookup.index_fill_(0, rows_V, self._decay.log_total)
            self._decay.step()
        adam(
            [values_VD],
            [gradient_VD],
            [slots[0]],
            [slots[1]],
            [],
            [self.steps],  # incremented in place
            fused=True,
            lr=self.learning_rate,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPSILON,
            amsgrad=False,
            maximize=False,
        )
        self._table.index_copy_(0, rows_V, values_VD)
        self._slots.index_copy_(1, rows_V, slots)

    def averaged(self) -> Tensor:
        """As in `SongTable`."""
        if not self._decay.part:
            return self._table
        decay = self._decay_since_lookup(torch.arange(len(self._table), device=self._table.device))
        return torch.lerp(self._table, self._slots[2], decay)

    def _decay_since_lookup(self, rows_V: Tensor) -> Tensor:
        """float32 (V, 1): the decay of the averages of rows since each row was last looked up."""
        return (self._decay.log_total - self._log_total_at_lookup.index_select(0, rows_V)).exp_().float().unsqueeze(1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """As in `SongTable`."""
        common = {"steps": self.steps}
        if self._decay.part:
            common["decay"] = self._decay.state()
        return common, self._named_slots()

    def load(self, common: dict[str, Tensor]) -> None:
        """As in `SongTable`."""
        self.steps.copy_(common["steps"])
        if self._decay.part:
            self._decay.load(common["decay"])

    def _named_slots(self) -> dict[str, Tensor]:
        slots = dict(zip(("mean", "square", "average"), self._slots, strict=False))
        return {"table": self._table} | slots | ({"seen": self._log_total_at_lookup} if self._decay.part else {})
