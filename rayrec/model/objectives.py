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

HITS = 0.003  # of the catalog: the first songs, whose popularity falls by Zipf's law rather than by their plays
HITS_POWER = 6.0
SMALLEST = 1e-12  # under a root, whose slope at 0 has no end
# Logits held at once, be there ever so many positions: what a core's caches hold, or enough to fill a GPU.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


def log_popularity(counts: np.ndarray) -> np.ndarray:
    """float32 (N,): log of a song's share of the plays, `counts` int (N,), times (1 + hits / rank)^6 [ours].

    The second factor is for the few songs that everybody hears, of which shares alone say too little: a quarter of it,
    which the default leaves out, is 173 for the 1st of 10,000, 1.5 for the 100th and next to nothing for most. On
    30Music's validation range scores without half of the log shares tell a song played from any other in 0.774 of
    pairs and from one drawn by Zipf's law in 0.655, those without a quarter of this in some 0.778 and 0.77.
    """
    share = np.maximum(counts / max(1, counts.sum()), 1e-12)
    ranks = np.empty(len(counts))
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return np.asarray(np.log(share) + HITS_POWER * np.log1p(HITS * len(counts) / ranks), dtype=np.float32)


def log_prior(counts: np.ndarray, correction: float) -> np.ndarray:
    """float32 (N,): what is added to logits of likeness to make logits of chance; none where the correction is 1."""
    return np.asarray((1 - correction) * log_popularity(counts), dtype=np.float32)


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
        device, (positions, targets_each) = query_PD.device.type, own_PT.shape
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_PD.dtype
        with torch.autocast(device, enabled=False):
            query, negatives, weight_K = query_PD.to(product), negatives_KD.to(product), weight_K.to(product)
            count = len(negatives)
            share_P1 = targets.there_PT.sum(-1, keepdim=True).to(own_PT.dtype)
            weighed = query_PD * share_P1
            # Behind the negatives stand the targets, and a column where the hits of targets go that are no negatives.
            others_P = torch.full_like(share_P1, -torch.inf)
            own = torch.cat([own_PT.masked_fill(~targets.first_PT, -torch.inf), others_P], dim=-1)
            hits = torch.where(targets.hits_PT < count, targets.hits_PT, count + targets_each)
            rows = max(1, CHUNK_LOGITS[device] // (count + targets_each + 1))
            logits = own.new_empty(min(rows, positions), count + targets_each + 1)
            grad_query, grad_negatives = torch.empty_like(query_PD), torch.zeros_like(negatives_KD)
            parts = []
            for begin in range(0, positions, rows):
                here = slice(begin, begin + rows)
                chunk = logits[: min(rows, positions - begin)]
                chunk[:, :count] = torch.addmm(weight_K, query[here], negatives.T)
                chunk[:, count:] = own[here]
                chunk.scatter_(1, hits[here], -torch.inf)
                total = chunk.logsumexp(-1, keepdim=True)
                chances = chunk.sub_(total).exp_()
                parts.append(torch.cat([total, chances[:, count : count + targets_each]], dim=-1))
                chances = chances[:, :count].to(product)
                grad_query[here] = chances @ negatives
                grad_negatives += chances.T @ weighed[here].to(product)
            found = torch.cat(parts) if parts else own[:, : targets_each + 1]
            loss = (found[:, :1] - own_PT).where(targets.there_PT, 0.0).sum()
            grad_own = found[:, 1:] * share_P1 - targets.there_PT.to(own.dtype)
            grad_query *= share_P1
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
