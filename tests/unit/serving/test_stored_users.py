"""Plays of stored users, compared with a simple model of the store: each event counts once, whatever happens."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
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
from rayrec.online.user_state import LAST_PLAYS, WINDOW, Outcome, Plays, UserState
from rayrec.serving.telemetry import Metrics
from rayrec.serving.users import StoredUsers, UserPlays
from rayrec.storage.workspace import Workspace

ENCODERS = {name: TasteEncoder(network(model_config(), seed=seed)) for seed, name in enumerate(("m1", "m2"))}
BEGIN = 1_700_000_000_000
USERS = ("ann", "bob")
STORED = 1e-6  # tolerance, as a share of the largest number of a network state


class NetworkEngine:
    """Runs a network, as the engine of a release does."""

    def __init__(self, encoder: TasteEncoder) -> None:
        self._encoder = encoder

    async def states(self, plays: Histories, start: States | None = None) -> States:
        """Return the network states after `plays`."""
        await asyncio.sleep(0)
        return self._encoder.run(plays, start=start)[1]


def release(model: str) -> Any:
    """Return an imitation of a live release, with only the attributes that `StoredUsers` needs."""
    engine = NetworkEngine(ENCODERS[model])
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
    taken: set[str] = field(default_factory=set)  # acknowledged as taken
    stored: set[str] = field(default_factory=set)  # acknowledged with any outcome
    model: str = "m1"
    moment: int = BEGIN  # of the last batch whose plays are all of one moment
    lost: bool = False  # True if the next answer of the store gets lost
    steps_to_live: int = 0  # begins and ends of store calls until the first replica is killed; 0: never

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.store = open_store(self.uri, "n")
        self.replicas = [replica(self.workspace, self.uri) for _ in range(2)]
        self.at_work: list[set[asyncio.Task[Any]]] = [set(), set()]  # tasks of each replica
        self.dead: list[StoredUsers] = []
        self.counting = threading.Lock()

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

        async def all_at_once() -> list[Any]:
            self.loop = asyncio.get_running_loop()
            return await asyncio.gather(*(self._take(turn % 2, batch) for turn, batch in enumerate(batches) if batch))

        first_time: Counter[str] = Counter()
        before, held = set(self.stored), {user: self._held(user) for user in USERS}
        for events, outcomes in asyncio.run(all_at_once()):
            for event, outcome in zip(events, outcomes, strict=True):
                if outcome == "repeated":
                    continue
                first_time[event.id] += 1
                assert event.id not in before, f"{event.id} counts twice"
                if outcome == "taken":
                    self.taken.add(event.id)
                else:
                    later = np.count_nonzero(held[event.user].played_at > event.played_at)
                    assert later >= WINDOW, f"{event.id} is rejected, with {later} later plays"
            self.stored |= {event.id for event in events}
        assert set(first_time.values()) <= {1}
        while self.dead:
            self.dead.pop().close()

    async def _take(self, place: int, events: list[Event]) -> tuple[list[Event], list[str]]:
        """Send a batch until it is answered, to the other replica if one dies; return its events and their outcomes."""
        by_user: dict[str, list[Event]] = {}
        for event in events:
            by_user.setdefault(event.user, []).append(event)
        sent = {user: user_plays(own) for user, own in by_user.items()}
        for _ in range(3):
            work = asyncio.ensure_future(self.replicas[place].take(release(self.model), sent))
            at_work = self.at_work[place]
            at_work.add(work)
            try:
                outcomes = await work
                break
            except StoreUnavailableError:
                continue
            except asyncio.CancelledError:
                place = 1 - place
            finally:
                at_work.discard(work)
        return [event for own in by_user.values() for event in own], [o for user in by_user for o in outcomes[user]]

    def step(self) -> None:
        """Count the begin or the end of a store call, and kill the first replica when `steps_to_live` reaches 0."""
        with self.counting:
            if self.steps_to_live:
                self.steps_to_live -= 1
                if not self.steps_to_live:
                    self.loop.call_soon_threadsafe(self._kill_at_work)

    def _kill_at_work(self) -> None:
        """Kill the first replica with all its tasks; store calls that have begun may still finish."""
        for work in self.at_work[0]:
            work.cancel()
        self.dead.append(self.replicas[0])
        self.replicas[0] = replica(self.workspace, self.uri)

    def restart_a_replica(self) -> None:
        """Replace a replica that has no task in progress by a new one."""
        place = self.random.randrange(2)
        self.replicas[place].close()
        self.replicas[place] = replica(self.workspace, self.uri)

    def check(self) -> None:
        """Check that the store holds every event once, and that both models' states equal those of a batch run."""
        for user, whole in zip(USERS, self.store.read(USERS), strict=True):
            own = [event for event in self.events.values() if event.user == user]
            if whole is None:
                assert not own
                continue
            state, held = unpack_state(whole.stored.state), self._held(user)
            assert state.plays + state.rejected == len(own)
            assert state.plays == len(held)
            plays = Counter(zip(held.songs.tolist(), held.played_at.tolist(), strict=True))
            acknowledged = Counter((event.song, event.played_at) for event in own if event.id in self.taken)
            assert not acknowledged - plays
            assert sorted(held.played_at) == held.played_at.tolist()
            for model, encoder in ENCODERS.items():
                (known,) = asyncio.run(self.replicas[0].read(release(model), [user]))
                assert known is not None
                batch = encoder.run(held.history())[1]
                np.testing.assert_allclose(
                    known.states.hidden, batch.hidden, rtol=1e-5, atol=STORED * np.abs(batch.hidden).max()
                )
        for users in self.replicas:
            users.close()
        self.store.close()

    def _held(self, user: str) -> Plays:
        """Return all plays of a user in the store."""
        (whole,) = self.store.read([user])
        if whole is None:
            return Plays.of([], [])
        return Plays.joined([unpack_plays(whole.log), unpack_state(whole.stored.state).window])


