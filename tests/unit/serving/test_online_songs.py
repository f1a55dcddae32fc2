"""Songs added while a release is live: all replicas recommend them within a second, with the nightly job's vectors."""

import gc
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from served import AT, BEGIN, NUM_SONGS, WITHOUT_VECTOR, Client, service, write_release
from stores import needs_redis
from worlds import write_dataset, write_song_vectors

from rayrec.bench.redis_servers import RedisServer
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.impressions import read_impressions
from rayrec.importing.descriptions import DescribeConfig, describe
from rayrec.jobs.add_songs import add_songs, added_to
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import SONG_VECTORS
from rayrec.online.sqlite_store import SqliteStore
from rayrec.online.state_store import StoreUnavailableError, store_uri
from rayrec.recommend.reranking import network_of
from rayrec.recommend.stored_retrieval import Retrieval, RetrievalCounts
from rayrec.serving import online_songs
from rayrec.serving.middleware import Keys, load_keys
from rayrec.serving.serve_config import ServeConfig
from rayrec.serving.service import Service
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

ARTIST = 3
ARTIST_SONGS = [f"song-{ARTIST + 7 * position}" for position in range(6)]
MAX_SONGS_PER_ARTIST = -(-NUM_SONGS // 7) + 1  # maximum number of songs of an artist, including one added song
TOLERANCE = 1e-5  # absolute, per number of a vector


@pytest.fixture
def world(workspace: Workspace) -> Workspace:
    """A workspace where each user plays songs of one artist only, which the rankers of its release have learned."""
    random = np.random.default_rng(0)
    histories = Histories.from_lists(
        [(7 * random.integers(0, NUM_SONGS // 7, size=25) + user % 7).tolist() for user in range(70)],
        [(BEGIN + 60_000 * np.arange(25) + user).tolist() for user in range(70)],
        [f"user-{user}" for user in range(70)],
    )
    write_dataset(workspace, histories, NUM_SONGS)
    write_song_vectors(workspace, np.ones((NUM_SONGS, 8), np.float32), {"dataset": "by-hand"})
    write_release(workspace, artists=True)
    return workspace


@pytest.fixture
def replica(world: Workspace) -> Iterator[Service]:
    with service(world) as replica:
        yield replica


def add(app: Client, *songs: dict[str, Any]) -> list[str]:
    response = app.post("/v1/songs", {"songs": list(songs)})
    assert response.status_code == 200, response.text
    outcomes: list[str] = response.json()["outcomes"]
    return outcomes


def new_song(number: int, artist: int | None = ARTIST) -> dict[str, Any]:
    artist_field = {} if artist is None else {"artist": f"Artist {artist}"}
    return {"song_id": f"new-{number}", "title": f"New {number}", **artist_field}


def play(user_id: str, song_id: str, played_at: int) -> dict[str, Any]:
    return {"event_id": f"{user_id} {played_at}", "user_id": user_id, "song_id": song_id, "played_at": played_at}


def recommended_songs(app: Client, history: list[str], k: int = NUM_SONGS, **body: Any) -> list[str]:
    response = app.post("/v1/recommendations", {"history": history, "at": AT, "k": k, "exclude_heard": False, **body})
    assert response.status_code == 200, response.text
    return [song["song_id"] for song in response.json()["songs"]]


def vector(replica: Service, song_id: str) -> np.ndarray:
    live = replica.live
    return np.array(network_of(live.engine.parts.recommender).song_vectors[live.catalog.find([song_id])[0]])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 300.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def popular_songs(app: Client) -> list[str]:
    return [song["song_id"] for song in app.get("/v1/songs/popular", params={"k": NUM_SONGS + 9}).json()["songs"]]


def newest_songs(app: Client) -> list[str]:
    return [song["song_id"] for song in app.get("/v1/songs/new", params={"k": NUM_SONGS + 9}).json()["songs"]]


def empty_store_of_songs(replica: Service) -> None:
    """Delete all added songs from the store of a replica, and wait until the replica has noticed."""
    with closing(sqlite3.connect(store_uri(replica.holder.workspace, None).removeprefix("sqlite:///"))) as connection:
        connection.execute("DELETE FROM songs")
        connection.commit()
    wait_until(lambda: not replica.live.online.count)


def wait_for_three_reads(replica: Service, adder: Client) -> None:
    """Wait until a replica has read the store three times, each time a song that another replica added meanwhile."""
    for number in (101, 102, 103):
        add(adder, new_song(number))
        wait_until(lambda number=number: replica.live.catalog.find([f"new-{number}"])[0] >= 0)


def create_release_with(workspace: Workspace, folder: Path, *song_ids: str, activate: bool = True) -> Manifest:
    """Return a new release that contains these songs, by the artist `ARTIST`, and those of earlier calls."""
    path = folder / f"{song_ids[0]}.csv"
    path.write_text("song,title,artist\n" + "".join(f"{song_id},{song_id},Artist {ARTIST}\n" for song_id in song_ids))
    describe(workspace, DescribeConfig(append=True), str(path))
    add_songs(workspace)
    return releases.create_release(workspace, activate=activate)


def open_songs(replica: Service) -> list[str]:
    """Return the ids of the added songs that are in the store with their metadata."""
    store = replica.users.store(replica.live.catalog.lineage)
    return [song.song_id for song in store.songs_since(0)[1] if song.data]


def test_an_added_song_is_recommended_to_listeners_of_its_artist_and_nothing_else_changes(replica: Service) -> None:
    app = Client(replica)
    other_songs = recommended_songs(app, ["song-1", "song-8", "song-15"], k=20)
    assert app.post("/v1/songs", new_song(1)).json() == {
        "release": replica.live.id,
        "added": 1,
        "online": 1,
        "limit": online_songs.MAX_ONLINE_SONGS,
        "outcomes": ["added"],
    }
    assert "new-1" in recommended_songs(app, ARTIST_SONGS, k=MAX_SONGS_PER_ARTIST)
    assert recommended_songs(app, ["song-1", "song-8", "song-15"], k=20) == other_songs
    # All endpoints treat it like other songs: filters, search, new songs, similar songs and rankings.
    assert recommended_songs(app, ARTIST_SONGS, artists=[f"Artist {ARTIST}"], k=50).count("new-1") == 1
    assert "new-1" not in recommended_songs(app, ARTIST_SONGS, artists=["Artist 1"])
    assert recommended_songs(app, ARTIST_SONGS, allow=["new-1", "song-0"], k=2).count("new-1") == 1
    assert "new-1" not in recommended_songs(app, ARTIST_SONGS, exclude=["new-1"])
    assert app.get("/v1/songs", params={"query": "new 1"}).json()["songs"][0]["song_id"] == "new-1"
    assert app.get("/v1/songs/new").json()["songs"][0]["song_id"] == "new-1"
    assert len(app.get("/v1/songs/new-1/similar").json()["songs"]) == 20
    for history in (ARTIST_SONGS, []):
        ranking = app.post("/v1/rank", {"history": history, "songs": ["new-1", "song-2"]}).json()
        assert ranking["unknown_song_ids"] == []
    assert [(song["song_id"], song["score"]) for song in ranking["songs"]][1] == ("new-1", 0.0)  # it has no plays


def test_an_added_song_reaches_users_without_plays_as_the_least_popular_one(replica: Service) -> None:
    app = Client(replica)
    popular_before, newest_before = popular_songs(app), newest_songs(app)
    assert add(app, new_song(1), new_song(2, artist=5)) == ["added", "added"]
    body = {"user_id": "nobody", "allow": ["new-1", "song-0"]}
    answer = app.post("/v1/recommendations", body).json()
    assert [song["song_id"] for song in answer["songs"]] == ["song-0", "new-1"]
    assert (answer["source"], answer["songs"][1]["score"]) == ("popular", 0.0)
    assert popular_songs(app) == [*popular_before, "new-1", "new-2"]
    empty_store_of_songs(replica)
    assert popular_songs(app) == popular_before
    assert newest_songs(app) == newest_before
    answer = app.post("/v1/recommendations", {"user_id": "nobody", "k": NUM_SONGS}).json()
    assert sorted(song["song_id"] for song in answer["songs"]) == sorted(popular_before)


def test_a_song_that_gets_its_vector_online_has_its_place_by_plays(replica: Service) -> None:
    app, song_id = Client(replica), f"song-{WITHOUT_VECTOR}"
    assert song_id not in popular_songs(app)
    assert add(app, {"song_id": song_id, "artist": "Artist 0"}) == ["added"]
    songs = app.get("/v1/songs/popular", params={"k": NUM_SONGS}).json()["songs"]
    counts = {song["song_id"]: song["plays"] for song in songs}
    assert counts[song_id] > 0
    assert list(counts.values()) == sorted(counts.values(), reverse=True)


def test_a_song_that_only_the_retrieval_knows_has_no_place_on_the_map_until_it_is_added(world: Workspace) -> None:
    later_song, later_plays = f"song-{NUM_SONGS}", Histories.from_lists([[ARTIST, NUM_SONGS]], [[BEGIN, AT]], ["later"])
    dataset = write_dataset(world, concatenate([*Dataset(world).read_all(), later_plays]), NUM_SONGS + 1)
    counts = [RetrievalCounts.fit(part, num_songs=NUM_SONGS + 1) for part in dataset.read_all()]
    retrieval = artifacts.load_manifest(world, "retrieval", "retrieval1")
    names = Retrieval.build(
        RetrievalCounts.merge(counts).strongest(), artist_of_song=dataset.catalog().codes("artist")
    ).save(world, retrieval.folder)
    artifacts.publish(world, retrieval, names)
    releases.create_release(world)
    with service(world) as replica:
        app = Client(replica)
        assert later_song in recommended_songs(app, ARTIST_SONGS, diversity=0.5)
        assert app.get(f"/v1/songs/{later_song}/similar").json()["songs"] == []
        song_map = app.post("/v1/map", {"songs": [later_song, "song-1"]}).json()
        assert ([point["song_id"] for point in song_map["points"]], song_map["unknown_songs"]) == (["song-1"], 1)
        assert add(app, {"song_id": later_song, "artist": f"Artist {ARTIST}"}) == ["added"]
        assert len(app.get(f"/v1/songs/{later_song}/similar").json()["songs"]) == 20


def test_every_replica_takes_it_in_within_a_second_and_a_restarted_one_has_it(world: Workspace) -> None:
    assert online_songs.REFRESH_SECONDS <= 0.5  # the other half of the second is for reading and placing songs
    with service(world) as first, service(world) as second:
        add(Client(first), new_song(1), new_song(2, artist=5))
        wait_until(lambda: "new-1" in recommended_songs(Client(second), ARTIST_SONGS, k=MAX_SONGS_PER_ARTIST))
        np.testing.assert_array_equal(vector(second, "new-2"), vector(first, "new-2"))
    with service(world) as third:
        assert "new-1" in recommended_songs(Client(third), ARTIST_SONGS, k=MAX_SONGS_PER_ARTIST)
        assert add(Client(third), new_song(1)) == ["known"]


@needs_redis
def test_replicas_share_added_songs_through_redis(world: Workspace, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        with service(world, store=server.uri) as first, service(world, store=server.uri) as second:
            app = Client(first)
            add(app, new_song(1))
            plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "song-2"])]
            assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == 3
            wait_until(lambda: np.array_equal(vector(second, "new-1"), vector(first, "new-1")))
            server.kill()
            server.start()
        with service(world, store=server.uri) as third:
            assert [
                stored_play["song_id"] for stored_play in Client(third).get("/v1/users/ann/plays").json()["plays"]
            ] == [
                "song-1",
                "new-1",
                "song-2",
            ]
    finally:
        server.kill()


def test_songs_that_are_known_stay_as_they_are_and_one_without_a_vector_gets_one(replica: Service) -> None:
    app = Client(replica)
    song_without_vector = {"song_id": f"song-{WITHOUT_VECTOR}", "artist": "Artist 2"}
    assert add(app, song_without_vector) == ["added"]
    assert app.get("/v1/songs", params={"query": f"title {WITHOUT_VECTOR}"}).json()["count"] > 0
    assert recommended_songs(app, ARTIST_SONGS, artists=["Artist 5"], k=3)
    assert add(app, new_song(1), {"song_id": "song-5"}, new_song(1), song_without_vector) == [
        "added",
        "known",
        "known",
        "known",
    ]
    assert add(app, {**new_song(1), "artist": "Artist 6"}, song_without_vector) == ["known", "known"]
    assert f"song-{WITHOUT_VECTOR}" in recommended_songs(app, ["song-2", "song-9"])


def test_songs_that_the_store_has_lost_are_gone_and_can_be_added_again(replica: Service) -> None:
    app = Client(replica)
    song_without_vector = {"song_id": f"song-{WITHOUT_VECTOR}", "artist": "Artist 2"}
    before = recommended_songs(app, ARTIST_SONGS)
    add(app, new_song(1), new_song(2), song_without_vector)
    (lost_row,) = replica.live.catalog.find(["new-1"])
    empty_store_of_songs(replica)
    assert recommended_songs(app, ARTIST_SONGS) == before
    with pytest.raises(StoreUnavailableError, match="try again"):  # a request that was in progress meanwhile
        replica.live.catalog.describe(np.array([lost_row]))
    assert app.get("/v1/songs", params={"query": "new"}).json()["count"] == 0
    newest_ids = {song["song_id"] for song in app.get("/v1/songs/new", params={"k": NUM_SONGS}).json()["songs"]}
    assert not newest_ids & {"new-1", "new-2", song_without_vector["song_id"]}
    assert app.post("/v1/plays", play("ann", "new-1", AT)).json()["unknown_songs"] == 1
    assert add(app, {"song_id": "other", "artist": "Artist 5"}, new_song(1)) == ["added", "added"]
    assert "new-1" in recommended_songs(app, ARTIST_SONGS, k=MAX_SONGS_PER_ARTIST)
    assert app.get("/v1/songs", params={"query": "new"}).json()["songs"][0]["song_id"] == "new-1"
    assert app.post("/v1/plays", play("ann", "new-1", AT)).json()["taken"] == 1
    assert [each["song_id"] for each in app.get("/v1/users/ann/plays").json()["plays"]] == ["new-1"]


def test_plays_of_a_song_that_the_store_has_lost_are_not_those_of_a_later_song(replica: Service) -> None:
    app = Client(replica)
    add(app, new_song(1))
    plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "song-2"])]
    assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == 3
    empty_store_of_songs(replica)
    assert add(app, new_song(2)) == ["added"]
    played_ids = [each["song_id"] for each in app.get("/v1/users/ann/plays").json()["plays"]]
    assert played_ids == ["song-1", "song-2"]


