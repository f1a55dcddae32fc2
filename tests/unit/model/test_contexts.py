"""Contexts in a world where they decide the next song: the network gains from them what the world's rules predict."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from networks import MemoryHost, model_config
from oracle import Oracle, every_play
from worlds import random_vectors

from rayrec.data.histories import Histories
from rayrec.data.synthetic import ALBUM, CONTEXTS, PLAYLIST, GenerateConfig, World
from rayrec.model.epochs import Fit, FitData
from rayrec.model.inference import TasteEncoder
from rayrec.model.train_config import FeatureSpec, TrainConfig

NUM_SONGS = 40
HELD_OUT_USERS, TRAINING_USERS = np.arange(150), np.arange(150, 750)  # users
CONFIG = TrainConfig(
    hidden_dim=32,
    window=40,
    batch=16,
    negatives=64,
    long=(),
    epochs=7,
    learning_rate=0.01,
    averaged_part=0.1,  # a training this short has few steps to average
)


@dataclass(frozen=True)
class Recall:
    """Recall@1 of the plays that have an earlier one by the same user."""

    with_contexts: float
    without: float

    @property
    def margin(self) -> float:
        return self.with_contexts - self.without


@pytest.fixture(scope="module")
def world() -> World:
    """Sessions of two plays on average; half follow an album, half a playlist, until the session ends.

    The first song of a session depends on its mood and not on its context, so that only the context
    shows which order the second song follows.
    """
    world = World(GenerateConfig(songs=NUM_SONGS, artists=6, genres=3, plays=30, session_plays=2, follow=1))
    start: np.ndarray = np.zeros(len(CONTEXTS))
    start[[PLAYLIST, ALBUM]] = 0.5
    world.context_shares = np.vstack([np.eye(len(CONTEXTS)), start])
    return world


@pytest.fixture(scope="module")
def predicted(world: World) -> Recall:
    """The best recall that any predictor can reach, with and without the contexts."""
    aware, blind = (Oracle(world, know_contexts=know_contexts) for know_contexts in (True, False))
    return Recall(
        aware.best_recall(1, HELD_OUT_USERS, first_play=1), blind.best_recall(1, HELD_OUT_USERS, first_play=1)
    )


@pytest.fixture(scope="module")
def network_recall(world: World) -> Recall:
    """The recall of two networks, with and without contexts, on users outside the training."""
    training_histories, evaluation_histories = world.histories(TRAINING_USERS), world.histories(HELD_OUT_USERS)
    return Recall(*(learned_recall(training_histories, evaluation_histories, contexts) for contexts in (CONTEXTS, ())))


def learned_recall(training_histories: Histories, evaluation_histories: Histories, contexts: tuple[str, ...]) -> float:
    """The recall@1 of a network with these contexts as features."""
    torch.set_num_threads(1)
    shape = model_config(CONFIG, num_songs=NUM_SONGS, features=FeatureSpec(contexts=contexts))
    counts = np.bincount(training_histories.songs, minlength=NUM_SONGS)
    data = FitData(vectors=random_vectors(NUM_SONGS), counts=counts)
    model = Fit(
        shape, CONFIG, {"final": data}, MemoryHost({"final": training_histories}, CONFIG), validation=None
    ).run()
    queries = every_play(evaluation_histories, first_play=1)
    tastes = TasteEncoder(model).vectors(evaluation_histories, queries, "short")
    songs = model.song_vectors(torch.arange(NUM_SONGS)).detach().numpy()
    played_songs = evaluation_histories.songs[evaluation_histories.offsets[queries.rows] + queries.plays_before]
    return float(((tastes @ songs.T).argmax(axis=1) == played_songs).mean())


def test_the_rules_predict_the_margin_that_contexts_give(predicted: Recall) -> None:
    """One play in four is the second of its session: certain with its context, a guess between two orders without."""
    assert predicted.margin == pytest.approx(0.25 * 0.5, abs=0.02)


def test_the_network_with_contexts_gains_most_of_what_the_rules_predict(
    predicted: Recall, network_recall: Recall
) -> None:
    assert 0.5 * predicted.margin < network_recall.margin < 1.5 * predicted.margin
    assert predicted.without < network_recall.with_contexts < predicted.with_contexts


def test_the_network_without_contexts_stays_below_the_best_recall_without_contexts(
    predicted: Recall, network_recall: Recall
) -> None:
    assert network_recall.without < predicted.without
