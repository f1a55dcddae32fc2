"""The cost of a step at the default settings: operations, large operations, bytes, and reads by the host."""

from typing import Any

import numpy as np
import pytest
import torch
from networks import NUM_SONGS, MemoryHost, cycling_histories, model_config
from torch import Tensor, nn
from wires import WORKERS, Wire
from worlds import random_vectors

from rayrec.bench.device_bench import ByteCounter
from rayrec.compat import observed_operations
from rayrec.data.histories import Histories
from rayrec.data.windows import cut_windows
from rayrec.model import objectives
from rayrec.model.epochs import Fit, FitData, Phase
from rayrec.model.network import TasteModel
from rayrec.model.song_tables import Share
from rayrec.model.train_config import FeatureSpec, TrainConfig
from rayrec.model.training import StepMaker, StepReport, Training

SONGS, DIM = 5_000, 64
LARGE_ELEMENTS = 1_000_000  # elements
MAX_OPERATIONS, MAX_LARGE_OPERATIONS = 150, 15  # without the recurrent cell, whose steps cuDNN runs as one
MAX_BYTES = 1e9  # read and written by these operations in float32, if none are fused
READ_OPERATIONS = ("_local_scalar_dense", "nonzero")  # operations that the host waits for
FREE_OPERATIONS = ("detach", "empty", "profiler")  # start nothing on a device: views, allocations, marks in a profile


class Counter:
    """Counts the operations that reach a device; views and allocations are free."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.large: list[str] = []

    @property
    def reads(self) -> int:
        """The number of operations that the host waited for."""
        return sum(any(read in name for read in READ_OPERATIONS) for name in self.names)

    def add(self, operation: str, tensors: list[Tensor]) -> None:
        """Count one operation, as `observed_operations` gives it."""
        if not any(name in operation for name in FREE_OPERATIONS):
            self.names.append(operation)
            if max((tensor.numel() for tensor in tensors), default=0) > LARGE_ELEMENTS:
                self.large.append(operation)


class OneProduct(nn.Module):
    """One matrix product that replaces the recurrent cell, which is outside of the budget."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, hidden)

    def forward(self, steps: Tensor) -> tuple[Tensor, None]:
        return self.linear(steps), None


def test_a_step_at_the_default_settings_keeps_its_budget_and_reads_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(objectives.CHUNK_LOGITS, "cpu", objectives.CHUNK_LOGITS["cuda"])  # as many chunks as on CUDA
    torch.set_num_threads(1)
    config = TrainConfig()
    random = np.random.default_rng(0)
    plays = (config.batch, config.window + config.lookahead)
    histories = Histories.from_lists(
        [*random.integers(0, SONGS, size=plays)],
        [np.arange(plays[1]) * 180_000] * config.batch,  # type: ignore[list-item]
    )
    windows = cut_windows(histories, config.window, config.lookahead)
    full_windows = windows.take(np.flatnonzero(windows.inputs == config.window)[: config.batch])
    assert int(full_windows.inputs.sum()) == config.batch * config.window
    shape = config.network_shape(
        num_songs=SONGS, embedding_dim=DIM, features=FeatureSpec(pause_hours=config.pause_hours)
    )
    model = TasteModel(shape, torch.from_numpy(random_vectors(SONGS, DIM)))
    model.rnn = OneProduct(DIM + shape.features.dim, config.hidden_dim)  # type: ignore[assignment]
    counts = np.bincount(histories.songs, minlength=SONGS)
    training = Training(model, config, counts, device="cpu", share=Share())
    model.train()
    maker = StepMaker(shape, config, counts, Share())
    first_step, second_step = (maker.make(full_windows, 0, number) for number in range(2))
    training.take(first_step)  # the optimizers allocate their moments in the first step
    counter, byte_counter = Counter(), ByteCounter()
    with observed_operations(counter.add), observed_operations(byte_counter.add):
        training.take(second_step)
    assert counter.reads == 0
    assert len(counter.names) <= MAX_OPERATIONS, sorted(counter.names)
    assert len(counter.large) <= MAX_LARGE_OPERATIONS, sorted(counter.large)
    assert byte_counter.total <= MAX_BYTES
    assert len(counter.names) > 0.9 * MAX_OPERATIONS, "the budget can be lowered"
    assert byte_counter.total > 0.9 * MAX_BYTES, "the budget can be lowered"


class ReadsByStep(MemoryHost):
    """Records after each step how many operations the host has waited for so far."""

    def __init__(self, counter: Counter, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._counter = counter
        self.reads: list[int] = []

    def stepped(self, phase: Phase, report: StepReport, loss: float) -> None:
        self.reads.append(self._counter.reads)


@pytest.mark.parametrize("workers", [1, WORKERS])
def test_a_fit_reads_from_the_device_only_at_every_50th_step(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host reads the losses, and with several workers also the sums by which they agree on the losses."""
    torch.set_num_threads(1)
    if workers > 1:
        Wire(monkeypatch)
    config = TrainConfig(hidden_dim=8, window=12, batch=8, negatives=20, long=(2, 5), epochs=1)
    plays: dict[Phase, Histories] = {"final": cycling_histories(480)}
    counts = np.bincount(plays["final"].songs, minlength=NUM_SONGS)
    data: dict[Phase, FitData] = {"final": FitData(vectors=random_vectors(NUM_SONGS), counts=counts)}
    share = Share(workers=workers)
    counter = Counter()
    with observed_operations(counter.add):
        host = ReadsByStep(counter, plays, config, share=share)
        fit = Fit(model_config(config), config, data, host, validation=None, share=share)
        reads_before = counter.reads
        fit.run()
    assert len(host.reads) > 100
    reads_per_step = np.diff([reads_before, *host.reads])
    assert np.flatnonzero(reads_per_step).tolist() == list(range(0, len(host.reads), 50))
    assert reads_per_step.max() <= (1 if workers == 1 else 4)
