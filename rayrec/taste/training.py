"""The training loop: plain PyTorch over an iterable of windows, on one device or as one of many workers.

Everything random is a function of seed, epoch and step, so a resumed run goes on as if it had never
stopped. Shapes: B windows, L plays, P positions that have a target, T targets of a position.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rayrec.data.windows import Windows
from rayrec.taste.config import Horizon, TrainConfig
from rayrec.taste.features import PlayBatch, pad
from rayrec.taste.model import SONG_TABLE, TasteModel
from rayrec.taste.objectives import OBJECTIVES, Goal, Negatives
from rayrec.taste.popularity import log_prior

LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which of how many workers this is."""

    rank: int = 0
    workers: int = 1

    def total(self, value: float) -> float:
        """The sum of a number over all workers."""
        if self.workers == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        if dist.get_backend() == "nccl":
            tensor = tensor.cuda()
        dist.all_reduce(tensor)
        return float(tensor)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, this worker's share of it."""

    epoch: int
    step: int  # within the epoch, from 0
    plays: int  # inputs
    loss: Tensor  # float32 (), on the device: mean over the targets of the share, horizons added


class Losses(nn.Module):
    """The network and what it is trained for, as one module, so that a distributed step sees all of it."""

    def __init__(
        self, model: TasteModel, config: TrainConfig, negatives: Negatives, priors: dict[str, Tensor], share: Share
    ) -> None:
        super().__init__()
        self.model = model
        self._objective, self._negatives, self._share = OBJECTIVES[config.objective], negatives, share
        self._priors = priors  # by horizon, of those that have one

    def forward(self, batch: PlayBatch, inputs_B: Tensor, targets: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The losses of all horizons added, each the mean over the targets of all workers.

        `targets` holds for each horizon the flat positions (P,) in (B, L inputs) that have a target,
        and the target songs (P, T), -1 where there are fewer than T.
        """
        shortened = batch.shortened(inputs_B)
        taste = self.model(shortened, batch.gap_BL[:, 1 : shortened.songs_BL.shape[1] + 1])
        losses = [self._mean(name, taste[name], *targets[name]) for name in taste]
        return torch.stack(losses).sum()

    def _mean(self, horizon: str, taste_BLD: Tensor, positions: Tensor, targets_PT: Tensor) -> Tensor:
        count = self._share.total(int((targets_PT >= 0).sum()))
        if count == 0:
            return taste_BLD.sum() * 0.0
        taste_PD = taste_BLD.flatten(0, 1)[positions].float()
        goal = Goal(scale=self.model.scale(horizon), prior=self._priors.get(horizon))
        # Gradients are averaged over workers afterwards, which this factor undoes.
        return self._objective(self.model, taste_PD, targets_PT, self._negatives, goal) * (self._share.workers / count)


class Training:
    """One fit of one network. Pass epochs of windows to `epoch`."""

    def __init__(
        self, model: TasteModel, config: TrainConfig, counts: np.ndarray, *, device: str, share: Share
    ) -> None:
        """`counts` int (N,) are each song's plays in the fit range; negatives are drawn by them."""
        self.device = torch.device(device)
        self.bf16 = self.device.type == "cuda"  # products in bfloat16; weights and sums stay float32
        self.model = model.to(self.device)
        self.config = config
        self.share = share
        self.negatives = Negatives(counts, config.negatives, config.in_batch)
        table = [model.songs.weight] if model.songs.weight.requires_grad else []
        dense = [value for name, value in model.named_parameters() if name != SONG_TABLE]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(dense, lr=config.learning_rate)]
        if table:
            self.optimizers.append(torch.optim.SparseAdam(table, lr=config.learning_rate))
        self._dense = dense
        priors = {}
        if config.long_correction < 1:
            priors["long"] = torch.from_numpy(log_prior(counts, config.long_correction)).to(self.device)
        self._losses: nn.Module = Losses(model, config, self.negatives, priors, share)
        if share.workers > 1:
            self._losses = self._distributed()

    def compile(self) -> None:
        """Let torch.compile fuse the network and its losses; the first steps then take up to minutes."""
        # Not the look-ups: their sparse gradients cannot be compiled (torch 2.13).
        songs = self.model.songs
        songs.forward = torch.compiler.disable(songs.forward)  # type: ignore[method-assign, no-untyped-call]
        self._losses.compile(dynamic=True)

    def epoch(
        self, batches: Iterable[Windows], epoch: int, *, skip: int = 0, on_step: Callable[[StepReport], None]
    ) -> None:
        """One pass; the first `skip` steps were taken before and are passed over."""
        self.model.train()
        for step, windows in enumerate(islice(batches, skip, None), start=skip):
            loss = self.step(windows, epoch, step)
            on_step(StepReport(epoch=epoch, step=step, plays=int(windows.inputs.sum()), loss=loss))

    def step(self, windows: Windows, epoch: int, step: int) -> Tensor:
        """One step of the optimizers on this worker's share of a batch; the mean loss of the share, on the device."""
        horizons = self.model.config.horizons
        seed, *seeds = (
            np.random.SeedSequence([self.config.seed, epoch, step]).generate_state(1 + len(horizons)).tolist()
        )
        torch.manual_seed(seed + self.share.rank)  # for dropout
        batch = pad(windows.plays, windows.previous_at, self.model.config.features).to(self.device)
        inputs_B = torch.tensor(windows.inputs)
        generator = torch.Generator().manual_seed(seed)
        in_batch = self._in_batch(batch.songs_BL, inputs_B, generator) if self.config.in_batch else None
        self.negatives.draw(generator, self.device, in_batch)
        # A generator each: how much one horizon draws depends on the number of workers.
        targets = {
            name: self._targets(
                batch.songs_BL, batch.length_B, inputs_B, horizons[name], torch.Generator().manual_seed(own)
            )
            for name, own in zip(horizons, seeds, strict=True)
        }
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._losses(batch, inputs_B, targets)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._synchronize_table()
        torch.nn.utils.clip_grad_norm_(self._dense, LARGEST_GRADIENT)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    def _targets(
        self, songs_BL: Tensor, held_B: Tensor, inputs_B: Tensor, horizon: Horizon, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Flat positions (P,) in (B, L inputs) that have a target, and the target songs (P, T), -1 where none is.

        A horizon of several offsets draws T = `long_targets` of them for each position.
        """
        rows, longest = len(inputs_B), max(1, int(inputs_B.max()))
        draws = 1 if horizon.min_offset == horizon.max_offset else self.config.long_targets
        # Drawn for the whole batch, whatever the number of workers, so that a window's targets do not depend on it.
        total = (rows + 1) * self.share.workers
        offsets = torch.randint(
            horizon.min_offset, horizon.max_offset + 1, (total, self.config.window, draws), generator=generator
        )[self.share.rank :: self.share.workers][:rows, :longest]
        row, position = torch.arange(rows)[:, None, None], torch.arange(longest)[:, None]
        target = position + offsets
        there = (position < inputs_B[:, None, None]) & (target < held_B[:, None, None])
        source = torch.where(there, row * songs_BL.shape[1] + target, 0).flatten(0, 1)
        there = there.flatten(0, 1)
        asked = there.any(-1).nonzero().squeeze(-1)
        songs_PT = songs_BL.flatten()[source[asked].to(self.device)].masked_fill(~there[asked].to(self.device), -1)
        return asked.to(self.device), songs_PT

    def _in_batch(self, songs_BL: Tensor, inputs_B: Tensor, generator: torch.Generator) -> Tensor:
        """int64 (in_batch,): next songs of positions drawn from the batch of all workers, the same in each of them.

        A window is drawn and then one of its positions: windows of a batch are of like length.
        """
        windows = self.share.total(int((inputs_B > 0).sum()))
        draws = torch.rand(2, self.config.in_batch, generator=generator, dtype=torch.float64)
        drawn = (draws[0] * windows).long()
        row, here = drawn // self.share.workers, drawn % self.share.workers == self.share.rank
        row = torch.where(here, row, 0)
        following = 1 + (draws[1] * inputs_B[row]).long()
        songs = songs_BL[row.to(self.device), following.to(self.device)].where(here.to(self.device), 0)
        if self.share.workers > 1:
            dist.all_reduce(songs)
        return songs

    def _distributed(self) -> DistributedDataParallel:
        ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(self._losses, [f"model.{SONG_TABLE}"])  # type: ignore[no-untyped-call]
        return DistributedDataParallel(self._losses, find_unused_parameters=True)

    def _synchronize_table(self) -> None:
        """Average the sparse gradients of the song table over the workers: only the touched rows travel."""
        table = self.model.songs.weight
        if self.share.workers == 1 or not table.requires_grad:
            return
        gradient = table.grad.coalesce()  # type: ignore[union-attr]
        rows, values = gradient.indices()[0], gradient.values()
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.share.workers)]
        dist.all_gather(counts, torch.tensor([len(rows)], device=self.device))
        longest = int(max(counts))
        all_rows = [torch.zeros(longest, dtype=rows.dtype, device=self.device) for _ in counts]
        all_values = [torch.zeros(longest, values.shape[1], device=self.device) for _ in counts]
        dist.all_gather(all_rows, torch.nn.functional.pad(rows, (0, longest - len(rows))))
        dist.all_gather(all_values, torch.nn.functional.pad(values, (0, 0, 0, longest - len(rows))))
        # Not the filling: a row that has no gradient, but is named, is moved on by its momentum.
        named = [rows[: int(count)] for rows, count in zip(all_rows, counts, strict=True)]
        filled = [values[: int(count)] for values, count in zip(all_values, counts, strict=True)]
        table.grad = torch.sparse_coo_tensor(
            torch.cat(named).unsqueeze(0), torch.cat(filled) / self.share.workers, table.shape, check_invariants=False
        ).coalesce()
