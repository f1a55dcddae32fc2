"""The store on a real Redis Cluster: three nodes, slots that move and a node that fails while users are written."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from stores import lost_answers, needs_redis_cli

from rayrec.bench.redis_servers import START_SECONDS, RedisCluster, redis_cli, redis_cluster, wait_until
from rayrec.online import redis_store
from rayrec.online.redis_store import RedisStore
from rayrec.online.state_store import NO_VERSION, Change, Piece, StateStore, StoreUnavailableError, open_store

USERS = [f"user {number}" for number in range(60)]
T = TypeVar("T")
pytestmark = needs_redis_cli


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RedisCluster]:
    with redis_cluster(tmp_path) as running_cluster:
        yield running_cluster


def write_once(store: StateStore, versions: dict[str, int]) -> None:
    """Write one more version of every user, and repeat until the store has stored all of them."""
    target = versions[USERS[0]] + 1
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        remaining_users = [user for user in USERS if versions[user] < target]
        changes = [
            Change(
                user_id=user,
                state=str(versions[user] + 1).encode(),
                expected=versions[user],
                append=[Piece(1, str(versions[user] + 1).encode())],
                events=[versions[user]],
            )
            for user in remaining_users
        ]
        try:
            for user, is_stored in zip(remaining_users, store.put(changes), strict=True):
                versions[user] += is_stored
        except StoreUnavailableError:
            time.sleep(0.1)
        # a put may be done though its answer got lost
        for user, stored in zip(USERS, read_with_retries(store), strict=True):
            versions[user] = NO_VERSION if stored is None else stored.version
        if set(versions.values()) == {target}:
            return
    raise AssertionError("the store did not come back")


def read_with_retries(store: StateStore) -> list[Any]:
    return retry(lambda: store.get({user: [] for user in USERS}))


def retry(call: Callable[[], T]) -> T:
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
    move_options = ["--cluster-from", ids[1], "--cluster-to", ids[2], "--cluster-slots", "3000", "--cluster-yes"]
    reshard_thread = threading.Thread(
        target=redis_cli, args=("--cluster", "reshard", f"127.0.0.1:{nodes[0].port}", *move_options)
    )
    reshard_thread.start()
    writes = 0
    while reshard_thread.is_alive() or writes < 3:
        write_once(store, versions)
        writes += 1
    reshard_thread.join()

    (version,) = set(versions.values())
    assert version == 3 + writes
    for full_user in store.read(USERS):
        assert full_user is not None
        assert [int(piece) for piece in full_user.log] == list(range(1, version + 1))
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
    assert [stored.version for stored in read_with_retries(store)] == [2] * len(USERS)
    for _ in range(3):
        write_once(store, versions)
    assert set(versions.values()) == {5}
    for full_user in store.read(USERS):
        assert full_user is not None
        assert sorted(int(piece) for piece in full_user.log) == [1, 2, 3, 4, 5]
    store.close()


def test_online_songs_and_marks_of_loads_survive_the_failure_of_the_node_that_holds_them(
    cluster: RedisCluster,
) -> None:
    store = open_store(cluster.uri, "n")
    for bucket in range(3):
        store.mark_loaded("tastes", bucket, f"{bucket} is done")
    assert store.add_songs({"a": b"1", "b": b"2"}, most=2, first_number=0) == [True, True]
    assert store.add_songs({"c": b"3"}, most=2, first_number=0) is None
    store.count_song_plays("m", {0: np.ones(2).tobytes()})
    store.close_songs([1])
    song_changes = store.songs_since(0)
    assert [(song.song_id, song.data, song.model) for song in song_changes[1]] == [("a", b"1", "m"), ("b", b"", "")]
    for pattern in ("*songs*", "*load*"):  # all songs are on one node, as are all marks of a load
        (holder,) = [node for node in cluster.primaries() if node.ask("KEYS", pattern)]
        cluster.fail_over(holder)
        holder.start()
        assert retry(lambda: store.songs_since(0)) == song_changes
        assert retry(lambda: store.loaded("tastes")) == {bucket: f"{bucket} is done" for bucket in range(3)}
    assert store.add_songs({"c": b"3"}, most=2, first_number=0) == [True]
    store.count_song_plays("m", {0: np.ones(2).tobytes()})
    store.mark_loaded("tastes", 3, "3 is done")
    songs = {song.song_id: song for song in store.songs_since(song_changes[0])[1]}
    assert sorted(songs) == ["a", "c"]
    np.testing.assert_array_equal(np.frombuffer(songs["a"].sums), [2, 2])
    assert sorted(store.loaded("tastes")) == [0, 1, 2, 3]
    store.close()


def test_plays_of_songs_count_once_though_an_answer_gets_lost(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(cluster.uri, "n")
    store.add_songs({"a": b"1"}, most=1, first_number=0)
    with lost_answers(monkeypatch), pytest.raises(StoreUnavailableError, match="the answer got lost"):
        store.count_song_plays("m", {0: np.ones(2).tobytes()})
    (song,) = store.songs_since(0)[1]
    np.testing.assert_array_equal(np.frombuffer(song.sums), [1, 1])
    store.close()


def test_a_put_returns_once_a_replica_has_it(
    cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_store, "REPLICA_MS", 600_000)  # so long that no put gives up in this test
    monkeypatch.setattr(redis_store, "TIMEOUT_SECONDS", 600.0)
    store = open_store(cluster.uri, "n")
    assert store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION)]) == [True]
    primaries = cluster.primaries()
    replicas = [node for node in cluster.nodes if node not in primaries]
    for replica in replicas:
        replica.send(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(store.put, [Change(user_id="ann", state=b"2", expected=1)])
        try:
            wait_until(
                lambda: any(primary.ask("INFO", "clients")["blocked_clients"] for primary in primaries),
                "the put does not wait for a replica",
            )
            assert not future.done()
        finally:
            for replica in replicas:
                replica.send(signal.SIGCONT)
        assert future.result(START_SECONDS) == [True]
    assert "no replica" not in caplog.text
    store.close()


def test_a_node_goes_on_without_its_replica_after_one_put_has_waited(cluster: RedisCluster) -> None:
    store = open_store(cluster.uri, "n")
    assert store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION)]) == [True]
    primaries = cluster.primaries()

    def count_waits() -> int:
        stats = [primary.ask("INFO", "commandstats") for primary in primaries]
        return sum(commands["cmdstat_wait"]["calls"] for commands in stats if "cmdstat_wait" in commands)

    assert count_waits() == 1
    for node in cluster.nodes:
        if node not in primaries:
            node.kill()
    for version in range(1, 6):
        assert store.put([Change(user_id="ann", state=b"2", expected=version)]) == [True]
    assert count_waits() <= 2
    store.close()


def test_each_primary_that_evicts_keys_causes_a_warning(
    cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    for node in cluster.primaries():
        node.ask("CONFIG", "SET", "maxmemory", "1gb")
        node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        open_store(cluster.uri, "n").close()
        assert "maxmemory-policy allkeys-lru" in caplog.text
        caplog.clear()
        node.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
