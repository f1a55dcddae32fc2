"""A job that needs a GPU where there is none ends at once, unless the cluster may still start a node with one."""

import logging

import numpy as np
import pytest
import ray
from networks import NUM_SONGS, network
from without_ray import without_ray
from worlds import random_histories, write_dataset

from rayrec.errors import InputError
from rayrec.jobs import runtime
from rayrec.jobs.runtime import require_gpu
from rayrec.jobs.taste import compute_tastes
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import TasteConfig
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace


@pytest.fixture(autouse=True)
def cluster_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_tastes_on_a_gpu_that_this_machine_does_not_have_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    dataset = write_dataset(workspace, random_histories(5, NUM_SONGS), NUM_SONGS)
    names = save_model(workspace, "models/m", network(), np.ones(NUM_SONGS, dtype=bool))
    publish(workspace, Manifest(kind="models", id="m", inputs={"dataset": dataset.manifest.id}), names)
    with pytest.raises(InputError, match="--gpu needs a GPU, and Ray finds none on this machine; omit --gpu"):
        compute_tastes(workspace, TasteConfig(gpu=True))
    assert not workspace.files("tastes")


def test_a_cluster_that_may_start_a_node_with_a_gpu_is_waited_for_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with caplog.at_level(logging.WARNING, logger=runtime.__name__):
        require_gpu()
    (message,) = caplog.messages
    assert message.startswith("no node of the Ray cluster at head:6379 has a GPU; the job waits")
    caplog.clear()
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    require_gpu()
    assert not caplog.messages
