"""The user top baseline against counts worked out by hand."""

import numpy as np

from rayrec.data.histories import Histories, Queries
from rayrec.recommend.baselines import LATEST, UserTopRecommender

NUM_SONGS = 5


def _histories(*lists: list[int]) -> Histories:
    return Histories.from_lists(list(lists), [list(range(len(songs))) for songs in lists])


def test_a_song_scores_the_times_it_was_played_before_the_query() -> None:
    histories = _histories([1, 2, 1, 1, 3], [], [4])
    scores = UserTopRecommender(NUM_SONGS).score(histories, Queries.before_plays(histories, np.array([0, 3, 4, 5])))
    np.testing.assert_array_equal(
        np.floor(scores), [[0, 0, 0, 0, 0], [0, 2, 1, 0, 0], [0, 3, 1, 0, 0], [0, 0, 0, 0, 0]]
    )


def test_songs_played_equally_often_are_ordered_by_their_last_play() -> None:
    histories = _histories([2, 1, 3, 1, 4])
    queries = Queries.before_plays(histories, np.array([3, 4]))
    before_second_play, after_it = UserTopRecommender(NUM_SONGS).score(histories, queries)
    assert np.argsort(-before_second_play, kind="stable").tolist()[:3] == [3, 1, 2]
    assert np.argsort(-after_it, kind="stable").tolist()[:3] == [1, 3, 2]


def test_only_the_latest_plays_of_a_long_history_count() -> None:
    histories = _histories([0] * 7 + [1, 2] * (LATEST // 2))
    scores = UserTopRecommender(NUM_SONGS).score(histories, Queries.at_end(histories, 0))
    np.testing.assert_array_equal(np.floor(scores), [[0, LATEST // 2, LATEST // 2, 0, 0]])


def test_songs_newer_than_the_model_are_not_counted() -> None:
    histories = _histories([NUM_SONGS, 2, NUM_SONGS + 3])
    scores = UserTopRecommender(NUM_SONGS).score(histories, Queries.at_end(histories, 0))
    np.testing.assert_array_equal(np.floor(scores), [[0, 0, 1, 0, 0]])
