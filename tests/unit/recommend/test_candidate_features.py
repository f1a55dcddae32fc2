"""The features of candidates against values read from the history."""

import numpy as np
import pytest
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
    retrieval = Retrieval.fit([past], num_songs=NUM_SONGS, artist_of_song=artists)
    retrievers = make_retrievers(retrieval, SongIndex.build(VECTORS, IndexConfig()))
    tastes = random_vectors(max(2, len(queries)), 8, seed=4)[: len(queries)]
    batch = QueryBatch.of(histories, queries, NUM_SONGS, short_vectors=tastes, long_vectors=-tastes)
    candidates = retrieve(retrievers, batch, {retriever.name: NUM_SONGS for retriever in retrievers})
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


def _one(songs: list[int], minutes: list[float], at: float) -> dict[int, dict[str, float]]:
    """The features by song, at minute `at`, for one user who played `songs` at `minutes`."""
    histories = Histories.from_lists([songs], [[round(minute * MINUTE) for minute in minutes]])
    _, candidates, features = _features(histories, Queries.at_end(histories, round(at * MINUTE)))
    return {
        song: {name: float(values[place]) for name, values in features.items()}
        for place, song in enumerate(candidates.songs.tolist())
    }


def test_user_plays_their_age_and_activation_are_those_of_the_history() -> None:
    song = _one([3, 4, 3, 5], [0, 1, 2, 3], at=63)[3]
    assert (song["user_plays"], song["user_plays_since"], song["user_share"]) == (2, 1, 0.5)
    assert song["user_hours_since"] == pytest.approx(61 / 60, rel=1e-5)
    assert song["user_base_level"] == pytest.approx(np.log(2**-0.5 + 4**-0.5), rel=1e-5)
    never = _one([3, 4, 3, 5], [0, 1, 2, 3], at=63)[6]
    assert (never["user_plays"], never["user_plays_since"], never["user_hours_since"]) == (0, -1, -1)


def test_a_pause_ends_the_session_for_songs_and_for_the_query() -> None:
    going_on = _one([3, 4, 5], [0, 60, 61], at=62)
    assert going_on[5]["session_length"] == 2
    assert (going_on[3]["user_session_plays"], going_on[4]["user_session_plays"]) == (0, 1)
    assert _one([3, 4, 5], [0, 60, 61], at=200)[5]["session_length"] == 0


def test_a_session_is_compared_with_the_long_term_taste_and_what_came_before_it_is_not() -> None:
    long_term = -random_vectors(2, 8, seed=4)[0]
    session = VECTORS[4] + VECTORS[5]
    going_on = _one([3, 4, 5], [0, 60, 61], at=62)[7]["cosine_session_long"]
    assert going_on == pytest.approx(session @ long_term / np.linalg.norm(session), rel=1e-4)
    assert _one([3, 4, 5], [0, 60, 61], at=200)[7]["cosine_session_long"] == 0


def test_artists_are_counted_over_the_last_ten_plays_and_the_history() -> None:
    features = _one([0, 1, 2, 5], [0, 1, 2, 3], at=4)  # artists 0, 1, 2, 0
    of_first, of_last = features[10], features[11]  # artists 0 and 1
    assert (of_first["artist_of_last_song"], of_last["artist_of_last_song"]) == (1, 0)
    assert (of_first["artist_recent_share"], of_last["artist_recent_share"]) == (0.5, 0.25)
    assert (of_first["artist_user_plays"], of_first["artist_plays_since"], of_last["artist_plays_since"]) == (2, 0, 2)
    assert of_first["recent_artists"] == 3


def test_recent_repeats_are_the_share_of_plays_of_songs_played_before() -> None:
    assert _one([1, 2, 1, 2], [0, 1, 2, 3], at=4)[1]["recent_repeats"] == 0.5
    assert _one([1, 2, 3, 4], [0, 1, 2, 3], at=4)[1]["recent_repeats"] == 0


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
    answers = []
    for begin in (0, 300, 700):
        cut = Histories.from_lists([songs[begin:]], [played_at[begin:]])
        answers.append(_features(cut, Queries.at_end(cut, int(played_at[-1]) + MINUTE))[1:])
    for candidates, features in answers[1:]:
        np.testing.assert_array_equal(candidates.songs, answers[0][0].songs)
        for name, values in features.items():
            np.testing.assert_array_equal(values, answers[0][1][name], name)


