"""The training loop: equal seeds give equal losses, targets lie in their range, several processes equal one."""

import os
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from networks import NUM_SONGS, MemoryHost, cycling_histories, model_config, network, part_of
from torch import Tensor

from rayrec.data.histories import Histories
from rayrec.data.windows import Windows, cut_windows
from rayrec.model.checkpoint import load_training, save_training
from rayrec.model.network import TABLES
from rayrec.model.song_tables import Share
from rayrec.model.train_config import Cell, Objective, SongTable, TrainConfig
from rayrec.model.training import StepMaker, StepReport, Training, ahead

COUNTS = np.full(NUM_SONGS, 10)
HOUR, DAY = 3_600_000, 24 * 3_600_000
SMALL_SETTINGS = {
    "hidden_dim": 12,
    "window": 12,
    "batch": 10,
    "negatives": 20,
    "long": (2, 5),
    "learning_rate": 0.01,
    "dropout": 0.0,
}


def settings(**changes: object) -> TrainConfig:
    return TrainConfig(**{**SMALL_SETTINGS, **changes})


def training(config: TrainConfig, share: Share | None = None) -> Training:
    share = share or Share()
    model = part_of(network(model_config(config)), share)
    return Training(model, config, COUNTS, device="cpu", share=share)


def losses(config: TrainConfig, histories: Histories, epochs: int = 1) -> list[float]:
    """The loss of every step of a new training."""
    reports: list[StepReport] = []
    trainer, host = training(config), MemoryHost({"final": histories}, config)
    for epoch in range(epochs):
        trainer.epoch(host.windows("final", epoch), epoch, on_step=reports.append)
    return [float(report.loss) for report in reports]


@pytest.fixture(scope="module")
def histories() -> Histories:
    return cycling_histories(45)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3, "num_layers": 2}, {"song_table": "frozen"}])
def test_the_same_seed_gives_the_same_losses_bit_for_bit(histories: Histories, changes: dict[str, object]) -> None:
    first = losses(settings(**changes), histories)
    torch.rand(7)  # draws of other code in between must not matter
    assert losses(settings(**changes), histories) == first
    assert losses(settings(seed=1, **changes), histories) != first


@pytest.mark.parametrize(
    ("objective", "table"),
    [
        ("sampled-softmax", "trained"),
        ("sampled-softmax", "frozen"),
        ("softmax", "trained"),
        ("cosine", "frozen"),
        ("l2", "frozen"),
    ],
)
def test_the_loss_falls_on_plays_that_can_be_learned(
    histories: Histories, objective: Objective, table: SongTable
) -> None:
    step_losses = losses(settings(objective=objective, song_table=table), histories, epochs=8)
    steps = len(step_losses) // 8
    # an L2 distance falls only as the square root of a cosine distance
    max_ratio = 0.9 if objective == "l2" else 0.8
    assert np.mean(step_losses[-steps:]) < max_ratio * np.mean(step_losses[:steps])


def test_a_frozen_table_stays_and_a_trained_one_moves(histories: Histories) -> None:
    for table in ("frozen", "trained"):
        config = settings(song_table=table)
        trainer = training(config)
        weight_before = trainer.model.songs.weight.detach().clone()
        trainer.epoch(MemoryHost({"final": histories}, config).windows("final", 0), 0, on_step=lambda _: None)
        assert torch.equal(trainer.model.songs.weight.detach(), weight_before) is (table == "frozen")


def test_steps_that_were_already_taken_are_skipped(histories: Histories) -> None:
    config, reports = settings(), list[StepReport]()
    host = MemoryHost({"final": histories}, config)
    training(config).epoch(host.windows("final", 0), 0, skip=3, on_step=reports.append)
    steps = len(list(host.windows("final", 0)))
    assert [report.step for report in reports] == list(range(3, steps))


