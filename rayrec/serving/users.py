"""Stored users: reads their plays and network states for an answer, updates them with new plays, and deletes them.

A replica keeps no user in memory between two requests. It reads a user from the store, runs the engine, and writes the
result if the stored version is still the one that it read; otherwise it tries again. So any number of replicas may
take plays of the same user.
"""

import asyncio
import logging
import random
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from rayrec.data.dataset import mark_forgotten
from rayrec.data.histories import Histories
from rayrec.errors import InputError
from rayrec.model.taste_table import States
from rayrec.online.state_codec import pack_heard, pack_plays, pack_state, unpack_heard, unpack_plays, unpack_state
from rayrec.online.state_store import (
    NO_VERSION,
    Change,
    FullUser,
    Piece,
    StateStore,
    StoreUnavailableError,
    open_store,
    store_exists,
    store_uri,
)
from rayrec.online.user_state import (
    FIRST_ONLINE,
    OUTCOMES,
    CatchUp,
    Outcome,
    Plays,
    Step,
    UserState,
    event_digest,
    fold_heard,
    gather,
    plan_plays,
    scatter,
)
from rayrec.recommend.base import LATEST_PLAYS
from rayrec.serving.live_release import LiveRelease
from rayrec.serving.problems import NotReadyError
from rayrec.serving.telemetry import Metrics
from rayrec.storage.artifacts import read_lineages
from rayrec.storage.workspace import Workspace

ATTEMPTS = 100  # to store the plays of a request before it fails; an attempt fails only if another write succeeded
PAUSE_SECONDS = 0.005  # maximum pause after the first failed attempt; it grows with each attempt, up to ten times this
THREADS = 8  # for calls to the store

T = TypeVar("T")
OnStored = Callable[[str, list[Outcome]], None]  # takes a user id and the outcome of each event of that user

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class UserPlays:
    """Plays and likes of one user, as a client sent them."""

    plays: Plays
    events: Sequence[str]  # event ids, one per play or like
    liked: np.ndarray  # bool (P,), True for likes, False for plays


@dataclass(frozen=True, kw_only=True)
class StoredUser:
    """A stored user: plays, likes, and the network state of the live release's model."""

    state: UserState
    states: States  # of the live model, after all plays
    plays: Plays  # the last ones, in time order: at least `LATEST_PLAYS`, or all if there are fewer
    likes: Plays  # the songs liked, and when, in time order
    heard: np.ndarray  # int32 (any,), song rows of the plays before those


@dataclass(frozen=True)
class _UserRecord:
    """A user as read from the store. `log` and `heard` are None if only the state was read."""

    version: int
    state: UserState
    events: frozenset[int] = frozenset()
    log: Plays | None = None
    heard: bytes | None = None


