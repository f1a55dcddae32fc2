"""The stored figures of each epoch."""

import json
import sys

import pytest

from rayrec.model.checkpoint import EPOCHS, TENSORBOARD, write_epochs, write_tensorboard
from rayrec.storage.workspace import Workspace

LINES = [
    {"phase": "selection", "epoch": 0, "loss": 3.5, "validation_recall@20": 0.1},
    {"phase": "selection", "epoch": 1, "loss": 2.5, "validation_recall@20": 0.2},
    {"phase": "final", "epoch": 0, "loss": 3.0},
]


def test_each_epoch_is_a_line_of_json(workspace: Workspace) -> None:
    write_epochs(workspace, "models/a", LINES)
    assert [json.loads(line) for line in workspace.read_bytes(f"models/a/{EPOCHS}").splitlines()] == LINES


def test_without_tensorboard_nothing_is_written(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert not write_tensorboard(workspace, "models/a", LINES)
    assert workspace.files("models/a") == []


def test_tensorboard_reads_the_figures_back(workspace: Workspace) -> None:
    pytest.importorskip("tensorboard", reason="no tensorboard: pip install 'rayrec[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert write_tensorboard(workspace, "models/a", LINES)
    events = EventAccumulator(workspace.full(f"models/a/{TENSORBOARD}"))
    events.Reload()
    recall = events.Scalars("selection/validation_recall@20")
    assert [(event.step, round(event.value, 3)) for event in recall] == [(0, 0.1), (1, 0.2)]
    assert [event.value for event in events.Scalars("final/loss")] == [3.0]
