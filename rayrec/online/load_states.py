"""Loads the user states that the batch job computed into a store, bucket by bucket; a stopped load can be resumed.

U users of a batch.
"""

import gc
import json
import os
import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset, read_files, read_waiting
from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.display import progress
from rayrec.errors import DamagedArtifactError, MismatchError, RayrecError
from rayrec.model.taste_table import LAST_PLAYED_AT, PLAYS, STATE, States, states_of, tastes_file
from rayrec.model.train_config import MODEL_CONFIG, ModelConfig
from rayrec.online.state_codec import (
    pack_heard,
    pack_histories,
    pack_new_states,
    pack_plays,
    pack_state,
    unpack_heard,
    unpack_plays,
    unpack_state,
)
from rayrec.online.state_store import NOT_THERE, Change, Piece, StateStore, WholeUser
from rayrec.online.user_state import FIRST_ONLINE, LAST_PLAYS, Plays, UserState, fold_heard, join_likes, over_window
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest

USERS_AT_ONCE = 8_000  # users per transaction of the store: about 0.2 s with SQLite, for which other writers wait
PIECE_PLAYS = 1_024  # maximum plays per piece of the log; an answer reads pieces until it has enough plays
MOST_PROCESSES = 8  # more would wait for the store
USERS_WITHOUT_PROCESSES = 50_000  # users that one process loads in the time that it takes to start others


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """The result of a load, or of some of its buckets: numbers of users by what was done with them."""

    buckets: int = 0
    added: int = 0  # users who were not in the store
    renewed: int = 0  # users who were in the store and got the batch's state of the model
    merged: int = 0  # renewed users with plays newer than the batch's, which were kept
    unchanged: int = 0  # users who already had a state of the model after the same plays
    deleted: int = 0  # users who were deleted before, and are not added again
    kept_plays: int = 0  # number of newer plays of the merged users
    seconds: float = 0.0  # time of the load; buckets that were loaded in parallel each have a share of it

    def __add__(self, other: "LoadResult") -> "LoadResult":
        return LoadResult(
            **{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(LoadResult)}
        )

    @property
    def users(self) -> int:
        """The number of users without the deleted ones."""
        return self.added + self.renewed + self.unchanged


def load_states(
    dataset: Dataset, store: StateStore, release: Manifest, *, repeat: bool = False, processes: int | None = None
) -> LoadResult:
    """Load the user states of a release, and the plays they were computed from, into a store.

    Returns the result of all buckets, including those that earlier calls have loaded. The store records each bucket
    that is done, and later calls skip it unless `repeat` is true. Plays in the store that are newer than the batch's
    are kept, and so are the states of other releases; the release need not be live. `processes` is the number of
    buckets that are loaded in parallel: by default 1 for few users, otherwise the number of CPUs, at most 8. Raises
    `MismatchError` if the workspace's data set does not descend from the release's, and `DamagedArtifactError` for
    tastes that do not match their checksums.
    """
    tastes = artifacts.load_manifest(dataset.workspace, "tastes", release.inputs["tastes"])
    if not dataset.descends_from(tastes.inputs["dataset"]):
        raise MismatchError(
            f"tastes {tastes.id} were computed from data set {tastes.inputs['dataset']}, but the workspace holds "
            f"{dataset.manifest.id}; run `rayrec taste` and `rayrec release create`"
        )
    buckets = dataset.manifest.buckets
    done = (
        {} if repeat else {bucket: LoadResult(**json.loads(text)) for bucket, text in store.loaded(tastes.id).items()}
    )
    left = [bucket for bucket in range(buckets) if bucket not in done]
    if processes is None:
        few = dataset.manifest.users * len(left) <= USERS_WITHOUT_PROCESSES * buckets
        processes = 1 if few else min(os.cpu_count() or 1, MOST_PROCESSES)
    with progress("User states", buckets) as bar:
        bar.advance(len(done))
        for bucket, result in _load_all(dataset, store, tastes, left, min(processes, len(left))):
            done[bucket] = result
            store.mark_loaded(tastes.id, bucket, json.dumps(asdict(result)))
            bar.advance()
    return sum((done[bucket] for bucket in range(buckets)), LoadResult())  # in a fixed order, since floats are added