@pytest.mark.parametrize("known_by", ["earlier release", "plays"])
def test_plays_of_a_lost_song_are_not_those_of_a_song_that_is_added_to_another_release(
    world: Workspace, known_by: str
) -> None:
    """The process read the lost song with an earlier release, or knows of it from stored plays alone."""
    plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "song-2"])]
    with service(world, watch_seconds=0.05) as first:
        app = Client(first)
        add(app, new_song(1))
        assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == 3
        empty_store_of_songs(first)
        if known_by == "earlier release":
            release = write_release(world, "2", seed=1)
            wait_until(lambda: first.live.id == release.id)
            require_no_plays_of(first, new_song(2))
    if known_by == "plays":
        with service(world) as second:
            Client(second).get("/v1/users/ann/plays")
            require_no_plays_of(second, new_song(2))


def require_no_plays_of(replica: Service, song: dict[str, Any]) -> None:
    """Add a song; fail unless ann's stored plays stay those of `song-1` and `song-2`."""
    assert add(Client(replica), song) == ["added"]
    stored_plays = Client(replica).get("/v1/users/ann/plays").json()["plays"]
    assert [stored_play["song_id"] for stored_play in stored_plays] == ["song-1", "song-2"]


def test_a_replica_keeps_no_content_vectors_of_added_songs_and_places_the_songs_by_them(
    world: Workspace, tmp_path: Path
) -> None:
    content = np.random.default_rng(0).normal(size=(NUM_SONGS, 3)).astype(np.float32)
    table = pa.table({"song_id": [f"song-{row}" for row in range(NUM_SONGS)], "vector": list(content)})
    pq.write_table(table, tmp_path / "content.parquet")
    describe(world, DescribeConfig(vectors=str(tmp_path / "content.parquet")))
    with service(world) as replica:
        app = Client(replica)
        sent_songs = [{"song_id": f"new-{number}", "vector": content[number].tolist()} for number in range(5)]
        assert add(app, *sent_songs) == ["added"] * 5
        vectors_before = [vector(replica, song["song_id"]) for song in sent_songs]
        assert len(np.unique(vectors_before, axis=0)) == 5
        assert app.post("/v1/plays", play("ann", "new-0", AT)).json()["taken"] == 1
        add(app, new_song(9))
        np.testing.assert_array_equal([vector(replica, song["song_id"]) for song in sent_songs], vectors_before)
        gc.collect()
        kept_songs = [each for each in gc.get_objects() if type(each) is online_songs.SongToAdd]
        assert {song.song_id for song in kept_songs} >= {song["song_id"] for song in sent_songs}
        assert [song.song_id for song in kept_songs if song.vector is not None] == []


