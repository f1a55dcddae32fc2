"""Plays of stored users, compared with a simple model of the store: each event counts once, whatever happens."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from networks import NUM_SONGS, model_config, network

from rayrec.data.histories import Histories
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import States
from rayrec.online import state_store
from rayrec.online.redis_store import RedisStore
from rayrec.online.sqlite_store import SqliteStore
from rayrec.online.state_codec import pack_heard, pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.state_store import (
    NO_VERSION,
    Change,
    FullUser,
    Piece,
    StateStore,
    Stored,
    StoreUnavailableError,
    open_store,
)
from rayrec.online.user_state import WINDOW, Outcome, Plays, UserState, join_plays
from rayrec.recommend.base import LATEST_PLAYS
from rayrec.serving.telemetry import Metrics
from rayrec.serving.users import THREADS, StoredUsers, UserPlays
from rayrec.storage.workspace import Workspace

ENCODERS = {name: TasteEncoder(network(model_config(), seed=seed)) for seed, name in enumerate(("m1", "m2"))}
BEGIN = 1_700_000_000_000
USERS = ("ann", "bob")
STATE_TOLERANCE = 1e-6  # tolerance, as a share of the largest number of a network state


class NetworkParts:
    """Runs a network, as the parts of a release do."""

    def __init__(self, encoder: TasteEncoder) -> None:
        self._encoder = encoder

    def states(self, plays: Histories, start: States | None = None) -> States:
        """Return the network states after `plays`."""
        return self._encoder.run(plays, start=start)[1]


class SameThreadPool:
    """Runs work on the thread of the event loop, after other tasks had a turn."""

    async def run(self, work: Callable[..., States], *args: Any) -> States:
        """Return the result of `work`."""
        await asyncio.sleep(0)
        return work(*args)


def release(model: str) -> Any:
    """Return an imitation of a live release, with only the attributes that `StoredUsers` needs."""
    engine = SimpleNamespace(parts=NetworkParts(ENCODERS[model]), pool=SameThreadPool())
    catalog = SimpleNamespace(lineage="n", rows_of_stored=lambda stored: stored)
    online = SimpleNamespace(missing=lambda stored: False, count=0)
    return SimpleNamespace(model_id=model, engine=engine, catalog=catalog, online=online)


def replica(workspace: Workspace, uri: str) -> StoredUsers:
    return StoredUsers(workspace, uri, Metrics("replica"))


@dataclass
class Event:
    """A play, as clients keep it to send it once or several times."""

    id: str
    user: str
    song: int
    played_at: int


@dataclass
class World:
    """Clients, two replicas with one store, and the events that the store must hold."""

    workspace: Workspace
    uri: str
    seed: int
    events: dict[str, Event] = field(default_factory=dict)
    stored_ids: set[str] = field(default_factory=set)  # acknowledged as taken or repeated
    model: str = "m1"
    moment: int = BEGIN  # of the last batch whose plays are all of one moment
    loses_next_answer: bool = False  # True if the next answer of the store gets lost
    steps_to_live: int = 0  # begins and ends of store calls until the first replica is killed; 0: never

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.store = open_store(self.uri, "n")
        self.replicas = [replica(self.workspace, self.uri) for _ in range(2)]
        self.running_tasks: list[set[asyncio.Task[Any]]] = [set(), set()]  # tasks of each replica
        self.dead_replicas: list[StoredUsers] = []
        self.step_lock = threading.Lock()

    def new_events(self) -> list[Event]:
        """Return 1 to 400 plays, in order or late, or 300 plays of one moment, perhaps that of an earlier batch."""
        if self.random.random() < 0.3:
            self.moment = self.random.choice([self.moment, self._now()])
            return [self._new_event(self.moment) for _ in range(300)]
        size, spread = self.random.choice([1, 2, 7, 150, 400]), self.random.choice([0, 1, 3_600_000])
        return [self._new_event(self._now() - self.random.randint(0, spread * 20)) for _ in range(size)]

    def _now(self) -> int:
        return BEGIN + (len(self.events) // 50) * 600_000

    def _new_event(self, at: int) -> Event:
        event = Event(f"e{len(self.events)}", self.random.choice(USERS), self.random.randrange(NUM_SONGS), at)
        self.events[event.id] = event
        return event

    def retries(self) -> list[Event]:
        """Return random events that were sent before, acknowledged or not."""
        ids = list(self.events)
        return [self.events[self.random.choice(ids)] for _ in range(self.random.randint(1, 300))] if ids else []

    def send(self, batches: Sequence[list[Event]]) -> None:
        """Send all batches at once, alternately to both replicas, and check the outcomes.

        Batches with new plays must all be the same batch.
        """

        async def send_all() -> list[Any]:
            self.loop = asyncio.get_running_loop()
            return await asyncio.gather(
                *(self._take(number % 2, batch) for number, batch in enumerate(batches) if batch)
            )

        times_counted: Counter[str] = Counter()
        stored_before, held_plays = set(self.stored_ids), {user: self._held_plays(user) for user in USERS}
        for events, outcomes in asyncio.run(send_all()):
            for event, outcome in zip(events, outcomes, strict=True):
                if outcome == "rejected":
                    num_later = np.count_nonzero(held_plays[event.user].played_at > event.played_at)
                    assert num_later >= WINDOW, f"{event.id} is rejected, with {num_later} later plays"
                else:
                    self.stored_ids.add(event.id)
                if outcome != "repeated":
                    assert event.id not in stored_before, f"{event.id} counts twice"
                if outcome == "taken":
                    times_counted[event.id] += 1
        assert set(times_counted.values()) <= {1}
        while self.dead_replicas:
            self.dead_replicas.pop().close()

    async def _take(self, replica_number: int, events: list[Event]) -> tuple[list[Event], list[str]]:
        """Send a batch until it is answered, to the other replica if one dies; return its events and their outcomes."""
        by_user: dict[str, list[Event]] = {}
        for event in events:
            by_user.setdefault(event.user, []).append(event)
        plays_by_user = {user: user_plays(user_events) for user, user_events in by_user.items()}
        for _ in range(3):
            task = asyncio.ensure_future(self.replicas[replica_number].take(release(self.model), plays_by_user))
            running_tasks = self.running_tasks[replica_number]
            running_tasks.add(task)
            try:
                outcomes = await task
                break
            except StoreUnavailableError:
                continue
            except asyncio.CancelledError:
                replica_number = 1 - replica_number
            finally:
                running_tasks.discard(task)
        return [event for user_events in by_user.values() for event in user_events], [
            outcome for user in by_user for outcome in outcomes[user]
        ]

    def step(self) -> None:
        """Count the begin or the end of a store call, and kill the first replica when `steps_to_live` reaches 0."""
        with self.step_lock:
            if self.steps_to_live:
                self.steps_to_live -= 1
                if not self.steps_to_live:
                    self.loop.call_soon_threadsafe(self._kill_first_replica)

    def _kill_first_replica(self) -> None:
        """Kill the first replica with all its tasks; store calls that have begun may still finish."""
        for task in self.running_tasks[0]:
            task.cancel()
        self.dead_replicas.append(self.replicas[0])
        self.replicas[0] = replica(self.workspace, self.uri)

    def restart_a_replica(self) -> None:
        """Replace a replica that has no task in progress by a new one."""
        replica_number = self.random.randrange(2)
        self.replicas[replica_number].close()
        self.replicas[replica_number] = replica(self.workspace, self.uri)

    def check(self) -> None:
        """Check that the store holds every event once, and that both models' states equal those of a batch run."""
        for user, full_user in zip(USERS, self.store.read(USERS), strict=True):
            user_events = [event for event in self.events.values() if event.user == user]
            if full_user is None:
                assert not user_events
                continue
            state, held_plays = unpack_state(full_user.stored.state), self._held_plays(user)
            assert state.plays == len(held_plays)
            play_counts = Counter(zip(held_plays.songs.tolist(), held_plays.played_at.tolist(), strict=True))
            assert play_counts == Counter(
                (event.song, event.played_at) for event in user_events if event.id in self.stored_ids
            )
            assert sorted(held_plays.played_at) == held_plays.played_at.tolist()
            for model, encoder in ENCODERS.items():
                (stored_user,) = asyncio.run(self.replicas[0].read(release(model), [user]))
                assert stored_user is not None
                batch_states = encoder.run(join_plays([held_plays]))[1]
                np.testing.assert_allclose(
                    stored_user.states.hidden,
                    batch_states.hidden,
                    rtol=1e-5,
                    atol=STATE_TOLERANCE * np.abs(batch_states.hidden).max(),
                )
        for stored_users in self.replicas:
            stored_users.close()
        self.store.close()

    def _held_plays(self, user: str) -> Plays:
        """Return all plays of a user in the store."""
        (full_user,) = self.store.read([user])
        if full_user is None:
            return Plays.of([], [])
        return Plays.concatenate([unpack_plays(full_user.log), unpack_state(full_user.stored.state).window])