def test_learning_rates_rise_over_the_first_steps_and_stay(histories: Histories) -> None:
    config = settings(warmup_steps=4, learning_rate=0.02, table_learning_rate=0.01)
    trainer, rates = training(config), list[tuple[float, float]]()
    weights_before = torch.cat([value.detach().flatten() for value in trainer.model.heads.parameters()])

    def record_rates(report: StepReport) -> None:
        rates.append((trainer.optimizer.param_groups[0]["lr"], trainer.tables["songs.weight"].learning_rate))
        if report.step == 0:  # Adam's first step moves a weight by the learning rate, whatever its gradient
            weights_after = torch.cat([value.detach().flatten() for value in trainer.model.heads.parameters()])
            assert float((weights_after - weights_before).abs().max()) == pytest.approx(0.02 / 4, rel=1e-3)

    trainer.epoch(MemoryHost({"final": histories}, config).windows("final", 0), 0, on_step=record_rates)
    factors = [0.25, 0.5, 0.75, *[1.0] * (len(rates) - 3)]
    assert rates == [(0.02 * factor, 0.01 * factor) for factor in factors]
    assert len(rates) > 5


def test_a_resumed_training_goes_on_within_the_warm_up(histories: Histories) -> None:
    config = settings(warmup_steps=12, averaged_part=0.0)
    host, undisturbed = MemoryHost({"final": histories}, config), training(config)
    undisturbed.epoch(host.windows("final", 0), 0, on_step=lambda _: None)
    interrupted, resumed = training(config), training(config)
    batches = list(host.windows("final", 0))
    interrupted.epoch(batches[:5], 0, on_step=lambda _: None)
    resumed.load(interrupted.state())
    resumed.epoch(batches, 0, skip=5, on_step=lambda _: None)
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * min(1, len(batches) / 12))
    for name, value in undisturbed.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=0, rtol=0, msg=name)


def test_with_four_times_the_usual_batch_rates_and_negatives_are_doubled(histories: Histories) -> None:
    scaled = settings(batch=256, scale_with_batch=True)
    doubled = settings(batch=256, negatives=40, learning_rate=0.02, table_learning_rate=0.006)
    assert losses(scaled, histories, 3) == losses(doubled, histories, 3) != losses(settings(batch=256), histories, 3)


def targets_of(
    windows: Windows, config: TrainConfig, horizon: str, seed: int, share: Share | None = None
) -> np.ndarray:
    """int64 (W, L, T): the target songs of each input play, -1 where it has none."""
    num_songs = int(windows.plays.songs.max()) + 1
    maker = StepMaker(model_config(config), config.replace(seed=seed), np.ones(num_songs), share or Share())
    step = maker.make(windows, 0, 0)
    number, targets = [*config.horizons].index(horizon), step.targets
    rows = targets.horizons_PH[:, number].numpy() > 0
    target_songs = step.songs["songs.weight"].numpy()[targets.song_rows_PT.numpy()[rows]]
    longest = int(windows.inputs.max())
    draws = 1 if config.horizons[horizon].choices == 1 else config.long_targets
    grid = np.full((len(windows) * longest, draws), -1)
    positions = targets.positions.numpy()[rows] - number * len(grid)
    grid[positions] = np.where(targets.weight_PT.numpy()[rows] > 0, target_songs, -1)[:, :draws]
    return grid.reshape(len(windows), longest, -1)


def with_numbered_songs(histories: Histories) -> Histories:
    """`histories` with song n at the n-th play of all users together, so that a song shows its position."""
    return Histories(
        user_ids=histories.user_ids,
        offsets=histories.offsets,
        songs=np.arange(histories.num_plays, dtype=np.int32),
        played_at=histories.played_at,
    )


