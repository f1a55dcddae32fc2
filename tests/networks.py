"""Small taste networks, plays that they can learn, and a host that runs a fit in memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from worlds import random_vectors

from rayrec.data.histories import Histories
from rayrec.data.windows import Windows, batches_in_memory, cut_windows
from rayrec.model.epochs import FitProgress, Phase
from rayrec.model.network import TABLES, TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import (
    AnyHorizon,
    Cell,
    FeatureSpec,
    Horizon,
    ModelConfig,
    SongTable,
    TrainConfig,
    logit_scale,
)
from rayrec.model.training import StepReport, Training

MINUTE = 60_000
NUM_SONGS = 60


def model_config(
    config: TrainConfig | None = None,
    *,
    num_songs: int = NUM_SONGS,
    layers: int = 1,
    cell: Cell = "gru",
    features: FeatureSpec | None = None,
    song_table: SongTable = "frozen",
    averages: tuple[float, ...] = (0.0, 0.5, 1.0),
    input_table: bool = False,
) -> ModelConfig:
    """Return the model configuration for `config`, or one of a small network."""
    horizons: dict[str, AnyHorizon] = {
        "short": Horizon(min_offset=1, max_offset=1),
        "long": Horizon(min_offset=2, max_offset=4),
    }
    horizons = config.horizons if config else horizons
    return ModelConfig(
        num_songs=num_songs,
        embedding_dim=8,
        hidden_dim=config.hidden_dim if config else 12,
        num_layers=config.num_layers if config else layers,
        cell=config.cell if config else cell,
        dropout=config.dropout if config else 0.0,
        features=features or FeatureSpec(pause_hours=0.1),
        horizons=horizons,
        logit_scales={name: logit_scale(num_songs, horizon) for name, horizon in horizons.items()},
        song_table=config.song_table if config else song_table,
        averages=config.averages if config else averages,
        input_table=config.has_input_table if config else input_table,
    )


def network(config: ModelConfig | None = None, seed: int = 0) -> TasteModel:
    """Return an untrained network, ready for inference."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = config or model_config()
    return TasteModel(config, torch.from_numpy(random_vectors(config.num_songs, config.embedding_dim))).eval()


def with_other_inputs(model: TasteModel) -> TasteModel:
    """Put other vectors into the separate input table of a network, if it has one; return the network."""
    if model.inputs is not None:
        with torch.no_grad():
            model.inputs.weight.copy_(torch.from_numpy(random_vectors(*model.inputs.weight.shape, seed=9)))
    return model


def trained_network(histories: Histories, num_songs: int, *, epochs: int = 3, seed: int = 0) -> TasteModel:
    """Return a small network trained on all plays of `histories`, ready for inference."""
    config = TrainConfig(
        hidden_dim=16, window=30, batch=16, negatives=40, long=(2, 4), learning_rate=0.01, dropout=0.0, seed=seed
    )
    model = network(model_config(config, num_songs=num_songs), seed)
    counts = np.bincount(histories.songs, minlength=num_songs)
    training = Training(model, config, counts, device="cpu", share=Share())
    host = MemoryHost({"final": histories}, config)
    for epoch in range(epochs):
        training.epoch(host.windows("final", epoch), epoch, on_step=lambda _: None)
    return model.eval()


def part_of(model: TasteModel, share: Share) -> TasteModel:
    """Return a worker's copy of a network, whose tables hold only the rows of this worker."""
    tables = [share.own(model.get_parameter(name).detach()) for name in TABLES if name in model.state_dict()]
    part = TasteModel(replace(model.config, num_songs=len(tables[0])), *tables)
    dense = {name: value for name, value in model.state_dict().items() if name not in TABLES}
    part.load_state_dict({**part.state_dict(), **dense})
    return part


def jumping_histories(users: int, num_songs: int, *, shortest: int = 20, longest: int = 60) -> Histories:
    """Users who play song n + 1 one minute after song n, or in one of eight cases any song one hour later."""
    random = np.random.default_rng(6)
    songs, played_at = [], []
    for length in random.integers(shortest, longest + 1, size=users):
        jumps = random.random(length) < 1 / 8
        steps = np.where(jumps, random.integers(0, num_songs, length), 1)
        songs.append(np.cumsum(steps) % num_songs)
        played_at.append(np.cumsum(np.where(jumps, 60, 1)) * MINUTE)
    return Histories.from_lists(songs, played_at, [f"user-{row}" for row in range(users)])  # type: ignore[arg-type]


def cycling_histories(users: int, *, num_songs: int = NUM_SONGS, shortest: int = 10, longest: int = 30) -> Histories:
    """Users who start at any song and play its successor each minute: song n is followed by n + 1."""
    random = np.random.default_rng(4)
    lengths = random.integers(shortest, longest + 1, size=users)
    starts = random.integers(0, num_songs, size=users)
    return Histories.from_lists(
        songs=[(start + np.arange(n)) % num_songs for start, n in zip(starts, lengths, strict=True)],  # type: ignore[misc]
        played_at=[np.arange(n) * MINUTE for n in lengths],  # type: ignore[misc]
    )


class Crash(Exception):  # noqa: N818
    """Raised by a host to simulate a crash."""


class MemoryHost:
    """Host of a fit: cuts windows from the histories of each phase, and records steps and checkpoints."""

    def __init__(
        self,
        plays: dict[Phase, Histories],
        config: TrainConfig,
        folder: Path | None = None,
        *,
        share: Share | None = None,
        crash_after: tuple[Phase, int] | None = None,
    ) -> None:
        """With `crash_after` = (phase, n), the host crashes after step n of the phase, counted over all epochs."""
        self._plays, self._config, self._folder = plays, config, folder
        self._share, self._crash_after = share or Share(), crash_after
        self.reports: list[tuple[Phase, StepReport]] = []
        self.checkpoints: list[Path] = []
        self.best: dict[str, torch.Tensor] | None = None

    def windows(self, phase: Phase, epoch: int) -> Iterator[Windows]:
        """This worker's share of the batches of an epoch."""
        config = self._config
        windows = cut_windows(self._plays[phase], config.window, config.lookahead)
        rng = np.random.default_rng([config.seed, epoch])
        for batch in batches_in_memory(windows, config.batch, rng):
            yield batch.take(np.arange(self._share.rank, len(batch), self._share.workers))

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        """Record the step; crash after the step of `crash_after`."""
        self.reports.append((phase, report))
        steps_taken = sum(step_phase == phase for step_phase, _ in self.reports)
        if self._crash_after == (phase, steps_taken):
            raise Crash

    def selected(self, model: TasteModel, known: np.ndarray) -> None:
        """Keep a copy of the best network of the selection phase."""
        self.best = {name: value.clone() for name, value in model.state_dict().items()}

    def checkpoint(self, progress: FitProgress, save: Callable[[Path], None]) -> bool:
        """Save a checkpoint in a folder of its own; return False if the host has no folder."""
        if self._folder is not None:
            target = self._folder / str(len(self.checkpoints))
            target.mkdir(parents=True, exist_ok=True)
            save(target)
            self.checkpoints.append(target)
        return self._folder is not None
