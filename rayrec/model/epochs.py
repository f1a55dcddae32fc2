"""A whole fit: choose the number of epochs on the validation range, then train again on all that a fit may see.

Phases: `selection` trains on the train range and measures NDCG on the validation range after each
epoch; `final` trains a fresh network for the best number of epochs on train and validation. Without
a validation range there is only `final`, for the epochs that the config names.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Histories, Questions
from rayrec.data.windows import Windows
from rayrec.errors import DivergedError
from rayrec.model.checkpoint import export_song_vectors, load_training, save_training
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.train_config import ModelConfig, TrainConfig
from rayrec.model.training import StepReport, Training
from rayrec.model.workers import Share

Phase = Literal["selection", "final"]
RECALL_AT = 20
CHOSEN_BY = f"validation_ndcg@{RECALL_AT}"  # as served: recall alone prefers networks that put few songs first
VALIDATION_FIGURES = (f"validation_recall@{RECALL_AT}", f"validation_mrr@{RECALL_AT}", CHOSEN_BY)
SHORTEST_S = 1e-9  # of an epoch without steps
STEPS_BETWEEN_READS = 50  # the loss is read from the device, and workers agree on the time for a checkpoint, this often


@dataclass(frozen=True, kw_only=True)
class FitData:
    """What one phase trains on, beside its windows."""

    vectors: np.ndarray  # float32 (N, D), zero rows for songs without one
    counts: np.ndarray  # int64 (N,), plays of each song in the phase's fit range

    @property
    def known(self) -> np.ndarray:
        """bool (N,): songs that can be recommended, played in the fit range or given a vector."""
        return (self.counts > 0) | self.vectors.any(axis=1)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Plays to predict: each from all plays before it by the same user."""

    histories: Histories
    plays: np.ndarray  # int64 (Q,), positions of the flat arrays

    def share(self, share: Share) -> "Validation":
        """One worker's part of the users."""
        rows = np.arange(share.rank, len(self.histories), share.workers)
        asked = np.zeros(self.histories.num_plays, dtype=bool)
        asked[self.plays] = True
        taken = self.histories.take(rows)
        kept = np.concatenate(
            [asked[a:b] for a, b in zip(self.histories.offsets[rows], self.histories.offsets[rows + 1], strict=True)]
            or [asked[:0]]
        )
        return Validation(histories=taken, plays=np.flatnonzero(kept))


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
        """The selection phase is over; `model` is its best network and `known`, bool (N,), the songs it knows."""
        ...

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> None:
        """Keep where the fit stands; `save` writes it into a folder. Every worker calls it at the same steps."""
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
        self._validation = None if validation is None else validation.share(share)
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
        """The trained network: of the final phase, or the best of the selection phase where there is no refit."""
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
        """bool (N,): songs that the network can recommend."""
        return self._data[self.progress.phase].known

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
            save_training(folder, state, self._best, asdict(self.progress))

        self._host.checkpoint(self.progress, save)
        self._saved_at = time.monotonic()

    def _judge(self) -> dict[str, float]:
        """Figures of the network on the validation range, over all workers."""
        if self._validation is None:
            return {CHOSEN_BY: 0.0}
        model = self.training.averaged()
        vectors = export_song_vectors(model, self._data["selection"].known)
        totals = self._share.totals(judge(model, vectors, self._validation, self._device).tolist())
        plays, hits, reciprocal, gain, new_plays, new_gain = totals
        return {
            f"validation_recall@{RECALL_AT}": hits / max(1.0, plays),
            f"validation_mrr@{RECALL_AT}": reciprocal / max(1.0, plays),
            CHOSEN_BY: new_gain / new_plays if new_plays else gain / max(1.0, plays),
        }

    def _new_training(self, phase: Phase) -> Training:
        torch.manual_seed(self._config.seed)
        data = self._data[phase]
        model = TasteModel(self._model_config, torch.from_numpy(start_vectors(data.vectors, self._config.seed)))
        if self._start is not None:
            carry_over(self._start, model)
        return Training(model, self._config, data.counts, device=self._device, share=self._share)


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


