"""Own rules against counts by hand."""

import numpy as np
import pytest
from worlds import random_histories

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.own_rules import OwnRulesRecommender
from rayrec.recommend.sequential_rules import MAX_DISTANCE, SequentialRulesRecommender, count_rules

NUM_SONGS = 14


def _songs(*lists: list[int]) -> Histories:
    return Histories.from_lists(list(lists), [list(range(len(one))) for one in lists])


def _score(songs: list[int]) -> np.ndarray:
    histories = _songs(songs)
    return np.asarray(OwnRulesRecommender(NUM_SONGS).score(histories, Questions.at_end(histories, 0)))[0]


def test_what_followed_the_last_song_counts_by_its_distance() -> None:
    expected = np.zeros(NUM_SONGS)
    np.add.at(expected, [2, 3, 1, 2, 4, 1], 1 / np.arange(1, 7))  # what followed the first play of song 1
    np.add.at(expected, [2, 4, 1], 1 / np.arange(1, 4))  # what followed the second
    np.testing.assert_allclose(_score([1, 2, 3, 1, 2, 4, 1]), expected, rtol=1e-6)


def test_a_song_heard_once_has_no_rule() -> None:
    np.testing.assert_array_equal(_score([1, 2, 3]), 0)
    np.testing.assert_array_equal(_score([]), 0)


def test_plays_too_far_behind_do_not_count() -> None:
    scores = _score([0, *range(1, MAX_DISTANCE + 2), 0])
    assert scores[MAX_DISTANCE] == pytest.approx(1 / MAX_DISTANCE)
    assert scores[MAX_DISTANCE + 1] == 0


def test_newer_songs_neither_ask_nor_answer() -> None:
    np.testing.assert_array_equal(_score([NUM_SONGS + 1, 2, NUM_SONGS + 1]), 0)
    np.testing.assert_array_equal(_score([NUM_SONGS - 1, 2, NUM_SONGS]), 0)
    scores = _score([1, NUM_SONGS, 2, 1])
    np.testing.assert_allclose(scores[[1, 2]], [1 / 3, 1 / 2], rtol=1e-6)


def test_at_every_place_it_is_the_sequential_rules_of_what_the_user_played_before() -> None:
    histories = random_histories(8, NUM_SONGS, seed=6)
    plays = np.random.default_rng(0).permutation(histories.num_plays)
    questions = Questions.before_plays(histories, plays)
    found = OwnRulesRecommender(NUM_SONGS).score(histories, questions)
    assert found.any()
    for row, (user, seen) in enumerate(zip(questions.rows, questions.seen, strict=True)):
        start = histories.offsets[user]
        before = _songs(histories.songs[start : start + seen].tolist())
        rules = SequentialRulesRecommender(count_rules(before, NUM_SONGS, MAX_DISTANCE))
        np.testing.assert_allclose(found[row], rules.score(before, Questions.at_end(before, 0))[0], rtol=1e-5)
