"""The expected calibration error of recommenders whose chances are known."""

from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import Split
from rayrec.evaluation.calibration import calibration_sums, expected_calibration_error
from rayrec.evaluation.evaluator import Evaluator, PrefixEvaluator, PrefixFile, parse_prefixes
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.results import Statistics, statistics_of
from rayrec.recommend.base import CandidateRecommender, HorizonName, ScoredCandidates
from rayrec.recommend.baselines import PopularityRecommender

SPLIT = Split(id="cut", dataset="by-hand", validation_from=10, test_from=10)
CONFIG = EvaluateConfig(bootstrap_samples=5, offsets=0, max_curve_users=0)
HEARD = 2  # the song that everybody plays first
NEXT = {0: 6, 1: 4, HEARD: 10}  # song -> how many of twenty users play it next


class Known(CandidateRecommender):
    """Three songs with the same chances for every query."""

    name = "known"
    num_songs = 3
    retrievers = ("three",)
    scores_are_probabilities: ClassVar[bool] = True

    def __init__(self, chances: tuple[float, float, float], new_chances: tuple[float, float]) -> None:
        """`new_chances` are the chances of songs 0 and 1 if heard songs are left out."""
        self._chances, self._new_chances = np.array(chances), np.array([*new_chances, 0.0])

    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """Yield the candidates in two slices."""
        half = len(queries) // 2
        for begin, end in ((0, half), (half, len(queries))):
            yield slice(begin, end), self._candidates(end - begin)

    def _candidates(self, queries: int) -> ScoredCandidates:
        def scores(_: HorizonName, exclude_heard: bool) -> np.ndarray:
            chances = self._new_chances if exclude_heard else self._chances
            return np.tile(chances, queries).astype(np.float32)

        return ScoredCandidates(
            rows=np.repeat(np.arange(queries), 3),
            songs=np.tile(np.arange(3), queries),
            scores=scores,
            retrievers={"three": np.arange(3 * queries)},
        )


def _histories() -> Histories:
    lists = [[HEARD, song] for song, users in NEXT.items() for _ in range(users)]
    return Histories.from_lists(lists, [[0, 20] for _ in lists], [f"user-{row}" for row in range(len(lists))])


@pytest.mark.parametrize(
    ("chances", "new_chances", "next_error", "served_error"),
    [
        ((0.3, 0.2, 0.5), (0.3, 0.2), 0.0, 0.0),
        ((0.1, 0.2, 0.6), (0.6, 0.4), 0.3 / 3, 0.5 / 2),  # new_chances add up to 1, as if nobody played a heard song
        ((0.1, 0.4, 0.5), (0.2, 0.3), 0.4 / 3, 0.2 / 2),  # new_chances are right on average only
    ],
)
def test_a_recommender_of_known_chances_has_the_known_error(
    chances: tuple[float, float, float], new_chances: tuple[float, float], next_error: float, served_error: float
) -> None:
    models = [PopularityRecommender(np.ones(3)), Known(chances, new_chances)]
    evaluator = Evaluator(models, split=SPLIT, song_plays=np.ones(3), config=CONFIG)
    histories = _histories()
    sums = evaluator.empty()
    for some in (np.arange(7), np.arange(7, 20)):  # as buckets are added up
        sums.add(evaluator(histories.take(some)))
    served, following = statistics_of(sums, evaluator, "known")["calibration"]
    assert (served["model"], served["target"], served["songs"]) == ("known", "served", 40)  # heard songs are left out
    assert (following["model"], following["target"], following["songs"]) == ("known", "next", 60)
    assert (served["value"], following["value"]) == pytest.approx((served_error, next_error), abs=1e-6)
    assert (served["right"], following["right"]) == pytest.approx((10 / 40, 20 / 60), abs=1e-6)
    assert served["chance"] == pytest.approx(sum(new_chances) / 2, abs=1e-6)


def test_given_pairs_have_the_same_error_as_histories() -> None:
    ids = pa.chunked_array([["a", "b", "c"]])
    lines = [f"{'abc'[HEARD]}\t{'abc'[song]}" for song, users in NEXT.items() for _ in range(users)]
    evaluator = PrefixEvaluator([Known((0.1, 0.2, 0.6), (0.6, 0.4))], song_plays=np.ones(3), config=CONFIG)
    sums = evaluator(parse_prefixes(pa.array(lines), PrefixFile(path="pairs.txt"), ids))
    errors = [row["value"] for row in Statistics(sums, evaluator.recommenders, CONFIG).calibration()]
    assert errors == pytest.approx([0.5 / 2, 0.3 / 3], abs=1e-6)


def test_errors_of_low_and_high_chances_do_not_make_up_for_each_other() -> None:
    chances = (np.arange(100_000) + 0.5) / 100_000
    right = 1 - chances  # expected values instead of draws
    assert chances.mean() == pytest.approx(right.mean())
    assert expected_calibration_error(calibration_sums(chances, right)) == pytest.approx(
        0.5, abs=0.01
    )  # |2 chance - 1|
    assert expected_calibration_error(calibration_sums(chances, chances)) == pytest.approx(0, abs=1e-9)


def test_small_chances_are_told_apart() -> None:
    """Most songs of an answer have a chance below 0.01, as all songs have here."""
    chances = 10 ** np.linspace(-4, -2, 100_000)
    right = np.where(chances < 0.001, 2, 0.75) * chances
    expected = np.where(chances < 0.001, 1, 0.25) * chances
    assert expected_calibration_error(calibration_sums(chances, right)) == pytest.approx(expected.mean(), rel=0.05)