def test_plays_after_the_query_change_nothing() -> None:
    histories = random_histories(20, NUM_SONGS, seed=2)
    rows = np.flatnonzero(histories.lengths > 4)
    seen = histories.lengths[rows] // 2
    queries = Queries(rows=rows, seen=seen, at=np.full(len(rows), 10**9))
    cut = histories.take(rows).keep(histories.take(rows).places < np.repeat(seen, histories.lengths[rows]))
    _, some, features = _features(histories, queries)
    _, others, expected = _features(cut, Queries.at_end(cut, 10**9))
    np.testing.assert_array_equal(some.keys, others.keys)
    for name, values in features.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)


def test_where_times_are_places_nothing_is_said_of_hours() -> None:
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
    features = _one([3, 4], [0, 1], at=days * 24 * 60 + 1)
    played = set(past.songs.tolist())
    assert {features[song]["age_days"] for song in features if song in played} == {days}
    histories = Histories.from_lists([[3, 4]], [[0, MINUTE]])
    _, _, without = _features(histories, Queries.at_end(histories, days * 24 * HOUR), real_times=False)
    assert not without["age_days"].any()


def test_skips_and_likes_are_counted_up_to_the_query_and_no_further() -> None:
    past = with_opinions(random_histories(120, NUM_SONGS, seed=9), NUM_SONGS)
    assert past.skipped is not None
    histories = Histories.from_lists(
        [[3, 4, 3, 5, 3]],
        [[0, MINUTE, 2 * MINUTE, 3 * MINUTE, 9 * MINUTE]],
        skipped=[[True, False, False, True, True]],
        likes=[[(4, 2 * MINUTE), (5, 5 * MINUTE), (6, 9 * MINUTE)]],
    )
    query = Queries(rows=np.array([0]), seen=np.array([4]), at=np.array([5 * MINUTE]))
    _, candidates, features = _features(histories, query, past=past)
    of = {
        name: dict(zip(candidates.songs.tolist(), features[name].tolist(), strict=True))
        for name in ("user_skips", "user_skip_share", "user_liked", "skip_share", "recent_skips")
    }
    assert [of["user_skips"][song] for song in (3, 4, 5, 7)] == [1, 0, 1, 0]
    assert [of["user_skip_share"][song] for song in (3, 4, 5, 7)] == [0.5, 0, 1, 0]
    assert {song for song, liked in of["user_liked"].items() if liked} == {4}  # not 5, liked at the moment of the query
    assert set(of["recent_skips"].values()) == {0.5}
    mean = past.skipped.mean()
    mine = past.songs == 3
    expected = (past.skipped[mine].sum() + 10 * mean) / (mine.sum() + 10) - mean
    assert of["skip_share"][3] == pytest.approx(expected, abs=1e-6)


def test_data_without_skips_and_likes_has_no_features_of_them_and_no_files(workspace: Workspace) -> None:
    histories = random_histories(10, NUM_SONGS)
    marked = with_opinions(histories, NUM_SONGS)
    _, _, features = _features(marked, Queries.at_end(marked, 10**9))  # the retrieval's data has no skips and likes
    assert not [name for name in features if "skip" in name or "like" in name]
    for number, past in enumerate((histories, marked)):
        fitted = Retrieval.fit([past], num_songs=NUM_SONGS)
        files = fitted.save(workspace, f"retrieval/{number}")
        kept = Retrieval.load(workspace, f"retrieval/{number}")
        assert ("plays.skips.npy" in files) == bool(number)
        assert (kept.has_likes, kept.skip_share) == (bool(number), pytest.approx(fitted.skip_share))
        np.testing.assert_array_equal(kept.plays.skips, fitted.plays.skips)
    assert workspace.read_json("retrieval/0/retrieval.json") == {"newest": 50}
