"""One test suite for all recommenders. A line in MAKERS adds a new recommender."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from rankings import fit_rankers
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.data.top_k import top_k
from rayrec.errors import InputError
from rayrec.model.network import TasteModel
from rayrec.model.train_config import FeatureSpec, ModelConfig
from rayrec.model.train_config import Horizon as Offsets
from rayrec.recommend import base as recommender_module
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import (
    AverageRecommender,
    ItemKnnRecommender,
    PopularityRecommender,
    SequentialRulesRecommender,
    UserTopRecommender,
    fit_weighted,
)
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import CandidateSource, TwoStepRecommender

NUM_SONGS = 40
WITHOUT_VECTOR = 7
NOW = 10**9

Maker = Callable[[Histories, np.ndarray], BaseRecommender]


def _indexed_knn(plays: Histories, vectors: np.ndarray) -> BaseRecommender:
    recommender = ItemKnnRecommender(vectors)
    recommender.index = SongIndex.build(recommender.song_vectors, IndexConfig())
    return recommender


def _network(_: Histories, vectors: np.ndarray) -> TasteRecommender:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        num_songs=NUM_SONGS,
        embedding_dim=vectors.shape[1],
        hidden_dim=12,
        num_layers=1,
        dropout=0.0,
        features=FeatureSpec(),
        horizons={"short": Offsets(min_offset=1, max_offset=1)},
        song_table="frozen",
        logit_scales={"short": 9.0},
        cell="gru",
        averages=(),
        input_table=False,
    )
    return TasteRecommender(TasteModel(config, torch.from_numpy(vectors)).eval(), vectors)


def _two_step(plays: Histories, vectors: np.ndarray) -> BaseRecommender:
    network = _network(plays, vectors)
    retrieval, rankers = fit_rankers(network, plays)
    return TwoStepRecommender(CandidateSource(network, retrieval), rankers)


MAKERS: dict[str, Maker] = {
    "popularity": lambda plays, _: PopularityRecommender.fit([plays], num_songs=NUM_SONGS, allowed=FitRange()),
    "sequential-rules": lambda plays, _: SequentialRulesRecommender.fit(
        [plays], num_songs=NUM_SONGS, allowed=FitRange()
    ),
    "vsknn": lambda plays, _: VsknnRecommender.fit([plays], num_songs=NUM_SONGS, allowed=FitRange()),
    "popularity-recent": lambda plays, _: PopularityRecommender.fit(
        [plays], num_songs=NUM_SONGS, allowed=FitRange(), since=20 * 60_000
    ),
    "vstan": lambda plays, _: VstanRecommender.fit([plays], num_songs=NUM_SONGS, allowed=FitRange()),
    "weighted-short": lambda plays, vectors: fit_weighted([plays], vectors, "weighted-short", FitRange(), None),
    "weighted-long": lambda plays, vectors: fit_weighted([plays], vectors, "weighted-long", FitRange(), None),
    "user-top": lambda plays, _: UserTopRecommender(NUM_SONGS),
    "item-knn": lambda _, vectors: ItemKnnRecommender(vectors),
    "neighbors through an index": _indexed_knn,
    "average-0.5": lambda _, vectors: AverageRecommender(vectors, 0.5),
    "average-1.0": lambda _, vectors: AverageRecommender(vectors, 1.0),
    "taste": _network,
    "two-step": _two_step,
}


@pytest.fixture(scope="module")
def histories() -> Histories:
    """Users with at least one play."""
    all_histories = random_histories(30, NUM_SONGS, seed=3)
    return all_histories.take(all_histories.lengths > 0)


@pytest.fixture(scope="module", params=list(MAKERS))
def recommender(request: pytest.FixtureRequest) -> BaseRecommender:
    vectors = random_vectors(NUM_SONGS)
    vectors[WITHOUT_VECTOR] = 0
    return MAKERS[request.param](random_histories(60, NUM_SONGS, seed=1), vectors)


def test_answers_have_the_promised_shapes_and_types(recommender: BaseRecommender, histories: Histories) -> None:
    songs, scores = recommender.recommend(histories, NOW, 5)
    assert songs.shape == scores.shape == (len(histories), 5)
    assert songs.dtype == np.int32
    assert scores.dtype == np.float32
    single_songs, single_scores = recommender.recommend_one(histories.take(np.array([0])), NOW, 5)
    assert single_songs.ndim == single_scores.ndim == 1
    assert recommender.name in MAKERS
    assert recommender.kind in ("baseline", "network")


def test_scores_are_float32_for_every_query_and_song(recommender: BaseRecommender, histories: Histories) -> None:
    scores = recommender.score(histories, Queries.at_end(histories, NOW))
    assert scores.shape == (len(histories), NUM_SONGS)
    assert scores.dtype == np.float32


def test_a_batch_answers_as_each_user_alone(recommender: BaseRecommender, histories: Histories) -> None:
    songs, scores = recommender.recommend(histories, NOW, 6)
    for row in range(len(histories)):
        single_songs, single_scores = recommender.recommend_one(histories.take(np.array([row])), NOW, 6)
        batch_songs, batch_scores = songs[row][songs[row] >= 0], scores[row][songs[row] >= 0]
        np.testing.assert_allclose(single_scores, batch_scores, rtol=1e-5, atol=1e-6)
        # Songs whose scores differ only by rounding may change places.
        score_steps = np.diff(batch_scores, prepend=np.inf, append=-np.inf)
        is_clear = (-score_steps[:-1] > 1e-5) & (-score_steps[1:] > 1e-5)
        is_clear[-1:] = False  # the last song may tie with the next one, which is outside the answer
        np.testing.assert_array_equal(single_songs[is_clear], batch_songs[is_clear])


def test_answers_are_the_top_of_the_scores(recommender: BaseRecommender, histories: Histories) -> None:
    songs, scores = recommender.recommend(histories, NOW, 8)
    expected_songs, expected_scores = top_k(np.array(recommender.score(histories, Queries.at_end(histories, NOW))), 8)
    np.testing.assert_array_equal(songs, expected_songs)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_best_comes_first_and_no_song_twice(recommender: BaseRecommender, histories: Histories) -> None:
    songs, scores = recommender.recommend(histories, NOW, 10)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row in songs:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_more_than_the_catalog_fills_with_no_song(recommender: BaseRecommender, histories: Histories) -> None:
    songs, scores = recommender.recommend(histories, NOW, NUM_SONGS + 5)
    assert (songs[:, NUM_SONGS:] == -1).all()
    assert np.isneginf(scores[songs == -1]).all()
    assert np.isfinite(scores[songs >= 0]).all()


def test_songs_heard_stay_out_when_asked(recommender: BaseRecommender, histories: Histories) -> None:
    heard_songs = [set(songs) for songs in np.split(histories.songs, histories.offsets[1:-1])]
    songs, _ = recommender.recommend(histories, NOW, NUM_SONGS, exclude_heard=True)
    assert all(not heard_songs[row] & set(songs[row]) for row in range(len(histories)))
    if isinstance(recommender, TwoStepRecommender):
        return  # another ranker, with another order, ranks songs new to the user
    all_songs, _ = recommender.recommend(histories, NOW, NUM_SONGS)
    for row in range(len(histories)):
        expected = [song for song in all_songs[row] if song >= 0 and song not in heard_songs[row]]
        assert expected == [song for song in songs[row] if song >= 0]


def test_plays_after_the_query_change_nothing(recommender: BaseRecommender, histories: Histories) -> None:
    plays = np.arange(0, histories.num_plays, 3)
    queries = Queries.before_plays(histories, plays)
    expected = np.array(recommender.score(histories, queries))
    plays_before = np.zeros(len(histories), dtype=np.int64)
    np.maximum.at(plays_before, queries.rows, queries.plays_before)
    is_later = np.arange(histories.num_plays) - histories.offsets[histories.rows] >= plays_before[histories.rows]
    assert is_later.any()
    changed_histories = replace(
        histories,
        songs=np.where(is_later, (histories.songs + 5) % NUM_SONGS, histories.songs).astype(np.int32),
        played_at=histories.played_at + is_later * 1000,
    )
    np.testing.assert_array_equal(recommender.score(changed_histories, queries), expected)


def test_a_query_in_the_middle_is_answered_as_if_history_ended_there(
    recommender: BaseRecommender, histories: Histories
) -> None:
    plays = np.flatnonzero(np.arange(histories.num_plays) > histories.offsets[histories.rows])[::-2]
    queries = Queries.before_plays(histories, plays)
    batch_scores = recommender.score(histories, queries)
    for query in range(0, len(queries), 20):
        row, plays_before = queries.rows[query], queries.plays_before[query]
        earlier = slice(histories.offsets[row], histories.offsets[row] + plays_before)
        cut = Histories.from_lists([histories.songs[earlier]], [histories.played_at[earlier]])  # type: ignore[list-item]
        single_scores = recommender.score(cut, Queries.at_end(cut, queries.at[query]))[0]
        np.testing.assert_allclose(single_scores, batch_scores[query], rtol=1e-5, atol=1e-6)


def test_cutting_the_scores_into_chunks_changes_nothing(
    recommender: BaseRecommender, histories: Histories, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = Queries.at_end(histories, NOW)
    expected = recommender.score(histories, queries)
    monkeypatch.setattr(recommender_module, "SCORES_IN_CACHE", 3 * NUM_SONGS)
    monkeypatch.setattr(recommender_module, "QUERIES_PER_PASS", 1)
    chunks = list(recommender.score_chunks(histories, queries))
    assert len(chunks) == -(-len(histories) // 3)
    np.testing.assert_allclose(np.concatenate([scores for _, scores in chunks]), expected, rtol=1e-5, atol=1e-6)


def test_a_user_without_plays_is_answered_without_an_error(recommender: BaseRecommender) -> None:
    histories = Histories.from_lists([[], [1, 2]], [[], [1, 2]])
    songs, scores = recommender.recommend(histories, NOW, 3)
    assert songs.shape == scores.shape == (2, 3)


def test_no_users_get_no_answers(recommender: BaseRecommender) -> None:
    songs, scores = recommender.recommend(Histories.from_lists([], []), NOW, 3)
    assert songs.shape == scores.shape == (0, 3)


def test_a_count_below_one_is_refused(recommender: BaseRecommender, histories: Histories) -> None:
    with pytest.raises(InputError, match="k is 0; expected at least 1"):
        recommender.recommend(histories, NOW, 0)


def test_songs_newer_than_the_recommender_do_no_harm(recommender: BaseRecommender, histories: Histories) -> None:
    newer_histories = replace(
        histories, songs=np.where(np.arange(histories.num_plays) % 7, histories.songs, NUM_SONGS + 2)
    )
    songs, scores = recommender.recommend(newer_histories, NOW, NUM_SONGS, exclude_heard=True)
    for row, heard_songs in enumerate(np.split(newer_histories.songs, newer_histories.offsets[1:-1])):
        assert not set(heard_songs) & set(songs[row])
        assert songs[row].max() < NUM_SONGS
    assert (np.isfinite(scores) == (songs >= 0)).all()
    all_songs, _ = recommender.recommend(newer_histories, NOW, 5)
    first_songs, _ = recommender.recommend(newer_histories.take(np.arange(3)), NOW, 5)
    np.testing.assert_array_equal(first_songs, all_songs[:3])