class StoredUsers:
    """Reads, updates and deletes the users in a store."""

    def __init__(self, workspace: Workspace, uri: str | None, metrics: Metrics) -> None:
        """`uri` is the address of the store, as `store_uri` takes it. The store is opened at its first use."""
        self._workspace, self._uri, self._metrics = workspace, uri, metrics
        self._executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="rayrec-store")
        self._stores: dict[str, StateStore] = {}  # by namespace
        self._opening_lock = threading.Lock()
        self._next_numbers: dict[str, int] = {}  # by namespace: after the highest number seen of a song added online
        self._numbers_lock = threading.Lock()
        self._initial_states: dict[str, States] = {}  # by model id: the network state before the first play
        self._writes: set[asyncio.Task[Any]] = set()  # writes in progress, perhaps for disconnected clients

    def close(self) -> None:
        """Close the store."""
        self._executor.shutdown(wait=True)
        while self._stores:
            self._stores.popitem()[1].close()

    async def read(self, live: LiveRelease, user_ids: Sequence[str]) -> list[StoredUser | None]:
        """Return each of the users; None for one who is not in the store or was deleted.

        If a user's state of the live model is missing or out of date, it is computed from the user's plays and stored.
        """
        store = await self._store(live)
        with self._metrics.stage("store"):
            full_users = await self._run_in_thread(store.read, user_ids, plays=LATEST_PLAYS)
        users = {
            user_id: _record_of(full_user)
            for user_id, full_user in zip(user_ids, full_users, strict=True)
            if full_user is not None
        }
        users = {user_id: user for user_id, user in users.items() if not user.state.forgotten}
        await self._refresh_songs(live, users.values())
        changes = []
        for user_id, state in (await self._catch_up(live, users)).items():
            user = users[user_id]
            users[user_id] = replace(user, state=state)
            changes.append(Change(user_id=user_id, state=pack_state(state), expected=user.version))
        if changes:
            await self._run_in_thread(store.put, changes)
        return [_stored_user(users[user_id], live) if user_id in users else None for user_id in user_ids]

    async def take(
        self, live: LiveRelease, plays_by_user: Mapping[str, UserPlays], on_stored: OnStored | None = None
    ) -> dict[str, list[Outcome]]:
        """Add new plays and likes to the states of users; return the outcome of each. Unknown users are added.

        The plays are in the store when this returns. `on_stored` is called for each user right after the user's plays
        were stored, by the thread that stored them, even if this method raises afterwards or is cancelled. Raises
        `StoreUnavailableError` if plays may be missing in the store; the client can send them again with the same event
        ids, and no play counts twice. If such plays were stored after all, `on_stored` is not called for them.
        """
        store = await self._store(live)
        outcomes: dict[str, list[Outcome]] = {}
        for attempt in range(ATTEMPTS):
            remaining = {user_id: plays for user_id, plays in plays_by_user.items() if user_id not in outcomes}
            outcomes |= await self._try_to_store(live, store, remaining, on_stored)
            if len(outcomes) == len(plays_by_user):
                return outcomes
            await asyncio.sleep(random.random() * PAUSE_SECONDS * min(attempt + 1, 10))
        raise StoreUnavailableError(f"write conflict: the user changed during all {ATTEMPTS} attempts; try again")

    async def forget(self, live: LiveRelease, user_id: str, at: int) -> None:
        """Delete a user. Plays up to `at`, ms UTC, are rejected from now on.

        Neither `rayrec states load` nor an event of the last day that is sent again brings the user back. The workspace
        records the deletion too: the next compaction erases the user's rows from all files.
        """

        def forget_in_both() -> None:
            store = self.store(live.catalog.lineage)
            mark_forgotten(self._workspace, [user_id], at)
            store.forget([user_id], pack_state(UserState(forgotten_at=at)), read_lineages(self._workspace))

        await self._finish(self._run_in_thread(forget_in_both))

    async def _try_to_store(
        self, live: LiveRelease, store: StateStore, plays_by_user: Mapping[str, UserPlays], on_stored: OnStored | None
    ) -> dict[str, list[Outcome]]:
        """Try once to store plays. Return the outcomes by user, without users whom another writer changed meanwhile."""
        events = {
            user_id: [event_digest(event) for event in new_events.events]
            for user_id, new_events in plays_by_user.items()
        }
        users = await self._read_current(live, store, events)
        await self._refresh_songs(live, users.values())
        is_repeated = {user_id: _find_repeated(events[user_id], users[user_id].events) for user_id in plays_by_user}
        steps = {
            user_id: _reject_copies(
                plan_plays(
                    users[user_id].state, live.model_id, new_events.plays, is_repeated[user_id], new_events.liked
                ),
                events[user_id],
            )
            for user_id, new_events in plays_by_user.items()
        }
        states = await self._run_network(live, list(steps.values()))
        changes: list[Change] = []
        for (user_id, step), state in zip(steps.items(), states, strict=True):
            if not step.changes:
                continue  # all events are in the store already
            change = await self._make_change(store, user_id, users[user_id].version, step, state)
            if change is not None:
                taken_events = [
                    event for event, outcome in zip(events[user_id], _outcomes(step), strict=True) if outcome == "taken"
                ]
                changes.append(replace(change, events=taken_events))
        stored_ids: set[str] = set()
        if changes:
            # The store finishes the write even if the client disconnects, so the plays must be counted, too.
            stored_ids = await self._finish(self._write_changes(live, store, changes, steps, on_stored))
        return {
            user_id: _outcomes(step) for user_id, step in steps.items() if user_id in stored_ids or not step.changes
        }

    async def _write_changes(
        self,
        live: LiveRelease,
        store: StateStore,
        changes: Sequence[Change],
        steps: Mapping[str, Step],
        on_stored: OnStored | None,
    ) -> set[str]:
        """Store changes and count their plays; return the ids of users whom no other writer changed meanwhile."""

        def write_and_report() -> list[str]:  # runs in one thread, which `close` waits for
            is_stored = store.put(changes)
            stored_ids = [change.user_id for change, was_stored in zip(changes, is_stored, strict=True) if was_stored]
            if on_stored is not None:
                for user_id in stored_ids:
                    on_stored(user_id, _outcomes(steps[user_id]))
            return stored_ids

        with self._metrics.stage("store"):
            stored_ids = await self._run_in_thread(write_and_report)
        try:
            await self._count_song_plays(live, [steps[user_id] for user_id in stored_ids])
        except StoreUnavailableError as error:  # the plays themselves are stored
            log.warning("plays of songs that were added online are not counted: %s", error)
        return set(stored_ids)

    async def _refresh_songs(self, live: LiveRelease, users: Iterable[_UserRecord]) -> None:
        """Read the songs that were added on other replicas, if `users` have played any of them."""
        online = live.online
        if any(
            online.missing(plays.songs)
            for user in users
            for plays in (user.state.window, user.state.likes, user.log)
            if plays is not None
        ):
            await self._run_in_thread(online.refresh)

    async def _count_song_plays(self, live: LiveRelease, steps: Sequence[Step]) -> None:
        """Count the plays of songs that were added online; the counts move the vectors of these songs."""
        online = live.online
        if online.count:
            song_sums = await self._run_in_thread(online.first_plays, steps)
            if song_sums:
                await self._run_in_thread(online.count_plays, song_sums)

    async def _make_change(
        self, store: StateStore, user_id: str, version: int, step: Step, state: UserState
    ) -> Change | None:
        """Return the change that stores a step; None if another writer changed the user meanwhile."""
        packed_heard = None
        if step.folds:
            (full_user,) = await self._run_in_thread(store.read, [user_id], plays=LATEST_PLAYS)
            if full_user is None or full_user.stored.version != version:
                return None
            songs = np.concatenate([unpack_plays(full_user.log).songs, step.leaving_plays.songs])
            state, heard_songs = fold_heard(state, songs, unpack_heard(full_user.heard))
            packed_heard = pack_heard(heard_songs)
        log_parts = [Piece(step.leaving, pack_plays(step.leaving_plays))] if step.leaving else []
        return Change(user_id=user_id, state=pack_state(state), expected=version, append=log_parts, heard=packed_heard)

    async def _read_current(
        self, live: LiveRelease, store: StateStore, events: Mapping[str, Sequence[int]]
    ) -> dict[str, _UserRecord]:
        """Return users with the live model's state up to date. New users get the state before the first play."""
        initial_state = await self._read_initial_state(live)
        with self._metrics.stage("store"):
            stored_users = await self._run_in_thread(store.get, events)
        users: dict[str, _UserRecord] = {}
        outdated_ids: list[str] = []
        for user_id, stored_user in zip(events, stored_users, strict=True):
            if stored_user is None:
                users[user_id] = _UserRecord(NO_VERSION, UserState.start(live.model_id, initial_state))
                continue
            users[user_id] = _UserRecord(stored_user.version, unpack_state(stored_user.state), stored_user.events)
            if users[user_id].state.current(live.model_id) is None:
                outdated_ids.append(user_id)
        if outdated_ids:
            full_users = await self._run_in_thread(store.read, outdated_ids, plays=LATEST_PLAYS)
            for user_id, full_user in zip(outdated_ids, full_users, strict=True):
                if full_user is not None:
                    # Version and events stay those of the first read: if the user changed since then, the write fails,
                    # and no play counts twice.
                    users[user_id] = replace(
                        _record_of(full_user), version=users[user_id].version, events=users[user_id].events
                    )
            for user_id, state in (
                await self._catch_up(live, {outdated_id: users[outdated_id] for outdated_id in outdated_ids})
            ).items():
                users[user_id] = replace(users[user_id], state=state)
        return users

    async def _catch_up(self, live: LiveRelease, users: Mapping[str, _UserRecord]) -> dict[str, UserState]:
        """Return up-to-date states of those users whose state of the live model is missing or out of date."""
        outdated_users = {user_id: user for user_id, user in users.items() if user.state.current(live.model_id) is None}
        if not outdated_users:
            return {}
        initial_state, no_plays = await self._read_initial_state(live), Plays.of([], [])
        steps = [
            CatchUp.of(user.state, live.model_id, initial_state, user.log or no_plays)
            for user in outdated_users.values()
        ]
        return dict(zip(outdated_users, await self._run_network(live, steps), strict=True))

    async def _run_network(self, live: LiveRelease, steps: Sequence[Step | CatchUp]) -> list[UserState]:
        """Return the new state of each step. The live network runs over all steps in one batch."""
        if not any(step.runs for step in steps):
            return scatter(steps, None)
        plays, start = gather(steps)
        plays = replace(plays, songs=live.catalog.rows_of_stored(plays.songs))
        return scatter(steps, await live.engine.pool.run(live.engine.parts.states, plays, start))

    async def _read_initial_state(self, live: LiveRelease) -> States:
        if live.model_id not in self._initial_states:
            no_plays = Histories.from_lists([[]], [[]])
            states = await live.engine.pool.run(live.engine.parts.states, no_plays)
            self._initial_states[live.model_id] = states  # a few kB per model
        return self._initial_states[live.model_id]

    def store(self, namespace: str) -> StateStore:
        """Return the store of the data sets of lineage `namespace`. Raises `NotReadyError` if it cannot be opened."""
        with self._opening_lock:
            if namespace not in self._stores:
                try:
                    self._stores[namespace] = open_store(store_uri(self._workspace, self._uri), namespace)
                except InputError as error:  # an error in the server's settings, not in the client's request
                    raise NotReadyError(f"The store of user states cannot be opened: {error}") from error
            return self._stores[namespace]

    def existing_store(self, namespace: str) -> StateStore | None:
        """As `store`, but None if the store does not exist yet, or if the workspace cannot hold one."""
        if namespace in self._stores:
            return self._stores[namespace]
        try:
            uri = store_uri(self._workspace, self._uri)
        except InputError:
            return None
        return self.store(namespace) if store_exists(uri) else None

    def next_song_number(self, namespace: str, at_least: int = 0) -> int:
        """Return the number after the highest one of songs added online; `at_least` raises it for all releases.

        Numbers of lost songs count, since stored plays still have them.
        """
        with self._numbers_lock:
            self._next_numbers[namespace] = max(self._next_numbers.get(namespace, 0), at_least)
            return self._next_numbers[namespace]

    async def _store(self, live: LiveRelease) -> StateStore:
        store = self._stores.get(live.catalog.lineage)
        return await self._run_in_thread(self.store, live.catalog.lineage) if store is None else store

    async def _finish(self, write: Coroutine[Any, Any, T]) -> T:
        """Return the result of `write`, which goes on to its end even if the client disconnects meanwhile."""
        task = asyncio.ensure_future(write)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return await asyncio.shield(task)

    async def _run_in_thread(self, work: Callable[..., T], *args: object, **kwargs: object) -> T:
        future = self._executor.submit(lambda: work(*args, **kwargs))
        return await asyncio.wrap_future(future)


