"""The expected calibration error of recommenders whose probabilities are known."""

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
FIRST_SONG = 2  # the song that everybody plays first
NEXT_SONG_COUNTS = {0: 6, 1: 4, FIRST_SONG: 10}  # song -> how many of twenty users play it next


class FixedProbabilities(CandidateRecommender):
    """Three songs with the same probabilities for every query."""

    name = "known"
    num_songs = 3
    retrievers = ("three",)
    scores_are_probabilities: ClassVar[bool] = True

    def __init__(self, probabilities: tuple[float, float, float], new_probabilities: tuple[float, float]) -> None:
        """`new_probabilities` are the probabilities of songs 0 and 1 if heard songs are left out."""
        self._probabilities, self._new_probabilities = np.array(probabilities), np.array([*new_probabilities, 0.0])

    def candidate_chunks(self, histories: Histories, queries: Queries) -> Iterator[tuple[slice, ScoredCandidates]]:
        """Yield the candidates in two slices."""
        half = len(queries) // 2
        for start, end in ((0, half), (half, len(queries))):
            yield slice(start, end), self._candidates(end - start)

    def _candidates(self, num_queries: int) -> ScoredCandidates:
        def scores(_: HorizonName, exclude_heard: bool) -> np.ndarray:
            probabilities = self._new_probabilities if exclude_heard else self._probabilities
            return np.tile(probabilities, num_queries).astype(np.float32)

        return ScoredCandidates(
            rows=np.repeat(np.arange(num_queries), 3),
            songs=np.tile(np.arange(3), num_queries),
            scores=scores,
            retrievers={"three": np.arange(3 * num_queries)},
        )


def _histories() -> Histories:
    song_lists = [[FIRST_SONG, song] for song, count in NEXT_SONG_COUNTS.items() for _ in range(count)]
    return Histories.from_lists(
        song_lists, [[0, 20] for _ in song_lists], [f"user-{row}" for row in range(len(song_lists))]
    )


@pytest.mark.parametrize(
    ("probabilities", "new_probabilities", "next_error", "served_error"),
    [
        ((0.3, 0.2, 0.5), (0.3, 0.2), 0.0, 0.0),
        # new_probabilities add up to 1, as if nobody played a heard song
        ((0.1, 0.2, 0.6), (0.6, 0.4), 0.3 / 3, 0.5 / 2),
        # new_probabilities are right on average only
        ((0.1, 0.4, 0.5), (0.2, 0.3), 0.4 / 3, 0.2 / 2),
    ],
)
def test_a_recommender_of_known_probabilities_has_the_known_error(
    probabilities: tuple[float, float, float],
    new_probabilities: tuple[float, float],
    next_error: float,
    served_error: float,
) -> None:
    models = [PopularityRecommender(np.ones(3)), FixedProbabilities(probabilities, new_probabilities)]
    evaluator = Evaluator(models, split=SPLIT, song_plays=np.ones(3), config=CONFIG)
    histories = _histories()
    sums = evaluator.empty()
    for user_rows in (np.arange(7), np.arange(7, 20)):  # as buckets are added up
        sums.add(evaluator(histories.take(user_rows)))
    served_entry, next_entry = statistics_of(sums, evaluator, "known")["calibration"]
    # As served, heard songs are left out.
    assert (served_entry["model"], served_entry["target"], served_entry["songs"]) == ("known", "served", 40)
    assert (next_entry["model"], next_entry["target"], next_entry["songs"]) == ("known", "next", 60)
    assert (served_entry["value"], next_entry["value"]) == pytest.approx((served_error, next_error), abs=1e-6)
    assert (served_entry["right"], next_entry["right"]) == pytest.approx((10 / 40, 20 / 60), abs=1e-6)
    assert served_entry["mean_probability"] == pytest.approx(sum(new_probabilities) / 2, abs=1e-6)


def test_given_pairs_have_the_same_error_as_histories() -> None:
    song_ids = pa.chunked_array([["a", "b", "c"]])
    lines = [f"{'abc'[FIRST_SONG]}\t{'abc'[song]}" for song, count in NEXT_SONG_COUNTS.items() for _ in range(count)]
    evaluator = PrefixEvaluator([FixedProbabilities((0.1, 0.2, 0.6), (0.6, 0.4))], song_plays=np.ones(3), config=CONFIG)
    sums = evaluator(parse_prefixes(pa.array(lines), PrefixFile(path="pairs.txt"), song_ids))
    errors = [row["value"] for row in Statistics(sums, evaluator.recommenders, CONFIG).calibration()]
    assert errors == pytest.approx([0.5 / 2, 0.3 / 3], abs=1e-6)


def test_errors_of_low_and_high_probabilities_do_not_make_up_for_each_other() -> None:
    probabilities = (np.arange(100_000) + 0.5) / 100_000
    right_shares = 1 - probabilities  # expected values instead of draws
    assert probabilities.mean() == pytest.approx(right_shares.mean())
    # |2 chance - 1|
    assert expected_calibration_error(calibration_sums(probabilities, right_shares)) == pytest.approx(0.5, abs=0.01)
    assert expected_calibration_error(calibration_sums(probabilities, probabilities)) == pytest.approx(0, abs=1e-9)


def test_small_probabilities_fall_into_different_bins() -> None:
    """Most songs of an answer have a chance below 0.01, as all songs have here."""
    probabilities = 10 ** np.linspace(-4, -2, 100_000)
    right_shares = np.where(probabilities < 0.001, 2, 0.75) * probabilities
    expected = np.where(probabilities < 0.001, 1, 0.25) * probabilities
    assert expected_calibration_error(calibration_sums(probabilities, right_shares)) == pytest.approx(
        expected.mean(), rel=0.05
    )
