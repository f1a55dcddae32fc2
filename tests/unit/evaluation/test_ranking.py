"""Ranks and lists are those that recommend serves."""

import numpy as np
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Questions
from rayrec.data.split import FitRange, Split
from rayrec.evaluation.metrics import NEVER
from rayrec.evaluation.protocol import plays_to_predict
from rayrec.evaluation.ranking import Ranked, rank_answers
from rayrec.evaluation.targets import answers
from rayrec.recommend.base import Recommender
from rayrec.recommend.discounted_average import AverageRecommender
from rayrec.recommend.popularity import PopularityRecommender
from rayrec.recommend.sequential_rules import SequentialRulesRecommender

EVERYTHING = Split(id="s", dataset="d", validation_from=0, test_from=0)


def _ranked(recommender: Recommender, histories: Histories, questions: Questions, known: np.ndarray) -> Ranked:
    wanted = {target: answers(histories, questions, target) for target in ("next", "next10")}
    drawn = np.arange(len(questions)) % 3 == 0
    return rank_answers(recommender, histories, questions, wanted, known, depth=100, drawn=drawn)


def test_a_song_that_no_fit_has_seen_is_a_miss_however_well_it_scores() -> None:
    popular = PopularityRecommender(np.array([0, 0, 0, 9]))
    histories = Histories.from_lists([[0, 3, 0, 7]], [[100, 101, 102, 103]])
    questions = Questions.before_plays(histories, np.array([1, 2, 3]))
    ranks = _ranked(popular, histories, questions, np.array([True, True, True, False])).ranks
    assert ranks["next"].tolist() == [NEVER, 4, NEVER]  # song 7 is not even in the catalog
    assert ranks["next10"].tolist() == [4, NEVER, NEVER, 4, NEVER, NEVER]  # of the songs 0, 3, 7, then 0, 7, then 7


def test_ranks_and_lists_are_those_that_recommend_serves() -> None:
    histories = random_histories(20, 30, seed=8)
    rules = SequentialRulesRecommender.fit([histories], num_songs=30, allowed=FitRange(), rules_per_song=4)
    plays = plays_to_predict(histories, EVERYTHING)
    questions = Questions.before_plays(histories, plays)
    for recommender in (AverageRecommender(random_vectors(30), 0.5), rules):
        ranked = _ranked(recommender, histories, questions, np.ones(30, bool))
        for question in range(0, len(questions), 21):
            row, seen = questions.rows[question], questions.seen[question]
            past = histories.take(np.array([row])).keep(np.arange(histories.lengths[row]) < seen)
            songs, scores = recommender.recommend_one(past, int(questions.at[question]), 30)
            target = histories.songs[plays[question]]
            own = scores[songs == target][0]
            assert ranked.ranks["next"][question] == (scores >= own).sum()
            listed = ranked.listed_songs[ranked.listed_rows == question]
            assert sorted(listed.tolist()) == sorted(songs[:20].tolist())
        assert set(ranked.listed_rows.tolist()) == set(range(0, len(questions), 3))


def test_chunks_of_questions_change_nothing(monkeypatch: object) -> None:
    histories = random_histories(20, 30, seed=8)
    recommender = AverageRecommender(random_vectors(30), 0.5)
    questions = Questions.before_plays(histories, plays_to_predict(histories, EVERYTHING))
    whole = _ranked(recommender, histories, questions, np.ones(30, bool))
    from rayrec.recommend import base as base

    monkeypatch.setattr(base, "SCORES_IN_CACHE", 30 * 7)  # type: ignore[attr-defined]
    monkeypatch.setattr(base, "FEW_QUESTIONS", 1)  # type: ignore[attr-defined]
    parts = _ranked(recommender, histories, questions, np.ones(30, bool))
    np.testing.assert_array_equal(parts.listed_songs, whole.listed_songs)
    np.testing.assert_array_equal(parts.ranks["next10"], whole.ranks["next10"])
