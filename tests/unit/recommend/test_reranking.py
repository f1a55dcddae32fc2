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
from rayrec.recommend.reranking import (
    AnswerOptions,
    PopularOrder,
    SelectedSongs,
    choose,
    choose_popular,
    diversify,
    network_of,
    pool_size,
)
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


def select_songs(recommender: BaseRecommender, **options: Any) -> SelectedSongs:
    (selection,) = select_for_users(recommender, HISTORY, [AnswerOptions(**options)])
    return selection


def select_for_users(
    recommender: BaseRecommender, histories: Histories, options: list[AnswerOptions]
) -> list[SelectedSongs]:
    vectors = network_of(recommender).vectors_of(histories, Queries.at_end(histories, AT), HORIZONS)
    return choose(recommender, vectors, histories, np.full(len(histories), AT), options)


def expected_scores(recommender: BaseRecommender, weight: float) -> np.ndarray:
    """float32 (N,): the score of each song, with `weight` for the long horizon."""
    network, queries = network_of(recommender), Queries.at_end(HISTORY, AT)
    short_vector, long_vector = (network.vectors(HISTORY, queries, horizon)[0] for horizon in ("short", "long"))
    if isinstance(recommender, TwoStepRecommender):
        short_scores, long_scores = (recommender.score(HISTORY, queries, horizon)[0] for horizon in ("short", "long"))
        # 0 instead of -inf, which cannot be weighted.
        short_scores, long_scores = np.maximum(short_scores, 0), np.maximum(long_scores, 0)
        scores = short_scores if weight == 0 else long_scores if weight == 1 else _mixed_scores(recommender, weight)
    else:
        mixed_vector = (1 - weight) * short_vector + weight * long_vector
        scores = network.song_vectors @ (mixed_vector / np.linalg.norm(mixed_vector))
    scores[WITHOUT_VECTOR] = -np.inf
    return np.asarray(scores)


def _mixed_scores(recommender: TwoStepRecommender, weight: float) -> np.ndarray:
    """float32 (N,): the mean of the candidates' shares on both horizons."""
    scores = np.zeros(NUM_SONGS, dtype=np.float32)
    for _, scored in recommender.source.batches(HISTORY, Queries.at_end(HISTORY, AT)):
        rows = scored.candidates.rows
        short_shares, long_shares = (
            recommender.rankers[kind].calibration.shares_of(rows, recommender.rankers[kind].scores(scored.features))
            for kind in ("next", "long")
        )
        scores[scored.candidates.songs] = (1 - weight) * short_shares + weight * long_shares
    return scores


