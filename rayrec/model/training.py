"""The training loop: plain PyTorch over an iterable of windows, on one device or as one of many workers.

A step is prepared on the host: its songs are collected, targets and negatives are drawn, tensors are padded. All sizes
that depend on the data are computed there, so that the host never waits for a result from the device. A thread prepares
the next steps and copies them to the device while earlier steps run. All random numbers are a function of seed, epoch
and step, so a resumed run continues as if it had never stopped.

Shapes: B windows, L plays, U songs of a step, D embedding dimensions, P positions with a target, T targets per
position, K negatives, H horizons.
"""

import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rayrec.data.histories import Queries
from rayrec.data.windows import Windows
from rayrec.model.network import INPUT_TABLE, SONG_TABLE, TABLES, PlayBatch, TasteModel, pad, unit
from rayrec.model.objectives import OBJECTIVES, Negatives, NegativeSampler, Targets, log_prior
from rayrec.model.song_tables import Decay, RowAdam, RowExchange, RowRequests, Share, SongTable
from rayrec.model.train_config import AnyHorizon, DaysHorizon, ModelConfig, TrainConfig

STEPS_AHEAD = 2  # steps that are prepared while one runs
STOP_SECONDS = 5.0  # time to wait for the thread to end, which may itself wait for a worker that failed
LARGEST_GRADIENT = 1.0  # norm to which gradients are clipped

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One worker's share of a batch, ready for the device."""

    number: int  # within the epoch, from 0
    seed: int  # of the random numbers in the step itself: dropout
    windows: Windows  # from which the step was prepared
    batch: PlayBatch  # the input plays; songs_BL holds rows of the songs that are looked up as inputs
    averaged_BL: Tensor  # int64: the songs that are averaged, as rows of the song table; (B, 0) if songs_BL is used
    request_gap_BL: Tensor  # float32: scaled time to the next play
    songs: dict[str, Tensor]  # table -> int64 (U,), the distinct songs looked up in it, grouped by their worker
    targets: Targets  # weighted by 1 / number of its horizon's targets over all workers
    scale_P: Tensor  # float32: the scale of the logits of each position
    negatives: Negatives
    counts: list[int]  # number of targets of each horizon
    requests: dict[str, RowRequests] = field(default_factory=dict)  # table -> requests between workers
    copied: torch.cuda.Event | None = None  # marks that the step has reached the device; None on a CPU

    @property
    def plays(self) -> int:
        """The number of input plays."""
        return int(self.windows.inputs.sum())

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that are on the device, for a step on a device."""
        tensors: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        _map_tensors(self, collect)
        return tensors

    def to(self, device: torch.device, copy_stream: torch.cuda.Stream | None) -> "TrainingStep":
        """Return the step copied to `device` on the stream `copy_stream`, while other streams of the device continue.

        Call `await_copies` before the step is used. Without a stream, on a CPU, return the step itself.
        """
        if copy_stream is None:
            return self
        with torch.cuda.device(copy_stream.device), torch.cuda.stream(copy_stream):  # a new thread uses device 0
            copied_step: TrainingStep = _map_tensors(
                self, lambda tensor: tensor.contiguous().pin_memory().to(device, non_blocking=True)
            )
        return replace(copied_step, copied=copy_stream.record_event())

    def await_copies(self) -> None:
        """Make the current stream wait until the step is on the device; the host does not wait."""
        if self.copied is None:
            return
        stream = torch.cuda.current_stream(self.batch.songs_BL.device)
        stream.wait_event(self.copied)
        for tensor in self.tensors:
            tensor.record_stream(stream)  # else later copies may reuse its memory while this stream still reads it


class StepMaker:
    """Prepares steps. Random draws are a function of seed, epoch, step, and a window's place in its batch."""

    def __init__(self, model: ModelConfig, config: TrainConfig, counts: np.ndarray, share: Share) -> None:
        """`counts`, int (N,), are each song's plays in the fit range; negatives are drawn in proportion to them."""
        self._model, self._config, self._share, self._num_songs = model, config, share, len(counts)
        self._sampler = NegativeSampler(counts, round(config.negatives * config.scale))
        self._priors: dict[str, np.ndarray] = {}  # by horizon, for horizons with a prior
        self._scale_H = torch.tensor([model.logit_scales[name] for name in model.horizons])
        if config.long_correction < 1:
            self._priors["long"] = log_prior(counts, config.long_correction)

    def make(self, windows: Windows, epoch: int, number: int) -> TrainingStep:
        """Return the step for `windows`, this worker's share of a batch."""
        entropy = [self._config.seed, epoch, number]
        seed, *seeds = np.random.SeedSequence(entropy).generate_state(1 + len(self._model.horizons)).tolist()
        padded = pad(windows.plays, windows.previous_at, self._model.features)
        inputs_B = torch.tensor(windows.inputs)  # a copy, since Arrow's arrays are read-only
        batch = padded.shortened(inputs_B)
        width = batch.songs_BL.shape[1]
        songs = _replace_padding(batch.songs_BL.numpy(), windows.inputs)
        targets_by_horizon = {
            name: self._draw_targets(padded.songs_BL.numpy(), windows, horizon, np.random.default_rng(horizon_seed))
            for (name, horizon), horizon_seed in zip(self._model.horizons.items(), seeds, strict=True)
        }
        negatives, corrections = self._draw_negatives(np.random.default_rng(seed))
        averaged_songs = songs if self._model.input_table and self._model.averages else songs[:, :0]
        output_songs = [averaged_songs, *(targets for _, targets, _ in targets_by_horizon.values()), negatives]
        songs_by_table: dict[str, np.ndarray] = {}
        if self._model.input_table:
            songs_by_table[INPUT_TABLE], (input_rows,) = self._distinct_songs([songs])
            songs_by_table[SONG_TABLE], output_rows = self._distinct_songs(output_songs)
        else:
            songs_by_table[SONG_TABLE], (input_rows, *output_rows) = self._distinct_songs([songs, *output_songs])
        averaged_rows, *target_rows, negative_rows = output_rows
        target_counts = [int(exists.sum()) for _, _, exists in targets_by_horizon.values()]
        targets = self._merge_targets(
            targets_by_horizon, target_rows, negatives, songs.size, len(songs_by_table[SONG_TABLE])
        )
        return TrainingStep(
            number=number,
            seed=seed + self._share.rank,
            windows=windows,
            batch=replace(batch, songs_BL=torch.from_numpy(input_rows.reshape(songs.shape))),
            averaged_BL=torch.from_numpy(averaged_rows.reshape(averaged_songs.shape)),
            request_gap_BL=padded.gap_BL[:, 1 : width + 1].contiguous(),
            songs={name: torch.from_numpy(values) for name, values in songs_by_table.items()},
            targets=targets.weighed(np.array(target_counts)),
            scale_P=targets.horizons_PH @ self._scale_H,
            negatives=Negatives(
                song_rows_K=torch.from_numpy(negative_rows),
                weight_KH=torch.from_numpy(
                    np.stack([corrections + self._prior(name, negatives) for name in targets_by_horizon], 1)
                ),
            ),
            counts=target_counts,
        )

    def _distinct_songs(self, parts: Iterable[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the distinct songs of all parts, int64, grouped by their worker, and each part's positions in them."""
        flat_parts = [np.asarray(part, dtype=np.int64).ravel() for part in parts]
        workers, songs = self._share.workers, np.concatenate(flat_parts)
        rows_per_worker = -(-self._num_songs // workers)  # at most
        keys, positions = np.unique(songs % workers * rows_per_worker + songs // workers, return_inverse=True)
        return keys % rows_per_worker * workers + keys // rows_per_worker, np.split(
            positions.ravel(), np.cumsum(list(map(len, flat_parts)))[:-1]
        )

    def _prior(self, horizon: str, songs: np.ndarray) -> np.ndarray:
        """float32, of the shape of `songs`: the prior that is added to their logits on a horizon."""
        if horizon in self._priors:
            return np.asarray(self._priors[horizon][songs])
        return np.zeros(songs.shape, dtype=np.float32)

    def _draw_negatives(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the negative songs, int64 (K,), ascending, and corrections to add to their logits, float32 (K,)."""
        if self._config.objective == "softmax":
            return np.arange(self._num_songs), np.zeros(self._num_songs, dtype=np.float32)
        return self._sampler.draw(rng)

    def _draw_targets(
        self, songs_BL: np.ndarray, windows: Windows, horizon: AnyHorizon, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return positions (P,) with targets, flat in (B, L inputs), the target songs (P, T), and which exist (P, T).

        For a horizon of several offsets, or of days, T = `long_targets` targets are drawn for each position.
        """
        num_windows, longest = len(windows), max(1, int(windows.inputs.max(initial=0)))
        draws = 1 if horizon.choices == 1 else self._config.long_targets
        # Drawn for the whole batch, so that the targets of a window do not depend on the number of workers.
        draw_shape = (int(windows.places.max(initial=-1)) + 1, self._config.window, draws)
        exists = np.arange(longest)[:, None] < windows.inputs[:, None, None]
        if isinstance(horizon, DaysHorizon):
            first, count = _find_plays_in_days(windows, horizon, longest)
            target_positions = first[..., None] + (
                rng.random(draw_shape)[windows.places, :longest] * count[..., None]
            ).astype(int)
            exists = np.broadcast_to(exists & (count[..., None] > 0), target_positions.shape)
        else:
            offsets = rng.integers(horizon.min_offset, horizon.max_offset + 1, draw_shape)[windows.places, :longest]
            target_positions = np.arange(longest)[:, None] + offsets
            exists = exists & (target_positions < windows.plays.lengths[:, None, None])
        songs = np.take_along_axis(
            songs_BL, np.where(exists, target_positions, 0).reshape(num_windows, longest * draws), axis=1
        )
        songs, exists = songs.reshape(num_windows * longest, draws), exists.reshape(num_windows * longest, draws)
        positions = np.flatnonzero(exists.any(axis=1))
        songs, exists = songs[positions], exists[positions]
        # Momentum moves every song that is looked up, so a missing target is replaced by another one of its position.
        first = np.take_along_axis(songs, exists.argmax(axis=1)[:, None], axis=1)
        return positions, np.where(exists, songs, first), exists

    def _merge_targets(
        self,
        targets_by_horizon: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
        target_rows: list[np.ndarray],
        negatives: np.ndarray,
        num_inputs: int,
        num_songs: int,
    ) -> Targets:
        """Merge the targets of horizons, `num_inputs` positions each; those with most targets per position first."""
        max_targets = max(songs.shape[1] for _, songs, _ in targets_by_horizon.values())
        parts = []
        for index, ((name, (positions, songs, exists)), rows) in enumerate(
            zip(targets_by_horizon.items(), target_rows, strict=True)
        ):
            padding = ((0, 0), (0, max_targets - songs.shape[1]))
            is_horizon = np.zeros((len(positions), len(targets_by_horizon)))
            is_horizon[:, index] = 1
            values = (songs, rows.reshape(songs.shape), exists, self._prior(name, songs))
            padded = [np.pad(array, padding) for array in values]
            parts.append((-songs.shape[1], [index * num_inputs + positions, is_horizon, *padded]))
        parts.sort(key=lambda part: part[0])
        merged = [np.concatenate(arrays) for arrays in zip(*(arrays for _, arrays in parts), strict=True)]
        positions, horizons_PH, songs_PT, song_rows_PT, exists_PT, prior_PT = merged
        return Targets.of(
            positions=positions,
            horizons_PH=horizons_PH,
            songs_PT=songs_PT,
            song_rows_PT=song_rows_PT,
            exists_PT=exists_PT,
            negatives=negatives,
            prior_PT=prior_PT,
            weight_H=np.array([self._config.long_weight if name == "long" else 1.0 for name in targets_by_horizon]),
            count=num_songs,
        )


def _find_plays_in_days(windows: Windows, horizon: DaysHorizon, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (B, L) each: for each input, the position of the first play in the range, and the number of plays in it."""
    plays, shape = windows.plays, (len(windows), longest)
    first_positions, counts = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    rows, positions = np.nonzero(np.arange(longest) < windows.inputs[:, None])
    queries = Queries.before_plays(plays, plays.offsets[rows] + positions + 1)
    starts, ends = horizon.spans(plays, queries)
    first_positions[rows, positions], counts[rows, positions] = starts - plays.offsets[rows], ends - starts
    return first_positions, counts


def ahead(values: Iterator[T], depth: int = STEPS_AHEAD) -> Iterator[T]:
    """Yield `values` in order; a thread computes up to `depth` of them in advance, and its errors are raised here."""
    prepared: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def enqueue(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                prepared.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def prepare() -> None:
        try:
            for value in values:
                enqueue("value", value)
                if stopped.is_set():
                    return
            enqueue("end", None)
        except BaseException as error:
            enqueue("error", error)

    thread = threading.Thread(target=prepare, name="rayrec steps", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = prepared.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(STOP_SECONDS)


def _replace_padding(songs_BL: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Replace padding by the first song of the row, since momentum moves every song that is looked up."""
    is_input = np.arange(songs_BL.shape[1]) < inputs[:, None]
    return np.where(is_input, songs_BL, songs_BL[:, :1])


def _map_tensors(value: Any, transform: Callable[[Tensor], Tensor]) -> Any:
    """Apply `transform` to every tensor in `value`, except the lengths of batches, which packing needs on the CPU."""
    if isinstance(value, Tensor):
        return transform(value)
    if isinstance(value, dict):
        return {key: _map_tensors(element, transform) for key, element in value.items()}
    if isinstance(value, PlayBatch):
        return value.each(transform, value.length_B)
    if isinstance(value, TrainingStep | Targets | Negatives | RowRequests):
        return replace(
            value, **{item.name: _map_tensors(getattr(value, item.name), transform) for item in fields(value)}
        )
    return value


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The figures of one step, for this worker's share of the batch."""

    epoch: int
    step: int  # within the epoch, from 0
    plays: int  # number of input plays
    targets: int  # number of targets of all horizons
    loss: Tensor  # float32 (), on the device: this worker's part of the mean over targets, summed over horizons


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The state of a training: the weights and the states of the optimizers."""

    common: dict[str, Tensor]  # the same for all workers
    rows: Mapping[str, Tensor]  # with an entry for each row of the song tables that this worker keeps


class Training:
    """The training of one network. Call `epoch` with the batches of each epoch."""

    def __init__(
        self, model: TasteModel, config: TrainConfig, counts: np.ndarray, *, device: str, share: Share
    ) -> None:
        """`counts`, int (N,), are each song's plays in the fit range; negatives are drawn in proportion to them.

        The song tables of `model` hold only this worker's rows: worker r mod W keeps row r.
        """
        self.device = torch.device(device)
        self.bf16 = self.device.type == "cuda"  # products outside the cell in bfloat16; weights and sums stay float32
        self.model = model.to(self.device)
        if config.compiled:
            self.model.compile(dynamic=True)  # one compilation for windows of any length
        self.config = config
        self.share = share
        self.copies: torch.cuda.Stream | None = None  # stream that copies steps to the device
        if self.device.type == "cuda":
            self.copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._maker = StepMaker(model.config, config, counts, share)
        self._dense_names = [name for name, _ in model.named_parameters() if name not in TABLES]
        self._dense_parameters = [model.get_parameter(name) for name in self._dense_names]
        self.optimizer = torch.optim.Adam(self._dense_parameters, lr=config.learning_rate, fused=True)
        self._num_steps = 0  # steps taken so far
        weights = {name: value.detach() for name, value in model.named_parameters() if name in TABLES}
        self.tables: dict[str, SongTable] = {name: self._new_table(value) for name, value in weights.items()}
        self.exchange = RowExchange(share)
        self._decay = Decay(config.averaged_part)
        self._dense_averages = [value.detach().clone() for value in self._dense_parameters]

    def _new_table(self, rows_nD: Tensor) -> SongTable:
        config = self.config
        if config.song_table != "trained":
            return SongTable(rows_nD)
        return RowAdam(rows_nD, config.table_learning_rate, config.averaged_part)

    def averaged(self) -> TasteModel:
        """Return the network with its weights averaged over the last steps, for validation and saving.

        Without averaging, return the network itself. Its song tables hold this worker's rows.
        """
        if not self._decay.part:
            return self.model
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, value in zip(self._dense_names, self._dense_averages, strict=True):
                model.get_parameter(name).copy_(value)
            for name, table in self.tables.items():
                model.get_parameter(name).copy_(table.averaged())
        return model

    def is_finite(self) -> bool:
        """Return False if a weight that this worker updates is NaN or infinite."""
        dense = all(bool(value.isfinite().all()) for value in self._dense_parameters)
        return dense and all(table.is_finite() for table in self.tables.values())

    def state(self) -> TrainingState:
        """Return the state for a checkpoint, from which any number of workers can continue.

        Its rows are the tensors of the tables, not copies.
        """
        slots = self.optimizer.state_dict()["state"]
        common = {f"model/{name}": self.model.get_parameter(name).detach() for name in self._dense_names}
        common |= {f"optimizer/{index}/{key}": value for index, slot in slots.items() for key, value in slot.items()}
        common |= {f"average/{index}": value for index, value in enumerate(self._dense_averages)}
        common["decay"] = self._decay.state()
        common["taken"] = torch.tensor(self._num_steps)
        rows: dict[str, Tensor] = {}
        for name, table in self.tables.items():
            common_slots, row_slots = table.state()
            common |= {f"{name}/{key}": value for key, value in common_slots.items()}
            rows |= {f"{name}/{key}": value for key, value in row_slots.items()}
        return TrainingState(common=common, rows=rows)

    def load(self, state: TrainingState) -> None:
        """Restore what `state` returned."""
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _tensors_below("optimizer", state.common).items():
            number, _, key = name.partition("/")
            slots.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        with torch.no_grad():
            for name in self._dense_names:
                self.model.get_parameter(name).copy_(state.common[f"model/{name}"])
            for name, values in self.state().rows.items():
                values.copy_(state.rows[name])  # one tensor at a time is in memory twice
        for name, table in self.tables.items():
            table.load(_tensors_below(name, state.common))
        for index, average in enumerate(self._dense_averages):
            average.copy_(state.common[f"average/{index}"])
        self._decay.load(state.common["decay"])
        self._num_steps = int(state.common["taken"])

    def epoch(
        self, batches: Iterable[Windows], epoch: int, *, skip: int = 0, on_step: Callable[[StepReport], None]
    ) -> None:
        """Train for one epoch; the first `skip` batches are skipped, since their steps were already taken."""
        for report in self.steps(islice(batches, skip, None), epoch, first=skip):
            on_step(report)

    def steps(self, batches: Iterable[Windows], epoch: int, *, first: int = 0) -> Iterator[StepReport]:
        """Take a step on each batch, numbered from `first`, and yield its report; a thread prepares the next steps."""
        self.model.train()
        for step in self.prepared(batches, epoch, first=first):
            loss = self.take(step)
            yield StepReport(epoch=epoch, step=step.number, plays=step.plays, targets=sum(step.counts), loss=loss)

    def prepared(self, batches: Iterable[Windows], epoch: int, *, first: int = 0) -> Iterator[TrainingStep]:
        """Yield the steps for `take`; a thread prepares them and copies them to the device in advance."""
        return ahead(self._prepare_step(windows, epoch, number) for number, windows in enumerate(batches, start=first))

    def step(self, windows: Windows, epoch: int, number: int) -> Tensor:
        """Prepare and take a single step; return its loss, on the device."""
        return self.take(self._prepare_step(windows, epoch, number))

    def _prepare_step(self, windows: Windows, epoch: int, number: int) -> TrainingStep:
        step = self.exchange.agree(self._maker.make(windows, epoch, number), [*self.tables])
        return step.to(self.device, self.copies)

    def take(self, step: TrainingStep) -> Tensor:
        """Take an optimizer step on this worker's share of a batch; return its part of the mean loss, on the device."""
        torch.manual_seed(step.seed)
        self._set_learning_rates()
        step.await_copies()
        rows = {name: self.tables[name].look_up(songs, step.requests.get(name)) for name, songs in step.songs.items()}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self._loss(step, rows)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        self._add_up_gradients()
        self.optimizer.step()
        if self._decay.part:
            update_averages = get_ema_multi_avg_fn(self._decay.step())  # type: ignore[no-untyped-call]
            update_averages(self._dense_averages, [value.detach() for value in self._dense_parameters], None)
        for name, table in self.tables.items():
            table.step(step.songs[name], rows[name], step.requests.get(name))
        return loss.detach()

    def _set_learning_rates(self) -> None:
        """Set the learning rates of the next step."""
        self._num_steps += 1
        factor = self.config.scale * min(1.0, self._num_steps / max(1, self.config.warmup_steps))
        self.optimizer.param_groups[0]["lr"] = factor * self.config.learning_rate
        for table in self.tables.values():
            table.learning_rate = factor * self.config.table_learning_rate

    def _loss(self, step: TrainingStep, rows: dict[str, Tensor]) -> Tensor:
        """Return this worker's part of the sum over horizons of the mean loss over the targets of all workers."""
        if not sum(step.counts):  # this worker's share of the batch has no target
            return torch.zeros((), device=self.device)
        outputs_UD = unit(rows[SONG_TABLE] if self.model.map is None else self.model.map(rows[SONG_TABLE]))
        inputs_UD = unit(rows[INPUT_TABLE]) if INPUT_TABLE in rows else outputs_UD
        songs_BLD = nn.functional.embedding(step.batch.songs_BL, inputs_UD)
        averaged_BLD = nn.functional.embedding(step.averaged_BL, outputs_UD) if INPUT_TABLE in rows else songs_BLD
        tastes_by_horizon = self.model(step.batch, step.request_gap_BL, songs_BLD, averaged_BLD)
        targets = step.targets
        taste_vectors_PD = (
            torch.stack([*tastes_by_horizon.values()]).flatten(0, 2).index_select(0, targets.positions).float()
        )
        objective = OBJECTIVES[self.config.objective]
        return objective(outputs_UD.float(), taste_vectors_PD, targets, step.negatives, step.scale_P)

    def _add_up_gradients(self) -> None:
        """Sum the dense gradients over all workers and clip them."""
        # A weight on which no target depends has no gradient; zeros make the sum the same for any number of workers.
        gradients = [torch.zeros_like(value) if value.grad is None else value.grad for value in self._dense_parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.share.add_up(flat)
        flat.div_(torch.linalg.vector_norm(flat).div_(LARGEST_GRADIENT).clamp_(min=1.0))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for value, part in zip(self._dense_parameters, parts, strict=True):
            value.grad = part.view_as(value)


def _tensors_below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix` and a slash, by the rest of their names."""
    prefix += "/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
