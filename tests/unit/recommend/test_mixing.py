"""Weights of network and memory: the planted best is chosen, on plays that no member has seen."""

from dataclasses import replace

import numpy as np
import pytest
from networks import MINUTE, cycling_histories, model_config, network
from networks import NUM_SONGS as CYCLE
from worlds import random_vectors, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange, Split
from rayrec.errors import LeakError
from rayrec.model.checkpoint import save_model
from rayrec.model.fit import Validation
from rayrec.model.train_config import MEMORY
from rayrec.recommend.base import Horizon
from rayrec.recommend.hybrid import MEMBERS, HybridRecommender, Memory, Mix, combined
from rayrec.recommend.item_knn import last_songs
from rayrec.recommend.mixing import (
    NEW_COUNTS,
    SHIFTS,
    USUAL_MIX,
    _best_mix,
    _candidates,
    _Cases,
    _cases,
    _gain,
    _ranks,
    _select,
    _worth,
    choose_mix,
    weight_grid,
    write_memory,
)
from rayrec.recommend.repeats import RepeatGate, Repeats
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.workspace import Workspace

NETWORK, SESSIONS, RULES, OWN = range(len(MEMBERS))
PRIOR = np.linspace(0, 1, 120, dtype=np.float32)
ALBUMS, ALBUM = 30, 4  # a session plays one album, its songs in any order


class Successor(TasteRecommender):
    """A network that has learned that song n + 1 follows song n."""

    def vectors(self, histories: Histories, questions: Questions, horizon: Horizon = "short") -> np.ndarray:
        """float32 (Q, N): 1 for the successor."""
        vectors = np.zeros((len(questions), self.num_songs), dtype=np.float32)
        following = (last_songs(histories, questions, self.num_songs) + 1) % self.num_songs
        vectors[np.arange(len(questions)), following] = 1
        return vectors

    def score_vectors(self, vectors: np.ndarray) -> np.ndarray:
        """float32 (Q, N): the same."""
        scores = vectors.copy()
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
    for weights in (USUAL_MIX.heard, USUAL_MIX.new):
        assert len(weights) == len(MEMBERS)
        assert sum(weights) == pytest.approx(1)


def test_where_sessions_tell_the_next_song_they_weigh_most() -> None:
    num_songs = ALBUMS * ALBUM
    shape = model_config(num_songs=num_songs)
    hybrid = HybridRecommender(
        TasteRecommender(network(shape), random_vectors(num_songs)),
        _remembering(_albums(80, 1), num_songs),
        USUAL_MIX,
    )
    fresh = _albums(20, 2)
    plays = _later(fresh)
    weights = choose_mix(hybrid, fresh, plays[plays % ALBUM > 0]).new  # nothing is played twice
    assert weights[SESSIONS] + weights[RULES] >= 0.7
    assert weights[NETWORK] < 0.3


def test_where_the_network_tells_the_next_song_it_weighs_most() -> None:
    noise = Histories.from_lists(
        [np.random.default_rng(user).integers(0, CYCLE, 30) for user in range(60)],  # type: ignore[misc]
        [np.arange(30) * MINUTE] * 60,  # type: ignore[list-item]
    )
    hybrid = HybridRecommender(Successor(network(), random_vectors(CYCLE)), _remembering(noise, CYCLE), USUAL_MIX)
    fresh = cycling_histories(20)
    mix = choose_mix(hybrid, fresh, _later(fresh))
    assert min(mix.heard[NETWORK], mix.new[NETWORK]) >= 0.6


def test_the_chosen_weights_are_the_best_of_the_grid() -> None:
    """By ranks over the whole catalog, counted without candidates."""
    hybrid = HybridRecommender(
        Successor(network(), random_vectors(CYCLE)), _remembering(_wandering(40, 1), CYCLE), USUAL_MIX
    )
    fresh = _wandering(10, 2)
    plays = _later(fresh)
    questions = Questions.before_plays(fresh, plays)
    members, repeats = hybrid.chances(hybrid.network.score(fresh, questions), fresh, questions)
    targets, cases = fresh.songs[plays], _cases(hybrid, fresh, plays)

    def worth(mix: Mix) -> float:
        scores = combined(members, repeats, mix)
        own = scores[np.arange(len(plays)), targets]
        ranks = (scores >= own[:, None]).sum(axis=1)
        found = np.where(cases.own_heard_Q, 1, NEW_COUNTS) * ((ranks <= 20) & (own > 0))
        return float(found.sum() + 0.2 * (found / ranks).sum())

    chosen = choose_mix(hybrid, fresh, plays)
    fitted = replace(chosen, gate=RepeatGate.fit(cases.features_QF, cases.own_heard_Q))
    shifted = [worth(replace(fitted, gate=fitted.gate.shifted(by))) for by in SHIFTS]
    assert worth(chosen) == pytest.approx(max(shifted), rel=0.01)
    began = replace(fitted, new=USUAL_MIX.new)  # songs heard are weighed first
    assert worth(began) == pytest.approx(max(worth(replace(began, heard=w)) for w in weight_grid(0.1)), rel=0.01)
    news = [(*weights, 0.0) for weights in weight_grid(0.1, 3)]
    assert worth(fitted) == pytest.approx(max(worth(replace(fitted, new=w)) for w in news), rel=0.01)
    assert worth(chosen) > worth(replace(chosen, heard=(0.1, 0.0, 0.0, 0.9), new=(0.1, 0.0, 0.9, 0.0))) + 1


