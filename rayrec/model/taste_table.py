"""Stored taste vectors: one row per user, with the network state from which a later run continues."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.ragged import group_of_each_item, offsets_of
from rayrec.errors import DamagedArtifactError

if TYPE_CHECKING:
    from rayrec.model.inference import TasteEncoder  # imports torch, which readers of rows do not need

STATE = "state"  # column: float32 list, layers × H
HEARD = "heard"  # column: int32 list, the distinct songs played, ascending
LAST_PLAYED_AT = "last_played_at"  # column: ms UTC
PLAYS = "plays"  # column: number of plays in the state


@dataclass(frozen=True, kw_only=True)
class States:
    """The states of the network after the last play of each of U users."""

    # float32 (U, state layers, H): the outputs of the layers, the cells of an LSTM, the sums of the averages
    hidden: np.ndarray
    last_played_at: np.ndarray  # int64 (U,), ms UTC; NEVER for a user without plays


def taste_column(horizon: str) -> str:
    """Return the column name of a horizon's taste vectors, float32 lists of length D."""
    return f"taste_{horizon}"


def tastes_file(folder: str, bucket: int) -> str:
    """Return the path of the Parquet file of one bucket of users in a tastes artifact."""
    return f"{folder}/bucket={bucket:05d}/tastes.parquet"


@dataclass(kw_only=True)
class TasteRows:
    """The rows of U users before they are written: network states, songs heard and numbers of plays."""

    user_ids: np.ndarray  # object (U,)
    hidden: np.ndarray  # float32 (U, state layers, H)
    last_played_at: np.ndarray  # int64 (U,), ms UTC
    heard: pa.ListArray  # int32 lists: the distinct songs of each user, ascending
    plays: np.ndarray  # int64 (U,), number of plays in the state

    def states(self, positions: np.ndarray) -> States:
        """Return the states of the users at `positions`."""
        return States(hidden=self.hidden[positions], last_played_at=self.last_played_at[positions])

    def put(self, positions: np.ndarray, states: States, plays: np.ndarray) -> None:
        """Set the states of the users at `positions`, and the numbers of plays in these states."""
        self.hidden[positions], self.last_played_at[positions] = states.hidden, states.last_played_at
        self.plays[positions] = plays

    def hear(self, positions: np.ndarray, histories: Histories) -> None:
        """Add the songs of `histories` to the songs heard by the users at `positions`."""
        earlier_songs = self.heard.take(pa.array(positions))
        lengths = np.diff(earlier_songs.offsets.to_numpy())
        rows = np.concatenate([group_of_each_item(lengths), histories.rows])
        merged = heard_lists(
            rows, np.concatenate([earlier_songs.flatten().to_numpy(), histories.songs]), len(positions)
        )
        order = np.arange(len(self.user_ids))
        order[positions] = len(order) + np.arange(len(positions))
        self.heard = pa.concat_arrays([self.heard, merged]).take(pa.array(order))


def taste_table(encoder: TasteEncoder, histories: Histories, at: int) -> pa.Table:
    """Return one row per user: id, a taste vector per horizon at `at` (ms UTC), state, songs heard, plays."""
    _, states = encoder.run(histories)
    rows = TasteRows(
        user_ids=histories.user_ids,
        hidden=states.hidden,
        last_played_at=states.last_played_at,
        heard=heard_songs(histories),
        plays=histories.lengths,
    )
    return rows_table(encoder, rows, at)


def rows_table(encoder: TasteEncoder, rows: TasteRows, at: int) -> pa.Table:
    """Return the rows in the form in which they are stored, with the taste vectors at the moment `at` (ms UTC)."""
    states = States(hidden=rows.hidden, last_played_at=rows.last_played_at)
    vectors = encoder.taste_vectors_by_horizon(states, at, list(encoder.model.config.horizons))
    return pa.table(
        {columns.USER: pa.array(rows.user_ids, pa.string())}
        | {taste_column(name): _fixed_lists(values) for name, values in vectors.items()}
        | {
            STATE: _fixed_lists(rows.hidden.reshape(len(rows.user_ids), math.prod(rows.hidden.shape[1:]))),
            HEARD: rows.heard,
            LAST_PLAYED_AT: pa.array(rows.last_played_at),
            PLAYS: pa.array(rows.plays),
        }
    )


