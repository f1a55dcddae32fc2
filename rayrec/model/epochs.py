"""A complete fit: choose the number of epochs on the validation range, then train again on all plays it may see.

Phases: `selection` trains on the training range and measures NDCG on the validation range after each epoch; `final`
trains a new network on both ranges for the best number of epochs. Without a validation range there is only `final`,
with the number of epochs of the configuration.

All training workers validate a network together. Each worker computes the taste vectors of some users, and scores the
songs whose vectors it keeps for all plays to predict. The ranks follow from the numbers of songs that score at least as
high as the target, summed over all workers. Q plays, U songs, n songs of a worker, D embedding dimensions.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import group_of_each_item, ranges
from rayrec.data.windows import Windows
from rayrec.errors import DivergedError
from rayrec.model.checkpoint import export_song_vectors, load_training, save_training
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.song_tables import RowExchange, Share
from rayrec.model.train_config import NEXT_PLAY, AnyHorizon, ModelConfig, TrainConfig
from rayrec.model.training import StepReport, Training

Phase = Literal["selection", "final"]
RECALL_AT = 20
SELECTION_METRIC = (
    f"validation_ndcg@{RECALL_AT}"  # as served; recall alone prefers networks with few targets at the top
)
VALIDATION_METRICS = (f"validation_recall@{RECALL_AT}", f"validation_mrr@{RECALL_AT}", SELECTION_METRIC)
USERS_AT_ONCE = 1_000  # users per worker whose songs are in memory at once
SCORES_AT_ONCE = 1 << 24
SHORTEST_S = 1e-9  # seconds of an epoch without steps, to avoid a division by zero
ROWS_AT_ONCE = 1 << 14  # rows of each worker's table that are drawn at once at the start
STEPS_BETWEEN_READS = 50  # steps between reads of the loss from the device, and between checks for a checkpoint


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The plays to predict: for each query one play in its horizon, predicted from all earlier plays by the user."""

    histories: Histories
    plays: np.ndarray  # int64 (Q,), positions in the flat arrays; each query comes just before this play
    horizon: AnyHorizon = NEXT_PLAY  # each query must have a play in it

    @property
    def queries(self) -> Queries:
        """The queries, in the order of `plays`."""
        return Queries.before_plays(self.histories, self.plays)

    @property
    def answers(self) -> np.ndarray:
        """int64 (Q,): the play to predict for each query; if the horizon has several, one is drawn, always the same."""
        starts, ends = self.horizon.spans(self.histories, self.queries)
        return np.asarray(starts + (np.random.default_rng(0).random(len(starts)) * (ends - starts)).astype(np.int64))


def validation_tastes(
    model: TasteModel, vectors_nD: Tensor, exchange: RowExchange, validation: Validation, share: Share
) -> Tensor:
    """float32 (Q, D): the taste vectors at the queries, on the model's device, the same on all workers.

    They equal those of the saved network. The song tables of `model` hold this worker's rows, and `vectors_nD` is the
    result of `export_song_vectors` for these rows.
    """
    histories, queries = validation.histories, validation.queries
    horizon = next(iter(model.config.horizons))  # short, if it exists
    device = model.songs.weight.device
    taste_vectors = torch.zeros(len(queries), model.config.embedding_dim, device=device)
    users_at_once = USERS_AT_ONCE * share.workers
    for start in range(0, len(histories), users_at_once):
        user_rows = share.own(np.arange(start, min(start + users_at_once, len(histories))))
        batch = histories.take(user_rows)
        songs = np.unique(batch.songs).astype(np.int64)
        encoder = TasteEncoder(network_of_songs(model, vectors_nD, exchange, songs), device)
        query_rows = np.flatnonzero(np.isin(queries.rows, user_rows))
        if len(query_rows):
            song_positions = np.searchsorted(songs, batch.songs).astype(np.int32)
            batch_queries = replace(queries.take(query_rows), rows=np.searchsorted(user_rows, queries.rows[query_rows]))
            vectors = encoder.vectors(replace(batch, songs=song_positions), batch_queries, horizon)
            taste_vectors[torch.from_numpy(query_rows).to(device)] = torch.from_numpy(vectors).to(device)
    share.add_up(taste_vectors)
    return taste_vectors


