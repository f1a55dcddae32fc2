"""The features of candidates against values read from the history."""

import tracemalloc

import numpy as np
import pytest
from rankings import retrieval_of
from worlds import random_histories, random_vectors, with_opinions

from rayrec.data.histories import Histories, Queries
from rayrec.recommend.base import LATEST_PLAYS, QueryBatch
from rayrec.recommend.candidate_features import FeatureSources
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.retrievers import Candidates, make_retrievers, retrieve
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.storage.workspace import Workspace

NUM_SONGS = 40
MINUTE, HOUR = 60_000, 3_600_000
VECTORS = random_vectors(NUM_SONGS, 8)
ARTISTS = np.arange(NUM_SONGS) % 5


def _features(
    histories: Histories,
    queries: Queries,
    *,
    real_times: bool = True,
    artists: np.ndarray | None = ARTISTS,
    past: Histories | None = None,
) -> tuple[QueryBatch, Candidates, dict[str, np.ndarray]]:
    past = random_histories(120, NUM_SONGS, seed=9) if past is None else past
    retrieval = retrieval_of([past], num_songs=NUM_SONGS, artist_of_song=artists)
    retrievers = make_retrievers(retrieval, SongIndex.build(VECTORS, IndexConfig()))
    taste_vectors = random_vectors(max(2, len(queries)), 8, seed=4)[: len(queries)]
    batch = QueryBatch.of(histories, queries, NUM_SONGS, short_vectors=taste_vectors, long_vectors=-taste_vectors)
    candidates = retrieve(retrievers, batch)
    sources = FeatureSources(
        retrieval=retrieval,
        song_vectors=VECTORS,
        retrievers=tuple(retriever.name for retriever in retrievers),
        real_times=real_times,
    )
    matrix = sources.features(batch, candidates)
    assert matrix.shape == (len(candidates.rows), len(sources.names))
    assert matrix.dtype == np.float32
    assert len(set(sources.names)) == len(sources.names)
    return batch, candidates, dict(zip(sources.names, matrix.T, strict=True))


def _features_by_song(songs: list[int], minutes: list[float], at: float) -> dict[int, dict[str, float]]:
    """The features by song, at minute `at`, for one user who played `songs` at `minutes`."""
    histories = Histories.from_lists([songs], [[round(minute * MINUTE) for minute in minutes]])
    _, candidates, features = _features(histories, Queries.at_end(histories, round(at * MINUTE)))
    return {
        song: {name: float(values[row]) for name, values in features.items()}
        for row, song in enumerate(candidates.songs.tolist())
    }


def test_user_plays_their_age_and_activation_are_those_of_the_history() -> None:
    features = _features_by_song([3, 4, 3, 5], [0, 1, 2, 3], at=63)[3]
    assert (features["user_plays"], features["user_plays_since"], features["user_share"]) == (2, 1, 0.5)
    assert features["user_hours_since"] == pytest.approx(61 / 60, rel=1e-5)
    assert features["user_base_level"] == pytest.approx(np.log(2**-0.5 + 4**-0.5), rel=1e-5)
    unplayed = _features_by_song([3, 4, 3, 5], [0, 1, 2, 3], at=63)[6]
    assert (unplayed["user_plays"], unplayed["user_plays_since"], unplayed["user_hours_since"]) == (0, -1, -1)


def test_a_pause_ends_the_session_for_songs_and_for_the_query() -> None:
    features = _features_by_song([3, 4, 5], [0, 60, 61], at=62)
    assert features[5]["session_length"] == 2
    assert (features[3]["user_session_plays"], features[4]["user_session_plays"]) == (0, 1)
    assert _features_by_song([3, 4, 5], [0, 60, 61], at=200)[5]["session_length"] == 0


def test_a_session_is_compared_with_the_long_term_taste_and_what_came_before_it_is_not() -> None:
    long_vector = -random_vectors(2, 8, seed=4)[0]
    session_vector = VECTORS[4] + VECTORS[5]
    cosine = _features_by_song([3, 4, 5], [0, 60, 61], at=62)[7]["cosine_session_long"]
    assert cosine == pytest.approx(session_vector @ long_vector / np.linalg.norm(session_vector), rel=1e-4)
    assert _features_by_song([3, 4, 5], [0, 60, 61], at=200)[7]["cosine_session_long"] == 0


