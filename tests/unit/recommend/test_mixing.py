"""Weights of network and memory: the planted best is chosen, on plays that no member has seen."""

import numpy as np
import pytest
from networks import MINUTE, cycling_histories, model_config, network
from networks import NUM_SONGS as CYCLE
from worlds import random_vectors, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange, Split
from rayrec.errors import LeakError
from rayrec.recommend.hybrid import MEMBERS, HybridRecommender, Memory
from rayrec.recommend.mixing import (
    USUAL_WEIGHTS,
    _candidates,
    _gain,
    _select,
    choose_weights,
    weight_grid,
    write_memory,
)
from rayrec.recommend.neighbours import last_songs
from rayrec.recommend.recommender import Horizon
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.taste.checkpoint import save_model
from rayrec.taste.config import MEMORY
from rayrec.taste.fitting import Validation
from rayrec.workspace import Workspace

NETWORK, SESSIONS, RULES, OWN = range(len(MEMBERS))
ALBUMS, ALBUM = 30, 4  # a session plays one album, its songs in any order


class Successor(TasteRecommender):
    """A network that has learned that song n + 1 follows song n."""

    def score(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): 1 for the successor."""
        scores = np.zeros((len(questions), self.num_songs), dtype=np.float32)
        following = (last_songs(histories, questions, self.num_songs) + 1) % self.num_songs
        scores[np.arange(len(questions)), following] = 1
        scores[:, self.without_vector] = -np.inf
        return scores


def _albums(users: int, seed: int, start: int = 0) -> Histories:
    """Users who play an album a day, never the same again, its songs in any order, each once."""
    random = np.random.default_rng(seed)
    songs = [
        (random.permutation(ALBUMS)[:5, None] * ALBUM + np.array([random.permutation(ALBUM) for _ in range(5)])).ravel()
        for _ in range(users)
    ]
    day = np.repeat(np.arange(5) * 1440 * MINUTE, ALBUM) + np.tile(np.arange(ALBUM) * MINUTE, 5)
    return Histories.from_lists(songs, [start + day] * users)  # type: ignore[arg-type]


def _later(histories: Histories, every: int = 1) -> np.ndarray:
    """Positions of the plays that are not the first of their user."""
    place = np.arange(histories.num_plays) - histories.offsets[histories.rows]
    return np.flatnonzero((place > 0) & (place % every == 0))


def _remembering(plays: Histories, num_songs: int) -> Memory:
    return Memory.fit(lambda: [plays], num_songs=num_songs, allowed=FitRange())


@pytest.mark.parametrize("step", [0.1, 0.25, 0.5])
def test_the_grid_adds_up_to_one_and_leaves_the_network_some(step: float) -> None:
    grid = np.array(weight_grid(step))
    np.testing.assert_allclose(grid.sum(axis=1), 1)
    assert (grid[:, NETWORK] >= step - 1e-9).all()
    assert (grid >= 0).all()
    assert len(np.unique(grid.round(6), axis=0)) == len(grid)
    assert {round(weight, 6) for weight in grid[:, OWN]} == {round(n * step, 6) for n in range(round(1 / step))}


def test_usual_weights_are_one_a_member_and_add_up() -> None:
    assert len(USUAL_WEIGHTS) == len(MEMBERS)
    assert sum(USUAL_WEIGHTS) == pytest.approx(1)


def test_where_sessions_tell_the_next_song_they_weigh_most() -> None:
    num_songs = ALBUMS * ALBUM
    shape = model_config(num_songs=num_songs)
    hybrid = HybridRecommender(
        TasteRecommender(network(shape), random_vectors(num_songs)),
        _remembering(_albums(80, 1), num_songs),
        (1, 0, 0, 0),
    )
    fresh = _albums(20, 2)
    plays = _later(fresh)
    weights = choose_weights(hybrid, fresh, plays[plays % ALBUM > 0])
    assert weights[SESSIONS] + weights[RULES] >= 0.7
    assert weights[NETWORK] < 0.3


def test_where_the_network_tells_the_next_song_it_weighs_most() -> None:
    noise = Histories.from_lists(
        [np.random.default_rng(user).integers(0, CYCLE, 30) for user in range(60)],  # type: ignore[misc]
        [np.arange(30) * MINUTE] * 60,  # type: ignore[list-item]
    )
    hybrid = HybridRecommender(
        Successor(network(), random_vectors(CYCLE)), _remembering(noise, CYCLE), (0.1, 0.3, 0.3, 0.3)
    )
    fresh = cycling_histories(20)
    assert choose_weights(hybrid, fresh, _later(fresh))[NETWORK] >= 0.6


def test_the_chosen_weights_are_the_best_of_the_grid() -> None:
    """By ranks over the whole catalog, counted without candidates."""
    hybrid = HybridRecommender(
        Successor(network(), random_vectors(CYCLE)), _remembering(_wandering(40, 1), CYCLE), USUAL_WEIGHTS
    )
    fresh = _wandering(10, 2)
    plays = _later(fresh)
    members = hybrid.chances(fresh, Questions.before_plays(fresh, plays))
    targets = fresh.songs[plays]

    def worth(weights: tuple[float, ...]) -> float:
        scores = hybrid.mix(members, weights)
        own = scores[np.arange(len(plays)), targets]
        ranks = (scores >= own[:, None]).sum(axis=1)
        found = (ranks <= 20) & (own > 0)
        return float(found.sum() + 0.2 * (found / ranks).sum())

    chosen = choose_weights(hybrid, fresh, plays)
    best = max(worth(weights) for weights in weight_grid(0.1))
    assert worth(chosen) == pytest.approx(best, rel=0.01)
    assert worth(chosen) > worth((0.1, 0.0, 0.0, 0.9)) + 1


def _wandering(users: int, seed: int) -> Histories:
    """Half of the plays follow their song's number, half jump within ten songs."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((users, 30)) < 0.5, 1, random.integers(0, 10, (users, 30)))
    songs = (random.integers(0, CYCLE, (users, 1)) + np.cumsum(steps, axis=1)) % CYCLE
    return Histories.from_lists(list(songs), [np.arange(30) * MINUTE] * users)  # type: ignore[arg-type]