def taste_writer(stream: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of rows to a Parquet file.

    Values of vectors hardly repeat, but their bytes compress well if grouped by position within the value.
    """
    vectors = [f"{field.name}.list.element" for field in schema if field.type == pa.list_(pa.float32())]
    return pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False, use_byte_stream_split=vectors)


def read_states(table: pa.Table, layers: int) -> States:
    """Return the states of the users in rows that `taste_table` returned."""
    values = table.column(STATE).combine_chunks().flatten().to_numpy()
    width = len(values) // max(1, table.num_rows * layers)
    return States(
        hidden=values.reshape(table.num_rows, layers, width),
        last_played_at=table.column(LAST_PLAYED_AT).to_numpy(),
    )


def heard_songs(histories: Histories) -> pa.ListArray:
    """int32 lists: the distinct songs of each user, ascending."""
    return heard_lists(histories.rows, histories.songs, len(histories))


def heard_lists(rows: np.ndarray, songs: np.ndarray, users: int) -> pa.ListArray:
    """int32 lists of `users` rows: the distinct songs of each row, ascending; `rows` and `songs` are int (P,)."""
    order = np.lexsort((songs, rows))
    rows, songs = rows[order], songs[order]
    is_first = np.ones(len(songs), dtype=bool)
    is_first[1:] = (rows[1:] != rows[:-1]) | (songs[1:] != songs[:-1])
    counts = np.bincount(rows[is_first], minlength=users)
    offsets = offsets_of(counts).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(songs[is_first]))


def _fixed_lists(rows: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))


@dataclass(kw_only=True)
class Counts:
    """How many users were computed in which way, and how many plays this took."""

    new: int = 0  # users without an earlier row
    continued: int = 0  # users whose state was continued with their new plays
    recomputed: int = 0  # users computed from their first play, since a new play is older than their state
    unchanged: int = 0  # users without new plays
    plays_computed: int = 0  # plays that went through the network

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


def full_tables(
    encoder: TasteEncoder, dataset: Dataset, bucket: int, *, at: int, users: int, counts: Counts
) -> Iterator[pa.Table]:
    """Yield the rows of a bucket, computed from the first play of each user."""
    for histories in dataset.read_bucket(bucket, users):
        yield _compute_table(encoder, histories, at, counts)


def continued_tables(
    encoder: TasteEncoder,
    dataset: Dataset,
    bucket: int,
    base: Iterable[pa.Table],
    *,
    first_part: int,
    at: int,
    users: int,
    counts: Counts,
) -> Iterator[pa.Table]:
    """Yield the rows of a bucket, computed from the earlier rows `base` and the plays of parts from `first_part` on.

    Only the new parts are read; the whole bucket is read only if new plays of a user are older than the user's state.
    Raises `DamagedArtifactError` if the rows are not sorted by user id.
    """
    new_reader = _ForwardReader(dataset.read_bucket(bucket, users, first_part=first_part))
    full_reader = _ForwardReader(dataset.read_bucket(bucket, users))  # reads nothing unless it is needed
    last_user_id = ""
    for table in base:
        rows = rows_of(table, encoder)
        if (rows.user_ids[1:] <= rows.user_ids[:-1]).any() or (len(table) and rows.user_ids[0] <= last_user_id):
            raise DamagedArtifactError(
                "the rows of the earlier taste vectors are not sorted by user ID; run `rayrec taste --full`"
            )
        last_user_id = str(rows.user_ids[-1]) if len(table) else last_user_id
        unchanged, new_tables = len(table), []
        recomputed_ids = [np.zeros(0, dtype=object)]
        for histories in new_reader.up_to(last_user_id):
            is_known = np.isin(histories.user_ids, rows.user_ids)
            unchanged -= int(is_known.sum())
            recomputed_ids.append(_continue_states(encoder, rows, histories.take(is_known), counts))
            if not is_known.all():
                new_tables.append(_compute_table(encoder, histories.take(~is_known), at, counts))
        for histories in full_reader.find(np.concatenate(recomputed_ids)):
            _recompute_states(encoder, rows, histories, counts)
        counts.unchanged += unchanged
        updated_table = rows_table(encoder, rows, at)
        yield pa.concat_tables([updated_table, *new_tables]).sort_by(columns.USER) if new_tables else updated_table
    for histories in new_reader.remaining():
        yield _compute_table(encoder, histories, at, counts)


def rows_of(table: pa.Table, encoder: TasteEncoder) -> TasteRows:
    """Return stored rows as arrays that can be updated."""
    states = read_states(table, encoder.model.config.state_layers)
    return TasteRows(
        user_ids=table.column(columns.USER).to_numpy(),
        hidden=states.hidden.copy(),
        last_played_at=states.last_played_at.copy(),
        heard=table.column(HEARD).combine_chunks(),
        plays=table.column(PLAYS).to_numpy().copy(),
    )


def _compute_table(encoder: TasteEncoder, histories: Histories, at: int, counts: Counts) -> pa.Table:
    counts.new += len(histories)
    counts.plays_computed += histories.num_plays
    return taste_table(encoder, histories, at)


def _continue_states(encoder: TasteEncoder, rows: TasteRows, histories: Histories, counts: Counts) -> np.ndarray:
    """Continue states with new plays; return the ids of users whose new plays are older (left unchanged)."""
    if not len(histories):
        return np.zeros(0, dtype=object)
    positions = pd.Index(rows.user_ids).get_indexer(pd.Index(histories.user_ids))
    # New plays at the moment of the last play come after it, as they do when parts are merged.
    is_later = histories.played_at[histories.offsets[:-1]] >= rows.last_played_at[positions]
    continued, continued_positions = histories.take(is_later), positions[is_later]
    _, states = encoder.run(continued, start=rows.states(continued_positions))
    rows.put(continued_positions, states, rows.plays[continued_positions] + continued.lengths)
    rows.hear(continued_positions, continued)
    counts.continued += len(continued)
    counts.plays_computed += continued.num_plays
    return np.asarray(histories.user_ids[~is_later])


def _recompute_states(encoder: TasteEncoder, rows: TasteRows, histories: Histories, counts: Counts) -> None:
    positions = pd.Index(rows.user_ids).get_indexer(pd.Index(histories.user_ids))
    _, states = encoder.run(histories)
    rows.put(positions, states, histories.lengths)
    rows.hear(positions, histories)
    counts.recomputed += len(histories)
    counts.plays_computed += histories.num_plays


class _ForwardReader:
    """Finds users in a stream of batches that is sorted by user id, and reads the stream only once."""

    def __init__(self, batches: Iterator[Histories]) -> None:
        self._batches = batches
        self._remainder: Histories | None = None

    def find(self, user_ids: np.ndarray) -> Iterator[Histories]:
        """Yield the histories of `user_ids`, which must be ascending, batch by batch."""
        if len(user_ids):
            for batch in self.up_to(str(user_ids[-1])):
                yield batch.take(np.isin(batch.user_ids, user_ids))

    def up_to(self, user_id: str) -> Iterator[Histories]:
        """Yield the histories up to and including `user_id` that have not been read yet."""
        while (batch := self._next()) is not None:
            end = int(np.searchsorted(batch.user_ids, user_id, side="right"))
            if end:
                yield batch.take(np.arange(end))
            if end < len(batch):
                self._remainder = batch.take(np.arange(end, len(batch)))
                return

    def remaining(self) -> Iterator[Histories]:
        """Yield all histories that have not been read yet."""
        while (batch := self._next()) is not None:
            yield batch

    def _next(self) -> Histories | None:
        batch, self._remainder = self._remainder, None
        return next(self._batches, None) if batch is None else batch
