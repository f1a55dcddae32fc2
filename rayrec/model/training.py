"""The training loop: plain PyTorch over an iterable of windows, on one device or as one of many workers.

Everything random is a function of seed, epoch and step, so a resumed run goes on as if it had never
stopped. Shapes: B windows, L plays, U songs of a step, D embedding.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayrec.data.windows import Windows
from rayrec.model.network import INPUT_TABLE, SONG_TABLE, TABLES, TasteModel
from rayrec.model.objectives import OBJECTIVES
from rayrec.model.song_tables import Decay, RowAdam
from rayrec.model.steps import StepMaker, TrainingStep, ahead
from rayrec.model.train_config import TrainConfig
from rayrec.model.workers import Share

LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did, this worker's share of it."""

    epoch: int
    step: int  # within the epoch, from 0
    plays: int  # inputs
    loss: Tensor  # float32 (), on the device: this worker's part of the mean over all targets, horizons added


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
        self._maker = StepMaker(model.config, config, counts, share)
        self._dense = [value for name, value in model.named_parameters() if name not in TABLES]
        self.optimizer = torch.optim.Adam(self._dense, lr=config.learning_rate, fused=True)
        self.tables: dict[str, RowAdam] = {}
        if config.song_table == "trained":
            weights = dict(model.named_parameters())
            names = [name for name in TABLES if name in weights]
            self.tables = {
                name: RowAdam(weights[name].detach(), config.table_learning_rate, config.averaged_steps)
                for name in names
            }
        self._decay = Decay(config.averaged_steps)
        self._averages = [value.detach().clone() for value in self._dense]

    def compile(self) -> None:
        """Let torch.compile fuse the network; the first steps then take up to minutes."""
        self.model.compile(dynamic=True)

    def averaged(self) -> TasteModel:
        """The network whose weights are averages over the last steps, for whatever is judged or kept."""
        if not self._decay.steps:
            return self.model
        model = copy.deepcopy(self.model)
        dense = [value for name, value in model.named_parameters() if name not in TABLES]
        with torch.no_grad():
            for value, average in zip(dense, self._averages, strict=True):
                value.copy_(average)
            for name, table in self.tables.items():
                model.get_parameter(name).copy_(table.averaged())
        return model

    def optimizer_state(self) -> dict[str, Tensor]:
        """What the optimizers remember, as a checkpoint keeps it."""
        slots = self.optimizer.state_dict()["state"]
        dense = {f"dense/{index}/{key}": value for index, of in slots.items() for key, value in of.items()}
        rows = {f"{name}/{key}": value for name, table in self.tables.items() for key, value in table.state().items()}
        averages = {f"average/{index}": value for index, value in enumerate(self._averages)}
        decay = torch.tensor([self._decay.taken, self._decay.log_total], dtype=torch.float64)
        return dense | rows | averages | {"decay": decay}

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `optimizer_state` gave."""
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            if name.startswith("dense/"):
                _, number, key = name.split("/")
                slots.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        for name, table in self.tables.items():
            prefix = f"{name}/"
            table.load({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)})
        for index, average in enumerate(self._averages):
            average.copy_(state[f"average/{index}"])
        self._decay.taken, self._decay.log_total = int(state["decay"][0]), float(state["decay"][1])

    def epoch(
        self, batches: Iterable[Windows], epoch: int, *, skip: int = 0, on_step: Callable[[StepReport], None]
    ) -> None:
        """One pass; the first `skip` steps were taken before and are passed over."""
        for report in self.steps(islice(batches, skip, None), epoch, first=skip):
            on_step(report)

    def steps(self, batches: Iterable[Windows], epoch: int, *, first: int = 0) -> Iterator[StepReport]:
        """Take a step on each batch, the first of them numbered `first`, while a thread prepares those that follow."""
        self.model.train()
        made = ahead(self._maker.make(windows, epoch, number) for number, windows in enumerate(batches, start=first))
        step = next(made, None)
        totals = torch.tensor(self.share.totals(step.counts) if step else [], dtype=torch.float32)
        while step is not None:
            following = next(made, None)
            loss, totals = self.take(step, totals, following)
            yield StepReport(epoch=epoch, step=step.number, plays=step.plays, loss=loss)
            step = following

    def step(self, windows: Windows, epoch: int, number: int) -> Tensor:
        """One step by itself; its loss, on the device."""
        step = self._maker.make(windows, epoch, number)
        loss, _ = self.take(step, torch.tensor(self.share.totals(step.counts), dtype=torch.float32), None)
        return loss

    def take(self, step: TrainingStep, totals: Tensor, following: TrainingStep | None) -> tuple[Tensor, Tensor]:
        """One step of the optimizers on this worker's share of a batch.

        `totals` float32 (horizons,) are the targets of all workers. Gives this worker's part of the mean loss, on
        the device, and the totals of the step that follows: they come with the gradients, so that a step waits for
        the other workers only once.
        """
        torch.manual_seed(step.seed)
        on_device = step.to(self.device)
        rows = {name: self._look_up(name, songs) for name, songs in on_device.songs.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._loss(on_device, rows, totals.to(self.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        totals = self._add_up_gradients(following)
        torch.nn.utils.clip_grad_norm_(self._dense, LARGEST_GRADIENT)
        self.optimizer.step()
        if self._decay.steps:
            torch._foreach_lerp_(self._averages, [value.detach() for value in self._dense], 1 - self._decay.step())
        for name, table in self.tables.items():
            self._move_rows(table, on_device.songs[name], rows[name])
        return loss.detach(), totals

    def _look_up(self, name: str, songs_U: Tensor) -> Tensor:
        if name in self.tables:
            return self.tables[name].look_up(songs_U)
        return self.model.songs.weight.index_select(0, songs_U)

    def _loss(self, step: TrainingStep, rows: dict[str, Tensor], totals: Tensor) -> Tensor:
        """This worker's part of the losses of all horizons added, each the mean over the targets of all workers."""
        outputs_UD = self.model.compared(rows[SONG_TABLE])
        inputs_UD = nn.functional.normalize(rows[INPUT_TABLE], dim=-1) if INPUT_TABLE in rows else outputs_UD
        songs_BLD = nn.functional.embedding(step.batch.songs_BL, inputs_UD)
        tastes = self.model(step.batch, step.request_gap_BL, songs_BLD)
        losses = []
        for place, (horizon, targets) in enumerate(step.targets.items()):
            if not len(targets.positions):
                continue
            taste_PD = tastes[horizon].flatten(0, 1).index_select(0, targets.positions).float()
            scale, objective = self.model.scale(horizon), OBJECTIVES[self.config.objective]
            loss = objective(outputs_UD.float(), taste_PD, targets, step.negatives[horizon], scale)
            losses.append(loss / totals[place])
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.device)

    def _add_up_gradients(self, following: TrainingStep | None) -> Tensor:
        """Sum the dense gradients over all workers; the sums of the following step's targets come along."""
        counts = following.counts if following else [0] * len(self.model.config.horizons)
        for value in self._dense:
            if value.grad is None:  # no target of any horizon depends on it; the same for any number of workers
                value.grad = torch.zeros_like(value)
        if self.share.workers == 1:
            return torch.tensor(counts, dtype=torch.float32)
        gradients = [value.grad for value in self._dense if value.grad is not None]
        sizes = [gradient.numel() for gradient in gradients]
        told = torch.tensor(counts, dtype=torch.float32).to(self.device, non_blocking=True)
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), told])
        self.share.add_up(flat)
        *parts, totals = torch.split(flat, [*sizes, len(counts)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return totals

    def _move_rows(self, table: RowAdam, songs_U: Tensor, rows_UD: Tensor) -> None:
        """Move rows on by their gradients, summed over the workers: only the touched rows travel."""
        gradient_UD = torch.zeros_like(rows_UD) if rows_UD.grad is None else rows_UD.grad
        if self.share.workers > 1:
            songs_U, gradient_UD = self._gathered(songs_U, gradient_UD)
        table.step(songs_U, gradient_UD)

    def _gathered(self, songs_U: Tensor, gradient_UD: Tensor) -> tuple[Tensor, Tensor]:
        """The songs of all workers, each once, and their gradients added up."""
        counts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.share.workers)]
        dist.all_gather(counts, torch.tensor([len(songs_U)], device=self.device))
        longest = int(max(counts))
        all_songs = [torch.zeros(longest, dtype=songs_U.dtype, device=self.device) for _ in counts]
        all_values = [torch.zeros(longest, gradient_UD.shape[1], device=self.device) for _ in counts]
        dist.all_gather(all_songs, nn.functional.pad(songs_U, (0, longest - len(songs_U))))
        dist.all_gather(all_values, nn.functional.pad(gradient_UD, (0, 0, 0, longest - len(songs_U))))
        # Not the filling: a row that has no gradient, but is named, is moved on by its momentum.
        named = torch.cat([songs[: int(count)] for songs, count in zip(all_songs, counts, strict=True)])
        values = torch.cat([part[: int(count)] for part, count in zip(all_values, counts, strict=True)])
        songs, places = torch.unique(named, return_inverse=True)
        return songs, values.new_zeros(len(songs), values.shape[1]).index_add_(0, places, values)
