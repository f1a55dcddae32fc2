"""The songs chosen for a user, also between the two horizons, against rankings computed over all songs."""

from typing import Any

import numpy as np
import pytest
from served import AT, NUM_SONGS, WITHOUT_VECTOR, write_release, write_world
from worlds import random_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, Queries
from rayrec.errors import InputError
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.filters import AnswerFilter, SongSet
from rayrec.recommend.reranking import AnswerOptions, SelectedSongs, choose, diversify, network_of, pool_size
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HORIZONS, TwoStepRecommender
from rayrec.storage.releases import default_parts
from rayrec.storage.workspace import Workspace

HISTORY = Histories.from_lists([[3, 50, 3, 9]], [[AT - 60_000 * back for back in (3, 2, 1, 0)]])
WEIGHTS = [0.0, 0.2, 0.5, 0.9, 1.0]


@pytest.fixture(scope="module", params=["network", "two-step"])
def recommender(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseRecommender:
    workspace = Workspace(tmp_path_factory.mktemp("choosing") / "workspace")
    write_world(workspace)
    write_release(workspace, ranked=request.param == "two-step")
    loaded = load_recommender(workspace, Dataset(workspace), default_parts(workspace))
    assert isinstance(loaded, TwoStepRecommender) is (request.param == "two-step")
    return loaded


def chosen_by(recommender: BaseRecommender, **options: Any) -> SelectedSongs:
    (chosen,) = chosen_for(recommender, HISTORY, [AnswerOptions(**options)])
    return chosen


def chosen_for(recommender: BaseRecommender, plays: Histories, options: list[AnswerOptions]) -> list[SelectedSongs]:
    vectors = network_of(recommender).vectors_of(plays, Queries.at_end(plays, AT), HORIZONS)
    return choose(recommender, vectors, plays, np.full(len(plays), AT), options)


def by_definition(recommender: BaseRecommender, weight: float) -> np.ndarray:
    """float32 (N,): the score of each song, with `weight` for the long horizon."""
    network, queries = network_of(recommender), Queries.at_end(HISTORY, AT)
    short, long = (network.vectors(HISTORY, queries, horizon)[0] for horizon in ("short", "long"))
    if isinstance(recommender, TwoStepRecommender):
        soon, later = (recommender.score(HISTORY, queries, horizon)[0] for horizon in ("short", "long"))
        soon, later = np.maximum(soon, 0), np.maximum(later, 0)  # 0 instead of -inf, which cannot be weighted
        scores = soon if weight == 0 else later if weight == 1 else _mixed(recommender, weight)
    else:
        mixed = (1 - weight) * short + weight * long
        scores = network.song_vectors @ (mixed / np.linalg.norm(mixed))
    scores[WITHOUT_VECTOR] = -np.inf
    return np.asarray(scores)


def _mixed(recommender: TwoStepRecommender, weight: float) -> np.ndarray:
    """float32 (N,): the mean of the candidates' shares on both horizons."""
    scores = np.zeros(NUM_SONGS, dtype=np.float32)
    for _, scored in recommender.source.batches(HISTORY, Queries.at_end(HISTORY, AT)):
        rows = scored.candidates.rows
        short, long = (
            recommender.rankers[kind].calibration.shares_of(rows, recommender.rankers[kind].scores(scored.features))
            for kind in ("next", "long")
        )
        scores[scored.candidates.songs] = (1 - weight) * short + weight * long
    return scores


@pytest.mark.parametrize("weight", WEIGHTS)
def test_songs_come_by_the_horizons_mixed_with_the_weight(recommender: BaseRecommender, weight: float) -> None:
    scores = by_definition(recommender, weight)
    chosen = chosen_by(recommender, k=NUM_SONGS, long_weight=weight)
    assert len(chosen.songs) == NUM_SONGS - 1
    np.testing.assert_allclose(chosen.scores, np.sort(scores)[::-1][:-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores[chosen.songs], chosen.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_filters_leave_the_others_in_their_order(recommender: BaseRecommender, weight: float) -> None:
    everything = chosen_by(recommender, k=NUM_SONGS, long_weight=weight).songs
    allowed, excluded = np.arange(NUM_SONGS) % 3 == 0, np.array([0, 3, 9, 30])
    answer_filter = AnswerFilter(allowed=SongSet.of_mask(allowed), excluded=excluded)
    chosen = chosen_by(recommender, k=20, long_weight=weight, answer_filter=answer_filter).songs
    expected = [song for song in everything if allowed[song] and song not in excluded]
    assert chosen.tolist() == expected[:20]


def test_users_of_a_batch_get_what_each_alone_gets_and_are_ranked_once_for_each_kind_of_request(
    recommender: BaseRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = [[3, 50, 9], [7], [1, 2, 3, 4, 5], [9, 9, 8], [20, 21], [60, 3]]
    plays = Histories.from_lists(songs, [[AT - 60_000 * back for back in range(len(own), 0, -1)] for own in songs])
    some = AnswerFilter(excluded=np.array([3, 9]))
    kinds: list[dict[str, Any]] = [
        *({"k": 5}, {"k": 5, "answer_filter": some}, {"k": 5, "explain": True}, {"k": 7}),
        *({"k": 5, "long_weight": 0.5, "diversity": 0.5}, {"k": 5, "songs_to_rank": np.array([5, 3, 60])}),
    ]
    options = [AnswerOptions(**kind) for kind in kinds]
    alone = [chosen_for(recommender, plays.take(np.array([row])), [options[row]])[0] for row in range(len(plays))]
    is_two_step, ranked = isinstance(recommender, TwoStepRecommender), []
    ranker, name = (TwoStepRecommender, "rank_queries") if is_two_step else (TasteRecommender, "rank_vectors")
    rank = getattr(ranker, name)

    def noted(own: Any, first: Any, *rest: Any, **how: Any) -> Any:
        ranked.append(len(first))
        return rank(own, first, *rest, **how)

    monkeypatch.setattr(ranker, name, noted)
    together = chosen_for(recommender, plays, options)
    for one, other in zip(together, alone, strict=True):
        assert one.songs.tolist() == other.songs.tolist()
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-5)
        assert (one.path, len(one.features)) == (other.path, len(other.features))
    assert ranked == ([3, 1, 1, 1] if is_two_step else [3, 1, 1])  # a network orders given songs without this call


@pytest.mark.parametrize("wrong", [{"k": 0}, {"long_weight": 1.1}, {"long_weight": -0.1}, {"diversity": 2.0}])
def test_wishes_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        AnswerOptions(**{"k": 1, **wrong})


def by_hand(vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    chosen: list[int] = []
    left = list(range(len(vectors)))
    while left and len(chosen) < k:

        def worth(song: int) -> float:
            relevance = 1 - song / max(1, len(vectors) - 1)
            likeness = max((float(vectors[song] @ vectors[other]) for other in chosen), default=0.0)
            return (1 - diversity) * relevance - diversity * likeness

        best = max(left, key=worth)
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("songs", "k"), [(40, 10), (12, 12), (5, 9), (1, 1)])
def test_choices_equal_the_definition(songs: int, k: int, diversity: float) -> None:
    vectors = random_vectors(songs, dim=4, seed=songs)
    chosen = diversify(vectors, k, diversity)
    assert chosen.tolist() == by_hand(vectors, k, diversity)
    assert len(set(chosen.tolist())) == min(k, songs)


def test_no_diversity_keeps_the_order() -> None:
    assert diversify(random_vectors(30), 7, 0.0).tolist() == list(range(7))


def test_songs_of_one_kind_come_last_although_they_rank_first() -> None:
    alike = np.tile(random_vectors(1, dim=8), (6, 1))
    others = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:4].astype(np.float32)
    vectors = np.concatenate([alike, others])
    first = diversify(vectors, 5, 0.7)
    assert first[0] == 0
    assert set(first[1:].tolist()) == {6, 7, 8, 9}


def test_answers_grow_more_diverse() -> None:
    vectors = random_vectors(200, dim=6, seed=2)

    def likeness(diversity: float) -> float:
        chosen = vectors[diversify(vectors, 20, diversity)]
        return float((chosen @ chosen.T)[~np.eye(20, dtype=np.bool_)].mean())

    assert likeness(0.0) > likeness(0.3) > likeness(0.9)


def test_nothing_to_choose_from_chooses_nothing() -> None:
    assert diversify(np.zeros((0, 4), np.float32), 5, 0.5).tolist() == []


def test_there_are_always_more_songs_to_choose_from() -> None:
    assert pool_size(10) == 110
    assert pool_size(1_000) == 2_000
