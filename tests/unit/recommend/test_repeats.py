"""What is known of repeats against counts by hand, and the gate against a planted chance."""

import numpy as np
import pytest
from scipy.special import expit
from worlds import random_histories

from rayrec.data.histories import Histories, Questions
from rayrec.recommend.repeats import LATEST, RepeatGate, Repeats, gate_features

NUM_SONGS = 12


@pytest.fixture(scope="module")
def histories() -> Histories:
    made = random_histories(20, NUM_SONGS, seed=5)
    return made.take(made.lengths > 0)


@pytest.fixture(scope="module")
def questions(histories: Histories) -> Questions:
    """After every number of plays of every user, the last user first."""
    rows = np.repeat(np.arange(len(histories)), histories.lengths + 1)[::-1].copy()
    seen = np.concatenate([np.arange(length + 1) for length in histories.lengths])[::-1].copy()
    return Questions(rows=rows, seen=seen, at=np.zeros(len(rows), np.int64))


def _before(histories: Histories, questions: Questions, question: int) -> list[int]:
    begin = int(histories.offsets[questions.rows[question]])
    songs: list[int] = histories.songs[begin : begin + questions.seen[question]].tolist()
    return songs


def test_songs_heard_are_those_played_before_the_question_each_once(histories: Histories, questions: Questions) -> None:
    repeats = Repeats.of(histories, questions, NUM_SONGS)
    for question in range(len(questions)):
        found = repeats.songs[repeats.asked == question].tolist()
        assert sorted(found) == sorted(set(_before(histories, questions, question)))


def test_songs_newer_than_the_catalog_are_not_told(histories: Histories, questions: Questions) -> None:
    repeats = Repeats.of(histories, questions, 5)
    assert len(repeats.asked) == len(repeats.songs) > 0
    assert repeats.songs.max() == 4


def test_features_count_repeats_among_the_latest_plays(histories: Histories, questions: Questions) -> None:
    features = Repeats.of(histories, questions, NUM_SONGS).features
    for question in range(len(questions)):
        songs = _before(histories, questions, question)
        repeated = [song in songs[:place] for place, song in enumerate(songs)]
        shares = [(sum(repeated[-n:]) + 0.5) / (len(repeated[-n:]) + 1) for n in (*LATEST, 10**6)]
        np.testing.assert_allclose(features[question], [np.log1p(len(songs)), *shares])


def test_no_users_have_no_repeats() -> None:
    nobody = Histories.from_lists([], [])
    repeats = Repeats.of(nobody, Questions.at_end(nobody, 0), NUM_SONGS)
    assert repeats.features.shape == (0, 2 + len(LATEST))
    assert len(repeats.asked) == len(repeats.songs) == 0


def test_a_member_that_is_silent_gives_even_odds() -> None:
    nothing = Histories.from_lists([[1]], [[0]])
    repeats = Repeats.of(nothing, Questions.at_end(nothing, 1), NUM_SONGS)
    heard, new = np.array([[0], [0.75]], np.float32), np.array([[0], [0.25]], np.float32)
    odds = gate_features(repeats, heard, new)[0, -2:]
    np.testing.assert_allclose(odds, [0, np.log(0.76 / 0.26)], rtol=1e-6, atol=1e-12)


def test_the_gate_finds_a_planted_chance() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(40_000, 3))
    planted = np.array([-1.0, 2.0, 0.0, 0.5])
    chances = expit(planted[0] + features @ planted[1:])
    gate = RepeatGate.fit(features, random.random(len(chances)) < chances)
    np.testing.assert_allclose(gate.coefficients, planted, atol=0.06)
    np.testing.assert_allclose(gate.chances(features), chances, atol=0.03)


@pytest.mark.parametrize("repeated", [True, False])
def test_where_all_plays_are_alike_the_gate_still_leaves_a_chance(repeated: bool) -> None:
    chances = RepeatGate.fit(np.zeros((50, 2)), np.full(50, repeated)).chances(np.zeros((1, 2)))
    assert 0 < chances[0] < 1
    assert (chances[0] > 0.9) == repeated
