"""The weighted baselines: fits find the planted weights, and their sums solve the equations."""

import numpy as np
import pytest
from worlds import random_histories, random_vectors, write_dataset

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange, Split
from rayrec.errors import LeakError
from rayrec.recommend import baselines as module
from rayrec.recommend.baselines import (
    OFFSETS,
    LagSums,
    WeightedRecommender,
    choose_penalty,
    fit_baselines,
    fit_weighted,
    make_selection,
)
from rayrec.storage.workspace import Workspace

NUM_SONGS = 30
SPLIT = Split(id="s", dataset="by-hand", validation_from=1_500_000, test_from=2_500_000)
WEIGHTS = np.array([0.3, 0.0, 0.8, -0.4])  # the weight of the last song comes first


def _planted_histories(users: int, length: int) -> tuple[Histories, np.ndarray]:
    """Users whose next song is nearest to the sum of their last four by the planted weights, plus some noise."""
    vectors = random_vectors(3_000, dim=6)
    random = np.random.default_rng(1)
    songs = random.integers(0, len(vectors), size=(users, length))
    for position in range(len(WEIGHTS), length):
        last_vectors = vectors[songs[:, position - len(WEIGHTS) : position][:, ::-1]]
        taste = np.einsum("j,ujd->ud", WEIGHTS, last_vectors) + random.normal(0, 0.3, size=(users, 6))
        songs[:, position] = np.argmax(taste @ vectors.T, axis=1)
    return Histories.from_lists(list(songs), [np.arange(length)] * users), vectors  # type: ignore[arg-type]


def test_a_fit_finds_the_planted_weights() -> None:
    histories, vectors = _planted_histories(60, 60)
    recommender = WeightedRecommender.fit([histories], vectors, name="weighted-short", allowed=FitRange(), penalty=1e-3)
    weights = (
        recommender.weights[: len(WEIGHTS)]
        * np.linalg.norm(WEIGHTS)
        / np.linalg.norm(recommender.weights[: len(WEIGHTS)])
    )
    np.testing.assert_allclose(weights, WEIGHTS, atol=0.05)
    assert np.abs(recommender.weights[len(WEIGHTS) :]).max() < 0.1


def test_the_planted_weights_answer_better_than_every_average() -> None:
    histories, vectors = _planted_histories(60, 60)
    queries = Queries.before_plays(histories, np.arange(len(WEIGHTS), histories.num_plays, 7))
    targets = vectors[histories.songs[np.arange(len(WEIGHTS), histories.num_plays, 7)]]
    weighted = fit_weighted([histories], vectors, "weighted-short", FitRange(), None)
    averages = [WeightedRecommender(vectors, discount ** np.arange(50), "average") for discount in (0.1, 0.5, 0.9, 1.0)]
    weighted_cosine, *average_cosines = [
        float((recommender.vectors(histories, queries) * targets).sum(1).mean())
        for recommender in (weighted, *averages)
    ]
    assert weighted_cosine > max(average_cosines) + 0.2


@pytest.mark.parametrize("offsets", [(1, 1), (2, 4)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
@pytest.mark.parametrize("parts", [1, 6])
def test_the_sums_give_the_solution_of_the_equations_written_out(
    offsets: tuple[int, int], penalty: float, parts: int
) -> None:
    histories, vectors, count = random_histories(24, NUM_SONGS, seed=7), random_vectors(NUM_SONGS), module.WEIGHTS
    lag_sums = LagSums(offsets)
    for rows in np.array_split(np.arange(24), parts):
        lag_sums.add(histories.take(rows), vectors)
    inputs, targets = [], []
    for songs in np.split(histories.songs, histories.offsets[1:-1]):
        for last in range(len(songs)):
            last_vectors = np.zeros((count, vectors.shape[1]))
            recent_songs = songs[max(0, last - count + 1) : last + 1][::-1]
            last_vectors[: len(recent_songs)] = vectors[recent_songs]
            for target in range(last + offsets[0], min(last + offsets[1] + 1, len(songs))):
                inputs.append(last_vectors)
                targets.append(vectors[songs[target]])
    x, y = np.stack(inputs), np.stack(targets)
    gram = np.einsum("pjd,pkd->jk", x, x) / len(x) + penalty * np.eye(count)
    expected = np.linalg.solve(gram, np.einsum("pjd,pd->j", x, y) / len(x))
    np.testing.assert_allclose(lag_sums.weights(penalty), expected, rtol=1e-4, atol=1e-6)


def test_taste_vectors_are_the_weighted_sums_at_every_position() -> None:
    vectors, histories = random_vectors(NUM_SONGS), random_histories(12, NUM_SONGS, seed=5)
    recommender = WeightedRecommender(vectors, WEIGHTS, "weighted-short")
    queries = Queries.before_plays(histories, np.random.default_rng(0).permutation(histories.num_plays))
    taste_vectors = recommender.vectors(histories, queries)
    for row, (user, plays_before) in enumerate(zip(queries.rows, queries.plays_before, strict=True)):
        last_songs = histories.songs[histories.offsets[user] :][:plays_before][::-1][: len(WEIGHTS)]
        expected = WEIGHTS[: len(last_songs)] @ vectors[last_songs] if plays_before else np.zeros(8)
        np.testing.assert_allclose(taste_vectors[row], expected / (np.linalg.norm(expected) or 1), atol=1e-5)


def test_a_fit_refuses_plays_past_the_cut() -> None:
    plays = Histories.from_lists([[0, 1, 2]], [[0, 1, 2]])
    with pytest.raises(LeakError, match="1 plays at or after its cut 2"):
        fit_weighted([plays], random_vectors(3), "weighted-long", FitRange(before=2), None)


@pytest.fixture(params=list(OFFSETS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def dataset(workspace: Workspace) -> Dataset:
    return write_dataset(workspace, random_histories(80, NUM_SONGS, longest=60, seed=2), NUM_SONGS)


def test_the_penalty_is_the_one_with_the_smallest_cosine_distance_on_the_validation_range(
    dataset: Dataset, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = random_vectors(NUM_SONGS)
    selection = make_selection(dataset, SPLIT, vectors)
    assert selection is not None
    queries, targets = selection.ahead(*OFFSETS[name])
    distances = {}
    for penalty in module.PENALTIES:
        trial = WeightedRecommender.fit(
            selection.batches(), vectors, name=name, allowed=SPLIT.selection, penalty=penalty
        )
        taste_vectors = trial.vectors(selection.histories, queries)
        distances[penalty] = float(
            np.mean([1 - vector @ vectors[song] for vector, song in zip(taste_vectors, targets, strict=True)])
        )
    best_penalty = min(distances, key=lambda penalty: distances[penalty])
    assert choose_penalty(selection, name) == best_penalty
    (recommender,) = fit_baselines([name], dataset, vectors, SPLIT.final, selection)
    final_batches = (SPLIT.final.select(batch) for batch in dataset.read_all())
    expected = WeightedRecommender.fit(final_batches, vectors, name=name, allowed=SPLIT.final, penalty=best_penalty)
    assert isinstance(recommender, WeightedRecommender)
    np.testing.assert_allclose(recommender.weights, expected.weights)
