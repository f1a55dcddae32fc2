"""What a step learns from, prepared on the host: songs looked up, targets and negatives drawn, tensors padded.

Whatever has a size that depends on the data is decided here, so that a step on a device never waits for an answer
from it. Shapes: B windows, L plays, U songs of a step, P positions that have a target, T targets of a position,
K negatives.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from rayrec.data.windows import Windows
from rayrec.model.features import PlayBatch, pad
from rayrec.model.network import INPUT_TABLE, SONG_TABLE
from rayrec.model.objectives import Negatives, NegativeSampler, Targets, log_prior
from rayrec.model.train_config import Horizon, ModelConfig, TrainConfig
from rayrec.model.workers import Share

AHEAD = 2  # steps that are prepared while one runs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One worker's share of a batch, ready for the device."""

    number: int  # within the epoch, from 0
    seed: int  # of what is random in the step itself: dropout
    windows: Windows  # that it was made of
    batch: PlayBatch  # the input plays; songs_BL holds rows of the songs that are looked up as inputs
    request_gap_BL: Tensor  # float32: to the next play, scaled
    songs: dict[str, Tensor]  # table -> int64 (U,), the songs looked up in it, each once
    targets: dict[str, Targets]  # by horizon
    negatives: dict[str, Negatives]  # by horizon

    @property
    def plays(self) -> int:
        """Inputs."""
        return int(self.windows.inputs.sum())

    @property
    def counts(self) -> list[int]:
        """Targets of each horizon."""
        return [targets.count for targets in self.targets.values()]

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
        self._sampler = NegativeSampler(counts, config.negatives)
        self._priors: dict[str, np.ndarray] = {}  # by horizon, of those that have one
        if config.long_correction < 1:
            self._priors["long"] = log_prior(counts, config.long_correction)

    def make(self, windows: Windows, epoch: int, number: int) -> TrainingStep:
        """The step of this worker's share of a batch."""
        entropy = [self._config.seed, epoch, number]
        seed, *seeds = np.random.SeedSequence(entropy).generate_state(1 + len(self._model.horizons)).tolist()
        padded = pad(windows.plays, windows.previous_at, self._model.features)
        inputs_B = torch.tensor(windows.inputs)  # a copy: the array may be read-only
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
            tables[INPUT_TABLE], (places,) = _distinct([songs])
            tables[SONG_TABLE], (*target_places, negative_places) = _distinct(outputs)
        else:
            tables[SONG_TABLE], (places, *target_places, negative_places) = _distinct([songs, *outputs])
        return TrainingStep(
            number=number,
            seed=seed + self._share.rank,
            windows=windows,
            batch=replace(batch, songs_BL=torch.from_numpy(places.reshape(songs.shape))),
            request_gap_BL=padded.gap_BL[:, 1 : width + 1],
            songs={name: torch.from_numpy(values) for name, values in tables.items()},
            targets={
                name: self._as_targets(name, positions, targets, there, found, negatives)
                for (name, (positions, targets, there)), found in zip(drawn.items(), target_places, strict=True)
            },
            negatives={
                name: Negatives(
                    places_K=torch.from_numpy(negative_places),
                    weight_K=torch.from_numpy(weights + self._prior(name)[negatives]),
                )
                for name in drawn
            },
        )

    def _prior(self, horizon: str) -> np.ndarray:
        """float32 (N,): added to the logits of a horizon."""
        return self._priors.get(horizon, np.zeros(self._num_songs, dtype=np.float32))

    def _negatives(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Songs, int64 (K,), ascending, and what is added to their logits, float32 (K,)."""
        if self._config.objective == "softmax":
            return np.arange(self._num_songs), np.zeros(self._num_songs, dtype=np.float32)
        return self._sampler.draw(rng)

    def _targets(
        self, songs_BL: np.ndarray, windows: Windows, horizon: Horizon, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat positions (P,) in (B, L inputs) with a target, target songs (P, T), and bool (P, T): which are there.

        A horizon of several offsets draws T = `long_targets` of them for each position.
        """
        rows, longest = len(windows), max(1, int(windows.inputs.max()))
        draws = 1 if horizon.min_offset == horizon.max_offset else self._config.long_targets
        # Drawn for the whole batch, whatever the number of workers, so that a window's targets do not depend on it.
        total = (rows + 1) * self._share.workers
        offsets = rng.integers(horizon.min_offset, horizon.max_offset + 1, (total, self._config.window, draws))
        offsets = offsets[self._share.rank :: self._share.workers][:rows, :longest]
        target = np.arange(longest)[:, None] + offsets
        there = np.arange(longest)[:, None] < windows.inputs[:, None, None]
        there = there & (target < windows.plays.lengths[:, None, None])
        songs = np.take_along_axis(songs_BL, np.where(there, target, 0).reshape(rows, -1), axis=1)
        songs, there = songs.reshape(rows * longest, draws), there.reshape(rows * longest, draws)
        positions = np.flatnonzero(there.any(axis=1))
        songs, there = songs[positions], there[positions]
        # A song that is looked up is moved on by its momentum: what is not there names a target of its own position.
        first = np.take_along_axis(songs, there.argmax(axis=1)[:, None], axis=1)
        return positions, np.where(there, songs, first), there

    def _as_targets(
        self,
        horizon: str,
        positions: np.ndarray,
        songs: np.ndarray,
        there: np.ndarray,
        places: np.ndarray,
        negatives: np.ndarray,
    ) -> Targets:
        among = np.minimum(np.searchsorted(negatives, songs), len(negatives) - 1)
        hits = np.where(there & (negatives[among] == songs), among, len(negatives))
        same = (songs[:, :, None] == songs[:, None, :]) & there[:, None, :]
        return Targets(
            positions=torch.from_numpy(positions),
            places_PT=torch.from_numpy(places.reshape(songs.shape)),
            there_PT=torch.from_numpy(there),
            first_PT=torch.from_numpy(there & ~np.tril(same, -1).any(axis=-1)),
            hits_PT=torch.from_numpy(hits),
            prior_PT=torch.from_numpy(self._prior(horizon)[songs]),
            count=int(there.sum()),
        )


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
        thread.join()


def _distinct(parts: Iterable[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The songs in all parts, int64, each once and ascending, and each part's places among them."""
    flat = [np.asarray(part, dtype=np.int64).ravel() for part in parts]
    songs, places = np.unique(np.concatenate(flat), return_inverse=True)
    return songs, np.split(places.ravel(), np.cumsum([len(part) for part in flat])[:-1])


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
    if isinstance(value, TrainingStep | Targets | Negatives):
        return replace(value, **{each.name: _moved(getattr(value, each.name), move) for each in fields(value)})
    return value
