"""From the batch job's tastes to a store of user states: bucket by bucket, resumed where it was stopped.

U users of a batch.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.parts import read_files
from rayrec.errors import DamagedArtifactError, MismatchError
from rayrec.model.checkpoint import load_model
from rayrec.model.inference import TasteEncoder
from rayrec.model.taste_table import LAST_PLAYED_AT, PLAYS, STATE, states_of, tastes_file
from rayrec.online.state_codec import pack_plays, pack_state, unpack_plays, unpack_state
from rayrec.online.stores.state_store import NOT_THERE, Change, StateStore
from rayrec.online.user_state import Plays, Step, UserState, gather, plan, scatter
from rayrec.progress import progress
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest

USERS_AT_ONCE = 1_000  # in one transaction of the store, which other writers wait for


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of the users of a load, or of some of its buckets."""

    buckets: int = 0
    added: int = 0  # users who were not in the store
    renewed: int = 0  # users who were: their states are the batch's now
    merged: int = 0  # of those, users with plays newer than the batch's, which were kept
    unchanged: int = 0  # users whose states were the batch's already, perhaps with newer plays
    kept_plays: int = 0  # the newer plays of those merged
    seconds: float = 0.0

    def __add__(self, other: "Loaded") -> "Loaded":
        return Loaded(**{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(Loaded)})

    @property
    def users(self) -> int:
        """All of them."""
        return self.added + self.renewed + self.unchanged


def load_states(dataset: Dataset, store: StateStore, release: Manifest, *, repeat: bool = False) -> Loaded:
    """Load the tastes of a release and the plays they were computed from; all that was loaded, this time or before.

    Each bucket is noted in the store when it is done, and left out by a later call; with `repeat` none is. A
    user's plays in the store that are newer than the batch's stay. Raises `MismatchError` for a
    release of a data set that the workspace's does not descend from, `DamagedArtifactError` for tastes that are not
    what their checksums say: the replicas, which load none, do not look.
    """
    tastes = artifacts.load(dataset.workspace, "tastes", release.inputs["tastes"])
    if not dataset.descends_from(tastes.inputs["dataset"]):
        raise MismatchError(
            f"tastes {tastes.id} were computed from data set {tastes.inputs['dataset']}, the workspace holds "
            f"{dataset.manifest.id}; run `rayrec taste` and `rayrec release create`"
        )
    buckets, loader = dataset.manifest.buckets, _Loader(dataset, store, tastes)
    done = {} if repeat else _read_note(store, tastes)
    with progress("User states", buckets) as bar:
        bar.advance(len(done))
        for bucket in range(buckets):
            if bucket not in done:
                done[bucket] = loader.load(bucket)
                store.write_note(_note_name(tastes), json.dumps({key: asdict(value) for key, value in done.items()}))
                bar.advance()
    return sum(done.values(), Loaded())