@pytest.mark.parametrize("weight", WEIGHTS)
def test_songs_are_ordered_by_the_horizons_mixed_with_the_weight(recommender: BaseRecommender, weight: float) -> None:
    scores = expected_scores(recommender, weight)
    selection = select_songs(recommender, k=NUM_SONGS, long_weight=weight)
    assert len(selection.songs) == NUM_SONGS - 1
    np.testing.assert_allclose(selection.scores, np.sort(scores)[::-1][:-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scores[selection.songs], selection.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_filters_keep_the_order_of_the_remaining_songs(recommender: BaseRecommender, weight: float) -> None:
    all_songs = select_songs(recommender, k=NUM_SONGS, long_weight=weight).songs
    is_allowed, excluded = np.arange(NUM_SONGS) % 3 == 0, np.array([0, 3, 9, 30])
    answer_filter = AnswerFilter(allowed=SongSet.of_mask(is_allowed), excluded=excluded)
    songs = select_songs(recommender, k=20, long_weight=weight, answer_filter=answer_filter).songs
    expected = [song for song in all_songs if is_allowed[song] and song not in excluded]
    assert songs.tolist() == expected[:20]


def test_users_of_a_batch_get_what_each_alone_gets_and_are_ranked_once_for_each_kind_of_request(
    recommender: BaseRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = [[3, 50, 9], [7], [1, 2, 3, 4, 5], [9, 9, 8], [20, 21], [60, 3]]
    histories = Histories.from_lists(
        songs, [[AT - 60_000 * back for back in range(len(user_songs), 0, -1)] for user_songs in songs]
    )
    answer_filter = AnswerFilter(excluded=np.array([3, 9]))
    option_kwargs: list[dict[str, Any]] = [
        *({"k": 5}, {"k": 5, "answer_filter": answer_filter}, {"k": 5, "explain": True}, {"k": 7}),
        *({"k": 5, "long_weight": 0.5, "diversity": 0.5}, {"k": 5, "songs_to_rank": np.array([5, 3, 60])}),
    ]
    options = [AnswerOptions(**kwargs) for kwargs in option_kwargs]
    single_selections = [
        select_for_users(recommender, histories.take(np.array([row])), [options[row]])[0]
        for row in range(len(histories))
    ]
    is_two_step, batch_sizes = isinstance(recommender, TwoStepRecommender), []
    recommender_class, method_name = (
        (TwoStepRecommender, "rank_queries") if is_two_step else (TasteRecommender, "rank_vectors")
    )
    original_rank = getattr(recommender_class, method_name)

    def rank_and_record_size(instance: Any, first_argument: Any, *args: Any, **kwargs: Any) -> Any:
        batch_sizes.append(len(first_argument))
        return original_rank(instance, first_argument, *args, **kwargs)

    monkeypatch.setattr(recommender_class, method_name, rank_and_record_size)
    batch_selections = select_for_users(recommender, histories, options)
    for batch_selection, single_selection in zip(batch_selections, single_selections, strict=True):
        assert batch_selection.songs.tolist() == single_selection.songs.tolist()
        np.testing.assert_allclose(batch_selection.scores, single_selection.scores, rtol=1e-5)
        assert (batch_selection.path, len(batch_selection.features)) == (
            single_selection.path,
            len(single_selection.features),
        )
    assert batch_sizes == ([3, 1, 1, 1] if is_two_step else [3, 1, 1])  # a network orders given songs without this call


@pytest.mark.parametrize("wrong", [{"k": 0}, {"long_weight": 1.1}, {"long_weight": -0.1}, {"diversity": 2.0}])
def test_options_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        AnswerOptions(**{"k": 1, **wrong})


def expected_order(vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    chosen_songs: list[int] = []
    remaining = list(range(len(vectors)))
    while remaining and len(chosen_songs) < k:

        def score(song: int) -> float:
            relevance = 1 - song / max(1, len(vectors) - 1)
            similarity = max((float(vectors[song] @ vectors[chosen_song]) for chosen_song in chosen_songs), default=0.0)
            return (1 - diversity) * relevance - diversity * similarity

        best_song = max(remaining, key=score)
        chosen_songs.append(best_song)
        remaining.remove(best_song)
    return chosen_songs


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("songs", "k"), [(40, 10), (12, 12), (5, 9), (1, 1)])
def test_choices_equal_the_definition(songs: int, k: int, diversity: float) -> None:
    vectors = random_vectors(songs, dim=4, seed=songs)
    choice = diversify(vectors, k, diversity)
    assert choice.tolist() == expected_order(vectors, k, diversity)
    assert len(set(choice.tolist())) == min(k, songs)


def test_no_diversity_keeps_the_order() -> None:
    assert diversify(random_vectors(30), 7, 0.0).tolist() == list(range(7))


def test_songs_of_one_kind_come_last_although_they_rank_first() -> None:
    similar_vectors = np.tile(random_vectors(1, dim=8), (6, 1))
    distinct_vectors = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:4].astype(np.float32)
    vectors = np.concatenate([similar_vectors, distinct_vectors])
    choice = diversify(vectors, 5, 0.7)
    assert choice[0] == 0
    assert set(choice[1:].tolist()) == {6, 7, 8, 9}


def test_answers_grow_more_diverse() -> None:
    vectors = random_vectors(200, dim=6, seed=2)

    def mean_similarity(diversity: float) -> float:
        chosen_vectors = vectors[diversify(vectors, 20, diversity)]
        return float((chosen_vectors @ chosen_vectors.T)[~np.eye(20, dtype=np.bool_)].mean())

    assert mean_similarity(0.0) > mean_similarity(0.3) > mean_similarity(0.9)


def test_nothing_to_choose_from_chooses_nothing() -> None:
    assert diversify(np.zeros((0, 4), np.float32), 5, 0.5).tolist() == []


def test_there_are_always_more_songs_to_choose_diverse_ones_from() -> None:
    assert pool_size(AnswerOptions(k=10, diversity=0.5)) == 110
    assert pool_size(AnswerOptions(k=1_000, diversity=0.5)) == 2_000
    assert pool_size(AnswerOptions(k=10)) == 10


class CountingFilter(AnswerFilter):
    """A filter that records how many songs it has checked at a time."""

    def __init__(self, counts: list[int], **settings: Any) -> None:
        super().__init__(**settings)
        object.__setattr__(self, "counts", counts)

    def qualify(self, rows: np.ndarray) -> np.ndarray:
        """Record the number of songs, then check them."""
        self.counts.append(len(rows))  # type: ignore[attr-defined]
        return super().qualify(rows)


def test_a_filter_of_few_songs_gives_the_popular_songs_of_the_whole_order_and_checks_only_those_few() -> None:
    random = np.random.default_rng(0)
    # Few different counts, so that many songs are equal.
    plays, recent_plays = random.integers(0, 9, size=50_000), random.integers(0, 3, size=40_000)
    is_known = random.random(50_000) < 0.9
    popular_order = PopularOrder.of(plays, is_known, recent_plays=recent_plays)
    allowed_rows, counts = random.choice(50_000, size=600, replace=False), []
    excluded = allowed_rows[:50]
    expected = [row for row in popular_order.order.tolist() if row in set(allowed_rows[50:].tolist())]
    # Row 60,000 is of a song that was added after the order was made.
    allowed = SongSet.of_rows(np.append(allowed_rows, 60_000))
    for k in (1, 20, 1_000):
        counts.clear()
        options = AnswerOptions(k=k, answer_filter=CountingFilter(counts, allowed=allowed, excluded=excluded))
        selection = choose_popular(popular_order, options)
        assert selection.songs.tolist() == expected[:k]
        assert selection.scores.tolist() == popular_order.discounted_plays[expected[:k]].tolist()
        assert sum(counts) == len(allowed)
    ranked = choose_popular(popular_order, AnswerOptions(k=1_000, songs_to_rank=allowed_rows[50:]))
    assert ranked.songs.tolist() == expected
