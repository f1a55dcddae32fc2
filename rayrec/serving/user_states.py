"""The states of stored users: read for an answer, and moved on by new plays.

A replica holds none of them between two requests: it reads, has the engine run, and puts on the version that it
read, again where another was first. So any number of replicas may take plays of the same user.
"""

import asyncio
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from rayrec.data.histories import Histories
from rayrec.errors import InputError
from rayrec.model.inference import States
from rayrec.online.state_codec import pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.stores.state_store import (
    NOT_THERE,
    Change,
    StateStore,
    StoreUnavailableError,
    Whole,
    open_store,
    store_uri,
)
from rayrec.online.user_state import OUTCOMES, Outcome, Plays, Replay, Step, UserState, gather, plan, scatter
from rayrec.serving.live import LiveRelease
from rayrec.serving.problems import NotReadyError
from rayrec.serving.prometheus import Metrics
from rayrec.storage.workspace import Workspace

ATTEMPTS = 100  # puts of one user before the request is given up: each that fails was another's success
PAUSE_SECONDS = 0.005  # at most, after the first attempt that another was faster than; then more
THREADS = 8  # that wait for the store

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StoredUser:
    """What is known of a stored user, by the live release's model."""

    state: UserState
    plays: Histories  # of this one user, all plays taken, in the order of time

    @property
    def states(self) -> States:
        """As the engine takes them."""
        return self.state.states


@dataclass(frozen=True)
class _Found:
    """A user's state as read from the store, with the log where it was read."""

    version: int
    state: UserState
    log: Plays | None


