"""Tests that all stores of user states must pass, and tests of single stores."""

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from stores import lost_answers, needs_redis

from rayrec.bench.redis_servers import RedisServer
from rayrec.errors import InputError
from rayrec.online import state_store
from rayrec.online.state_store import (
    DAY_SECONDS,
    NO_VERSION,
    Change,
    Piece,
    StateStore,
    Stored,
    StoreUnavailableError,
    absolute_uri,
    open_store,
    store_exists,
)
from rayrec.serving.serve_config import ServeConfig

Opener = Callable[[], StateStore]
WRITERS, PUTS = 3, 25


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """A separate namespace for each test, because all tests share one Redis server."""
    return str(request.node.name)


@pytest.fixture
def store(uri: str, namespace: str) -> Iterator[StateStore]:
    opened_store = open_store(uri, namespace)
    yield opened_store
    opened_store.close()


def put(
    store: StateStore, user: str, state: bytes, *, expected: int, append: bytes | None = None, restart: bool = False
) -> bool:
    pieces = [] if append is None else [Piece(1, append)]
    change = Change(user_id=user, state=state, expected=expected, append=pieces, restart=restart)
    return store.put([change])[0]


def get(store: StateStore, user: str) -> Stored | None:
    return store.get({user: []})[0]


def contents(store: StateStore, user: str) -> tuple[int, bytes, list[bytes]] | None:
    (full_user,) = store.read([user])
    return None if full_user is None else (full_user.stored.version, full_user.stored.state, full_user.log)


def test_an_unknown_user_is_none(store: StateStore) -> None:
    assert store.get({"nobody": [1]}) == [None]
    assert store.read(["nobody", "none"]) == [None, None]


def test_a_put_replaces_the_state_and_adds_to_the_log(store: StateStore) -> None:
    assert put(store, "ann", b"1", expected=NO_VERSION)
    assert contents(store, "ann") == (1, b"1", [])
    assert put(store, "ann", b"2", expected=1, append=b"first")
    assert put(store, "ann", b"3", expected=2, append=b"second")
    assert put(store, "ann", b"4", expected=3)
    assert contents(store, "ann") == (4, b"4", [b"first", b"second"])
    stored = get(store, "ann")
    assert stored is not None
    assert (stored.version, stored.state) == (4, b"4")


def test_a_put_on_another_version_changes_nothing(store: StateStore) -> None:
    put(store, "ann", b"1", expected=NO_VERSION, append=b"first")
    for wrong_version in (NO_VERSION, 2, 7):
        assert not put(store, "ann", b"x", expected=wrong_version, append=b"x", restart=True)
    assert not put(store, "bob", b"x", expected=1, append=b"x")
    assert contents(store, "ann") == (1, b"1", [b"first"])
    assert store.read(["bob"]) == [None]


def test_a_log_can_start_anew(store: StateStore) -> None:
    put(store, "ann", b"1", expected=NO_VERSION, append=b"old")
    put(store, "ann", b"2", expected=1, append=b"older")
    assert put(store, "ann", b"3", expected=2, append=b"new", restart=True)
    assert put(store, "ann", b"4", expected=3, append=b"newer")
    assert contents(store, "ann") == (4, b"4", [b"new", b"newer"])


@pytest.mark.parametrize("loading", [False, True])
def test_many_users_are_changed_at_once_each_by_itself(store: StateStore, loading: bool) -> None:
    put(store, "bob", b"own", expected=NO_VERSION, append=b"own log")
    names = ("ann", "bob", "cy")
    log = [Piece(2, b"log")]
    changes = [Change(user_id=name, state=name.encode(), expected=NO_VERSION, append=log) for name in names]
    assert store.put(changes, loading=loading) == [True, False, True]
    assert contents(store, "ann") == (1, b"ann", [b"log"])
    assert contents(store, "bob") == (1, b"own", [b"own log"])
    assert store.put(changes, loading=loading) == [False] * 3
    assert store.put([], loading=loading) == []
    many_changes = [Change(user_id=f"user {row}", state=b"s", expected=NO_VERSION) for row in range(1_201)]
    assert all(store.put(many_changes, loading=loading))
    stored = store.get({f"user {row}": [] for row in (1_200, 7, 2_000)})
    assert [entry is not None for entry in stored] == [True, True, False]


