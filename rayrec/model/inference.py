"""Inference: taste vectors from histories, in batches and in pieces, or continued from a stored state.

Apart from training, this module computes all taste vectors: those of the batch job, the evaluation and single
requests, so that they agree. U users, Q queries, D embedding dimensions, H hidden units, X head inputs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Histories, Queries
from rayrec.data.ragged import group_of_each_item, ranges
from rayrec.data.windows import NEVER
from rayrec.model.network import TasteModel, gap_seconds, pad, scale_gap
from rayrec.model.taste_table import States

PLAYS_PER_PASS = 1 << 14  # padded plays that go through the network at once
PLAYS_PER_CHUNK = 1024  # plays per user and pass; the next pass over a longer history continues from its state


class TasteEncoder:
    """Runs a taste network over histories. Holds no state between calls."""

    def __init__(
        self, model: TasteModel, device: torch.device | str = "cpu", *, plays_per_pass: int = PLAYS_PER_PASS
    ) -> None:
        """At most `plays_per_pass` padded plays go through the network at once, but at least one piece of a history."""
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self._plays_per_pass = plays_per_pass

    def initial_states(self, users: int) -> States:
        """The states of users before their first play."""
        config = self.model.config
        return States(
            hidden=np.zeros((users, config.state_layers, config.hidden_dim), dtype=np.float32),
            last_played_at=np.full(users, NEVER, dtype=np.int64),
        )

    @torch.inference_mode()
    def run(
        self, histories: Histories, queries: Queries | None = None, start: States | None = None
    ) -> tuple[np.ndarray, States]:
        """Return the head inputs at the queries, float32 (Q, X), and the states after all plays.

        `start` holds the states before the first play of `histories`. The plays seen by `queries` count from there.
        """
        start = start or self.initial_states(len(histories))
        hidden = torch.from_numpy(start.hidden.copy())  # (U, layers, H), updated chunk by chunk
        collector = _QueryCollector(queries, self._head_inputs(hidden))
        for rows in passes(histories.lengths, self._plays_per_pass):
            self._run_rows(histories, rows, start.last_played_at, hidden, collector)
        last_played_at = start.last_played_at.copy()
        has_plays = histories.lengths > 0
        last_played_at[has_plays] = histories.played_at[histories.offsets[1:][has_plays] - 1]
        return collector.head_inputs_QX.numpy(), States(hidden=hidden.numpy(), last_played_at=last_played_at)

    @torch.inference_mode()
    def vectors(self, histories: Histories, queries: Queries, horizon: str) -> np.ndarray:
        """float32 (Q, D): the normalized taste vectors at the queries, each from the plays before its query only."""
        return self.vectors_of(histories, queries, (horizon,))[horizon]

    @torch.inference_mode()
    def vectors_of(self, histories: Histories, queries: Queries, horizons: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the same as `vectors` for several horizons, with one pass over the plays."""
        head_inputs, _ = self.run(histories, queries)
        last_positions = histories.offsets[queries.rows] + queries.plays_before - 1
        played_at = histories.played_at[np.maximum(last_positions, 0)] if histories.num_plays else last_positions
        last_played_at = np.where(queries.plays_before > 0, played_at, NEVER)
        gap = gap_seconds(last_played_at, queries.at)
        return {horizon: self.project(head_inputs, gap, horizon) for horizon in horizons}

    def tastes(self, states: States, at: int | np.ndarray, horizon: str) -> np.ndarray:
        """float32 (U, D): the normalized taste vectors at the moment `at` (ms UTC), from states alone."""
        return self.taste_vectors_by_horizon(states, at, (horizon,))[horizon]

    def taste_vectors_by_horizon(
        self, states: States, at: int | np.ndarray, horizons: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Return the same as `tastes` for several horizons."""
        # A copy, since stored states are read-only.
        head_inputs = self._head_inputs(torch.tensor(states.hidden)).numpy()
        gap = gap_seconds(states.last_played_at, np.asarray(at))
        return {horizon: self.project(head_inputs, gap, horizon) for horizon in horizons}

    @torch.inference_mode()
    def project(self, head_inputs: np.ndarray, gap: np.ndarray, horizon: str) -> np.ndarray:
        """float32 (Q, D): the taste vectors for head inputs (Q, X) and seconds since the last play (Q,)."""
        request_gap = torch.from_numpy(scale_gap(gap)).to(self.device)
        taste_vectors = self.model.head(torch.from_numpy(head_inputs).to(self.device), request_gap, horizon)
        return taste_vectors.float().cpu().numpy()

    @torch.inference_mode()
    def _head_inputs(self, hidden: Tensor) -> Tensor:
        """(U, X): the head inputs of states (U, layers, H)."""
        return self.model.head_inputs_of(hidden.transpose(0, 1))

    def _run_rows(
        self,
        histories: Histories,
        rows: np.ndarray,
        last_played_at: np.ndarray,
        hidden: Tensor,
        collector: "_QueryCollector",
    ) -> None:
        plays = histories.take(rows)
        for chunk_start in range(0, int(plays.lengths.max()), PLAYS_PER_CHUNK):
            chunk = plays.span(chunk_start, chunk_start + PLAYS_PER_CHUNK)
            active = np.flatnonzero(chunk.lengths > 0)
            previous_at = (
                last_played_at[rows] if chunk_start == 0 else plays.played_at[plays.offsets[:-1] + chunk_start - 1]
            )
            batch = pad(chunk.take(active), previous_at[active], self.model.config.features).to(self.device)
            user_rows = torch.from_numpy(rows[active])
            state = hidden[user_rows].transpose(0, 1).contiguous().to(self.device)
            head_inputs_BLX, last_state = self.model.trunk(batch, state)
            hidden[user_rows] = last_state.transpose(0, 1).float().cpu()
            collector.collect(rows[active], chunk_start, head_inputs_BLX)


class _QueryCollector:
    """Collects the head inputs after the last play that each query has seen."""

    def __init__(self, queries: Queries | None, initial_inputs_UX: Tensor) -> None:
        self._rows = np.zeros(0, np.int64) if queries is None else np.asarray(queries.rows)
        self._last_positions = np.zeros(0, np.int64) if queries is None else np.asarray(queries.plays_before) - 1
        self._order = np.argsort(self._rows, kind="stable")
        self._sorted_rows = self._rows[self._order]
        self.head_inputs_QX = initial_inputs_UX[torch.from_numpy(self._rows)].clone()

    def collect(self, rows: np.ndarray, chunk_start: int, head_inputs_BLX: Tensor) -> None:
        starts = np.searchsorted(self._sorted_rows, rows, side="left")
        counts = np.searchsorted(self._sorted_rows, rows, side="right") - starts
        query_indices = self._order[ranges(starts, counts)]
        positions = self._last_positions[query_indices] - chunk_start
        is_in_chunk = (positions >= 0) & (positions < head_inputs_BLX.shape[1])
        batch_rows = group_of_each_item(counts)[is_in_chunk]
        head_inputs = head_inputs_BLX[torch.from_numpy(batch_rows), torch.from_numpy(positions[is_in_chunk])]
        self.head_inputs_QX[torch.from_numpy(query_indices[is_in_chunk])] = head_inputs.float().cpu()


def passes(lengths: np.ndarray, plays_per_pass: int = PLAYS_PER_PASS) -> Iterator[np.ndarray]:
    """Yield the rows that have plays, grouped by similar length, so that a pass is small and has little padding."""
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    widths = np.minimum(lengths[order], PLAYS_PER_CHUNK)
    end = len(order)
    while end > 0:
        start = max(0, end - max(1, plays_per_pass // int(widths[end - 1])))
        yield order[start:end]
        end = start