@pytest.mark.parametrize("bounds", [(1, 1), (2, 5), (4, 4), (30, 40)])
def test_targets_lie_between_the_offsets_and_never_past_the_history(
    histories: Histories, bounds: tuple[int, int]
) -> None:
    config = settings(long=bounds)
    windows = cut_windows(with_numbered_songs(histories), config.window, config.lookahead)
    targets = targets_of(windows, config, "long", seed=5)
    assert targets.shape[2] == (1 if bounds[0] == bounds[1] else config.long_targets)
    position = np.arange(targets.shape[1])[:, None]
    input_plays = windows.plays.songs[windows.plays.offsets[:-1]][:, None, None] + position
    is_input = np.broadcast_to(position < windows.inputs[:, None, None], targets.shape)
    history_ends = histories.offsets[np.searchsorted(histories.offsets, input_plays[:, 0, 0], side="right")][
        :, None, None
    ]
    has_target = targets >= 0
    offset = targets - input_plays
    assert ((offset[has_target] >= bounds[0]) & (offset[has_target] <= bounds[1])).all()
    assert (targets < history_ends).all()
    assert not has_target[~is_input].any()
    assert has_target[
        is_input & (input_plays + bounds[1] < history_ends)
    ].all()  # positions where no draw can lie past the end
    if bounds == (2, 5):
        assert set(offset[has_target].tolist()) == {2, 3, 4, 5}


def spread_over_days(histories: Histories, seed: int = 0) -> Histories:
    """`histories` with the plays spread over some days, several of them at the same moment."""
    gaps = np.random.default_rng(seed).choice([0, HOUR, 7 * HOUR, 30 * HOUR], size=histories.num_plays)
    played_at = np.cumsum(gaps)
    return replace(histories, played_at=played_at - played_at[histories.offsets[:-1]][histories.rows])


def plays_in_range(histories: Histories, play: int, days: tuple[int, int]) -> list[int]:
    """The plays within `days` of the play after `play`, among the user's next 500 plays, by a plain loop."""
    end = int(histories.offsets[np.searchsorted(histories.offsets, play, side="right")])
    times = histories.played_at
    return [
        later
        for later in range(play + 1, min(end, play + 501))
        if times[play + 1] + days[0] * DAY <= times[later] < times[play + 1] + days[1] * DAY
    ]


@pytest.mark.parametrize("days", [(0, 1), (1, 3), (2, 4), (40, 50)])
def test_targets_in_days_are_the_plays_in_the_range_and_a_position_without_any_has_none(
    histories: Histories, days: tuple[int, int]
) -> None:
    config = settings(long_days=days)
    plays = spread_over_days(with_numbered_songs(histories))
    windows = cut_windows(plays, config.window, config.lookahead)
    targets_by_play: dict[int, set[int]] = {}
    for seed in range(12):
        targets = targets_of(windows, config, "long", seed)
        assert targets.shape[2] == config.long_targets
        for window, inputs in enumerate(windows.inputs.tolist()):
            first_play = int(windows.plays.songs[windows.plays.offsets[window]])
            for position in range(inputs):
                targets_by_play.setdefault(first_play + position, set()).update(targets[window, position].tolist())
            assert (targets[window, inputs:] == -1).all()
    assert len(targets_by_play) == int((plays.lengths - 1).sum())
    expected = {play: plays_in_range(plays, play, days) for play in targets_by_play}
    for play, play_targets in targets_by_play.items():
        assert play_targets <= (set(expected[play]) or {-1}), play
    # 48 draws per position miss few of the plays in the range.
    expected_count = sum(len(set(expected[play])) for play in targets_by_play)
    assert sum(len(play_targets - {-1}) for play_targets in targets_by_play.values()) >= 0.95 * expected_count
    assert (expected_count == 0) == (days == (40, 50))


def test_a_horizon_in_days_ends_with_the_500th_play() -> None:
    """One user has 1,200 plays in a day; a window also holds the 500 plays after its last input."""
    history = Histories.from_lists([list(range(1200))], [list(range(1200))])
    config = settings(long_days=(0, 1), window=100)
    windows = cut_windows(history, config.window, config.lookahead)
    input_plays = windows.plays.songs[windows.plays.offsets[:-1]][:, None, None] + np.arange(100)[:, None]
    offsets = np.concatenate(
        [(targets_of(windows, config, "long", seed) - input_plays)[:6].ravel() for seed in range(5)]
    )
    assert (offsets.min(), offsets.max()) == (1, 500)


