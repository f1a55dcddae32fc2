"""The oracle knows the rules of the generated world: no model can beat it, and its probabilities are correct."""

from itertools import product

import numpy as np
import pytest

from rayrec.data.histories import Histories, Queries
from rayrec.data.synthetic import CONTEXTS, GenerateConfig, Oracle, World, every_play, infer_contexts


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
        chance = Oracle(world, know_contexts=know_contexts).probabilities(histories, queries)
        assert chance.dtype == np.float32
        assert chance.min() >= 0
        np.testing.assert_allclose(chance.sum(axis=1), 1, atol=1e-5)

    def test_what_it_gives_a_chance_comes_as_often(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        chance = Oracle(world, know_contexts=know_contexts).probabilities(histories, queries)
        played = np.zeros(chance.shape, dtype=bool)
        played[np.arange(len(queries)), histories.songs] = True
        for low, high in ((0.001, 0.01), (0.01, 0.05), (0.05, 0.3), (0.3, 0.6), (0.6, 1.0)):
            band = (chance >= low) & (chance < high)
            spread = 4 * np.sqrt(chance[band].mean() / band.sum())
            assert played[band].mean() == pytest.approx(chance[band].mean(), abs=spread)

    def test_its_own_recall_is_the_best_recall(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        oracle = Oracle(world, know_contexts=know_contexts)
        chance = oracle.probabilities(histories, queries)
        for k in (1, 20):
            expected = oracle.best_recall(k, np.arange(300))
            assert hits(chance, histories.songs, k).mean() == pytest.approx(
                expected, abs=4 * np.sqrt(0.25 / len(queries))
            )

    def test_later_plays_change_no_answer(
        self, world: World, histories: Histories, queries: Queries, know_contexts: bool
    ) -> None:
        oracle = Oracle(world, know_contexts=know_contexts)
        some = queries.take(np.arange(0, len(queries), 97))
        place = np.arange(histories.num_plays) - histories.offsets[histories.rows]
        for number in (3, 50, 100):
            one = some.take(np.array([number]))
            cut = histories.keep((histories.rows != one.rows[0]) | (place < one.seen[0]))
            np.testing.assert_allclose(
                oracle.probabilities(cut, one), oracle.probabilities(histories, one), rtol=1e-5, atol=1e-7
            )


class TestWhatItIsWorth:
    def test_it_beats_popularity_by_far(self, world: World, histories: Histories) -> None:
        counts = np.bincount(world.histories(np.arange(300, 2_000)).songs, minlength=400)
        popular = np.isin(histories.songs, np.argsort(-counts)[:20]).mean()
        assert Oracle(world).best_recall(20) > 2 * popular

    def test_knowing_contexts_is_worth_the_computed_margin(
        self, world: World, histories: Histories, queries: Queries
    ) -> None:
        users = np.arange(300)
        aware, blind = Oracle(world), Oracle(world, know_contexts=False)
        margin = aware.best_recall(1, users) - blind.best_recall(1, users)
        assert margin > 0.02
        first_hits = hits(aware.probabilities(histories, queries), histories.songs, 1)
        blind_hits = hits(blind.probabilities(histories, queries), histories.songs, 1)
        difference = first_hits.astype(float) - blind_hits
        spread = 4 * difference.std() / np.sqrt(len(queries))
        assert difference.mean() == pytest.approx(margin, abs=spread)

    def test_the_first_play_of_a_user_is_the_hardest(self, world: World) -> None:
        oracle = Oracle(world)
        assert oracle.best_recall(20, first_play=1) > oracle.best_recall(20)

    def test_recall_at_the_whole_catalog_is_one(self, world: World) -> None:
        assert Oracle(world).best_recall(400, np.arange(3)) == pytest.approx(1)


class TestInferredContexts:
    def test_they_match_the_sum_over_all_ways_a_history_could_have_come(self, world: World) -> None:
        user = int(np.argmax(world.histories(np.arange(100)).lengths >= 4))
        whole = world.histories(np.array([user]))
        history = whole.keep(np.arange(whole.num_plays) < 4)
        weights = np.zeros(len(CONTEXTS))
        for way in product(range(len(CONTEXTS)), repeat=4):
            weights[way[-1]] += self._likelihood(world, history, way)
        np.testing.assert_allclose(infer_contexts(world, history)[-1], weights / weights.sum(), rtol=1e-4)

    def _likelihood(self, world: World, history: Histories, way: tuple[int, ...]) -> float:
        """P(contexts, songs) for the contexts `way`, from an oracle that knows the context of each play."""
        shares, total = world.context_shares, 1.0
        starts = np.diff(history.played_at, prepend=0) >= 30 * 60_000
        for place, context in enumerate(way):
            before = len(CONTEXTS) if starts[place] else way[place - 1]
            total *= shares[before, context] * self._song_chance(world, history, place, context)
        return total

    def _song_chance(self, world: World, history: Histories, place: int, context: int) -> float:
        forced = World(world.config)
        forced.context_shares = np.zeros_like(world.context_shares)
        forced.context_shares[:, context] = 1.0
        query = Queries.before_plays(history, np.array([place]))
        return float(Oracle(forced).probabilities(history, query)[0, history.songs[place]])

    def test_they_are_probabilities(self, world: World, histories: Histories) -> None:
        inferred = infer_contexts(world, histories)
        np.testing.assert_allclose(inferred.sum(axis=1), 1)
        assert histories.contexts is not None
        true = np.log2(histories.contexts).astype(np.int64)
        assert (inferred.argmax(axis=1) == true).mean() > 0.7