def test_candidates_are_the_first_of_every_member_without_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.recommend.mixing.FIRST_SONGS", 2)
    members = np.array([[[0.5, 0.3, 0.2, 0, 0]], [[0, 0.6, 0, 0, 0.4]]], dtype=np.float32)
    rivals, own = _candidates(members, np.array([1]))
    np.testing.assert_allclose(own, [[0.3], [0.6]])
    kept = rivals[:, 0, rivals[0, 0] >= 0]
    np.testing.assert_allclose(kept, [[0.5, 0], [0, 0.4]])  # songs 0 and 4, each once


def test_ties_count_against_a_song() -> None:
    weights = np.array([1.0], dtype=np.float32)
    rivals = np.full((1, 1, 20), 0.3, dtype=np.float32)
    own = np.array([[0.3]], dtype=np.float32)
    assert _gain(weights, rivals, own) == 0  # rank 21
    assert _gain(weights, rivals[:, :, :3], own) == pytest.approx(1 + 0.2 / 4)
    assert _gain(weights, rivals[:, :, :3] - 0.1, own) == pytest.approx(1 + 0.2)


def test_a_song_without_any_chance_is_never_found() -> None:
    assert _gain(np.array([1.0]), np.full((1, 1, 3), -1.0), np.zeros((1, 1))) == 0


def test_songs_that_the_network_does_not_know_win_no_weight_for_others() -> None:
    """All targets are songs without a vector: whoever knows them, the hybrid does not recommend them."""
    vectors = random_vectors(CYCLE)
    vectors[30:] = 0
    fresh = cycling_histories(20)
    plays = _later(fresh)
    hybrid = HybridRecommender(Successor(network(), vectors), _remembering(fresh, CYCLE), USUAL_WEIGHTS)
    unknown = plays[fresh.songs[plays] >= 30]
    first = weight_grid(0.1)[0]
    assert choose_weights(hybrid, fresh, unknown) == first  # all alike, at nothing found


VALIDATION_FROM, TEST_FROM = 3 * 1440 * MINUTE, 4 * 1440 * MINUTE
SPLIT = Split(id="cut", dataset="by-hand", validation_from=VALIDATION_FROM, test_from=TEST_FROM)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    """Albums of five days, the fourth to validate, the fifth to test."""
    num_songs = ALBUMS * ALBUM
    selected = network(model_config(num_songs=num_songs))
    save_model(workspace, "selected", selected, np.ones(num_songs, dtype=bool))
    return write_dataset(workspace, _albums(60, 3), num_songs)


def _validation(dataset: Dataset) -> Validation:
    histories = next(dataset.read_bucket(0)).before(TEST_FROM)
    return Validation(histories=histories, plays=np.flatnonzero(~SPLIT.selection.covers(histories)))


def test_a_memory_is_weighed_on_the_selection_and_fitted_on_all_that_is_allowed(dataset: Dataset) -> None:
    validation = _validation(dataset)
    (weights,) = write_memory(dataset, "model", SPLIT.final, SPLIT.selection, validation, "selected")
    memory, stored = Memory.load(dataset.workspace, f"model/{MEMORY}", dataset.num_songs)
    assert stored == pytest.approx(weights)

    def fitted(allowed: FitRange) -> Memory:
        return Memory.fit(lambda: _select(dataset, allowed), num_songs=dataset.num_songs, allowed=allowed)

    final, selection = fitted(SPLIT.final), fitted(SPLIT.selection)
    assert (memory.rules.rules != final.rules.rules).nnz == 0
    assert memory.sessions.sessions.shape == final.sessions.sessions.shape == (60 * 4, dataset.num_songs)
    assert selection.sessions.sessions.shape == (60 * 3, dataset.num_songs)
    selected = TasteRecommender.from_folder(dataset.workspace, "selected")
    hybrid = HybridRecommender(selected, selection, USUAL_WEIGHTS)
    assert weights == choose_weights(hybrid, validation.histories, validation.plays)


def test_without_a_validation_range_the_usual_weights_stay(dataset: Dataset) -> None:
    (weights,) = write_memory(dataset, "model", FitRange(), None, None, "nowhere")
    assert weights == USUAL_WEIGHTS
    memory, _ = Memory.load(dataset.workspace, f"model/{MEMORY}", dataset.num_songs)
    assert memory.sessions.sessions.shape[0] == 60 * 5


def test_a_memory_refuses_what_it_must_not_see(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FitRange, "select", lambda self, histories: histories)
    with pytest.raises(LeakError, match="at or after its cut"):
        list(write_memory(dataset, "model", SPLIT.final, None, None, "selected"))