@pytest.mark.parametrize(("windows", "changes"), [(10, {}), (11, {}), (13, {}), (13, {"long_days": (0, 2)})])
def test_the_targets_of_a_window_do_not_depend_on_the_number_of_workers(
    histories: Histories, windows: int, changes: dict[str, object]
) -> None:
    config = settings(**changes)
    plays = spread_over_days(with_numbered_songs(histories))
    batch = cut_windows(plays, config.window, config.lookahead).take(np.arange(windows))
    full = targets_of(batch, config, "long", seed=5)
    for rank in range(3):
        share = Share(rank=rank, workers=3)
        rows = np.arange(windows)[rank::3]
        part = targets_of(batch.take(rows), config, "long", seed=5, share=share)
        np.testing.assert_array_equal(part, full[rows, : part.shape[1]])


# Name -> settings and number of users. 45 users make 11 windows per batch, so that two workers have uneven shares;
# one user makes one window, so that all workers but the first have none.
TRAININGS: dict[str, tuple[dict[str, object], int]] = {
    **{cell: ({"cell": cell}, 45) for cell in get_args(Cell)},
    "frozen": ({"song_table": "frozen"}, 45),
    "one table": ({"input_table": False}, 45),
    "one window": ({}, 1),
    "one window, frozen": ({"song_table": "frozen"}, 1),
}
RESUMED = "resumed"


def _run_worker(rank: int, workers: int, folder: str) -> None:
    """Run as one process of a real gloo group, and save the weights in `folder`."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{workers}", rank=rank, world_size=workers)
    share = Share(rank=rank, workers=workers)
    for name, (changes, users) in TRAININGS.items():
        torch.save(
            _train(settings(**changes), users, share).averaged().state_dict(), _weights_path(folder, name, share)
        )
    trainer = training(settings(), share)
    load_training(Path(folder), trainer)  # a checkpoint of one worker
    _train_epochs(trainer, settings(), 45, share, range(2, 3))
    torch.save(trainer.averaged().state_dict(), _weights_path(folder, RESUMED, share))
    parts_folder = Path(folder) / str(workers)
    parts_folder.mkdir(exist_ok=True)
    save_training(parts_folder, trainer.state(), None, {}, share)
    dist.barrier()
    os._exit(0)  # gloo's threads outlive the group and abort an interpreter that exits normally


def _weights_path(folder: str | Path, name: str, share: Share) -> Path:
    return Path(folder) / f"{name}-{share.rank}-{share.workers}.pt"


def _train(config: TrainConfig, users: int, share: Share, epochs: int = 3) -> Training:
    """Train for `epochs`, by default three, so that the optimizers' momentum has an effect."""
    trainer = training(config, share)
    _train_epochs(trainer, config, users, share, range(epochs))
    return trainer


def _train_epochs(trainer: Training, config: TrainConfig, users: int, share: Share, epochs: range) -> None:
    plays = cycling_histories(users, shortest=10, longest=12 if users == 1 else 30)
    host = MemoryHost({"final": plays}, config, share=share)
    for epoch in epochs:
        trainer.epoch(host.windows("final", epoch), epoch, on_step=lambda _: None)