@pytest.mark.parametrize("user", ["", "a b/c?d", "Zoë 🎵", "a\x00b", "x" * 512, "user:log", "%s'; --"])
def test_any_text_can_be_a_user_id(store: StateStore, user: str) -> None:
    data = bytes(range(256)) * 40
    assert put(store, user, data, expected=NO_VERSION, append=data)
    assert contents(store, user) == (1, data, [data])
    assert get(store, user + "x") is None


def test_namespaces_are_separate(store: StateStore, uri: str, namespace: str) -> None:
    put(store, "ann", b"1", expected=NO_VERSION, append=b"log")
    store.mark_loaded("t", 0, "here")
    store.add_songs({"a": b"1"}, most=1, first_number=0)
    other_store = open_store(uri, namespace + "-other")
    try:
        assert (get(other_store, "ann"), other_store.loaded("t"), other_store.songs_since(0)) == (None, {}, (0, []))
        assert put(other_store, "ann", b"2", expected=NO_VERSION)
        assert contents(store, "ann") == (1, b"1", [b"log"])
    finally:
        other_store.close()


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f8").tobytes()


def songs_of(store: StateStore, since: int = 0) -> list[tuple[int, str, bytes]]:
    return [(song.number, song.song_id, song.data) for song in store.songs_since(since)[1]]


def test_songs_are_numbered_once_and_a_reader_gets_only_the_changes(store: StateStore) -> None:
    assert store.songs_since(0) == (0, [])
    assert store.add_songs({"a": b"1", "é": b"2"}, most=9, first_number=0) == [True, True]
    version, songs = store.songs_since(0)
    assert [(song.number, song.song_id, song.data, song.sums) for song in songs] == [
        (0, "a", b"1", b""),
        (1, "é", b"2", b""),
    ]
    assert store.songs_since(version) == (version, [])
    assert store.add_songs({"a": b"x", "b": b"3"}, most=9, first_number=0) == [False, True]
    assert songs_of(store, version) == [(2, "b", b"3")]
    assert songs_of(store) == [(0, "a", b"1"), (1, "é", b"2"), (2, "b", b"3")]


def test_new_songs_are_numbered_from_a_given_number_on_and_never_below_the_stored_ones(store: StateStore) -> None:
    assert store.add_songs({"a": b"1", "b": b"2"}, 9, first_number=5) == [True, True]
    assert store.add_songs({"a": b"x", "c": b"3"}, 9, first_number=2) == [False, True]
    assert songs_of(store) == [(5, "a", b"1"), (6, "b", b"2"), (7, "c", b"3")]


def test_songs_that_are_too_many_are_all_refused_until_others_are_closed(store: StateStore) -> None:
    store.add_songs({"a": b"1", "b": b"2"}, most=2, first_number=0)
    assert store.add_songs({"a": b"1"}, most=2, first_number=0) == [False]
    assert store.add_songs({"a": b"1", "c": b"3"}, most=2, first_number=0) is None
    version = store.songs_since(0)[0]
    store.close_songs([0])
    assert songs_of(store, version) == [(0, "a", b"")]
    assert store.add_songs({"c": b"3"}, most=2, first_number=0) == [True]
    assert store.add_songs({"a": b"4"}, most=3, first_number=0) == [True]  # opened again under its number
    assert songs_of(store) == [(0, "a", b"4"), (1, "b", b"2"), (2, "c", b"3")]


def test_sums_of_a_songs_plays_add_up_for_one_model(store: StateStore) -> None:
    store.add_songs({"a": b"1", "b": b"2"}, most=2, first_number=0)
    store.count_song_plays("m1", {0: floats(1, 0.1), 1: floats(2, -3)})
    version = store.songs_since(0)[0]
    store.count_song_plays("m1", {0: floats(1, 0.2), 7: floats(1, 1)})
    _, (song,) = store.songs_since(version)
    assert (song.number, song.model, song.sums) == (0, "m1", floats(2, 0.1 + 0.2))
    store.count_song_plays("m2", {0: floats(5, 6)})
    assert [(song.model, song.sums) for song in store.songs_since(0)[1]] == [
        ("m2", floats(5, 6)),
        ("m1", floats(2, -3)),
    ]
    store.close_songs([0])
    store.count_song_plays("m1", {0: floats(1, 1)})
    assert [(song.model, song.sums) for song in store.songs_since(0)[1]] == [("", b""), ("m1", floats(2, -3))]


