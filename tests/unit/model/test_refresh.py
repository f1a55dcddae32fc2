"""A training that starts from a model, as a nightly refresh does, against one that starts from nothing."""

import numpy as np
import pytest
import torch
from networks import MemoryHost, model_config
from worlds import random_vectors

from rayrec.data.synthetic import GenerateConfig, World
from rayrec.model.epochs import RECALL_AT, Fit, FitData, Phase, Validation
from rayrec.model.network import TasteModel
from rayrec.model.train_config import TrainConfig

DAY = 24 * 3600 * 1000
WORLD = GenerateConfig(users=1_200, songs=600, artists=60, genres=6, plays=60, days=120)
APPENDED_DAYS, VALIDATION_DAYS = 10, 7
CONFIG = TrainConfig(
    hidden_dim=32, window=50, batch=16, negatives=100, long=(5, 10), epochs=16, patience=3, refit=False, dropout=0.0
)
RECALL = f"validation_recall@{RECALL_AT}"


@pytest.mark.slow
def test_on_appended_plays_a_training_from_a_model_reaches_the_recall_of_a_full_one_in_a_quarter_of_the_time() -> None:
    """A quarter of the full training's epochs until its best epoch; both trainings read the same plays."""
    torch.set_num_threads(1)
    histories = World(WORLD).histories(np.arange(WORLD.users))
    validation_from = int(histories.played_at.max()) - VALIDATION_DAYS * DAY
    old_cut, new_cut = validation_from - APPENDED_DAYS * DAY, validation_from
    is_first = histories.places == 0
    validation_plays = np.flatnonzero((histories.played_at >= new_cut) & ~is_first)[:2_000]

    def fit(cut: int, phase: Phase, start: TasteModel | None, config: TrainConfig) -> tuple[Fit, TasteModel]:
        plays = histories.before(cut)
        counts = np.bincount(plays.songs, minlength=WORLD.songs)
        data: dict[Phase, FitData] = {phase: FitData(vectors=random_vectors(WORLD.songs), counts=counts)}
        validation = Validation(histories=histories, plays=validation_plays) if phase == "selection" else None
        shape = model_config(config, num_songs=WORLD.songs)
        new_fit = Fit(shape, config, data, MemoryHost({phase: plays}, config), validation=validation, start=start)
        return new_fit, new_fit.run()

    _, old_model = fit(old_cut, "final", None, CONFIG)
    full, _ = fit(new_cut, "selection", None, CONFIG)
    refreshed, _ = fit(new_cut, "selection", old_model, CONFIG)
    full_recall = [line[RECALL] for line in full.progress.epochs]
    refreshed_recall = [line[RECALL] for line in refreshed.progress.epochs]
    print(full_recall, full.progress.best_epoch, refreshed_recall)
    best = full.progress.best_epoch
    assert best >= 3
    assert full_recall[best] > full_recall[0] + 0.02  # there is something to learn
    quarter = (best + 1) // 4
    assert max(refreshed_recall[:quarter]) >= full_recall[best] - 0.003