class UserStates:
    """The users of one store."""

    def __init__(self, workspace: Workspace, uri: str | None, metrics: Metrics) -> None:
        """`uri` as `store_uri` takes it; the store is opened when it is asked for first."""
        self._workspace, self._uri, self._metrics = workspace, uri, metrics
        self._executor = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="rayrec-store")
        self._stores: dict[str, StateStore] = {}  # by namespace
        self._opening = threading.Lock()
        self._blanks: dict[str, States] = {}  # by model: the state before the first play

    def close(self) -> None:
        """Close the store."""
        self._executor.shutdown(wait=True)
        while self._stores:
            self._stores.popitem()[1].close()

    async def read(self, live: LiveRelease, user_ids: Sequence[str]) -> list[StoredUser | None]:
        """What is known of each user; None for those who are not in the store.

        A state of another model is not used: the live one's is computed from the user's plays, and kept.
        """
        store = await self._store(live)
        with self._metrics.stage("store"):
            wholes = await self._call(lambda: [store.read(user_id) for user_id in user_ids])
        found = {user_id: _found(whole) for user_id, whole in zip(user_ids, wholes, strict=True) if whole is not None}
        changes = []
        for user_id, renewed in (await self._renew(live, found)).items():
            old = found[user_id]
            found[user_id] = _Found(old.version, renewed, old.log)
            changes.append(Change(user_id=user_id, state=pack_state(renewed), expected=old.version))
        if changes:
            await self._call(store.put, changes)
        return [_user(user_id, found[user_id]) if user_id in found else None for user_id in user_ids]

    async def take(self, live: LiveRelease, plays: Mapping[str, Plays]) -> dict[str, list[Outcome]]:
        """Take new plays of users into their states; what became of each play. Users who are new are made.

        When this returns the plays are in the store. Raises `StoreUnavailableError` where they may not
        be: sent again with the same event ids, no play counts twice.
        """
        store = await self._store(live)
        outcomes: dict[str, list[Outcome]] = {}
        for attempt in range(ATTEMPTS):
            left = {user_id: arrived for user_id, arrived in plays.items() if user_id not in outcomes}
            outcomes |= await self._attempt(live, store, left)
            if len(outcomes) == len(plays):
                return outcomes
            await asyncio.sleep(random.random() * PAUSE_SECONDS * min(attempt + 1, 10))
        raise StoreUnavailableError(f"other writers were faster {ATTEMPTS} times; try again")

    async def _attempt(
        self, live: LiveRelease, store: StateStore, plays: Mapping[str, Plays]
    ) -> dict[str, list[Outcome]]:
        """One attempt to take plays; those of users whom another writer changed meanwhile are left out."""
        found = await self._current(live, store, list(plays))
        steps = {user_id: plan(found[user_id].state, arrived) for user_id, arrived in plays.items()}
        states = await self._run(live, list(steps.values()))

        changes = [
            _change(user_id, found[user_id].version, step, state)
            for (user_id, step), state in zip(steps.items(), states, strict=True)
            if step.changes  # else all of it is in the store already
        ]
        refused: set[str] = set()
        if changes:
            with self._metrics.stage("store"):
                done = await self._call(store.put, changes)
            refused = {change.user_id for change, put in zip(changes, done, strict=True) if not put}
        return {
            user_id: [OUTCOMES[place] for place in step.outcomes]
            for user_id, step in steps.items()
            if user_id not in refused
        }

    async def _current(self, live: LiveRelease, store: StateStore, user_ids: list[str]) -> dict[str, _Found]:
        """The states of users by the live model: stored ones, computed anew where they are another's, or blank ones."""
        blank = await self._blank(live)

        def get(user_id: str) -> _Found:
            stored = store.get(user_id)
            state = None if stored is None else unpack_state(stored.state)
            if stored is not None and state is not None and state.model == live.model_id:
                return _Found(stored.version, state, None)
            whole = store.read(user_id)  # another model's: the log is needed, and both of one moment
            return _Found(NOT_THERE, UserState.start(live.model_id, blank), None) if whole is None else _found(whole)

        with self._metrics.stage("store"):
            found = await self._call(lambda: {user_id: get(user_id) for user_id in user_ids})
        for user_id, renewed in (await self._renew(live, found)).items():
            found[user_id] = _Found(found[user_id].version, renewed, found[user_id].log)
        return found

    async def _renew(self, live: LiveRelease, found: Mapping[str, _Found]) -> dict[str, UserState]:
        """The live model's states of those users whose states are another's, from log and window."""
        stale = {user_id: one for user_id, one in found.items() if one.state.model != live.model_id}
        if not stale:
            return {}
        blank = await self._blank(live)
        replays = [Replay.of(one.state, live.model_id, blank, one.log or Plays.of([], [])) for one in stale.values()]
        return dict(zip(stale, await self._run(live, replays), strict=True))

    async def _run(self, live: LiveRelease, steps: Sequence[Step | Replay]) -> list[UserState]:
        """The new states of steps, all in one batch of the live network."""
        if not any(step.runs for step in steps):
            return scatter(steps, None)
        return scatter(steps, await live.engine.states(*gather(steps)))

    async def _blank(self, live: LiveRelease) -> States:
        if live.model_id not in self._blanks:
            nothing = Histories.from_lists([[]], [[]])
            self._blanks = {live.model_id: await live.engine.states(nothing)}  # of the live one alone
        return self._blanks[live.model_id]

    async def _store(self, live: LiveRelease) -> StateStore:
        namespace = live.songs.lineage

        def opened() -> StateStore:
            with self._opening:
                if namespace not in self._stores:
                    try:
                        self._stores[namespace] = open_store(store_uri(self._workspace, self._uri), namespace)
                    except InputError as error:  # whoever runs the application has to mend it, not who asks
                        raise NotReadyError(f"users cannot be stored here: {error}") from error
                return self._stores[namespace]

        store = self._stores.get(namespace)
        return await self._call(opened) if store is None else store

    async def _call(self, work: Callable[..., T], *args: object, **kwargs: object) -> T:
        future = self._executor.submit(lambda: work(*args, **kwargs))
        return await asyncio.wrap_future(future)


def _change(user_id: str, version: int, step: Step, state: UserState) -> Change:
    left = pack_plays(step.left) if step.leaving else None
    return Change(user_id=user_id, state=pack_state(state), expected=version, append=left)


def _found(whole: Whole) -> _Found:
    return _Found(whole.stored.version, unpack_state(whole.stored.state), unpack_plays(whole.log))


def _user(user_id: str, found: _Found) -> StoredUser:
    parts = [found.log, found.state.window] if found.log else [found.state.window]
    return StoredUser(state=found.state, plays=Plays.joined(parts).history(user_id))