def test_plays_of_songs_are_counted_by_many_at_once(store: StateStore, uri: str, namespace: str) -> None:
    store.add_songs({"a": b"1"}, most=2, first_number=0)

    def count_plays() -> None:
        thread_store = open_store(uri, namespace)
        for _ in range(PUTS):
            thread_store.count_song_plays("m", {0: floats(1, 0.5)})
        thread_store.close()

    threads = [threading.Thread(target=count_plays) for _ in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.songs_since(0)[1][0].sums == floats(WRITERS * PUTS, WRITERS * PUTS / 2)


@needs_redis
def test_plays_of_songs_count_once_in_redis_though_an_answer_gets_lost(
    redis: RedisServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(redis.uri, namespace)
    store.add_songs({"a": b"1"}, most=1, first_number=0)
    with lost_answers(monkeypatch), pytest.raises(StoreUnavailableError, match="the answer got lost"):
        store.count_song_plays("m", {0: floats(1, 0.5)})
    assert store.songs_since(0)[1][0].sums == floats(1, 0.5)
    store.count_song_plays("m", {0: floats(1, 0.5)})
    assert store.songs_since(0)[1][0].sums == floats(2, 1)
    store.close()


@needs_redis
def test_a_put_whose_answer_got_lost_is_stored_once(
    redis: RedisServer, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(redis.uri, namespace)
    change = Change(user_id="ann", state=b"1", expected=NO_VERSION, events=[7], append=[Piece(1, b"play")])
    with lost_answers(monkeypatch, most=1):
        assert store.put([change]) == [True]
    assert store.put([change]) == [False]  # the same plays, sent by another request
    (full_user,) = store.read(["ann"])
    assert full_user is not None
    assert (full_user.stored.version, full_user.log) == (1, [b"play"])
    store.close()


def test_the_buckets_of_each_load_are_kept(store: StateStore) -> None:
    assert store.loaded("tastes1") == {}
    for bucket, text in ((0, "first"), (7, "ë"), (0, "again")):
        store.mark_loaded("tastes1", bucket, text)
    store.mark_loaded("tastes2", 1, "other")
    assert store.loaded("tastes1") == {0: "again", 7: "ë"}


def test_events_are_found_for_a_day_and_not_for_three(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [3, -5, 2**63 - 1, -(2**63), 0]
    assert store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION, events=events[:3])]) == [True]
    put(store, "bob", b"1", expected=NO_VERSION)
    now = state_store.time.time()
    for seconds, expected in (
        (0, set(events[:3])),
        (-600, set(events[:3])),
        (DAY_SECONDS, set(events[:3])),
        (3 * DAY_SECONDS, set()),
    ):
        monkeypatch.setattr(state_store.time, "time", lambda seconds=seconds: now + seconds)
        ann, bob = store.get({"ann": events, "bob": events})
        assert ann is not None
        assert bob is not None
        assert (ann.events, bob.events) == (expected, set())
    assert put(store, "ann", b"2", expected=1)  # a put, on which the store may clear old events


def test_a_thousand_events_of_one_user_are_kept(store: StateStore) -> None:
    events = [number * 7_919 for number in range(1_200)]
    store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION, events=events)])
    (stored,) = store.get({"ann": [*events, 1]})
    assert stored is not None
    assert stored.events == set(events)


def test_the_last_pieces_of_a_log_are_read_and_the_heard_songs(store: StateStore) -> None:
    pieces = [Piece(number + 1, str(number).encode()) for number in range(5)]
    store.put([Change(user_id="ann", state=b"1", expected=NO_VERSION, append=pieces, heard=b"songs")])
    for plays, log in ((1, ["4"]), (5, ["4"]), (6, ["3", "4"]), (15, ["0", "1", "2", "3", "4"]), (0, [])):
        (full_user,) = store.read(["ann"], plays=plays)
        assert full_user is not None
        assert [piece.decode() for piece in full_user.log] == log
        assert full_user.heard == b"songs"
    put(store, "ann", b"2", expected=1)
    assert store.read(["ann"])[0].heard == b"songs"  # type: ignore[union-attr]
    put(store, "ann", b"3", expected=2, restart=True)
    assert store.read(["ann"])[0].heard is None  # type: ignore[union-attr]


