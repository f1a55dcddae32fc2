"""The mix of network and memory against sums by hand, and through its file."""

from itertools import pairwise

import numpy as np
import pytest
from networks import MINUTE, NUM_SONGS, model_config, network
from safetensors.numpy import load_file, save
from scipy.sparse import csr_matrix
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange
from rayrec.errors import DamagedArtifactError, LeakError
from rayrec.model.checkpoint import save_model
from rayrec.model.train_config import MEMORY, has_memory
from rayrec.recommend.base import Horizon
from rayrec.recommend.hybrid import (
    LATER_WEIGHTS,
    PRIOR_SHARE,
    RULES_POWER,
    HybridRecommender,
    Memory,
    Mix,
    combined,
    load_recommender,
    shares,
    softmax,
)
from rayrec.recommend.own_rules import OwnRulesRecommender
from rayrec.recommend.repeats import RepeatGate, Repeats, gate_features
from rayrec.recommend.sequential_rules import SequentialRulesRecommender
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.vstan import VstanRecommender
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace

WITHOUT_VECTOR = 7
HEARD, NEW = (0.4, 0.3, 0.2, 0.1), (0.2, 0.5, 0.3, 0.0)
GATE = RepeatGate((-1.0, 0.3, 0.5, 0.5, 0.5, 1.0, 0.2, 0.1, 0.1, 0.1))
MIX = Mix(heard=HEARD, new=NEW, gate=GATE)
PRIOR = np.linspace(-1, 1, NUM_SONGS, dtype=np.float32)


def _memory(histories: Histories) -> Memory:
    return Memory.fit(lambda: [histories], num_songs=NUM_SONGS, allowed=FitRange(), prior=PRIOR)


@pytest.fixture(scope="module")
def histories() -> Histories:
    made = random_histories(30, NUM_SONGS, seed=3)
    return made.take(made.lengths > 0)


@pytest.fixture(scope="module")
def hybrid() -> HybridRecommender:
    vectors = random_vectors(NUM_SONGS)
    vectors[WITHOUT_VECTOR] = 0
    return HybridRecommender(
        TasteRecommender(network(), vectors), _memory(random_histories(60, NUM_SONGS, seed=1)), MIX
    )