def test_of_two_entries_of_a_song_in_one_request_the_first_is_stored(replica: Service) -> None:
    app = Client(replica)
    assert add(app, new_song(1), {**new_song(1), "title": "Later"}) == ["added", "known"]
    assert app.get("/v1/songs", params={"query": "new 1"}).json()["songs"] == [
        {"song_id": "new-1", "title": "New 1", "artist": f"Artist {ARTIST}"}
    ]


def test_names_and_markets_are_spelled_as_in_imports(replica: Service) -> None:
    app = Client(replica)
    blank_names = {"title": " ", "artist": f" Artist {ARTIST} ", "album": "", "markets": ["DE ", " ", "", "840.0"]}
    assert add(app, {"song_id": "blank", **blank_names}, {"song_id": "clean", "artist": f"Artist {ARTIST}"}) == [
        "added",
        "added",
    ]
    assert app.get("/v1/songs", params={"query": "blank"}).json()["songs"] == [
        {"song_id": "blank", "title": None, "artist": f"Artist {ARTIST}"}
    ]
    for market in ("DE", "840"):
        assert recommended_songs(app, ARTIST_SONGS, market=market) == ["blank"]
    np.testing.assert_array_equal(vector(replica, "blank"), vector(replica, "clean"))
    assert app.post("/v1/recommendations", {"history": ARTIST_SONGS, "market": " "}).status_code == 422  # no song's


