"""Objectives: what a taste vector is trained for. All of them plug in here.

Shapes: U songs of a step, P positions that have a target, T targets of a position at most, K negatives,
D embedding, C positions of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 1e-12  # under a root, whose slope at 0 has no end
CHUNK_LOGITS = 1_000_000  # held at once: 4 MB, which a core's caches still hold, be there ever so many positions


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The songs that taste vectors are trained for on one horizon. Places are rows of the songs of the step."""

    positions: Tensor  # int64 (P,), flat in (B, L inputs)
    places_PT: Tensor  # int64, 0 where a position has fewer than T
    there_PT: Tensor  # bool
    first_PT: Tensor  # bool: there, and no repetition of a target before it in the row
    hits_PT: Tensor  # int64: the negative that is the same song; K where there is none
    prior_PT: Tensor  # float32: added to the logits of the targets
    count: int  # targets that are there


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The songs that targets compete with in a step, each once."""

    places_K: Tensor  # int64, rows of the songs of the step
    weight_K: Tensor  # float32: added to their logits


class NegativeSampler:
    """Draws songs by their popularity in the fit range, with replacement."""

    def __init__(self, counts: np.ndarray, count: int) -> None:
        """`counts` int (N,) are the plays of each song; `count` songs are drawn by them."""
        share = counts.astype(np.float64) / max(1, counts.sum())
        self._cumulative = np.cumsum(share)
        # The expected number of times that a song is among those drawn, for the logQ correction.
        self._log_expected = np.log(np.maximum(share * count, 1e-12)).astype(np.float32)
        self._count = count

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Songs, int64 (K,), each once and ascending, and what is added to their logits, float32 (K,).

        A song that is drawn several times counts as many times. Each negative stands for the songs that were not
        drawn, so its logit is corrected by how often it is expected.
        """
        points = rng.random(self._count) * self._cumulative[-1]
        drawn = np.searchsorted(self._cumulative, points, side="right")
        songs, times = np.unique(np.minimum(drawn, len(self._cumulative) - 1), return_counts=True)
        return songs, np.log(times).astype(np.float32) - self._log_expected[songs]


# (songs of the step (U, D), taste vectors (P, D), their targets, negatives, scale of cosine logits) -> summed loss
ObjectiveFunction = Callable[[Tensor, Tensor, Targets, Negatives, Tensor], Tensor]


def cosine(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale: Tensor) -> Tensor:
    """L_cos = 1 − cos(t, s) [paper], summed over targets."""
    return _over_targets(1.0 - _cosines(songs_UD, taste_PD, targets), targets)


def l2(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale: Tensor) -> Tensor:
    """‖t − s‖2 [paper], summed over targets; on unit vectors, so that it weighs a far target less than L_cos does."""
    squared_PT = (taste_PD.unsqueeze(1) - songs_UD[targets.places_PT]).square().sum(-1)
    return _over_targets(squared_PT.clamp(min=SMALLEST).sqrt(), targets)


def softmax(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale: Tensor) -> Tensor:
    """Cross-entropy of the targets among themselves and the negatives, summed [ours].

    The targets of a position stand for themselves, each song once, and a negative that is one of them does not
    count. Over all songs where all of them are the negatives, else an estimate of that.
    """
    query_PD = taste_PD * scale
    own_PT = _cosines(songs_UD, query_PD, targets) + targets.prior_PT
    negatives_KD = songs_UD[negatives.places_K]
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        query_PD, own_PT, negatives_KD, negatives.weight_K, targets
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The summed cross-entropy, chunk by chunk: neither logits nor chances of all positions are ever held.

    The gradients are computed in the same pass, while a chunk's chances are in the caches. Products are in bfloat16
    where autocast says so; sums stay float32.
    """

    @staticmethod
    def forward(
        ctx: Any, query_PD: Tensor, own_PT: Tensor, negatives_KD: Tensor, weight_K: Tensor, targets: Targets
    ) -> Tensor:
        """The sum; `own_PT` are the targets' logits."""
        device, positions, count = query_PD.device.type, len(query_PD), len(negatives_KD)
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_PD.dtype
        with torch.autocast(device, enabled=False):
            query, negatives = query_PD.to(product), negatives_KD.to(product)
            own = own_PT.masked_fill(~targets.first_PT, -torch.inf)
            share_P = targets.there_PT.sum(-1, keepdim=True).to(own.dtype)
            rows = max(1, CHUNK_LOGITS // (count + 1))
            logits = query.new_empty(min(rows, positions), count + 1, dtype=own.dtype)
            loss, grad_negatives = own.new_zeros(()), torch.zeros_like(negatives_KD, dtype=own.dtype)
            grad_query, grad_own = torch.empty_like(query_PD, dtype=own.dtype), torch.empty_like(own)
            for begin in range(0, positions, rows):
                here = slice(begin, begin + rows)
                chunk = logits[: min(rows, positions - begin)]
                chunk[:, :count] = query[here] @ negatives.T + weight_K
                chunk[:, count] = -torch.inf  # where the hits of targets go that are no negatives
                chunk.scatter_(1, targets.hits_PT[here], -torch.inf)
                top = torch.maximum(chunk.amax(-1, keepdim=True), own[here].amax(-1, keepdim=True))
                chunk.sub_(top).exp_()
                own_chances = (own[here] - top).exp()
                total = chunk.sum(-1, keepdim=True) + own_chances.sum(-1, keepdim=True)
                losses = total.log() + top - own_PT[here]
                loss += losses.where(targets.there_PT[here], 0.0).sum()
                weight = share_P[here] / total
                grad_own[here] = own_chances * weight - targets.there_PT[here].to(own.dtype)
                chances = chunk.mul_(weight)[:, :count].to(product)
                grad_query[here] = chances @ negatives
                grad_negatives += chances.T @ query[here]
        ctx.save_for_backward(grad_query, grad_own, grad_negatives)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """The gradients of the forward pass, times that of the sum."""
        query, own, negatives = ctx.saved_tensors
        return query * gradient, own * gradient, negatives * gradient, None, None


def _cosines(songs_UD: Tensor, taste_PD: Tensor, targets: Targets) -> Tensor:
    """(P, T): of taste vectors with their targets, of an unimportant song where there is none."""
    return (taste_PD.unsqueeze(1) * songs_UD[targets.places_PT]).sum(-1)


def _over_targets(losses_PT: Tensor, targets: Targets) -> Tensor:
    """The sum of the losses of all targets that are there."""
    return losses_PT.where(targets.there_PT, 0.0).sum()


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "sampled-softmax": softmax,
    "softmax": softmax,
    "cosine": cosine,
    "l2": l2,
}
