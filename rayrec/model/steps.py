"""What a step learns from, prepared on the host: songs looked up, targets and negatives drawn, tensors padded.

Whatever has a size that depends on the data is decided here, so that a step on a device never waits for an answer
from it. Shapes: B windows, L plays, U songs of a step, P positions that have a target, T targets of a position,
K negatives, H horizons, W workers, R rows that one of them is asked for, V of these each once.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Queries
from rayrec.data.windows import Windows
from rayrec.model.features import PlayBatch, pad
from rayrec.model.network import INPUT_TABLE, SONG_TABLE
from rayrec.model.objectives import Negatives, NegativeSampler, Targets, log_prior
from rayrec.model.train_config import AnyHorizon, DaysHorizon, ModelConfig, TrainConfig
from rayrec.model.workers import Share

AHEAD = 2  # steps that are prepared while one runs
STOP_SECONDS = 5.0  # that a thread is waited for which may itself wait for another worker that failed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RowRequests:
    """What one step of all workers asks of a table."""

    sent: list[int]  # rows that this worker asks each for; U together
    received: list[int]  # rows that each asks this worker for; R together
    rows_R: Tensor  # int64, the places of those among this worker's rows
    rows_V: Tensor  # int64, the same each once, ascending
    places_R: Tensor  # int64, where each stands in rows_V


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One worker's share of a batch, ready for the device."""

    number: int  # within the epoch, from 0
    seed: int  # of what is random in the step itself: dropout
    windows: Windows  # that it was made of
    batch: PlayBatch  # the input plays; songs_BL holds rows of the songs that are looked up as inputs
    request_gap_BL: Tensor  # float32: to the next play, scaled
    songs: dict[str, Tensor]  # table -> int64 (U,), the songs looked up in it, each once, by worker that keeps the row
    targets: Targets  # each counts for one of those that its horizon has over all workers
    negatives: Negatives
    counts: list[int]  # targets of each horizon
    requests: dict[str, RowRequests] = field(default_factory=dict)  # table -> who asks whom; empty for one worker

    @property
    def plays(self) -> int:
        """Inputs."""
        return int(self.windows.inputs.sum())

    def to(self, device: torch.device) -> "TrainingStep":
        """The step on another device; the copies run while the device works on the step before."""
        if device.type == "cpu":
            return self
        moved: TrainingStep = _moved(self, lambda tensor: tensor.pin_memory().to(device, non_blocking=True))
        return moved