def test_songs_beyond_the_limit_are_refused_all_together(replica: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_songs, "MAX_ONLINE_SONGS", 2)
    app = Client(replica)
    add(app, new_song(1))
    response = app.post("/v1/songs", {"songs": [new_song(2), new_song(3)]})
    assert (response.status_code, response.json()["title"]) == (507, "Insufficient Storage")
    assert add(app, new_song(1), new_song(2)) == ["known", "added"]


def test_songs_are_added_with_a_key_to_write(world: Workspace) -> None:
    keys = load_keys(ServeConfig(), {"RAYREC_API_KEYS": "read:read-key-read-key,write:write-key-write-key"})
    assert isinstance(keys, Keys)
    with service(world, keys=keys) as replica:
        assert Client(replica, key="read-key-read-key").post("/v1/songs", new_song(1)).status_code == 403
        assert Client(replica, key="write-key-write-key").post("/v1/songs", new_song(1)).status_code == 200


@pytest.mark.parametrize(
    ("song", "where"),
    [
        ({"vector": [1.0, 2.0]}, "vector"),
        ({"vector": [1.0, 1e300]}, "vector.1"),
        ({"vector": [-1e39]}, "vector.0"),
        ({"released": "2026-02-30"}, "released"),
        ({"song_id": " "}, "song_id"),
        ({"year": 2026}, "year"),
    ],
)
def test_a_field_that_is_wrong_is_named(replica: Service, song: dict[str, Any], where: str) -> None:
    """The song is sent alone and in a list; the error names the field's place in the sent body."""
    single_song, song_list = new_song(1) | song, {"songs": [new_song(2), new_song(1) | song]}
    for body, name in ((single_song, where), (song_list, f"songs.1.{where}")):
        response = Client(replica).post("/v1/songs", body)
        assert response.status_code == 422
        assert response.json()["errors"][0]["where"] == name


