"""A training leaves a memory, and evaluations judge by the mix of both: where it was asked for."""

from dataclasses import replace

import pytest
from worlds import random_vectors, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, SplitConfig, split_dataset
from rayrec.data.synthetic.world import GenerateConfig
from rayrec.errors import InputError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_figures
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.generate import generate
from rayrec.jobs.train import train
from rayrec.model.train_config import MEMORY, TrainConfig
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.hybrid import MEMBERS, HybridRecommender, Memory
from rayrec.recommend.mixing import USUAL_MIX
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.artifacts import Manifest, verify
from rayrec.storage.workspace import Workspace

NUM_SONGS = 60
CONFIG = TrainConfig(hidden_dim=8, window=20, batch=32, negatives=20, long=(2, 5), epochs=1, workers=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("hybrid") / "workspace")
    generate(workspace, GenerateConfig(users=100, songs=NUM_SONGS, artists=12, genres=4, plays=20, days=60, buckets=2))
    return workspace


@pytest.fixture(scope="module")
def split(world: Workspace) -> Split:
    made = split_dataset(world, SplitConfig(test_days=15, validation_days=10))
    write_song_vectors(world, random_vectors(NUM_SONGS), {"dataset": made.dataset, "split": made.id})
    return made


@pytest.fixture(scope="module")
def remembering(world: Workspace, split: Split) -> Manifest:
    return train(world, CONFIG, split=split)


@pytest.fixture(scope="module")
def forgetful(world: Workspace, split: Split) -> Manifest:
    return train(world, replace(CONFIG, memory=False), split=split)


def test_a_training_leaves_a_memory_of_all_plays_before_the_test_range(
    world: Workspace, split: Split, remembering: Manifest
) -> None:
    verify(world, remembering)
    assert MEMORY in remembering.files
    memory, mix = Memory.load(world, remembering.path(MEMORY), NUM_SONGS)
    told = {"heard": mix.heard, "new": mix.new}
    assert remembering.metrics["weights"] == {songs: dict(zip(MEMBERS, told[songs], strict=True)) for songs in told}
    assert mix != USUAL_MIX
    dataset = Dataset(world)
    expected = Memory.fit(
        lambda: (split.final.select(plays) for plays in dataset.read_all()), num_songs=NUM_SONGS, allowed=split.final
    )
    assert (memory.sessions.sessions != expected.sessions.sessions).nnz == 0
    assert (memory.rules.rules != expected.rules.rules).nnz == 0
    assert isinstance(load_recommender(world, dataset, model_id=remembering.id, index_id=None), HybridRecommender)


def test_without_a_memory_the_network_answers_alone(world: Workspace, forgetful: Manifest) -> None:
    assert MEMORY not in forgetful.files
    assert "weights" not in forgetful.metrics
    assert type(load_recommender(world, Dataset(world), model_id=forgetful.id, index_id=None)) is TasteRecommender


def test_evaluations_judge_what_the_model_answers_with(
    world: Workspace, split: Split, remembering: Manifest, forgetful: Manifest
) -> None:
    settings = EvaluateConfig(bootstrap_samples=10, offsets=5)
    mixed = evaluate(world, settings, split=split, model_id=remembering.id)
    assert mixed.metrics["default"] == "hybrid"
    assert {"hybrid", "taste"} <= {entry["model"] for entry in read_figures(world, mixed)["results"]}
    alone = evaluate(world, settings, split=split, model_id=forgetful.id)
    assert alone.metrics["default"] == "taste"
    assert "hybrid" not in {entry["model"] for entry in read_figures(world, alone)["results"]}
    with pytest.raises(InputError, match="trained without a memory; name taste, or train with --memory"):
        evaluate(world, replace(settings, models=("hybrid",)), split=split, model_id=forgetful.id)
