"""Loads the user states that the batch job computed into a store, bucket by bucket; a stopped load can be resumed.

U users of a batch.
"""

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset, read_files, read_pending_deletions
from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.display import progress
from rayrec.errors import DamagedArtifactError, MismatchError, RayrecError
from rayrec.model.taste_table import LAST_PLAYED_AT, PLAYS, STATE, States, read_states, tastes_file
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
from rayrec.online.state_store import NO_VERSION, Change, FullUser, Piece, StateStore
from rayrec.online.user_state import (
    Plays,
    UserState,
    count_leaving_plays,
    fold_heard,
    join_likes,
)
from rayrec.recommend.base import LATEST_PLAYS
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
    unchanged: int = 0  # users who already had the batch's state of the model, after the same plays
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
    dataset: Dataset,
    store: StateStore,
    release: Manifest,
    *,
    repeat: bool = False,
    processes: int | None = None,
    after_bucket: Callable[[], None] = lambda: None,
) -> LoadResult:
    """Load the user states of a release, and the plays they were computed from, into a store.

    Returns the result of all buckets, including those that earlier calls have loaded. The store records each bucket
    that is done, and later calls skip it unless `repeat` is true. Plays in the store that are newer than the batch's
    are kept, and so are the states of other releases; the release need not be live. `processes` is the number of
    buckets that are loaded in parallel: by default 1 for few users, otherwise the number of CPUs, at most 8.
    `after_bucket` is called after each bucket, and may raise an exception to stop the load. Raises `MismatchError` if
    the workspace's data set does not descend from the release's, and `DamagedArtifactError` for tastes that do not
    match their checksums.
    """
    tastes = artifacts.load_manifest(dataset.workspace, "tastes", release.inputs["tastes"])
    if not dataset.descends_from(tastes.inputs["dataset"]):
        raise MismatchError(
            f"tastes {tastes.id} were computed from data set {tastes.inputs['dataset']}, but the workspace holds "
            f"{dataset.manifest.id}; run `rayrec taste` and `rayrec release create`"
        )
    buckets = dataset.manifest.buckets
    results = (
        {} if repeat else {bucket: LoadResult(**json.loads(text)) for bucket, text in store.loaded(tastes.id).items()}
    )
    remaining = [bucket for bucket in range(buckets) if bucket not in results]
    if processes is None:
        has_few_users = dataset.manifest.users * len(remaining) <= USERS_WITHOUT_PROCESSES * buckets
        processes = 1 if has_few_users else min(os.cpu_count() or 1, MOST_PROCESSES)
    with progress("User states", buckets) as bar:
        bar.advance(len(results))
        with closing(_load_all(dataset, store, tastes, remaining, min(processes, len(remaining)))) as loaded_buckets:
            for bucket, result in loaded_buckets:
                results[bucket] = result
                store.mark_loaded(tastes.id, bucket, json.dumps(asdict(result)))
                bar.advance()
                after_bucket()
    return sum((results[bucket] for bucket in range(buckets)), LoadResult())  # in a fixed order, since floats are added


