from itertools import pairwise

import numpy as np
import pytest

from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.embeddings import word2vec
from rayrec.embeddings.word2vec import MINUTE_MS, Sentences
from rayrec.errors import LeakError


def as_lists(sentences: Sentences) -> list[list[int]]:
    songs, offsets = sentences
    return [songs[start:stop].tolist() for start, stop in pairwise(offsets)]


def minutes_to_ms(*minutes: float) -> list[int]:
    return [round(minute * MINUTE_MS) for minute in minutes]


def test_a_pause_over_the_gap_starts_a_session_and_a_pause_of_the_gap_does_not() -> None:
    histories = Histories.from_lists([[1, 2, 3, 4]], [minutes_to_ms(0, 30, 60.001, 61)])
    assert as_lists(word2vec.cut_sessions(histories, 30)) == [[1, 2], [3, 4]]


def test_no_session_spans_two_users() -> None:
    histories = Histories.from_lists(
        [[1, 2], [], [3], [4, 5]], [minutes_to_ms(0, 1), [], minutes_to_ms(1), minutes_to_ms(1, 2)]
    )
    assert as_lists(word2vec.cut_sessions(histories)) == [[1, 2], [3], [4, 5]]


@pytest.mark.parametrize("users", [0, 2])
def test_no_plays_give_no_sessions(users: int) -> None:
    songs, offsets = word2vec.cut_sessions(Histories.from_lists([[]] * users, [[]] * users))
    assert len(songs) == 0
    assert offsets.tolist() == [0]


def test_sessions_equal_those_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(0, 30, size=50)
    songs = [random.integers(0, 99, size=length).tolist() for length in lengths]
    times = [np.cumsum(random.exponential(20 * MINUTE_MS, size=length).astype(int)).tolist() for length in lengths]
    expected = []
    for user_songs, user_times in zip(songs, times, strict=True):
        for position, (song, time) in enumerate(zip(user_songs, user_times, strict=True)):
            if position == 0 or time - user_times[position - 1] > 30 * MINUTE_MS:
                expected.append([song])
            else:
                expected[-1].append(song)
    assert as_lists(word2vec.cut_sessions(Histories.from_lists(songs, times))) == expected


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7])
def test_long_sentences_are_cut_into_pieces_of_the_limit(limit: int) -> None:
    sentences = (np.arange(12, dtype=np.int32), np.array([0, 7, 7, 8, 12]))
    expected = []
    for sentence in as_lists(sentences):
        expected += [sentence[start : start + limit] for start in range(0, len(sentence), limit)] or [[]]
    assert as_lists(word2vec.cut_long(sentences, limit)) == expected


def test_sentences_of_fewer_than_two_songs_are_dropped() -> None:
    sentences = (np.arange(6, dtype=np.int32), np.array([0, 1, 3, 3, 4, 6]))
    assert as_lists(word2vec.drop_short_sentences(sentences)) == [[1, 2], [4, 5]]


def test_playlists_come_batch_by_batch_with_long_ones_cut() -> None:
    long_playlist = np.zeros(word2vec.MAX_SENTENCE + 2, dtype=np.int32)
    batches = [(np.array([1, 2, 3], np.int32), np.array([0, 2, 3])), (long_playlist, np.array([0, len(long_playlist)]))]
    first, second = word2vec.from_playlists(batches, FitRange())
    assert as_lists(first) == [[1, 2]]
    assert np.diff(second[1]).tolist() == [word2vec.MAX_SENTENCE, 2]


def test_a_fit_refuses_plays_past_the_cut() -> None:
    histories = Histories.from_lists([[1, 2, 3]], [minutes_to_ms(0, 1, 2)])
    allowed = FitRange(before=2 * MINUTE_MS)
    with pytest.raises(LeakError, match="1 plays at or after its cut"):
        list(word2vec.from_histories([histories], allowed))
    assert as_lists(next(word2vec.from_histories([allowed.select(histories)], allowed))) == [[1, 2]]


def test_a_fit_refuses_held_out_users() -> None:
    histories = Histories.from_lists([[1, 2]] * 40, [minutes_to_ms(0, 1)] * 40)
    with pytest.raises(LeakError, match="held out"):
        list(word2vec.from_histories([histories], FitRange(held_out_share=0.5)))