def test_a_deleted_user_leaves_a_state_and_the_last_days_events_and_no_writer_goes_on(store: StateStore) -> None:
    change = Change(user_id="ann", state=b"1", expected=NO_VERSION, append=[Piece(1, b"x")], heard=b"y", events=[5])
    store.put([change])
    for user, version in (("ann", 2), ("nobody", 1)):
        store.forget([user], b"mark")
        assert contents(store, user) == (version, b"mark", [])
        assert not put(store, user, b"late", expected=version - 1)
    (ann,) = store.get({"ann": [5, 6]})
    assert ann is not None
    assert ann.events == {5}


def test_a_deletion_covers_the_given_namespaces_and_no_other(uri: str, tmp_path: Path) -> None:
    secret = b"a play of ann " * 100
    stores = {name: open_store(uri, name) for name in ("old", "older", "new", "foreign")}
    for name in ("old", "older", "foreign"):
        for user in ("ann", "bob"):
            text = f"{user} of {name}".encode()
            put(stores[name], user, secret + text, expected=NO_VERSION, append=secret + text)
    stores["new"].forget(["ann"], b"mark", ["old", "older", "new"])
    stores["new"].rewrite()
    assert contents(stores["new"], "ann") == (1, b"mark", [])
    for name in ("old", "older"):
        assert contents(stores[name], "ann") == (2, b"mark", [])
    for user, name in (("ann", "foreign"), *(("bob", name) for name in ("old", "older", "foreign"))):
        text = secret + f"{user} of {name}".encode()
        assert contents(stores[name], user) == (1, text, [text])
    for opened_store in stores.values():
        opened_store.close()
    assert not any(secret + b"ann of old" in path.read_bytes() for path in tmp_path.iterdir())


