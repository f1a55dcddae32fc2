"""Exploring: songs with few plays are shown with exactly the probability that the answer reports."""

from collections.abc import Callable

import numpy as np
import pytest
from served import AT, NUM_SONGS
from without_ray import IN_WORKER, without_ray

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
    show_counts = np.zeros(4)
    sizes = set()
    for draw in draws.tolist():
        selection = explore(BEST, POOL, share, draw)
        is_explored = selection.songs >= 100
        sizes.add(int(is_explored.sum()))
        show_counts[selection.songs[is_explored] - 100] += 1
        assert not np.isnan(selection.probabilities[is_explored]).any()
        assert np.isnan(selection.probabilities[~is_explored]).all()
    expected = probabilities(POOL[1], 10 * share)
    np.testing.assert_allclose(show_counts / len(draws), expected, atol=0.03)
    assert expected.sum() == pytest.approx(min(4, 10 * share))
    assert sizes <= {int(min(4, 10 * share)), int(min(4, np.ceil(10 * share)))}
    assert (np.diff(expected) <= 1e-12).all()  # better songs are shown more often
    assert expected.min() > 0


def test_explored_songs_stand_at_even_distances_among_the_best_songs_in_their_order() -> None:
    selection = explore(BEST, POOL, 0.2, 0.5)
    is_explored = selection.songs >= 100
    assert np.flatnonzero(is_explored).tolist() == [2, 7]
    assert selection.songs[~is_explored].tolist() == list(range(8))
    assert explore(BEST, (POOL[0][:0], POOL[1][:0]), 0.2, 0.5).songs.tolist() == list(range(10))


def test_a_draw_depends_only_on_the_last_plays_and_the_moment() -> None:
    history = Histories.from_lists([[1, 2, 3]], [[10, 20, 30]])
    same_plays = Histories.from_lists([[1, 2, 3]], [[10, 20, 30]], ["another"])
    assert draw_of(history, 40) == draw_of(same_plays, 40)
    draws = [draw_of(history, at) for at in range(2_000)]
    assert np.mean(draws) == pytest.approx(0.5, abs=0.02)
    assert np.var(draws) == pytest.approx(1 / 12, abs=0.005)


@pytest.fixture(scope="module")
def recommender(world: Workspace) -> BaseRecommender:
    return load_recommender(world, Dataset(world), default_parts(world))


@pytest.fixture(scope="module")
def select(recommender: BaseRecommender) -> Callable[[AnswerOptions], SelectedSongs]:
    history = Histories.from_lists([[3, 50, 3, 9]], [[AT - 60_000 * back for back in (3, 2, 1, 0)]])
    network, queries = network_of(recommender), Queries.at_end(history, AT)
    vectors = {horizon: network.vectors(history, queries, horizon) for horizon in HORIZONS}
    return lambda options: choose(recommender, vectors, history, np.array([AT]), [options])[0]


def test_an_answer_explores_songs_with_few_plays_within_its_filters(
    recommender: BaseRecommender, select: Callable[[AnswerOptions], SelectedSongs], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(recommender, TwoStepRecommender)
    play_counts = recommender.source.retrieval.plays.plays
    monkeypatch.setattr("rayrec.recommend.reranking.FEW_PLAYS", int(np.median(play_counts)))
    options = AnswerOptions(k=20, answer_filter=AnswerFilter(excluded=np.arange(0, NUM_SONGS, 2)))
    usual_answer, exploring_answer = select(options), select(options.replace(explore=0.25))
    assert usual_answer.probabilities is None
    assert exploring_answer.probabilities is not None
    is_explored = ~np.isnan(exploring_answer.probabilities)
    assert (int(is_explored.sum()), len(exploring_answer.songs)) == (5, 20)
    assert (play_counts[exploring_answer.songs[is_explored]] < np.median(play_counts)).all()
    assert not np.isin(exploring_answer.songs[is_explored], usual_answer.songs).any()
    assert (exploring_answer.songs % 2 == 1).all()
    np.testing.assert_array_equal(exploring_answer.songs[~is_explored], usual_answer.songs[:15])
    np.testing.assert_array_equal(exploring_answer.songs, select(options.replace(explore=0.25)).songs)
    diverse_answer = select(options.replace(explore=0.25, diversity=0.5))
    assert len(np.unique(diverse_answer.songs)) == 20


def test_songs_with_fewer_plays_than_the_limit_have_few_plays(recommender: BaseRecommender) -> None:
    assert isinstance(recommender, TwoStepRecommender)
    play_counts = recommender.source.retrieval.plays.plays
    has_few_plays = few_plays(recommender, np.arange(NUM_SONGS + 3))
    np.testing.assert_array_equal(has_few_plays[:NUM_SONGS], play_counts < FEW_PLAYS)
    assert has_few_plays[NUM_SONGS:].all()


def test_only_the_workers_of_a_batch_read_the_arrays_of_the_recommender(
    world: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be larger than the memory and the disk of the driver's node."""
    without_ray(monkeypatch)
    read_array, worker_paths = Workspace.read_array, []

    def read_in_worker(workspace: Workspace, path: str, *arguments: str) -> np.ndarray:
        assert IN_WORKER, f"the driver reads {path}"
        worker_paths.append(path)
        return read_array(workspace, path, *arguments)

    monkeypatch.setattr(Workspace, "read_array", read_in_worker)
    recommend_all(world, RecommendConfig(k=7), default_parts(world), at=AT)
    assert worker_paths


def test_command_and_batch_explore_the_same_songs(
    world: Workspace, recommender: BaseRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    config, dataset = RecommendConfig(k=10, explore=0.3), Dataset(world)
    parts = default_parts(world)
    artifact = recommend_all(world, config, parts, at=AT)
    table = world.read_table(recommendations_file(artifact.folder, 0)).slice(0, 3)
    for row in table.to_pylist():
        single_answer = answer(dataset, recommender, config, parts=parts, at=AT, user=row["user_id"])
        assert single_answer.song_ids == row["song_ids"]
        assert [song.explored for song in single_answer.songs] == [
            probability is not None for probability in row["probabilities"]
        ]
        assert sum(song.explored for song in single_answer.songs) == 3
        assert single_answer.songs[1].probability == pytest.approx(row["probabilities"][1], abs=1e-6)


def test_a_share_outside_zero_to_one_is_refused() -> None:
    with pytest.raises(InputError, match="explore"):
        RecommendConfig(explore=1.5)
    with pytest.raises(InputError, match="explore"):
        AnswerOptions(k=1, explore=-0.1)
