"""Windows: pieces of histories that the network learns from, in batches of like length. [ours]

A worker's share of a batch is the windows of it that the worker reads; it may hold none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from rayrec.data.histories import Histories, concatenate

_COLUMNS = ("inputs", "previous_at", "places")  # of Windows beside the plays, one number a window
NEVER = np.iinfo(np.int64).min  # the time of the play before the first one


@dataclass(frozen=True, kw_only=True)
class Windows:
    """W windows of a batch. Each holds its input plays and, behind them, the plays in which targets may lie."""

    plays: Histories  # one row per window; user ids are empty
    inputs: np.ndarray  # int64 (W,): how many of the plays are inputs
    previous_at: np.ndarray  # int64 (W,): ms UTC of the play before the window, NEVER where there is none
    places: np.ndarray  # int64 (W,): of each window in its batch, over all workers

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> "Windows":
        """Some of the windows, in the order of `rows`."""
        return Windows(
            plays=self.plays.take(rows),
            inputs=self.inputs[rows],
            previous_at=self.previous_at[rows],
            places=self.places[rows],
        )

    def to_arrow(self) -> pa.Table:
        """One row per window."""
        table = self.plays.to_arrow()
        for name in _COLUMNS:
            table = table.append_column(name, pa.array(getattr(self, name)))
        return table

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Windows":
        """From the rows that `to_arrow` makes."""
        numbers = {name: table.column(name).to_numpy() for name in _COLUMNS}
        return cls(plays=Histories.from_arrow(table), **numbers)

    @classmethod
    def joined(cls, parts: Sequence["Windows"]) -> "Windows":
        """Those of all parts as one batch, in their order; none where there are no parts."""
        parts = [part for part in parts if len(part)]
        numbers = {
            name: np.concatenate([np.zeros(0, dtype=np.int64), *(getattr(part, name) for part in parts)])
            for name in ("inputs", "previous_at")
        }
        plays = concatenate([part.plays for part in parts])
        return cls(plays=plays, places=np.arange(len(plays)), **numbers)


def count_inputs(lengths: np.ndarray, window: int) -> np.ndarray:
    """int64 (W,): the inputs of the windows that `cut_windows` makes of histories of so many plays, int (U,)."""
    users, starts = _pieces(lengths, window)
    return np.asarray(np.minimum(window, lengths[users] - 1 - starts))


def _pieces(lengths: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 (W,): the user of each window, and the place where it starts in the user's history."""
    pieces = -(-np.maximum(lengths - 1, 0) // window)  # the last play of a history is only ever a target
    users = np.repeat(np.arange(len(lengths)), pieces)
    return users, (np.arange(len(users)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * window


def cut_windows(histories: Histories, window: int, lookahead: int) -> Windows:
    """Cut every history into windows of at most `window` inputs, each input in exactly one window.

    Behind its inputs a window holds up to `lookahead` more plays. A last window of one play has
    nothing to predict and is left out.
    """
    lengths = histories.lengths
    users, starts = _pieces(lengths, window)
    inputs = np.minimum(window, lengths[users] - 1 - starts)
    held = np.minimum(inputs + lookahead, lengths[users] - starts)
    begin = histories.offsets[users] + starts
    offsets = np.concatenate([[0], np.cumsum(held)]).astype(np.int64)
    plays = np.repeat(begin - offsets[:-1], held) + np.arange(offsets[-1])
    before = np.where(starts > 0, histories.played_at[np.maximum(begin - 1, 0)], NEVER) if len(begin) else begin
    return Windows(
        plays=Histories(
            user_ids=np.full(len(users), "", dtype=object),
            offsets=offsets,
            songs=histories.songs[plays],
            played_at=histories.played_at[plays],
            contexts=None if histories.contexts is None else histories.contexts[plays],
            skipped=None if histories.skipped is None else histories.skipped[plays],
        ),
        inputs=inputs,
        previous_at=before,
        places=np.arange(len(users)),
    )


def batch_rows(inputs: np.ndarray, batch: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each batch: windows of like length together, batches in random order.

    `inputs` int (W,) are the windows' lengths. Every batch has at least `batch` rows, the odd ones
    spread over all; fewer windows than that are one batch.
    """
    if not len(inputs):
        return []
    order = np.lexsort((rng.random(len(inputs)), inputs))
    batches = np.array_split(order, max(1, len(order) // batch))
    return [batches[number] for number in rng.permutation(len(batches))]


def batches_in_memory(windows: Windows, batch: int, rng: np.random.Generator) -> Iterator[Windows]:
    """The batches of windows that are all at hand."""
    for rows in batch_rows(windows.inputs, batch, rng):
        yield replace(windows.take(rows), places=np.arange(len(rows)))