def test_softmax_makes_chances_of_logits() -> None:
    logits = np.log(np.array([[1, 2, 5], [3, 0.5, 0.5]], dtype=np.float32))
    np.testing.assert_allclose(softmax(logits), [[0.125, 0.25, 0.625], [0.75, 0.125, 0.125]], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_softmax_gives_songs_at_minus_infinity_no_chance() -> None:
    logits = np.array([[0, -np.inf, 0], [-np.inf] * 3], dtype=np.float32)
    np.testing.assert_allclose(softmax(logits), [[0.5, 0, 0.5], [0, 0, 0]])


def test_softmax_bears_large_logits() -> None:
    np.testing.assert_allclose(softmax(np.array([[1e4, 1e4, 0]], dtype=np.float32)), [[0.5, 0.5, 0]])


def test_shares_add_up_to_one_or_stay_zero() -> None:
    scores = np.array([[1, 3, 0], [0, 0, 0]], dtype=np.float32)
    made = shares(scores)
    np.testing.assert_allclose(made, [[0.25, 0.75, 0], [0, 0, 0]])
    assert made.dtype == np.float32


def test_songs_heard_share_the_chance_of_a_repeat_and_new_ones_the_rest(
    hybrid: HybridRecommender, histories: Histories
) -> None:
    questions = Questions.at_end(histories, 10**9)
    songs = np.arange(NUM_SONGS) != WITHOUT_VECTOR
    members = [
        np.exp(hybrid.network.score(histories, questions) * hybrid.network.scale("short")),
        hybrid.memory.sessions.score(histories, questions),
        hybrid.memory.rules.score(histories, questions) ** RULES_POWER,
        OwnRulesRecommender(NUM_SONGS).score(histories, questions),
    ]
    members = [np.where(songs, scores, 0) for scores in members]
    members = [scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-9) for scores in members]
    assert all(scores.any() for scores in members)
    played = [np.isin(np.arange(NUM_SONGS), histories.songs[begin:end]) for begin, end in pairwise(histories.offsets)]
    heard = np.array(played) & songs
    masses = [np.stack([(scores * which).sum(axis=1) for scores in members]) for which in (heard, ~heard)]
    repeats = Repeats.of(histories, questions, NUM_SONGS)
    chance = GATE.chances(gate_features(repeats, *masses))[:, None]
    again, first = (
        np.where(which, sum(weight * scores for weight, scores in zip(weights, members, strict=True)), 0)
        for which, weights in ((heard, HEARD), (~heard, NEW))
    )
    expected = chance * shares(again) + (1 - chance) * shares(first)
    found = hybrid.score(histories, questions)
    np.testing.assert_allclose(found[:, songs], expected[:, songs], rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(found[:, songs].sum(axis=1), 1, rtol=1e-5)
    assert np.ptp(chance) > 0.05


@pytest.mark.filterwarnings("error")
def test_what_nobody_thinks_of_gets_no_chance() -> None:
    """The first user heard song 0, of which no member thinks; the second one's members are silent."""
    histories = Histories.from_lists([[0], [1]], [[0], [0]])
    repeats = Repeats.of(histories, Questions.at_end(histories, 1), 3)
    members = [np.array([[0, 0.5, 0.5], [0, 0, 0]], np.float32)] * 4
    chance = GATE.chances(gate_features(repeats, np.zeros((4, 2)), np.array([[1, 0]] * 4)))
    expected = np.array([[0, 0.5, 0.5], [0, 0, 0]]) * (1 - chance[:, None])
    np.testing.assert_allclose(combined(members, repeats, MIX), expected, rtol=1e-5)


def test_the_more_a_user_repeats_the_higher_songs_heard_stand(hybrid: HybridRecommender) -> None:
    """Both users end with 1, 2, 3; one of them has played nothing else, over and over."""
    loops, wanders = [1, 2, 3] * 8, [*range(10, 31), 1, 2, 3]
    histories = Histories.from_lists([loops, wanders], [np.arange(24) * MINUTE] * 2)  # type: ignore[list-item]
    scores = hybrid.score(histories, Questions.at_end(histories, 24 * MINUTE))
    assert scores[0, [1, 2, 3]].sum() > 1.5 * scores[1, [1, 2, 3]].sum()


def test_songs_that_the_network_does_not_know_stay_out(hybrid: HybridRecommender, histories: Histories) -> None:
    assert hybrid.memory.sessions.score(histories, Questions.at_end(histories, 0))[:, WITHOUT_VECTOR].any()
    assert np.isneginf(hybrid.score(histories, Questions.at_end(histories, 0))[:, WITHOUT_VECTOR]).all()


def test_for_the_time_to_come_a_song_is_as_likely_as_taste_popularity_sessions_and_own_plays_say(
    hybrid: HybridRecommender, histories: Histories
) -> None:
    questions = Questions.at_end(histories, 0)
    likeness = np.exp(hybrid.network.score(histories, questions, "long") * hybrid.network.scale("long"))
    sessions = hybrid.memory.sessions.score(histories, questions)
    played = np.stack([np.bincount(one.songs, minlength=NUM_SONGS) for one in _each(histories)]).astype(np.float32)
    sessions[:, WITHOUT_VECTOR] = played[:, WITHOUT_VECTOR] = 0
    assert sessions.any(axis=1).sum() > 1
    network, together, own = LATER_WEIGHTS
    expected = network * shares(likeness * np.exp(PRIOR_SHARE * PRIOR))
    expected += together * shares(sessions) + own * shares(played)
    found = hybrid.score(histories, questions, "long")
    songs = np.arange(NUM_SONGS) != WITHOUT_VECTOR
    np.testing.assert_allclose(found[:, songs], expected[:, songs], rtol=1e-4)
    assert np.isneginf(found[:, WITHOUT_VECTOR]).all()


def test_without_its_long_horizon_it_answers_for_the_time_to_come_as_for_the_next_play(
    hybrid: HybridRecommender, histories: Histories
) -> None:
    short, questions = hybrid.short_only(), Questions.at_end(histories, 0)
    assert (short.name, short.horizons) == ("hybrid-short", ("short",))
    next_play = hybrid.score(histories, questions)
    for horizon in hybrid.horizons:
        np.testing.assert_array_equal(short.score(histories, questions, horizon), next_play)
    assert not np.array_equal(hybrid.score(histories, questions, "long"), next_play)


def _each(histories: Histories) -> list[Histories]:
    return [histories.take(np.array([row])) for row in range(len(histories))]


def test_a_memory_refuses_plays_past_the_cut(histories: Histories) -> None:
    with pytest.raises(LeakError, match="at or after its cut"):
        Memory.fit(lambda: [histories], num_songs=NUM_SONGS, allowed=FitRange(before=10 * MINUTE))


def test_a_memory_comes_back_from_its_file(
    hybrid: HybridRecommender, histories: Histories, workspace: Workspace
) -> None:
    hybrid.memory.save(workspace, "here.safetensors", MIX)
    memory, mix = Memory.load(workspace, "here.safetensors", NUM_SONGS)
    assert mix == MIX
    questions = Questions.at_end(histories, 0)
    for found, kept in ((memory.sessions, hybrid.memory.sessions), (memory.rules, hybrid.memory.rules)):
        np.testing.assert_array_equal(found.score(histories, questions), kept.score(histories, questions))
    np.testing.assert_array_equal(memory.prior, PRIOR)


def test_a_memory_of_an_earlier_version_is_refused(hybrid: HybridRecommender, workspace: Workspace) -> None:
    hybrid.memory.save(workspace, "here.safetensors", MIX)
    tensors = load_file(workspace.local_file("here.safetensors"))
    workspace.write_bytes("here.safetensors", save({name: tensors[name] for name in tensors if name != "mix.gate"}))
    with pytest.raises(DamagedArtifactError, match=r"holds no mix\.gate; train the model again"):
        Memory.load(workspace, "here.safetensors", NUM_SONGS)


def test_a_memory_of_nothing_comes_back_too(workspace: Workspace) -> None:
    nothing = Histories.from_lists([], [])
    _memory(nothing).save(workspace, "empty.safetensors", MIX)
    memory, _ = Memory.load(workspace, "empty.safetensors", NUM_SONGS)
    assert memory.sessions.sessions.shape == (0, NUM_SONGS)
    assert memory.rules.rules.shape == (NUM_SONGS, NUM_SONGS)


def test_a_models_artifact_answers_with_its_memory_where_it_has_one(
    hybrid: HybridRecommender, histories: Histories, workspace: Workspace
) -> None:
    def published(model_id: str, extra: list[str]) -> Manifest:
        manifest = Manifest(kind="models", id=model_id)
        names = save_model(workspace, manifest.folder, network(model_config()), np.ones(NUM_SONGS, dtype=bool))
        return publish(workspace, manifest, [*names, *extra])

    hybrid.memory.save(workspace, Manifest(kind="models", id="mixed").path(MEMORY), MIX)
    mixed, plain = published("mixed", [MEMORY]), published("plain", [])
    assert (has_memory(mixed), has_memory(plain)) == (True, False)
    assert type(load_recommender(workspace, plain)) is TasteRecommender
    loaded = load_recommender(workspace, mixed)
    assert isinstance(loaded, HybridRecommender)
    known = HybridRecommender(loaded.network, hybrid.memory, MIX)
    questions = Questions.at_end(histories, 0)
    np.testing.assert_array_equal(loaded.score(histories, questions), known.score(histories, questions))


def test_memory_ranks_first_what_it_alone_remembers() -> None:
    """An untrained network knows nothing; sessions and rules say that 4 follows 3."""
    sessions = csr_matrix(np.eye(NUM_SONGS, dtype=np.float32)[[3]] + np.eye(NUM_SONGS, dtype=np.float32)[[4]])
    rules = np.zeros((NUM_SONGS, NUM_SONGS), dtype=np.float32)
    rules[3, 4] = 1
    memory = Memory(
        VstanRecommender(sessions, np.zeros(sessions.shape[0], np.int64)),
        SequentialRulesRecommender(csr_matrix(rules)),
        PRIOR,
    )
    hybrid = HybridRecommender(TasteRecommender(network(), random_vectors(NUM_SONGS)), memory, MIX)
    songs, _ = hybrid.recommend(Histories.from_lists([[3]], [[0]]), 0, 1)
    np.testing.assert_array_equal(songs, [[4]])


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("horizon", ["short", "long"])
def test_a_stored_state_stands_for_the_pass_over_the_plays(
    hybrid: HybridRecommender, histories: Histories, monkeypatch: pytest.MonkeyPatch, layers: int, horizon: Horizon
) -> None:
    mixed = HybridRecommender(
        TasteRecommender(network(model_config(layers=layers)), random_vectors(NUM_SONGS)), hybrid.memory, MIX
    )
    at = int(histories.played_at.max()) + MINUTE
    states = mixed.network.encoder.run(histories)[1].hidden
    for recommender in (mixed, mixed.network):
        songs, scores = recommender.recommend(histories, at, 5, horizon=horizon, exclude_heard=True)
        with monkeypatch.context() as patch:
            patch.setattr(mixed.network.encoder, "run", None)  # no network runs over plays
            found = recommender.recommend(histories, at, 5, horizon=horizon, exclude_heard=True, hidden=states)
            alone = recommender.recommend_one(
                histories.take(np.array([3])), at, 5, horizon=horizon, exclude_heard=True, hidden=states[[3]]
            )
        np.testing.assert_array_equal(found[0], songs)
        np.testing.assert_allclose(found[1], scores, atol=1e-5)
        np.testing.assert_array_equal(alone[0], songs[3])


def test_the_network_needs_no_more_than_the_last_play_beside_its_state(
    hybrid: HybridRecommender, histories: Histories
) -> None:
    at = int(histories.played_at.max()) + MINUTE
    last = histories.keep(np.arange(histories.num_plays) == histories.offsets[1:][histories.rows] - 1)
    states = hybrid.network.encoder.run(histories)[1].hidden
    np.testing.assert_allclose(
        hybrid.network.vectors(last, Questions.at_end(last, at, states)),
        hybrid.network.vectors(histories, Questions.at_end(histories, at)),
        atol=1e-5,
    )