def sent_plays(plays: Plays, events: Sequence[str]) -> UserPlays:
    """Return plays as they come from a request, none of them a like."""
    return UserPlays(plays=plays, events=events, liked=np.zeros(len(events), dtype=bool))


def user_plays(events: list[Event]) -> UserPlays:
    plays = Plays.of([event.song for event in events], [event.played_at for event in events])
    return sent_plays(plays, [event.id for event in events])


@pytest.mark.parametrize("seed", range(4))
def test_an_event_counts_once_whatever_happens(
    workspace: Workspace, uri: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of any size and of one moment, retries, late plays, two writers at once, lost answers, replicas that are
    killed while they work, restarts, changes of release."""
    world = World(workspace, uri, seed)
    for kind in (SqliteStore, RedisStore):

        def put_and_lose(self: Any, changes: Sequence[Change], put: Any = kind.put) -> list[bool]:
            world.step()
            done = put(self, changes)
            world.step()
            if world.lost:
                world.lost = False
                raise StoreUnavailableError("the answer was lost")
            return done

        def get_in_steps(self: Any, users: Mapping[str, Sequence[int]], get: Any = kind.get) -> list[Stored | None]:
            world.step()
            stored = get(self, users)
            world.step()
            return stored

        monkeypatch.setattr(kind, "put", put_and_lose)
        monkeypatch.setattr(kind, "get", get_in_steps)
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
            world.lost = action == "lose"  # the client sends the batch again
            world.send([world.new_events()])
    world.check()


def test_the_same_batch_sent_again_is_repeated_and_other_events_are_not(workspace: Workspace, uri: str) -> None:
    """200 plays without times, so all of one moment; then the same events again; then 1,000 other events."""
    users = replica(workspace, uri)

    def take(names: Sequence[str]) -> Counter[str]:
        plays = Plays.of(np.arange(len(names)) % 3, np.full(len(names), BEGIN))
        sent = {"ann": sent_plays(plays, names)}
        return Counter(asyncio.run(users.take(release("m1"), sent))["ann"])

    first = [f"a{place}" for place in range(200)]
    assert take(first) == {"taken": 200}
    assert take(first) == {"repeated": 200}
    assert take([f"b{place}" for place in range(1_000)]) == {"taken": 1_000}
    users.close()


def test_a_user_with_many_plays_is_read_by_the_last_of_them_and_no_song_is_forgotten(
    workspace: Workspace, uri: str
) -> None:
    users, count = replica(workspace, uri), 3 * LAST_PLAYS
    songs = np.random.default_rng(0).integers(0, 50, count)
    songs[:10] = np.arange(50, 60)  # heard only at the beginning
    for begin in range(0, count, 1_000):
        place = np.arange(begin, begin + 1_000)
        plays = Plays.of(songs[place], BEGIN + place * 60_000)
        sent: Mapping[str, UserPlays] = {"ann": sent_plays(plays, [str(each) for each in place])}
        asyncio.run(users.take(release("m1"), sent))
    for model in ("m1", "m2"):
        (known,) = asyncio.run(users.read(release(model), ["ann"]))
        assert known is not None
        assert known.state.plays == count
        assert LAST_PLAYS <= known.plays.num_plays <= LAST_PLAYS + 1_200
        assert set(known.heard) | set(known.plays.songs) == set(songs)
        # The first model saw every play; the state of the second one is computed from the plays that are read.
        seen = Plays.of(songs, BEGIN + np.arange(count) * 60_000).history() if model == "m1" else known.plays
        batch = ENCODERS[model].run(seen)[1]
        np.testing.assert_allclose(
            known.states.hidden, batch.hidden, rtol=1e-5, atol=STORED * np.abs(batch.hidden).max()
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
        state = UserState(before_at=BEGIN + (count - 1) * 60_000, left=count, folded=count - LAST_PLAYS // 2)
        heard = pack_heard(heard_songs[user])
        assert len(heard) < 2 * len(heard_songs[user])
        change = Change(user_id=user, state=pack_state(state), expected=NO_VERSION, append=log, heard=heard)
        assert store.put([change]) == [True]
    read, pieces_read, bytes_read = type(store).read, list[int](), list[int]()

    def counted(self: StateStore, names: Sequence[str], *, plays: int | None = None) -> list[FullUser | None]:
        wholes = read(self, names, plays=plays)
        for whole in wholes:
            assert whole is not None
            pieces_read.append(len(whole.log))
            bytes_read.append(len(whole.stored.state) + sum(map(len, whole.log)))
        return wholes

    monkeypatch.setattr(type(store), "read", counted)
    for user in ("few", "many"):
        (known,) = asyncio.run(users.read(release("m1"), [user]))
        assert known is not None
        assert known.plays.num_plays == 5 * size
        np.testing.assert_array_equal(known.heard, heard_songs[user])
    assert pieces_read == [5, 5]
    assert bytes_read[1] == pytest.approx(bytes_read[0], rel=0.01)
    users.close()
    store.close()


def test_a_deleted_user_is_unknown_until_a_play_from_after_the_deletion(workspace: Workspace, uri: str) -> None:
    users, live = replica(workspace, uri), release("m1")

    def take(event: str, at: int) -> list[str]:
        sent = {"ann": sent_plays(Plays.of([1], [at]), [event])}
        return list(asyncio.run(users.take(live, sent))["ann"])

    assert take("a", BEGIN) == ["taken"]
    asyncio.run(users.forget(live, "ann", BEGIN + 10))
    assert asyncio.run(users.read(live, ["ann"])) == [None]
    assert take("b", BEGIN + 5) == ["rejected"]
    assert take("a", BEGIN + 20) == ["repeated"]  # sent again without a time: it counts as played now
    assert asyncio.run(users.read(live, ["ann"])) == [None]
    assert take("c", BEGIN + 20) == ["taken"]
    (known,) = asyncio.run(users.read(live, ["ann"]))
    assert known is not None
    assert known.plays.played_at.tolist() == [BEGIN + 20]
    users.close()


def test_what_is_stored_is_told_though_its_client_leaves_meanwhile(
    workspace: Workspace, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    users, live, told = replica(workspace, uri), release("m1"), list[tuple[str, list[Outcome]]]()
    kind, has_begun, may_end = type(users.store("n")), threading.Event(), threading.Event()
    put = kind.put

    def slow_put(self: Any, changes: Sequence[Change]) -> list[bool]:
        has_begun.set()
        assert may_end.wait(10)
        return put(self, changes)

    monkeypatch.setattr(kind, "put", slow_put)

    async def leave() -> None:
        sent = {"ann": sent_plays(Plays.of([1, 2], [BEGIN, BEGIN + 1]), ["a", "b"])}
        work = asyncio.ensure_future(users.take(live, sent, lambda user, outcomes: told.append((user, outcomes))))
        assert await asyncio.to_thread(has_begun.wait, 10)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert not told
        may_end.set()
        for _ in range(1_000):
            if not told:
                await asyncio.sleep(0.01)

    asyncio.run(leave())
    assert told == [("ann", ["taken", "taken"])]
    users.close()
