"""The training objectives of taste vectors. `OBJECTIVES` lists all of them.

Shapes: U songs of a step, H horizons, P positions with a target (each of one horizon), T targets per position at most,
M existing targets, K negatives, D embedding dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HITS = 0.003  # share of the catalog: up to about this popularity rank, songs are hits and get a higher prior
HITS_POWER = 6.0
SMALLEST = 1e-12  # lower limit under a square root, whose slope at 0 is infinite
# Logits in memory at once, for any number of positions: those that fit into the caches of a core, or fill a GPU.
CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


def log_popularity(counts: np.ndarray) -> np.ndarray:
    """float32 (N,): the log of each song's share of the plays times (1 + hits / rank)^6 [ours].

    `counts`, int (N,), are the plays of each song. The second factor raises the few songs that everybody plays, whose
    popularity the share alone understates: docs/method.md#taste-vectors-of-the-long-horizon.
    """
    share = np.maximum(counts / max(1, counts.sum()), 1e-12)
    ranks = np.empty(len(counts))
    ranks[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    return np.asarray(np.log(share) + HITS_POWER * np.log1p(HITS * len(counts) / ranks), dtype=np.float32)


def log_prior(counts: np.ndarray, correction: float) -> np.ndarray:
    """float32 (N,): the share 1 − `correction` of the log popularity, which training adds to the logits of songs."""
    return np.asarray((1 - correction) * log_popularity(counts), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The songs that taste vectors are trained to predict. Places are row numbers among the songs of the step."""

    positions: Tensor  # int64 (P,), flat positions in (H, B, L inputs)
    horizons_PH: Tensor  # float32, 1 for the position's horizon, else 0
    song_rows_PT: Tensor  # int64, any valid place if a position has fewer than T targets
    weight_PT: Tensor  # float32, weight of each target in the loss; 0 if there is no target
    weight_P1: Tensor  # float32, the sums of the rows of `weight_PT`
    missing_PT: Tensor  # float32, 0 for an existing target whose song is not earlier in the row, else -inf
    hits_PT: Tensor  # int64: number of the negative with the same song; K + T if there is none
    prior_PT: Tensor  # float32: added to the logits of the targets
    by_song_M: Tensor  # int64: the existing targets, as flat positions in (P, T), grouped by song
    positions_M: Tensor  # int64: the rows of these targets
    songs_of_M: Tensor  # int64 (U + 1,): where the targets of each song begin in `by_song_M`
    rows: list[int]  # (T,): for each column, the number of rows up to the last one with a target there
    weight_H: Tensor  # float64, weight of the loss of each horizon

    def weighed(self, totals: np.ndarray) -> "Targets":
        """Return the targets, each with the weight of its horizon divided by the horizon's `totals`, float (H,)."""
        target_weight_H = self.weight_H / torch.from_numpy(np.maximum(1, totals))
        weight_P1 = self.horizons_PH @ target_weight_H.to(self.horizons_PH.dtype)[:, None]
        weight_PT = (self.weight_PT > 0) * weight_P1
        return replace(self, weight_PT=weight_PT, weight_P1=weight_PT.sum(dim=1, keepdim=True))

    @classmethod
    def of(
        cls,
        *,
        positions: np.ndarray,
        horizons_PH: np.ndarray,
        songs_PT: np.ndarray,
        song_rows_PT: np.ndarray,
        exists_PT: np.ndarray,
        negatives: np.ndarray,
        prior_PT: np.ndarray,
        weight_H: np.ndarray,
        count: int,
    ) -> "Targets":
        """Create targets of weight 1 from songs and their places among the `count` songs of the step.

        `negatives`, int64 (K,), must be ascending.
        """
        negative_indices = np.minimum(np.searchsorted(negatives, songs_PT), max(0, len(negatives) - 1))
        is_hit = exists_PT & (negatives[negative_indices] == songs_PT)
        is_same = (songs_PT[:, :, None] == songs_PT[:, None, :]) & exists_PT[:, None, :]
        is_first = exists_PT & ~np.tril(is_same, -1).any(axis=-1)
        by_song = np.flatnonzero(exists_PT)
        by_song = by_song[np.argsort(song_rows_PT.ravel()[by_song], kind="stable")]
        counts = np.bincount(song_rows_PT.ravel()[by_song], minlength=count)
        return cls(
            positions=torch.from_numpy(positions),
            horizons_PH=torch.from_numpy(horizons_PH.astype(np.float32)),
            song_rows_PT=torch.from_numpy(song_rows_PT),
            weight_PT=torch.from_numpy(exists_PT.astype(np.float32)),
            weight_P1=torch.from_numpy(exists_PT.sum(axis=1, keepdims=True).astype(np.float32)),
            missing_PT=torch.from_numpy(np.where(is_first, 0, -np.inf).astype(np.float32)),
            hits_PT=torch.from_numpy(np.where(is_hit, negative_indices, len(negatives) + songs_PT.shape[1])),
            prior_PT=torch.from_numpy(prior_PT),
            by_song_M=torch.from_numpy(by_song),
            positions_M=torch.from_numpy(by_song // songs_PT.shape[1]),
            songs_of_M=torch.from_numpy(np.append(0, np.cumsum(counts))),
            weight_H=torch.from_numpy(weight_H),
            rows=[int(column.nonzero()[0].max(initial=-1)) + 1 for column in exists_PT.T],
        )


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """The distinct songs that targets compete with in a step."""

    song_rows_K: Tensor  # int64, rows of the songs of the step
    weight_KH: Tensor  # float32: added to their logits, by horizon


class NegativeSampler:
    """Draws songs by their popularity in the fit range, with replacement."""

    def __init__(self, counts: np.ndarray, count: int) -> None:
        """`counts`, int (N,), are the plays of each song; `count` songs are drawn in proportion to them."""
        self._counts, self._total, self._count = counts, max(1, counts.sum()), count
        self._cumulative = np.cumsum(counts / self._total)

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the distinct songs drawn, int64 (K,), ascending, and corrections to add to their logits, float32 (K,).

        A song that is drawn several times counts that many times. The negatives also represent the songs that were not
        drawn, so each logit is corrected by the expected number of draws of its song (logQ correction).
        """
        points = rng.random(self._count) * self._cumulative[-1]
        samples = np.searchsorted(self._cumulative, points, side="right")
        songs, draw_counts = np.unique(np.minimum(samples, len(self._cumulative) - 1), return_counts=True)
        # The expected number of draws of each song, for the logQ correction.
        expected_counts = np.maximum(self._counts[songs] / self._total * self._count, 1e-12)
        return songs, np.log(draw_counts).astype(np.float32) - np.log(expected_counts).astype(np.float32)


# (songs of the step (U, D), taste vectors (P, D), their targets, negatives, scale of cosine logits (P,)) -> the loss, a
# weighted sum over the targets
ObjectiveFunction = Callable[[Tensor, Tensor, Targets, Negatives, Tensor], Tensor]


def cosine(
    songs_UD: Tensor, taste_vectors_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor
) -> Tensor:
    """L_cos = 1 − cos(t, s) [paper]: the weighted sum over the targets."""
    cosines_PT = (taste_vectors_PD.unsqueeze(1) * songs_UD[targets.song_rows_PT]).sum(-1)
    return ((1.0 - cosines_PT) * targets.weight_PT).sum()


def l2(songs_UD: Tensor, taste_vectors_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor) -> Tensor:
    """‖t − s‖2 [paper]: the weighted sum over the targets. On unit vectors, a far target counts less than in L_cos."""
    squared_PT = (taste_vectors_PD.unsqueeze(1) - songs_UD[targets.song_rows_PT]).square().sum(-1)
    return (squared_PT.clamp(min=SMALLEST).sqrt() * targets.weight_PT).sum()


def softmax(
    songs_UD: Tensor, taste_vectors_PD: Tensor, targets: Targets, negatives: Negatives, scale_P: Tensor
) -> Tensor:
    """Cross-entropy of each target among the targets of its position and the negatives: the weighted sum [ours].

    Among these songs each song counts once: a target that occurs twice at a position counts once, and a negative that
    is also a target there does not count. If the negatives are all songs, this is the softmax over the catalog, else
    an estimate of it.
    """
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        taste_vectors_PD * scale_P.unsqueeze(1), songs_UD, targets, negatives
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """The cross-entropy, computed in chunks, so that a CPU never holds logits or probabilities of all positions.

    The gradients are computed in the same pass, while the probabilities of a chunk are in the caches. Under autocast,
    products are in bfloat16 and sums stay float32. Only few operations run over tensors as large as all logits, since
    they dominate the cost of a step on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, query_PD: Tensor, songs_UD: Tensor, targets: Targets, negatives: Negatives) -> Tensor:
        """Return the weighted sum of the cross-entropies."""
        device = query_PD.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query_PD.dtype
        with torch.autocast(device, enabled=False):
            loss, *gradients = _cross_entropy(query_PD, songs_UD, targets, negatives, product_dtype)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients computed in `forward`, multiplied by the gradient of the sum."""
        query, songs = ctx.saved_tensors
        return query * gradient, songs * gradient, None, None


def _cross_entropy(
    query_PD: Tensor,
    songs_UD: Tensor,
    targets: Targets,
    negatives: Negatives,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients by queries (taste vectors times scale) and by songs."""
    (num_positions, targets_per_position), num_negatives = targets.song_rows_PT.shape, len(negatives.song_rows_K)
    target_logits_PT = _products(query_PD, songs_UD, targets) + targets.prior_PT
    distinct_logits_PT = target_logits_PT + targets.missing_PT
    max_logits_P1, max_columns_P1 = distinct_logits_PT.max(dim=1, keepdim=True)
    # The column after the targets receives the hits of targets that are not among the negatives.
    padded_logits_PX = nn.functional.pad(distinct_logits_PT, (0, 1), value=-torch.inf)
    vectors_KD = songs_UD.index_select(0, negatives.song_rows_K)
    # H more columns add the weights of the negatives, so that one product covers all horizons.
    extended_queries = torch.cat([query_PD, targets.horizons_PH], dim=1).to(product_dtype)
    extended_negatives = torch.cat([vectors_KD, negatives.weight_KH], dim=1).to(product_dtype)
    vectors_KD = vectors_KD.to(product_dtype)
    weighted_queries_PD = (query_PD * targets.weight_P1).to(product_dtype)
    chunk_rows = max(
        1, min(num_positions, CHUNK_LOGITS[query_PD.device.type] // (num_negatives + targets_per_position + 1))
    )
    logit_buffer, probability_buffer = (
        target_logits_PT.new_empty(chunk_rows, num_negatives + targets_per_position + 1) for _ in range(2)
    )
    grad_query, target_probabilities = torch.empty_like(query_PD), torch.empty_like(target_logits_PT)
    grad_negatives = query_PD.new_empty(num_negatives, query_PD.shape[1])
    for start in range(0, num_positions, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits, probabilities = (
            buffer[: min(chunk_rows, num_positions - start)] for buffer in (logit_buffer, probability_buffer)
        )
        _multiply(extended_queries[chunk], extended_negatives.T, logits[:, :num_negatives])
        logits[:, num_negatives:] = padded_logits_PX[chunk]
        logits.scatter_(1, targets.hits_PT[chunk], -torch.inf)
        torch.softmax(logits, dim=1, out=probabilities)
        target_probabilities[chunk] = probabilities[:, num_negatives : num_negatives + targets_per_position]
        negative_probabilities = probabilities[:, :num_negatives].to(product_dtype)
        _multiply(negative_probabilities, vectors_KD, grad_query[chunk])
        _multiply(negative_probabilities.T, weighted_queries_PD[chunk], grad_negatives, add=start > 0)
    smallest = torch.finfo(target_probabilities.dtype).tiny
    log_sum_P1 = max_logits_P1 - target_probabilities.gather(1, max_columns_P1).clamp_(min=smallest).log_()
    loss = torch.dot((log_sum_P1 - target_logits_PT).flatten(), targets.weight_PT.flatten())
    grad_logits_PT = target_probabilities.mul_(targets.weight_P1).sub_(targets.weight_PT)
    grad_query.mul_(targets.weight_P1).add_(_weighted_sums(songs_UD, targets.song_rows_PT, grad_logits_PT))
    grad_songs = nn.functional.embedding_bag(
        targets.positions_M,
        query_PD,
        targets.songs_of_M,
        mode="sum",
        per_sample_weights=grad_logits_PT.flatten().index_select(0, targets.by_song_M),
        include_last_offset=True,
    )
    return loss, grad_query, grad_songs.index_add_(0, negatives.song_rows_K, grad_negatives)


def _products(query_PD: Tensor, songs_UD: Tensor, targets: Targets) -> Tensor:
    """(P, T): dot products of queries and their targets, one column at a time; 0 after the last target of a column."""
    products_PT = query_PD.new_zeros(targets.song_rows_PT.shape)
    for column, rows in enumerate(targets.rows):
        songs = songs_UD.index_select(0, targets.song_rows_PT[:rows, column])
        torch.sum(songs.mul_(query_PD[:rows]), dim=1, out=products_PT[:rows, column])
    return products_PT


def _weighted_sums(songs_UD: Tensor, song_rows_PT: Tensor, weight_PT: Tensor) -> Tensor:
    """(P, D): the weighted sum of the songs at the places of each row."""
    return nn.functional.embedding_bag(song_rows_PT, songs_UD, mode="sum", per_sample_weights=weight_PT)


def _multiply(left: Tensor, right: Tensor, target: Tensor, *, add: bool = False) -> None:
    """Write `left` @ `right` to `target`, or add it; `target` may have another dtype."""
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
