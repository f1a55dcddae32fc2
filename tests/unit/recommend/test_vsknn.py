"""V-SKNN against scores worked out by hand."""

from collections.abc import Iterable

import numpy as np
import pytest
from networks import MINUTE
from worlds import random_histories

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.errors import LeakError
from rayrec.recommend import session_knn as module
from rayrec.recommend.session_knn import VsknnRecommender, VsknnSettings

NUM_SONGS = 10


def _sessions(*lists: list[int]) -> Histories:
    """One user per session, with plays a minute apart."""
    return Histories.from_lists(list(lists), [[position * MINUTE for position in range(len(songs))] for songs in lists])


def _fit(*batches: Histories, num_songs: int = NUM_SONGS, max_sessions: int = 100) -> VsknnRecommender:
    return VsknnRecommender.fit(batches, num_songs=num_songs, allowed=FitRange(), max_sessions=max_sessions)


def _score(recommender: VsknnRecommender, songs: list[int]) -> np.ndarray:
    histories = _sessions(songs)
    return np.asarray(recommender.score(histories, Queries.at_end(histories, 0)))[0]


def _row(**scores: float) -> np.ndarray:
    """float64 (N,): zeros except for `scores`, given as song3=0.5."""
    row = np.zeros(NUM_SONGS)
    for name, score in scores.items():
        row[int(name.removeprefix("song"))] = score
    return row


def test_a_session_weighs_what_it_shares_over_the_root_of_its_songs() -> None:
    recommender = _fit(_sessions([1, 2, 3, 4], [0, 9]))
    # Shared songs: 2, the last play, weighs 1, and 1, the play before, 0.8; the root of four songs divides by 2.
    np.testing.assert_allclose(_score(recommender, [1, 2]), _row(song1=0.9, song2=0.9, song3=0.9, song4=0.9), rtol=1e-6)


def test_songs_of_several_neighbors_add_up() -> None:
    recommender = _fit(_sessions([1, 2], [2, 3]))
    near_score, far_score = 1 / np.sqrt(2), 0.8 / np.sqrt(2)
    np.testing.assert_allclose(
        _score(recommender, [1, 3]), _row(song1=far_score, song2=near_score + far_score, song3=near_score), rtol=1e-6
    )


@pytest.mark.parametrize(("back", "weight"), [(0, 1.0), (1, 0.8), (2, 0.6), (3, 0.4), (4, 0.2), (5, 0.0)])
def test_the_last_five_plays_weigh_less_the_longer_ago(back: int, weight: float) -> None:
    recommender = _fit(_sessions([1, 2]))
    songs = [1] + [5] * back
    assert _score(recommender, songs)[2] == pytest.approx(weight / np.sqrt(2))


def test_a_song_played_again_adds_up_in_the_query_and_counts_once_in_a_session() -> None:
    recommender = _fit(_sessions([1, 2, 1, 2, 2]))
    np.testing.assert_allclose(_score(recommender, [1, 1]), _row(song1=1.8, song2=1.8) / np.sqrt(2), rtol=1e-6)


def test_only_the_plays_before_a_query_are_compared() -> None:
    recommender = _fit(_sessions([1, 2], [3, 4]))
    histories = _sessions([0], [1, 3])
    scores = recommender.score(histories, Queries.before_plays(histories, np.array([2, 1])))
    np.testing.assert_allclose(scores, [_row(song1=1, song2=1) / np.sqrt(2), _row()], rtol=1e-6)


def test_a_pause_of_over_thirty_minutes_begins_another_session() -> None:
    plays = Histories.from_lists([[1, 2, 3, 4, 5]], [[0, 30 * MINUTE, 60 * MINUTE + 1, 61 * MINUTE, 200 * MINUTE]])
    sessions = _fit(plays).sessions.toarray()
    np.testing.assert_array_equal(sessions, [_row(song1=1, song2=1), _row(song3=1, song4=1)])  # 5 alone is left out


def test_users_share_no_session() -> None:
    assert _score(_fit(_sessions([1, 2], [3, 4])), [2])[3] == 0


def test_only_the_songs_of_the_nearest_sessions_are_scored() -> None:
    recommender = _fit(_sessions([1, 2], [1, 3, 4], [1, 5, 6, 7], [8, 9])).with_settings(VsknnSettings(neighbors=2))
    scores = _score(recommender, [1])
    np.testing.assert_array_equal(np.flatnonzero(scores), [1, 2, 3, 4])
    assert scores[1] == pytest.approx(1 / np.sqrt(2) + 1 / np.sqrt(3))


def test_sessions_as_near_as_the_last_of_the_nearest_count_too() -> None:
    recommender = _fit(_sessions([1, 2], [1, 3], [1, 4], [1, 5, 6])).with_settings(VsknnSettings(neighbors=2))
    scores = _score(recommender, [1])
    np.testing.assert_array_equal(np.flatnonzero(scores), [1, 2, 3, 4])


def test_two_hundred_sessions_count_by_default() -> None:
    # Session n holds song 0 and n + 1 more songs, so that no two sessions are equally near.
    lists = [[0, *range(1, 2 + n)] for n in range(250)]
    scores = _score(_fit(_sessions(*lists), num_songs=251, max_sessions=250), [0])
    assert scores[200] > 0
    assert scores[201] == 0


def test_queries_are_answered_alike_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    histories = random_histories(40, NUM_SONGS, seed=2)
    recommender, queries = _fit(histories), Queries.at_end(histories, 0)
    expected = recommender.score(histories, queries)
    monkeypatch.setattr(module, "QUERIES_AT_ONCE", 7)
    np.testing.assert_array_equal(recommender.score(histories, queries), expected)


def test_unknown_songs_and_no_songs_find_no_neighbors() -> None:
    recommender = _fit(_sessions([1, 2]))
    np.testing.assert_array_equal(_score(recommender, [7]), _row())
    np.testing.assert_array_equal(_score(recommender, []), _row())
    np.testing.assert_allclose(
        _score(recommender, [1, NUM_SONGS + 3]), _row(song1=0.8, song2=0.8) / np.sqrt(2), rtol=1e-6
    )


def test_a_fit_of_no_plays_answers_zeros() -> None:
    np.testing.assert_array_equal(_score(_fit(), [1, 2]), _row())
    np.testing.assert_array_equal(_score(_fit(_sessions([1])), [1]), _row())


@pytest.mark.parametrize("max_sessions", [1, 2, 3, 4, 9])
def test_the_sessions_read_last_are_kept(max_sessions: int) -> None:
    lists = [[song, song + 1] for song in range(6)]
    batches: Iterable[Histories] = (_sessions(*lists[:1]), _sessions(*lists[1:3]), _sessions(*lists[3:]))
    actual = _fit(*batches, max_sessions=max_sessions).sessions.toarray()
    expected = _fit(_sessions(*lists[-max_sessions:])).sessions.toarray()
    np.testing.assert_array_equal(actual, expected)


def test_plays_past_the_cut_are_refused() -> None:
    with pytest.raises(LeakError, match="1 plays at or after its cut"):
        VsknnRecommender.fit([_sessions([1, 2, 3])], num_songs=NUM_SONGS, allowed=FitRange(before=2 * MINUTE))