def test_vectors_equal_those_of_the_nightly_job_over_the_same_metadata_and_plays(
    world: Workspace, replica: Service, tmp_path: Path
) -> None:
    app, model = Client(replica), artifacts.load_manifest(world, "models", replica.live.model_id)
    random = np.random.default_rng(0)
    add(app, *(new_song(number, artist) for number, artist in enumerate((ARTIST, 5, None))))
    users = {
        f"listener-{user}": [
            f"new-{song - NUM_SONGS}" if song >= NUM_SONGS else f"song-{song}"
            for song in random.integers(NUM_SONGS - 12, NUM_SONGS + 3, size=30).tolist()
        ]
        for user in range(3)
    }
    vector_before = vector(replica, "new-0")
    for start in (0, 12, 24):  # the plays arrive in three batches, each in reverse order
        for user, songs in users.items():
            positions = list(range(start, min(start + 12, len(songs))))[::-1]
            plays = [play(user, songs[position], AT + 60_000 * position) for position in positions]
            assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == len(positions)
    path = tmp_path / "new.csv"
    path.write_text(f"song,title,artist\nnew-0,New 0,Artist {ARTIST}\nnew-1,New 1,Artist 5\nnew-2,New 2,\n")
    describe(world, DescribeConfig(append=True), str(path))
    added_manifest = add_songs(world)
    dataset = Dataset(world)
    histories = Histories.from_lists(
        [dataset.catalog().rows(songs).tolist() for songs in users.values()],
        [[AT + 60_000 * position for position in range(30)]] * 3,
    )
    nightly = added_to(dataset, model.folder, plays=[histories], earlier=AddedSongs.load(world, added_manifest.folder))
    position = {int(row): position for position, row in enumerate(nightly.rows)}
    assert nightly.played == 3
    for number in range(3):
        expected = nightly.outputs[position[NUM_SONGS + number]]
        wait_until(
            lambda number=number, expected=expected: np.allclose(
                vector(replica, f"new-{number}"), expected, atol=TOLERANCE
            )
        )
    assert np.abs(vector(replica, "new-0") - vector_before).max() > 100 * TOLERANCE