def test_the_gate_is_fitted_on_what_was_repeated() -> None:
    """Some listen to one song again and again, the others never to any."""
    songs = [[user] * 20 if user % 2 else list(range(user, user + 20)) for user in range(20)]
    fresh = Histories.from_lists(songs, [np.arange(20) * MINUTE] * 20)  # type: ignore[list-item]
    hybrid = HybridRecommender(Successor(network(), random_vectors(CYCLE)), _remembering(fresh, CYCLE), USUAL_MIX)
    plays = np.flatnonzero(fresh.places > 1)  # one play tells nothing
    mix = choose_mix(hybrid, fresh, plays)
    questions = Questions.before_plays(fresh, plays)
    scores = combined(*hybrid.chances(hybrid.network.score(fresh, questions), fresh, questions), mix)
    heard = Repeats.of(fresh, questions, CYCLE)
    chances = np.bincount(heard.asked, weights=scores[heard.asked, heard.songs], minlength=len(plays))
    loops = fresh.rows[plays] % 2 == 1
    assert chances[loops].min() > 0.9
    assert chances[~loops].max() < 0.1


def _wandering(users: int, seed: int) -> Histories:
    """Half of the plays follow their song's number, half jump within ten songs."""
    random = np.random.default_rng(seed)
    steps = np.where(random.random((users, 30)) < 0.5, 1, random.integers(0, 10, (users, 30)))
    songs = (random.integers(0, CYCLE, (users, 1)) + np.cumsum(steps, axis=1)) % CYCLE
    return Histories.from_lists(list(songs), [np.arange(30) * MINUTE] * users)  # type: ignore[arg-type]


def test_candidates_are_the_first_of_every_member_without_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.recommend.mixing.FIRST_SONGS", 2)
    members = np.array([[[0.5, 0.3, 0.2, 0, 0]], [[0, 0.6, 0, 0, 0.4]]], dtype=np.float32)
    repeats = Repeats(np.array([0, 0]), np.array([1, 4]), np.zeros((1, 5)))
    cases = _candidates(members, repeats, np.array([1]))
    np.testing.assert_allclose(cases.own_MQ, [[0.3], [0.6]])
    there = cases.rivals_MQC[0, 0] >= 0
    np.testing.assert_allclose(cases.rivals_MQC[:, 0, there], [[0.5, 0], [0, 0.4]])  # songs 0 and 4, each once
    np.testing.assert_array_equal(cases.rivals_heard_QC[0, there], [False, True])
    assert cases.own_heard_Q.tolist() == [True]
    np.testing.assert_allclose(cases.heard_MQ, [[0.3], [1]])
    np.testing.assert_allclose(cases.new_MQ, [[0.7], [0]])


ALONE = Mix(heard=(1.0,), new=(1.0,), gate=RepeatGate((0.0, 0.0)))  # of one member; a repeat is as likely as not


def _case(rival: float, own: float, rivals: int = 20, *, heard: float = 0.5) -> _Cases:
    """One question: a song that was heard among rivals that were not."""
    return _Cases(
        rivals_MQC=np.full((1, 1, rivals), rival, dtype=np.float32),
        own_MQ=np.array([[own]], dtype=np.float32),
        rivals_heard_QC=np.zeros((1, rivals), dtype=bool),
        own_heard_Q=np.ones(1, dtype=bool),
        heard_MQ=np.array([[heard]], dtype=np.float32),
        new_MQ=np.array([[1 - heard]], dtype=np.float32),
        features_QF=np.zeros((1, 1)),
    )


def _found(cases: _Cases) -> float:
    lacks, found = _worth(ALONE, cases, 0.0)
    assert lacks == 0
    return found


def test_ties_count_against_a_song() -> None:
    assert _found(_case(0.3, 0.3)) == 0  # rank 21
    assert _found(_case(0.3, 0.3, 3)) == pytest.approx(1 + 0.2 / 4)
    assert _found(_case(0.2, 0.3, 3)) == pytest.approx(1 + 0.2)


def test_a_new_song_found_counts_as_three_repeats() -> None:
    found = replace(_case(0.2, 0.3, 3), own_heard_Q=np.zeros(1, dtype=bool))
    assert _found(found) == pytest.approx(3 * _found(_case(0.2, 0.3, 3)))


