"""Slices on planted plays: new listeners, sessions after a pause, and sessions far from the long-term taste."""

from typing import Any

import numpy as np
import pytest

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import DAY_MS, Split
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import (
    DRIFTS,
    GAPS,
    EvaluateConfig,
    gap_days,
    plays_before_session,
    session_cosines,
    slice_masks,
    slices_of,
)
from rayrec.evaluation.results import Statistics
from rayrec.recommend.base import VectorRecommender
from rayrec.recommend.baselines import PopularityRecommender
from rayrec.recommend.reranking import AnswerOptions, PopularOrder, choose_popular

HOUR, MINUTE = DAY_MS // 24, DAY_MS // 1440
DAY = 20_000 * DAY_MS


class MeanOfSongs(VectorRecommender):
    """A recommender whose taste vector is the mean of all songs before the query."""

    name = "mean"

    def vectors(self, histories: Histories, queries: Queries, horizon: Any = "short") -> np.ndarray:
        rows = []
        for row, seen in zip(queries.rows, queries.seen, strict=True):
            begin = histories.offsets[row]
            rows.append(self.song_vectors[histories.songs[begin : begin + seen]].sum(axis=0))
        vectors = np.stack(rows)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture
def world() -> tuple[Histories, Queries]:
    """A session of song 0, one of song 1 a hundred days later, and one of song 0 three days after that."""
    songs = [0, 0, 0, 1, 1, 0, 0]
    times = [0, MINUTE, 2 * MINUTE, 100 * DAY_MS, 100 * DAY_MS + MINUTE, 103 * DAY_MS, 103 * DAY_MS + MINUTE]
    histories = Histories.from_lists([songs], [[DAY + time for time in times]])
    return histories, Queries.before_plays(histories, np.arange(1, 7))


def test_a_session_begins_after_half_an_hour(world: tuple[Histories, Queries]) -> None:
    before = plays_before_session(*world)
    assert before.tolist() == [0, 0, 3, 3, 5, 5]
    days = gap_days(*world, before)
    assert days[:2].tolist() == [-1, -1]  # nothing lies before the first session
    assert days[2:] == pytest.approx([100, 100, 3, 3], abs=0.01)


def test_slices_of_gap_and_drift_hold_the_planted_sessions(world: tuple[Histories, Queries]) -> None:
    histories, queries = world
    network = MeanOfSongs(np.array([[1, 0], [-1, 0.1]], dtype=np.float32))
    masks = slice_masks(histories, queries, np.array([6]), (), network)
    held = {
        place: np.flatnonzero(mask).tolist() for place, mask in zip(slices_of(()), masks, strict=True) if mask.any()
    }
    gaps = {name: held.get(("gap", name), []) for name in GAPS}
    assert gaps == {"under 1 day": [], "1-6 days": [4, 5], "7-29 days": [], "30-89 days": [], "90+ days": [2, 3]}
    drifts = {name: held.get(("drift", name), []) for name in DRIFTS}
    assert drifts == {"below 0": [3], "0 to 0.25": [], "0.25 to 0.5": [], "0.5 or more": [5]}
    assert [held.get(("known", plays)) for plays in ("0", "1", "5")] == [None, [0], [4]]
    without = slice_masks(histories, queries, np.array([6]), ())
    assert not without[[place for place, (by, _) in enumerate(slices_of(())) if by == "drift"]].any()


def test_what_a_session_is_compared_with_ends_before_it(world: tuple[Histories, Queries]) -> None:
    histories, queries = world
    network = MeanOfSongs(np.eye(2, dtype=np.float32))
    cosines = session_cosines(network, histories, queries, plays_before_session(histories, queries))
    assert np.isnan(cosines[[0, 1, 2, 4]]).all()  # the first session, and the first query of each later one
    assert cosines[3] == pytest.approx(0)
    assert cosines[5] == pytest.approx(3 / np.sqrt(3**2 + 2**2))


def test_users_without_plays_are_a_slice_of_their_own_that_changes_no_other_figure() -> None:
    # Three users begin in the test range: with song 0, the most played, with song 1, and with the unknown song 3.
    histories = Histories.from_lists(
        [[0, 0, 0, 1], [0, 2], [1], [3, 0]], [[1, 2, 3, 4], [11, 12], [13], [14, 15]], ["old", "a", "b", "c"]
    )
    split = Split(id="s", dataset="d", validation_from=5, test_from=10)
    config = EvaluateConfig(ks=(1, 20), bootstrap_samples=0, offsets=0)
    evaluator = Evaluator(
        [PopularityRecommender(np.array([3, 1, 0, 0]))],
        split=split,
        song_plays=np.array([3, 1, 0, 0]),
        config=config,
    )
    figures = Statistics(evaluator(histories), evaluator.recommenders, config)
    known = {
        (row["slice"], row["metric"]): (row["value"], row["plays"])
        for row in figures.breakdowns(())
        if row["by"] == "known"
    }
    assert known[("0", "recall")] == (pytest.approx(2 / 3, abs=1e-5), 3)
    assert known[("0", "mrr")] == (pytest.approx((1 + 1 / 2) / 3, abs=1e-5), 3)
    assert known[("1", "recall")][1] == 2
    (recall,) = [
        row for row in figures.results(["next"]) if (row["metric"], row["k"], row["users"]) == ("recall", 20, "all")
    ]
    assert recall["plays"] == 2


def test_users_without_plays_get_what_is_played_of_late_by_many_artists() -> None:
    plays = np.array([900, 100, 50, 40, 30, 0])
    late = np.array([0, 60, 50, 40, 25])  # the sixth song came later and has no count
    artists = np.array([0, 1, 1, 1, 2])
    known = np.array([True, True, True, True, True, False])
    starting = PopularOrder.of(plays, known, recent_plays=late, artist_of_song=artists)
    chosen = choose_popular(starting, AnswerOptions(k=4))
    assert chosen.songs.tolist() == [1, 2, 4, 3]  # 60, 50 / 2, 25, 40 / 3; the tie goes to the song with more plays
    assert chosen.scores.tolist() == pytest.approx([60, 25, 25, 40 / 3])
    assert PopularOrder.of(plays, known).order.tolist() == [0, 1, 2, 3, 4]
