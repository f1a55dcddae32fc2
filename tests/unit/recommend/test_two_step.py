"""Retrieve, then rank: equal answers alone and in a batch, exactly k songs within filters, at a bounded cost."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rankings import limited_source, retrieval_of
from worlds import random_histories, random_vectors, with_opinions

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.data.synthetic import COLLECTION, GenerateConfig, World
from rayrec.errors import InputError
from rayrec.model.added_songs import AddedSongs, ContentMap
from rayrec.model.network import TasteModel
from rayrec.model.train_config import FeatureSpec, ModelConfig
from rayrec.model.train_config import Horizon as Offsets
from rayrec.recommend import two_step
from rayrec.recommend.answer import known_songs, reasons
from rayrec.recommend.base import NO_SONG, HorizonName, QueryBatch
from rayrec.recommend.candidate_features import LIKE_FEATURES, SKIP_FEATURES
from rayrec.recommend.filters import AnswerFilter, SongSet, intersect_songs, without_heard
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.ranker import RankerSettings, fit_ranker, ndcg
from rayrec.recommend.reranking import AnswerOptions, PopularOrder, SelectedSongs, choose, choose_for_users
from rayrec.recommend.session_knn import VstanRecommender
from rayrec.recommend.stored_retrieval import Retrieval, RetrievalCounts
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HORIZONS, CandidateSource, RankerKind, TwoStepRecommender, examples_for
from rayrec.recommend.two_step_config import ABLATED_PARTS

Answers = dict[RankerKind, tuple[np.ndarray, np.ndarray]]

NUM_SONGS = 60
MINUTE = 60_000
NOW = 10**9
YEARS = 50 * 365 * 24 * 60 * MINUTE  # ms UTC, about the time of a request today


def _network(num_songs: int = NUM_SONGS) -> TasteRecommender:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = ModelConfig(
        num_songs=num_songs,
        embedding_dim=8,
        hidden_dim=12,
        num_layers=1,
        dropout=0.0,
        features=FeatureSpec(),
        horizons={"short": Offsets(min_offset=1, max_offset=1), "long": Offsets(min_offset=2, max_offset=4)},
        song_table="frozen",
        logit_scales={"short": 9.0, "long": 6.0},
        cell="gru",
        averages=(),
        input_table=False,
    )
    vectors = random_vectors(num_songs, 8)
    return TasteRecommender(TasteModel(config, torch.from_numpy(vectors)).eval(), vectors)


def _network_with_added_songs(artists: np.ndarray, albums: np.ndarray) -> TasteRecommender:
    """A network of NUM_SONGS songs with three added songs, one for each of the first three artists and albums."""
    unlearned = ContentMap(
        mean=np.zeros(8),
        strengths=np.ones(2),
        content_mean=np.zeros(0),
        content_scale=np.zeros(0),
        weights=np.zeros((0, 8)),
        penalty=0.0,
        explained=0.0,
    )
    network, vectors = _network(), random_vectors(3, 8, seed=5)
    network.add_songs(
        AddedSongs(
            rows=np.arange(NUM_SONGS, NUM_SONGS + 3),
            outputs=vectors,
            averaged=vectors,
            inputs=vectors,
            artist_rows=np.unique(artists, return_index=True)[1][:3],
            album_rows=np.unique(albums, return_index=True)[1][:3],
            output_map=unlearned,
            input_map=unlearned,
        )
    )
    return network


def _cycling_users(users: int, seed: int) -> Histories:
    """Users who play song n + 1 after song n most of the time, otherwise a random song."""
    random = np.random.default_rng(seed)
    lists = []
    for _ in range(users):
        song, songs = int(random.integers(NUM_SONGS)), []
        for _ in range(12):
            songs.append(song)
            song = (song + 1) % NUM_SONGS if random.random() < 0.7 else int(random.integers(NUM_SONGS))
        lists.append(songs)
    times = [[MINUTE * position for position in range(12)] for _ in lists]
    return Histories.from_lists(lists, times, user_ids=[f"{seed}-{row}" for row in range(users)])


def _last_plays(histories: Histories) -> tuple[Queries, np.ndarray]:
    """The query before the last play of each user, and the songs of these plays."""
    plays = histories.offsets[1:] - 1
    return Queries.before_plays(histories, plays), histories.songs[plays]


@pytest.fixture(scope="module")
def recommender() -> TwoStepRecommender:
    source = CandidateSource(_network(), retrieval_of([_cycling_users(150, 0)], num_songs=NUM_SONGS))
    histories = _cycling_users(400, 1)
    queries, targets = _last_plays(histories)
    held_out = np.arange(len(queries)) % 4 == 0
    rows = np.arange(len(queries))
    # The right songs differ for the long horizon and for answers of new songs, so that each ranker has its own order.
    answers: Answers = {
        "next": (rows, targets),
        "served": (rows, (targets + 3) % NUM_SONGS),
        "long": (rows, (targets + 7) % NUM_SONGS),
    }
    examples = examples_for(source, histories, queries, answers, held_out=held_out)
    settings = RankerSettings(trees=30, min_leaf=10)
    rankers = {kind: fit_ranker(part, source.sources.names, settings).ranker for kind, part in examples.items()}
    return TwoStepRecommender(source, rankers)


def test_the_learned_order_finds_more_than_the_best_baseline_does(recommender: TwoStepRecommender) -> None:
    histories = _cycling_users(300, 2)
    queries, targets = _last_plays(histories)
    songs = recommender.rank_queries(histories, queries, 3).songs
    vstan_scores = VstanRecommender.fit([_cycling_users(150, 0)], num_songs=NUM_SONGS, allowed=FitRange()).score(
        histories, queries
    )
    baseline_songs = np.argsort(-vstan_scores, axis=1)[:, :3]
    hit_rate, baseline_hit_rate = (
        (ranked_songs == targets[:, None]).any(axis=1).mean() for ranked_songs in (songs, baseline_songs)
    )
    assert hit_rate > 0.68
    assert hit_rate > baseline_hit_rate


def test_one_user_gets_the_same_answer_as_in_a_batch(recommender: TwoStepRecommender) -> None:
    histories = random_histories(30, NUM_SONGS, seed=4)
    songs, scores = recommender.recommend(histories, NOW, 10)
    for row in range(len(histories)):
        single_answer = recommender.recommend(histories.take(np.array([row])), NOW, 10)
        np.testing.assert_array_equal(single_answer[0][0], songs[row])
        np.testing.assert_allclose(single_answer[1][0], scores[row], rtol=1e-5)


def test_a_stored_state_and_the_last_plays_answer_as_the_whole_history(recommender: TwoStepRecommender) -> None:
    histories = random_histories(20, NUM_SONGS, seed=6)
    encoder = recommender.source.network.encoder
    _, states = encoder.run(histories)
    vectors: dict[HorizonName, np.ndarray] = {
        horizon: encoder.taste_vectors_by_horizon(states, NOW, HORIZONS)[horizon] for horizon in HORIZONS
    }
    answers = choose(recommender, vectors, histories, np.full(20, NOW), [AnswerOptions(k=10)] * 20)
    songs, _ = recommender.recommend(histories, NOW, 10)
    np.testing.assert_array_equal([answer.songs for answer in answers], songs)


def test_exactly_k_songs_come_within_filters_and_the_index_fills_what_is_missing(
    recommender: TwoStepRecommender,
) -> None:
    histories = random_histories(12, NUM_SONGS, seed=5)
    queries = Queries.at_end(histories, NOW)
    allowed = SongSet.of_rows(np.array([3, 9, 27, 41, 55]))
    filters = [AnswerFilter(excluded=np.array([9]), allowed=allowed)] * len(queries)
    ranking = recommender.rank_queries(histories, queries, 4, filters=filters)
    for songs, scores in zip(ranking.songs, ranking.scores, strict=True):
        assert sorted(songs.tolist()) == [3, 27, 41, 55]
        assert (np.diff(scores) <= 0).all()
    longer_ranking = recommender.rank_queries(histories, queries, 6, filters=filters)
    assert (longer_ranking.songs[:, 4:] == NO_SONG).all()
    # If few songs are proposed, the answer says how many songs the index filled in.
    narrow = _limit_proposals(recommender, 1)
    filled_ranking = narrow.rank_queries(histories, queries, 4, filters=filters)
    assert np.sort(filled_ranking.songs, axis=1).tolist() == [[3, 27, 41, 55]] * len(queries)
    for chunk, scored in narrow.source.batches(histories, queries):
        is_proposed = np.isin(scored.candidates.songs, [3, 27, 41, 55])
        counts = np.bincount(scored.candidates.rows[is_proposed], minlength=len(scored.batch))
        assert filled_ranking.filled[chunk].tolist() == (4 - counts).tolist()
    assert filled_ranking.filled.any()
    assert filled_ranking.paths == tuple("index" if count else "exact" for count in filled_ranking.filled)
    assert (filled_ranking.scores == 0).sum(axis=1).tolist() == filled_ranking.filled.tolist()
    vectors = narrow.source.network.vectors_of(histories, queries, HORIZONS)
    options = [AnswerOptions(k=4, answer_filter=answer_filter) for answer_filter in filters]
    answers = choose(narrow, vectors, histories, queries.at, options)
    assert tuple(answer.path for answer in answers) == filled_ranking.paths


def _limit_proposals(recommender: TwoStepRecommender, count: int) -> TwoStepRecommender:
    """`recommender`, with retrievers that propose `count` songs each."""
    return TwoStepRecommender(limited_source(recommender.source, count), recommender.rankers)


def test_answers_without_heard_songs_have_the_order_of_the_ranker_for_them(recommender: TwoStepRecommender) -> None:
    histories = _cycling_users(40, 3)
    queries, filters = Queries.at_end(histories, NOW), without_heard(histories)
    expected: list[list[int]] = []
    for chunk, scored in recommender.source.batches(histories, queries):
        rows, songs = scored.candidates.rows, scored.candidates.songs
        scores = recommender.rankers["served"].scores(scored.features)
        for row in range(len(scored.batch)):
            new_rows = np.flatnonzero((rows == row) & ~np.isin(songs, filters[(chunk.start or 0) + row].excluded))
            expected.append(songs[new_rows[np.lexsort((songs[new_rows], -scores[new_rows]))][:5]].tolist())
    assert recommender.rank_queries(histories, queries, 5, filters=filters).songs.tolist() == expected
    assert recommender.recommend(histories, NOW, 5, exclude_heard=True)[0].tolist() == expected
    vectors = recommender.source.network.vectors_of(histories, queries, HORIZONS)
    options = [AnswerOptions(k=5, answer_filter=answer_filter) for answer_filter in filters]
    answers = choose(recommender, vectors, histories, queries.at, options)
    assert [answer.songs.tolist() for answer in answers] == expected
    next_play_filters = [replace(answer_filter, new_only=False) for answer_filter in filters]
    next_play_songs = recommender.rank_queries(histories, queries, 5, filters=next_play_filters).songs
    assert (next_play_songs[:, 0] != np.array(expected)[:, 0]).mean() > 0.5


def test_given_songs_are_put_in_order_whether_a_retriever_proposes_them_or_not(recommender: TwoStepRecommender) -> None:
    narrow = _limit_proposals(recommender, 2)
    histories = _cycling_users(20, 8)
    queries = Queries.at_end(histories, NOW)
    usual_ranking = narrow.rank_queries(histories, queries, NUM_SONGS, filters=[AnswerFilter()] * len(queries))
    proposed_songs = [
        songs[scores > 0] for songs, scores in zip(usual_ranking.songs, usual_ranking.scores, strict=True)
    ]
    assert max(map(len, proposed_songs)) < NUM_SONGS / 2
    same_ranking = narrow.rank_queries(histories, queries, NUM_SONGS, songs_to_rank=proposed_songs)
    all_songs = np.arange(NUM_SONGS + 5)  # the last five songs are unknown
    full_ranking = narrow.rank_queries(histories, queries, len(all_songs), songs_to_rank=[all_songs] * len(queries))
    for row, songs in enumerate(proposed_songs):
        assert same_ranking.songs[row, : len(songs)].tolist() == songs.tolist()
        assert (same_ranking.songs[row, len(songs) :] == NO_SONG).all()
        np.testing.assert_allclose(
            same_ranking.scores[row, : len(songs)], usual_ranking.scores[row, : len(songs)], rtol=1e-6
        )
        assert sorted(full_ranking.songs[row, :NUM_SONGS].tolist()) == list(range(NUM_SONGS))
        assert (full_ranking.songs[row, NUM_SONGS:] == NO_SONG).all()
        assert (full_ranking.scores[row, :NUM_SONGS] > 0).all()
    # The most frequent follower is first among all songs, too; by chance it would be in 1 query of 60.
    last_songs = histories.songs[histories.offsets[1:] - 1]
    assert (full_ranking.songs[:, 0] == (last_songs + 1) % NUM_SONGS).mean() > 0.6


def test_heard_songs_are_left_out_on_request(recommender: TwoStepRecommender) -> None:
    histories = random_histories(12, NUM_SONGS, seed=5)
    songs, _ = recommender.recommend(histories, NOW, 20, exclude_heard=True)
    for row, answer_filter in enumerate(without_heard(histories)):
        assert not set(songs[row].tolist()) & set(answer_filter.excluded.tolist())
        assert (songs[row] != NO_SONG).all()


def test_a_weight_mixes_the_orders_of_both_horizons(recommender: TwoStepRecommender) -> None:
    histories = _cycling_users(40, 3)
    queries, _ = _last_plays(histories)
    short, long = (recommender.rank_queries(histories, queries, 5, long_weight=weight).songs for weight in (0.0, 1.0))
    mixed = recommender.rank_queries(histories, queries, 10, long_weight=0.5).songs
    assert (short[:, 0] != long[:, 0]).mean() > 0.8
    first_song_shares = [(songs[:, :1] == mixed).any(axis=1).mean() for songs in (short, long)]
    assert min(first_song_shares) > 0.9
    nearly_short = recommender.rank_queries(histories, queries, 5, long_weight=0.01).songs
    assert (nearly_short[:, :2] == short[:, :1]).any(axis=1).mean() > 0.9


def test_scores_and_ranks_agree(recommender: TwoStepRecommender) -> None:
    histories = random_histories(8, NUM_SONGS, seed=8)
    queries = Queries.at_end(histories, NOW)
    scores = recommender.score(histories, queries)
    ranking = recommender.rank_queries(histories, queries, 5)
    np.testing.assert_allclose(
        np.take_along_axis(scores, ranking.songs.astype(np.int64), axis=1), ranking.scores, rtol=1e-6
    )
    assert (ranking.scores >= 0).all()
    assert (ranking.scores <= 1).all()


def test_the_candidates_that_an_evaluation_ranks_are_those_of_the_answers(recommender: TwoStepRecommender) -> None:
    histories = random_histories(8, NUM_SONGS, seed=8)
    queries = Queries.at_end(histories, NOW)
    ranking = recommender.rank_queries(histories, queries, 5, long_weight=1.0)
    for chunk, candidates in recommender.candidate_chunks(histories, queries):
        scores = candidates.scores("long", False)
        order = np.lexsort((candidates.songs, -scores, candidates.rows))
        for row in range(chunk.start, chunk.stop):
            best_songs = candidates.songs[order][candidates.rows[order] == row - chunk.start][:5]
            np.testing.assert_array_equal(best_songs, ranking.songs[row])


def test_songs_that_no_retriever_proposes_fill_the_answer_from_the_index(recommender: TwoStepRecommender) -> None:
    histories = random_histories(12, NUM_SONGS, seed=5)
    queries = Queries.at_end(histories, NOW)
    source, narrow = recommender.source, _limit_proposals(recommender, 1)
    ranking = narrow.rank_queries(histories, queries, 30, filters=without_heard(histories))
    assert set(ranking.paths) == {"index"}
    for row, (songs, scores) in enumerate(zip(ranking.songs, ranking.scores, strict=True)):
        assert len(set(songs.tolist()) - {NO_SONG}) == 30
        assert not set(songs.tolist()) & set(without_heard(histories)[row].excluded.tolist())
        is_filled = scores == 0
        assert is_filled.any()
        cosines = source.network.song_vectors[songs] @ source.network.vectors(histories, queries)[row]
        assert (np.diff(cosines[is_filled]) <= 1e-6).all()


def test_songs_that_only_the_retrieval_knows_are_recommended_with_diversity_and_have_no_vector(
    recommender: TwoStepRecommender,
) -> None:
    later_songs = [NUM_SONGS + 2, NUM_SONGS + 3]
    counts = [
        RetrievalCounts.fit(histories, num_songs=NUM_SONGS + 4)
        for histories in (
            _cycling_users(150, 0),
            Histories.from_lists([[2, *later_songs, 3]], [[0, 1, 2, 3]], ["later"]),
        )
    ]
    retrieval = Retrieval.build(RetrievalCounts.merge(counts).strongest())
    extended = TwoStepRecommender(CandidateSource(recommender.source.network, retrieval), recommender.rankers)
    history = Histories.from_lists([[1, 2]], [[0, 1]])
    vectors = recommender.source.network.vectors_of(history, Queries.at_end(history, MINUTE), HORIZONS)
    for diversity in (0.0, 0.5):
        options = AnswerOptions(k=NUM_SONGS, diversity=diversity)
        (selected,) = choose(extended, vectors, history, np.array([MINUTE]), [options])
        assert len(set(selected.songs.tolist())) == NUM_SONGS
        assert set(later_songs) & set(selected.songs.tolist())
    expected = np.arange(NUM_SONGS + 4) < NUM_SONGS
    np.testing.assert_array_equal(known_songs(extended, NUM_SONGS + 4), expected)


def test_k_below_one_is_refused(recommender: TwoStepRecommender) -> None:
    histories = random_histories(2, NUM_SONGS)
    with pytest.raises(InputError):
        recommender.rank_queries(histories, Queries.at_end(histories, NOW), 0)


MANY_SONGS = 1_000_000
ARTISTS = np.arange(MANY_SONGS) % 1_000


@pytest.fixture(scope="module")
def large_parts() -> tuple[TasteRecommender, Retrieval, Histories]:
    past = random_histories(200, MANY_SONGS, seed=1)
    return (
        _network(MANY_SONGS),
        retrieval_of([past], num_songs=MANY_SONGS, artist_of_song=ARTISTS, album_of_song=ARTISTS),
        past,
    )


@pytest.fixture(scope="module", params=["flat", "ivf"])
def large(
    request: pytest.FixtureRequest, large_parts: tuple[TasteRecommender, Retrieval, Histories]
) -> TwoStepRecommender:
    network, retrieval, past = large_parts
    config = IndexConfig(kind=request.param, nlist=64, target_recall=0.1, queries=20)
    source = CandidateSource(network.with_index(SongIndex.build(network.song_vectors, config)), retrieval)
    past = past.take(past.lengths > 0)
    last_songs = past.songs[past.offsets[1:] - 1]
    answers: Answers = {"next": (np.arange(len(past)), last_songs)}
    held_out = np.arange(len(past)) % 2 == 0
    examples = examples_for(source, past, Queries.at_end(past, NOW), answers, held_out=held_out)
    ranker = fit_ranker(examples["next"], source.sources.names, RankerSettings(trees=3, min_leaf=5)).ranker
    return TwoStepRecommender(source, {"next": ranker})


@pytest.fixture(scope="module")
def large_starting(large_parts: tuple[TasteRecommender, Retrieval, Histories]) -> PopularOrder:
    retrieval = large_parts[1]
    return PopularOrder.of(retrieval.plays.plays, np.ones(MANY_SONGS, dtype=np.bool_), artist_of_song=ARTISTS)


# k is larger than the number of proposed songs, so that the index fills the answers with all of these filters. Arrays
# that are kept between answers, such as the songs of an artist, do not count.
LISTED_SONGS, ARTIST_SONGS = np.arange(7, MANY_SONGS, 30_000), SongSet.of_mask(ARTISTS == 3)
FILTERS: dict[str, tuple[int, Callable[[], AnswerFilter]]] = {
    "none": (20, AnswerFilter),
    "more songs than are proposed": (900, AnswerFilter),
    "many songs left out": (900, lambda: AnswerFilter(excluded=np.arange(3_000))),
    "a list of songs": (20, lambda: AnswerFilter(allowed=intersect_songs(LISTED_SONGS, None))),
    "a long list of songs": (50, lambda: AnswerFilter(allowed=intersect_songs(np.arange(9_000), None))),
    "an artist": (20, partial(AnswerFilter, allowed=ARTIST_SONGS)),
    "songs of an artist in a list": (3, lambda: AnswerFilter(allowed=intersect_songs(np.arange(9_000), ARTIST_SONGS))),
    "a tenth of the songs": (900, partial(AnswerFilter, allowed=SongSet.of_mask(ARTISTS < 100))),
    "half of the songs": (400, partial(AnswerFilter, allowed=SongSet.of_mask(ARTISTS < 500))),
    "half of the songs, many left out": (
        400,
        partial(AnswerFilter, excluded=np.arange(3_000), allowed=SongSet.of_mask(ARTISTS < 500)),
    ),
}


@pytest.mark.parametrize("case", FILTERS)
@pytest.mark.parametrize("plays", ["plays", "no plays"])
def test_no_array_as_long_as_the_catalog_is_made_for_a_query(
    large: TwoStepRecommender,
    large_parts: tuple[TasteRecommender, Retrieval, Histories],
    large_starting: PopularOrder,
    case: str,
    plays: str,
) -> None:
    past = large_parts[2]
    history = (
        past.take(np.array([int(past.lengths.argmax())])) if plays == "plays" else Histories.from_lists([[]], [[]])
    )
    k, make_filter = FILTERS[case]

    def select_songs() -> tuple[SelectedSongs, AnswerFilter]:
        (answer_filter,) = without_heard(history, [make_filter()])
        options = AnswerOptions(k=k, answer_filter=answer_filter)
        (selection,) = choose_for_users(large, history, NOW, [options], lambda: large_starting)
        return selection, answer_filter

    select_songs()
    tracemalloc.start()
    selection, answer_filter = select_songs()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MANY_SONGS  # bytes: not even a mask over the catalog
    assert len(set(selection.songs.tolist())) == k
    assert answer_filter.qualify(selection.songs).all()
    assert (selection.path == "popular") == (plays == "no plays")


def test_the_reasons_of_a_song_are_those_of_its_features(recommender: TwoStepRecommender) -> None:
    histories = Histories.from_lists([[1, 2, 9, 1]], [[0, MINUTE, 2 * MINUTE, 3 * MINUTE]])
    (song_features, unknown_features) = recommender.explain(
        histories, 3 * MINUTE + 3 * 24 * 60 * MINUTE, np.array([2, 10**6])
    )
    assert reasons(song_features, "Song One")[:2] == [
        "you played it after Song One before",
        "you played it once, last 3 days ago",
    ]
    assert unknown_features == {}
    assert reasons(unknown_features, None)


@pytest.mark.parametrize("part", ABLATED_PARTS)
def test_without_a_part_its_retrievers_and_features_are_gone_and_the_others_stay(part: str) -> None:
    artists = np.arange(NUM_SONGS) % 9
    albums = artists % 4
    retrieval = retrieval_of(
        [_cycling_users(150, 0)], num_songs=NUM_SONGS, artist_of_song=artists, album_of_song=albums
    )
    network = _network_with_added_songs(artists, albums)
    full = CandidateSource(network, retrieval)
    reduced = CandidateSource(network, retrieval, without=part)
    ablated = ABLATED_PARTS[part]
    names = [retriever.name for retriever in full.retrievers]
    assert set(ablated.retrievers) <= set(names)
    assert [retriever.name for retriever in reduced.retrievers] == [
        name for name in names if name not in ablated.retrievers
    ]
    prefixes = (*ablated.features, *(f"{name}_" for name in ablated.retrievers))
    assert reduced.sources.names == [name for name in full.sources.names if not name.startswith(prefixes)]
    histories = _cycling_users(20, 7)
    queries, _ = _last_plays(histories)
    ((_, full_batch), (_, reduced_batch)) = (next(source.batches(histories, queries)) for source in (full, reduced))
    positions = full_batch.candidates.find(reduced_batch.candidates.keys)
    assert (positions >= 0).all()
    for name in ("plays", "history_length", "sessions_score", "user_plays", "cosine_short", "artist_user_plays"):
        if name in reduced.sources.names:
            column = full_batch.features[positions, full.sources.names.index(name)]
            np.testing.assert_array_equal(reduced_batch.features[:, reduced.sources.names.index(name)], column)


def test_added_songs_have_the_same_groups_however_often_they_are_replaced(recommender: TwoStepRecommender) -> None:
    # The retrieval knows no artists and albums, as if they had been described after it was made.
    network = _network()
    added = _network_with_added_songs(np.arange(NUM_SONGS) % 9, np.arange(NUM_SONGS) % 4).added
    assert added is not None
    extended = TwoStepRecommender(CandidateSource(network, recommender.source.retrieval), recommender.rankers)
    for _ in range(3):
        extended = extended.with_added_songs(added)
        for groups in (extended.source.retrieval.artists, extended.source.retrieval.albums):
            assert len(groups.offsets) - 1 == 3
            assert groups.of_song[added.rows].tolist() == groups.of_song[:3].tolist() == [0, 1, 2]
    reduced = extended.without_part("rules", extended.rankers)
    assert len(reduced.source.retrieval.albums.offsets) - 1 == 3
    assert len(extended.with_added_songs(added.take(np.array([0]))).source.retrieval.albums.offsets) - 1 == 1


def test_examples_leave_out_queries_that_teach_nothing_unless_they_are_held_out(
    recommender: TwoStepRecommender,
) -> None:
    histories = _cycling_users(50, 7)
    queries, targets = _last_plays(histories)
    rows = np.arange(len(queries))
    source = limited_source(recommender.source, 2)
    answers: Answers = {"next": (rows, targets)}
    training = examples_for(source, histories, queries, answers, held_out=np.zeros(len(rows), dtype=bool))["next"]
    assert training.has_right_candidate.all()
    assert len(training) < len(queries)
    validation = examples_for(source, histories, queries, answers, held_out=np.ones(len(rows), dtype=bool))["next"]
    assert len(validation) == len(queries)
    assert validation.has_right_candidate.sum() == len(training)


def test_a_ranker_learns_from_some_wrong_candidates_of_a_query_and_is_checked_on_all(
    recommender: TwoStepRecommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(two_step, "NEGATIVES", 7)
    histories = _cycling_users(50, 7)
    queries, targets = _last_plays(histories)
    held_out = np.arange(len(queries)) % 2 == 0
    answers: Answers = {"next": (np.arange(len(queries)), targets)}
    examples = examples_for(recommender.source, histories, queries, answers, held_out=held_out)["next"]
    training, validation = examples.take(~examples.held_out), examples.take(examples.held_out)
    assert set(training.counts) == {8}
    assert training.right.sum() == len(training)
    assert validation.counts.min() > 20
    repeated = examples_for(recommender.source, histories, queries, answers, held_out=held_out)["next"]
    np.testing.assert_array_equal(repeated.features, examples.features)
    # Wrong candidates are drawn for each query separately: its examples do not depend on the other queries.
    query = queries.take(np.flatnonzero(~held_out)[:1])
    single_examples = examples_for(
        recommender.source, histories, query, {"next": (np.array([0]), targets[1:2])}, held_out=held_out[1:2]
    )
    np.testing.assert_allclose(single_examples["next"].features[:, 0], training.features[:8, 0], rtol=1e-4)


def test_examples_of_new_songs_hold_none_that_were_heard(recommender: TwoStepRecommender) -> None:
    histories = _cycling_users(50, 7)
    queries, targets = _last_plays(histories)
    held_out = np.zeros(len(queries), dtype=bool)
    answers: Answers = {"served": (np.arange(len(queries)), targets)}
    examples = examples_for(recommender.source, histories, queries, answers, held_out=held_out)["served"]
    assert 0 < len(examples) < len(queries)
    assert not examples.features[:, recommender.source.sources.names.index("user_plays")].any()


def test_by_skips_and_likes_the_ranker_finds_more_of_the_songs_that_users_return_to() -> None:
    """Checked on users outside the training; users return to songs that they like and never to disliked ones."""
    world = World(GenerateConfig(users=600, songs=300, artists=50, genres=6, plays=50, opinions=0.3, seed=3))
    histories = world.histories(np.arange(600))
    assert histories.contexts is not None
    cut = int(np.quantile(histories.played_at, 0.8))
    retrieval = retrieval_of([histories.before(cut)], num_songs=300, artist_of_song=world.artist)
    source = CandidateSource(_network(300), retrieval)
    is_return = histories.contexts == 1 << COLLECTION
    plays = np.flatnonzero((histories.played_at >= cut) & (histories.places > 0) & is_return)
    answers: Answers = {"next": (np.arange(len(plays)), histories.songs[plays])}
    held_out = histories.rows[plays] % 3 == 0
    examples = examples_for(source, histories, Queries.before_plays(histories, plays), answers, held_out=held_out)
    next_examples = examples["next"]
    validation = next_examples.take(next_examples.has_right_candidate & next_examples.held_out)
    ndcgs: list[float] = []
    opinion_features = {*SKIP_FEATURES, *LIKE_FEATURES, "recent_skips"}
    assert opinion_features < set(source.sources.names)
    for left_out in (set(), opinion_features):
        columns = [column for column, name in enumerate(source.sources.names) if name not in left_out]
        names = [source.sources.names[column] for column in columns]
        settings = RankerSettings(trees=60, min_leaf=20, learning_rate=0.1)
        ranker = fit_ranker(replace(next_examples, features=next_examples.features[:, columns]), names, settings).ranker
        ndcgs.append(ndcg(validation.rows, ranker.scores(validation.features[:, columns]), validation.right))
    assert ndcgs[0] > ndcgs[1] + 0.03


def test_without_times_features_do_not_depend_on_when_plays_and_requests_come() -> None:
    counts = RetrievalCounts.fit(_cycling_users(150, 0), num_songs=NUM_SONGS, real_times=False)
    source = CandidateSource(_network(), Retrieval.build(counts.strongest()), real_times=False)
    stored = random_histories(5, NUM_SONGS, seed=3)
    positions = 3 * MINUTE * (np.arange(stored.num_plays) - np.repeat(stored.offsets[:-1], stored.lengths))
    training_histories = replace(stored, played_at=positions)
    late_times = positions.copy()
    late_times[stored.offsets[1:] - 1] = YEARS  # the last play came through the server, which stores its time
    vectors = {horizon: random_vectors(5, 8) for horizon in HORIZONS}  # a network of such data reads no times either
    ((_, expected),) = source.batches(
        training_histories, Queries.at_end(training_histories, 3 * MINUTE * stored.lengths), vectors
    )
    assert expected.batch.in_session.all()
    for histories, at in ((training_histories, YEARS), (replace(stored, played_at=late_times), YEARS + 1)):
        ((_, scored),) = source.batches(histories, Queries.at_end(histories, at), vectors)
        np.testing.assert_array_equal(scored.candidates.songs, expected.candidates.songs)
        np.testing.assert_array_equal(scored.features, expected.features)


def test_without_times_a_session_begins_with_its_line_and_goes_on_however_late_a_play_comes() -> None:
    minutes = [0, 3, 66, 69, 10**7]  # two lines of an imported file, and a play sent to the server
    histories = Histories.from_lists([[1, 2, 3, 4, 5]], [[minute * MINUTE for minute in minutes]])
    queries = Queries(
        rows=np.zeros(3, np.int64), plays_before=np.array([2, 4, 5]), at=np.array([66 * MINUTE, YEARS, YEARS])
    )
    vectors = {"short_vectors": random_vectors(3, 8), "long_vectors": random_vectors(3, 8)}
    batch = QueryBatch.of(histories, queries, NUM_SONGS, **vectors, real_times=False)
    first, second, third = (batch.in_session[batch.rows == row].tolist() for row in range(3))
    assert first == [False, False]  # the query is the first play of the next line
    assert second == [False, False, True, True]
    assert third == [False, False, True, True, True]


def test_without_times_likes_count_whenever_they_came() -> None:
    histories = with_opinions(random_histories(5, NUM_SONGS, seed=3), NUM_SONGS)
    queries = Queries.at_end(histories, YEARS)
    vectors = {"short_vectors": random_vectors(5, 8), "long_vectors": random_vectors(5, 8)}
    liked, expected = (
        QueryBatch.of(histories, queries, NUM_SONGS, **vectors, real_times=real_times).liked
        for real_times in (False, True)
    )
    assert len(expected.songs)
    np.testing.assert_array_equal(liked.songs, expected.songs)
