"""The store on a real Redis Cluster: three nodes, slots that move and a node that fails while users are written."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from stores import lost_answers, needs_redis_cli

from rayrec.bench.redis_servers import START_SECONDS, RedisCluster, redis_cli, redis_cluster
from rayrec.online.redis_store import REPLICA_MS, RedisStore
from rayrec.online.state_store import NO_VERSION, Change, Piece, StateStore, StoreUnavailableError, open_store

USERS = [f"user {number}" for number in range(60)]
T = TypeVar("T")
pytestmark = needs_redis_cli


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    with redis_cluster(tmp_path) as running:
        yield running


def write_once(store: StateStore, versions: dict[str, int]) -> None:
    """Write one more version of every user, and repeat until the store has stored all of them."""
    target = versions[USERS[0]] + 1
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        left = [user for user in USERS if versions[user] < target]
        changes = [
            Change(
                user_id=user,
                state=str(versions[user] + 1).encode(),
                expected=versions[user],
                append=[Piece(1, str(versions[user] + 1).encode())],
                events=[versions[user]],
            )
            for user in left
        ]
        try:
            for user, put in zip(left, store.put(changes), strict=True):
                versions[user] += put
        except StoreUnavailableError:
            time.sleep(0.1)
        for user, stored in zip(USERS, read_again(store), strict=True):  # a put may be done though its answer got lost
            versions[user] = NO_VERSION if stored is None else stored.version
        if set(versions.values()) == {target}:
            return
    raise AssertionError("the store did not come back")


def read_again(store: StateStore) -> list[Any]:
    return again(lambda: store.get({user: [] for user in USERS}))


def again(call: Callable[[], T]) -> T:
    """Return the result of `call`, repeated for up to START_SECONDS until the store answers."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            return call()
        except StoreUnavailableError:
            time.sleep(0.1)
    raise AssertionError("the store did not come back")


def test_users_spread_over_nodes_survive_a_resharding(cluster: RedisCluster) -> None:
    nodes = cluster.nodes
    store = open_store(nodes[1].uri, "n")
    assert isinstance(store, RedisStore)
    versions = dict.fromkeys(USERS, NO_VERSION)
    for _ in range(3):
        write_once(store, versions)
    keys = [node.ask("DBSIZE") for node in nodes[:3]]
    assert min(keys) > 0.15 * sum(keys)

    ids = [node.ask("CLUSTER MYID").decode() for node in nodes]
    move = ["--cluster-from", ids[1], "--cluster-to", ids[2], "--cluster-slots", "3000", "--cluster-yes"]
    moving = threading.Thread(target=redis_cli, args=("--cluster", "reshard", f"127.0.0.1:{nodes[0].port}", *move))
    moving.start()
    turns = 0
    while moving.is_alive() or turns < 3:
        write_once(store, versions)
        turns += 1
    moving.join()

    (count,) = set(versions.values())
    assert count == 3 + turns
    for whole in store.read(USERS):
        assert whole is not None
        assert [int(piece) for piece in whole.log] == list(range(1, count + 1))
    store.forget([USERS[0]], b"mark")
    store.rewrite()  # on all nodes
    assert store.read(USERS[:1])[0].log == []  # type: ignore[union-attr]
    store.close()


def test_a_replica_takes_over_and_no_acknowledged_play_is_lost(cluster: RedisCluster) -> None:
    store = open_store(cluster.uri, "n")
    versions = dict.fromkeys(USERS, NO_VERSION)
    for _ in range(2):
        write_once(store, versions)
    cluster.fail_over(cluster.primaries()[0])  # right after the last put was acknowledged
    assert [stored.version for stored in read_again(store)] == [2] * len(USERS)
    for _ in range(3):
        write_once(store, versions)
    assert set(versions.values()) == {5}
    for whole in store.read(USERS):
        assert whole is not None
        assert sorted(int(piece) for piece in whole.log) == [1, 2, 3, 4, 5]
    store.close()


def test_online_songs_and_marks_of_loads_survive_the_failure_of_the_node_that_holds_them(
    cluster: RedisCluster,
) -> None:
    store = open_store(cluster.uri, "n")
    for bucket in range(3):
        store.mark_loaded("tastes", bucket, f"{bucket} is done")
    assert store.add_songs({"a": b"1", "b": b"2"}, most=2) == [True, True]
    assert store.add_songs({"c": b"3"}, most=2) is None
    store.count_song_plays("m", {0: np.ones(2).tobytes()})
    store.close_songs([1])
    written = store.songs_since(0)
    assert [(song.song_id, song.data, song.model) for song in written[1]] == [("a", b"1", "m"), ("b", b"", "")]
    for pattern in ("*songs*", "*load*"):  # all songs are on one node, as are all marks of a load
        (holder,) = [node for node in cluster.primaries() if node.ask("KEYS", pattern)]
        cluster.fail_over(holder)
        holder.start()
        assert again(lambda: store.songs_since(0)) == written
        assert again(lambda: store.loaded("tastes")) == {bucket: f"{bucket} is done" for bucket in range(3)}
    assert store.add_songs({"c": b"3"}, most=2) == [True]
    store.count_song_plays("m", {0: np.ones(2).tobytes()})
    store.mark_loaded("tastes", 3, "3 is done")
    songs = {song.song_id: song for song in store.songs_since(written[0])[1]}
    assert sorted(songs) == ["a", "c"]
    np.testing.assert_array_equal(np.frombuffer(songs["a"].sums), [2, 2])
    assert sorted(store.loaded("tastes")) == [0, 1, 2, 3]
    store.close()


def test_plays_of_songs_count_once_though_an_answer_gets_lost(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(cluster.uri, "n")
    store.add_songs({"a": b"1"}, most=1)
    with lost_answers(monkeypatch), pytest.raises(StoreUnavailableError, match="the answer got lost"):
        store.count_song_plays("m", {0: np.ones(2).tobytes()})
    (song,) = store.songs_since(0)[1]
    np.testing.assert_array_equal(np.frombuffer(song.sums), [1, 1])
    store.close()


def test_a_put_returns_once_a_replica_has_it(cluster: RedisCluster) -> None:
    store = open_store(cluster.uri, "n")
    assert store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION)]) == [True]
    replicas = [node for node in cluster.nodes if node not in cluster.primaries()]
    for replica in replicas:
        replica.send(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(store.put, [Change(user_id="ann", state=b"2", expected=1)])
        with pytest.raises(TimeoutError):
            writing.result(REPLICA_MS / 2_000)
        for replica in replicas:
            replica.send(signal.SIGCONT)
        assert writing.result(START_SECONDS) == [True]
    store.close()


def test_a_node_goes_on_without_its_replica(cluster: RedisCluster) -> None:
    store = open_store(cluster.uri, "n")
    assert store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION)]) == [True]
    for node in cluster.nodes:
        if node not in cluster.primaries():
            node.kill()
    began = time.monotonic()
    for version in range(1, 6):
        assert store.put([Change(user_id="ann", state=b"2", expected=version)]) == [True]
    assert time.monotonic() - began < 5 * REPLICA_MS / 1000  # only one put waits for a replica
    store.close()