def test_songs_heard_and_new_ones_are_weighed_by_their_shares() -> None:
    """0.2 of the 0.25 that songs heard have between them is more than 0.3 of 0.75."""
    assert _found(_case(0.3, 0.2, 3, heard=0.25)) == pytest.approx(1 + 0.2)
    assert _found(_case(0.3, 0.2, 3)) == pytest.approx(1 + 0.2 / 4)


def test_a_song_without_any_chance_is_never_found() -> None:
    assert _found(_case(-1.0, 0.0, 3)) == 0


def test_a_mix_lacks_what_it_finds_less_than_the_least_asked_for_all_plays_alike() -> None:
    """A new song is found once, not thrice."""
    found = replace(_case(0.2, 0.3, 3), own_heard_Q=np.zeros(1, dtype=bool))
    assert _worth(ALONE, found, 1.0)[0] == 0
    assert _worth(ALONE, found, 2.0)[0] == pytest.approx(1.2 - 2)


def test_a_mix_finds_no_less_of_all_plays_than_its_best_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network finds 20 of 30 songs heard, the sessions 20 of 40 new ones; either kind may fill the first 20."""
    heard, new, half = 30, 40, 200
    members = np.zeros((len(MEMBERS), 2 * half, heard + new), dtype=np.float32)
    random = np.random.default_rng(0)
    members[NETWORK, :, :heard] = random.uniform(0.6, 1.4, (2 * half, heard)) / heard
    members[SESSIONS, :, heard:] = random.uniform(0.6, 1.4, (2 * half, new)) / new
    targets = np.concatenate([random.integers(0, heard, half), heard + random.integers(0, new, half)])
    questions = np.arange(2 * half)
    asked, songs = np.repeat(questions, heard), np.tile(np.arange(heard), 2 * half)
    cases = _candidates(members, Repeats(asked, songs, np.zeros((2 * half, 5))), targets)
    network = _gain(_ranks(cases.own_MQ, cases.rivals_MQC)[NETWORK])
    assert _worth(_best_mix(cases), cases, network)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("rayrec.recommend.mixing._gain", lambda ranks, counts=0.0: _gain(ranks, counts))  # no least
        unbound = _best_mix(cases)
    assert _worth(unbound, cases, network)[0] < 0


def test_songs_that_the_network_does_not_know_win_no_weight_for_others() -> None:
    """All targets are songs without a vector: whoever knows them, the hybrid does not recommend them."""
    vectors = random_vectors(CYCLE)
    vectors[30:] = 0
    fresh = cycling_histories(20)
    plays = _later(fresh)
    hybrid = HybridRecommender(Successor(network(), vectors), _remembering(fresh, CYCLE), USUAL_MIX)
    unknown = plays[fresh.songs[plays] >= 30]
    mix = choose_mix(hybrid, fresh, unknown)  # all alike, at nothing found
    assert (mix.heard, mix.new) == (weight_grid(0.1)[0], (*weight_grid(0.1, 3)[0], 0.0))


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
    (mix,) = write_memory(dataset, "model", SPLIT.final, SPLIT.selection, validation, "selected", PRIOR)
    memory, stored = Memory.load(dataset.workspace, f"model/{MEMORY}", dataset.num_songs)
    assert stored == mix
    np.testing.assert_array_equal(memory.prior, PRIOR)

    def fitted(allowed: FitRange) -> Memory:
        return Memory.fit(lambda: _select(dataset, allowed), num_songs=dataset.num_songs, allowed=allowed)

    final, selection = fitted(SPLIT.final), fitted(SPLIT.selection)
    assert (memory.rules.rules != final.rules.rules).nnz == 0
    assert memory.sessions.sessions.shape == final.sessions.sessions.shape == (60 * 4, dataset.num_songs)
    assert selection.sessions.sessions.shape == (60 * 3, dataset.num_songs)
    selected = TasteRecommender.from_folder(dataset.workspace, "selected")
    hybrid = HybridRecommender(selected, selection, USUAL_MIX)
    assert mix == choose_mix(hybrid, validation.histories, validation.plays)


def test_without_a_validation_range_the_usual_weights_stay(dataset: Dataset) -> None:
    (mix,) = write_memory(dataset, "model", FitRange(), None, None, "nowhere", PRIOR)
    assert mix == USUAL_MIX
    memory, _ = Memory.load(dataset.workspace, f"model/{MEMORY}", dataset.num_songs)
    assert memory.sessions.sessions.shape[0] == 60 * 5


def test_a_memory_refuses_what_it_must_not_see(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FitRange, "select", lambda self, histories: histories)
    with pytest.raises(LeakError, match="at or after its cut"):
        list(write_memory(dataset, "model", SPLIT.final, None, None, "selected", PRIOR))
