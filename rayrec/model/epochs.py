"""A whole fit: choose the number of epochs on the validation range, then train again on all that a fit may see.

Phases: `selection` trains on the train range and measures NDCG on the validation range after each
epoch; `final` trains a fresh network for the best number of epochs on train and validation. Without
a validation range there is only `final`, for the epochs that the config names.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rayrec.data.windows import Windows
from rayrec.errors import DivergedError
from rayrec.model.checkpoint import export_song_vectors, load_training, save_training
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.train_config import ModelConfig, TrainConfig
from rayrec.model.training import StepReport, Training
from rayrec.model.validation import CHOSEN_BY, Validation, judge, validation_tastes
from rayrec.model.workers import Share

Phase = Literal["selection", "final"]
SHORTEST_S = 1e-9  # of an epoch without steps
ROWS_AT_ONCE = 1 << 14  # of each worker's table while the start of all is drawn
STEPS_BETWEEN_READS = 50  # the loss is read from the device, and workers agree on the time for a checkpoint, this often


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What one phase trains on, beside its windows."""

    vectors: np.ndarray  # float32 (M, D), of the first M songs: zero rows for songs without one
    counts: np.ndarray  # int64 (N,), plays of each song in the phase's fit range

    def known(self, share: Share) -> np.ndarray:
        """bool (n,): which of a worker's songs can be recommended, played in the fit range or given a vector."""
        known = share.own(self.counts) > 0
        given = np.asarray(share.own(self.vectors).any(axis=1))
        known[: len(given)] |= given
        return known


@dataclass(kw_only=True)
class FitProgress:
    """Where a fit stands: the next step to take, and what was found so far."""

    phase: Phase
    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_ndcg: float = -1.0
    loss: float = 0.0  # of the steps of the epoch in progress, added up
    plays: int = 0  # inputs of those steps, over all workers
    seconds: float = 0.0  # that those steps took
    epochs: list[dict[str, Any]] = field(default_factory=list)  # figures of each finished epoch


class Host(Protocol):
    """What a fit asks of whoever runs it."""

    def windows(self, phase: Phase, epoch: int) -> Iterable[Windows]:
        """This worker's share of the batches of an epoch, the same every time."""
        ...

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        """One step was taken; `loss` is the mean over the steps that were read from the device last."""
        ...

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """The selection phase is over; `model` is its best network over this worker's songs, of which it knows `known`,
        bool (n,). Every worker calls it."""
        ...

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> None:
        """Keep where the fit stands; `save` writes this worker's part of it into a folder. Every worker calls it at the
        same steps."""
        ...


class Fit:
    """Runs the phases. All workers of a distributed fit run the same code in step."""

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        data: dict[Phase, FitData],
        host: Host,
        *,
        validation: Validation | None,
        start: TasteModel | None = None,
        device: str = "cpu",
        share: Share | None = None,
    ) -> None:
        """With `start` both phases begin with the weights of that network, fit on some of the same plays."""
        share = share or Share()
        self._model_config, self._config, self._data, self._host = model_config, config, data, host
        self._validation = validation
        self._device, self._share, self._start = device, share, start
        self._best: dict[str, Tensor] | None = None
        self._saved_at = time.monotonic()
        self.progress = FitProgress(phase="final" if validation is None else "selection")
        self.training = self._new_training(self.progress.phase)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint."""
        self.progress = FitProgress(**json.loads((folder / "progress.json").read_text()))
        self.training = self._new_training(self.progress.phase)
        self._best, _ = load_training(folder, self.training)

    def run(self) -> TasteModel:
        """The trained network over this worker's songs: of the final phase, or the best of the selection phase where
        there is no refit.
        """
        if self.progress.phase == "selection":
            self._select()
            if self._best is not None:
                self.training.model.load_state_dict(self._best)
            selected = self.training.averaged() if self._best is None else self.training.model
            self._host.selected(selected, self.known)
            if not self._config.refit:
                return selected
            self._best = None
            self.progress.phase, self.progress.epoch, self.progress.step = "final", 0, 0
            self.training = self._new_training("final")
        epochs = self.progress.best_epoch + 1 if self.progress.best_epoch >= 0 else self._config.epochs
        while self.progress.epoch < epochs:
            self._epoch()
            self._checkpoint()
        return self.training.averaged()

    @property
    def known(self) -> np.ndarray:
        """bool (n,): which of this worker's songs the network can recommend."""
        return self._data[self.progress.phase].known(self._share)

    def _select(self) -> None:
        progress = self.progress
        while progress.epoch < self._config.epochs and not self._out_of_patience():
            self._epoch()
            figures = self._judge()
            progress.epochs[-1] |= figures
            if figures[CHOSEN_BY] > progress.best_ndcg:
                progress.best_ndcg, progress.best_epoch = figures[CHOSEN_BY], progress.epoch - 1
                self._best = _copied(self.training.averaged())
            self._checkpoint()

    def _out_of_patience(self) -> bool:
        return self.progress.epoch - self.progress.best_epoch > self._config.patience

    def _epoch(self) -> None:
        progress, ledger = self.progress, _Ledger(self._share)

        def on_step(report: StepReport) -> None:
            ledger.add(report)
            if report.step % STEPS_BETWEEN_READS == 0:
                self._read(ledger)
            progress.step = report.step + 1
            self._host.stepped(progress.phase, report, ledger.last_loss)
            if progress.step % STEPS_BETWEEN_READS == 0 and self._time_to_save():
                self._read(ledger)
                self._checkpoint()

        windows = self._host.windows(progress.phase, progress.epoch)
        self.training.epoch(windows, progress.epoch, skip=progress.step, on_step=on_step)
        self._read(ledger)
        self._require_finite_weights()
        progress.epochs.append(
            {
                "phase": progress.phase,
                "epoch": progress.epoch,
                "loss": progress.loss / max(1, progress.step),
                "plays": progress.plays,
                "seconds": progress.seconds,
                "plays_per_second": progress.plays / max(progress.seconds, SHORTEST_S),
            }
        )
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss, progress.plays, progress.seconds = 0.0, 0, 0.0

    def _read(self, ledger: "_Ledger") -> None:
        """Move what the steps since the last reading added up to into the progress. Raises `DivergedError`."""
        loss, plays, seconds = ledger.read()
        progress = self.progress
        if not math.isfinite(loss):
            raise DivergedError(self._diverged("the loss"))
        progress.loss, progress.plays, progress.seconds = (
            progress.loss + loss,
            progress.plays + plays,
            progress.seconds + seconds,
        )

    def _require_finite_weights(self) -> None:
        """Raises `DivergedError`. A last step can break what no loss tells of any more."""
        if self._share.total(float(not self.training.is_finite())):
            raise DivergedError(self._diverged("a weight"))

    def _diverged(self, what: str) -> str:
        return (
            f"training diverged: {what} is not finite in epoch {self.progress.epoch + 1}, at or before step "
            f"{self.progress.step + 1}; lower the learning rate (now {self._config.learning_rate:g})"
        )

    def _time_to_save(self) -> bool:
        due = time.monotonic() - self._saved_at > self._config.checkpoint_minutes * 60
        return self._share.total(float(due)) > 0

    def _checkpoint(self) -> None:
        state = self.training.state()  # of which each worker gives its part

        def save(folder: Path) -> None:
            save_training(folder, state, self._best, asdict(self.progress), self._share)

        self._host.checkpoint(self.progress, save)
        self._saved_at = time.monotonic()

    def _judge(self) -> dict[str, float]:
        """Figures of the network on the validation range, over all workers."""
        if self._validation is None:
            return {CHOSEN_BY: 0.0}
        model = self.training.averaged()
        tastes = validation_tastes(model, self.training.exchange, self._validation, self._share)
        return judge(tastes, export_song_vectors(model, self.known), self._validation, self._share)

    def _new_training(self, phase: Phase) -> Training:
        torch.manual_seed(self._config.seed)
        data, share = self._data[phase], self._share
        vectors = start_vectors(data.vectors, self._config.seed, num_songs=len(data.counts), share=share)
        model = TasteModel(replace(self._model_config, num_songs=len(vectors)), torch.from_numpy(vectors))
        if self._start is not None:
            carry_over(self._start, model, share)
        return Training(model, self._config, data.counts, device=self._device, share=share)


