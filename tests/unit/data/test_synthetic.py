"""The generated world: its plays follow its rules and depend only on the settings and the user."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SESSION_GAP, user_index

from rayrec.data import columns
from rayrec.data.histories import Histories
from rayrec.data.synthetic import (
    ALBUM,
    COLLECTION,
    CONTEXTS,
    DAY,
    FIRST_MOMENT,
    HOUR,
    PLAYLIST,
    RADIO,
    SEARCH,
    SKIP_OFF_TASTE,
    SKIP_ON_TASTE,
    TASTE,
    GenerateConfig,
    World,
)
from rayrec.errors import InputError

SMALL = GenerateConfig(users=400, songs=300, artists=60, genres=6, plays=40)
FIELDS = ("user_ids", "offsets", "songs", "played_at", "contexts", "skipped")


@pytest.fixture(scope="module")
def world() -> World:
    return World(GenerateConfig())


@pytest.fixture(scope="module")
def histories(world: World) -> Histories:
    """The histories of all 2,000 users, about 120,000 plays."""
    return world.histories(np.arange(world.config.users))


@pytest.fixture(scope="module")
def contexts(histories: Histories) -> np.ndarray:
    assert histories.contexts is not None
    return np.log2(histories.contexts).astype(np.int64)


@pytest.fixture(scope="module")
def starts(histories: Histories) -> np.ndarray:
    """bool (P,): True for plays that start a session, derived from the gaps between plays."""
    gaps = np.diff(histories.played_at, prepend=0)
    is_first = np.zeros(histories.num_plays, dtype=bool)
    is_first[histories.offsets[:-1]] = True
    return is_first | (gaps >= SESSION_GAP)


def assert_same(left: Histories, right: Histories) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


class TestUsersAreIndependent:
    @settings(max_examples=15)
    @given(st.lists(st.integers(0, 399), min_size=1, max_size=20, unique=True))
    def test_any_users_made_alone_have_the_same_plays(self, users: list[int]) -> None:
        world = World(SMALL)
        assert_same(world.histories(np.array(users)), world.histories(np.arange(400)).take(np.array(users)))

    def test_block_size_changes_nothing(self) -> None:
        world, users = World(SMALL), np.arange(100)
        full = world.histories(users)
        start = 0
        for block in world.blocks(users, most=7):
            assert len(block) <= 7
            assert_same(block, full.take(np.arange(start, start + len(block))))
            start += len(block)
        assert start == 100

    def test_users_differ_and_seeds_differ(self) -> None:
        first, second = World(SMALL).histories(np.arange(2)), World(SMALL).histories(np.arange(2))
        assert_same(first, second)
        assert not np.array_equal(first.last_songs(5)[0], first.last_songs(5)[1])
        other_world = World(GenerateConfig(users=400, songs=300, artists=60, genres=6, plays=40, seed=1))
        assert not np.array_equal(first.lengths, other_world.histories(np.arange(2)).lengths)

    def test_user_ids_lead_back_to_users(self, world: World) -> None:
        users = np.array([0, 123, 1_999_999])
        assert list(world.user_ids(users)) == ["user-000000", "user-000123", "user-1999999"]
        np.testing.assert_array_equal(user_index(world.user_ids(users)), users)

    def test_playlists_are_independent_too(self, world: World) -> None:
        songs, offsets = world.playlists(np.arange(50))
        one_playlist, _ = world.playlists(np.array([33]))
        np.testing.assert_array_equal(one_playlist, songs[offsets[33] : offsets[34]])


class TestCatalog:
    def test_names_are_unique_and_songs_stand_in_order(self, world: World) -> None:
        table = world.songs_table()
        assert table.schema.equals(columns.SONGS_TABLE)
        assert table.column(columns.SONG).to_pylist() == list(range(2_000))
        names = set(zip(table.column(columns.ARTIST).to_pylist(), table.column(columns.TITLE).to_pylist(), strict=True))
        assert len(names) == 2_000
        assert len(set(table.column(columns.TITLE).to_pylist())) == 2_000
        assert len(set(table.column(columns.ARTIST).to_pylist())) == world.config.artists

    def test_an_artist_belongs_to_one_genre(self, world: World) -> None:
        pairs = np.unique(np.stack([world.artist, world.genre]), axis=1)
        assert pairs.shape[1] == world.config.artists
        assert len(np.unique(world.genre)) == world.config.genres

    @pytest.mark.parametrize(("order", "group"), [("album_next", "artist"), ("playlist_next", "genre")])
    def test_following_the_order_visits_the_whole_group_and_comes_back(
        self, world: World, order: str, group: str
    ) -> None:
        next_songs, groups = getattr(world, order), getattr(world, group)
        for start in (0, 700, 1_999):
            visited, song = [start], next_songs[start]
            while song != start:
                visited.append(song)
                song = next_songs[song]
            np.testing.assert_array_equal(np.sort(visited), np.flatnonzero(groups == groups[start]))

    def test_shares_are_zipf_within_each_genre(self, world: World) -> None:
        for genre in range(world.config.genres):
            shares = np.sort(world.share[world.genre == genre])[::-1]
            assert shares.sum() == pytest.approx(1)
            np.testing.assert_allclose(shares[0] / shares, np.arange(1, len(shares) + 1) ** world.config.zipf)


class TestPlaysFollowTheRules:
    def test_sizes(self, world: World, histories: Histories, starts: np.ndarray) -> None:
        assert histories.lengths.min() >= 1
        assert histories.lengths.mean() == pytest.approx(world.config.plays, rel=0.05)
        later_starts = np.delete(starts, histories.offsets[:-1])
        assert later_starts.mean() == pytest.approx(1 / world.config.session_plays, rel=0.03)

    def test_gaps_are_of_songs_or_of_hours_and_stay_in_the_range(
        self, world: World, histories: Histories, starts: np.ndarray
    ) -> None:
        gaps = np.delete(np.diff(histories.played_at, prepend=0), histories.offsets[:-1])
        assert gaps.min() >= 5_000
        assert not ((gaps > SESSION_GAP) & (gaps < HOUR)).any()
        assert histories.played_at.min() >= FIRST_MOMENT
        assert histories.played_at.max() <= FIRST_MOMENT + world.config.days * DAY
        assert histories.played_at.max() > FIRST_MOMENT + 0.95 * world.config.days * DAY

    def test_contexts_move_by_their_shares(self, world: World, contexts: np.ndarray, starts: np.ndarray) -> None:
        later_plays = np.flatnonzero(~starts)
        transitions = np.zeros((len(CONTEXTS), len(CONTEXTS)))
        np.add.at(transitions, (contexts[later_plays - 1], contexts[later_plays]), 1)
        np.testing.assert_allclose(
            transitions / transitions.sum(axis=1, keepdims=True), world.context_shares[:-1], rtol=0, atol=0.02
        )
        first_shares = np.bincount(contexts[starts], minlength=len(CONTEXTS)) / starts.sum()
        np.testing.assert_allclose(first_shares, world.context_shares[-1], atol=0.015)

    @pytest.mark.parametrize(("context", "order"), [(ALBUM, "album_next"), (PLAYLIST, "playlist_next")])
    def test_albums_and_playlists_go_on_in_order_as_often_as_configured(
        self, world: World, histories: Histories, contexts: np.ndarray, starts: np.ndarray, context: int, order: str
    ) -> None:
        plays = np.flatnonzero(~starts & (contexts == context))
        previous_songs, songs = histories.songs[plays - 1], histories.songs[plays]
        chance_share = (1 - world.config.follow) * world.share[getattr(world, order)[previous_songs]].mean()
        followed_share = (getattr(world, order)[previous_songs] == songs).mean()
        assert followed_share == pytest.approx(world.config.follow + chance_share, abs=0.01)

    def test_radio_stays_near_and_search_goes_anywhere(
        self, world: World, histories: Histories, contexts: np.ndarray, starts: np.ndarray
    ) -> None:
        genres = world.genre[histories.songs]
        radio = np.flatnonzero(~starts & (contexts == RADIO))
        assert (genres[radio] == genres[radio - 1]).all()
        search_genres = genres[contexts == SEARCH]
        np.testing.assert_allclose(np.bincount(search_genres) / len(search_genres), 1 / world.config.genres, atol=0.02)

    def test_radio_draws_songs_by_their_share(
        self, world: World, histories: Histories, contexts: np.ndarray, starts: np.ndarray
    ) -> None:
        songs = histories.songs[~starts & (contexts == RADIO)]
        for genre in range(world.config.genres):
            genre_songs = songs[world.genre[songs] == genre]
            top_song = np.argmax(np.where(world.genre == genre, world.share, 0))
            tolerance = 4 * np.sqrt(world.share[top_song] / len(genre_songs))
            assert (genre_songs == top_song).mean() == pytest.approx(world.share[top_song], abs=tolerance)

    def test_collection_repeats_what_the_user_heard(self, histories: Histories, contexts: np.ndarray) -> None:
        is_first = np.zeros(histories.num_plays, dtype=bool)
        is_first[histories.offsets[:-1]] = True
        for play in np.flatnonzero((contexts == COLLECTION) & ~is_first)[:2_000]:
            start = histories.offsets[np.searchsorted(histories.offsets, play, side="right") - 1]
            assert histories.songs[play] in histories.songs[start:play]

    def test_sessions_start_in_the_long_term_taste(
        self, world: World, histories: Histories, contexts: np.ndarray, starts: np.ndarray
    ) -> None:
        tastes = world.tastes(np.arange(world.config.users))
        assert (np.diff(np.sort(tastes, axis=1), axis=1) > 0).all()
        plays = np.flatnonzero(starts & (contexts == RADIO))
        in_taste = world.genre[histories.songs[plays]][:, None] == tastes[histories.rows[plays]]
        chance_share = world.config.outside / world.config.genres
        np.testing.assert_allclose(in_taste.mean(axis=0), (1 - world.config.outside) * TASTE + chance_share, atol=0.03)

    def test_songs_off_the_taste_are_skipped_more_often(self, world: World, histories: Histories) -> None:
        tastes = world.tastes(np.arange(world.config.users))[histories.rows]
        is_on_taste = (world.genre[histories.songs][:, None] == tastes).any(axis=1)
        assert histories.skipped is not None
        assert histories.skipped[is_on_taste].mean() == pytest.approx(SKIP_ON_TASTE, abs=0.005)
        assert histories.skipped[~is_on_taste].mean() == pytest.approx(SKIP_OFF_TASTE, abs=0.015)

    def test_a_playlist_stays_in_one_genre(self, world: World) -> None:
        songs, offsets = world.playlists(np.arange(200))
        lengths = np.diff(offsets)
        assert lengths.min() >= 10
        assert lengths.max() <= 40
        genres = world.genre[songs]
        assert (genres == np.repeat(genres[offsets[:-1]], lengths)).all()


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"users": 0}, "users is 0"),
            ({"genres": 2}, "genres is 2; expected an integer of at least 3"),
            ({"artists": 3_000}, "expected genres <= artists <= songs"),
            ({"plays": 0.5}, "plays is 0.5"),
            ({"follow": 1.5}, "follow is 1.5; expected a number of at least 0 and at most 1"),
            ({"zipf": -1.0}, "zipf is -1.0"),
            ({"days": 1.0}, "days is 1; expected at least"),
        ],
    )
    def test_a_value_that_makes_no_world_is_refused(self, values: dict[str, float], message: str) -> None:
        with pytest.raises(InputError, match=message):
            GenerateConfig(**values)
