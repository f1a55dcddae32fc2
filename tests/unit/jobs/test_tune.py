"""A trial that diverges has no figure, and a sweep never takes it for the best."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worlds import random_vectors, write_dataset, write_song_vectors

from rayrec.data.histories import Histories
from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.errors import DivergedError
from rayrec.jobs import tune as job
from rayrec.jobs.trials import TuneConfig
from rayrec.jobs.tune import CSV, JUDGED_BY, tune
from rayrec.model.train_config import TrainConfig
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

DAY_MS = 86_400_000


@pytest.fixture
def split(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Of a small data set, with trainings that diverge at learning rates above 0.01 in place of the real ones."""
    times = np.arange(20) * DAY_MS
    histories = Histories.from_lists(
        songs=[np.arange(20) % 5] * 4, played_at=[times] * 4, user_ids=[f"user-{row}" for row in range(4)]
    )
    write_dataset(workspace, histories, num_songs=5)
    songs = write_song_vectors(workspace, random_vectors(5), {})

    def train(workspace: Workspace, config: TrainConfig, **options: Any) -> Manifest:
        if config.learning_rate > 0.01:
            raise DivergedError("training diverged: the loss is not finite")
        model = Manifest(kind="models", id="learned", metrics={JUDGED_BY: 0.25, "epochs": 1, "seconds": 1.0})
        workspace.write_bytes(model.path("weights"), b"")
        return publish(workspace, model, ["weights"])

    monkeypatch.setattr(job, "train", train)
    monkeypatch.setattr(job, "embed", lambda *arguments, **options: songs)
    monkeypatch.setattr(job, "ray_cluster", contextlib.nullcontext)
    return split_dataset(workspace, SplitConfig(test_days=4, validation_days=4))


def space(folder: Path, rates: str) -> str:
    path = folder / "space.toml"
    path.write_text(f"[train]\nlearning_rate = {rates}\n")
    return str(path)


def test_the_best_trial_is_one_that_did_not_diverge(workspace: Workspace, split: Split, tmp_path: Path) -> None:
    made = tune(workspace, TuneConfig(), space(tmp_path, "[1.0, 0.001, 0.5]"), split=split)
    assert [row[JUDGED_BY] for row in made.metrics["trials"]] == [None, 0.25, None]
    assert made.metrics["best"]["train"]["learning_rate"] == 0.001
    assert made.metrics["best_ndcg"] == 0.25
    rates = [line.split(",")[1:3] for line in workspace.read_bytes(made.path(CSV)).decode().splitlines()[1:]]
    assert rates == [["1.0", ""], ["0.001", "0.25"], ["0.5", ""]]


def test_a_sweep_of_which_every_trial_diverges_has_no_result(
    workspace: Workspace, split: Split, tmp_path: Path
) -> None:
    with pytest.raises(DivergedError, match="give smaller learning rates"):
        tune(workspace, TuneConfig(), space(tmp_path, "[1.0, 0.5]"), split=split)