class _Ledger:
    """Adds up on the device what steps report, so that a step does not wait for it."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._losses: list[Tensor] = []
        self._plays, self._began = 0, time.monotonic()
        self.last_loss = 0.0  # mean over the steps of the last reading

    def add(self, report: StepReport) -> None:
        self._losses.append(report.loss)
        self._plays += report.plays

    def read(self) -> tuple[float, int, float]:
        """Losses of all steps and workers added up, plays of all workers, and seconds, since the last reading."""
        count = len(self._losses)
        local = float(torch.stack(self._losses).double().sum()) if count else 0.0
        loss = self._share.total(local)
        plays = int(self._share.total(self._plays))
        seconds = time.monotonic() - self._began
        self.last_loss = loss / max(1, count)
        self._losses, self._plays, self._began = [], 0, time.monotonic()
        return loss, plays, seconds


def start_vectors(
    vectors: np.ndarray, seed: int, *, num_songs: int | None = None, share: Share | None = None
) -> np.ndarray:
    """float32 (n, D): a worker's rows of the song vectors, (M, D), of the first M of `num_songs` songs. Songs without a
    vector have a random one, so that they can be trained.
    """
    share, total, dim = share or Share(), len(vectors) if num_songs is None else num_songs, vectors.shape[1]
    random = np.random.default_rng(seed)
    own = np.empty((len(range(share.rank, total, share.workers)), dim), dtype=np.float32)
    step = ROWS_AT_ONCE * share.workers
    for begin in range(0, total, step):
        rows: np.ndarray = np.zeros((min(step, total - begin), dim), dtype=np.float32)
        given = vectors[begin : begin + step]
        rows[: len(given)] = given
        missing = ~rows.any(axis=1)
        drawn = random.normal(size=(int(missing.sum()), dim))
        rows[missing] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
        own[begin // share.workers :][:ROWS_AT_ONCE] = share.own(rows)
    return own


def carry_over(start: TasteModel, model: TasteModel, share: Share) -> None:
    """Give a new network, of a worker's songs, the weights of a stored one, of all songs; songs that that one does not
    know keep their rows.
    """
    weights = {name: value for name, value in start.state_dict().items() if name not in TABLES}
    model.load_state_dict({**model.state_dict(), **weights})
    if model.config.song_table != "trained":
        return  # the rows are the song vectors that both were given
    for name in TABLES:
        if name in start.state_dict():
            rows = share.own(start.get_parameter(name).detach())
            known = rows.any(dim=1).nonzero().squeeze(1)
            model.get_parameter(name).detach().index_copy_(0, known, rows[known])


def _copied(model: TasteModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
