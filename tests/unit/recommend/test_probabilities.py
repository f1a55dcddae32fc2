"""A score is the chance of a song to be the next play, with or without songs that the user has heard."""

import numpy as np
import pytest
from networks import model_config, network
from rankings import retrieval_of
from worlds import random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.recommend.filters import without_heard
from rayrec.recommend.ranker import RankerSettings, fit_ranker
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import CandidateSource, RankerKind, TwoStepRecommender, examples_for

NUM_SONGS, MINUTE, PLAYS_PER_USER = 60, 60_000, 8
REPEAT_SHARE = 0.6  # share of the last plays that are songs which their users have heard


def _users(count: int, seed: int) -> Histories:
    """Users who play song n + 1 after song n; a share REPEAT_SHARE of them plays the first song again as the last."""
    random = np.random.default_rng(seed)
    starts, repeats = random.integers(NUM_SONGS, size=count), random.random(count) < REPEAT_SHARE
    songs = [
        [*((start + np.arange(PLAYS_PER_USER)) % NUM_SONGS), start if repeat else (start + PLAYS_PER_USER) % NUM_SONGS]
        for start, repeat in zip(starts.tolist(), repeats.tolist(), strict=True)
    ]
    times = [[MINUTE * position for position in range(PLAYS_PER_USER + 1)] for _ in songs]
    return Histories.from_lists(songs, times, [f"{seed}-{row}" for row in range(count)])


def _last_plays(histories: Histories) -> tuple[Queries, np.ndarray, np.ndarray]:
    """The query before each user's last play, the songs of these plays, and bool (Q,): True for songs heard before."""
    plays = histories.offsets[1:] - 1
    songs = histories.songs[plays]
    return Queries.before_plays(histories, plays), songs, songs == histories.songs[histories.offsets[:-1]]


@pytest.fixture(scope="module")
def source() -> CandidateSource:
    recommender = TasteRecommender(network(model_config(num_songs=NUM_SONGS)), random_vectors(NUM_SONGS))
    return CandidateSource(recommender, retrieval_of([_users(200, 0)], num_songs=NUM_SONGS))


def test_held_out_queries_that_a_heard_song_answers_count_as_misses_among_new_songs(source: CandidateSource) -> None:
    histories = _users(100, 1)
    queries, songs, is_heard = _last_plays(histories)
    held_out = np.arange(len(queries)) % 2 == 0
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"served": (np.arange(len(queries)), songs)}
    examples = examples_for(source, histories, queries, answers, held_out=held_out)["served"]
    assert 20 < (is_heard & held_out).sum() < held_out.sum() - 10
    assert examples.held_out.sum() == held_out.sum()
    assert examples.has_right_candidate.sum() == (~is_heard).sum()
    assert examples.has_right_candidate[~examples.held_out].all()  # no ranker learns from a miss
    is_miss = np.isin(examples.rows, np.flatnonzero(~examples.has_right_candidate))
    assert is_miss.any()
    assert not examples.features[is_miss, source.sources.names.index("user_plays")].any()  # only new songs


def test_probabilities_of_new_songs_are_those_of_all_next_plays(source: CandidateSource) -> None:
    training_histories = _users(600, 1)
    queries, songs, _ = _last_plays(training_histories)
    rows = np.arange(len(queries))
    answers: dict[RankerKind, tuple[np.ndarray, np.ndarray]] = {"next": (rows, songs), "served": (rows, songs)}
    examples = examples_for(source, training_histories, queries, answers, held_out=rows % 4 == 0)
    settings = RankerSettings(trees=20, min_leaf=10)
    rankers = {kind: fit_ranker(part, source.sources.names, settings).ranker for kind, part in examples.items()}
    histories = _users(400, 2)
    queries, songs, is_heard = _last_plays(histories)
    earlier_histories = histories.keep(histories.places < PLAYS_PER_USER)
    filters = without_heard(earlier_histories)
    for kinds in (("next",), ("next", "served")):  # without and with a ranker of new songs
        recommender = TwoStepRecommender(source, {kind: rankers[kind] for kind in kinds})  # type: ignore[misc]
        ranking = recommender.rank_queries(histories, queries, 1, filters=filters)
        is_right = ranking.songs[:, 0] == songs
        assert is_right.mean() == pytest.approx((~is_heard).mean(), abs=0.02)  # right if the user did not repeat a song
        assert ranking.scores.mean() == pytest.approx(is_right.mean(), abs=0.07), kinds
