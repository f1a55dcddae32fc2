"""What single plays did to a taste vector, against histories without them."""

import numpy as np
import pytest
from networks import MINUTE, NUM_SONGS, model_config, network
from worlds import random_vectors

from rayrec.data.histories import Histories, Questions
from rayrec.model.train_config import FeatureSpec
from rayrec.recommend.explain import explain
from rayrec.recommend.taste_recommender import TasteRecommender

NOW = 100 * MINUTE


@pytest.fixture(scope="module")
def recommender() -> TasteRecommender:
    return TasteRecommender(network(), random_vectors(NUM_SONGS))


def history(songs: list[int]) -> Histories:
    return Histories.from_lists([songs], [[MINUTE * (1 + 2 * place) for place in range(len(songs))]])


def vector(recommender: TasteRecommender, plays: Histories, horizon: str = "short") -> np.ndarray:
    return recommender.vectors(plays, Questions.at_end(plays, NOW), horizon)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("horizon", ["short", "long"])
@pytest.mark.parametrize("count", [1, 4, 9, 50])
def test_a_play_moved_the_vector_by_what_it_is_without_it(
    recommender: TasteRecommender, count: int, horizon: str
) -> None:
    plays = history([5, 9, 2, 2, 40, 7, 33, 5, 12])
    songs = np.array([3, 12, 59])
    told = explain(recommender, plays, NOW, songs, horizon=horizon, count=count)  # type: ignore[arg-type]
    assert told.plays.tolist() == list(range(max(0, 9 - count), 9))
    taste = vector(recommender, plays, horizon)
    without = [vector(recommender, plays.keep(np.arange(9) != play), horizon) for play in told.plays]
    np.testing.assert_allclose(told.moved, [1 - taste @ other for other in without], atol=1e-5)
    gains = np.array([[(taste - other) @ recommender.song_vectors[song] for song in songs] for other in without])
    for song, because in enumerate(told.because):
        assert because == (told.plays[gains[:, song].argmax()] if gains[:, song].max() > 0 else -1)


def test_from_a_state_as_from_the_whole_history(recommender: TasteRecommender) -> None:
    plays, songs = history([5, 9, 2, 2, 40, 7, 33, 5, 12]), np.array([3, 12])
    whole = explain(recommender, plays, NOW, songs, count=4)
    late = np.arange(9) >= 3
    _, state = recommender.encoder.run(plays.keep(~late))
    told = explain(recommender, plays.keep(late), NOW, songs, count=4, start=state)
    np.testing.assert_allclose(told.moved, whole.moved, atol=1e-5)
    assert (told.because + 3 * (told.because >= 0)).tolist() == whole.because.tolist()


def test_the_one_song_that_says_something_moved_the_vector_most() -> None:
    """All other songs are unknown to the network, and it sees nothing of plays but their songs."""
    vectors = np.zeros((NUM_SONGS, 8), dtype=np.float32)
    vectors[7] = random_vectors(1)[0]
    blind = FeatureSpec(gap=False, hour=False, weekday=False, request_gap=False)
    made = network(model_config(features=blind))
    made.songs.weight.data[:] = 0
    made.songs.weight.data[7] = 1
    # The state must settle first, since a step on an unknown song moves it a little too.
    told = explain(TasteRecommender(made, vectors), history([1] * 60 + [2, 3, 7, 4, 5]), NOW, np.array([7]), count=5)
    assert told.plays[told.moved.argmax()] == 62
    assert told.moved.max() > 5 * np.sort(told.moved)[-2]


def test_nothing_played_explains_nothing(recommender: TasteRecommender) -> None:
    told = explain(recommender, history([]), NOW, np.array([1, 2]))
    assert len(told.plays) == len(told.moved) == 0
    assert told.because.tolist() == [-1, -1]
