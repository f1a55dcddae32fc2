"""AnswerFilter: an answer has exactly k of the qualifying songs, whichever search path finds them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories
from rayrec.data.top_k import top_k
from rayrec.recommend import index as index_module
from rayrec.recommend.base import NO_SONG
from rayrec.recommend.baselines import ItemKnnRecommender
from rayrec.recommend.filters import ORDERED_AT_ONCE, AnswerFilter, SongSet, first_of_order, without_heard
from rayrec.recommend.index import IndexConfig, SongIndex


@st.composite
def filters(draw: st.DrawFn, num_songs: int) -> AnswerFilter:
    """A filter with or without allowed songs, as rows or as a mask, and excluded songs, some of which may not exist."""
    excluded = draw(st.lists(st.integers(0, num_songs + 3), max_size=2 * num_songs))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=num_songs, max_size=num_songs))
    allowed = None if mask is None else SongSet(mask=np.array(mask, dtype=np.bool_))
    if allowed is not None and draw(st.booleans()):
        allowed = SongSet.of_rows(allowed.between(0, num_songs))
    return AnswerFilter(excluded=np.array(excluded, np.int32), allowed=allowed)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """A few songs with vectors of small whole numbers, so that scores are exact and ties are frequent."""
    num_songs, dim, num_queries = draw(st.integers(1, 16)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    vectors = draw(st.lists(vector, min_size=num_songs, max_size=num_songs))
    vectors[draw(st.integers(0, num_songs - 1))] = [1] * dim
    return {
        "vectors": np.array(vectors, np.float32),
        "queries": np.array(draw(st.lists(vector, min_size=num_queries, max_size=num_queries)), np.float32),
        "k": draw(st.integers(1, 30)),
        "filters": draw(st.lists(filters(num_songs), min_size=num_queries, max_size=num_queries)),
        # These limits reach all search paths in a small catalog: allowed songs are always or never few, and excluded
        # songs are always or never many.
        "few": draw(st.sampled_from([0, 100])),
        "overfetch": draw(st.sampled_from([0, 3, 1_000])),
    }


def brute_force(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The answers by scoring every song, and how many songs qualify for each query."""
    vectors = case["vectors"]
    scores, qualifying_counts = case["queries"] @ vectors.T, []
    for query_scores, answer_filter in zip(scores, case["filters"], strict=True):
        is_qualifying = [
            bool(vectors[song].any())
            and song not in answer_filter.excluded
            and (answer_filter.allowed is None or song in answer_filter.allowed.between(0, len(vectors)))
            for song in range(len(vectors))
        ]
        query_scores[~np.array(is_qualifying)] = -np.inf
        qualifying_counts.append(sum(is_qualifying))
    return (*top_k(scores, case["k"]), qualifying_counts)


@pytest.mark.parametrize(("kind", "nlist"), [("flat", 0), ("ivf", 1)])
@settings(max_examples=300)
@given(case=cases())
def test_an_answer_within_filters_equals_brute_force(kind: str, nlist: int, case: dict[str, Any]) -> None:
    # With one list IVF is exact, so that rankings can be compared song by song.
    config = IndexConfig(kind=kind, nlist=nlist, queries=4)
    index = SongIndex.build(case["vectors"], config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "FEW_SONGS", case["few"])
        patch.setattr(index_module, "MAX_OVERFETCH", case["overfetch"])
        patch.setattr(index_module, "MAX_LIST_SHARE", 1.0)
        ranking = index.rank(case["queries"], case["k"], case["filters"])
    songs, scores, _ = brute_force(case)
    np.testing.assert_array_equal(ranking.songs, songs)
    np.testing.assert_array_equal(ranking.scores, scores)


@settings(max_examples=300)
@given(case=cases(), lists=st.integers(2, 6))
def test_an_index_that_looks_into_few_lists_still_holds_exactly_k_that_qualify(
    case: dict[str, Any], lists: int
) -> None:
    config = IndexConfig(kind="ivf", nlist=lists, target_recall=0.01, queries=4)
    index = SongIndex.build(case["vectors"], config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "FEW_SONGS", case["few"])
        patch.setattr(index_module, "MAX_OVERFETCH", case["overfetch"])
        ranking = index.rank(case["queries"], case["k"], case["filters"])
    _, _, qualifying_counts = brute_force(case)
    for songs, scores, answer_filter, count in zip(
        ranking.songs, ranking.scores, case["filters"], qualifying_counts, strict=True
    ):
        real_songs = songs[songs != NO_SONG]
        assert len(set(real_songs.tolist())) == len(real_songs) == min(case["k"], count)
        assert answer_filter.qualify(real_songs).all()
        assert case["vectors"][real_songs].any(axis=1).all()
        assert np.isneginf(scores[len(real_songs) :]).all()
        assert (np.diff(scores[: len(real_songs)]) <= 0).all()


def _index(songs: int = 3_000) -> SongIndex:
    config = IndexConfig(kind="ivf", nlist=30, target_recall=0.5, queries=50)
    return SongIndex.build(random_vectors(songs, 16), config)


def test_a_ranking_reports_the_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FEW_SONGS", 100)
    index = _index()
    half_songs, hundred_songs = SongSet(mask=np.arange(3_000) % 2 == 0), SongSet.of_rows(np.arange(100))
    answer_filters = [
        AnswerFilter(),
        AnswerFilter(excluded=np.arange(10)),
        AnswerFilter(allowed=half_songs),
        AnswerFilter(excluded=np.arange(1_500)),
        AnswerFilter(allowed=SongSet.of_rows(np.arange(0, 3_000, 2))),
        AnswerFilter(allowed=hundred_songs),
        AnswerFilter(allowed=SongSet.of_rows(np.zeros(0, np.int64))),
    ]
    ranking = index.rank(random_vectors(len(answer_filters), 16, seed=1), 10, answer_filters)
    assert ranking.paths == ("index", "index", "selector", "selector", "selector", "exact", "exact")
    assert (ranking.songs[:6] != NO_SONG).all()
    assert (ranking.songs[6] == NO_SONG).all()