def network_of_songs(model: TasteModel, vectors_nD: Tensor, exchange: RowExchange, songs: np.ndarray) -> TasteModel:
    """Return the network as it is saved, with the rows of `songs`, int64 (U,), only. All workers must call it together.

    The rows come from all workers; `vectors_nD` is as in `validation_tastes`. Unknown songs, those without a vector
    there, have zeros in both tables.
    """
    tables = [exchange.rows_of(vectors_nD, songs)]
    if model.inputs is not None:
        inputs = exchange.rows_of(model.inputs.weight.detach(), songs)
        tables.append(inputs.where(tables[0].any(dim=1, keepdim=True), 0.0))
    network = TasteModel(replace(model.config, num_songs=len(songs)), *tables, shared=True)
    weights = {name: value for name, value in model.named_parameters() if name not in TABLES}
    network.load_state_dict(weights, strict=False)
    network.exported = True
    return network


@dataclass(frozen=True, kw_only=True)
class PlayRanks:
    """The ranks of Q plays; a play of a song that is never recommended has the rank `RECALL_AT` + 1."""

    among_all: np.ndarray  # int64 (Q,), from 1
    among_unheard: np.ndarray  # int64 (Q,): as served, without the songs that the user has heard
    is_new: np.ndarray  # bool (Q,): True if the user had not heard the song

    @classmethod
    def concatenate(cls, parts: Sequence["PlayRanks"]) -> "PlayRanks":
        """Concatenate the ranks of all parts."""
        return cls(**{item.name: np.concatenate([getattr(part, item.name) for part in parts]) for item in fields(cls)})


def rank_metrics(ranks: np.ndarray) -> tuple[float, float, float]:
    """Return recall, MRR and NDCG at RECALL_AT of ranks, int64 (Q,); zeros if there are no ranks."""
    is_hit = ranks <= RECALL_AT
    gains = np.where(is_hit, 1 / np.log2(ranks + 1.0), 0.0)
    recall, mrr, ndcg = (float(values.sum() / max(1, len(ranks))) for values in (is_hit, is_hit / ranks, gains))
    return recall, mrr, ndcg


def validation_metrics(
    taste_vectors_QD: Tensor, vectors_nD: Tensor, validation: Validation, share: Share
) -> dict[str, float]:
    """Return the validation metrics, the same on all workers; the arguments are those of `rank_plays`.

    The NDCG that chooses the epoch is as served: it counts the plays of songs new to the user, or all plays if no song
    is new.
    """
    ranks = rank_plays(taste_vectors_QD, vectors_nD, validation, share)
    recall, mrr, ndcg = rank_metrics(ranks.among_all)
    return {
        f"validation_recall@{RECALL_AT}": recall,
        f"validation_mrr@{RECALL_AT}": mrr,
        SELECTION_METRIC: rank_metrics(ranks.among_unheard[ranks.is_new])[2] if ranks.is_new.any() else ndcg,
    }