def test_no_byte_of_a_deleted_user_stays_in_an_sqlite_file(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/states.sqlite", "n")
    secret = b"a play of ann " * 100
    for version in range(6):
        put(store, "ann", secret, expected=version, append=secret)
    read_files = lambda: b"".join(path.read_bytes() for path in tmp_path.iterdir())  # noqa: E731
    assert b"play of ann" in read_files()
    store.forget(["ann"], b"mark")
    store.close()
    assert b"play of ann" not in read_files()


def test_many_new_users_are_added_at_once_and_existing_ones_stay(store: StateStore) -> None:
    put(store, "user-7", b"old", expected=NO_VERSION, append=b"old log")
    changes = [
        Change(
            user_id=f"user-{number}",
            state=b"state %d" % number,
            expected=NO_VERSION,
            append=[Piece(2, b"piece %d.%d" % (number, piece)) for piece in range(number % 4)],
            heard=b"heard" if number % 5 == 0 else None,
        )
        for number in range(250)
    ]
    assert store.put(changes) == [number != 7 for number in range(250)]
    assert store.put(changes[:2]) == [False, False]
    assert contents(store, "user-7") == (1, b"old", [b"old log"])
    for number in (0, 3, 100, 101, 249):
        (full_user,) = store.read([f"user-{number}"], plays=None)
        assert full_user is not None
        assert (full_user.stored.version, full_user.stored.state) == (1, b"state %d" % number)
        assert full_user.log == [b"piece %d.%d" % (number, piece) for piece in range(number % 4)]
        assert full_user.heard == (b"heard" if number % 5 == 0 else None)


def test_a_reader_that_keeps_old_pages_of_an_sqlite_file_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayrec.online.sqlite_store.WAIT_SECONDS", 0.1)
    store, secret = open_store(f"sqlite:///{tmp_path}/states.sqlite", "n"), b"a play of ann " * 100
    put(store, "ann", secret, expected=NO_VERSION)
    reader = sqlite3.connect(tmp_path / "states.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT COUNT(*) FROM users").fetchall()
    store.forget(["ann"], b"mark")
    with pytest.raises(StoreUnavailableError, match="busy with readers; try again"):
        store.rewrite()
    reader.close()
    store.rewrite()
    assert all(b"play of ann" not in path.read_bytes() for path in tmp_path.iterdir())
    store.close()


@needs_redis
def test_no_byte_of_a_deleted_user_stays_in_the_files_of_redis(tmp_path: Path) -> None:
    import redis as package

    server = RedisServer(tmp_path)
    server.start()
    try:
        store = open_store(server.uri, "n")
        secret = random.Random(0).randbytes(500)  # random, so that compression does not shorten it
        for user in ("ann", "bob"):
            put(store, user, secret + user.encode(), expected=NO_VERSION, append=secret)
        with package.Redis("127.0.0.1", server.port) as client:
            client.save()
        files = lambda: [path.name for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]  # noqa: E731
        assert len(files()) == 2  # the snapshot and the log
        store.forget(["ann", "bob"], b"mark")
        store.rewrite()
        assert files() == []
        assert contents(store, "ann")[1] == b"mark"
        store.close()
    finally:
        server.kill()


def test_a_store_opened_again_reads_what_was_written(store: StateStore, uri: str, namespace: str) -> None:
    put(store, "ann", b"1", expected=NO_VERSION, append=b"log")
    reopened = open_store(uri, namespace)
    try:
        assert contents(reopened, "ann") == (1, b"1", [b"log"])
    finally:
        reopened.close()


def add_lines(store: StateStore, writer: int) -> None:
    """Append PUTS lines to one user's log, each on the version just read, and again if another writer was faster."""
    for turn in range(PUTS):
        is_stored = False
        while not is_stored:
            stored = get(store, "ann")
            version, count = (NO_VERSION, 0) if stored is None else (stored.version, int(stored.state))
            is_stored = put(store, "ann", str(count + 1).encode(), expected=version, append=f"{writer}-{turn}".encode())


def require_all_lines(store: StateStore) -> None:
    (full_user,) = store.read(["ann"])
    assert full_user is not None
    assert (full_user.stored.version, int(full_user.stored.state)) == (WRITERS * PUTS, WRITERS * PUTS)
    lines = [piece.decode() for piece in full_user.log]
    assert sorted(lines) == sorted(f"{writer}-{turn}" for writer in range(WRITERS) for turn in range(PUTS))
    for writer in range(WRITERS):  # each writer's lines are in the order of writing
        assert [line for line in lines if line.startswith(f"{writer}-")] == [f"{writer}-{turn}" for turn in range(PUTS)]


def test_threads_that_write_to_one_user_lose_nothing(store: StateStore) -> None:
    threads = [threading.Thread(target=add_lines, args=(store, writer)) for writer in range(WRITERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    require_all_lines(store)


PROGRAM = """
import sys
from rayrec.online.state_store import NO_VERSION, Change, Piece, open_store
uri, namespace, writer, puts = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
store = open_store(uri, namespace)
for turn in range(puts):
    done = False
    while not done:
        (stored,) = store.get({"ann": []})
        version, count = (NO_VERSION, 0) if stored is None else (stored.version, int(stored.state))
        line = f"{writer}-{turn}".encode()
        state = str(count + 1).encode()
        (done,) = store.put([Change(user_id="ann", state=state, expected=version, append=[Piece(1, line)])])
"""


def test_processes_that_write_to_one_user_lose_nothing(store: StateStore, uri: str, namespace: str) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, uri, namespace, str(writer), str(PUTS)])
        for writer in range(WRITERS)
    ]
    assert [writer.wait(timeout=300) for writer in writers] == [0] * WRITERS
    require_all_lines(store)


WRITES_FOR_EVER = """
import sys
from rayrec.online.state_store import NO_VERSION, Change, Piece, open_store
store = open_store(sys.argv[1], sys.argv[2])
version = NO_VERSION
while True:
    text = str(version + 1).encode()
    assert store.put([Change(user_id="ann", state=text, expected=version, append=[Piece(1, text)])]) == [True]
    version += 1
    print(version, flush=True)
"""


def test_what_was_acknowledged_survives_the_kill_of_the_writer(store: StateStore, uri: str, namespace: str) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITES_FOR_EVER, uri, namespace], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    lines = [writer.stdout.readline() for _ in range(30)]
    writer.kill()
    lines += writer.stdout.readlines()
    writer.wait()
    acknowledged_version = max(int(line) for line in lines if line.endswith("\n"))
    (full_user,) = store.read(["ann"])
    assert full_user is not None
    assert acknowledged_version <= full_user.stored.version <= acknowledged_version + 1
    assert full_user.log == [str(number + 1).encode() for number in range(full_user.stored.version)]
    assert int(full_user.stored.state) == full_user.stored.version