def test_a_new_release_with_the_added_song_replaces_it_and_its_plays_stay(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_songs, "CLOSE_SECONDS", 0.0)
    with service(world, watch_seconds=0.05) as replica:
        app = Client(replica)
        add(app, new_song(1), new_song(2))
        plays = [
            play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "new-2", "song-2"])
        ]
        assert app.post("/v1/plays", {"plays": plays}).json()["taken"] == 4
        # The next release numbers the new songs in another order than the online additions.
        release = create_release_with(world, tmp_path, "other", "new-1")
        wait_until(lambda: replica.live.id == release.id)
        played_ids = [stored_play["song_id"] for stored_play in app.get("/v1/users/ann/plays").json()["plays"]]
        assert played_ids == ["song-1", "new-1", "new-2", "song-2"]
        assert replica.live.catalog.find(["new-1"])[0] == NUM_SONGS + 1
        song_ids = recommended_songs(app, ARTIST_SONGS)
        assert song_ids.count("new-1") == song_ids.count("new-2") == 1
        recommendations = app.post("/v1/recommendations", {"user_id": "ann", "k": NUM_SONGS}).json()["songs"]
        assert not {"new-1", "new-2"} & {song["song_id"] for song in recommendations}
        assert add(app, new_song(1), new_song(3)) == ["known", "added"]
        assert open_songs(replica) == ["new-1", "new-2", "new-3"]
        create_release_with(world, tmp_path, "new-2")  # a rollback from it leads to a release that has new-1 only
        wait_until(lambda: open_songs(replica) == ["new-2", "new-3"])


