"""What training workers exchange: sums, and rows of the song tables, of which worker r mod W keeps row r.

What each worker asks of each is agreed on the host, while the step before runs, in a process group of its own; so a
step knows all sizes, and the host waits for no device. Shapes: U songs that a worker looks up, R rows that it is
asked for by all workers, V of them each once, D embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from rayrec.model.training import TrainingStep

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


@dataclass(frozen=True, kw_only=True)
class RowRequests:
    """What one step of all workers asks of a table."""

    sent: list[int]  # rows that this worker asks each for; U together
    received: list[int]  # rows that each asks this worker for; R together
    rows_R: Tensor  # int64, the places of those among this worker's rows
    rows_V: Tensor  # int64, the same each once, ascending
    places_R: Tensor  # int64, where each stands in rows_V


class RowExchange:
    """One worker's end of the exchange. All workers make the same calls in the same order."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._host = dist.new_group(backend="gloo") if share.workers > 1 else None

    def agree(self, step: "TrainingStep", tables: list[str]) -> "TrainingStep":
        """The step with the targets of all workers added up and the requests to some of its tables."""
        if self._share.workers == 1:
            return step
        workers = self._share.workers
        songs_of = [step.songs[name].numpy() for name in tables]
        sent = np.array([self._counts(songs) for songs in songs_of], dtype=np.int64).reshape(len(tables), workers)
        outgoing = np.concatenate([sent.T, np.tile(step.counts, (workers, 1))], axis=1)
        incoming = torch.empty(outgoing.shape, dtype=torch.int64)
        dist.all_to_all_single(incoming, torch.from_numpy(outgoing), group=self._host)
        received = incoming[:, : len(tables)].T.tolist()
        requests = {
            name: self._requests(songs // workers, sent[number].tolist(), received[number])
            for number, (name, songs) in enumerate(zip(tables, songs_of, strict=True))
        }
        totals = incoming[:, len(tables) :].sum(dim=0).numpy()
        return replace(step, targets=step.targets.weighed(totals), requests=requests)

    def rows_of(self, table_nD: Tensor, songs: np.ndarray) -> Tensor:
        """(U, D): the rows of some songs, int64 (U,), from all workers; `table_nD` are this one's."""
        device = table_nD.device
        if self._share.workers == 1:
            return table_nD.index_select(0, torch.from_numpy(songs).to(device))
        workers = self._share.workers
        order = np.argsort(songs % workers, kind="stable")
        sent = torch.from_numpy(self._counts(songs))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._host)
        requests = self._requests(songs[order] // workers, sent.tolist(), received.tolist())
        by_worker_UD = fetch_rows(table_nD, replace(requests, rows_R=requests.rows_R.to(device)))
        return by_worker_UD.index_select(0, torch.from_numpy(np.argsort(order)).to(device))

    def _counts(self, songs: np.ndarray) -> np.ndarray:
        """int64 (W,): how many of the songs each worker keeps."""
        return np.bincount(songs % self._share.workers, minlength=self._share.workers)

    def _requests(self, rows_U: np.ndarray, sent: list[int], received: list[int]) -> RowRequests:
        rows_R = torch.empty(sum(received), dtype=torch.int32)
        rows_sent = torch.from_numpy(rows_U.astype(np.int32))
        dist.all_to_all_single(rows_R, rows_sent, received, sent, group=self._host)
        rows_V, places_R = np.unique(rows_R.numpy(), return_inverse=True)
        return RowRequests(
            sent=sent,
            received=received,
            rows_R=rows_R.long(),
            rows_V=torch.from_numpy(rows_V).long(),
            places_R=torch.from_numpy(places_R),
        )


def fetch_rows(table_ND: Tensor, requests: RowRequests) -> Tensor:
    """float32 (U, D): the rows that this worker asked for, from all workers; `table_ND` are its own."""
    found_UD = table_ND.new_empty(sum(requests.sent), table_ND.shape[1])
    dist.all_to_all_single(found_UD, table_ND.index_select(0, requests.rows_R), requests.sent, requests.received)
    return found_UD


def return_gradients(gradient_UD: Tensor, requests: RowRequests) -> Tensor:
    """float32 (V, D): the gradients of this worker's rows, added up over all workers; `gradient_UD` is its own part."""
    found_RD = gradient_UD.new_empty(sum(requests.received), gradient_UD.shape[1])
    dist.all_to_all_single(found_RD, gradient_UD.contiguous(), requests.received, requests.sent)
    return found_RD.new_zeros(len(requests.rows_V), found_RD.shape[1]).index_add_(0, requests.places_R, found_RD)