def start_vectors(vectors: np.ndarray, seed: int) -> np.ndarray:
    """float32 (N, D): a copy in which songs without a vector have a random one, so that they can be trained."""
    filled = np.array(vectors, dtype=np.float32)
    missing = ~filled.any(axis=1)
    drawn = np.random.default_rng(seed).normal(size=(int(missing.sum()), filled.shape[1]))
    filled[missing] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return filled


def carry_over(start: TasteModel, model: TasteModel) -> None:
    """Give a new network the weights of a stored one; songs that that one does not know keep their rows."""
    weights = {name: value for name, value in start.state_dict().items() if name not in TABLES}
    model.load_state_dict({**model.state_dict(), **weights})
    if model.config.song_table != "trained":
        return  # the rows are the song vectors that both were given
    for name in TABLES:
        if name in start.state_dict():
            rows = start.get_parameter(name)
            known = rows.any(dim=1).nonzero().squeeze(1)
            model.get_parameter(name).index_copy_(0, known, rows[known])


def judge(model: TasteModel, vectors: np.ndarray, validation: Validation, device: str) -> np.ndarray:
    """float64 (6,): plays, and among the first 20 of the full catalog hits, reciprocal ranks and NDCG gains; then of
    the plays of songs new to the user how many there are, and their gains among the songs not heard, as served.

    Ties count against a play, and a score that is no number never finds one.
    """
    histories, plays = validation.histories, validation.plays
    questions = Questions.before_plays(histories, plays)
    horizon = next(iter(model.config.horizons))  # short, where there is one
    taste = TasteEncoder(model, device).vectors(histories, questions, horizon)
    targets = histories.songs[plays]
    known: np.ndarray = np.asarray(vectors.any(axis=1))
    sums: np.ndarray = np.zeros(6)
    step = max(1, (1 << 24) // max(1, len(vectors)))
    for begin in range(0, len(taste), step):
        wanted = targets[begin : begin + step]
        scores = taste[begin : begin + step] @ vectors.T
        scores[:, ~known] = -np.inf
        findable = known[wanted] & np.isfinite(scores[np.arange(len(wanted)), wanted])
        ranks = np.where(findable, _ranks(scores, wanted), RECALL_AT + 1)
        rows, heard = _heard(histories, questions.take(np.arange(begin, begin + len(wanted))))
        is_new: np.ndarray = np.ones(len(wanted), dtype=bool)
        is_new[rows[heard == wanted[rows]]] = False
        scores[rows, heard] = -np.inf
        served = np.where(findable, _ranks(scores, wanted), RECALL_AT + 1)[is_new]
        found = ranks <= RECALL_AT
        sums += [
            len(wanted), found.sum(), (found / ranks).sum(), _gains(ranks).sum(), is_new.sum(), _gains(served).sum()
        ]  # fmt: skip
    return sums


def _ranks(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64 (Q,): the rank of one song a row, from 1."""
    own = scores[np.arange(len(wanted)), wanted]
    return np.asarray((~(scores < own[:, None])).sum(axis=1))


def _gains(ranks: np.ndarray) -> np.ndarray:
    """float64: NDCG of one right answer at each rank."""
    return np.where(ranks <= RECALL_AT, 1 / np.log2(ranks + 1.0), 0.0)


def _heard(histories: Histories, questions: Questions) -> tuple[np.ndarray, np.ndarray]:
    """The songs that users had heard when they were asked for: rows of the questions, and songs."""
    counts = np.asarray(questions.seen)
    rows = np.repeat(np.arange(len(counts)), counts)
    begin = histories.offsets[questions.rows] - (np.cumsum(counts) - counts)
    return rows, histories.songs[np.repeat(begin, counts) + np.arange(len(rows))]


def _copied(model: TasteModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