class _Loader:
    """Loads buckets of one tastes artifact."""

    def __init__(self, dataset: Dataset, store: StateStore, tastes: Manifest) -> None:
        self._dataset, self._store, self._tastes = dataset, store, tastes
        model = artifacts.load(dataset.workspace, "models", tastes.inputs["models"])
        self._model_id = model.id
        self._encoder = TasteEncoder(load_model(dataset.workspace, model.folder))
        self._layers = self._encoder.model.config.state_layers

    def load(self, bucket: int) -> Loaded:
        """Load one bucket."""
        began, total = time.monotonic(), Loaded(buckets=1)
        for histories, table in self._batches(bucket):
            total += self._load_batch(histories, table)
        return replace(total, seconds=round(time.monotonic() - began, 3))

    def _batches(self, bucket: int) -> Iterator[tuple[Histories, pa.Table]]:
        """The histories of a bucket, without plays that were appended later, and the rows of tastes beside them."""
        workspace = self._dataset.workspace
        path = tastes_file(self._tastes.folder, bucket)
        artifacts.verify(workspace, self._tastes, [path.removeprefix(f"{self._tastes.folder}/")])
        parts = self._dataset.earlier(self._tastes.inputs["dataset"]).parts
        files = self._dataset.manifest.histories_files(bucket, parts=parts)
        with workspace.open_input(path) as stream:
            wanted = [columns.USER, STATE, LAST_PLAYED_AT, PLAYS]
            rows = _Rows(pq.ParquetFile(stream).iter_batches(batch_size=USERS_AT_ONCE, columns=wanted))
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

    def _load_batch(self, histories: Histories, table: pa.Table) -> Loaded:
        states = states_of(table, self._layers)
        batch = {
            user_id: (
                UserState.start(self._model_id, states, row, plays=int(histories.lengths[row])),
                _plays_of(histories, row),
            )
            for row, user_id in enumerate(histories.user_ids.tolist())
        }
        changes = [
            Change(user_id=user_id, state=pack_state(state), expected=NOT_THERE, append=pack_plays(plays))
            for user_id, (state, plays) in batch.items()
        ]
        added = self._store.put(changes)
        total, left = Loaded(added=sum(added)), [name for name, put in zip(batch, added, strict=True) if not put]
        while left:
            merged, left = self._merge({user_id: batch[user_id] for user_id in left})
            total += merged
        return total

    def _merge(self, users: dict[str, tuple[UserState, Plays]]) -> tuple[Loaded, list[str]]:
        """Put the batch's states over those in the store, with newer plays on top; and who changed meanwhile."""
        versions: dict[str, int] = {}
        steps: dict[str, Step] = {}
        unchanged = 0
        for user_id, (state, plays) in users.items():
            whole = self._store.read(user_id)
            if whole is None:
                continue  # cannot be: stores forget nobody
            stored = unpack_state(whole.stored.state)
            held = Plays.joined([unpack_plays(whole.log), stored.window])
            newer = held.take(held.played_at > state.before_at)
            if stored.model == state.model and len(held) - len(newer) == len(plays):
                unchanged += 1
                continue
            versions[user_id] = whole.stored.version
            steps[user_id] = plan(replace(state, rejected=stored.rejected), newer)
        states = self._finish(list(steps.values()))
        changes = [
            Change(
                user_id=user_id,
                state=pack_state(state),
                expected=versions[user_id],
                append=pack_plays(Plays.joined([users[user_id][1], steps[user_id].left])),
                restart=True,
            )
            for user_id, state in zip(steps, states, strict=True)
        ]
        put = dict(zip(steps, self._store.put(changes), strict=True))
        kept = [len(steps[user_id].outcomes) for user_id, done in put.items() if done]
        told = Loaded(
            renewed=len(kept), merged=sum(count > 0 for count in kept), unchanged=unchanged, kept_plays=sum(kept)
        )
        return told, [user_id for user_id, done in put.items() if not done]

    def _finish(self, steps: Sequence[Step]) -> list[UserState]:
        if not any(step.runs for step in steps):
            return scatter(steps, None)
        plays, start = gather(steps)
        return scatter(steps, self._encoder.run(plays, start=start)[1])


class _Rows:
    """Rows of a file, taken in pieces of any size."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches, self._rest = batches, None

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, fewer at the end."""
        parts: list[pa.Table] = [] if self._rest is None else [self._rest]
        while sum(part.num_rows for part in parts) < count and (batch := next(self._batches, None)) is not None:
            parts.append(pa.Table.from_batches([batch]))
        joined = pa.concat_tables(parts) if parts else pa.table({})
        self._rest = joined.slice(count)
        return joined.slice(0, count)


def _plays_of(histories: Histories, row: int) -> Plays:
    own = slice(int(histories.offsets[row]), int(histories.offsets[row + 1]))
    return Plays.of(
        histories.songs[own],
        histories.played_at[own],
        contexts=None if histories.contexts is None else histories.contexts[own],
        skipped=None if histories.skipped is None else histories.skipped[own],
    )


def _note_name(tastes: Manifest) -> str:
    return f"load:{tastes.id}"


def _read_note(store: StateStore, tastes: Manifest) -> dict[int, Loaded]:
    """The buckets that an earlier load has done."""
    text = store.note(_note_name(tastes))
    return {int(bucket): Loaded(**told) for bucket, told in json.loads(text or "{}").items()}
