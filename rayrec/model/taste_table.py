"""The taste vectors of all users at rest: one row per user, with the state from which a later run goes on."""

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.histories import Histories
from rayrec.model.inference import States, TasteEncoder

STATE = "state"  # column: float32 list, layers × H
HEARD = "heard"  # column: int32 list, the songs played, each once, ascending
LAST_PLAYED_AT = "last_played_at"  # column: ms UTC
PLAYS = "plays"  # column: plays that the state has seen


def taste_column(horizon: str) -> str:
    """The column of a horizon's vectors, float32 lists of D."""
    return f"taste_{horizon}"


def tastes_file(folder: str, bucket: int) -> str:
    """The Parquet file of one bucket of users in a tastes artifact."""
    return f"{folder}/bucket={bucket:05d}/tastes.parquet"


@dataclass(kw_only=True)
class Rows:
    """The rows of U users before they are written: where the network stands, and what it has seen."""

    user_ids: np.ndarray  # object (U,)
    hidden: np.ndarray  # float32 (U, state layers, H)
    last_played_at: np.ndarray  # int64 (U,), ms UTC
    heard: pa.ListArray  # int32 lists: the songs of each user, each once, ascending
    plays: np.ndarray  # int64 (U,)

    def states(self, place: np.ndarray) -> States:
        """The states of some users."""
        return States(hidden=self.hidden[place], last_played_at=self.last_played_at[place])

    def put(self, place: np.ndarray, states: States, plays: np.ndarray) -> None:
        """Set the states of some users, and how many plays they have seen."""
        self.hidden[place], self.last_played_at[place] = states.hidden, states.last_played_at
        self.plays[place] = plays

    def hear(self, place: np.ndarray, histories: Histories) -> None:
        """Add the songs of `histories` to what the users at `place` have heard."""
        known = self.heard.take(pa.array(place))
        lengths = np.diff(known.offsets.to_numpy())
        rows = np.concatenate([np.repeat(np.arange(len(place)), lengths), histories.rows])
        merged = heard_lists(rows, np.concatenate([known.flatten().to_numpy(), histories.songs]), len(place))
        order = np.arange(len(self.user_ids))
        order[place] = len(order) + np.arange(len(place))
        self.heard = pa.concat_arrays([self.heard, merged]).take(pa.array(order))


def taste_table(encoder: TasteEncoder, histories: Histories, at: int) -> pa.Table:
    """One row per user: id, a vector for each horizon at the moment `at` (ms UTC), state, songs heard."""
    _, states = encoder.run(histories)
    rows = Rows(
        user_ids=histories.user_ids,
        hidden=states.hidden,
        last_played_at=states.last_played_at,
        heard=heard_songs(histories),
        plays=histories.lengths,
    )
    return rows_table(encoder, rows, at)


def rows_table(encoder: TasteEncoder, rows: Rows, at: int) -> pa.Table:
    """The rows as they are stored, with the vectors at the moment `at` (ms UTC)."""
    states = States(hidden=rows.hidden, last_played_at=rows.last_played_at)
    vectors = {name: encoder.tastes(states, at, name) for name in encoder.model.config.horizons}
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


def states_of(table: pa.Table, layers: int) -> States:
    """The states of the users in rows that `taste_table` made."""
    values = table.column(STATE).combine_chunks().flatten().to_numpy()
    width = len(values) // max(1, table.num_rows * layers)
    return States(
        hidden=values.reshape(table.num_rows, layers, width),
        last_played_at=table.column(LAST_PLAYED_AT).to_numpy(),
    )


def heard_songs(histories: Histories) -> pa.ListArray:
    """int32 lists: the songs of each user, each once, ascending."""
    return heard_lists(histories.rows, histories.songs, len(histories))


def heard_lists(rows: np.ndarray, songs: np.ndarray, users: int) -> pa.ListArray:
    """int32 lists of `users`: the songs of each row, int (P,), each once, ascending."""
    order = np.lexsort((songs, rows))
    rows, songs = rows[order], songs[order]
    first = np.ones(len(songs), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]) | (songs[1:] != songs[:-1])
    counts = np.bincount(rows[first], minlength=users)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(songs[first]))


def _fixed_lists(rows: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))