def test_a_song_that_only_the_release_of_an_arm_contains_stays_in_the_live_one(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_songs, "CLOSE_SECONDS", 0.0)
    with service(world) as first:
        add(Client(first), new_song(1))
        release = create_release_with(world, tmp_path, "new-1", activate=False)
        experiment = {"name": "x", "arms": {"other": {"share": 0.5, "release": release.id}}}
        with service(world, experiment=experiment) as second:
            wait_for_three_reads(second, Client(first))
    with service(world) as third:
        assert "new-1" in recommended_songs(Client(third), ARTIST_SONGS)
        assert add(Client(third), new_song(1)) == ["known"]


def test_a_replica_finds_songs_of_others_and_ends_while_an_earlier_model_is_read_to_close_songs(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_array, is_reading, may_end, has_read = Workspace.read_array, *(threading.Event() for _ in range(3))
    earlier_vectors = artifacts.load_manifest(world, "models", "model1").path(SONG_VECTORS)

    def slow_read(self: Workspace, path: str, sha256: str | None = None) -> np.ndarray:
        if path == earlier_vectors:
            is_reading.set()
            may_end.wait(60)
            has_read.set()
        return read_array(self, path, sha256)

    monkeypatch.setattr(online_songs, "CLOSE_SECONDS", 0.0)
    with service(world, watch_seconds=3600) as other:
        try:
            with service(world, watch_seconds=0.05, log_impressions=True) as replica:
                add(Client(other), new_song(1))
                write_release(world, "2", seed=1, activate=False)
                monkeypatch.setattr(Workspace, "read_array", slow_read)
                create_release_with(world, tmp_path, "new-1")
                assert is_reading.wait(60)
                add(Client(other), new_song(2))
                wait_until(lambda: replica.live.catalog.find(["new-2"])[0] >= 0)
                recommended_songs(Client(replica), ARTIST_SONGS)
            assert not has_read.is_set()
            assert sum(table.num_rows for table in read_impressions(world, "answers")) == 1
        finally:
            may_end.set()


def test_a_rollback_to_a_release_without_an_added_song_brings_the_added_one_back(
    world: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_songs, "CLOSE_SECONDS", 0.0)
    with service(world, watch_seconds=0.05) as replica, service(world, watch_seconds=3600) as other:
        first_release = replica.live.id
        add(Client(replica), new_song(1))
        release = create_release_with(world, tmp_path, "new-1")
        wait_until(lambda: replica.live.id == release.id)
        wait_for_three_reads(replica, Client(other))
        releases.rollback(world)
        wait_until(lambda: replica.live.id == first_release)
        assert "new-1" in recommended_songs(Client(replica), ARTIST_SONGS)


def test_plays_stay_where_releases_have_all_songs_that_were_added(world: Workspace, tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_text("song,title,artist\nother,Other,Artist 1\nnew-1,New 1,Artist 3\n")
    with service(world) as replica:
        add(Client(replica), new_song(1))
        plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "song-2"])]
        assert Client(replica).post("/v1/plays", {"plays": plays}).json()["taken"] == 3
    describe(world, DescribeConfig(append=True), str(path))
    add_songs(world)
    releases.create_release(world, activate=True)
    with service(world) as replica:
        stored_plays = Client(replica).get("/v1/users/ann/plays").json()["plays"]
        assert [stored_play["song_id"] for stored_play in stored_plays] == ["song-1", "new-1", "song-2"]


def test_a_play_that_the_store_cannot_count_for_its_song_is_taken_all_the_same(
    world: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing_count(self: Any, model: str, sums: Any) -> None:
        raise StoreUnavailableError("the store does not answer")

    monkeypatch.setattr(SqliteStore, "count_song_plays", failing_count)
    with service(world, log_impressions=True) as replica:
        add(Client(replica), new_song(1))
        plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "new-1", "song-2"])]
        response = Client(replica).post("/v1/plays", {"plays": plays})
        assert (response.status_code, response.json()["taken"]) == (200, 3)
    assert "plays of songs that were added online are not counted: the store does not answer" in caplog.text
    logged_ids = [row["song_id"] for table in read_impressions(world, "events") for row in table.to_pylist()]
    assert logged_ids == ["song-1", "new-1", "song-2"]


