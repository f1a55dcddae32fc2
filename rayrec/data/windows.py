"""Windows: pieces of histories that the network learns from, in batches of like length.

The batches of an epoch are a function of seed, epoch and the buckets alone. A worker of n takes
every n-th window of each batch, so any number of workers sees the same batches, all of them make
the same number of steps, and a position in the epoch is one number, the step. A worker for whom a
batch holds none takes the step with a window of no inputs. [ours]
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from rayrec.data.histories import Histories

NEVER = np.iinfo(np.int64).min  # the time of the play before the first one


@dataclass(frozen=True, kw_only=True)
class Windows:
    """W windows. Each holds its input plays and, behind them, the plays in which targets may lie."""

    plays: Histories  # one row per window; user ids are empty
    inputs: np.ndarray  # int64 (W,): how many of the plays are inputs
    previous_at: np.ndarray  # int64 (W,): ms UTC of the play before the window, NEVER where there is none

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> "Windows":
        """Some of the windows, in the order of `rows`."""
        return Windows(plays=self.plays.take(rows), inputs=self.inputs[rows], previous_at=self.previous_at[rows])

    def to_arrow(self) -> pa.Table:
        """One row per window."""
        table = self.plays.to_arrow()
        return table.append_column("inputs", pa.array(self.inputs)).append_column(
            "previous_at", pa.array(self.previous_at)
        )

    @classmethod
    def from_arrow(cls, table: pa.Table) -> "Windows":
        """From the rows that `to_arrow` makes."""
        return cls(
            plays=Histories.from_arrow(table),
            inputs=table.column("inputs").to_numpy(),
            previous_at=table.column("previous_at").to_numpy(),
        )


def cut_windows(histories: Histories, window: int, lookahead: int) -> Windows:
    """Cut every history into windows of at most `window` inputs, each input in exactly one window.

    Behind its inputs a window holds up to `lookahead` more plays. A last window of one play has
    nothing to predict and is left out.
    """
    lengths = histories.lengths
    pieces = -(-np.maximum(lengths - 1, 0) // window)  # the last play of a history is only ever a target
    users = np.repeat(np.arange(len(histories)), pieces)
    first = np.concatenate([[0], np.cumsum(pieces)])[:-1]
    starts = (np.arange(len(users)) - np.repeat(first, pieces)) * window
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


def worker_batches(
    windows: Windows, *, batch: int, rank: int, workers: int, rng: np.random.Generator
) -> Iterator[Windows]:
    """One worker's share of each batch; together the shares of all workers are the batch.

    An empty share is the batch's first window without its inputs: there is nothing to learn from it,
    and the songs that the step looks up are those of the batch.
    """
    for rows in batch_rows(windows.inputs, batch, rng):
        share = windows.take(rows[rank::workers])
        yield share if len(share) else replace(windows.take(rows[:1]), inputs=np.zeros(1, dtype=np.int64))


def epoch_units(buckets: int, group: int, *, seed: int, epoch: int) -> list[list[int]]:
    """The buckets in the order of an epoch, `group` together, so that small buckets fill batches."""
    order = np.random.default_rng([seed, epoch]).permutation(buckets)
    return [order[start : start + group].tolist() for start in range(0, buckets, group)]