def plays_of_request(plays: Plays, events: Sequence[str]) -> UserPlays:
    """Return plays as they come from a request, none of them a like."""
    return UserPlays(plays=plays, events=events, liked=np.zeros(len(events), dtype=bool))


def user_plays(events: list[Event]) -> UserPlays:
    plays = Plays.of([event.song for event in events], [event.played_at for event in events])
    return plays_of_request(plays, [event.id for event in events])


@pytest.mark.parametrize("seed", range(4))
def test_an_event_counts_once_whatever_happens(
    workspace: Workspace, uri: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of any size and of one moment, retries, late plays, two writers at once, lost answers, replicas that are
    killed while they work, restarts, changes of release."""
    world = World(workspace, uri, seed)
    for store_class in (SqliteStore, RedisStore):

        def put_and_lose(self: Any, changes: Sequence[Change], put: Any = store_class.put) -> list[bool]:
            world.step()
            results = put(self, changes)
            world.step()
            if world.loses_next_answer:
                world.loses_next_answer = False
                raise StoreUnavailableError("the answer was lost")
            return results

        def get_in_steps(
            self: Any, users: Mapping[str, Sequence[int]], get: Any = store_class.get
        ) -> list[Stored | None]:
            world.step()
            stored = get(self, users)
            world.step()
            return stored

        monkeypatch.setattr(store_class, "put", put_and_lose)
        monkeypatch.setattr(store_class, "get", get_in_steps)
    now = state_store.time.time()
    for turn in range(25):
        monkeypatch.setattr(state_store.time, "time", lambda turn=turn: now + turn * 50 * 60)  # 21 hours in total
        action = world.random.choice(["new", "new", "retry", "race", "lose", "kill", "kill", "restart", "release"])
        if action == "restart":
            world.restart_a_replica()
        elif action == "kill":
            world.steps_to_live = world.random.randint(1, 4)  # before or after a get or a put
            world.send([world.new_events(), world.random.choice([[], world.retries()])])
            assert not world.steps_to_live
        elif action == "release":
            world.model = {"m1": "m2", "m2": "m1"}[world.model]
        elif action == "race":
            batch = world.new_events()
            world.send([batch, batch, world.retries()])
        elif action == "retry":
            world.send([world.retries()])
        else:
            world.loses_next_answer = action == "lose"  # the client sends the batch again
            world.send([world.new_events()])
    world.check()


def test_the_same_batch_sent_again_is_repeated_and_other_events_are_not(workspace: Workspace, uri: str) -> None:
    """200 plays without times, so all of one moment; then the same events again; then 1,000 other events."""
    users = replica(workspace, uri)

    def take(event_ids: Sequence[str]) -> Counter[str]:
        plays = Plays.of(np.arange(len(event_ids)) % 3, np.full(len(event_ids), BEGIN))
        plays_by_user = {"ann": plays_of_request(plays, event_ids)}
        return Counter(asyncio.run(users.take(release("m1"), plays_by_user))["ann"])

    first_ids = [f"a{number}" for number in range(200)]
    assert take(first_ids) == {"taken": 200}
    assert take(first_ids) == {"repeated": 200}
    assert take([f"b{number}" for number in range(1_000)]) == {"taken": 1_000}
    users.close()


def test_a_user_with_many_plays_is_read_by_the_last_of_them_and_no_song_is_forgotten(
    workspace: Workspace, uri: str
) -> None:
    users, count = replica(workspace, uri), 3 * LATEST_PLAYS
    songs = np.random.default_rng(0).integers(0, 50, count)
    songs[:10] = np.arange(50, 60)  # heard only at the beginning
    for start in range(0, count, 1_000):
        positions = np.arange(start, start + 1_000)
        plays = Plays.of(songs[positions], BEGIN + positions * 60_000)
        plays_by_user: Mapping[str, UserPlays] = {
            "ann": plays_of_request(plays, [str(position) for position in positions])
        }
        asyncio.run(users.take(release("m1"), plays_by_user))
    for model in ("m1", "m2"):
        (stored_user,) = asyncio.run(users.read(release(model), ["ann"]))
        assert stored_user is not None
        assert stored_user.state.plays == count
        assert LATEST_PLAYS <= len(stored_user.plays) <= LATEST_PLAYS + 1_200
        assert set(stored_user.heard) | set(stored_user.plays.songs) == set(songs)
        # The first model saw every play; the state of the second one is computed from the plays that are read.
        seen_plays = Plays.of(songs, BEGIN + np.arange(count) * 60_000) if model == "m1" else stored_user.plays
        batch_states = ENCODERS[model].run(join_plays([seen_plays]))[1]
        np.testing.assert_allclose(
            stored_user.states.hidden,
            batch_states.hidden,
            rtol=1e-5,
            atol=STATE_TOLERANCE * np.abs(batch_states.hidden).max(),
        )
    users.close()


def test_ten_million_plays_are_read_like_six_thousand_but_for_a_set_of_two_bytes_a_song(
    workspace: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user with ten million plays has heard a million songs of a catalog of five million."""
    users, store, size = replica(workspace, uri), open_store(uri, "n"), 1_024
    songs = np.random.default_rng(0).integers(0, 50, size)
    heard_songs = {
        "few": np.arange(60, dtype=np.int32),
        "many": np.flatnonzero(np.random.default_rng(1).random(5_000_000) < 0.2).astype(np.int32),
    }
    for user, pieces in (("few", 6), ("many", 9_766)):
        count = pieces * size
        log = [
            Piece(size, pack_plays(Plays.of(songs, BEGIN + np.arange(end - size, end) * 60_000)))
            for end in range(size, count + 1, size)
        ]
        state = UserState(before_at=BEGIN + (count - 1) * 60_000, log_plays=count, folded=count - LATEST_PLAYS // 2)
        packed_heard = pack_heard(heard_songs[user])
        assert len(packed_heard) < 2 * len(heard_songs[user])
        change = Change(user_id=user, state=pack_state(state), expected=NO_VERSION, append=log, heard=packed_heard)
        assert store.put([change]) == [True]
    read, pieces_read, bytes_read = type(store).read, list[int](), list[int]()

    def read_and_count(self: StateStore, names: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        full_users = read(self, names, plays=plays)
        for full_user in full_users:
            assert full_user is not None
            pieces_read.append(len(full_user.log))
            bytes_read.append(len(full_user.stored.state) + sum(map(len, full_user.log)))
        return full_users

    monkeypatch.setattr(type(store), "read", read_and_count)
    for user in ("few", "many"):
        (stored_user,) = asyncio.run(users.read(release("m1"), [user]))
        assert stored_user is not None
        assert len(stored_user.plays) == 5 * size
        np.testing.assert_array_equal(stored_user.heard, heard_songs[user])
    assert pieces_read == [5, 5]
    assert bytes_read[1] == pytest.approx(bytes_read[0], rel=0.01)
    users.close()
    store.close()


def test_a_deleted_user_is_unknown_until_a_play_from_after_the_deletion(workspace: Workspace, uri: str) -> None:
    users, live = replica(workspace, uri), release("m1")

    def take(event: str, at: int) -> list[str]:
        plays_by_user = {"ann": plays_of_request(Plays.of([1], [at]), [event])}
        return list(asyncio.run(users.take(live, plays_by_user))["ann"])

    assert take("a", BEGIN) == ["taken"]
    asyncio.run(users.forget(live, "ann", BEGIN + 10))
    assert asyncio.run(users.read(live, ["ann"])) == [None]
    assert take("b", BEGIN + 5) == ["rejected"]
    assert take("a", BEGIN + 20) == ["repeated"]  # sent again without a time: it counts as played now
    assert asyncio.run(users.read(live, ["ann"])) == [None]
    assert take("c", BEGIN + 20) == ["taken"]
    (stored_user,) = asyncio.run(users.read(live, ["ann"]))
    assert stored_user is not None
    assert stored_user.plays.played_at.tolist() == [BEGIN + 20]
    users.close()


def test_stored_plays_are_reported_even_if_the_client_disconnects_meanwhile(
    workspace: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, live, reports = replica(workspace, uri), release("m1"), list[tuple[str, list[Outcome]]]()
    store_class, has_begun, may_end = type(users.store("n")), threading.Event(), threading.Event()
    put = store_class.put

    def slow_put(self: Any, changes: Sequence[Change]) -> list[bool]:
        has_begun.set()
        assert may_end.wait(60)
        return put(self, changes)

    monkeypatch.setattr(store_class, "put", slow_put)

    async def leave() -> None:
        plays_by_user = {"ann": plays_of_request(Plays.of([1, 2], [BEGIN, BEGIN + 1]), ["a", "b"])}
        task = asyncio.ensure_future(
            users.take(live, plays_by_user, lambda user, outcomes: reports.append((user, outcomes)))
        )
        assert await asyncio.to_thread(has_begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not reports
        may_end.set()
        for _ in range(6_000):
            if not reports:
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert reports == [("ann", ["taken", "taken"])]
    users.close()


def test_a_user_is_deleted_even_if_the_client_disconnects_meanwhile(
    workspace: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, live, has_begun, may_end = replica(workspace, uri), release("m1"), threading.Event(), threading.Event()

    def slow_mark_forgotten(*_: Any) -> None:
        has_begun.set()
        assert may_end.wait(60)

    monkeypatch.setattr("rayrec.serving.users.mark_forgotten", slow_mark_forgotten)

    async def leave() -> None:
        await users.take(live, {"ann": plays_of_request(Plays.of([1], [BEGIN]), ["a"])})
        task = asyncio.ensure_future(users.forget(live, "ann", BEGIN + 10))
        assert await asyncio.to_thread(has_begun.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        may_end.set()

    asyncio.run(leave())
    users.close()  # waits for its threads
    reader = replica(workspace, uri)
    assert asyncio.run(reader.read(live, ["ann"])) == [None]
    reader.close()


def test_a_user_is_deleted_even_if_the_client_disconnects_while_all_threads_for_the_store_are_busy(
    workspace: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, live, may_end = replica(workspace, uri), release("m1"), threading.Event()
    store_class = type(users.store("n"))
    read, are_busy = store_class.read, threading.Barrier(THREADS + 1)

    def slow_read(self: Any, user_ids: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        are_busy.wait(60)
        assert may_end.wait(60)
        full_users: list[FullUser | None] = read(self, user_ids, plays=plays)
        return full_users

    async def leave() -> None:
        await users.take(live, {"ann": plays_of_request(Plays.of([1], [BEGIN]), ["a"])})
        with monkeypatch.context() as patch:
            patch.setattr(store_class, "read", slow_read)
            reads = [asyncio.ensure_future(users.read(live, ["bob"])) for _ in range(THREADS)]
            await asyncio.to_thread(are_busy.wait, 60)
            task = asyncio.ensure_future(users.forget(live, "ann", BEGIN + 10))
            for _ in range(10):  # turns of the event loop, in which the deletion gets in line for a thread
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            may_end.set()
            await asyncio.gather(*reads)

    asyncio.run(leave())
    users.close()  # waits for its threads
    reader = replica(workspace, uri)
    assert asyncio.run(reader.read(live, ["ann"])) == [None]
    reader.close()