@pytest.mark.parametrize("online", [False, True])
def test_an_older_release_leaves_out_plays_of_songs_that_a_newer_one_has_and_loses_none(
    world: Workspace, tmp_path: Path, online: bool
) -> None:
    """In the older release, the row of the newer release's song belongs to no song, or to a song added online."""
    path = tmp_path / "new.csv"
    path.write_text("song,title,artist\nother,Other,Artist 1\n")
    with service(world, watch_seconds=3600) as older:
        if online:
            add(Client(older), new_song(1))
        describe(world, DescribeConfig(append=True), str(path))
        add_songs(world)
        releases.create_release(world, activate=True)
        with service(world) as newer:
            assert newer.live.catalog.find(["other"]).tolist() == [NUM_SONGS]
            plays = [play("ann", song, AT + position) for position, song in enumerate(["song-1", "other", "song-2"])]
            plays.append({**play("ann", "other", AT + 3), "type": "like"})
            assert Client(newer).post("/v1/plays", {"plays": plays}).json()["taken"] == 4
            app, vector_before = Client(older), vector(older, "new-1") if online else None

            def stored_song_ids(app: Client) -> list[str]:
                return [stored_play["song_id"] for stored_play in app.get("/v1/users/ann/plays").json()["plays"]]

            assert stored_song_ids(app) == ["song-1", "song-2"]
            answer = app.post("/v1/recommendations", {"user_id": "ann", "k": NUM_SONGS + 1, "explain": True}).json()
            assert [song["song_id"] for song in answer["last_plays"]] == ["song-1", "song-2"]
            assert ("new-1" in [song["song_id"] for song in answer["songs"]]) == online  # the user has not heard it
            assert app.post("/v1/plays", play("ann", "song-3", AT + 4)).json()["taken"] == 1
            assert stored_song_ids(app) == ["song-1", "song-2", "song-3"]
            assert stored_song_ids(Client(newer)) == ["song-1", "other", "song-2", "song-3"]
            if online:  # the added song has no plays
                store = older.users.store(older.live.catalog.lineage)
                assert [song.sums for song in store.songs_since(0)[1]] == [b""]
                np.testing.assert_array_equal(vector(older, "new-1"), vector_before)


def test_an_added_song_is_explored_with_its_probability_and_the_same_request_shows_it_again(replica: Service) -> None:
    app = Client(replica)
    add(app, *(new_song(number) for number in range(30)))
    body = {"history": ["song-1", "song-8"], "at": AT, "k": 10, "explore": 0.3}
    answer = app.post("/v1/recommendations", body).json()
    explored_songs = [song for song in answer["songs"] if song["explored"]]
    assert len(explored_songs) == 3
    assert all(0 < song["probability"] <= 1 for song in explored_songs)
    assert all(song["probability"] is None for song in answer["songs"] if not song["explored"])
    assert answer["cursor"] is None
    assert app.post("/v1/recommendations", body).json()["songs"] == answer["songs"]
    explored_ids = set()
    for offset in range(40):
        songs = app.post("/v1/recommendations", {**body, "at": AT + offset}).json()["songs"]
        explored_ids |= {song["song_id"] for song in songs if song["explored"]}
    assert any(song.startswith("new-") for song in explored_ids)
    unexplored_songs = app.post("/v1/recommendations", {**body, "explore": 0.0}).json()["songs"]
    assert {(song["explored"], song["probability"]) for song in unexplored_songs} == {(None, None)}
    plays = [play("ann", "song-1", AT)]
    app.post("/v1/plays", {"plays": plays})
    query = {"k": 10, "at": AT + 1, "explore": 0.2}
    assert (
        sum(bool(song["explored"]) for song in app.get("/v1/users/ann/recommendations", params=query).json()["songs"])
        == 2
    )
