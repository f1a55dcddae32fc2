"""Songs that no fit has seen, in the generated world: found by content and artist as far as the world's rules allow."""

import numpy as np
import pyarrow as pa
import pytest

from rayrec.data import columns
from rayrec.data.catalog import Catalog, Content
from rayrec.data.histories import Histories
from rayrec.data.split import Split
from rayrec.data.synthetic import ALBUM, DAY, FIRST_MOMENT, GenerateConfig, World
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import EvaluateConfig, plays_to_predict
from rayrec.evaluation.results import Statistics
from rayrec.model.added_songs import AddedSongs
from rayrec.recommend.baselines import ItemKnnRecommender, PopularityRecommender

CONFIG = GenerateConfig(users=400, songs=600, artists=60, genres=6, plays=60, playlists=0)
SPLIT = Split(
    id="s",
    dataset="d",
    validation_from=FIRST_MOMENT + 60 * DAY,
    test_from=FIRST_MOMENT + 60 * DAY,
    held_out_songs=0.2,
    held_out_seed=1,
)
ARTIST_K, GENRE_K = 3, 40  # cut-offs: about the number of cold songs per artist, and more than the number per genre


@pytest.fixture(scope="module")
def world() -> World:
    return World(CONFIG)


@pytest.fixture(scope="module")
def histories(world: World) -> Histories:
    return world.histories(np.arange(CONFIG.users))


@pytest.fixture(scope="module")
def plays(histories: Histories) -> np.ndarray:
    return np.bincount(SPLIT.final.select(histories).songs, minlength=CONFIG.songs)


def vectors_of(world: World) -> np.ndarray:
    """float32 (N, 30): song vectors by the world's rules: near those of the artist, less near those of the genre."""
    random = np.random.default_rng(0)
    genre_vectors, artist_vectors = random.normal(size=(CONFIG.genres, 30)), random.normal(size=(CONFIG.artists, 30))
    vectors = (
        genre_vectors[world.genre] + 0.7 * artist_vectors[world.artist] + 0.2 * random.normal(size=(CONFIG.songs, 30))
    )
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def recommender_with_added_songs(
    world: World, plays: np.ndarray, *, artists: bool, content: bool
) -> ItemKnnRecommender:
    """Item kNN over the songs with plays and the cold songs that were added by artist, by content, or by both."""
    table = world.songs_table()
    if not artists:
        artist_column = table.column_names.index(columns.ARTIST)
        table = table.set_column(artist_column, columns.ARTIST, pa.nulls(len(table), pa.string()))
    random = np.random.default_rng(1)
    genre_features = np.eye(CONFIG.genres, dtype=np.float32)[world.genre] + 0.1 * random.normal(
        size=(CONFIG.songs, CONFIG.genres)
    )
    song_content = (
        Content(parts=[genre_features.astype(np.float32)], places=np.arange(CONFIG.songs))
        if content
        else Content(parts=[], places=np.full(CONFIG.songs, -1))
    )
    known_vectors = np.where((plays > 0)[:, None], vectors_of(world), np.float32(0))
    added = AddedSongs.make(known_vectors, known_vectors, Catalog(table), song_content)
    vectors = known_vectors.copy()
    vectors[added.rows] = added.outputs
    recommender = ItemKnnRecommender(vectors)
    recommender.added_songs = added.rows
    return recommender


def recalls(
    recommender: ItemKnnRecommender | PopularityRecommender, histories: Histories, plays: np.ndarray
) -> dict[tuple[str, int], float]:
    """Recall by target and cut-off."""
    config = EvaluateConfig(ks=(ARTIST_K, GENRE_K), bootstrap_samples=0, offsets=0)
    evaluator = Evaluator([recommender], split=SPLIT, song_plays=plays, config=config)
    entries = Statistics(evaluator(histories), [recommender], config).results(("cold_songs", "cold_among_cold"))
    return {
        (entry["target"], entry["k"]): entry["value"]
        for entry in entries
        if (entry["users"], entry["metric"]) == ("all", "recall")
    }


