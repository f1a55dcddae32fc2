"""Each retriever finds the songs planted for it, at a bounded cost."""

import numpy as np
import pytest
from rankings import limited, retrieval_of
from worlds import random_histories, random_vectors

from rayrec.data.histories import Histories, Queries
from rayrec.data.split import FitRange
from rayrec.recommend.base import QueryBatch
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.retrievers import (
    Proposals,
    Retriever,
    SessionKnnSettings,
    SessionRetriever,
    UserRulesRetriever,
    UserTopRetriever,
    make_new_song_retrievers,
    make_retrievers,
    retrieve,
)
from rayrec.recommend.session_knn import VstanRecommender
from rayrec.recommend.stored_retrieval import Retrieval, RetrievalCounts
from rayrec.recommend.two_step_config import RetrievalConfig

MINUTE, HOUR = 60_000, 3_600_000
NUM_SONGS = 40
NOW = 10**9


def _batch(histories: Histories, queries: Queries, num_songs: int = NUM_SONGS) -> QueryBatch:
    vectors = random_vectors(max(1, len(queries)), 8)[: len(queries)]
    return QueryBatch.of(histories, queries, num_songs, short_vectors=vectors, long_vectors=-vectors)


def _user_batch(songs: list[int], num_songs: int = NUM_SONGS) -> QueryBatch:
    """A batch of one user who has just played `songs`, one minute apart."""
    histories = Histories.from_lists([songs], [[NOW + MINUTE * position for position in range(len(songs))]])
    return _batch(histories, Queries.at_end(histories, NOW + MINUTE * len(songs)), num_songs)


def _ordered_songs(proposals: Proposals) -> list[int]:
    return proposals.songs[np.argsort(proposals.ranks)].tolist()


def _retrievers(retrieval: Retrieval, num_songs: int = NUM_SONGS) -> dict[str, Retriever]:
    index = SongIndex.build(random_vectors(num_songs, 8), IndexConfig())
    return {retriever.name: retriever for retriever in make_retrievers(retrieval, index)}


def test_session_knn_scores_as_vstan_over_all_sessions_does() -> None:
    all_plays = random_histories(60, NUM_SONGS, longest=12)
    first_plays = all_plays.keep(_is_first_play(all_plays))  # a session has each song once, so that positions agree
    histories = random_histories(25, NUM_SONGS, longest=15, seed=3)
    queries = Queries.at_end(histories, NOW)
    vstan_scores = VstanRecommender.fit([first_plays], num_songs=NUM_SONGS, allowed=FitRange()).score(
        histories, queries
    )
    settings = SessionKnnSettings(places=100)
    retrieval = retrieval_of([first_plays], num_songs=NUM_SONGS, newest=10_000)
    proposals = SessionRetriever(retrieval, settings).propose(_batch(histories, queries), NUM_SONGS)
    assert len(proposals.rows) == np.count_nonzero(vstan_scores)
    np.testing.assert_allclose(proposals.scores, vstan_scores[proposals.rows, proposals.songs], rtol=1e-4)


def _is_first_play(histories: Histories) -> np.ndarray:
    is_first = np.zeros(histories.num_plays, dtype=bool)
    is_first[np.unique(histories.rows * NUM_SONGS + histories.songs, return_index=True)[1]] = True
    return is_first


def test_a_song_known_only_outside_the_buckets_read_last_is_found() -> None:
    early_histories = Histories.from_lists([[31, 30]], [[0, MINUTE]], user_ids=["early"])
    late_histories = [random_histories(200, 20, longest=20, seed=seed) for seed in range(5)]
    retrieval = retrieval_of([early_histories, *late_histories], num_songs=NUM_SONGS, newest=2)
    assert 30 in SessionRetriever(retrieval).propose(_user_batch([5, 31]), 25).songs