def test_a_search_among_few_looks_into_more_lists_so_that_recall_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FEW_SONGS", 0)
    monkeypatch.setattr(index_module, "MAX_LIST_SHARE", 1.0)
    vectors = random_vectors(6_000, 16)
    index = SongIndex.build(vectors, IndexConfig(kind="ivf", nlist=64, target_recall=0.95, queries=200))
    queries = random_vectors(40, 16, seed=1)
    is_allowed = np.arange(6_000) % 10 == 0
    ranking = index.rank(queries, 20, [AnswerFilter(allowed=SongSet.of_mask(is_allowed))] * 40)
    assert set(ranking.paths) == {"selector"}
    scores = queries @ vectors.T
    scores[:, ~is_allowed] = -np.inf
    exact, _ = top_k(scores, 20)
    recall = np.mean([np.isin(exact_row, row).mean() for exact_row, row in zip(exact, ranking.songs, strict=True)])
    assert recall >= 0.95


def test_filters_hold_without_an_index_as_with_one() -> None:
    vectors = random_vectors(80)
    vectors[::9] = 0
    plain, indexed = ItemKnnRecommender(vectors), ItemKnnRecommender(vectors)
    indexed.index = SongIndex.build(indexed.song_vectors, IndexConfig())
    histories = random_histories(20, 80, seed=3)
    histories = histories.take(histories.lengths > 0)
    allowed = SongSet.of_mask(np.arange(80) % 3 > 0)
    answer_filters = [
        AnswerFilter(excluded=np.array([row, 79 - row, 1_000]), allowed=allowed) for row in range(len(histories))
    ]
    expected = plain.rank(histories, 10**9, 12, filters=answer_filters)
    actual = indexed.rank(histories, 10**9, 12, filters=answer_filters)
    np.testing.assert_array_equal(actual.songs, expected.songs)
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=1e-5)
    for row, songs in enumerate(actual.songs):
        assert allowed.holds(songs).all()
        assert not {row, 79 - row} & set(songs.tolist())
    assert set(expected.paths) == {"exact"}


def test_heard_songs_are_added_to_the_given_filters() -> None:
    histories = Histories.from_lists([[1, 2], []], [[0, 1], []])
    allowed = SongSet.of_mask(np.ones(5, dtype=np.bool_))
    first, second = without_heard(histories, [AnswerFilter(excluded=np.array([4]), allowed=allowed), AnswerFilter()])
    assert sorted(first.excluded.tolist()) == [1, 2, 4]
    assert first.allowed is allowed
    assert second.excluded.tolist() == []
    assert [answer_filter.excluded.tolist() for answer_filter in without_heard(histories)] == [[1, 2], []]


@pytest.mark.parametrize("allowed", [SongSet(mask=np.array([True, True, False])), SongSet.of_rows(np.array([0, 1]))])
def test_songs_of_an_older_or_newer_catalog_do_no_harm(allowed: SongSet) -> None:
    answer_filter = AnswerFilter(excluded=np.array([0, 9]), allowed=allowed)
    assert answer_filter.qualify(np.arange(5)).tolist() == [False, True, False, False, False]
    for num_songs in (1, 2, 5):
        expected = [1] if num_songs > 1 else []
        assert np.concatenate(list(answer_filter.qualifying(num_songs, 1))).tolist() == expected
    scores = np.zeros(5, dtype=np.float32)
    answer_filter.mask_scores(scores)
    assert np.isfinite(scores).tolist() == [False, True, False, False, False]


def test_a_set_of_songs_is_the_same_as_rows_and_as_a_mask() -> None:
    mask = np.random.default_rng(0).random(50) < 0.4
    rows = np.flatnonzero(mask)
    sets = [SongSet(mask=mask), SongSet.of_mask(mask), SongSet.of_rows(np.append(rows[::-1], [-1, rows[0]]))]
    queried_rows = np.arange(70)
    for songs in sets:
        assert len(songs) == len(rows)
        assert songs.holds(queried_rows).tolist() == np.isin(queried_rows, rows).tolist()
        assert songs.between(10, 30).tolist() == [row for row in rows if 10 <= row < 30]
        for added_songs in sets:
            assert songs.union(added_songs, 60).between(0, 200).tolist() == [*rows, *(60 + rows)]
    assert sets[0].bits is sets[0].bits  # computed once for all answers
    assert np.unpackbits(sets[0].bits, bitorder="little")[:50].astype(bool).tolist() == mask.tolist()


@pytest.mark.parametrize("every", [1, 7])
def test_the_first_songs_of_an_order_are_found_a_few_rows_at_a_time(every: int) -> None:
    order = np.random.default_rng(0).permutation(50_000)
    row_counts = []

    def qualify(rows: np.ndarray) -> np.ndarray:
        row_counts.append(len(rows))
        return np.asarray(rows % every == 0)

    expected = order[order % every == 0]
    for count in (1, 20, 60_000):
        row_counts.clear()
        np.testing.assert_array_equal(first_of_order(order, qualify, count), expected[:count])
        assert max(row_counts) <= max(2 * count, ORDERED_AT_ONCE)
        assert sum(row_counts) < 8 * every * count
    assert first_of_order(order[:0], qualify, 5).tolist() == []
