"""What a step of many workers sends: rows and gradients to the workers that keep them, and one sum in addition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import NUM_SONGS, MemoryHost, cycling_histories, model_config, network
from wires import WORKERS, Wire

from rayrec.model.song_tables import RowAdam, RowExchange, Share
from rayrec.model.train_config import TrainConfig
from rayrec.model.training import StepMaker, Training

SMALL_CONFIG = TrainConfig(hidden_dim=12, window=12, batch=10, negatives=20, long=(2, 5))
SHARE = Share(rank=0, workers=WORKERS)


def test_a_step_of_eight_workers_with_60_000_rows_each_sends_at_most_35_mb(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, rows, dim = Wire(monkeypatch), 60_000, 64
    songs = torch.arange(rows).reshape(-1, WORKERS).T.flatten()  # grouped by the worker that keeps them
    windows = next(MemoryHost({"final": cycling_histories(20)}, SMALL_CONFIG).windows("final", 0))
    small_step = StepMaker(model_config(SMALL_CONFIG), SMALL_CONFIG, np.ones(NUM_SONGS), SHARE).make(windows, 0, 0)
    step = RowExchange(SHARE).agree(replace(small_step, songs={"songs.weight": songs}), ["songs.weight"])
    request = step.requests["songs.weight"]
    assert request.sent == request.received == [rows // WORKERS] * WORKERS
    table = RowAdam(torch.rand(rows, dim), 0.01, 10)
    table_rows = table.look_up(songs, request)
    assert table_rows.shape == (rows, dim)
    table.step(songs, torch.ones_like(table_rows), request)
    dense_bytes = sum(value.nbytes for name, value in network(model_config(TrainConfig())).named_parameters())
    assert 25e6 < wire.sent < 35e6 - 2 * dense_bytes


def test_a_step_makes_one_sum_besides_the_exchange_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire(monkeypatch)
    training = Training(
        network(model_config(SMALL_CONFIG)), SMALL_CONFIG, np.ones(NUM_SONGS), device="cpu", share=SHARE
    )
    windows = next(MemoryHost({"final": cycling_histories(40)}, SMALL_CONFIG, share=SHARE).windows("final", 0))
    loss = training.step(windows, 0, 0)
    assert torch.isfinite(loss)
    assert wire.calls.count("all_reduce") == 1
    # The numbers of rows requested of each worker; then, for each of two tables, the requests, the rows, the gradients.
    assert wire.calls.count("all_to_all") == 1 + 2 * 3
    wire.calls.clear()
    training.step(windows.take(np.arange(0)), 0, 1)  # a share without windows makes the same calls
    assert wire.calls.count("all_to_all") == 1 + 2 * 3


def test_the_targets_of_all_workers_are_known_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    Wire(monkeypatch)
    windows = next(MemoryHost({"final": cycling_histories(20)}, SMALL_CONFIG).windows("final", 0))
    step = StepMaker(model_config(SMALL_CONFIG), SMALL_CONFIG, np.ones(NUM_SONGS), SHARE).make(windows, 0, 0)
    agreed_step = RowExchange(SHARE).agree(step, [*step.songs])
    for targets, total in ((step.targets, 1.0), (agreed_step.targets, 1 / WORKERS)):
        assert (targets.weight_PT.T @ targets.horizons_PH).sum(0).tolist() == pytest.approx(
            [total, SMALL_CONFIG.long_weight * total]
        )
