"""V-STAN against scores worked out by hand."""

import numpy as np
import pytest
from networks import MINUTE
from worlds import random_histories

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.split import FitRange
from rayrec.recommend import session_knn as module
from rayrec.recommend.session_knn import VstanRecommender, VstanSettings

NUM_SONGS = 12
DEFAULTS = VstanSettings()


def _sessions(*lists: list[int], days: list[float] | None = None) -> Histories:
    """One user per session, which ends at the time in `days`, by default at 0."""
    days = days or [0.0] * len(lists)
    times = [
        [round(day * DAY_MS) - (len(songs) - 1 - position) * MINUTE for position in range(len(songs))]
        for songs, day in zip(lists, days, strict=True)
    ]
    return Histories.from_lists(list(lists), times)


def _fit(*batches: Histories, max_sessions: int = 100) -> VstanRecommender:
    return VstanRecommender.fit(batches, num_songs=NUM_SONGS, allowed=FitRange(), max_sessions=max_sessions)


def _score(recommender: VstanRecommender, songs: list[int], at: int = 0) -> np.ndarray:
    histories = _sessions(songs)
    return np.asarray(recommender.score(histories, Queries.at_end(histories, at)))[0]


def test_a_song_weighs_less_the_farther_from_the_matched_one() -> None:
    scores = _score(_fit(_sessions([1, 2, 3, 4])), [3])
    distances = np.array([2, 1, 0, 1])
    expected = np.exp(-distances / DEFAULTS.distance_decay) / 2 * np.where(distances == 0, DEFAULTS.just_played, 1)
    np.testing.assert_allclose(scores[1:5], expected, rtol=1e-5)
    assert not scores[[0, *range(5, NUM_SONGS)]].any()


def test_distances_count_from_the_shared_song_that_was_played_last() -> None:
    scores = _score(_fit(_sessions([1, 2, 3, 4, 5, 6])), [5, 2])
    session_weight = (1 + np.exp(-1 / DEFAULTS.plays_decay)) / np.sqrt(6)  # 2 was played last, 5 before it
    np.testing.assert_allclose(scores[6], session_weight * np.exp(-4 / DEFAULTS.distance_decay), rtol=1e-5)
    np.testing.assert_allclose(scores[3], session_weight * np.exp(-1 / DEFAULTS.distance_decay), rtol=1e-5)


@pytest.mark.parametrize("back", [0, 1, 3, 9])
def test_plays_weigh_less_the_longer_ago(back: int) -> None:
    songs = [1] + [11] * back
    expected = np.exp(-back / DEFAULTS.plays_decay) / np.sqrt(2) * np.exp(-1 / DEFAULTS.distance_decay)
    np.testing.assert_allclose(_score(_fit(_sessions([1, 2])), songs)[2], expected, rtol=1e-5)


def test_the_eleventh_last_play_has_no_weight() -> None:
    assert not _score(_fit(_sessions([1, 2])), [1] + [11] * 10).any()


def test_old_sessions_weigh_less_and_sessions_after_the_query_count_as_new() -> None:
    recommender = _fit(_sessions([1, 2], [1, 3], [1, 4], days=[0, 100, 300]))
    scores = _score(recommender, [1], at=200 * DAY_MS)
    new_session_score = np.exp(-1 / DEFAULTS.distance_decay) / np.sqrt(2)
    expected = new_session_score * np.exp(-np.array([200, 100, 0]) / DEFAULTS.days_decay)
    np.testing.assert_allclose(scores[2:5], expected, rtol=1e-5)


def test_a_song_played_again_in_a_session_stands_where_it_stood_last() -> None:
    scores = _score(_fit(_sessions([1, 2, 3, 1])), [1])
    np.testing.assert_allclose(scores[3] / scores[2], np.exp(1 / DEFAULTS.distance_decay), rtol=1e-5)


def test_songs_of_several_neighbors_add_up() -> None:
    first, second = _fit(_sessions([1, 2])), _fit(_sessions([1, 2, 3]))
    combined = _fit(_sessions([1, 2]), _sessions([1, 2, 3]))
    np.testing.assert_allclose(_score(combined, [1]), _score(first, [1]) + _score(second, [1]), rtol=1e-5)


def test_only_the_songs_of_the_nearest_sessions_are_scored() -> None:
    recommender = _fit(_sessions([1, 2], [1, 3, 4], [1, 5, 6, 7], [8, 9]))
    scores = _score(recommender.with_settings(VstanSettings(neighbors=2)), [1])
    np.testing.assert_array_equal(np.flatnonzero(scores), [1, 2, 3, 4])


def test_queries_are_answered_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = random_histories(40, NUM_SONGS, seed=2)
    recommender, queries = _fit(histories), Queries.at_end(histories, 0)
    expected = recommender.score(histories, queries)
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
    np.testing.assert_array_equal(recommender.score(histories, queries), expected)


def test_unknown_songs_and_no_songs_find_no_neighbors() -> None:
    recommender = _fit(_sessions([1, 2]))
    assert not _score(recommender, [7]).any()
    assert not _score(recommender, []).any()
    assert _score(recommender, [1, NUM_SONGS + 3])[2] > 0
    assert not _score(_fit(), [1, 2]).any()


@pytest.mark.parametrize("max_sessions", [1, 2, 3, 4, 9])
def test_the_sessions_read_last_are_kept(max_sessions: int) -> None:
    lists = [[song, song + 1] for song in range(6)]
    days = [float(song) for song in range(6)]
    batches = [_sessions(*lists[start:stop], days=days[start:stop]) for start, stop in ((0, 1), (1, 3), (3, 6))]
    actual = _fit(*batches, max_sessions=max_sessions)
    expected = _fit(_sessions(*lists[-max_sessions:], days=days[-max_sessions:]))
    np.testing.assert_array_equal(actual.sessions.toarray(), expected.sessions.toarray())
    np.testing.assert_array_equal(actual.ended_at, expected.ended_at)
