"""Objectives: what a taste vector is trained for. All of them plug in here.

Shapes: P positions that have a target, T targets of a position at most, -1 where it has fewer, K negatives,
D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from rayrec.model.network import TasteModel

SMALLEST = 1e-12  # under a root, whose slope at 0 has no end


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What tells one horizon's loss from another's."""

    scale: Tensor  # of cosine logits
    # float32 (N,), added to the logits to make those of the songs' chances [ours]: with popularity in it, the cosines
    # need not say how popular songs are.
    prior: Tensor | None = None

    def logits(self, cosines: Tensor, songs: Tensor) -> Tensor:
        """Of chances, from cosines (..., X) with songs int64 (..., X) or (X,)."""
        return cosines * self.scale if self.prior is None else cosines * self.scale + self.prior[songs]


class Negatives:
    """Songs drawn by their popularity in the fit range, with replacement, and songs of the batch beside them."""

    def __init__(self, counts: np.ndarray, count: int, in_batch: int = 0) -> None:
        """`counts` int (N,) are the plays of each song; K is `count` drawn by them and `in_batch` of the batch."""
        share = counts.astype(np.float64) / max(1, counts.sum())
        self._cumulative = torch.from_numpy(np.cumsum(share))
        # The expected number of times that a song is among the K, for the logQ correction. Each play of the fit
        # range is a target once an epoch, so those of a batch come by popularity too.
        self.log_expected = torch.from_numpy(np.log(np.maximum(share * (count + in_batch), 1e-12))).float()
        self._count = count
        self.songs_K = torch.zeros(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator, device: torch.device, in_batch: Tensor | None = None) -> None:
        """Draw the negatives of the next step: `songs_K`, int64; `in_batch`, int64, are those of its batch."""
        points = torch.rand(self._count, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(self._cumulative, points * self._cumulative[-1])
        self.songs_K = drawn.clamp_(max=len(self._cumulative) - 1).to(device)
        if in_batch is not None:
            self.songs_K = torch.cat([self.songs_K, in_batch])
        self.log_expected = self.log_expected.to(device)


ObjectiveFunction = Callable[[TasteModel, Tensor, Tensor, Negatives, Goal], Tensor]


def cosine(model: TasteModel, taste_PD: Tensor, targets_PT: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """L_cos = 1 − cos(t, s) [paper], summed over targets."""
    return _over_targets(1.0 - _cosines(model, taste_PD, targets_PT), targets_PT)


def l2(model: TasteModel, taste_PD: Tensor, targets_PT: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """‖t − s‖2 [paper], summed over targets; on unit vectors, so that it weighs a far target less than L_cos does."""
    songs_PTD = model.song_vectors(targets_PT.clamp(min=0))
    squared_PT = (taste_PD.unsqueeze(1) - songs_PTD).square().sum(-1)
    return _over_targets(squared_PT.clamp(min=SMALLEST).sqrt(), targets_PT)


def softmax(model: TasteModel, taste_PD: Tensor, targets_PT: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """Cross-entropy of a target among all songs, summed [ours]; for small catalogs, its cost grows with N."""
    songs_N = torch.arange(model.config.num_songs, device=targets_PT.device)
    logits_PN = goal.logits(taste_PD @ model.song_vectors(songs_N).T, songs_N)
    chances_PT = log_softmax(logits_PN, dim=-1).gather(1, targets_PT.clamp(min=0))
    return _over_targets(-chances_PT, targets_PT)


def sampled_softmax(
    model: TasteModel, taste_PD: Tensor, targets_PT: Tensor, negatives: Negatives, goal: Goal
) -> Tensor:
    """`softmax` estimated from negatives, with the logQ correction, summed [ours].

    Each negative stands for the songs that were not drawn, so its logit is corrected by how often it is
    expected among the K. The targets of a position stand for themselves, each song once, and a negative
    that is one of them does not count.
    """
    songs_K = negatives.songs_K
    targets_logits_PT = goal.logits(_cosines(model, taste_PD, targets_PT), targets_PT.clamp(min=0))
    negative_PK = goal.logits(taste_PD @ model.song_vectors(songs_K).T, songs_K) - negatives.log_expected[songs_K]
    hit_PK = torch.zeros_like(negative_PK, dtype=torch.bool)
    for targets_P in targets_PT.unbind(1):
        hit_PK |= songs_K == targets_P.unsqueeze(-1)
    own_PT = targets_logits_PT.masked_fill((targets_PT < 0) | _repeated(targets_PT), -torch.inf)
    logits = torch.cat([own_PT, negative_PK.masked_fill(hit_PK, -torch.inf)], dim=-1)
    return _over_targets(logits.logsumexp(-1, keepdim=True) - targets_logits_PT, targets_PT)


def _cosines(model: TasteModel, taste_PD: Tensor, targets_PT: Tensor) -> Tensor:
    """(P, T): of taste vectors with their targets, of an unimportant song where there is none."""
    return (taste_PD.unsqueeze(1) * model.song_vectors(targets_PT.clamp(min=0))).sum(-1)


def _repeated(targets_PT: Tensor) -> Tensor:
    """bool (P, T): whether a target stands in the row before."""
    same_PTT = targets_PT.unsqueeze(2) == targets_PT.unsqueeze(1)
    return same_PTT.tril(-1).any(-1)


def _over_targets(losses_PT: Tensor, targets_PT: Tensor) -> Tensor:
    """The sum of the losses of all targets that are there."""
    return losses_PT.where(targets_PT >= 0, 0.0).sum()


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "sampled-softmax": sampled_softmax,
    "softmax": softmax,
    "cosine": cosine,
    "l2": l2,
}