def _crowd_histories(users: int, num_songs: int) -> Histories:
    """Users who all play songs 0 to 3, and after each of these songs twelve songs of their own."""
    lists = []
    for user in range(users):
        user_songs = 4 + (48 * user + np.arange(48)) % (num_songs - 4)
        lists.append(np.concatenate([[song, *user_songs[12 * song : 12 * song + 12]] for song in range(4)]).tolist())
    return Histories.from_lists(
        lists, [[user * HOUR + MINUTE * position for position in range(52)] for user in range(users)]
    )


def test_the_work_of_a_query_is_bounded_however_many_users_there_are() -> None:
    num_songs, count, config = 1_000, 20, RetrievalConfig(sessions_per_song=400, rules_per_song=60)
    entry_counts: dict[int, dict[str, int]] = {}
    for users in (3, 900, 2_000):
        counts = RetrievalCounts.fit(
            _crowd_histories(users, num_songs), num_songs=num_songs, newest=config.sessions_per_song
        )
        groups = np.arange(num_songs) % 4  # each group has more songs than any list holds
        strongest = counts.strongest(config.rules_per_song)
        retrieval = Retrieval.build(strongest, artist_of_song=groups, album_of_song=groups)
        if users > 3:  # the songs that all play have more followers and sessions than are kept
            assert np.diff(counts.rules.offsets)[:4].min() > 2 * config.rules_per_song
            assert users > 2 * config.sessions_per_song
        # The user's last 50 plays are of these four songs, of which as much is stored as is kept for any song.
        batch = _user_batch([0, 1, 2, 3] * 20, num_songs)
        retrievers = _retrievers(retrieval, num_songs).values()
        entry_counts[users] = {retriever.name: retriever.propose(batch, count).entries for retriever in retrievers}
        for retriever in retrievers:
            assert entry_counts[users][retriever.name] <= retriever.max_entries(count, config), retriever.name
    names_with_entries = {name for name, entries in entry_counts[2_000].items() if entries}
    assert names_with_entries == set(entry_counts[2_000]) - {"taste_short", "taste_long", "user_top", "user_rules"}
    assert entry_counts[2_000]["rules"] == config.rules_per_song > entry_counts[3]["rules"] > 0
    for name, entries in entry_counts[2_000].items():
        assert entries <= 1.5 * entry_counts[900][name], name
    two_users = Histories.from_lists([[0, 1], [2]], [[0, 1], [0]])
    (rules,) = (retriever for retriever in retrievers if retriever.name == "rules")
    proposals = rules.propose(_batch(two_users, Queries.at_end(two_users, NOW), num_songs), count)
    assert proposals.entries == 2 * config.rules_per_song


def test_rules_propose_what_followed_the_last_song_strongest_first() -> None:
    histories = Histories.from_lists([[1, 2], [1, 2], [1, 3]], [[0, MINUTE]] * 3)
    proposals = _retrievers(retrieval_of([histories], num_songs=NUM_SONGS))["rules"].propose(_user_batch([9, 1]), 10)
    assert _ordered_songs(proposals) == [2, 3]
    assert proposals.scores[np.argsort(proposals.ranks)].tolist() == [2.0, 1.0]


def test_recent_rules_know_what_followed_earlier_songs() -> None:
    histories = Histories.from_lists([[1, 2], [1, 2]], [[0, MINUTE]] * 2)
    proposals = _retrievers(retrieval_of([histories], num_songs=NUM_SONGS))["recent_rules"].propose(
        _user_batch([1, 9, 8]), 10
    )
    assert _ordered_songs(proposals) == [2]


def test_sessions_and_rules_of_the_history_use_songs_before_the_last_ten_plays() -> None:
    histories = Histories.from_lists([[1, 2], [1, 2]], [[0, MINUTE]] * 2)
    retrievers = _retrievers(retrieval_of([histories], num_songs=NUM_SONGS))
    batch = _user_batch([1, *range(20, 39)])
    for name, expected in (
        ("sessions", []),
        ("recent_rules", []),
        ("history_sessions", [1, 2]),
        ("history_rules", [2]),
    ):
        assert sorted(_ordered_songs(retrievers[name].propose(batch, 10))) == expected


