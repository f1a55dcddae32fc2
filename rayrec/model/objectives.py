"""Objectives: what a taste vector is trained for. All of them plug in here.

Shapes: U songs of a step, H horizons, P positions that have a target, each of one horizon, T targets of a position at
most, M targets that are there, K negatives, D embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HITS = 0.003  # of the catalog: the first songs, whose popularity falls by Zipf's law rather than by their plays
HITS_POWER = 6.0
SMALLEST = 1e-12  # under a root, whose slope at 0 has no end
# Logits held at once, be there ever so many positions: what a core's caches hold, or enough to fill a GPU.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


def log_popularity(counts: np.ndarray) -> np.ndarray:
    """float32 (N,): log of a song's share of the plays, `counts` int (N,), times (1 + hits / rank)^6 [ours].

    The second factor is for the few songs that everybody hears, of which shares alone say too little:
    docs/method.md#taste-vectors-of-the-long-horizon.
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
    """The songs that taste vectors are trained for. Places are rows of the songs of the step."""

    positions: Tensor  # int64 (P,), flat in (H, B, L inputs)
    horizons_PH: Tensor  # float32, 1 for the position's horizon, else 0
    places_PT: Tensor  # int64, any where a position has fewer than T
    weight_PT: Tensor  # float32, what a target counts for in the loss; 0 where there is none
    weight_P1: Tensor  # float32, the same added up
    missing_PT: Tensor  # float32, 0 where a target is there and no repetition of one before it in the row, else -inf
    hits_PT: Tensor  # int64: the negative that is the same song; K + T where there is none
    prior_PT: Tensor  # float32: added to the logits of the targets
    by_song_M: Tensor  # int64: the targets that are there, flat in (P, T), those of the same song together
    positions_M: Tensor  # int64: their rows
    songs_of_M: Tensor  # int64 (U + 1,): where those of each song begin
    rows: list[int]  # (T,): up to which position any has more than so many targets
    weight_H: Tensor  # float64, what the loss of each horizon counts for

    def weighed(self, totals: np.ndarray) -> "Targets":
        """The same where a target counts for one of as many as its horizon has, float (H,)."""
        each_H = self.weight_H / torch.from_numpy(np.maximum(1, totals))
        weight_P1 = self.horizons_PH @ each_H.to(self.horizons_PH.dtype)[:, None]
        weight_PT = (self.weight_PT > 0) * weight_P1
        return replace(self, weight_PT=weight_PT, weight_P1=weight_PT.sum(dim=1, keepdim=True))

    @classmethod
    def of(
        cls,
        *,
        positions: np.ndarray,
        horizons_PH: np.ndarray,
        songs_PT: np.ndarray,
        places_PT: np.ndarray,
        there_PT: np.ndarray,
        negatives: np.ndarray,
        prior_PT: np.ndarray,
        weight_H: np.ndarray,
        count: int,
    ) -> "Targets":
        """From songs and their places among the `count` songs of the step; each target counts for one.

        `negatives`, int64 (K,), are ascending.
        """
        among = np.minimum(np.searchsorted(negatives, songs_PT), max(0, len(negatives) - 1))
        is_hit = there_PT & (negatives[among] == songs_PT)
        same = (songs_PT[:, :, None] == songs_PT[:, None, :]) & there_PT[:, None, :]
        first = there_PT & ~np.tril(same, -1).any(axis=-1)
        by_song = np.flatnonzero(there_PT)
        by_song = by_song[np.argsort(places_PT.ravel()[by_song], kind="stable")]
        counts = np.bincount(places_PT.ravel()[by_song], minlength=count)
        return cls(
            positions=torch.from_numpy(positions),
            horizons_PH=torch.from_numpy(horizons_PH.astype(np.float32)),
            places_PT=torch.from_numpy(places_PT),
            weight_PT=torch.from_numpy(there_PT.astype(np.float32)),
            weight_P1=torch.from_numpy(there_PT.sum(axis=1, keepdims=True).astype(np.float32)),
            missing_PT=torch.from_numpy(np.where(first, 0, -np.inf).astype(np.float32)),
            hits_PT=torch.from_numpy(np.where(is_hit, among, len(negatives) + songs_PT.shape[1])),
            prior_PT=torch.from_numpy(prior_PT),
            by_song_M=torch.from_numpy(by_song),
            positions_M=torch.from_numpy(by_song // songs_PT.shape[1]),
            songs_of_M=torch.from_numpy(np.append(0, np.cumsum(counts))),
            weight_H=torch.from_numpy(weight_H),
            rows=[int(column.nonzero()[0].max(initial=-1)) + 1 for column in there_PT.T],
        )


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The songs that targets compete with in a step, each once."""

    places_K: Tensor  # int64, rows of the songs of the step
    weight_KH: Tensor  # float32: added to their logits, by horizon


class NegativeSampler:
    """Draws songs by their popularity in the fit range, with replacement."""

    def __init__(self, counts: np.ndarray, count: int) -> None:
        """`counts` int (N,) are the plays of each song; `count` songs are drawn by them."""
        self._counts, self._total, self._count = counts, max(1, counts.sum()), count
        self._cumulative = np.cumsum(counts / self._total)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Songs, int64 (K,), each once and ascending, and what is added to their logits, float32 (K,).

        A song that is drawn several times counts as many times. Each negative stands for the songs that were not
        drawn, so its logit is corrected by how often it is expected.
        """
        points = rng.random(self._count) * self._cumulative[-1]
        drawn = np.searchsorted(self._cumulative, points, side="right")
        songs, times = np.unique(np.minimum(drawn, len(self._cumulative) - 1), return_counts=True)
        # The expected number of times that a song is among those drawn, for the logQ correction.
        expected = np.maximum(self._counts[songs] / self._total * self._count, 1e-12)
        return songs, np.log(times).astype(np.float32) - np.log(expected).astype(np.float32)


# (songs of the step (U, D), taste vectors (P, D), their targets, negatives, scale of cosine logits (P,)) -> loss, added
# up over targets by weight
ObjectiveFunction = Callable[[Tensor, Tensor, Targets, Negatives, Tensor], Tensor]


def cosine(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor) -> Tensor:
    """L_cos = 1 − cos(t, s) [paper], added up over targets."""
    cosines_PT = (taste_PD.unsqueeze(1) * songs_UD[targets.places_PT]).sum(-1)
    return ((1.0 - cosines_PT) * targets.weight_PT).sum()


def l2(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor) -> Tensor:
    """‖t − s‖2 [paper], added up over targets; on unit vectors, so that it weighs a far target less than L_cos does."""
    squared_PT = (taste_PD.unsqueeze(1) - songs_UD[targets.places_PT]).square().sum(-1)
    return (squared_PT.clamp(min=SMALLEST).sqrt() * targets.weight_PT).sum()


def softmax(songs_UD: Tensor, taste_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor) -> Tensor:
    """Cross-entropy of the targets among themselves and the negatives, added up [ours].

    The targets of a position stand for themselves, each song once, and a negative that is one of them does not
    count. Over all songs where all of them are the negatives, else an estimate of that.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        taste_PD * scale_P.unsqueeze(1), songs_UD, targets, negatives
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy, chunk by chunk: on a CPU neither logits nor chances of all positions are ever held.

    The gradients are computed in the same pass, while a chunk's chances are in the caches. Products are in bfloat16
    where autocast says so; sums stay float32. Few operations touch what is as large as all logits: that is what a
    step costs on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, query_PD: Tensor, songs_UD: Tensor, targets: Targets, negatives: Negatives) -> Tensor:
        """The sum."""
        device = query_PD.device.type
        product = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_PD.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _cross_entropy(query_PD, songs_UD, targets, negatives, product)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradients of the forward pass, times that of the sum."""
        query, songs = ctx.saved_tensors
        return query * gradient, songs * gradient, None, None


def _cross_entropy(
    query_PD: Tensor,
    songs_UD: Tensor,
    targets: Targets,
    negatives: Negatives,
    product: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients by queries and songs."""
    (positions, each), count = targets.places_PT.shape, len(negatives.places_K)
    own_PT = _products(query_PD, songs_UD, targets) + targets.prior_PT
    counted_PT = own_PT + targets.missing_PT
    best_P1, best_at_P1 = counted_PT.max(dim=1, keepdim=True)
    # A column behind the targets is where the hits of targets go that are no negatives.
    others_PX = nn.functional.pad(counted_PT, (0, 1), value=-torch.inf)
    vectors_KD = songs_UD.index_select(0, negatives.places_K)
    # The weights of the negatives by horizon are one more product each, so that all horizons are in one matrix.
    left = torch.cat([query_PD, targets.horizons_PH], dim=1).to(product)
    right = torch.cat([vectors_KD, negatives.weight_KH], dim=1).to(product)
    vectors_KD = vectors_KD.to(product)
    weighed_PD = (query_PD * targets.weight_P1).to(product)
    rows = max(1, min(positions, CHUNK_LOGITS[query_PD.device.type] // (count + each + 1)))
    logits, chances = (own_PT.new_empty(rows, count + each + 1) for _ in range(2))
    grad_query, own_chances = torch.empty_like(query_PD), torch.empty_like(own_PT)
    grad_vectors = query_PD.new_empty(count, query_PD.shape[1])
    for begin in range(0, positions, rows):
        here = slice(begin, begin + rows)
        chunk, chance = (buffer[: min(rows, positions - begin)] for buffer in (logits, chances))
        _multiply(left[here], right.T, chunk[:, :count])
        chunk[:, count:] = others_PX[here]
        chunk.scatter_(1, targets.hits_PT[here], -torch.inf)
        torch.softmax(chunk, dim=1, out=chance)
        own_chances[here] = chance[:, count : count + each]
        of_negatives = chance[:, :count].to(product)
        _multiply(of_negatives, vectors_KD, grad_query[here])
        _multiply(of_negatives.T, weighed_PD[here], grad_vectors, add=begin > 0)
    smallest = torch.finfo(own_chances.dtype).tiny
    total_P1 = best_P1 - own_chances.gather(1, best_at_P1).clamp_(min=smallest).log_()
    loss = torch.dot((total_P1 - own_PT).flatten(), targets.weight_PT.flatten())
    grad_own_PT = own_chances.mul_(targets.weight_P1).sub_(targets.weight_PT)
    grad_query.mul_(targets.weight_P1).add_(_weighed_sums(songs_UD, targets.places_PT, grad_own_PT))
    grad_songs = nn.functional.embedding_bag(
        targets.positions_M,
        query_PD,
        targets.songs_of_M,
        mode="sum",
        per_sample_weights=grad_own_PT.flatten().index_select(0, targets.by_song_M),
        include_last_offset=True,
    )
    return loss, grad_query, grad_songs.index_add_(0, negatives.places_K, grad_vectors)


def _products(query_PD: Tensor, songs_UD: Tensor, targets: Targets) -> Tensor:
    """(P, T): queries times their targets, 0 from the last position on that has so many; a column at a time."""
    found_PT = query_PD.new_zeros(targets.places_PT.shape)
    for place, rows in enumerate(targets.rows):
        songs = songs_UD.index_select(0, targets.places_PT[:rows, place])
        column = found_PT[:rows, place].view(rows, 1, 1)
        torch.bmm(query_PD[:rows].unsqueeze(1), songs.unsqueeze(2), out=column)
    return found_PT


def _weighed_sums(songs_UD: Tensor, places_PT: Tensor, weight_PT: Tensor) -> Tensor:
    """(P, D): the songs at the places of each row, by weight, added up."""
    return nn.functional.embedding_bag(places_PT, songs_UD, mode="sum", per_sample_weights=weight_PT)


def _multiply(left: Tensor, right: Tensor, target: Tensor, *, add: bool = False) -> None:
    """Put a product into the target, or add it; the target's numbers may be of another type."""
    if left.dtype == target.dtype:
        torch.addmm(target, left, right, beta=float(add), out=target)
    elif add:
        target.add_(left @ right)
    else:
        target.copy_(left @ right)


OBJECTIVES: dict[str, ObjectiveFunction] = {
    "sampled-softmax": softmax,
    "softmax": softmax,
    "cosine": cosine,
    "l2": l2,
}
