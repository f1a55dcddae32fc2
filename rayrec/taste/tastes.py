"""The taste vectors of all users at rest: one row per user, with the state from which a later run goes on."""

import math

import numpy as np
import pyarrow as pa

from rayrec.data import columns
from rayrec.data.histories import Histories
from rayrec.taste.encoding import States, TasteEncoder

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


def taste_table(encoder: TasteEncoder, histories: Histories, at: int) -> pa.Table:
    """One row per user: id, a vector for each horizon at the moment `at` (ms UTC), state, songs heard."""
    _, states = encoder.run(histories)
    vectors = {name: encoder.tastes(states, at, name) for name in encoder.model.config.horizons}
    return pa.table(
        {columns.USER: pa.array(histories.user_ids, pa.string())}
        | {taste_column(name): _fixed_lists(rows) for name, rows in vectors.items()}
        | {
            STATE: _fixed_lists(states.hidden.reshape(len(histories), math.prod(states.hidden.shape[1:]))),
            HEARD: heard_songs(histories),
            LAST_PLAYED_AT: pa.array(states.last_played_at),
            PLAYS: pa.array(histories.lengths),
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
    rows = histories.rows
    order = np.lexsort((histories.songs, rows))
    rows, songs = rows[order], histories.songs[order]
    first = np.ones(len(songs), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]) | (songs[1:] != songs[:-1])
    counts = np.bincount(rows[first], minlength=len(histories))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(songs[first]))


def _fixed_lists(rows: np.ndarray) -> pa.ListArray:
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows.reshape(-1)))