def test_user_top_orders_songs_by_how_often_and_how_recently_they_were_played() -> None:
    assert _ordered_songs(UserTopRetriever().propose(_user_batch([5, 6, 7, 5, 7, 7]), 10)) == [7, 5, 6]


def test_user_rules_propose_what_the_user_played_next_before() -> None:
    proposals = UserRulesRetriever().propose(_user_batch([1, 2, 3, 1, 2, 9, 1]), 10)
    assert _ordered_songs(proposals)[0] == 2
    assert set(proposals.songs) == {1, 2, 3, 9}
    assert proposals.scores[np.argsort(proposals.ranks)][0] == pytest.approx(1 + 1 / 4 + 1)


def test_songs_of_the_last_artist_come_before_those_of_earlier_ones() -> None:
    histories = Histories.from_lists([[1, 1, 2, 3, 4]], [list(range(5))])
    artists = np.full(NUM_SONGS, -1)
    artists[[1, 2]], artists[[3, 4]] = 0, 1
    retrieval = retrieval_of([histories], num_songs=NUM_SONGS, artist_of_song=artists)
    proposals = _retrievers(retrieval)["artists"].propose(_user_batch([2, 8, 3]), 10)
    assert set(_ordered_songs(proposals)[:2]) == {3, 4}
    assert set(_ordered_songs(proposals)[2:]) == {1, 2}


def test_a_catalog_without_artists_has_no_retriever_for_them() -> None:
    retrieval = retrieval_of([random_histories(5, NUM_SONGS)], num_songs=NUM_SONGS)
    assert not {"artists", "albums"} & _retrievers(retrieval).keys()


def test_the_taste_retrievers_propose_the_songs_nearest_to_their_vector() -> None:
    histories = random_histories(6, NUM_SONGS)
    retrievers = _retrievers(retrieval_of([histories], num_songs=NUM_SONGS))
    batch = _batch(histories, Queries.at_end(histories, NOW))
    for name, vectors in (("taste_short", batch.short_vectors), ("taste_long", batch.long_vectors)):
        proposals = retrievers[name].propose(batch, 5)
        for row in range(len(batch)):
            expected = np.argsort(-(random_vectors(NUM_SONGS, 8) @ vectors[row]))[:5]
            assert proposals.songs[proposals.rows == row][
                np.argsort(proposals.ranks[proposals.rows == row])
            ].tolist() == list(expected)


def test_proposals_are_bounded_distinct_and_the_same_alone_as_in_a_batch() -> None:
    histories = random_histories(30, NUM_SONGS, seed=5)
    queries = Queries.at_end(histories, NOW)
    retrieval = retrieval_of([random_histories(80, NUM_SONGS)], num_songs=NUM_SONGS)
    retrievers = limited(list(_retrievers(retrieval).values()), 7)
    batch = _batch(histories, queries)
    batch_candidates = retrieve(retrievers, batch)
    assert len(np.unique(batch_candidates.keys)) == len(batch_candidates.keys)
    for row in range(len(queries)):
        query = queries.take(slice(row, row + 1))
        vectors = {"short_vectors": batch.short_vectors[row][None], "long_vectors": batch.long_vectors[row][None]}
        single_candidates = retrieve(retrievers, QueryBatch.of(histories, query, NUM_SONGS, **vectors))
        np.testing.assert_array_equal(single_candidates.songs, batch_candidates.songs[batch_candidates.rows == row])
        for name, proposals in single_candidates.proposals.items():
            assert len(proposals.rows) <= 7
            is_user = batch_candidates.proposals[name].rows == row
            np.testing.assert_array_equal(proposals.ranks, batch_candidates.proposals[name].ranks[is_user])
            np.testing.assert_allclose(proposals.scores, batch_candidates.proposals[name].scores[is_user], rtol=1e-6)


