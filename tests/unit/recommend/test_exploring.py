"""Exploring: songs with few plays are shown with exactly the probability that the answer reports."""

from collections.abc import Callable

import numpy as np
import pytest
from served import AT, NUM_SONGS, write_release, write_world
from without_ray import without_ray

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.errors import InputError
from rayrec.jobs.recommend_all import recommend_all, recommendations_file
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.filters import AnswerFilter
from rayrec.recommend.reranking import (
    FEW_PLAYS,
    AnswerOptions,
    SelectedSongs,
    choose,
    draw_of,
    explore,
    few_plays,
    network_of,
    probabilities,
)
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender
from rayrec.storage.releases import default_parts
from rayrec.storage.workspace import Workspace

BEST = np.arange(10, dtype=np.int32), np.linspace(1, 0.5, 10).astype(np.float32)
POOL = np.arange(100, 104, dtype=np.int32), np.array([0.6, 0.2, 0.1, 0.0], dtype=np.float32)


@pytest.mark.parametrize("share", [0.05, 0.13, 0.3, 1.0])
def test_each_song_is_shown_as_often_as_its_probability_says(share: float) -> None:
    draws = np.random.default_rng(0).random(3_000)
    shown = np.zeros(4)
    sizes = set()
    for draw in draws.tolist():
        explored = explore(BEST, POOL, share, draw)
        drawn = explored.songs >= 100
        sizes.add(int(drawn.sum()))
        shown[explored.songs[drawn] - 100] += 1
        assert not np.isnan(explored.probabilities[drawn]).any()
        assert np.isnan(explored.probabilities[~drawn]).all()
    expected = probabilities(POOL[1], 10 * share)
    np.testing.assert_allclose(shown / len(draws), expected, atol=0.03)
    assert expected.sum() == pytest.approx(min(4, 10 * share))
    assert sizes <= {int(min(4, 10 * share)), int(min(4, np.ceil(10 * share)))}
    assert (np.diff(expected) <= 1e-12).all()  # better songs are shown more often
    assert expected.min() > 0


def test_the_others_are_the_best_in_their_order_and_explored_songs_stand_at_even_distances() -> None:
    explored = explore(BEST, POOL, 0.2, 0.5)
    drawn = explored.songs >= 100
    assert np.flatnonzero(drawn).tolist() == [2, 7]
    assert explored.songs[~drawn].tolist() == list(range(8))
    assert explore(BEST, (POOL[0][:0], POOL[1][:0]), 0.2, 0.5).songs.tolist() == list(range(10))


def test_a_draw_is_of_the_last_plays_and_the_moment_and_of_nothing_else() -> None:
    history = Histories.from_lists([[1, 2, 3]], [[10, 20, 30]])
    same = Histories.from_lists([[1, 2, 3]], [[10, 20, 30]], ["another"])
    assert draw_of(history, 40) == draw_of(same, 40)
    draws = [draw_of(history, at) for at in range(2_000)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.02)
    assert np.var(draws) == pytest.approx(1 / 12, abs=0.005)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("exploring") / "workspace")
    write_world(workspace)
    write_release(workspace)
    return workspace


@pytest.fixture(scope="module")
def recommender(world: Workspace) -> BaseRecommender:
    return load_recommender(world, Dataset(world), default_parts(world))


@pytest.fixture(scope="module")
def chosen(recommender: BaseRecommender) -> Callable[[AnswerOptions], SelectedSongs]:
    history = Histories.from_lists([[3, 50, 3, 9]], [[AT - 60_000 * back for back in (3, 2, 1, 0)]])
    network, queries = network_of(recommender), Queries.at_end(history, AT)
    vectors = {horizon: network.vectors(history, queries, horizon) for horizon in HORIZONS}
    return lambda options: choose(recommender, vectors, history, np.array([AT]), [options])[0]


def test_an_answer_explores_songs_with_few_plays_within_its_filters(
    recommender: BaseRecommender, chosen: Callable[[AnswerOptions], SelectedSongs], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(recommender, TwoStepRecommender)
    plays = recommender.source.retrieval.plays.plays
    monkeypatch.setattr("rayrec.recommend.reranking.FEW_PLAYS", int(np.median(plays)))
    options = AnswerOptions(k=20, answer_filter=AnswerFilter(excluded=np.arange(0, NUM_SONGS, 2)))
    usual, explored = chosen(options), chosen(options.replace(explore=0.25))
    assert usual.probabilities is None
    assert explored.probabilities is not None
    drawn = ~np.isnan(explored.probabilities)
    assert (int(drawn.sum()), len(explored.songs)) == (5, 20)
    assert (plays[explored.songs[drawn]] < np.median(plays)).all()
    assert not np.isin(explored.songs[drawn], usual.songs).any()
    assert (explored.songs % 2 == 1).all()
    np.testing.assert_array_equal(explored.songs[~drawn], usual.songs[:15])
    np.testing.assert_array_equal(explored.songs, chosen(options.replace(explore=0.25)).songs)
    diverse = chosen(options.replace(explore=0.25, diversity=0.5))
    assert len(np.unique(diverse.songs)) == 20


def test_what_is_few_is_a_matter_of_plays(recommender: BaseRecommender) -> None:
    assert isinstance(recommender, TwoStepRecommender)
    plays = recommender.source.retrieval.plays.plays
    few = few_plays(recommender, np.arange(NUM_SONGS + 3))
    np.testing.assert_array_equal(few[:NUM_SONGS], plays < FEW_PLAYS)
    assert few[NUM_SONGS:].all()


def test_command_and_batch_explore_the_same_songs(
    world: Workspace, recommender: BaseRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    config, dataset = RecommendConfig(k=10, explore=0.3), Dataset(world)
    parts = default_parts(world)
    made = recommend_all(world, config, parts, at=AT)
    table = world.read_table(recommendations_file(made.folder, 0)).slice(0, 3)
    for row in table.to_pylist():
        alone = answer(dataset, recommender, config, parts=parts, at=AT, user=row["user_id"])
        assert alone.song_ids == row["song_ids"]
        assert [song.explored for song in alone.songs] == [chance is not None for chance in row["probabilities"]]
        assert sum(song.explored for song in alone.songs) == 3
        assert alone.songs[1].probability == pytest.approx(row["probabilities"][1], abs=1e-6)


def test_a_share_is_at_most_all() -> None:
    with pytest.raises(InputError, match="explore"):
        RecommendConfig(explore=1.5)
    with pytest.raises(InputError, match="explore"):
        AnswerOptions(k=1, explore=-0.1)
