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
OF_ARTIST, OF_GENRE = 3, 40  # cut-offs: about the number of cold songs per artist, and more than the number per genre


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
    of_genre, of_artist = random.normal(size=(CONFIG.genres, 30)), random.normal(size=(CONFIG.artists, 30))
    vectors = of_genre[world.genre] + 0.7 * of_artist[world.artist] + 0.2 * random.normal(size=(CONFIG.songs, 30))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def with_added(world: World, plays: np.ndarray, *, artists: bool, content: bool) -> ItemKnnRecommender:
    """Item kNN over the songs with plays and the cold songs that were added by artist, by content, or by both."""
    table = world.songs_table()
    if not artists:
        column = table.column_names.index(columns.ARTIST)
        table = table.set_column(column, columns.ARTIST, pa.nulls(len(table), pa.string()))
    random = np.random.default_rng(1)
    told = np.eye(CONFIG.genres, dtype=np.float32)[world.genre] + 0.1 * random.normal(
        size=(CONFIG.songs, CONFIG.genres)
    )
    given = (
        Content(parts=[told.astype(np.float32)], places=np.arange(CONFIG.songs))
        if content
        else Content(parts=[], places=np.full(CONFIG.songs, -1))
    )
    known = np.where((plays > 0)[:, None], vectors_of(world), np.float32(0))
    added = AddedSongs.make(known, known, Catalog(table), given)
    vectors = known.copy()
    vectors[added.rows] = added.outputs
    recommender = ItemKnnRecommender(vectors)
    recommender.added_songs = added.rows
    return recommender


def recalls(
    recommender: ItemKnnRecommender | PopularityRecommender, histories: Histories, plays: np.ndarray
) -> dict[tuple[str, int], float]:
    """Recall by target and cut-off."""
    config = EvaluateConfig(ks=(OF_ARTIST, OF_GENRE), bootstrap_samples=0, offsets=0)
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
    first = np.zeros(histories.num_plays, dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    predicted = plays_to_predict(histories, SPLIT)
    return predicted[first[predicted] & (plays[histories.songs[predicted]] == 0)]


def test_baselines_find_no_song_that_no_fit_has_seen(histories: Histories, plays: np.ndarray) -> None:
    assert set(recalls(PopularityRecommender(plays), histories, plays).values()) == {0.0}


def test_by_its_artist_a_song_is_found_where_it_follows_a_play_of_the_artist(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    found = recalls(with_added(world, plays, artists=True, content=False), histories, plays)
    cold = cold_plays(histories, plays)
    artist = world.artist[histories.songs]
    following = float((artist[cold] == artist[cold - 1]).mean())
    # Two plays in a row are of one artist if an album continues: the share of the album context within a session,
    # times the chance that the album is followed. For songs new to a user, of which fewer come from collections,
    # the share is higher.
    shares = stationary_contexts(world)
    assert following > CONFIG.follow * shares[ALBUM] * (1 - 1 / CONFIG.session_plays)
    cold_of_artist = np.bincount(world.artist[plays == 0], minlength=CONFIG.artists)
    assert cold_of_artist.max() <= 3 * OF_ARTIST
    within = float((cold_of_artist[artist[cold]] <= OF_ARTIST)[artist[cold] == artist[cold - 1]].mean())
    assert found["cold_among_cold", OF_ARTIST] > 0.9 * following * within


def test_with_content_a_song_is_found_as_one_with_plays_is(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    found = recalls(with_added(world, plays, artists=False, content=True), histories, plays)
    with_plays = ItemKnnRecommender(vectors_of(world))
    with_plays.added_songs = np.flatnonzero(plays == 0)
    best = recalls(with_plays, histories, plays)
    # Content gives the genre, and all cold songs of a genre fit within the deeper cut-off, so that none is lost there.
    assert np.bincount(world.genre[plays == 0]).max() <= OF_GENRE
    assert abs(found["cold_among_cold", OF_GENRE] - best["cold_among_cold", OF_GENRE]) < 0.03
    genre = world.genre[histories.songs]
    cold = cold_plays(histories, plays)
    assert found["cold_among_cold", OF_GENRE] >= (genre[cold] == genre[cold - 1]).mean() - 0.03
    both = recalls(with_added(world, plays, artists=True, content=True), histories, plays)
    assert both["cold_among_cold", OF_ARTIST] > found["cold_among_cold", OF_ARTIST]
    assert both["cold_songs", OF_GENRE] > OF_GENRE / CONFIG.songs * 3


def test_without_artist_and_content_nothing_is_added_and_no_song_is_found(
    world: World, histories: Histories, plays: np.ndarray
) -> None:
    silent = with_added(world, plays, artists=False, content=False)
    assert not len(silent.added_songs)
    assert set(recalls(silent, histories, plays).values()) == {0.0}


def stationary_contexts(world: World) -> np.ndarray:
    """float64 (C,): shares of the contexts of plays within sessions."""
    restart = 1 / CONFIG.session_plays
    moves = (1 - restart) * world.context_shares[:-1] + restart * world.context_shares[-1]
    shares = np.full(len(moves), 1 / len(moves))
    for _ in range(200):
        shares = shares @ moves
    return np.asarray(shares)