@needs_redis
def test_what_redis_acknowledged_survives_the_kill_of_its_server(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    store = open_store(server.uri, "n")
    try:
        for version in range(40):
            assert put(store, "ann", str(version + 1).encode(), expected=version, append=b"x")
        server.kill()
        with pytest.raises(StoreUnavailableError, match="try again"):
            get(store, "ann")
        server.start()
        assert contents(store, "ann") == (40, b"40", [b"x"] * 40)
        assert put(store, "ann", b"41", expected=40)  # the restarted server lacks the script: it is sent again
    finally:
        store.close()
        server.kill()


@needs_redis
def test_a_redis_that_may_lose_plays_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        open_store(server.uri, "n").close()
        assert not caplog.records
        import redis

        redis.Redis(port=server.port).config_set("appendfsync", "everysec")
        open_store(server.uri, "n").close()
        assert "appendfsync everysec: acknowledged plays may be lost" in caplog.text
    finally:
        server.kill()


@needs_redis
@pytest.mark.parametrize(
    ("maxmemory", "policy", "lost"),
    [
        ("0", "allkeys-lru", None),
        ("1gb", "noeviction", None),
        ("1gb", "allkeys-lru", "it deletes users' plays when its memory is full"),
        ("1gb", "volatile-lru", "it deletes event IDs when its memory is full, so that plays sent again count twice"),
    ],
)
def test_a_redis_that_evicts_keys_causes_a_warning_of_what_is_lost(
    redis: RedisServer, caplog: pytest.LogCaptureFixture, maxmemory: str, policy: str, lost: str | None
) -> None:
    try:
        redis.ask("CONFIG", "SET", "maxmemory", maxmemory)
        redis.ask("CONFIG", "SET", "maxmemory-policy", policy)
        open_store(redis.uri, "n").close()
        warnings = [message for message in caplog.messages if "set maxmemory-policy noeviction" in message]
        assert len(warnings) == (lost is not None)
        assert (lost or "") in caplog.text
    finally:
        redis.ask("CONFIG", "SET", "maxmemory", "0")
        redis.ask("CONFIG", "SET", "maxmemory-policy", "noeviction")


@needs_redis
@pytest.mark.parametrize("names", [["ann"], ["ann", "bob"]])
def test_a_new_user_does_not_get_the_log_of_a_hash_that_redis_has_evicted(
    redis: RedisServer, namespace: str, names: list[str]
) -> None:
    redis.empty()
    store = open_store(redis.uri, namespace)
    for name in names:
        put(store, name, b"1", expected=NO_VERSION, append=b"old")
    redis.ask("DEL", *[key for key in redis.ask("KEYS", "*") if redis.ask("TYPE", key) == b"hash"])
    assert store.read(names) == [None] * len(names)
    changes = [Change(user_id=name, state=b"2", expected=NO_VERSION, append=[Piece(1, b"new")]) for name in names]
    assert store.put(changes) == [True] * len(names)
    assert [contents(store, name) for name in names] == [(1, b"2", [b"new"])] * len(names)
    store.close()


def test_an_sqlite_commit_waits_for_the_disk_and_only_loads_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put of thousands of users waits too, unless it is part of a load. `synchronous` is 2 for FULL, 1 for NORMAL."""
    connections: list[sqlite3.Connection] = []
    connect = sqlite3.connect
    monkeypatch.setattr(
        sqlite3,
        "connect",
        lambda *arguments, **options: connections.append(connect(*arguments, **options)) or connections[-1],
    )

    def settings() -> list[tuple[int, str, int]]:
        names = ("synchronous", "journal_mode", "cache_size")
        return [tuple(database.execute(f"PRAGMA {name}").fetchone()[0] for name in names) for database in connections]  # type: ignore[misc]

    store = open_store(f"sqlite:///{tmp_path}/states.sqlite", "n")
    changes = [Change(user_id=f"user {row}", state=b"s", expected=NO_VERSION) for row in range(3_000)]
    store.put(changes[:2_000])
    (serving_settings,) = settings()
    assert serving_settings[:2] == (2, "wal")
    store.put(changes[2_000:], loading=True)
    store.mark_loaded("t", 0, "done")
    assert settings() == [serving_settings, (1, "wal", -(128 << 10))]
    store.close()


def test_an_sqlite_store_that_is_locked_for_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayrec.online.sqlite_store.WAIT_SECONDS", 0.1)
    path = tmp_path / "states.sqlite"
    store = open_store(f"sqlite:///{path}", "n")
    other_connection = sqlite3.connect(path, isolation_level=None)
    other_connection.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="locked; try again"):
        put(store, "ann", b"1", expected=NO_VERSION)
    assert get(store, "ann") is None  # reading does not wait
    other_connection.close()
    assert put(store, "ann", b"1", expected=NO_VERSION)
    store.close()


def test_a_thread_that_ends_leaves_no_open_sqlite_file(tmp_path: Path) -> None:
    def count_open_files() -> int:
        return sum(Path(file.path).parent == tmp_path for file in psutil.Process().open_files())

    store = open_store(f"sqlite:///{tmp_path}/users.sqlite", "n")
    store.add_songs({"song": b"1"}, most=1, first_number=0)
    file_count = count_open_files()
    assert file_count
    for _ in range(20):
        thread = threading.Thread(target=store.songs_since, args=[0])
        thread.start()
        thread.join()
    assert count_open_files() <= 2 * file_count  # this thread's, and at most one other's
    assert store.songs_since(0)[1][0].song_id == "song"
    store.close()
    assert not count_open_files()


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    text_file = tmp_path / "notes.txt"
    text_file.write_text("no database " * 100)
    with pytest.raises(InputError, match=r"notes.txt cannot be opened: file is not a database"):
        open_store(f"sqlite:///{text_file}", "n")
    foreign_connection = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign_connection.execute("CREATE TABLE other (x)")
    foreign_connection.commit()
    foreign_connection.close()
    with pytest.raises(InputError, match="its format is 0, this rayrec reads 4"):
        open_store(f"sqlite:///{tmp_path}/foreign.sqlite", "n")


@pytest.mark.parametrize(
    "uri",
    ["", "states.sqlite", "postgres://here/x", "sqlite://", "sqlite:///", "sqlite://host/path", "redis://h:port/0"],
)
def test_an_invalid_address_is_refused_with_a_valid_example(uri: str) -> None:
    with pytest.raises(InputError, match=r"sqlite:///(PATH|relative/path) |not a valid address of a Redis server"):
        open_store(uri, "n")


def test_the_error_of_an_unreachable_redis_hides_its_password() -> None:
    pytest.importorskip("redis", reason="no redis: pip install 'rayrec[redis]'")
    with pytest.raises(StoreUnavailableError, match=r"store redis://\.\.\.@127.0.0.1:1/0 does not answer") as error:
        open_store("redis://:secret@127.0.0.1:1/0", "n")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "redis://:1/secret@127.0.0.1:1/0",
        "redis://:se#cret@127.0.0.1:1/0",
        "redis://:se?cret@127.0.0.1:1/0",
        "redis://[:secret@127.0.0.1",
        "redis:/:secret@127.0.0.1",
        "redis://127.0.0.1:port/0?password=secret",
        "redis+tls://:se/cret@127.0.0.1:1/0",
        "sqlite://ann:secret@host/path",
        "sqlite://[secret@path",
    ],
)
def test_the_error_of_an_invalid_address_hides_its_password_and_says_where_passwords_go(uri: str) -> None:
    pytest.importorskip("redis", reason="no redis: pip install 'rayrec[redis]'")
    with pytest.raises(InputError, match=r"RAYREC_REDIS_PASSWORD|give sqlite:///") as error:
        open_store(uri, "n")
    assert "cret" not in str(error.value)
    assert not absolute_uri(uri).startswith("sqlite:///")
    assert store_exists(uri)


def test_a_relative_path_starts_at_the_folder_where_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = ServeConfig(store="sqlite:///some folder/100%25.sqlite")
    monkeypatch.chdir("/")
    assert ServeConfig(store=config.store).store == config.store
    open_store(str(config.store), "n").close()
    assert (tmp_path / "some folder" / "100%.sqlite").exists()
    for uri in ("redis://here:1/0", "sqlite:///", "sqlite://host/path", "nonsense"):
        assert ServeConfig(store=uri).store == uri
