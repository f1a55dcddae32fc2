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
from torch import Tensor, nn

from rayrec.data.windows import Windows
from rayrec.model.network import INPUT_TABLE, SONG_TABLE, TABLES, TasteModel, unit
from rayrec.model.objectives import OBJECTIVES
from rayrec.model.row_exchange import RowExchange
from rayrec.model.song_tables import Decay, RowAdam, SongTable
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


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Where a training stands: weights, and what the optimizers remember."""

    common: dict[str, Tensor]  # the same for all workers
    rows: dict[str, Tensor]  # with an entry for each row of the song tables that this worker keeps


class Training:
    """One fit of one network. Pass epochs of windows to `epoch`."""

    def __init__(
        self, model: TasteModel, config: TrainConfig, counts: np.ndarray, *, device: str, share: Share
    ) -> None:
        """`counts` int (N,) are each song's plays in the fit range; negatives are drawn by them.

        The song tables of `model` hold this worker's rows alone: of W workers row r is in the r mod W-th one's.
        """
        self.device = torch.device(device)
        self.bf16 = self.device.type == "cuda"  # products in bfloat16; weights and sums stay float32
        self.model = model.to(self.device)
        if config.compiled:
            self.model.compile(dynamic=True)  # the same for windows of any length, which would else be compiled anew
        self.config = config
        self.share = share
        self._maker = StepMaker(model.config, config, counts, share)
        self._dense_names = [name for name, _ in model.named_parameters() if name not in TABLES]
        self._dense = [model.get_parameter(name) for name in self._dense_names]
        self.optimizer = torch.optim.Adam(self._dense, lr=config.learning_rate, fused=True)
        self._taken = 0  # steps
        weights = {name: value.detach() for name, value in model.named_parameters() if name in TABLES}
        self.tables: dict[str, SongTable] = {name: self._table(value) for name, value in weights.items()}
        self.exchange = RowExchange(share)
        self._decay = Decay(config.averaged_steps)
        self._averages = [value.detach().clone() for value in self._dense]

    def _table(self, rows_nD: Tensor) -> SongTable:
        config = self.config
        if config.song_table != "trained":
            return SongTable(rows_nD)
        return RowAdam(rows_nD, config.table_learning_rate, config.averaged_steps)

    def averaged(self) -> TasteModel:
        """The network whose weights are averages over the last steps, for whatever is judged or kept.

        Its song tables hold this worker's rows.
        """
        if not self._decay.steps:
            return self.model
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in zip(self._dense_names, self._averages, strict=True):
                model.get_parameter(name).copy_(value)
            for name, table in self.tables.items():
                model.get_parameter(name).copy_(table.averaged())
        return model

    def is_finite(self) -> bool:
        """False where a weight that this worker has moved is no number."""
        dense = all(bool(value.isfinite().all()) for value in self._dense)
        return dense and all(table.is_finite() for table in self.tables.values())

    def state(self) -> TrainingState:
        """Where the training stands, as a checkpoint keeps it, for any number of workers."""
        slots = self.optimizer.state_dict()["state"]
        common = {f"model/{name}": self.model.get_parameter(name).detach() for name in self._dense_names}
        common |= {f"optimizer/{index}/{key}": value for index, of in slots.items() for key, value in of.items()}
        common |= {f"average/{index}": value for index, value in enumerate(self._averages)}
        common["decay"] = self._decay.state()
        common["taken"] = torch.tensor(self._taken)
        rows: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            of_table, slots_of_rows = table.state()
            common |= {f"{name}/{key}": value for key, value in of_table.items()}
            rows |= {f"{name}/{key}": value for key, value in slots_of_rows.items()}
        return TrainingState(common=common, rows=rows)

    def load(self, state: TrainingState) -> None:
        """Go on from what `state` gave."""
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _below("optimizer", state.common).items():
            number, _, key = name.partition("/")
            slots.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        with torch.no_grad():
            for name in self._dense_names:
                self.model.get_parameter(name).copy_(state.common[f"model/{name}"])
        for name, table in self.tables.items():
            table.load(_below(name, state.common), _below(name, state.rows))
        for index, average in enumerate(self._averages):
            average.copy_(state.common[f"average/{index}"])
        self._decay.load(state.common["decay"])
        self._taken = int(state.common["taken"])

    def epoch(
        self, batches: Iterable[Windows], epoch: int, *, skip: int = 0, on_step: Callable[[StepReport], None]
    ) -> None:
        """One pass; the first `skip` steps were taken before and are passed over."""
        for report in self.steps(islice(batches, skip, None), epoch, first=skip):
            on_step(report)

    def steps(self, batches: Iterable[Windows], epoch: int, *, first: int = 0) -> Iterator[StepReport]:
        """Take a step on each batch, the first of them numbered `first`, while a thread prepares those that follow."""
        self.model.train()
        prepared = (self._prepared(windows, epoch, number) for number, windows in enumerate(batches, start=first))
        for step in ahead(prepared):
            yield StepReport(epoch=epoch, step=step.number, plays=step.plays, loss=self.take(step))

    def step(self, windows: Windows, epoch: int, number: int) -> Tensor:
        """One step by itself; its loss, on the device."""
        return self.take(self._prepared(windows, epoch, number))

    def _prepared(self, windows: Windows, epoch: int, number: int) -> TrainingStep:
        return self.exchange.agree(self._maker.make(windows, epoch, number), [*self.tables])

    def take(self, step: TrainingStep) -> Tensor:
        """One step of the optimizers on this worker's share of a batch; its part of the mean loss, on the device."""
        torch.manual_seed(step.seed)
        self._set_learning_rates()
        on_device = step.to(self.device)
        rows = {
            name: self.tables[name].look_up(songs, on_device.requests.get(name))
            for name, songs in on_device.songs.items()
        }
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._loss(on_device, rows)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self._add_up_gradients()
        self.optimizer.step()
        if self._decay.steps:
            torch._foreach_lerp_(self._averages, [value.detach() for value in self._dense], 1 - self._decay.step())
        for name, table in self.tables.items():
            table.step(on_device.songs[name], rows[name], on_device.requests.get(name))
        return loss.detach()

    def _set_learning_rates(self) -> None:
        """Those of the next step."""
        self._taken += 1
        factor = self.config.scale * min(1.0, self._taken / max(1, self.config.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = factor * self.config.learning_rate
        for table in self.tables.values():
            table.learning_rate = factor * self.config.table_learning_rate

    def _loss(self, step: TrainingStep, rows: dict[str, Tensor]) -> Tensor:
        """This worker's part of the losses of all horizons added, each the mean over the targets of all workers."""
        if not sum(step.counts):  # this worker's share of the batch has no target
            return torch.zeros((), device=self.device)
        outputs_UD = unit(rows[SONG_TABLE] if self.model.map is None else self.model.map(rows[SONG_TABLE]))
        inputs_UD = unit(rows[INPUT_TABLE]) if INPUT_TABLE in rows else outputs_UD
        songs_BLD = nn.functional.embedding(step.batch.songs_BL, inputs_UD)
        tastes = self.model(step.batch, step.request_gap_BL, songs_BLD)
        targets = step.targets
        taste_PD = torch.stack([*tastes.values()]).flatten(0, 2).index_select(0, targets.positions).float()
        objective = OBJECTIVES[self.config.objective]
        scale_P = targets.horizons_PH @ self.model.log_scale.exp()
        return objective(outputs_UD.float(), taste_PD, targets, step.negatives, scale_P)

    def _add_up_gradients(self) -> None:
        """Sum the dense gradients over all workers and clip them."""
        # What no target of any horizon depends on has none; the same for any number of workers.
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in self._dense]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.share.add_up(flat)
        flat.div_(torch.linalg.vector_norm(flat).div_(LARGEST_GRADIENT).clamp_(min=1.0))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for value, part in zip(self._dense, parts, strict=True):
            value.grad = part.view_as(value)


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with the prefix and a slash, by the rest of their names."""
    prefix += "/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