def _join_weights(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Join the weights of all workers: each has its own rows of the tables, and all other weights must be equal."""
    joined = dict(parts[0])
    for name in joined:
        values = [part[name] for part in parts]
        if name in TABLES:
            joined[name] = torch.empty(NUM_SONGS, values[0].shape[1])
            for rank, rows in enumerate(values):
                joined[name][rank :: len(parts)] = rows
        else:
            assert all(torch.equal(value, values[0]) for value in values), name
    return joined


@pytest.mark.parametrize("workers", [2, 4])
def test_several_processes_learn_what_one_learns_and_go_on_from_each_others_checkpoints(
    tmp_path: Path, workers: int
) -> None:
    save_training(tmp_path, _train(settings(), 45, Share(), epochs=2).state(), None, {}, Share())
    torch.multiprocessing.spawn(_run_worker, args=(workers, str(tmp_path)), nprocs=workers)  # type: ignore[no-untyped-call]
    for case, (changes, users) in [*TRAININGS.items(), (RESUMED, ({}, 45))]:
        expected = _train(settings(**changes), users, Share()).averaged().state_dict()
        shares = [Share(rank=rank, workers=workers) for rank in range(workers)]
        joined = _join_weights(
            [torch.load(_weights_path(tmp_path, case, share), weights_only=True) for share in shares]
        )
        for name, value in expected.items():
            torch.testing.assert_close(joined[name], value, atol=1e-4, rtol=0, msg=f"{case}: {name}")
    reloaded = training(settings())
    load_training(tmp_path / str(workers), reloaded)
    for name, value in reloaded.averaged().state_dict().items():
        torch.testing.assert_close(value, joined[name], atol=1e-6, rtol=0, msg=name)


def test_values_computed_ahead_come_in_order_and_an_error_at_its_place() -> None:
    def values(fails_at: int) -> Iterator[int]:
        for value in range(10):
            if value == fails_at:
                raise KeyError(value)
            yield value

    assert list(ahead(values(99))) == list(range(10))
    received: list[int] = []
    with pytest.raises(KeyError, match="7"):
        received.extend(ahead(values(7)))
    iterator = ahead(values(99))
    assert next(iterator) == 0
    iterator.close()  # type: ignore[attr-defined]
    assert "rayrec steps" not in {thread.name for thread in threading.enumerate()}


class LateStream:
    """Replaces a CUDA stream: a copy has its values only after somebody has waited for it."""

    device = torch.device("cpu")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.under_way: list[tuple[Tensor, Tensor]] = []
        self.copied: list[Tensor] = []
        self.kept: list[Tensor] = []  # tensors whose memory is not reused while this stream may read them
        self.threads: set[str] = set()  # names of the threads that made copies
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self)
        monkeypatch.setattr(torch.Tensor, "pin_memory", self._copy)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, _: self.kept.append(tensor))

    @property
    def _copy(self) -> Any:
        def copy(tensor: Tensor) -> Tensor:
            self.threads.add(threading.current_thread().name)
            self.copied.append(torch.zeros_like(tensor))
            self.under_way.append((self.copied[-1], tensor))
            return self.copied[-1]

        return copy

    def record_event(self) -> list[tuple[Tensor, Tensor]]:
        event, self.under_way = self.under_way, []
        return event

    def wait_event(self, event: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in event:
            target.copy_(source)


def test_a_thread_copies_steps_ahead_and_they_are_used_once_they_have_arrived(
    histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings()
    expected = losses(config, histories)
    trainer, reports = training(config), list[StepReport]()
    assert trainer.copies is None  # a CPU needs no stream for copies
    stream = LateStream(monkeypatch)
    trainer.copies = stream  # type: ignore[assignment]
    trainer.epoch(MemoryHost({"final": histories}, config).windows("final", 0), 0, on_step=reports.append)
    assert [float(report.loss) for report in reports] == expected
    assert stream.threads == {"rayrec steps"}
    assert [*map(id, stream.kept)] == [*map(id, stream.copied)]


def test_padding_looks_up_no_song(histories: Histories) -> None:
    """Otherwise momentum would move the padding song, even with a gradient of zero."""
    config = settings()
    uneven_histories = histories.keep(histories.songs % 7 != 0)
    windows = cut_windows(uneven_histories.take(uneven_histories.lengths > 1), config.window, config.lookahead)
    assert len(set(windows.inputs.tolist())) > 1
    step = StepMaker(model_config(config), config, COUNTS, Share()).make(windows, 0, 0)
    inputs = np.concatenate(
        [
            windows.plays.songs[start : start + count]
            for start, count in zip(windows.plays.offsets, windows.inputs, strict=False)
        ]
    )
    assert set(step.songs["inputs.weight"].tolist()) == set(inputs.tolist())
    outputs = step.songs["songs.weight"]
    has_target = step.targets.weight_PT > 0
    used_songs = [outputs[step.targets.song_rows_PT[has_target]], outputs[step.negatives.song_rows_K]]
    assert not has_target.all()  # a missing draw must not add a song
    assert set(outputs.tolist()) == set(torch.cat(used_songs).tolist())
