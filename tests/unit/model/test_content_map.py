"""The map from artist, album and content to song vectors, on songs whose vectors are made of known parts."""

import numpy as np
import pytest

from rayrec.model.added_songs import ContentMap, GroupMeans, SongContent

DIM, CONTENT = 16, 12


def planted(
    songs: int, *, of_artist: float, of_album: float, of_content: float, noise: float, seed: int = 0
) -> tuple[np.ndarray, SongContent]:
    """Song vectors: sums of artist and album vectors, a linear image of the content, and noise, of given variances."""
    random = np.random.default_rng(seed)
    albums = random.integers(0, songs // 8, size=songs)
    artists = albums // 4
    content = random.normal(size=(songs, CONTENT)).astype(np.float32)
    world_random = np.random.default_rng(99)  # the same world for every seed
    projection = world_random.normal(size=(CONTENT, DIM)) / np.sqrt(CONTENT)
    artist_vectors, album_vectors = (world_random.normal(size=(songs, DIM)) for _ in range(2))
    vectors = (
        np.sqrt(of_artist) * artist_vectors[artists]
        + np.sqrt(of_album) * album_vectors[albums]
        + np.sqrt(of_content) * content @ projection
        + np.sqrt(noise) * random.normal(size=(songs, DIM))
    )
    return vectors.astype(np.float32), SongContent(artists=artists, albums=albums, content=content)


def explained_share(expected: np.ndarray, vectors: np.ndarray) -> float:
    return float(1 - np.square(vectors - expected).sum() / np.square(vectors - vectors.mean(axis=0)).sum())


def fit(vectors: np.ndarray, songs: SongContent, learned_rows: slice) -> tuple[ContentMap, GroupMeans]:
    learned_songs = songs.take(np.arange(len(vectors))[learned_rows])
    return ContentMap.fit(vectors[learned_rows], learned_songs), GroupMeans.of(vectors[learned_rows], learned_songs)


def test_a_song_is_left_out_of_its_own_means() -> None:
    vectors, songs = planted(64, of_artist=1, of_album=1, of_content=0, noise=1)
    mean, strengths = vectors.mean(axis=0), np.array([3.0, 2.0])
    means_without_self = GroupMeans.of(vectors, songs).shrunk(songs, mean, strengths, own=vectors)
    for song in range(64):
        is_other = np.arange(64) != song
        expected = GroupMeans.of(vectors[is_other], songs.take(is_other)).shrunk(
            songs.take(np.array([song])), mean, strengths
        )
        np.testing.assert_allclose(means_without_self[song], expected[0], atol=1e-6)


def test_content_and_groups_explain_the_share_of_the_variance_that_was_planted() -> None:
    vectors, songs = planted(3_000, of_artist=0.3, of_album=0.2, of_content=0.4, noise=0.1)
    content_map, groups = fit(vectors, songs, slice(0, 2_500))
    explained = explained_share(content_map.vectors(songs.take(np.arange(2_500, 3_000)), groups), vectors[2_500:])
    # Of the total variance 1, the noise of 0.1 cannot be explained, and artist and album means over few songs miss
    # about a sixth of theirs.
    assert 0.78 < explained < 0.9
    assert abs(content_map.explained - explained) < 0.05


def test_artist_and_album_predict_a_song_without_content_better_the_more_songs_they_have() -> None:
    vectors, songs = planted(3_000, of_artist=0.4, of_album=0.3, of_content=0.0, noise=0.3)
    no_content_songs = SongContent(artists=songs.artists, albums=songs.albums, content=np.zeros((3_000, 0), np.float32))
    content_map, groups = fit(vectors, no_content_songs, slice(0, 2_500))
    later_songs = no_content_songs.take(np.arange(2_500, 3_000))
    full_share = explained_share(content_map.vectors(later_songs, groups), vectors[2_500:])
    by_artist = SongContent(artists=later_songs.artists, albums=np.full(500, -1), content=later_songs.content)
    artist_share = explained_share(content_map.vectors(by_artist, groups), vectors[2_500:])
    # Artist and album explain at most 0.7. The artist alone explains at most 0.4 and a quarter of the album's 0.3:
    # an artist has four albums, one of which is the song's own.
    assert 0.6 < full_share < 0.7
    assert 0.4 < artist_share < 0.475
    few_means = GroupMeans.of(vectors[:300], no_content_songs.take(np.arange(300)))
    assert explained_share(content_map.vectors(later_songs, few_means), vectors[2_500:]) < full_share - 0.1


def test_a_song_of_which_nothing_is_known_gets_no_vector() -> None:
    vectors, songs = planted(500, of_artist=0.5, of_album=0.2, of_content=0.2, noise=0.1)
    content_map, groups = fit(vectors, songs, slice(0, 400))
    unknown_songs = SongContent(
        artists=np.array([-1, 10**6, -1]), albums=np.array([-1, -1, 10**6]), content=np.zeros((3, CONTENT), np.float32)
    )
    assert not unknown_songs.known[0]
    assert not content_map.vectors(unknown_songs, groups).any()


def test_content_that_says_nothing_is_not_used() -> None:
    vectors, songs = planted(2_000, of_artist=0.5, of_album=0.2, of_content=0.0, noise=0.3)
    content_map, groups = fit(vectors, songs, slice(0, 1_600))
    later_songs = songs.take(np.arange(1_600, 2_000))
    no_content_songs = SongContent(
        artists=later_songs.artists, albums=later_songs.albums, content=np.zeros((400, 0), np.float32)
    )
    share_with_content, share_without = (
        explained_share(content_map.vectors(given_songs, groups), vectors[1_600:])
        for given_songs in (later_songs, no_content_songs)
    )
    assert abs(share_with_content - share_without) < 0.02


def test_the_less_is_known_of_a_song_the_shorter_is_its_vector() -> None:
    vectors, songs = planted(2_000, of_artist=0.3, of_album=0.3, of_content=0.3, noise=0.1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    content_map, groups = fit(vectors, songs, slice(0, 1_600))
    later_songs = songs.take(np.arange(1_600, 2_000))
    no_content = np.zeros_like(later_songs.content)
    by_group = SongContent(artists=later_songs.artists, albums=later_songs.albums, content=no_content)
    by_artist = SongContent(artists=later_songs.artists, albums=np.full(400, -1), content=no_content)
    lengths = [
        np.linalg.norm(content_map.vectors(given_songs, groups), axis=1).mean()
        for given_songs in (later_songs, by_group, by_artist)
    ]
    assert 1 > lengths[0] > lengths[1] > lengths[2] > 0


@pytest.mark.parametrize("content", [0, CONTENT])
def test_a_map_is_the_same_after_it_was_stored(content: int) -> None:
    vectors, songs = planted(400, of_artist=0.5, of_album=0.2, of_content=0.2, noise=0.1)
    songs = SongContent(artists=songs.artists, albums=songs.albums, content=songs.content[:, :content])
    content_map, groups = fit(vectors, songs, slice(0, 300))
    later_songs = songs.take(np.arange(300, 400))
    loaded = ContentMap.from_bytes(content_map.to_bytes())
    np.testing.assert_array_equal(loaded.vectors(later_songs, groups), content_map.vectors(later_songs, groups))
    assert (loaded.penalty, loaded.explained) == (content_map.penalty, content_map.explained)


def test_no_songs_to_learn_from_give_a_map_that_knows_nothing() -> None:
    no_songs = SongContent(
        artists=np.zeros(0, np.int64), albums=np.zeros(0, np.int64), content=np.zeros((0, 3), np.float32)
    )
    content_map = ContentMap.fit(np.zeros((0, DIM), np.float32), no_songs)
    one_song = SongContent(artists=np.array([0]), albums=np.array([-1]), content=np.zeros((1, 3), np.float32))
    assert not content_map.vectors(one_song, GroupMeans.of(np.zeros((0, DIM), np.float32), no_songs)).any()
