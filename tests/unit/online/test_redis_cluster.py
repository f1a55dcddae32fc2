"""The store on a real Redis Cluster: three nodes, slots that move and a node that fails while users are written."""

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stores import RedisServer, needs_redis

from rayrec.online.redis_store import RedisStore
from rayrec.online.state_store import NOT_THERE, Change, Piece, StateStore, StoreUnavailableError, open_store
from rayrec.serving.run import free_ports

CLI = shutil.which("redis-cli")
USERS = [f"user {number}" for number in range(60)]
PATIENCE = 60  # seconds: on a busy machine nodes are slow to agree
CLUSTER = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000")
pytestmark = [needs_redis, pytest.mark.skipif(CLI is None, reason="redis-cli is not installed")]


def command(*arguments: str) -> str:
    """What redis-cli prints."""
    done = subprocess.run([str(CLI), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """Three primaries and a replica of the first."""
    made, ports = [], free_ports(4)  # low ones: nodes talk to each other on ports 10,000 higher
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        made.append(RedisServer(folder, *CLUSTER))
        made[-1].port = ports[number]
        made[-1].start()
    places = [f"127.0.0.1:{node.port}" for node in made]
    try:
        command("--cluster", "create", *places[:3], "--cluster-yes")
        first = command("-p", str(made[0].port), "cluster", "myid").strip()
        until(lambda: "cluster_state:ok" in command("-p", str(made[0].port), "cluster", "info"), "no cluster")
        command("--cluster", "add-node", places[3], places[0], "--cluster-slave", "--cluster-master-id", first)
        until(lambda: "master_link_status:up" in command("-p", str(made[3].port), "info", "replication"), "no replica")
        yield made
    finally:
        for node in made:
            node.kill()


def write_once(store: StateStore, versions: dict[str, int]) -> None:
    """One more version of every user, again where the store does not answer."""
    target = versions[USERS[0]] + 1
    deadline = time.monotonic() + PATIENCE
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
        for user, stored in zip(USERS, read_again(store), strict=True):  # what was put before an answer got lost
            versions[user] = NOT_THERE if stored is None else stored.version
        if set(versions.values()) == {target}:
            return
    raise AssertionError("the store did not come back")


def read_again(store: StateStore) -> list[Any]:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            return store.get({user: [] for user in USERS})
        except StoreUnavailableError:
            time.sleep(0.1)
    raise AssertionError("the store did not come back")


def test_users_spread_over_nodes_survive_a_resharding(nodes: list[RedisServer]) -> None:
    store = open_store(nodes[1].uri, "n")
    assert isinstance(store, RedisStore)
    versions = dict.fromkeys(USERS, NOT_THERE)
    for _ in range(3):
        write_once(store, versions)
    keys = [int(command("-p", str(node.port), "dbsize").split()[-1]) for node in nodes[:3]]
    assert min(keys) > 0.15 * sum(keys)

    ids = [command("-p", str(node.port), "cluster", "myid").strip() for node in nodes]
    move = ["--cluster-from", ids[1], "--cluster-to", ids[2], "--cluster-slots", "3000", "--cluster-yes"]
    moving = threading.Thread(target=command, args=("--cluster", "reshard", f"127.0.0.1:{nodes[0].port}", *move))
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
    store.rewrite()  # of all nodes
    assert store.read(USERS[:1])[0].log == []  # type: ignore[union-attr]
    store.close()


def test_a_replica_takes_over_and_no_acknowledged_play_is_lost(nodes: list[RedisServer]) -> None:
    store = open_store(nodes[1].uri, "n")
    versions = dict.fromkeys(USERS, NOT_THERE)
    for _ in range(2):
        write_once(store, versions)
    command("-p", str(nodes[0].port), "wait", "1", "5000")  # the replica has what was acknowledged
    nodes[0].kill()
    for _ in range(3):
        write_once(store, versions)
    assert set(versions.values()) == {5}
    for whole in store.read(USERS):
        assert whole is not None
        assert sorted(int(piece) for piece in whole.log) == [1, 2, 3, 4, 5]
    store.close()