@torch.inference_mode()
def rank_plays(taste_vectors_QD: Tensor, vectors_nD: Tensor, validation: Validation, share: Share) -> PlayRanks:
    """Return the ranks of the plays to predict among all songs by dot product, the same on all workers.

    `vectors_nD` are the vectors of this worker's songs; an unknown song has zeros and is never recommended. Ties count
    against a play, and a play whose score is not finite is never found.
    """
    histories, queries = validation.histories, validation.queries
    targets = histories.songs[validation.answers]
    unknown_n = ~vectors_nD.any(dim=1)
    max_songs = -(-int(share.total(len(vectors_nD))) // share.workers)
    queries_at_once = max(1, SCORES_AT_ONCE // max(1, max_songs))
    empty: np.ndarray = np.zeros(0, dtype=np.int64)
    parts = [PlayRanks(among_all=empty, among_unheard=empty, is_new=empty.astype(bool))]
    for start in range(0, len(taste_vectors_QD), queries_at_once):
        target_songs = targets[start : start + queries_at_once]
        scores_Qn = taste_vectors_QD[start : start + queries_at_once] @ vectors_nD.T
        scores_Qn[:, unknown_n] = -torch.inf
        rows, columns = _worker_pairs(np.arange(len(target_songs)), target_songs, share, scores_Qn.device)
        target_scores_Q = scores_Qn.new_zeros(len(target_songs))
        target_scores_Q[rows] = scores_Qn[rows, columns]
        share.add_up(target_scores_Q)
        among_all_Q = _count_not_below(scores_Qn, target_scores_Q)
        heard_rows, heard_songs = _heard_songs(histories, queries.take(slice(start, start + queries_at_once)))
        scores_Qn[_worker_pairs(heard_rows, heard_songs, share, scores_Qn.device)] = -torch.inf
        ranks_2Q = torch.stack([among_all_Q, _count_not_below(scores_Qn, target_scores_Q)])
        share.add_up(ranks_2Q)
        among_all, among_unheard = ranks_2Q.where(target_scores_Q.isfinite(), RECALL_AT + 1).cpu().numpy()
        is_new: np.ndarray = np.ones(len(target_songs), dtype=bool)
        is_new[heard_rows[heard_songs == target_songs[heard_rows]]] = False
        parts.append(PlayRanks(among_all=among_all, among_unheard=among_unheard, is_new=is_new))
    return PlayRanks.concatenate(parts)


def _worker_pairs(rows: np.ndarray, songs: np.ndarray, share: Share, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows and songs of the pairs whose song this worker keeps; songs become positions among its own."""
    is_kept = songs % share.workers == share.rank
    return (
        torch.from_numpy(rows[is_kept]).to(device),
        torch.from_numpy(songs[is_kept].astype(np.int64) // share.workers).to(device),
    )


def _count_not_below(scores_Qn: Tensor, target_scores_Q: Tensor) -> Tensor:
    """int64 (Q,): the number of songs that do not score below the target."""
    return (~(scores_Qn < target_scores_Q[:, None])).sum(dim=1)


def _heard_songs(histories: Histories, queries: Queries) -> tuple[np.ndarray, np.ndarray]:
    """Return the songs that users had heard at the queries, as pairs: rows of the queries, and songs."""
    counts = np.asarray(queries.plays_before)
    rows = group_of_each_item(counts)
    return rows, histories.songs[ranges(histories.offsets[queries.rows], counts)]


@dataclass(frozen=True, kw_only=True)
class FitData:
    """The training data of one phase, apart from its windows."""

    vectors: np.ndarray  # float32 (M, D), vectors of the first M songs; zeros for songs without a vector
    counts: np.ndarray  # int64 (N,), plays of each song in the phase's fit range

    def known(self, share: Share) -> np.ndarray:
        """bool (n,): which of a worker's songs can be recommended: those with a play in the fit range or a vector."""
        is_known = share.own(self.counts) > 0
        has_vector = np.asarray(share.own(self.vectors).any(axis=1))
        is_known[: len(has_vector)] |= has_vector
        return is_known


@dataclass(kw_only=True)
class FitProgress:
    """The progress of a fit: the next step to take, and the results so far."""

    phase: Phase
    epoch: int = 0
    step: int = 0
    best_epoch: int = -1
    best_ndcg: float = -1.0
    loss: float = 0.0  # sum over the steps of the current epoch so far
    plays: int = 0  # inputs of those steps, over all workers
    targets: int = 0  # targets of those steps, of all horizons and workers
    seconds: float = 0.0  # duration of those steps
    epochs: list[dict[str, Any]] = field(default_factory=list)  # figures of each finished epoch


class Host(Protocol):
    """What a fit needs from its caller."""

    def windows(self, phase: Phase, epoch: int) -> Iterable[Windows]:
        """Return this worker's share of the batches of an epoch, the same on every call."""
        ...

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        """Called after each step; `loss` is the mean over the steps whose losses were last read from the device."""
        ...

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """Called by every worker at the end of the selection phase.

        `model` is the best network, over this worker's songs; `known`, bool (n,), are the songs that it knows.
        """
        ...

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> bool:
        """Store a checkpoint; `save` writes this worker's part of it to a folder.

        Every worker calls this method at the same steps. It returns False on all workers, and saves nothing, while the
        previous checkpoint is still being stored.
        """
        ...


class Fit:
    """Runs the phases of a fit. All workers of a distributed fit run the same code at the same time."""

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
        """With `start`, both phases begin with the weights of that network, which was fitted on some of the plays."""
        share = share or Share()
        self._model_config, self._config, self._data, self._host = model_config, config, data, host
        self._validation = validation
        self._device, self._share, self._start_model = device, share, start
        self._best_weights: dict[str, Tensor] | None = None
        self._saved_at = time.monotonic()
        self.progress = FitProgress(phase="final" if validation is None else "selection")
        self.training = self._new_training(self.progress.phase)

    def resume(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`."""
        self.progress = FitProgress(**json.loads((folder / "progress.json").read_text()))
        del self.training  # a worker may not have enough memory for its tables twice
        self.training = self._new_training(self.progress.phase)
        self._best_weights, _ = load_training(folder, self.training)

    def run(self) -> TasteModel:
        """Run all phases and return the trained network over this worker's songs.

        It is the network of the final phase, or the best one of the selection phase if there is no refit.
        """
        if self.progress.phase == "selection":
            self._select()
            if self._best_weights is not None:
                self.training.model.load_state_dict(self._best_weights)
            selected_model = self.training.averaged() if self._best_weights is None else self.training.model
            self._host.selected(selected_model, self.known)
            if not self._config.refit:
                return selected_model
            self._best_weights = None
            del selected_model, self.training  # a worker may not have enough memory for the tables of both phases
            self.progress.phase, self.progress.epoch, self.progress.step = "final", 0, 0
            self.training = self._new_training("final")
        epochs = self.progress.best_epoch + 1 if self.progress.best_epoch >= 0 else self._config.epochs
        while self.progress.epoch < epochs:
            self._run_epoch()
            self._save_checkpoint()
        return self.training.averaged()

    @property
    def known(self) -> np.ndarray:
        """bool (n,): which of this worker's songs the network can recommend."""
        return self._data[self.progress.phase].known(self._share)

    def _select(self) -> None:
        progress = self.progress
        while progress.epoch < self._config.epochs and not self._is_out_of_patience():
            self._run_epoch()
            metrics = self.validate()
            progress.epochs[-1] |= metrics
            if metrics[SELECTION_METRIC] > progress.best_ndcg:
                progress.best_ndcg, progress.best_epoch = metrics[SELECTION_METRIC], progress.epoch - 1
                self._best_weights = _copy_weights(self.training.averaged())
            self._save_checkpoint()

    def _is_out_of_patience(self) -> bool:
        return self.progress.epoch - self.progress.best_epoch > self._config.patience

    def _run_epoch(self) -> None:
        progress, ledger = self.progress, _StepTotals(self._share)

        def on_step(report: StepReport) -> None:
            ledger.add(report)
            if report.step % STEPS_BETWEEN_READS == 0:
                self._add_to_progress(ledger)
            progress.step = report.step + 1
            self._host.stepped(progress.phase, report, ledger.last_loss)
            if progress.step % STEPS_BETWEEN_READS == 0 and self._is_time_to_save():
                self._add_to_progress(ledger)
                self._save_checkpoint()

        windows = self._host.windows(progress.phase, progress.epoch)
        self.training.epoch(windows, progress.epoch, skip=progress.step, on_step=on_step)
        self._add_to_progress(ledger)
        self._require_finite_weights()
        progress.epochs.append(
            {
                "phase": progress.phase,
                "epoch": progress.epoch,
                "loss": progress.loss / max(1, progress.step),
                "plays": progress.plays,
                "targets": progress.targets,
                "seconds": progress.seconds,
                "plays_per_second": progress.plays / max(progress.seconds, SHORTEST_S),
            }
        )
        progress.epoch, progress.step = progress.epoch + 1, 0
        progress.loss, progress.plays, progress.targets, progress.seconds = 0.0, 0, 0, 0.0

    def _add_to_progress(self, ledger: "_StepTotals") -> None:
        """Add the sums since the last read to the progress. Raises `DivergedError` if the loss is not finite."""
        loss, plays, targets, seconds = ledger.read()
        progress = self.progress
        if not math.isfinite(loss):
            raise DivergedError(self._divergence_message("the loss"))
        progress.loss += loss
        progress.plays += plays
        progress.targets += targets
        progress.seconds += seconds

    def _require_finite_weights(self) -> None:
        """Raise `DivergedError` if a weight is not finite. The loss does not show this if the last step caused it."""
        if self._share.total(float(not self.training.is_finite())):
            raise DivergedError(self._divergence_message("a weight"))

    def _divergence_message(self, subject: str) -> str:
        return (
            f"training diverged: {subject} is not finite in epoch {self.progress.epoch + 1}, at or before step "
            f"{self.progress.step + 1}; lower the learning rate (now {self._config.learning_rate:g})"
        )

    def _is_time_to_save(self) -> bool:
        is_due = time.monotonic() - self._saved_at > self._config.checkpoint_minutes * 60
        return self._share.total(float(is_due)) > 0

    def _save_checkpoint(self) -> None:
        state = self.training.state()  # this worker's part

        def save(folder: Path) -> None:
            save_training(folder, state, self._best_weights, asdict(self.progress), self._share)

        if self._host.checkpoint(self.progress, save):
            self._saved_at = time.monotonic()

    def validate(self) -> dict[str, float]:
        """Return the metrics of the network on the validation range, over all workers."""
        if self._validation is None:
            return {SELECTION_METRIC: 0.0}
        model = self.training.averaged()
        vectors = export_song_vectors(model, self.known)
        taste_vectors = validation_tastes(model, vectors, self.training.exchange, self._validation, self._share)
        return validation_metrics(taste_vectors, vectors, self._validation, self._share)

    def _new_training(self, phase: Phase) -> Training:
        torch.manual_seed(self._config.seed)
        data, share = self._data[phase], self._share
        vectors = start_vectors(data.vectors, self._config.seed, num_songs=len(data.counts), share=share)
        model = TasteModel(replace(self._model_config, num_songs=len(vectors)), torch.from_numpy(vectors))
        if self._start_model is not None:
            copy_weights_from(self._start_model, model, share)
        return Training(model, self._config, data.counts, device=self._device, share=share)


class _StepTotals:
    """Collects the reports of steps, with losses left on the device, so that a step does not wait for them."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._losses: list[Tensor] = []
        self._plays, self._targets, self._started = 0, 0, time.monotonic()
        self.last_loss = 0.0  # mean over the steps of the last read

    def add(self, report: StepReport) -> None:
        self._losses.append(report.loss)
        self._plays += report.plays
        self._targets += report.targets

    def read(self) -> tuple[float, int, int, float]:
        """Return the sums since the last read: losses, plays and targets of all workers, and the seconds passed."""
        num_steps = len(self._losses)
        local_loss = float(torch.stack(self._losses).double().sum()) if num_steps else 0.0
        loss, plays, targets = self._share.totals([local_loss, self._plays, self._targets])
        seconds = time.monotonic() - self._started
        self.last_loss = loss / max(1, num_steps)
        self._losses, self._plays, self._targets, self._started = [], 0, 0, time.monotonic()
        return loss, int(plays), int(targets), seconds


def start_vectors(
    vectors: np.ndarray, seed: int, *, num_songs: int | None = None, share: Share | None = None
) -> np.ndarray:
    """float32 (n, D): a worker's rows of the first song table.

    `vectors`, (M, D), are those of the first M of `num_songs` songs. Songs without a vector get a random one, so that
    they can be trained.
    """
    share, total, dim = share or Share(), len(vectors) if num_songs is None else num_songs, vectors.shape[1]
    rng = np.random.default_rng(seed)
    worker_rows = np.empty((len(range(share.rank, total, share.workers)), dim), dtype=np.float32)
    step = ROWS_AT_ONCE * share.workers
    for start in range(0, total, step):
        rows: np.ndarray = np.zeros((min(step, total - start), dim), dtype=np.float32)
        vector_rows = vectors[start : start + step]
        rows[: len(vector_rows)] = vector_rows
        is_missing = ~rows.any(axis=1)
        random_vectors = rng.normal(size=(int(is_missing.sum()), dim))
        rows[is_missing] = random_vectors / np.linalg.norm(random_vectors, axis=1, keepdims=True)
        worker_rows[start // share.workers :][:ROWS_AT_ONCE] = share.own(rows)
    return worker_rows


def copy_weights_from(start: TasteModel, model: TasteModel, share: Share) -> None:
    """Copy the weights of a stored network of all songs, `start`, to `model`, a new network of a worker's songs.

    Songs that `start` does not know keep their rows in `model`.
    """
    weights = {name: value for name, value in start.state_dict().items() if name not in TABLES}
    model.load_state_dict({**model.state_dict(), **weights})
    if model.config.song_table != "trained":
        return  # both networks were given the same song vectors
    for name in TABLES:
        if name in start.state_dict():
            rows = share.own(start.get_parameter(name).detach())
            known_rows = rows.any(dim=1).nonzero().squeeze(1)
            model.get_parameter(name).detach().index_copy_(0, known_rows, rows[known_rows])


def _copy_weights(model: TasteModel) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