def _outcomes(step: Step) -> list[Outcome]:
    """Return the outcome of each event of a step."""
    return [OUTCOMES[code] for code in step.outcomes]


def _find_repeated(events: Sequence[int], stored_events: frozenset[int]) -> np.ndarray:
    """Return bool (events,): True for an event that is in `stored_events` or occurs earlier in `events`."""
    seen_events = set(stored_events)
    is_repeated = np.zeros(len(events), np.bool_)
    for index, event in enumerate(events):
        is_repeated[index] = event in seen_events
        seen_events.add(event)
    return is_repeated


def _reject_copies(step: Step, events: Sequence[int]) -> Step:
    """Return a step whose copies of a rejected event in the same request are rejected, too: they are not stored."""
    event_digests, rejected = np.array(events, dtype=np.int64), OUTCOMES.index("rejected")
    is_rejected = np.isin(event_digests, event_digests[step.outcomes == rejected])
    return replace(step, outcomes=np.where(is_rejected, rejected, step.outcomes).astype(np.int8))


def _record_of(full_user: FullUser) -> _UserRecord:
    stored = full_user.stored
    return _UserRecord(
        stored.version, unpack_state(stored.state), stored.events, unpack_plays(full_user.log), full_user.heard
    )


def _stored_user(user: _UserRecord, live: LiveRelease) -> StoredUser:
    play_parts = [user.log, user.state.window] if user.log else [user.state.window]
    rows_of_stored = live.catalog.rows_of_stored
    plays, likes = (
        replace(stored_plays, songs=rows_of_stored(stored_plays.songs))
        for stored_plays in (Plays.concatenate(play_parts), user.state.likes)
    )
    if len(plays) and plays.songs.max() >= FIRST_ONLINE:  # FIRST_ONLINE marks songs that are not known here
        plays = plays.take(plays.songs < FIRST_ONLINE)
    return StoredUser(
        state=user.state,
        states=user.state.states(live.model_id),
        plays=plays,
        likes=likes.take(likes.songs < FIRST_ONLINE),
        heard=rows_of_stored(unpack_heard(user.heard)),
    )