class StepMaker:
    """Prepares steps. What it draws is a function of seed, epoch and step, and of a window's place in its batch."""

    def __init__(self, model: ModelConfig, config: TrainConfig, counts: np.ndarray, share: Share) -> None:
        """`counts` int (N,) are each song's plays in the fit range; negatives are drawn by them."""
        self._model, self._config, self._share, self._num_songs = model, config, share, len(counts)
        self._sampler = NegativeSampler(counts, round(config.negatives * config.scale))
        self._priors: dict[str, np.ndarray] = {}  # by horizon, of those that have one
        if config.long_correction < 1:
            self._priors["long"] = log_prior(counts, config.long_correction)

    def make(self, windows: Windows, epoch: int, number: int) -> TrainingStep:
        """The step of this worker's share of a batch."""
        entropy = [self._config.seed, epoch, number]
        seed, *seeds = np.random.SeedSequence(entropy).generate_state(1 + len(self._model.horizons)).tolist()
        padded = pad(windows.plays, windows.previous_at, self._model.features)
        inputs_B = torch.tensor(windows.inputs)  # a copy: what comes from Arrow is read-only
        batch = padded.shortened(inputs_B)
        width = batch.songs_BL.shape[1]
        songs = _without_padding(batch.songs_BL.numpy(), windows.inputs)
        drawn = {
            name: self._targets(padded.songs_BL.numpy(), windows, horizon, np.random.default_rng(horizon_seed))
            for (name, horizon), horizon_seed in zip(self._model.horizons.items(), seeds, strict=True)
        }
        negatives, weights = self._negatives(np.random.default_rng(seed))
        outputs = [*(targets for _, targets, _ in drawn.values()), negatives]
        tables: dict[str, np.ndarray] = {}
        if self._model.input_table:
            tables[INPUT_TABLE], (places,) = self._distinct([songs])
            tables[SONG_TABLE], (*target_places, negative_places) = self._distinct(outputs)
        else:
            tables[SONG_TABLE], (places, *target_places, negative_places) = self._distinct([songs, *outputs])
        counts = [int(there.sum()) for _, _, there in drawn.values()]
        targets = self._as_targets(drawn, target_places, negatives, songs.size, len(tables[SONG_TABLE]))
        return TrainingStep(
            number=number,
            seed=seed + self._share.rank,
            windows=windows,
            batch=replace(batch, songs_BL=torch.from_numpy(places.reshape(songs.shape))),
            request_gap_BL=padded.gap_BL[:, 1 : width + 1],
            songs={name: torch.from_numpy(values) for name, values in tables.items()},
            targets=targets.weighed(np.array(counts)),
            negatives=Negatives(
                places_K=torch.from_numpy(negative_places),
                weight_KH=torch.from_numpy(np.stack([weights + self._prior(name, negatives) for name in drawn], 1)),
            ),
            counts=counts,
        )

    def _distinct(self, parts: Iterable[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """The songs in all parts, int64, each once, by worker that keeps the row, and each part's places among them."""
        flat = [np.asarray(part, dtype=np.int64).ravel() for part in parts]
        workers, songs = self._share.workers, np.concatenate(flat)
        rows = -(-self._num_songs // workers)  # of a worker at most
        keys, places = np.unique(songs % workers * rows + songs // workers, return_inverse=True)
        return keys % rows * workers + keys // rows, np.split(places.ravel(), np.cumsum(list(map(len, flat)))[:-1])

    def _prior(self, horizon: str, songs: np.ndarray) -> np.ndarray:
        """float32, of the shape of `songs`: added to their logits on a horizon."""
        if horizon in self._priors:
            return np.asarray(self._priors[horizon][songs])
        return np.zeros(songs.shape, dtype=np.float32)

    def _negatives(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Songs, int64 (K,), ascending, and what is added to their logits, float32 (K,)."""
        if self._config.objective == "softmax":
            return np.arange(self._num_songs), np.zeros(self._num_songs, dtype=np.float32)
        return self._sampler.draw(rng)

    def _targets(
        self, songs_BL: np.ndarray, windows: Windows, horizon: AnyHorizon, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat positions (P,) in (B, L inputs) with a target, target songs (P, T), and bool (P, T): which are there.

        A horizon of several offsets, or of days, draws T = `long_targets` of them for each position.
        """
        rows, longest = len(windows), max(1, int(windows.inputs.max(initial=0)))
        draws = 1 if horizon.is_single else self._config.long_targets
        # Drawn for the whole batch, whatever the number of workers, so that a window's targets do not depend on it.
        drawn = (int(windows.places.max(initial=-1)) + 1, self._config.window, draws)
        there = np.arange(longest)[:, None] < windows.inputs[:, None, None]
        if isinstance(horizon, DaysHorizon):
            first, count = _in_days(windows, horizon, longest)
            target = first[..., None] + (rng.random(drawn)[windows.places, :longest] * count[..., None]).astype(int)
            there = np.broadcast_to(there & (count[..., None] > 0), target.shape)
        else:
            offsets = rng.integers(horizon.min_offset, horizon.max_offset + 1, drawn)[windows.places, :longest]
            target = np.arange(longest)[:, None] + offsets
            there = there & (target < windows.plays.lengths[:, None, None])
        songs = np.take_along_axis(songs_BL, np.where(there, target, 0).reshape(rows, longest * draws), axis=1)
        songs, there = songs.reshape(rows * longest, draws), there.reshape(rows * longest, draws)
        positions = np.flatnonzero(there.any(axis=1))
        songs, there = songs[positions], there[positions]
        # A song that is looked up is moved on by its momentum: what is not there names a target of its own position.
        first = np.take_along_axis(songs, there.argmax(axis=1)[:, None], axis=1)
        return positions, np.where(there, songs, first), there

    def _as_targets(
        self,
        drawn: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
        places: list[np.ndarray],
        negatives: np.ndarray,
        inputs: int,
        count: int,
    ) -> Targets:
        """Those of all horizons, of `inputs` positions each; first the horizon with the most targets of a position."""
        most = max(songs.shape[1] for _, songs, _ in drawn.values())
        parts = []
        for number, ((name, (positions, songs, there)), found) in enumerate(zip(drawn.items(), places, strict=True)):
            filled = ((0, 0), (0, most - songs.shape[1]))
            horizon = np.zeros((len(positions), len(drawn)))
            horizon[:, number] = 1
            values = (songs, found.reshape(songs.shape), there, self._prior(name, songs))
            padded = [np.pad(each, filled) for each in values]
            parts.append((-songs.shape[1], [number * inputs + positions, horizon, *padded]))
        parts.sort(key=lambda part: part[0])
        joined = [np.concatenate(arrays) for arrays in zip(*(arrays for _, arrays in parts), strict=True)]
        positions, horizons_PH, songs_PT, places_PT, there_PT, prior_PT = joined
        return Targets.of(
            positions=positions,
            horizons_PH=horizons_PH,
            songs_PT=songs_PT,
            places_PT=places_PT,
            there_PT=there_PT,
            negatives=negatives,
            prior_PT=prior_PT,
            count=count,
        )


def _in_days(windows: Windows, horizon: DaysHorizon, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (B, L) each: for each input the place in its window of the first play in the range, and how many are."""
    plays, shape = windows.plays, (len(windows), longest)
    first, count = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    rows, places = np.nonzero(np.arange(longest) < windows.inputs[:, None])
    queries = Queries.before_plays(plays, plays.offsets[rows] + places + 1)
    begin, end = horizon.spans(plays, queries)
    first[rows, places], count[rows, places] = begin - plays.offsets[rows], end - begin
    return first, count


def ahead(values: Iterator[T], depth: int = AHEAD) -> Iterator[T]:
    """The same values in their order, made by a thread up to `depth` of them early; its error is raised here."""
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                made.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for value in values:
                put("value", value)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="rayrec steps", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join(STOP_SECONDS)


def _without_padding(songs_BL: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The songs with the row's first one where padded: a song that is looked up is moved on by its momentum."""
    inside = np.arange(songs_BL.shape[1]) < inputs[:, None]
    return np.where(inside, songs_BL, songs_BL[:, :1])


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor moved, lengths of batches excepted, which packing wants on the CPU."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: _moved(item, move) for key, item in value.items()}
    if isinstance(value, PlayBatch):
        return value.each(move, value.length_B)
    if isinstance(value, TrainingStep | Targets | Negatives | RowRequests):
        return replace(value, **{each.name: _moved(getattr(value, each.name), move) for each in fields(value)})
    return value
