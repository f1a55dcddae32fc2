"""Loading the batch job's states into the store: every user once, with the plays that arrived online since."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from networks import jumping_histories, model_config, network, trained_network
from served import AT, BEGIN, NUM_SONGS, Client, service, write_release, write_world
from stores import needs_redis
from worlds import with_opinions, write_dataset, write_song_vectors

from rayrec.bench.redis_servers import RedisServer
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.data.windows import NEVER
from rayrec.errors import DamagedArtifactError, InputError, MismatchError
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import States, read_states, taste_table, tastes_file
from rayrec.online.load_states import PIECE_PLAYS, load_states
from rayrec.online.state_codec import pack_heard, pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.state_store import NO_VERSION, Change, Piece, StateStore, open_store, open_user_store, store_uri
from rayrec.online.user_state import FIRST_ONLINE, Plays, UserState, fold_heard
from rayrec.recommend.answer import load_recommender
from rayrec.recommend.base import LATEST_PLAYS
from rayrec.recommend.reranking import AnswerOptions
from rayrec.serving.engine import Parts
from rayrec.serving.telemetry import Metrics
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import STATES_FILE, Workspace
from rayrec_cli.main import main

BUCKETS = 4


@pytest.fixture
def world(workspace: Workspace) -> Workspace:
    write_world(workspace)
    write_release(workspace)
    return workspace


@pytest.fixture
def store(world: Workspace, uri: str) -> Iterator[StateStore]:
    opened_store = open_store(uri, Dataset(world).lineage)
    yield opened_store
    opened_store.close()


def live_release(workspace: Workspace) -> Manifest:
    release = releases.active_release(workspace)
    assert release is not None
    return release


def read_histories(workspace: Workspace) -> Iterator[Histories]:
    for batch in Dataset(workspace).read_all():
        for row in range(len(batch)):
            yield batch.take(np.array([row]))


def play(user: str, played_at: int, song: int = 3) -> dict[str, Any]:
    return {"event_id": f"{user}-{played_at}", "user_id": user, "song_id": f"song-{song}", "played_at": played_at}


def answer(app: Client, user: str, at: int, k: int = 8) -> list[str]:
    request = {"user_id": user, "at": at, "k": k, "exclude_heard": False}
    return [song["song_id"] for song in app.post("/v1/recommendations", request).json()["songs"]]


def read_user(store: StateStore, user: str) -> tuple[UserState, Plays]:
    """Return the state and the log of a user."""
    (full_user,) = store.read([user])
    assert full_user is not None
    return unpack_state(full_user.stored.state), unpack_plays(full_user.log)


def test_every_user_is_loaded_with_state_and_plays(world: Workspace, store: StateStore, uri: str) -> None:
    loaded = load_states(Dataset(world), store, live_release(world))
    histories = list(read_histories(world))
    assert (loaded.added, loaded.renewed, loaded.unchanged) == (len(histories), 0, 0)
    assert loaded.users == len(histories)
    for history in histories:
        state, plays = read_user(store, history.user_ids[0])
        np.testing.assert_array_equal(plays.songs, history.songs)
        np.testing.assert_array_equal(plays.played_at, history.played_at)
        assert state.current("model1") is not None
        assert (state.plays, state.last_played_at) == (history.num_plays, history.played_at[-1])
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model1"))
    with service(world, store=uri) as replica:
        app = Client(replica)
        for history in histories[:5]:
            expected, _ = recommender.recommend_one(history, AT, 8)
            assert answer(app, history.user_ids[0], AT) == [f"song-{song}" for song in expected]


@pytest.mark.parametrize("ranked", [False, True])
def test_stored_users_get_the_20_songs_of_their_whole_histories_in_order_in_99_of_100_cases(
    workspace: Workspace, uri: str, ranked: bool
) -> None:
    """The network is trained. With states stored in half precision, it would be 96 of 100 cases."""
    histories = jumping_histories(400, NUM_SONGS)
    dataset = write_dataset(workspace, histories, NUM_SONGS)
    write_song_vectors(workspace, np.ones((NUM_SONGS, 8), np.float32), {"dataset": "by-hand"})
    release = write_release(workspace, model=trained_network(histories, NUM_SONGS), ranked=ranked)
    store = open_store(uri, dataset.lineage)
    load_states(dataset, store, release)
    recommender = load_recommender(workspace, dataset, releases.default_parts(workspace, "model1"))
    users = concatenate(list(dataset.read_all()))
    stored_states = [
        unpack_state(full.stored.state) for full in store.read(users.user_ids.tolist()) if full is not None
    ]
    network_states = [state.states("model1") for state in stored_states]
    states = States(
        hidden=np.concatenate([user_states.hidden for user_states in network_states]),
        last_played_at=np.concatenate([user_states.last_played_at for user_states in network_states]),
    )
    at = int(users.played_at.max()) + 60_000
    full, _ = recommender.recommend(users, at, 20)
    answers = Parts(recommender, Metrics("test")).answer(
        users, np.full(len(users), at), [AnswerOptions(k=20)] * len(users), states
    )
    from_stored = np.array([answer.songs for answer in answers])
    next_songs = (users.songs[users.offsets[1:] - 1] + 1) % NUM_SONGS
    assert (full == next_songs[:, None]).any(axis=1).mean() > 0.8  # the network has learned something
    assert (full == from_stored).all(axis=1).mean() >= 0.99
    store.close()


def test_a_user_with_more_plays_than_are_read_gets_the_songs_of_the_whole_history(
    workspace: Workspace, uri: str
) -> None:
    num_songs = 20_000  # so many that users still have new songs, from which a ranker learns
    histories = jumping_histories(16, num_songs, shortest=LATEST_PLAYS + 500, longest=LATEST_PLAYS + 3_000)
    histories = replace(histories, played_at=histories.played_at + BEGIN)
    dataset = write_dataset(workspace, histories, num_songs)
    write_song_vectors(workspace, np.ones((num_songs, 8), np.float32), {"dataset": "by-hand"})
    release = write_release(workspace)
    store = open_store(uri, dataset.lineage)
    load_states(dataset, store, release)
    store.close()
    recommender = load_recommender(workspace, dataset, releases.default_parts(workspace, "model1"))
    at = int(histories.played_at.max()) + 60_000
    with service(workspace, store=uri) as replica:
        for history in read_histories(workspace):
            songs, _ = recommender.recommend_one(history, at, 8)
            assert answer(Client(replica), history.user_ids[0], at) == [f"song-{song}" for song in songs]


def plays_of(histories: Histories, row: int) -> Plays:
    play_range = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
    skipped = None if histories.skipped is None else histories.skipped[play_range]
    return Plays.of(histories.songs[play_range], histories.played_at[play_range], skipped=skipped)


@pytest.mark.parametrize("processes", [1, 2])
def test_all_users_are_stored_as_the_same_bytes_as_each_packed_alone(
    workspace: Workspace, uri: str, processes: int
) -> None:
    """Users without plays, with likes and skips, with several pieces of log, with more plays than an answer reads."""
    random, lengths = np.random.default_rng(0), [*range(0, 40, 3), 1_500, LATEST_PLAYS + 500]
    histories = Histories.from_lists(
        [random.integers(NUM_SONGS, size=length) for length in lengths],  # type: ignore[misc]
        [BEGIN + np.cumsum(random.integers(1, 10**6, size=length)) for length in lengths],  # type: ignore[misc]
        [f"user-{length}" for length in lengths],
    )
    write_dataset(workspace, with_opinions(histories, NUM_SONGS), NUM_SONGS, buckets=3)
    write_song_vectors(workspace, np.ones((NUM_SONGS, 8), np.float32), {"dataset": "by-hand"})
    release = write_release(workspace, ranked=False)
    dataset, store = Dataset(workspace), open_store(uri, "by-hand")
    assert load_states(dataset, store, release, processes=processes).added == len(lengths)
    for bucket in range(3):
        table = workspace.read_table(tastes_file("tastes/tastes1", bucket))
        (batch,) = dataset.read_bucket(bucket)
        states = read_states(table, layers=3)
        for row, (user, full_user) in enumerate(zip(batch.user_ids, store.read(batch.user_ids.tolist()), strict=True)):
            plays, pieces, packed_heard = plays_of(batch, row), list[bytes](), None
            state = UserState.start("model1", states, row, plays=len(plays))
            assert batch.likes is not None
            state = replace(state, likes=plays_of(batch.likes, row))
            if len(plays) > LATEST_PLAYS:
                state, songs = fold_heard(state, plays.songs, np.zeros(0, np.int32))
                packed_heard = pack_heard(songs)
            for start in range(0, len(plays), PIECE_PLAYS):
                pieces.append(pack_plays(plays.take(slice(start, start + PIECE_PLAYS))))
            assert full_user is not None
            assert (full_user.stored.state, full_user.log, full_user.heard) == (
                pack_state(state),
                pieces,
                packed_heard,
            ), user
    store.close()


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_processes_stop_at_a_damaged_bucket_and_finished_buckets_are_not_loaded_again(
    world: Workspace, store: StateStore
) -> None:
    path = tastes_file("tastes/tastes1", 3)
    data = world.read_bytes(path)
    world.write_bytes(path, data + b" ")
    with pytest.raises(DamagedArtifactError, match=rf"{path} does not match the checksum"):
        load_states(Dataset(world), store, live_release(world), processes=2)
    loaded_buckets = store.loaded("tastes1")
    assert 3 not in loaded_buckets
    world.write_bytes(path, data)
    loaded = load_states(Dataset(world), store, live_release(world))
    assert loaded.users == len(list(read_histories(world)))
    assert {bucket: store.loaded("tastes1")[bucket] for bucket in loaded_buckets} == loaded_buckets


def test_a_load_that_was_stopped_goes_on_with_the_buckets_left(
    world: Workspace, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = len(list(read_histories(world)))
    original_put, calls = type(store).put, []

    def failing_put(self: StateStore, changes: list[Change], *, loading: bool) -> list[bool]:
        calls.append(len(changes))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original_put(self, changes, loading=loading)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", failing_put)
        with pytest.raises(KeyboardInterrupt):
            load_states(Dataset(world), store, live_release(world))
    assert sum(calls[:2]) < users
    with monkeypatch.context() as patch:
        calls.clear()
        patch.setattr(
            type(store),
            "put",
            lambda self, changes, **options: calls.append(len(changes)) or original_put(self, changes, **options),
        )
        loaded = load_states(Dataset(world), store, live_release(world))
    assert len(calls) == BUCKETS - 2
    assert (loaded.buckets, loaded.added) == (BUCKETS, users)
    assert load_states(Dataset(world), store, live_release(world)) == loaded
    reloaded = load_states(Dataset(world), store, live_release(world), repeat=True)
    assert (reloaded.added, reloaded.unchanged) == (0, users)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_caller_stops_a_load_after_a_bucket_which_then_counts_as_loaded(
    world: Workspace, store: StateStore, processes: int
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_states(Dataset(world), store, live_release(world), processes=processes, after_bucket=stop)
    assert len(store.loaded("tastes1")) == 1
    load_states(Dataset(world), store, live_release(world))
    assert store.loaded("tastes1").keys() == set(range(BUCKETS))


def test_plays_newer_than_the_batch_stay_and_states_go_on_from_it(
    world: Workspace, store: StateStore, uri: str
) -> None:
    """A user of the batch and a new user play songs online; then the states of another release are loaded."""
    loaded_users = load_states(Dataset(world), store, live_release(world)).users
    histories = [history for history in read_histories(world) if history.num_plays > 3][:2]
    (ann, bob), at = (history.user_ids[0] for history in histories), AT + 10**6
    events = [play(ann, AT + turn, song=turn % NUM_SONGS) for turn in range(150)] + [play("new", AT)]
    with service(world, store=uri) as replica:
        assert Client(replica).post("/v1/plays", {"plays": events}).json()["taken"] == 151
        reloaded = load_states(Dataset(world), store, live_release(world), repeat=True)
        assert (reloaded.renewed, reloaded.unchanged) == (1, loaded_users - 1)  # ann's log goes beyond the batch
        songs_before = answer(Client(replica), ann, at)
    second_release = write_release(world, "2", seed=5, activate=False)
    loaded = load_states(Dataset(world), store, second_release)
    assert (loaded.added, loaded.renewed, loaded.merged, loaded.kept_plays) == (0, loaded_users, 1, 150)
    full_history = Histories.from_lists(
        [[*histories[0].songs, *[turn % NUM_SONGS for turn in range(150)]]],
        [[*histories[0].played_at, *[AT + turn for turn in range(150)]]],
    )
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model2"))
    state, log = read_user(store, ann)
    assert list(state.models) == ["model1", "model2"]
    np.testing.assert_array_equal(log.songs, full_history.songs[: len(log)])
    with service(world, store=uri) as replica:  # the first release is still live
        assert answer(Client(replica), ann, at) == songs_before
    releases.activate_release(world, second_release.id)
    with service(world, store=uri) as replica:
        app = Client(replica)
        for user, history in ((ann, full_history), (bob, histories[1])):
            expected, _ = recommender.recommend_one(history, at, 8)
            assert answer(app, user, at) == [f"song-{song}" for song in expected]
        assert answer(app, ann, at) != songs_before
        response = app.post("/v1/plays", {"plays": [events[149], events[100]]}).json()
        assert response["outcomes"] == ["repeated", "repeated"]


def test_a_play_that_comes_during_the_merge_is_not_lost(
    world: Workspace, store: StateStore, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_states(Dataset(world), store, live_release(world))
    user = next(read_histories(world)).user_ids[0]
    second_release = write_release(world, "2", seed=5, activate=False)
    original_read, sent_users = type(store).read, []
    with service(world, store=uri) as replica:
        app = Client(replica)

        def read_then_play(self: StateStore, user_ids: list[str], **options: Any) -> Any:
            full_users = original_read(self, user_ids, **options)
            if user in user_ids and not sent_users:
                sent_users.append(user)
                assert app.post("/v1/plays", play(user, AT)).json()["taken"] == 1
            return full_users

        monkeypatch.setattr(type(store), "read", read_then_play)
        loaded = load_states(Dataset(world), store, second_release)
    assert (loaded.merged, loaded.kept_plays) == (1, 1)
    assert read_user(store, user)[0].last_played_at == AT


def test_states_of_two_releases_stand_side_by_side(world: Workspace, store: StateStore, uri: str) -> None:
    """Plays arrive after the states of a second release were loaded: both releases answer as the batch job would."""
    load_states(Dataset(world), store, live_release(world))
    history = next(user_history for user_history in read_histories(world) if user_history.num_plays > 3)
    user, at = history.user_ids[0], AT + 10**6
    second_release = write_release(world, "2", seed=5, activate=False)
    load_states(Dataset(world), store, second_release)
    events = [play(user, AT + turn, song=turn % NUM_SONGS) for turn in range(150)]
    full_history = Histories.from_lists(
        [[*history.songs, *[turn % NUM_SONGS for turn in range(150)]]],
        [[*history.played_at, *[AT + turn for turn in range(150)]]],
    )
    for turn, number in enumerate(("1", "2", "1")):
        if turn:
            releases.activate_release(
                world, second_release.id if number == "2" else releases.read_active(world)["history"][0]
            )
        recommender = load_recommender(world, Dataset(world), releases.default_parts(world, f"model{number}"))
        with service(world, store=uri) as replica:
            if not turn:
                assert Client(replica).post("/v1/plays", {"plays": events}).json()["taken"] == 150
            songs, _ = recommender.recommend_one(full_history, at, 8)
            assert answer(Client(replica), user, at) == [f"song-{song}" for song in songs]
    reloaded = load_states(Dataset(world), store, second_release, repeat=True)
    assert (reloaded.renewed, reloaded.unchanged) == (1, len(list(read_histories(world))) - 1)


def test_states_that_the_batch_computed_anew_replace_those_of_the_same_model_and_plays(
    world: Workspace, store: StateStore, uri: str
) -> None:
    """The plays and the model stay, but vectors of songs change, as they do after `songs add`: other network states."""
    loaded_users = load_states(Dataset(world), store, live_release(world)).users
    histories = list(read_histories(world))
    ann, bob = (history.user_ids[0] for history in histories[:2])
    with service(world, store=uri) as replica:
        assert Client(replica).post("/v1/plays", {"plays": [play(ann, AT), play(ann, AT + 1)]}).json()["taken"] == 2
    encoder = TasteEncoder(network(model_config(num_songs=NUM_SONGS), seed=9))
    tastes = replace(artifacts.load_manifest(world, "tastes", "tastes1"), id="tastes2")
    for bucket in range(BUCKETS):
        for batch in Dataset(world).read_bucket(bucket):
            world.write_table(tastes_file(tastes.folder, bucket), taste_table(encoder, batch, AT))
    artifacts.publish(world, tastes, list(tastes.files))
    new_release = replace(live_release(world), inputs={**live_release(world).inputs, "tastes": "tastes2"})
    loaded = load_states(Dataset(world), store, new_release)
    assert (loaded.renewed, loaded.unchanged, loaded.merged, loaded.kept_plays) == (loaded_users, 0, 1, 2)
    for history in histories:
        state, log = read_user(store, history.user_ids[0])
        new_hidden = encoder.run(history)[1].hidden[0]
        np.testing.assert_allclose(state.models["model1"].start_hidden, new_hidden, atol=1e-5)
        np.testing.assert_array_equal(log.songs, history.songs)
    assert read_user(store, ann)[0].window.played_at.tolist() == [AT, AT + 1]
    assert read_user(store, ann)[0].current("model1") is None  # the next answer runs the network over the new plays
    assert read_user(store, bob)[0].current("model1") is not None
    assert load_states(Dataset(world), store, new_release, repeat=True).unchanged == loaded_users


def test_plays_of_the_batch_replace_online_plays_of_the_same_time(
    world: Workspace, store: StateStore, uri: str
) -> None:
    history = next(user_history for user_history in read_histories(world) if user_history.num_plays > 3)
    user = history.user_ids[0]
    early_plays = [play(user, int(history.played_at[0]) + turn, song=9) for turn in range(3)]
    with service(world, store=uri) as replica:
        app = Client(replica)
        app.post("/v1/plays", {"plays": [*early_plays, play(user, AT, song=4)]})
        loaded = load_states(Dataset(world), store, live_release(world))
        assert (loaded.renewed, loaded.merged, loaded.kept_plays) == (1, 1, 1)
        recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model1"))
        full_history = Histories.from_lists([[*history.songs, 4]], [[*history.played_at, AT]])
        songs, _ = recommender.recommend_one(full_history, AT + 5, 8)
        assert answer(app, user, AT + 5) == [f"song-{song}" for song in songs]
        assert app.get(f"/v1/users/{user}/taste", params={"at": AT + 5}).json()["plays"] == full_history.num_plays


@pytest.mark.parametrize("num_moved", [0, 3])
def test_plays_of_the_batch_replace_as_many_other_stored_plays(
    world: Workspace, store: StateStore, num_moved: int
) -> None:
    """One play is stored twice, under two event ids; the last one is not stored, because its song was unknown."""
    history = next(user_history for user_history in read_histories(world) if user_history.num_plays > 5)
    user, stored_rows = history.user_ids[0], [0, 0, *range(1, history.num_plays - 1)]
    plays = Plays.of(history.songs[stored_rows], history.played_at[stored_rows])
    log = plays.take(slice(num_moved))  # plays in the log, not in the window
    state = UserState(
        window=plays.take(slice(num_moved, None)),
        before_at=int(log.played_at[-1]) if num_moved else NEVER,
        log_plays=num_moved,
        turn=1,
    )
    pieces = [Piece(num_moved, pack_plays(log))] if num_moved else []
    store.put([Change(user_id=user, state=pack_state(state), expected=NO_VERSION, append=pieces)])
    assert load_states(Dataset(world), store, live_release(world)).renewed == 1
    state, log = read_user(store, user)
    np.testing.assert_array_equal(log.songs, history.songs)
    np.testing.assert_array_equal(log.played_at, history.played_at)
    assert len(state.window) == 0


@pytest.mark.parametrize("uri", [pytest.param("redis", marks=needs_redis)], indirect=True)
def test_a_load_restores_the_logs_that_redis_has_evicted(
    world: Workspace, store: StateStore, uri: str, redis: RedisServer
) -> None:
    histories = list(read_histories(world))
    load_states(Dataset(world), store, live_release(world))
    ann = histories[0].user_ids[0]
    events = [play(ann, AT + turn) for turn in range(150)]
    with service(world, store=uri) as replica:
        app = Client(replica)
        assert app.post("/v1/plays", {"plays": events}).json()["taken"] == 150
        redis.ask("DEL", *redis.ask("KEYS", "*:log"))
        assert app.get(f"/v1/users/{ann}/taste", params={"at": AT + 10**6}).status_code == 200
        loaded = load_states(Dataset(world), store, live_release(world), repeat=True)
    assert (loaded.renewed, loaded.merged, loaded.kept_plays) == (len(histories), 1, 64)  # the window is in the hash
    for history in histories:
        state, log = read_user(store, history.user_ids[0])
        np.testing.assert_array_equal(log.songs, history.songs)
        assert state.log_plays == history.num_plays


def test_plays_of_a_song_that_was_added_online_get_its_row_from_the_batch(world: Workspace, store: StateStore) -> None:
    history = next(user_history for user_history in read_histories(world) if user_history.num_plays > 3)
    user, rows = history.user_ids[0], history.songs.astype(np.int32)
    stored_rows = rows.copy()
    stored_rows[1] = FIRST_ONLINE + 5
    plays = Plays.of(stored_rows, history.played_at)
    store.put([Change(user_id=user, state=pack_state(UserState(window=plays, turn=1)), expected=NO_VERSION)])
    assert load_states(Dataset(world), store, live_release(world)).renewed == 1
    state, log = read_user(store, user)
    np.testing.assert_array_equal(log.songs, rows)
    assert (state.plays, state.current("model1") is not None) == (len(rows), True)


def test_no_load_brings_a_deleted_user_back(world: Workspace, store: StateStore, uri: str) -> None:
    users = [history.user_ids[0] for history in read_histories(world)]
    with service(world, store=uri) as replica:
        app = Client(replica)
        assert app.request("DELETE", f"/v1/users/{users[0]}").status_code == 204
        for _ in range(2):
            loaded = load_states(Dataset(world), store, live_release(world), repeat=True)
            assert (loaded.users, loaded.deleted) == (len(users) - 1, 1)
            assert app.get(f"/v1/users/{users[0]}/taste").status_code == 404


def test_tastes_of_other_users_are_refused(world: Workspace, store: StateStore) -> None:
    tastes = artifacts.load_manifest(world, "tastes", "tastes1")
    path = tastes_file(tastes.folder, 1)
    table = world.read_table(path)
    for wrong_table in (table.take(list(range(table.num_rows))[::-1]), table.slice(0, 3)):
        world.write_table(path, wrong_table)
        artifacts.publish(world, tastes, tastes.files)
        with pytest.raises(DamagedArtifactError, match=r"bucket 1 in the order of .*; run `rayrec taste --force`"):
            load_states(Dataset(world), store, live_release(world))


def test_tastes_that_do_not_match_their_checksum_are_refused(world: Workspace, store: StateStore) -> None:
    path = tastes_file("tastes/tastes1", 1)
    world.write_bytes(path, world.read_bytes(path) + b" ")
    with pytest.raises(DamagedArtifactError, match=rf"{path} does not match the checksum"):
        load_states(Dataset(world), store, live_release(world))


def test_tastes_of_a_data_set_that_is_gone_are_refused(world: Workspace, store: StateStore) -> None:
    dataset = Dataset(world)
    dataset.manifest = replace(dataset.manifest, id="another")
    with pytest.raises(MismatchError, match="run `rayrec taste` and `rayrec release create`"):
        load_states(dataset, store, live_release(world))


def test_the_command_loads_the_live_release_and_tells_what_it_did(
    world: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--workspace", world.uri, "--json", "states", "load"]) == 0
    report = json.loads(capsys.readouterr().out)
    users = len(list(read_histories(world)))
    assert (report["users"], report["added"], report["buckets"]) == (users, users, BUCKETS)
    assert report["users_per_second"] > 0
    assert report["release"] == live_release(world).id
    with service(world) as replica:  # without a named store, it uses the workspace's own
        user = next(read_histories(world)).user_ids[0]
        assert Client(replica).get(f"/v1/users/{user}/taste").status_code == 200
    assert main(["--workspace", world.uri, "states", "load", "--store", "nonsense"]) == 2
    assert "sqlite:///PATH or redis://HOST:PORT/0" in capsys.readouterr().err


def test_a_bucket_workspace_must_name_its_store(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_uri(workspace, None) == f"sqlite:///{workspace.full('serving/states.sqlite')}"
    workspace.write_bytes(STATES_FILE, b"copied with a workspace on a local disk")
    monkeypatch.setattr(Workspace, "is_local", False)
    assert open_user_store(workspace, None, "n") is None
    assert store_uri(workspace, "redis://here:1/0") == "redis://here:1/0"
    with pytest.raises(InputError, match="is in object storage, which cannot hold an SQLite file; give a store"):
        store_uri(workspace, None)


def test_likes_are_loaded_and_likes_that_came_online_stay(workspace: Workspace, uri: str) -> None:
    write_world(workspace, opinions=True)
    write_release(workspace)
    store = open_store(uri, Dataset(workspace).lineage)
    load_states(Dataset(workspace), store, live_release(workspace))
    histories = list(read_histories(workspace))
    for history in histories:
        assert history.likes is not None
        likes = read_user(store, history.user_ids[0])[0].likes
        np.testing.assert_array_equal(likes.songs, history.likes.songs)
        np.testing.assert_array_equal(likes.played_at, history.likes.played_at)
    ann = next(history for history in histories if history.likes is not None and history.likes.num_plays > 1)
    assert ann.likes is not None
    like = {**play(ann.user_ids[0], AT, song=5), "type": "like"}
    with service(workspace, store=uri) as replica:
        assert Client(replica).post("/v1/plays", like).json()["taken"] == 1
    assert load_states(Dataset(workspace), store, live_release(workspace), repeat=True).unchanged == len(histories)
    state, log = read_user(store, ann.user_ids[0])
    assert state.likes.songs.tolist() == [*ann.likes.songs, 5]
    (full_user,) = store.read([ann.user_ids[0]])
    assert full_user is not None
    state_without_like = replace(state, likes=state.likes.take(slice(1, None)))
    assert store.put(
        [Change(user_id=ann.user_ids[0], state=pack_state(state_without_like), expected=full_user.stored.version)]
    ) == [True]
    assert load_states(Dataset(workspace), store, live_release(workspace), repeat=True).renewed == 1
    state, reloaded_log = read_user(store, ann.user_ids[0])
    assert state.likes.songs.tolist() == [*ann.likes.songs, 5]
    np.testing.assert_array_equal(reloaded_log.songs, log.songs)
    store.close()