def test_artists_are_counted_over_the_last_ten_plays_and_the_history() -> None:
    features = _features_by_song([0, 1, 2, 5], [0, 1, 2, 3], at=4)  # artists 0, 1, 2, 0
    artist_0, artist_1 = features[10], features[11]  # artists 0 and 1
    assert (artist_0["artist_of_last_song"], artist_1["artist_of_last_song"]) == (1, 0)
    assert (artist_0["artist_recent_share"], artist_1["artist_recent_share"]) == (0.5, 0.25)
    assert (artist_0["artist_user_plays"], artist_0["artist_plays_since"], artist_1["artist_plays_since"]) == (2, 0, 2)
    assert artist_0["recent_artists"] == 3


def test_recent_repeats_are_the_share_of_plays_of_songs_played_before() -> None:
    assert _features_by_song([1, 2, 1, 2], [0, 1, 2, 3], at=4)[1]["recent_repeats"] == 0.5
    assert _features_by_song([1, 2, 3, 4], [0, 1, 2, 3], at=4)[1]["recent_repeats"] == 0


def test_cosines_are_known_for_every_candidate_whoever_proposed_it() -> None:
    histories = random_histories(10, NUM_SONGS)
    batch, candidates, features = _features(histories, Queries.at_end(histories, 10**9))
    expected = (VECTORS[candidates.songs] * batch.short_vectors[candidates.rows]).sum(axis=1)
    np.testing.assert_allclose(features["cosine_short"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(features["cosine_long"], -expected, rtol=1e-5, atol=1e-6)


def test_plays_before_the_latest_5000_change_nothing() -> None:
    """So evaluations and batch jobs give the same features as the server, which reads only the latest plays."""
    random, count = np.random.default_rng(5), LATEST_PLAYS + 700
    songs, played_at = random.integers(0, NUM_SONGS, count), np.cumsum(random.integers(1, HOUR, count))
    results = []
    for start in (0, 300, 700):
        histories = Histories.from_lists([songs[start:]], [played_at[start:]])
        results.append(_features(histories, Queries.at_end(histories, int(played_at[-1]) + MINUTE))[1:])
    for candidates, features in results[1:]:
        np.testing.assert_array_equal(candidates.songs, results[0][0].songs)
        for name, values in features.items():
            np.testing.assert_array_equal(values, results[0][1][name], name)


def test_plays_after_the_query_change_nothing() -> None:
    histories = random_histories(20, NUM_SONGS, seed=2)
    rows = np.flatnonzero(histories.lengths > 4)
    plays_before = histories.lengths[rows] // 2
    queries = Queries(rows=rows, plays_before=plays_before, at=np.full(len(rows), 10**9))
    long_histories = histories.take(rows)
    cut_histories = long_histories.keep(long_histories.places < np.repeat(plays_before, long_histories.lengths))
    _, candidates, features = _features(histories, queries)
    _, expected_candidates, expected = _features(cut_histories, Queries.at_end(cut_histories, 10**9))
    np.testing.assert_array_equal(candidates.keys, expected_candidates.keys)
    for name, values in features.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


def test_without_real_times_features_of_hours_are_zero() -> None:
    histories = random_histories(10, NUM_SONGS)
    _, _, features = _features(histories, Queries.at_end(histories, 10**9), real_times=False)
    for name in ("user_hours_since", "user_base_level_hours", "hours_since_last", "hour"):
        assert not features[name].any(), name


def test_a_catalog_without_artists_gives_no_features_of_them() -> None:
    histories = random_histories(10, NUM_SONGS)
    _, _, features = _features(histories, Queries.at_end(histories, 10**9), artists=None)
    assert not [name for name in features if name.startswith(("artist", "album", "recent_artists"))]


def test_the_age_of_a_song_counts_the_days_since_its_first_play_by_anybody() -> None:
    past = random_histories(120, NUM_SONGS, seed=9)  # within a day of 1970
    days = 20
    features = _features_by_song([3, 4], [0, 1], at=days * 24 * 60 + 1)
    played_songs = set(past.songs.tolist())
    assert {features[song]["age_days"] for song in features if song in played_songs} == {days}
    histories = Histories.from_lists([[3, 4]], [[0, MINUTE]])
    _, _, features_without_times = _features(histories, Queries.at_end(histories, days * 24 * HOUR), real_times=False)
    assert not features_without_times["age_days"].any()


def test_skips_and_likes_are_counted_up_to_the_query_and_no_further() -> None:
    past = with_opinions(random_histories(120, NUM_SONGS, seed=9), NUM_SONGS)
    assert past.skipped is not None
    histories = Histories.from_lists(
        [[3, 4, 3, 5, 3]],
        [[0, MINUTE, 2 * MINUTE, 3 * MINUTE, 9 * MINUTE]],
        skipped=[[True, False, False, True, True]],
        likes=[[(4, 2 * MINUTE), (5, 5 * MINUTE), (6, 9 * MINUTE)]],
    )
    query = Queries(rows=np.array([0]), plays_before=np.array([4]), at=np.array([5 * MINUTE]))
    _, candidates, features = _features(histories, query, past=past)
    values = {
        name: dict(zip(candidates.songs.tolist(), features[name].tolist(), strict=True))
        for name in ("user_skips", "user_skip_share", "user_liked", "skip_share", "recent_skips")
    }
    assert [values["user_skips"][song] for song in (3, 4, 5, 7)] == [1, 0, 1, 0]
    assert [values["user_skip_share"][song] for song in (3, 4, 5, 7)] == [0.5, 0, 1, 0]
    # Not 5, which was liked at the moment of the query.
    assert {song for song, is_liked in values["user_liked"].items() if is_liked} == {4}
    assert set(values["recent_skips"].values()) == {0.5}
    mean_share = past.skipped.mean()
    is_song_3 = past.songs == 3
    expected = (past.skipped[is_song_3].sum() + 10 * mean_share) / (is_song_3.sum() + 10) - mean_share
    assert values["skip_share"][3] == pytest.approx(expected, abs=1e-6)


def test_of_many_likes_the_last_thousand_before_each_query_are_read() -> None:
    num_likes = 100_000
    likes = [(number % NUM_SONGS, number * MINUTE) for number in range(num_likes - 1_000)]
    likes += [(number % 3, number * MINUTE) for number in range(num_likes - 1_000, num_likes)]
    histories = Histories.from_lists([[], [1]], [[], [0]], likes=[[(5, 0)], likes])
    at = np.array([0, *range(num_likes - 199, num_likes + 1)]) * MINUTE
    queries = Queries(rows=np.ones(201, np.int64), plays_before=np.ones(201, np.int64), at=at)
    vectors = random_vectors(201, 8)
    tracemalloc.start()
    batch = QueryBatch.of(histories, queries, NUM_SONGS, short_vectors=vectors, long_vectors=vectors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000  # bytes; one number per query and like would be 160 MB
    liked_songs = [set(batch.liked.songs[batch.liked.rows == row].tolist()) for row in (0, 1, 200)]
    assert liked_songs == [set(), set(range(NUM_SONGS)), {0, 1, 2}]


def test_data_without_skips_and_likes_has_no_features_of_them_and_no_files(workspace: Workspace) -> None:
    histories = random_histories(10, NUM_SONGS)
    rated = with_opinions(histories, NUM_SONGS)
    _, _, features = _features(rated, Queries.at_end(rated, 10**9))  # the retrieval's data has no skips and likes
    assert not [name for name in features if "skip" in name or "like" in name]
    for number, past in enumerate((histories, rated)):
        retrieval = retrieval_of([past], num_songs=NUM_SONGS)
        file_names = retrieval.save(workspace, f"retrieval/{number}")
        loaded = Retrieval.load(workspace, f"retrieval/{number}")
        assert ("plays.skips.npy" in file_names) == bool(number)
        assert (loaded.has_likes, loaded.skip_share) == (bool(number), pytest.approx(retrieval.skip_share))
        np.testing.assert_array_equal(loaded.plays.skips, retrieval.plays.skips)
    assert workspace.read_json("retrieval/0/retrieval.json") == {"newest": 50}