def cold_plays(histories: Histories, plays: np.ndarray) -> np.ndarray:
    """int64: positions of the plays to predict that are a user's first play of a song with no play in the fit range."""
    keys = histories.rows * CONFIG.songs + histories.songs
    is_first = np.zeros(histories.num_plays, dtype=bool)
    is_first[np.unique(keys, return_index=True)[1]] = True
    plays_to_check = plays_to_predict(histories, SPLIT)
    return plays_to_check[is_first[plays_to_check] & (plays[histories.songs[plays_to_check]] == 0)]


def test_baselines_find_no_song_that_no_fit_has_seen(histories: Histories, plays: np.ndarray) -> None:
    assert set(recalls(PopularityRecommender(plays), histories, plays).values()) == {0.0}


def test_a_cold_song_is_found_by_its_artist_after_a_play_of_that_artist(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    recall = recalls(recommender_with_added_songs(world, plays, artists=True, content=False), histories, plays)
    positions = cold_plays(histories, plays)
    artists = world.artist[histories.songs]
    same_artist_share = float((artists[positions] == artists[positions - 1]).mean())
    # Two plays in a row are of one artist if an album continues: the share of the album context within a session,
    # times the chance that the album is followed. For songs new to a user, of which fewer come from collections,
    # the share is higher.
    context_shares = stationary_contexts(world)
    assert same_artist_share > CONFIG.follow * context_shares[ALBUM] * (1 - 1 / CONFIG.session_plays)
    cold_songs_per_artist = np.bincount(world.artist[plays == 0], minlength=CONFIG.artists)
    assert cold_songs_per_artist.max() <= 3 * ARTIST_K
    findable_share = float(
        (cold_songs_per_artist[artists[positions]] <= ARTIST_K)[artists[positions] == artists[positions - 1]].mean()
    )
    assert recall["cold_among_cold", ARTIST_K] > 0.9 * same_artist_share * findable_share


def test_with_content_a_cold_song_is_found_as_often_as_one_with_plays(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    recall = recalls(recommender_with_added_songs(world, plays, artists=False, content=True), histories, plays)
    recommender = ItemKnnRecommender(vectors_of(world))
    recommender.added_songs = np.flatnonzero(plays == 0)
    recall_with_plays = recalls(recommender, histories, plays)
    # Content gives the genre, and all cold songs of a genre fit within the deeper cut-off, so that none is lost there.
    assert np.bincount(world.genre[plays == 0]).max() <= GENRE_K
    assert abs(recall["cold_among_cold", GENRE_K] - recall_with_plays["cold_among_cold", GENRE_K]) < 0.03
    genres = world.genre[histories.songs]
    positions = cold_plays(histories, plays)
    assert recall["cold_among_cold", GENRE_K] >= (genres[positions] == genres[positions - 1]).mean() - 0.03
    recall_with_artists = recalls(
        recommender_with_added_songs(world, plays, artists=True, content=True), histories, plays
    )
    assert recall_with_artists["cold_among_cold", ARTIST_K] > recall["cold_among_cold", ARTIST_K]
    assert recall_with_artists["cold_songs", GENRE_K] > GENRE_K / CONFIG.songs * 3


def test_without_artist_and_content_nothing_is_added_and_no_song_is_found(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    recommender = recommender_with_added_songs(world, plays, artists=False, content=False)
    assert not len(recommender.added_songs)
    assert set(recalls(recommender, histories, plays).values()) == {0.0}


def stationary_contexts(world: World) -> np.ndarray:
    """float64 (C,): shares of the contexts of plays within sessions."""
    restart_share = 1 / CONFIG.session_plays
    transitions = (1 - restart_share) * world.context_shares[:-1] + restart_share * world.context_shares[-1]
    shares = np.full(len(transitions), 1 / len(transitions))
    for _ in range(200):
        shares = shares @ transitions
    return np.asarray(shares)
