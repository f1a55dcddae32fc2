"""Loading the batch job's states into the store: every user once, with the plays that arrived online since."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from networks import jumping_histories, trained_network
from served import AT, BEGIN, NUM_SONGS, Client, service, write_release, write_world
from worlds import with_opinions, write_dataset, write_song_vectors

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories, concatenate
from rayrec.errors import DamagedArtifactError, InputError, MismatchError
from rayrec.model.taste_table import read_states, tastes_file
from rayrec.online.load_states import PIECE_PLAYS, load_states
from rayrec.online.state_codec import pack_heard, pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.state_store import NO_VERSION, Change, StateStore, open_store, store_uri
from rayrec.online.user_state import FIRST_ONLINE, LAST_PLAYS, Plays, UserState, fold_heard
from rayrec.recommend.answer import load_recommender
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace
from rayrec_cli.main import main

BUCKETS = 4


@pytest.fixture
def world(workspace: Workspace) -> Workspace:
    write_world(workspace)
    write_release(workspace)
    return workspace


@pytest.fixture
def store(world: Workspace, uri: str) -> Iterator[StateStore]:
    opened = open_store(uri, Dataset(world).lineage)
    yield opened
    opened.close()


def live(workspace: Workspace) -> Manifest:
    found = releases.active_release(workspace)
    assert found is not None
    return found


def everybody(workspace: Workspace) -> Iterator[Histories]:
    for batch in Dataset(workspace).read_all():
        for row in range(len(batch)):
            yield batch.take(np.array([row]))


def play(user: str, played_at: int, song: int = 3) -> dict[str, Any]:
    return {"event_id": f"{user}-{played_at}", "user_id": user, "song_id": f"song-{song}", "played_at": played_at}


def answer(app: Client, user: str, at: int, k: int = 8) -> list[str]:
    request = {"user_id": user, "at": at, "k": k, "exclude_heard": False}
    return [song["song_id"] for song in app.post("/v1/recommendations", request).json()["songs"]]


def read(store: StateStore, user: str) -> tuple[UserState, Plays]:
    """Return the state and the log of a user."""
    (whole,) = store.read([user])
    assert whole is not None
    return unpack_state(whole.stored.state), unpack_plays(whole.log)


def test_every_user_is_loaded_with_state_and_plays(world: Workspace, store: StateStore, uri: str) -> None:
    loaded = load_states(Dataset(world), store, live(world))
    users = list(everybody(world))
    assert (loaded.added, loaded.renewed, loaded.unchanged) == (len(users), 0, 0)
    assert loaded.users == len(users)
    for history in users:
        state, plays = read(store, history.user_ids[0])
        np.testing.assert_array_equal(plays.songs, history.songs)
        np.testing.assert_array_equal(plays.played_at, history.played_at)
        assert state.current("model1") is not None
        assert (state.plays, state.last_played_at) == (history.num_plays, history.played_at[-1])
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model1"))
    with service(world, store=uri) as opened:
        app = Client(opened)
        for history in users[:5]:
            wanted, _ = recommender.recommend_one(history, AT, 8)
            assert answer(app, history.user_ids[0], AT) == [f"song-{song}" for song in wanted]


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
    stored = [unpack_state(whole.stored.state) for whole in store.read(users.user_ids.tolist()) if whole is not None]
    hidden = np.concatenate([state.states("model1").hidden for state in stored])
    at = int(users.played_at.max()) + 60_000
    whole, from_stored = (recommender.recommend(users, at, 20, hidden=given)[0] for given in (None, hidden))
    follows = (users.songs[users.offsets[1:] - 1] + 1) % NUM_SONGS
    assert (whole == follows[:, None]).any(axis=1).mean() > 0.8  # the network has learned something
    assert (whole == from_stored).all(axis=1).mean() >= 0.99
    store.close()


def test_a_user_with_more_plays_than_are_read_gets_the_songs_of_the_whole_history(
    workspace: Workspace, uri: str
) -> None:
    num_songs = 20_000  # so many that users still have new songs, from which a ranker learns
    histories = jumping_histories(16, num_songs, shortest=LAST_PLAYS + 500, longest=LAST_PLAYS + 3_000)
    histories = replace(histories, played_at=histories.played_at + BEGIN)
    dataset = write_dataset(workspace, histories, num_songs)
    write_song_vectors(workspace, np.ones((num_songs, 8), np.float32), {"dataset": "by-hand"})
    release = write_release(workspace)
    store = open_store(uri, dataset.lineage)
    load_states(dataset, store, release)
    store.close()
    recommender = load_recommender(workspace, dataset, releases.default_parts(workspace, "model1"))
    at = int(histories.played_at.max()) + 60_000
    with service(workspace, store=uri) as opened:
        for history in everybody(workspace):
            songs, _ = recommender.recommend_one(history, at, 8)
            assert answer(Client(opened), history.user_ids[0], at) == [f"song-{song}" for song in songs]


def plays_of(histories: Histories, row: int) -> Plays:
    own = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
    skipped = None if histories.skipped is None else histories.skipped[own]
    return Plays.of(histories.songs[own], histories.played_at[own], skipped=skipped)


@pytest.mark.parametrize("processes", [1, 2])
def test_everybody_is_stored_to_the_bytes_that_each_alone_is_packed_to(
    workspace: Workspace, uri: str, processes: int
) -> None:
    """Users without plays, with likes and skips, with several pieces of log, with more plays than an answer reads."""
    random, lengths = np.random.default_rng(0), [*range(0, 40, 3), 1_500, LAST_PLAYS + 500]
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
        for row, (user, whole) in enumerate(zip(batch.user_ids, store.read(batch.user_ids.tolist()), strict=True)):
            plays, pieces, heard = plays_of(batch, row), list[bytes](), None
            state = UserState.start("model1", states, row, plays=len(plays))
            assert batch.likes is not None
            state = replace(state, likes=plays_of(batch.likes, row))
            if len(plays) > LAST_PLAYS:
                state, songs = fold_heard(state, plays.songs, np.zeros(0, np.int32))
                heard = pack_heard(songs)
            for begin in range(0, len(plays), PIECE_PLAYS):
                pieces.append(pack_plays(plays.take(slice(begin, begin + PIECE_PLAYS))))
            assert whole is not None
            assert (whole.stored.state, whole.log, whole.heard) == (pack_state(state), pieces, heard), user
    store.close()


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_processes_stop_at_a_damaged_bucket_and_what_is_done_is_not_done_again(
    world: Workspace, store: StateStore
) -> None:
    path = tastes_file("tastes/tastes1", 3)
    whole = world.read_bytes(path)
    world.write_bytes(path, whole + b" ")
    with pytest.raises(DamagedArtifactError, match=rf"{path} does not match the checksum"):
        load_states(Dataset(world), store, live(world), processes=2)
    done = store.loaded("tastes1")
    assert 3 not in done
    world.write_bytes(path, whole)
    loaded = load_states(Dataset(world), store, live(world))
    assert loaded.users == len(list(everybody(world)))
    assert {bucket: store.loaded("tastes1")[bucket] for bucket in done} == done


def test_a_load_that_was_stopped_goes_on_with_the_buckets_left(
    world: Workspace, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = len(list(everybody(world)))
    put, calls = type(store).put, []

    def dies(self: StateStore, changes: list[Change], *, loading: bool) -> list[bool]:
        calls.append(len(changes))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put(self, changes, loading=loading)

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put", dies)
        with pytest.raises(KeyboardInterrupt):
            load_states(Dataset(world), store, live(world))
    assert sum(calls[:2]) < users
    with monkeypatch.context() as patch:
        calls.clear()
        patch.setattr(
            type(store), "put", lambda self, users, **how: calls.append(len(users)) or put(self, users, **how)
        )
        loaded = load_states(Dataset(world), store, live(world))
    assert len(calls) == BUCKETS - 2
    assert (loaded.buckets, loaded.added) == (BUCKETS, users)
    assert load_states(Dataset(world), store, live(world)) == loaded
    again = load_states(Dataset(world), store, live(world), repeat=True)
    assert (again.added, again.unchanged) == (0, users)


def test_plays_newer_than_the_batch_stay_and_states_go_on_from_it(
    world: Workspace, store: StateStore, uri: str
) -> None:
    """A user of the batch and a new user play songs online; then the states of another release are loaded."""
    loaded_users = load_states(Dataset(world), store, live(world)).users
    histories = [history for history in everybody(world) if history.num_plays > 3][:2]
    (ann, bob), at = (history.user_ids[0] for history in histories), AT + 10**6
    sent = [play(ann, AT + turn, song=turn % NUM_SONGS) for turn in range(150)] + [play("new", AT)]
    with service(world, store=uri) as opened:
        assert Client(opened).post("/v1/plays", {"plays": sent}).json()["taken"] == 151
        assert load_states(Dataset(world), store, live(world), repeat=True).unchanged == loaded_users
        before = answer(Client(opened), ann, at)
    second = write_release(world, "2", seed=5, activate=False)
    loaded = load_states(Dataset(world), store, second)
    assert (loaded.added, loaded.renewed, loaded.merged, loaded.kept_plays) == (0, loaded_users, 1, 150)
    whole = Histories.from_lists(
        [[*histories[0].songs, *[turn % NUM_SONGS for turn in range(150)]]],
        [[*histories[0].played_at, *[AT + turn for turn in range(150)]]],
    )
    recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model2"))
    state, log = read(store, ann)
    assert list(state.models) == ["model1", "model2"]
    np.testing.assert_array_equal(log.songs, whole.songs[: len(log)])
    with service(world, store=uri) as opened:  # the first release is still live
        assert answer(Client(opened), ann, at) == before
    releases.activate_release(world, second.id)
    with service(world, store=uri) as opened:
        app = Client(opened)
        for user, history in ((ann, whole), (bob, histories[1])):
            wanted, _ = recommender.recommend_one(history, at, 8)
            assert answer(app, user, at) == [f"song-{song}" for song in wanted]
        assert answer(app, ann, at) != before
        repeated = app.post("/v1/plays", {"plays": [sent[149], sent[100]]}).json()
        assert repeated["outcomes"] == ["repeated", "repeated"]


def test_a_play_that_comes_during_the_merge_is_not_lost(
    world: Workspace, store: StateStore, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_states(Dataset(world), store, live(world))
    user = next(everybody(world)).user_ids[0]
    second = write_release(world, "2", seed=5, activate=False)
    plain, sent = type(store).read, []
    with service(world, store=uri) as opened:
        app = Client(opened)

        def read_then_play(self: StateStore, user_ids: list[str], **options: Any) -> Any:
            whole = plain(self, user_ids, **options)
            if user in user_ids and not sent:
                sent.append(user)
                assert app.post("/v1/plays", play(user, AT)).json()["taken"] == 1
            return whole

        monkeypatch.setattr(type(store), "read", read_then_play)
        loaded = load_states(Dataset(world), store, second)
    assert (loaded.merged, loaded.kept_plays) == (1, 1)
    assert read(store, user)[0].last_played_at == AT


def test_states_of_two_releases_stand_side_by_side(world: Workspace, store: StateStore, uri: str) -> None:
    """Plays arrive after the states of a second release were loaded: both releases answer as the batch job would."""
    load_states(Dataset(world), store, live(world))
    history = next(each for each in everybody(world) if each.num_plays > 3)
    user, at = history.user_ids[0], AT + 10**6
    second = write_release(world, "2", seed=5, activate=False)
    load_states(Dataset(world), store, second)
    sent = [play(user, AT + turn, song=turn % NUM_SONGS) for turn in range(150)]
    whole = Histories.from_lists(
        [[*history.songs, *[turn % NUM_SONGS for turn in range(150)]]],
        [[*history.played_at, *[AT + turn for turn in range(150)]]],
    )
    for turn, number in enumerate(("1", "2", "1")):
        if turn:
            releases.activate_release(world, second.id if number == "2" else releases.read_active(world)["history"][0])
        recommender = load_recommender(world, Dataset(world), releases.default_parts(world, f"model{number}"))
        with service(world, store=uri) as opened:
            if not turn:
                assert Client(opened).post("/v1/plays", {"plays": sent}).json()["taken"] == 150
            songs, _ = recommender.recommend_one(whole, at, 8)
            assert answer(Client(opened), user, at) == [f"song-{song}" for song in songs]
    assert load_states(Dataset(world), store, second, repeat=True).unchanged == len(list(everybody(world)))


def test_other_plays_of_the_same_time_give_way_to_the_batchs(world: Workspace, store: StateStore, uri: str) -> None:
    history = next(each for each in everybody(world) if each.num_plays > 3)
    user = history.user_ids[0]
    early = [play(user, int(history.played_at[0]) + turn, song=9) for turn in range(3)]
    with service(world, store=uri) as opened:
        app = Client(opened)
        app.post("/v1/plays", {"plays": [*early, play(user, AT, song=4)]})
        loaded = load_states(Dataset(world), store, live(world))
        assert (loaded.renewed, loaded.merged, loaded.kept_plays) == (1, 1, 1)
        recommender = load_recommender(world, Dataset(world), releases.default_parts(world, "model1"))
        whole = Histories.from_lists([[*history.songs, 4]], [[*history.played_at, AT]])
        songs, _ = recommender.recommend_one(whole, AT + 5, 8)
        assert answer(app, user, AT + 5) == [f"song-{song}" for song in songs]
        assert app.get(f"/v1/users/{user}/taste", params={"at": AT + 5}).json()["plays"] == whole.num_plays


def test_plays_of_a_song_that_was_added_online_get_its_row_from_the_batch(
    world: Workspace, store: StateStore, uri: str
) -> None:
    history = next(each for each in everybody(world) if each.num_plays > 3)
    user, rows = history.user_ids[0], history.songs.astype(np.int32)
    stored = rows.copy()
    stored[1] = FIRST_ONLINE + 5
    plays = Plays.of(stored, history.played_at)
    store.put([Change(user_id=user, state=pack_state(UserState(window=plays, turn=1)), expected=NO_VERSION)])
    assert load_states(Dataset(world), store, live(world)).renewed == 1
    state, log = read(store, user)
    np.testing.assert_array_equal(log.songs, rows)
    assert (state.plays, state.current("model1") is not None) == (len(rows), True)


def test_no_load_brings_a_deleted_user_back(world: Workspace, store: StateStore, uri: str) -> None:
    users = [history.user_ids[0] for history in everybody(world)]
    with service(world, store=uri) as opened:
        app = Client(opened)
        assert app.request("DELETE", f"/v1/users/{users[0]}").status_code == 204
        for _ in range(2):
            loaded = load_states(Dataset(world), store, live(world), repeat=True)
            assert (loaded.users, loaded.deleted) == (len(users) - 1, 1)
            assert app.get(f"/v1/users/{users[0]}/taste").status_code == 404


def test_tastes_of_other_users_are_refused(world: Workspace, store: StateStore) -> None:
    tastes = artifacts.load_manifest(world, "tastes", "tastes1")
    path = tastes_file(tastes.folder, 1)
    table = world.read_table(path)
    for wrong in (table.take(list(range(table.num_rows))[::-1]), table.slice(0, 3)):
        world.write_table(path, wrong)
        artifacts.publish(world, tastes, tastes.files)
        with pytest.raises(DamagedArtifactError, match=r"bucket 1 in the order of .*; run `rayrec taste --force`"):
            load_states(Dataset(world), store, live(world))


def test_tastes_that_are_not_what_was_computed_are_refused(world: Workspace, store: StateStore) -> None:
    path = tastes_file("tastes/tastes1", 1)
    world.write_bytes(path, world.read_bytes(path) + b" ")
    with pytest.raises(DamagedArtifactError, match=rf"{path} does not match the checksum"):
        load_states(Dataset(world), store, live(world))


def test_tastes_of_a_data_set_that_is_gone_are_refused(world: Workspace, store: StateStore) -> None:
    dataset = Dataset(world)
    dataset.manifest = replace(dataset.manifest, id="another")
    with pytest.raises(MismatchError, match="run `rayrec taste` and `rayrec release create`"):
        load_states(dataset, store, live(world))


def test_the_command_loads_the_live_release_and_tells_what_it_did(
    world: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--workspace", world.uri, "--json", "states", "load"]) == 0
    told = json.loads(capsys.readouterr().out)
    users = len(list(everybody(world)))
    assert (told["users"], told["added"], told["buckets"]) == (users, users, BUCKETS)
    assert told["users_per_second"] > 0
    assert told["release"] == live(world).id
    with service(world) as opened:  # without a named store, it uses the workspace's own
        user = next(everybody(world)).user_ids[0]
        assert Client(opened).get(f"/v1/users/{user}/taste").status_code == 200
    assert main(["--workspace", world.uri, "states", "load", "--store", "nonsense"]) == 2
    assert "sqlite:///PATH or redis://HOST:PORT/0" in capsys.readouterr().err


def test_a_bucket_workspace_must_name_its_store(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_uri(workspace, None) == f"sqlite:///{workspace.full('serving/states.sqlite')}"
    monkeypatch.setattr(Workspace, "is_local", False)
    assert store_uri(workspace, "redis://here:1/0") == "redis://here:1/0"
    with pytest.raises(InputError, match="is in object storage, which cannot hold an SQLite file; give a store"):
        store_uri(workspace, None)


def test_likes_are_loaded_and_those_that_came_online_stay_beside_them(workspace: Workspace, uri: str) -> None:
    write_world(workspace, opinions=True)
    write_release(workspace)
    store = open_store(uri, Dataset(workspace).lineage)
    load_states(Dataset(workspace), store, live(workspace))
    users = list(everybody(workspace))
    for history in users:
        assert history.likes is not None
        likes = read(store, history.user_ids[0])[0].likes
        np.testing.assert_array_equal(likes.songs, history.likes.songs)
        np.testing.assert_array_equal(likes.played_at, history.likes.played_at)
    ann = next(history for history in users if history.likes is not None and history.likes.num_plays > 1)
    assert ann.likes is not None
    like = {**play(ann.user_ids[0], AT, song=5), "type": "like"}
    with service(workspace, store=uri) as opened:
        assert Client(opened).post("/v1/plays", like).json()["taken"] == 1
    assert load_states(Dataset(workspace), store, live(workspace), repeat=True).unchanged == len(users)
    state, log = read(store, ann.user_ids[0])
    assert state.likes.songs.tolist() == [*ann.likes.songs, 5]
    (whole,) = store.read([ann.user_ids[0]])
    assert whole is not None
    lost = replace(state, likes=state.likes.take(slice(1, None)))
    assert store.put([Change(user_id=ann.user_ids[0], state=pack_state(lost), expected=whole.stored.version)]) == [True]
    assert load_states(Dataset(workspace), store, live(workspace), repeat=True).renewed == 1
    state, same = read(store, ann.user_ids[0])
    assert state.likes.songs.tolist() == [*ann.likes.songs, 5]
    np.testing.assert_array_equal(same.songs, log.songs)
    store.close()