def _load_all(
    dataset: Dataset, store: StateStore, tastes: Manifest, buckets: Iterable[int], processes: int
) -> Iterator[tuple[int, LoadResult]]:
    """Yield each bucket and its result when it is done. Raises `RayrecError` if a process is killed."""
    if processes <= 1:
        with ThreadPoolExecutor(max_workers=1) as writer:
            loader = _Loader(dataset, store, tastes, writer, nullcontext())
            yield from ((bucket, loader.load(bucket)) for bucket in buckets)
        return
    context = get_context("spawn")  # a fork would inherit the locks of this process's threads
    turn = context.Lock() if store.one_writer else None
    with ProcessPoolExecutor(processes, context, _start_process, (dataset, store, tastes, turn)) as pool:
        loading = {pool.submit(_load_bucket, bucket): bucket for bucket in buckets}
        try:
            for done in as_completed(loading):
                result = done.result()
                yield loading[done], replace(result, seconds=round(result.seconds / processes, 3))
        except BrokenProcessPool as error:
            raise RayrecError(
                "a process that loads users was killed, probably out of memory. Completed work is kept: run the "
                "command again on a machine with more memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_of_process: list["_Loader"] = []  # in a child process, its one loader


def _start_process(
    dataset: Dataset, store: StateStore, tastes: Manifest, turn: AbstractContextManager[Any] | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C, and lets running buckets finish
    gc.disable()  # garbage collection would take time and find nothing, because no object here refers to itself
    _of_process.append(_Loader(dataset, store, tastes, ThreadPoolExecutor(max_workers=1), turn or nullcontext()))


def _load_bucket(bucket: int) -> LoadResult:
    return _of_process[0].load(bucket)


class _Loader:
    """Loads buckets of one tastes artifact."""

    def __init__(
        self,
        dataset: Dataset,
        store: StateStore,
        tastes: Manifest,
        writer: Executor,
        turn: AbstractContextManager[Any],
    ) -> None:
        """`writer` has one thread, the only one that puts users into the store; it holds `turn` to add new users."""
        self._dataset, self._store, self._tastes, self._writer, self._turn = dataset, store, tastes, writer, turn
        self._forgotten = read_waiting(dataset.workspace)  # rows of other deleted users are already erased
        model = artifacts.load_manifest(dataset.workspace, "models", tastes.inputs["models"])
        self._model = model.id
        shape = ModelConfig.from_json(dataset.workspace.read_json(model.path(MODEL_CONFIG)))
        self._layers = shape.state_layers

    def load(self, bucket: int) -> LoadResult:
        """Load one bucket and return its result."""
        began, total = time.monotonic(), LoadResult(buckets=1)
        writing: Future[LoadResult] | None = None
        for histories, table in self._batches(bucket):  # a batch is written while the next one is read and packed
            batch = self._packed(histories, table)
            if writing is not None:
                total += writing.result()
            writing = self._writer.submit(self._write, *batch)
        if writing is not None:
            total += writing.result()
        return replace(total, seconds=round(time.monotonic() - began, 3))

    def _batches(self, bucket: int) -> Iterator[tuple[Histories, pa.Table]]:
        """Yield batches of a bucket: the histories that the tastes were computed from, and the rows of the tastes."""
        workspace = self._dataset.workspace
        path = tastes_file(self._tastes.folder, bucket)
        artifacts.verify(workspace, self._tastes, [path.removeprefix(f"{self._tastes.folder}/")])
        parts = self._dataset.earlier(self._tastes.inputs["dataset"]).parts
        files = self._dataset.manifest.histories_files(bucket, parts=parts)
        with workspace.open_input(path) as stream:
            names = [columns.USER, STATE, LAST_PLAYED_AT, PLAYS]
            rows = _Rows(pq.ParquetFile(stream).iter_batches(batch_size=USERS_AT_ONCE, columns=names))
            for histories in read_files(workspace, files, USERS_AT_ONCE):
                table = rows.take(len(histories))
                same = table.num_rows == len(histories) and table.column(PLAYS).to_numpy().tolist() == (
                    histories.lengths.tolist()
                )
                if not same or table.column(columns.USER).to_pylist() != histories.user_ids.tolist():
                    raise DamagedArtifactError(
                        f"{path} does not hold the users of bucket {bucket} in the order of the histories; "
                        "run `rayrec taste --force` and `rayrec release create`"
                    )
                yield histories, table

    def _packed(self, histories: Histories, table: pa.Table) -> tuple[Histories, States, list[Change], int]:
        """Return histories and states without deleted users, the changes that add all users, and the number deleted."""
        states, deleted = states_of(table, self._layers), self._forgotten.holds(histories.user_ids)
        if deleted.any():
            histories = histories.take(~deleted)
            states = States(hidden=states.hidden[~deleted], last_played_at=states.last_played_at[~deleted])
        return histories, states, self._new_users(histories, states), int(deleted.sum())

    def _write(self, histories: Histories, states: States, new: list[Change], deleted: int) -> LoadResult:
        with self._turn:
            added = self._store.put(new, loading=True)
        total = LoadResult(added=sum(added), deleted=deleted)
        batch = {
            user_id: self._user(histories, states, row)
            for row, (user_id, put) in enumerate(zip(histories.user_ids.tolist(), added, strict=True))
            if not put
        }
        left = list(batch)
        while left:
            merged, left = self._merge({user_id: batch[user_id] for user_id in left})
            total += merged
        return total

    def _user(self, histories: Histories, states: States, row: int) -> tuple[UserState, Plays]:
        own = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
        plays = Plays.of(
            histories.songs[own],
            histories.played_at[own],
            contexts=None if histories.contexts is None else histories.contexts[own],
            skipped=None if histories.skipped is None else histories.skipped[own],
        )
        state = UserState.start(self._model, states, row, plays=len(plays))
        return (state if histories.likes is None else replace(state, likes=_likes(histories.likes, row))), plays

    def _new_users(self, histories: Histories, states: States) -> list[Change]:
        """Return the changes that add users. Users with one piece of plays, nearly all, are packed together."""
        lengths, user_ids = histories.lengths, histories.user_ids.tolist()
        in_one = (lengths > 0) & (lengths <= PIECE_PLAYS)
        short, short_states = histories, states
        if not in_one.all():
            short = histories.take(in_one)
            short_states = States(hidden=states.hidden[in_one], last_played_at=states.last_played_at[in_one])
        likes = None if short.likes is None else [_likes(short.likes, row) for row in range(len(short))]
        packed = pack_new_states(self._model, short_states, short.lengths, likes)
        pieces = iter(zip(packed, pack_histories(short), strict=True))
        changes = []
        for row, user_id in enumerate(user_ids):
            if in_one[row]:
                state, plays = next(pieces)
                append = (Piece(int(lengths[row]), plays),)
                changes.append(Change(user_id=user_id, state=state, expected=NOT_THERE, append=append))
            else:
                changes.append(_whole_change(user_id, NOT_THERE, *self._user(histories, states, row)))
        return changes

    def _merge(self, users: dict[str, tuple[UserState, Plays]]) -> tuple[LoadResult, list[str]]:
        """Merge the batch's states with the stored users, whose newer plays are kept.

        Returns the result, and the users whom another writer changed meanwhile.
        """
        changes: list[Change] = []
        newer_counts: list[int] = []
        unchanged = deleted = 0
        for user_id, whole in zip(users, self._store.read(list(users), plays=LAST_PLAYS), strict=True):
            loaded, plays = users[user_id]
            assert whole is not None  # a store keeps a state even of a deleted user
            stored = unpack_state(whole.stored.state)
            log = unpack_plays(whole.log)
            if len(plays) and plays.played_at[0] <= stored.forgotten_at:
                deleted += 1
                continue
            if len(log) < stored.left and stored.before_at > loaded.before_at and log.played_at[0] > loaded.before_at:
                whole = self._store.read([user_id])[0] or whole  # the log has more newer plays than were read
                stored, log = unpack_state(whole.stored.state), unpack_plays(whole.log)
            newer = Plays.joined([log, stored.window])
            newer = newer.take(newer.played_at > loaded.before_at)
            same, own = stored.plays - len(newer) == len(plays), stored.models.get(self._model)
            # The batch replaces plays of songs that were added online, because it knows their rows and current vectors.
            same = same and not self._online_among(log, stored, newer)
            likes = join_likes([stored.likes, loaded.likes])
            knows_likes = all(
                np.array_equal(getattr(likes, name), getattr(stored.likes, name)) for name in ("songs", "played_at")
            )
            stored = replace(stored, likes=likes)
            if same and knows_likes and own is not None and own.restarts == stored.restarts:
                unchanged += 1
                continue
            if same:
                changes.append(self._beside(user_id, whole, stored, loaded, log))
            else:
                changes.append(self._instead(user_id, whole, stored, loaded, Plays.joined([plays, newer])))
            newer_counts.append(len(newer))
        put = self._store.put(changes, loading=True)
        newer_counts = [count for count, done in zip(newer_counts, put, strict=True) if done]
        result = LoadResult(
            renewed=len(newer_counts),
            merged=sum(count > 0 for count in newer_counts),
            unchanged=unchanged,
            deleted=deleted,
            kept_plays=sum(newer_counts),
        )
        return result, [change.user_id for change, done in zip(changes, put, strict=True) if not done]

    @staticmethod
    def _online_among(log: Plays, stored: UserState, newer: Plays) -> bool:
        """Return whether any play that the batch also has is of a song that was added online."""
        songs = np.concatenate([log.songs, stored.window.songs])
        return bool((songs[: len(songs) - len(newer)] >= FIRST_ONLINE).any())

    def _beside(self, user_id: str, whole: WholeUser, stored: UserState, loaded: UserState, log: Plays) -> Change:
        """Return the change for a user whose stored plays include the batch's: the batch's state of the model is added.

        The log is extended to the last play of the batch, if it ends before.
        """
        moved = stored.window.take(slice(max(0, loaded.left - stored.left)))
        after, own = stored, replace(loaded.models[self._model], restarts=stored.restarts, turn=stored.turn - 1)
        if len(moved):  # a model's state is that at the end of the log, so the log must reach the batch's last play
            after = replace(
                stored,
                window=stored.window.take(slice(len(moved), None)),
                before_at=loaded.before_at,
                left=loaded.left,
                turn=stored.turn + 1,
            )
        if loaded.left == after.plays:
            own = replace(own, turn=after.turn)
        heard = None
        if after.left - after.folded > LAST_PLAYS:
            after, songs = fold_heard(after, np.concatenate([log.songs, moved.songs]), unpack_heard(whole.heard))
            heard = pack_heard(songs)
        return Change(
            user_id=user_id,
            state=pack_state(after.with_model(self._model, own)),
            expected=whole.stored.version,
            append=_pieces(moved),
            heard=heard,
        )

    def _instead(self, user_id: str, whole: WholeUser, stored: UserState, loaded: UserState, plays: Plays) -> Change:
        """Return the change for a user with other stored plays than the batch's: batch and newer plays replace them."""
        newer = plays.take(slice(loaded.left, None))
        leaving = over_window(newer.played_at)
        log = plays.take(slice(loaded.left + leaving))
        after = replace(
            stored,
            window=newer.take(slice(leaving, None)),
            before_at=int(log.played_at[-1]) if len(log) else NEVER,
            left=len(log),
            folded=0,
            turn=stored.turn + 1,
            restarts=stored.restarts + 1,
        )
        own = replace(loaded.models[self._model], restarts=after.restarts, turn=stored.turn)
        if not len(newer):
            own = replace(own, turn=after.turn)
        return _whole_change(user_id, whole.stored.version, after.with_model(self._model, own), log)


def _likes(likes: Histories, row: int) -> Plays:
    """Return the latest likes of one user."""
    own = slice(int(likes.offsets[row]), int(likes.offsets[row + 1]))
    return join_likes([Plays.of(likes.songs[own], likes.played_at[own])])


def _whole_change(user_id: str, expected: int, state: UserState, log: Plays) -> Change:
    """Return the change that stores a user's whole log, and the state after it."""
    heard = None
    if state.left > LAST_PLAYS:
        state, songs = fold_heard(state, log.songs, np.zeros(0, np.int32))
        heard = pack_heard(songs)
    return Change(
        user_id=user_id,
        state=pack_state(state),
        expected=expected,
        append=_pieces(log),
        restart=expected != NOT_THERE,
        heard=heard,
    )


def _pieces(plays: Plays) -> list[Piece]:
    if len(plays) <= PIECE_PLAYS:
        return [Piece(len(plays), pack_plays(plays))] if len(plays) else []
    parts = [plays.take(slice(begin, begin + PIECE_PLAYS)) for begin in range(0, len(plays), PIECE_PLAYS)]
    return [Piece(len(part), pack_plays(part)) for part in parts]


class _Rows:
    """Reads the rows of a file, in tables of any size."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._rest = batches, None

    def take(self, count: int) -> pa.Table:
        """Return the next `count` rows, fewer at the end of the file."""
        parts: list[pa.Table] = [] if self._rest is None else [self._rest]
        while sum(part.num_rows for part in parts) < count and (batch := next(self._batches, None)) is not None:
            parts.append(pa.Table.from_batches([batch]))
        joined = pa.concat_tables(parts) if parts else pa.table({})
        self._rest = joined.slice(count)
        return joined.slice(0, count)