def _load_all(
    dataset: Dataset, store: StateStore, tastes: Manifest, buckets: Iterable[int], processes: int
) -> Generator[tuple[int, LoadResult], None, None]:
    """Yield each bucket and its result when it is done. Raises `RayrecError` if a process is killed."""
    if processes <= 1:
        with ThreadPoolExecutor(max_workers=1) as writer:
            loader = _Loader(dataset, store, tastes, writer, nullcontext())
            yield from ((bucket, loader.load(bucket)) for bucket in buckets)
        return
    context = get_context("spawn")  # a fork would inherit the locks of this process's threads
    write_lock = context.Lock() if store.one_writer else None
    with ProcessPoolExecutor(processes, context, _start_process, (dataset, store, tastes, write_lock)) as pool:
        bucket_of_future = {pool.submit(_load_bucket, bucket): bucket for bucket in buckets}
        try:
            for future in as_completed(bucket_of_future):
                result = future.result()
                yield bucket_of_future[future], replace(result, seconds=round(result.seconds / processes, 3))
        except BrokenProcessPool as error:
            raise RayrecError(
                "a process that loads users was killed, probably out of memory. Completed work is kept: run the "
                "command again on a machine with more memory"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_process_loaders: list["_Loader"] = []  # in a child process, its one loader


def _start_process(
    dataset: Dataset, store: StateStore, tastes: Manifest, write_lock: AbstractContextManager[Any] | None
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C, and lets running buckets finish
    gc.disable()  # garbage collection would take time and find nothing, because no object here refers to itself
    _process_loaders.append(
        _Loader(dataset, store, tastes, ThreadPoolExecutor(max_workers=1), write_lock or nullcontext())
    )


def _load_bucket(bucket: int) -> LoadResult:
    return _process_loaders[0].load(bucket)


class _Loader:
    """Loads buckets of one tastes artifact."""

    def __init__(
        self,
        dataset: Dataset,
        store: StateStore,
        tastes: Manifest,
        writer: Executor,
        write_lock: AbstractContextManager[Any],
    ) -> None:
        """`writer` has one thread, the only one that puts users into the store; it holds `write_lock` to add users."""
        self._dataset = dataset
        self._store = store
        self._tastes = tastes
        self._writer = writer
        self._write_lock = write_lock
        # rows of other deleted users are already erased
        self._deleted_users = read_pending_deletions(dataset.workspace)
        model = artifacts.load_manifest(dataset.workspace, "models", tastes.inputs["models"])
        self._model_id = model.id
        model_config = ModelConfig.from_json(dataset.workspace.read_json(model.path(MODEL_CONFIG)))
        self._layers = model_config.state_layers

    def load(self, bucket: int) -> LoadResult:
        """Load one bucket and return its result."""
        started, total = time.monotonic(), LoadResult(buckets=1)
        write_future: Future[LoadResult] | None = None
        for histories, table in self._batches(bucket):  # a batch is written while the next one is read and packed
            batch = self._pack(histories, table)
            if write_future is not None:
                total += write_future.result()
            write_future = self._writer.submit(self._write, *batch)
        if write_future is not None:
            total += write_future.result()
        return replace(total, seconds=round(time.monotonic() - started, 3))

    def _batches(self, bucket: int) -> Iterator[tuple[Histories, pa.Table]]:
        """Yield batches of a bucket: the histories that the tastes were computed from, and the rows of the tastes."""
        workspace = self._dataset.workspace
        path = tastes_file(self._tastes.folder, bucket)
        artifacts.verify(workspace, self._tastes, [path.removeprefix(f"{self._tastes.folder}/")])
        parts = self._dataset.earlier(self._tastes.inputs["dataset"]).parts
        files = self._dataset.manifest.histories_files(bucket, parts=parts)
        with workspace.open_input(path) as stream:
            column_names = [columns.USER, STATE, LAST_PLAYED_AT, PLAYS]
            row_reader = _RowReader(pq.ParquetFile(stream).iter_batches(batch_size=USERS_AT_ONCE, columns=column_names))
            for histories in read_files(workspace, files, USERS_AT_ONCE):
                table = row_reader.take(len(histories))
                is_same = table.num_rows == len(histories) and table.column(PLAYS).to_numpy().tolist() == (
                    histories.lengths.tolist()
                )
                if not is_same or table.column(columns.USER).to_pylist() != histories.user_ids.tolist():
                    raise DamagedArtifactError(
                        f"{path} does not hold the users of bucket {bucket} in the order of the histories; "
                        "run `rayrec taste --force` and `rayrec release create`"
                    )
                yield histories, table

    def _pack(self, histories: Histories, table: pa.Table) -> tuple[Histories, States, list[Change], int]:
        """Return histories and states without deleted users, the changes that add all users, and the number deleted."""
        states, is_deleted = read_states(table, self._layers), self._deleted_users.holds(histories.user_ids)
        if is_deleted.any():
            histories = histories.take(~is_deleted)
            states = States(hidden=states.hidden[~is_deleted], last_played_at=states.last_played_at[~is_deleted])
        return histories, states, self._new_user_changes(histories, states), int(is_deleted.sum())

    def _write(self, histories: Histories, states: States, new_changes: list[Change], deleted: int) -> LoadResult:
        with self._write_lock:
            is_added = self._store.put(new_changes, loading=True)
        total = LoadResult(added=sum(is_added), deleted=deleted)
        existing_users = {
            # unpacked, so that its numbers have the stored precision and can be compared with those in the store
            change.user_id: (unpack_state(change.state), self._state_and_plays(histories, states, row)[1])
            for row, (change, was_added) in enumerate(zip(new_changes, is_added, strict=True))
            if not was_added
        }
        remaining = list(existing_users)
        while remaining:
            result, remaining = self._merge({user_id: existing_users[user_id] for user_id in remaining})
            total += result
        return total

    def _state_and_plays(self, histories: Histories, states: States, row: int) -> tuple[UserState, Plays]:
        user_rows = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
        plays = Plays.of(**histories.columns_at(user_rows))
        state = UserState.start(self._model_id, states, row, plays=len(plays))
        return (state if histories.likes is None else replace(state, likes=_latest_likes(histories.likes, row))), plays

    def _new_user_changes(self, histories: Histories, states: States) -> list[Change]:
        """Return the changes that add users. Users with one piece of plays, nearly all, are packed together."""
        lengths, user_ids = histories.lengths, histories.user_ids.tolist()
        fits_one_piece = (lengths > 0) & (lengths <= PIECE_PLAYS)
        short_histories, short_states = histories, states
        if not fits_one_piece.all():
            short_histories = histories.take(fits_one_piece)
            short_states = States(
                hidden=states.hidden[fits_one_piece], last_played_at=states.last_played_at[fits_one_piece]
            )
        likes = (
            None
            if short_histories.likes is None
            else [_latest_likes(short_histories.likes, row) for row in range(len(short_histories))]
        )
        packed = pack_new_states(self._model_id, short_states, short_histories.lengths, likes)
        pieces = iter(zip(packed, pack_histories(short_histories), strict=True))
        changes = []
        for row, user_id in enumerate(user_ids):
            if fits_one_piece[row]:
                state, plays = next(pieces)
                append = (Piece(int(lengths[row]), plays),)
                changes.append(Change(user_id=user_id, state=state, expected=NO_VERSION, append=append))
            else:
                changes.append(_full_log_change(user_id, NO_VERSION, *self._state_and_plays(histories, states, row)))
        return changes

    def _merge(self, users: dict[str, tuple[UserState, Plays]]) -> tuple[LoadResult, list[str]]:
        """Merge the batch's states with the stored users, whose newer plays are kept.

        Returns the result, and the users whom another writer changed meanwhile.
        """
        changes: list[Change] = []
        newer_counts: list[int] = []
        unchanged = deleted = 0
        for user_id, whole_user in zip(users, self._store.read(list(users), plays=LATEST_PLAYS), strict=True):
            batch_state, plays = users[user_id]
            assert whole_user is not None  # a store keeps a state even of a deleted user
            stored_state = unpack_state(whole_user.stored.state)
            log = unpack_plays(whole_user.log)
            if len(plays) and plays.played_at[0] <= stored_state.forgotten_at:
                deleted += 1
                continue
            if (
                0 < len(log) < stored_state.log_plays
                and stored_state.before_at > batch_state.before_at
                and log.played_at[0] > batch_state.before_at
            ):
                whole_user = self._store.read([user_id])[0] or whole_user  # the log has more newer plays than were read
                stored_state, log = unpack_state(whole_user.stored.state), unpack_plays(whole_user.log)
            stored_plays = Plays.concatenate([log, stored_state.window])
            is_newer = stored_plays.played_at > batch_state.before_at
            newer_plays, older_plays = stored_plays.take(is_newer), stored_plays.take(~is_newer)
            batch_plays = plays.last(len(older_plays))
            # Plays of songs that were added online differ: the batch knows their rows and current vectors.
            has_same_plays = (
                len(log) >= min(stored_state.log_plays, LATEST_PLAYS)  # the store has not lost the log
                and stored_state.plays - len(newer_plays) == len(plays)
                and _are_same(older_plays, batch_plays)
            )
            model_state = stored_state.models.get(self._model_id)
            likes = join_likes([stored_state.likes, batch_state.likes])
            has_all_likes = _are_same(likes, stored_state.likes)
            stored_state = replace(stored_state, likes=likes)
            if (
                has_same_plays
                and has_all_likes
                and model_state is not None
                and model_state.restarts == stored_state.restarts
                and model_state.log_plays == batch_state.log_plays
                and np.array_equal(model_state.start_hidden, batch_state.models[self._model_id].start_hidden)
            ):
                unchanged += 1
                continue
            if has_same_plays:
                changes.append(self._add_state_change(user_id, whole_user, stored_state, batch_state, log))
            else:
                changes.append(
                    self._replace_plays_change(
                        user_id, whole_user, stored_state, batch_state, Plays.concatenate([plays, newer_plays])
                    )
                )
            newer_counts.append(len(newer_plays))
        is_applied = self._store.put(changes, loading=True)
        newer_counts = [count for count, applied in zip(newer_counts, is_applied, strict=True) if applied]
        result = LoadResult(
            renewed=len(newer_counts),
            merged=sum(count > 0 for count in newer_counts),
            unchanged=unchanged,
            deleted=deleted,
            kept_plays=sum(newer_counts),
        )
        return result, [change.user_id for change, applied in zip(changes, is_applied, strict=True) if not applied]

    def _add_state_change(
        self, user_id: str, whole_user: FullUser, stored_state: UserState, batch_state: UserState, log: Plays
    ) -> Change:
        """Return the change for a user whose stored plays include the batch's: the batch's state of the model is added.

        The log is extended to the last play of the batch, if it ends before.
        """
        moved_plays = stored_state.window.take(slice(max(0, batch_state.log_plays - stored_state.log_plays)))
        new_state = stored_state
        model_state = replace(
            batch_state.models[self._model_id], restarts=stored_state.restarts, turn=stored_state.turn - 1
        )
        # A model's state is that at the end of the log, so the log must reach the batch's last play.
        if len(moved_plays):
            new_state = replace(
                stored_state,
                window=stored_state.window.take(slice(len(moved_plays), None)),
                before_at=batch_state.before_at,
                log_plays=batch_state.log_plays,
                turn=stored_state.turn + 1,
            )
        if batch_state.log_plays == new_state.plays:
            model_state = replace(model_state, turn=new_state.turn)
        packed_heard = None
        if new_state.log_plays - new_state.folded > LATEST_PLAYS:
            new_state, heard_songs = fold_heard(
                new_state, np.concatenate([log.songs, moved_plays.songs]), unpack_heard(whole_user.heard)
            )
            packed_heard = pack_heard(heard_songs)
        return Change(
            user_id=user_id,
            state=pack_state(new_state.with_model(self._model_id, model_state)),
            expected=whole_user.stored.version,
            append=_split_into_pieces(moved_plays),
            heard=packed_heard,
        )

    def _replace_plays_change(
        self, user_id: str, whole_user: FullUser, stored_state: UserState, batch_state: UserState, plays: Plays
    ) -> Change:
        """Return the change for a user with other stored plays than the batch's: batch and newer plays replace them."""
        newer_plays = plays.take(slice(batch_state.log_plays, None))
        num_leaving = count_leaving_plays(newer_plays.played_at)
        log = plays.take(slice(batch_state.log_plays + num_leaving))
        new_state = replace(
            stored_state,
            window=newer_plays.take(slice(num_leaving, None)),
            before_at=int(log.played_at[-1]) if len(log) else NEVER,
            log_plays=len(log),
            folded=0,
            turn=stored_state.turn + 1,
            restarts=stored_state.restarts + 1,
        )
        model_state = replace(batch_state.models[self._model_id], restarts=new_state.restarts, turn=stored_state.turn)
        if not len(newer_plays):
            model_state = replace(model_state, turn=new_state.turn)
        return _full_log_change(
            user_id, whole_user.stored.version, new_state.with_model(self._model_id, model_state), log
        )


def _are_same(plays: Plays, other_plays: Plays) -> bool:
    """Return whether plays or likes are of the same songs at the same times."""
    return np.array_equal(plays.songs, other_plays.songs) and np.array_equal(plays.played_at, other_plays.played_at)


def _latest_likes(likes: Histories, row: int) -> Plays:
    """Return the latest likes of one user."""
    user_rows = slice(int(likes.offsets[row]), int(likes.offsets[row + 1]))
    return join_likes([Plays.of(likes.songs[user_rows], likes.played_at[user_rows])])


def _full_log_change(user_id: str, expected: int, state: UserState, log: Plays) -> Change:
    """Return the change that stores a user's whole log, and the state after it."""
    packed_heard = None
    if state.log_plays > LATEST_PLAYS:
        state, heard_songs = fold_heard(state, log.songs, np.zeros(0, np.int32))
        packed_heard = pack_heard(heard_songs)
    return Change(
        user_id=user_id,
        state=pack_state(state),
        expected=expected,
        append=_split_into_pieces(log),
        restart=expected != NO_VERSION,
        heard=packed_heard,
    )


def _split_into_pieces(plays: Plays) -> list[Piece]:
    if len(plays) <= PIECE_PLAYS:
        return [Piece(len(plays), pack_plays(plays))] if len(plays) else []
    parts = [plays.take(slice(start, start + PIECE_PLAYS)) for start in range(0, len(plays), PIECE_PLAYS)]
    return [Piece(len(part), pack_plays(part)) for part in parts]


class _RowReader:
    """Reads the rows of a file, in tables of any size."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._remaining = batches, None

    def take(self, count: int) -> pa.Table:
        """Return the next `count` rows, fewer at the end of the file."""
        parts: list[pa.Table] = [] if self._remaining is None else [self._remaining]
        while sum(part.num_rows for part in parts) < count and (batch := next(self._batches, None)) is not None:
            parts.append(pa.Table.from_batches([batch]))
        table = pa.concat_tables(parts) if parts else pa.table({})
        self._remaining = table.slice(count)
        return table.slice(0, count)
