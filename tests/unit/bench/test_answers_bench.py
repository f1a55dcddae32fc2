"""The release of the answers benchmark, built without Ray: a server finds all that it reads there."""

import numpy as np
import pytest
from without_ray import without_ray

from rayrec.bench.answers_bench import build_answers_release, index_recall, last_play_queries, recall, with_index
from rayrec.bench.bench_config import AnswersBenchConfig
from rayrec.data.dataset import Dataset
from rayrec.data.split import fit_range_of
from rayrec.recommend.answer import load_popular_order, load_recommender
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.two_step import TwoStepRecommender
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

SONGS = 500


@pytest.fixture
def built_release(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Manifest]:
    """A release of the benchmark with `SONGS` songs."""
    without_ray(monkeypatch)
    dataset, release, _ = build_answers_release(workspace, AnswersBenchConfig.quick(), SONGS)
    return dataset, release


def test_the_built_release_recommends_popular_songs_to_a_user_without_plays(
    built_release: tuple[Dataset, Manifest],
) -> None:
    dataset, release = built_release
    recommender = load_recommender(dataset.workspace, dataset, release.inputs)
    popular_order = load_popular_order(dataset, recommender, release.inputs)
    assert sorted(popular_order.order) == list(range(SONGS))


def test_the_plays_to_find_are_held_out_of_the_retrieval_and_can_be_missed(
    built_release: tuple[Dataset, Manifest],
) -> None:
    dataset, release = built_release
    histories, queries = last_play_queries(dataset, 50)
    retrieval = artifacts.load_manifest(dataset.workspace, "retrieval", release.inputs["retrieval"])
    assert not fit_range_of(dataset, retrieval).covers(histories)[histories.offsets[1:] - 1].any()
    two_step = load_recommender(dataset.workspace, dataset, release.inputs)
    assert isinstance(two_step, TwoStepRecommender)
    assert 0 < recall(two_step, histories, queries) < 0.9


def test_an_index_that_confuses_the_songs_has_a_low_index_recall(built_release: tuple[Dataset, Manifest]) -> None:
    dataset, release = built_release
    two_step = load_recommender(dataset.workspace, dataset, release.inputs)
    assert isinstance(two_step, TwoStepRecommender)
    vectors = two_step.source.network.song_vectors
    histories, queries = last_play_queries(dataset, 50)
    exact_index = SongIndex.build(vectors, IndexConfig(kind="flat"))
    assert index_recall(two_step, exact_index, histories, queries) == 1.0
    permuted_vectors = vectors[np.random.default_rng(0).permutation(SONGS)]
    confused = with_index(two_step, SongIndex.build(permuted_vectors, IndexConfig(kind="flat")))
    assert index_recall(confused, exact_index, histories, queries) < 0.5
