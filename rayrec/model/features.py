"""From plays to the tensors of a step: padding, and the context features c_j of the paper.

Shapes: B rows (windows or users), L plays, F features, N songs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayrec.data.histories import Histories
from rayrec.data.windows import NEVER
from rayrec.model.train_config import FeatureSpec

LONGEST_GAP_S = 30 * 24 * 3600.0  # longer gaps, and no previous play at all, count as this one
HOUR_MS = 3600 * 1000
FIRST_HOUR = 3 * 24  # 1970 began on a Thursday; hour 0 of the week is Monday's first


@dataclass(frozen=True, kw_only=True)
class PlayBatch:
    """Rows of plays, padded on the right to the longest."""

    songs_BL: Tensor  # int64, 0 where padded
    gap_BL: Tensor  # float32 in [0, 1], Δ to the previous play, scaled
    length_B: Tensor  # int64, plays of each row; on the CPU, where the packing of sequences wants it
    contexts_BL: Tensor | None = None  # int32 bit sets
    hour_BL: Tensor | None = None  # int64, hour of the week in [0, 168)
    skipped_BL: Tensor | None = None  # bool

    def to(self, device: torch.device) -> "PlayBatch":
        """The batch on another device, lengths excepted."""
        return self.each(lambda values: values.to(device, non_blocking=True), self.length_B)

    def shortened(self, length_B: Tensor) -> "PlayBatch":
        """The first `length_B` plays of each row only; a column of padding where no row has any."""
        longest = max(1, int(length_B.max())) if len(length_B) else 1
        return self.each(lambda values: values[:, :longest], length_B)

    def each(self, change: Callable[[Tensor], Tensor], length_B: Tensor) -> "PlayBatch":
        """The batch with every tensor changed but the lengths, which are given anew."""

        def optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else change(values)

        return PlayBatch(
            songs_BL=change(self.songs_BL),
            gap_BL=change(self.gap_BL),
            length_B=length_B,
            contexts_BL=optional(self.contexts_BL),
            hour_BL=optional(self.hour_BL),
            skipped_BL=optional(self.skipped_BL),
        )


def scale_gap(seconds: np.ndarray) -> np.ndarray:
    """float32: log(1 + seconds), clipped and scaled to [0, 1]. A negative gap counts as none."""
    clipped = np.clip(seconds, 0.0, LONGEST_GAP_S)
    return np.asarray(np.log1p(clipped) / np.log1p(LONGEST_GAP_S), dtype=np.float32)


def gap_seconds(since: np.ndarray, until: np.ndarray) -> np.ndarray:
    """float64: seconds between two times in ms UTC; the longest gap where `since` is NEVER."""
    never = since == NEVER
    return np.where(never, LONGEST_GAP_S, (until - np.where(never, 0, since)) / 1000.0)


def pad(plays: Histories, previous_at: np.ndarray, spec: FeatureSpec) -> PlayBatch:
    """Pad the rows of `plays`; `previous_at` int64 (B,) is the time of the play before each row.

    Only the features that `spec` names are there. Contexts and skips that the plays do not tell
    are none and false.
    """
    lengths = plays.lengths
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]

    def padded(values: np.ndarray, dtype: type) -> Tensor:
        array: np.ndarray = np.zeros(mask.shape, dtype=dtype)
        array[mask] = values
        return torch.from_numpy(array)

    def optional(values: np.ndarray | None, dtype: type) -> Tensor:
        return padded(np.zeros(plays.num_plays, dtype) if values is None else values, dtype)

    before = np.empty_like(plays.played_at)
    before[1:] = plays.played_at[:-1]
    starts = plays.offsets[:-1][lengths > 0]
    before[starts] = previous_at[lengths > 0]
    hours = (plays.played_at // HOUR_MS + FIRST_HOUR) % 168
    return PlayBatch(
        songs_BL=padded(plays.songs, np.int64),
        gap_BL=padded(scale_gap(gap_seconds(before, plays.played_at)), np.float32),
        length_B=torch.from_numpy(lengths),
        contexts_BL=optional(plays.contexts, np.int32) if spec.contexts else None,
        hour_BL=padded(hours, np.int64) if spec.hour or spec.weekday else None,
        skipped_BL=optional(plays.skipped, np.bool_) if spec.skipped else None,
    )


def encode(batch: PlayBatch, spec: FeatureSpec) -> list[Tensor]:
    """The features that a play has beside its song, float32, each (B, L, its width); F together."""
    parts: list[Tensor] = []
    if spec.contexts and batch.contexts_BL is not None:
        bits = torch.arange(len(spec.contexts), device=batch.contexts_BL.device)
        parts.append((batch.contexts_BL.unsqueeze(-1) >> bits & 1).float())
    if spec.gap:
        parts.append(batch.gap_BL.unsqueeze(-1))
    if spec.hour and batch.hour_BL is not None:
        parts.append(torch.nn.functional.one_hot(batch.hour_BL % 24, 24).float())
    if spec.weekday and batch.hour_BL is not None:
        parts.append(torch.nn.functional.one_hot(batch.hour_BL // 24, 7).float())
    if spec.skipped and batch.skipped_BL is not None:
        parts.append(batch.skipped_BL.unsqueeze(-1).float())
    return parts
