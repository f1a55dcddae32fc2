"""Objectives: what a taste vector is trained for. All of them plug in here.

Shapes: P positions that have a target, K negatives, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rayrec.taste.model import TasteModel

SMALLEST = 1e-12  # under a root, whose slope at 0 has no end


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What tells one horizon's loss from another's."""

    scale: Tensor  # of cosine logits
    # Share of the logQ correction [ours]. With all of it the logits are the songs' chances, with none their
    # chances over their popularity.
    correction: float = 1.0


class Negatives:
    """Draws songs by their popularity in the fit range, with replacement."""

    def __init__(self, counts: np.ndarray, count: int) -> None:
        """`counts` int (N,) are the plays of each song; `count` is K."""
        share = counts.astype(np.float64) / max(1, counts.sum())
        self._cumulative = torch.from_numpy(np.cumsum(share))
        # The expected number of times that a song is drawn, for the logQ correction.
        self.log_expected = torch.from_numpy(np.log(np.maximum(share * count, 1e-12))).float()
        self._count = count
        self.songs_K = torch.zeros(0, dtype=torch.int64)

    def draw(self, generator: torch.Generator, device: torch.device) -> None:
        """Draw the negatives of the next step: `songs_K`, int64."""
        points = torch.rand(self._count, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(self._cumulative, points * self._cumulative[-1])
        self.songs_K = drawn.clamp_(max=len(self._cumulative) - 1).to(device)
        self.log_expected = self.log_expected.to(device)


ObjectiveFunction = Callable[[TasteModel, Tensor, Tensor, Negatives, Goal], Tensor]


def cosine(model: TasteModel, taste_PD: Tensor, targets_P: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """L_cos = 1 − cos(t, s) [paper], summed over positions."""
    return (1.0 - (taste_PD * model.song_vectors(targets_P)).sum(-1)).sum()


def l2(model: TasteModel, taste_PD: Tensor, targets_P: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """‖t − s‖2 [paper], summed over positions; on unit vectors, so that it weighs a far target less than L_cos does."""
    return (taste_PD - model.song_vectors(targets_P)).square().sum(-1).clamp(min=SMALLEST).sqrt().sum()


def softmax(model: TasteModel, taste_PD: Tensor, targets_P: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """Cross-entropy of the target among all songs, summed [ours]; for small catalogs, its cost grows with N."""
    songs_ND = model.song_vectors(torch.arange(model.config.num_songs, device=targets_P.device))
    logits = taste_PD @ songs_ND.T * goal.scale
    if goal.correction < 1:
        logits = logits + (1 - goal.correction) * negatives.log_expected.to(logits.device)
    return cross_entropy(logits, targets_P, reduction="sum")


def sampled_softmax(model: TasteModel, taste_PD: Tensor, targets_P: Tensor, negatives: Negatives, goal: Goal) -> Tensor:
    """`softmax` estimated from drawn negatives, with the logQ correction, summed [ours].

    Each negative stands for the songs that were not drawn, so its logit is corrected by how often it is
    expected among the K. The target stands for itself, and a negative that is the target does not count.
    """
    log_expected = negatives.log_expected
    positive_P = (taste_PD * model.song_vectors(targets_P)).sum(-1) * goal.scale
    positive_P = positive_P + (1 - goal.correction) * log_expected[targets_P]
    songs_KD = model.song_vectors(negatives.songs_K)
    negative_PK = taste_PD @ songs_KD.T * goal.scale - goal.correction * log_expected[negatives.songs_K]
    negative_PK = negative_PK.masked_fill(negatives.songs_K == targets_P.unsqueeze(-1), -torch.inf)
    logits = torch.cat([positive_P.unsqueeze(-1), negative_PK], dim=-1)
    return cross_entropy(logits, torch.zeros_like(targets_P), reduction="sum")


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "sampled-softmax": sampled_softmax,
    "softmax": softmax,
    "cosine": cosine,
    "l2": l2,
}
