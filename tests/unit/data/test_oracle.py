"""The oracle knows the rules of the generated world: no model can beat it, and its probabilities are correct."""

from itertools import product

import numpy as np
import pytest
from oracle import Oracle, every_play, infer_contexts

from rayrec.data.histories import Histories, Queries
from rayrec.data.synthetic import CONTEXTS, GenerateConfig, World


@pytest.fixture(scope="module", params=[0.0, 0.2], ids=["without opinions", "with opinions"])
def world(request: pytest.FixtureRequest) -> World:
    return World(GenerateConfig(songs=400, artists=50, genres=8, opinions=request.param))


@pytest.fixture(scope="module")
def histories(world: World) -> Histories:
    return world.histories(np.arange(300))


@pytest.fixture(scope="module")
def queries(histories: Histories) -> Queries:
    return every_play(histories)


def hits(scores: np.ndarray, songs: np.ndarray, k: int) -> np.ndarray:
    """bool (Q,): True if the played song is among the k best."""
    return np.asarray((np.argpartition(-scores, k, axis=1)[:, :k] == songs[:, None]).any(axis=1))


@pytest.mark.parametrize("know_contexts", [True, False])
class TestProbabilities:
    def test_every_answer_sums_to_one(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        probabilities = Oracle(world, know_contexts=know_contexts).probabilities(histories, queries)
        assert probabilities.dtype == np.float32
        assert probabilities.min() >= 0
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)

    def test_songs_are_played_as_often_as_their_probabilities_say(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        probabilities = Oracle(world, know_contexts=know_contexts).probabilities(histories, queries)
        is_played = np.zeros(probabilities.shape, dtype=bool)
        is_played[np.arange(len(queries)), histories.songs] = True
        for low, high in ((0.001, 0.01), (0.01, 0.05), (0.05, 0.3), (0.3, 0.6), (0.6, 1.0)):
            in_band = (probabilities >= low) & (probabilities < high)
            tolerance = 4 * np.sqrt(probabilities[in_band].mean() / in_band.sum())
            assert is_played[in_band].mean() == pytest.approx(probabilities[in_band].mean(), abs=tolerance)

    def test_its_own_recall_is_the_best_recall(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        oracle = Oracle(world, know_contexts=know_contexts)
        probabilities = oracle.probabilities(histories, queries)
        for k in (1, 20):
            expected = oracle.best_recall(k, np.arange(300))
            assert hits(probabilities, histories.songs, k).mean() == pytest.approx(
                expected, abs=4 * np.sqrt(0.25 / len(queries))
            )

    def test_later_plays_change_no_answer(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        oracle = Oracle(world, know_contexts=know_contexts)
        sample = queries.take(np.arange(0, len(queries), 97))
        positions = np.arange(histories.num_plays) - histories.offsets[histories.rows]
        for number in (3, 50, 100):
            query = sample.take(np.array([number]))
            past = histories.keep((histories.rows != query.rows[0]) | (positions < query.plays_before[0]))
            np.testing.assert_allclose(
                oracle.probabilities(past, query), oracle.probabilities(histories, query), rtol=1e-5, atol=1e-7
            )


class TestWhatItIsWorth:
    def test_it_beats_popularity_by_far(self, world: World, histories: Histories) -> None:
        counts = np.bincount(world.histories(np.arange(300, 2_000)).songs, minlength=400)
        popularity_recall = np.isin(histories.songs, np.argsort(-counts)[:20]).mean()
        assert Oracle(world).best_recall(20) > 2 * popularity_recall

    def test_knowing_contexts_is_worth_the_computed_margin(
        self, world: World, histories: Histories, queries: Queries
    ) -> None:
        users = np.arange(300)
        aware_oracle, blind_oracle = Oracle(world), Oracle(world, know_contexts=False)
        margin = aware_oracle.best_recall(1, users) - blind_oracle.best_recall(1, users)
        assert margin > 0.02
        aware_hits = hits(aware_oracle.probabilities(histories, queries), histories.songs, 1)
        blind_hits = hits(blind_oracle.probabilities(histories, queries), histories.songs, 1)
        difference = aware_hits.astype(float) - blind_hits
        tolerance = 4 * difference.std() / np.sqrt(len(queries))
        assert difference.mean() == pytest.approx(margin, abs=tolerance)

    def test_the_first_play_of_a_user_is_the_hardest(self, world: World) -> None:
        oracle = Oracle(world)
        assert oracle.best_recall(20, first_play=1) > oracle.best_recall(20)

    def test_recall_at_the_whole_catalog_is_one(self, world: World) -> None:
        assert Oracle(world).best_recall(400, np.arange(3)) == pytest.approx(1)


class TestInferredContexts:
    def test_they_match_the_sum_over_all_ways_a_history_could_have_come(self, world: World) -> None:
        user = int(np.argmax(world.histories(np.arange(100)).lengths >= 4))
        full_history = world.histories(np.array([user]))
        history = full_history.keep(np.arange(full_history.num_plays) < 4)
        weights = np.zeros(len(CONTEXTS))
        for contexts in product(range(len(CONTEXTS)), repeat=4):
            weights[contexts[-1]] += self._likelihood(world, history, contexts)
        np.testing.assert_allclose(infer_contexts(world, history)[-1], weights / weights.sum(), rtol=1e-4)

    def _likelihood(self, world: World, history: Histories, contexts: tuple[int, ...]) -> float:
        """P(`contexts`, songs), from an oracle that knows the context of each play."""
        shares, likelihood = world.context_shares, 1.0
        is_start = np.diff(history.played_at, prepend=0) >= 30 * 60_000
        for position, context in enumerate(contexts):
            previous = len(CONTEXTS) if is_start[position] else contexts[position - 1]
            likelihood *= shares[previous, context] * self._song_probability(world, history, position, context)
        return likelihood

    def _song_probability(self, world: World, history: Histories, position: int, context: int) -> float:
        forced_world = World(world.config)
        forced_world.context_shares = np.zeros_like(world.context_shares)
        forced_world.context_shares[:, context] = 1.0
        query = Queries.before_plays(history, np.array([position]))
        return float(Oracle(forced_world).probabilities(history, query)[0, history.songs[position]])

    def test_they_are_probabilities(self, world: World, histories: Histories) -> None:
        probabilities = infer_contexts(world, histories)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        assert histories.contexts is not None
        true_contexts = np.log2(histories.contexts).astype(np.int64)
        assert (probabilities.argmax(axis=1) == true_contexts).mean() > 0.7