def test_a_user_without_plays_gets_recently_popular_songs() -> None:
    histories = Histories.from_lists([[]], [[]])
    retrieval = retrieval_of([random_histories(30, NUM_SONGS)], num_songs=NUM_SONGS)
    batch = QueryBatch.of(
        histories,
        Queries.at_end(histories, NOW),
        NUM_SONGS,
        short_vectors=np.zeros((1, 8), np.float32),
        long_vectors=np.zeros((1, 8), np.float32),
    )
    candidates = retrieve(list(_retrievers(retrieval).values()), batch)
    assert sorted(candidates.songs) == sorted(retrieval.popular[:20])


def test_new_songs_are_proposed_by_artist_by_album_and_by_vector_and_no_others_are() -> None:
    artists = np.arange(NUM_SONGS) % 5
    albums = np.where(np.arange(NUM_SONGS) < 30, np.arange(NUM_SONGS) // 3, -1)
    retrieval = retrieval_of(
        [random_histories(20, NUM_SONGS)], num_songs=NUM_SONGS, artist_of_song=artists, album_of_song=albums
    )
    # 7 was in the catalog without plays; 41 and 42 are of an artist without earlier songs, 43 has no artist.
    rows = np.array([7, 40, 41, 42, 43, 44])
    artist_rows, album_rows = np.array([2, 2, 41, 41, -1, 3]), np.array([6, -1, -1, 35, -1, -1])
    extended = retrieval.with_added(rows, artist_rows, album_rows)
    vectors = random_vectors(45, 8, seed=1)
    by_name = {item.name: item for item in make_new_song_retrievers(extended, vectors, rows)}
    assert list(by_name) == ["new_content", "new_artists", "new_albums"]

    def proposed_songs(name: str, songs: list[int]) -> list[int]:
        return _ordered_songs(by_name[name].propose(_user_batch(songs, 45), 20))

    assert proposed_songs("new_artists", [12]) == [7, 40]  # 12 is of the artist of 2
    assert proposed_songs("new_artists", [41]) == [41, 42]
    assert proposed_songs("new_artists", [13, 12]) == [7, 40, 44]  # 13, played earlier, is of the artist of 3
    assert proposed_songs("new_artists", [43]) == []
    assert proposed_songs("new_albums", [6]) == [7]
    assert proposed_songs("new_albums", [35]) == [42]  # the retrieval does not know the album of 35
    assert proposed_songs("new_albums", [36]) == []
    batch = _user_batch([1], 45)
    nearest_songs = rows[np.argsort(-vectors[rows] @ batch.short_vectors[0])]
    assert proposed_songs("new_content", [1]) == nearest_songs.tolist()
    few_proposals = by_name["new_content"].propose(batch, 2)
    assert set(few_proposals.songs.tolist()) == set(nearest_songs[:2].tolist())
    # Retrievers of known songs see the artists of new songs, and propose the same songs as without new songs.
    for name in ("artists", "albums"):
        old_proposals, new_proposals = (
            _retrievers(item)[name].propose(_user_batch([12, 6], 45), 40) for item in (retrieval, extended)
        )
        assert _ordered_songs(old_proposals) == _ordered_songs(new_proposals)
    assert set(_ordered_songs(_retrievers(extended)["artists"].propose(_user_batch([40], 45), 40))) == set(
        range(2, 40, 5)
    )


def test_of_many_new_songs_of_an_artist_the_last_come_first() -> None:
    retrieval = retrieval_of([random_histories(5, 10)], num_songs=10, artist_of_song=np.zeros(10, np.int64))
    rows = np.arange(10, 400)
    extended = retrieval.with_added(rows, np.zeros(390, np.int64), np.full(390, -1))
    retrievers = make_new_song_retrievers(extended, random_vectors(400, 8), rows)
    (artist_retriever,) = (retriever for retriever in retrievers if retriever.name == "new_artists")
    proposals = artist_retriever.propose(_user_batch([3], 400), 500)
    assert sorted(proposals.songs.tolist()) == list(range(300, 400))
