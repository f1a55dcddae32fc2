"""Slices on planted plays: new listeners, sessions after a pause, and sessions far from the long-term taste."""

from typing import Any

import numpy as np
import pytest

from rayrec.data.histories import Histories, Queries
from rayrec.data.moments import DAY_MS
from rayrec.data.split import Split
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
START = 20_000 * DAY_MS


class MeanOfSongs(VectorRecommender):
    """A recommender whose taste vector is the mean of all songs before the query."""

    name = "mean"

    def vectors(self, histories: Histories, queries: Queries, horizon: Any = "short") -> np.ndarray:
        rows = []
        for row, plays_before in zip(queries.rows, queries.plays_before, strict=True):
            start = histories.offsets[row]
            rows.append(self.song_vectors[histories.songs[start : start + plays_before]].sum(axis=0))
        vectors = np.stack(rows)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=np.float32)


@pytest.fixture
def world() -> tuple[Histories, Queries]:
    """A session of song 0, one of song 1 a hundred days later, and one of song 0 three days after that."""
    songs = [0, 0, 0, 1, 1, 0, 0]
    times = [0, MINUTE, 2 * MINUTE, 100 * DAY_MS, 100 * DAY_MS + MINUTE, 103 * DAY_MS, 103 * DAY_MS + MINUTE]
    histories = Histories.from_lists([songs], [[START + time for time in times]])
    return histories, Queries.before_plays(histories, np.arange(1, 7))


def test_a_session_begins_after_half_an_hour(world: tuple[Histories, Queries]) -> None:
    plays_before = plays_before_session(*world)
    assert plays_before.tolist() == [0, 0, 3, 3, 5, 5]
    gaps = gap_days(*world, plays_before)
    assert gaps[:2].tolist() == [-1, -1]  # nothing lies before the first session
    assert gaps[2:] == pytest.approx([100, 100, 3, 3], abs=0.01)


def test_slices_of_gap_and_drift_hold_the_planted_sessions(world: tuple[Histories, Queries]) -> None:
    histories, queries = world
    network = MeanOfSongs(np.array([[1, 0], [-1, 0.1]], dtype=np.float32))
    masks = slice_masks(histories, queries, np.array([6]), (), network)
    queries_by_slice = {
        slice_id: np.flatnonzero(mask).tolist()
        for slice_id, mask in zip(slices_of(()), masks, strict=True)
        if mask.any()
    }
    gaps = {name: queries_by_slice.get(("gap", name), []) for name in GAPS}
    assert gaps == {"under 1 day": [], "1-6 days": [4, 5], "7-29 days": [], "30-89 days": [], "90+ days": [2, 3]}
    drifts = {name: queries_by_slice.get(("drift", name), []) for name in DRIFTS}
    assert drifts == {"below 0": [3], "0 to 0.25": [], "0.25 to 0.5": [], "0.5 or more": [5]}
    assert [queries_by_slice.get(("known", plays)) for plays in ("0", "1", "5")] == [None, [0], [4]]
    masks_without_network = slice_masks(histories, queries, np.array([6]), ())
    assert not masks_without_network[
        [slice_id for slice_id, (by, _) in enumerate(slices_of(())) if by == "drift"]
    ].any()


def test_a_session_is_compared_with_the_taste_before_it(world: tuple[Histories, Queries]) -> None:
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
    statistics = Statistics(evaluator(histories), evaluator.recommenders, config)
    value_and_plays = {
        (row["slice"], row["metric"]): (row["value"], row["plays"])
        for row in statistics.breakdowns(())
        if row["by"] == "known"
    }
    assert value_and_plays[("0", "recall")] == (pytest.approx(2 / 3, abs=1e-5), 3)
    assert value_and_plays[("0", "mrr")] == (pytest.approx((1 + 1 / 2) / 3, abs=1e-5), 3)
    assert value_and_plays[("1", "recall")][1] == 2
    (recall_row,) = [
        row for row in statistics.results(["next"]) if (row["metric"], row["k"], row["users"]) == ("recall", 20, "all")
    ]
    assert recall_row["plays"] == 2


def test_users_without_plays_get_recently_played_songs_of_many_artists() -> None:
    plays = np.array([900, 100, 50, 40, 30, 0])
    recent_plays = np.array([0, 60, 50, 40, 25])  # the sixth song came later and has no count
    artists = np.array([0, 1, 1, 1, 2])
    is_known = np.array([True, True, True, True, True, False])
    popular_order = PopularOrder.of(plays, is_known, recent_plays=recent_plays, artist_of_song=artists)
    answer = choose_popular(popular_order, AnswerOptions(k=4))
    assert answer.songs.tolist() == [1, 2, 4, 3]  # 60, 50 / 2, 25, 40 / 3; the tie goes to the song with more plays
    assert answer.scores.tolist() == pytest.approx([60, 25, 25, 40 / 3])
    assert PopularOrder.of(plays, is_known).order.tolist() == [0, 1, 2, 3, 4]
