"""Songs that came after the training: vectors from artist, album and content, read and recommended as all others."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from networks import model_config, network
from rankings import nearest
from worlds import random_histories, random_vectors

from rayrec.data import columns
from rayrec.data.catalog import Catalog, Content
from rayrec.data.histories import Histories, Queries
from rayrec.model.added_songs import AddedSongs, FirstPlays, LaterSong, SongPlacer
from rayrec.model.inference import TasteEncoder
from rayrec.model.network import TasteModel
from rayrec.recommend import index as index_module
from rayrec.recommend.filters import AnswerFilter
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.storage.workspace import Workspace

KNOWN_SONGS, SONGS, DIM = 60, 72, 8


def catalog(artists: list[str | None], albums: list[str | None] | None = None) -> Catalog:
    rows = pa.array(range(len(artists)), pa.int32())
    table = pa.table(
        [rows, [f"s{row}" for row in range(len(artists))], [None] * len(artists), artists], schema=columns.SONGS_TABLE
    )
    return Catalog(table.append_column(columns.ALBUM, pa.array(albums or [None] * len(artists), pa.string())))


def no_content(songs: int = SONGS) -> Content:
    return Content(parts=[], places=np.full(songs, -1, dtype=np.int64))


def clustered_vectors(seed: int = 0) -> np.ndarray:
    """float32 (60, 8): vectors of ten songs for each of six artists, in row order, near to one another per artist."""
    centers = np.repeat(np.eye(DIM)[:6], KNOWN_SONGS // 6, axis=0)
    vectors = centers + 0.1 * np.random.default_rng(seed).normal(size=(KNOWN_SONGS, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


ARTISTS: list[str | None] = [f"artist-{song // 10}" for song in range(KNOWN_SONGS)]
LATER_ARTISTS: list[str | None] = [f"artist-{song % 6}" for song in range(10)] + ["nobody", None]


@pytest.fixture(scope="module")
def added() -> AddedSongs:
    return AddedSongs.make(clustered_vectors(), clustered_vectors(1), catalog(ARTISTS + LATER_ARTISTS), no_content())


def test_a_song_is_nearest_to_the_songs_of_its_artist(added: AddedSongs) -> None:
    # Nothing is known of the last two songs: one is by an artist without other songs, the other has no artist.
    assert added.rows.tolist() == list(range(KNOWN_SONGS, KNOWN_SONGS + 10))
    for row, output_vector, input_vector in zip(added.rows.tolist(), added.outputs, added.inputs, strict=True):
        artist = (row - KNOWN_SONGS) % 6
        for table, vector in ((clustered_vectors(), output_vector), (clustered_vectors(1), input_vector)):
            assert (np.argsort(-table @ vector)[:10] // 10 == artist).all()
    assert added.artist_rows.tolist() == [10 * (song % 6) for song in range(10)]
    assert (added.album_rows == -1).all()


def test_a_song_that_the_network_knows_by_number_alone_is_added_too() -> None:
    vectors = clustered_vectors()
    vectors[[3, 25]] = 0  # in the catalog at training, without a play
    result = AddedSongs.make(vectors, vectors, catalog(ARTISTS), no_content(KNOWN_SONGS))
    assert result.rows.tolist() == [3, 25]
    assert (np.argsort(-clustered_vectors() @ result.outputs[1])[:10] // 10 == 2).all()


def test_content_places_a_song_without_an_artist() -> None:
    random = np.random.default_rng(2)
    content = random.normal(size=(200, 6)).astype(np.float32)
    projection = random.normal(size=(6, DIM))
    vectors = (content @ projection + 0.1 * random.normal(size=(200, DIM))).astype(np.float32)
    vectors[180:] = 0
    song_content = Content(
        parts=[content[100:], content[:100]], places=np.concatenate([np.arange(100, 200), np.arange(100)])
    )
    result = AddedSongs.make(vectors, vectors, catalog([None] * 200), song_content)
    assert result.rows.tolist() == list(range(180, 200))
    expected = content[180:] @ projection
    cosines = (result.outputs * expected).sum(axis=1) / (
        np.linalg.norm(result.outputs, axis=1) * np.linalg.norm(expected, axis=1)
    )
    assert cosines.min() > 0.98


def test_vectors_are_at_most_of_length_1_whatever_the_scale_of_the_content() -> None:
    """Placed at the start or later; one content vector has 10,000 times the usual scale, one the largest float32."""
    random = np.random.default_rng(2)
    content = random.normal(size=(SONGS, 6)).astype(np.float32)
    vectors = (content @ random.normal(size=(6, DIM))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[KNOWN_SONGS:] = 0
    content[KNOWN_SONGS] *= 1e4
    content[KNOWN_SONGS + 1] = np.finfo(np.float32).max
    full_catalog, song_content = catalog([None] * SONGS), Content(parts=[content], places=np.arange(SONGS))
    result = AddedSongs.make(vectors, vectors, full_catalog, song_content)
    later_songs = [
        LaterSong(row=row, artist=None, album=None, content=content[row]) for row in range(KNOWN_SONGS, SONGS)
    ]
    placed_songs = SongPlacer(vectors, vectors, full_catalog, song_content, result).estimate(later_songs)
    for songs in (result, placed_songs):
        for table in (songs.outputs, songs.averaged, songs.inputs):
            lengths = np.linalg.norm(table, axis=1)
            np.testing.assert_allclose(lengths[:2], 1, atol=1e-6)
            assert (lengths > 0).all()
            assert (lengths < 1 + 1e-6).all()
    np.testing.assert_allclose(placed_songs.outputs, result.outputs, atol=1e-6)


def test_what_is_read_grows_with_the_artists_of_the_new_songs_and_not_with_the_catalog() -> None:
    artists: list[str | None] = [f"artist-{song // 10}" for song in range(5_000)]
    vectors = random_vectors(5_000, DIM)
    first = AddedSongs.make(vectors, vectors, catalog([*artists, "artist-7"]), no_content(5_001))
    second = AddedSongs.make(
        vectors, vectors, catalog([*artists, "artist-7", "artist-9", "artist-9"]), no_content(5_003), earlier=first
    )
    assert (first.rows_read, second.rows_read) == (10, 20)
    assert second.output_map is first.output_map
    np.testing.assert_array_equal(second.outputs[:1], first.outputs)


def test_songs_keep_the_vectors_that_their_plays_were_read_with(added: AddedSongs) -> None:
    artists = [*ARTISTS, *LATER_ARTISTS[:10], "artist-1", None]  # song 70 had an unknown artist before
    histories = Histories.from_lists([[50, 51, 60, 52]] * 3, [range(4)] * 3)  # the first plays of song 60
    extended = AddedSongs.make(
        clustered_vectors(),
        clustered_vectors(1),
        catalog([*artists, "artist-2"]),
        no_content(73),
        earlier=added,
        earlier_num_songs=72,
        first_plays=FirstPlays.read([histories], np.arange(60, 73), clustered_vectors(), clustered_vectors(1)),
    )
    assert extended.rows.tolist() == [*range(60, 71), 72]
    assert not np.allclose(extended.outputs[0], added.outputs[0])
    assert extended.outputs[10].any()
    for read_vectors, earlier_vectors in ((extended.inputs, added.inputs), (extended.averaged, added.averaged)):
        np.testing.assert_array_equal(read_vectors[:10], earlier_vectors)
        assert not read_vectors[10].any()
        assert read_vectors[11].any()
    np.testing.assert_array_equal(added.averaged, added.outputs)
    assert extended.fits(added, 72)
    assert added.fits(None, KNOWN_SONGS)
    assert not added.fits(None, KNOWN_SONGS + 1)
    rebuilt = AddedSongs.make(
        clustered_vectors(), clustered_vectors(1), catalog([*artists, "artist-2"]), no_content(73)
    )
    assert not rebuilt.fits(added, 72)
    assert not replace(extended, averaged=extended.outputs).fits(added, 72)


def test_first_plays_place_an_unknown_song_with_a_longer_vector_the_more_there_are() -> None:
    # Song 70 is played among songs of the fifth artist, by 1, 2 and 4 users; song 71 is played alone.
    histories = Histories.from_lists([[40, 41, 70, 42]] * 4 + [[71]], [range(4)] * 4 + [range(1)])
    lengths, previous_length = [], 0.0
    for users in (1, 2, 4):
        plays = FirstPlays.read(
            [histories.take(np.arange(users))], np.arange(60, 72), clustered_vectors(), clustered_vectors(1)
        )
        assert plays.plays.tolist() == [0] * 10 + [users, 0]
        result = AddedSongs.make(
            clustered_vectors(),
            clustered_vectors(1),
            catalog([*ARTISTS, *[None] * 12]),
            no_content(),
            first_plays=plays,
        )
        assert (result.rows.tolist(), result.played) == ([70], 1)
        assert (np.argsort(-clustered_vectors() @ result.outputs[0])[:10] // 10 == 4).all()
        assert (np.argsort(-clustered_vectors(1) @ result.inputs[0])[:10] // 10 == 4).all()
        lengths.append(np.linalg.norm(result.outputs[0]))
        assert lengths[-1] > previous_length
        previous_length = lengths[-1]
    # The vector is a mean of vectors near one another, multiplied by n / (n + 5) for n plays.
    assert lengths == pytest.approx([length * lengths[0] * 6 for length in (1 / 6, 2 / 7, 4 / 9)], rel=1e-5)


def test_first_plays_draw_a_song_away_from_its_artist_by_a_bounded_step(added: AddedSongs) -> None:
    histories = Histories.from_lists([[50, 51, 60, 52]] * 3, [range(4)] * 3)  # song 60 is of the first artist
    plays = FirstPlays.read([histories], np.arange(60, 72), clustered_vectors(), clustered_vectors(1))
    result = AddedSongs.make(
        clustered_vectors(), clustered_vectors(1), catalog(ARTISTS + LATER_ARTISTS), no_content(), first_plays=plays
    )
    neighbor_mean = (clustered_vectors()[51] + clustered_vectors()[52] + clustered_vectors()[50] / 2) / 2.5
    np.testing.assert_allclose(result.outputs[0], (5 * added.outputs[0] + 3 * neighbor_mean) / 8, atol=1e-5)
    np.testing.assert_array_equal(result.outputs[1:], added.outputs[1:])


def test_stored_songs_are_the_same(added: AddedSongs, workspace: Workspace) -> None:
    assert set(added.save(workspace, "x")) == {path.removeprefix("x/") for path in workspace.files("x")}
    loaded = AddedSongs.load(workspace, "x")
    for name in ("rows", "outputs", "averaged", "inputs", "artist_rows", "album_rows"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(added, name))
    assert loaded.output_map.explained == added.output_map.explained


@pytest.mark.parametrize("input_table", [False, True])
def test_the_network_reads_an_added_song_as_one_of_its_own_with_the_same_vector(input_table: bool) -> None:
    config = model_config(num_songs=SONGS, song_table="trained" if input_table else "frozen", input_table=input_table)
    full_model = network(config)
    table = full_model.inputs if full_model.inputs is not None else full_model.songs
    vectors = torch.nn.functional.normalize(table.weight.detach(), dim=-1)
    outputs = torch.nn.functional.normalize(full_model.songs.weight.detach(), dim=-1)
    small_model = TasteModel(
        model_config(num_songs=KNOWN_SONGS, song_table=config.song_table, input_table=input_table),
        full_model.songs.weight[:KNOWN_SONGS].detach(),
    ).eval()
    tables = ("songs.weight", "inputs.weight")
    other_weights = {name: value for name, value in full_model.state_dict().items() if name not in tables}
    small_model.load_state_dict(other_weights, strict=False)
    if small_model.inputs is not None:
        small_model.inputs.weight.data.copy_(table.weight[:KNOWN_SONGS])
    histories = random_histories(12, SONGS, seed=3)
    queries = Queries.at_end(histories, 10**9)
    expected = TasteEncoder(full_model).vectors(histories, queries, "short")
    tastes_without = TasteEncoder(small_model).vectors(histories, queries, "short")
    rows = torch.arange(KNOWN_SONGS, SONGS)
    small_model.add_songs(rows, outputs[KNOWN_SONGS:], vectors[KNOWN_SONGS:])
    np.testing.assert_allclose(TasteEncoder(small_model).vectors(histories, queries, "short"), expected, atol=1e-5)
    assert np.abs(tastes_without - expected).max() > 0.01


def test_added_songs_move_with_the_network_to_another_device() -> None:
    model = network(model_config(num_songs=KNOWN_SONGS))
    vectors = torch.from_numpy(random_vectors(2, DIM))
    model.add_songs(torch.arange(KNOWN_SONGS, KNOWN_SONGS + 2), vectors, vectors)
    model.to("meta")
    added_tensors = [model.added_rows, model.added_averaged, model.added_inputs]
    assert [str(tensor.device) for tensor in added_tensors if tensor is not None] == ["meta"] * 3


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_an_index_with_added_songs_answers_as_one_that_was_built_with_them(kind: str) -> None:
    vectors = random_vectors(400, DIM, seed=5)
    rows = np.array([3, 77, *range(360, 400)])
    early_vectors = vectors.copy()
    early_vectors[rows] = 0
    config = IndexConfig(kind=kind, nlist=8, queries=50, target_recall=1.0)  # type: ignore[arg-type]
    grown_index = SongIndex.build(early_vectors[:360], config).with_added(rows, vectors)
    full_index = SongIndex.build(vectors, IndexConfig(kind="flat"))
    queries = random_vectors(30, DIM, seed=6)
    exclude = [np.arange(query, 400, 9) for query in range(30)]
    for excluded in (None, exclude):
        songs, scores = nearest(grown_index, queries, 10, excluded)
        expected_songs, expected_scores = nearest(full_index, queries, 10, excluded)
        assert (songs == expected_songs).mean() > 0.97  # an IVF index promises its recall for most queries only
        np.testing.assert_allclose(scores[:, 0], expected_scores[:, 0], atol=1e-5)
    assert np.isin(songs, rows).any()
    all_songs, _ = nearest(grown_index, queries[:2], 400)
    assert sorted(all_songs[0].tolist()) == list(range(400))


def test_songs_of_equal_score_are_in_the_order_of_rows_whether_they_were_added_or_not() -> None:
    vectors = np.ones((60, 2), np.float32)
    rows = np.arange(0, 60, 5)
    early_vectors = vectors.copy()
    early_vectors[rows] = 0
    grown_index = SongIndex.build(early_vectors, IndexConfig(kind="flat")).with_added(rows, vectors)
    # 50 + 16 songs: all of them are sorted
    assert nearest(grown_index, vectors[:1], 50)[0][0].tolist() == list(range(50))


def test_added_songs_that_are_banned_stay_out_of_long_lists_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "FEW_SONGS", 10)
    monkeypatch.setattr(index_module, "MAX_LIST_SHARE", 1.0)
    monkeypatch.setattr(index_module, "MAX_OVERFETCH", 5)  # if more songs are excluded, the search itself skips them
    vectors, rows = random_vectors(400, DIM, seed=5), np.arange(360, 400)
    config = IndexConfig(kind="ivf", nlist=8, queries=50, target_recall=0.1)
    grown_index = SongIndex.build(vectors[:360], config).with_added(rows, vectors)
    query = vectors[rows[:1]]  # the nearest song is an added one
    unfiltered = grown_index.rank(query, 5)
    filtered = grown_index.rank(query, 5, [AnswerFilter(excluded=np.concatenate([np.arange(20), unfiltered.songs[0]]))])
    assert unfiltered.songs[0, 0] == rows[0]
    assert filtered.paths == ("selector",)
    assert not np.isin(filtered.songs, unfiltered.songs).any()


def test_a_recommender_finds_added_songs_by_their_artist(added: AddedSongs) -> None:
    model = network(model_config(num_songs=KNOWN_SONGS, averages=(0.0,)))
    recommender = TasteRecommender(model, clustered_vectors())
    recommender.index = SongIndex.build(clustered_vectors(), IndexConfig())
    recommender.add_songs(added)
    assert (recommender.num_songs, len(recommender.added_songs)) == (KNOWN_SONGS + 10, 10)
    histories = Histories.from_lists([[5]], [[0]])
    scores = recommender.score(histories, Queries.at_end(histories, 1))
    songs, song_scores = recommender.recommend(histories, 1, 70)
    assert set(songs[0].tolist()) == set(range(70))
    np.testing.assert_allclose(song_scores[0], scores[0][songs[0]], atol=1e-5)
