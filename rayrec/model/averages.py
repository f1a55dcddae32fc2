"""Discounted averages of the songs played, as parts of the network's state.

What the averaging baseline computes afresh for every question, the network carries along: sums
Σ_j γ^(n−j) s_j, one a discount. Shapes: B rows, L plays, K discounts, D embedding, H hidden units.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 32  # plays summed up by one product with a triangle; the sums are carried from chunk to chunk


def running_sums(songs_BLD: Tensor, discounts: Sequence[float], start_BKD: Tensor) -> Tensor:
    """(B, L, K, D): after every play, Σ_j γ^(n−j) s_j over the plays so far, `start_BKD` being the sums before them.

    γ of the paper; 0 keeps the last song alone, 1 adds all of them up [the recurrence is ours].
    """
    gamma_K = torch.tensor(discounts, dtype=songs_BLD.dtype, device=songs_BLD.device)
    back_C = torch.arange(CHUNK, device=songs_BLD.device)
    age_CC = back_C[:, None] - back_C
    weights_KCC = gamma_K[:, None, None] ** age_CC.clamp(min=0) * (age_CC >= 0)
    fading_KC = gamma_K[:, None] ** (back_C + 1)
    carried_BKD, chunks = start_BKD.to(songs_BLD.dtype), []
    for chunk_BCD in torch.split(songs_BLD, CHUNK, dim=1):
        length = chunk_BCD.shape[1]
        sums_BKCD = torch.einsum("kij,bjd->bkid", weights_KCC[:, :length, :length], chunk_BCD)
        sums_BKCD = sums_BKCD + fading_KC[:, :length, None] * carried_BKD.unsqueeze(2)
        carried_BKD = sums_BKCD[:, :, -1]
        chunks.append(sums_BKCD.transpose(1, 2))
    return torch.cat(chunks, dim=1)


def as_state(sums_BKD: Tensor, width: int) -> Tensor:
    """(rows, B, H): the sums in rows of H = `width` numbers, the last one filled up with zeros."""
    flat = sums_BKD.flatten(1)
    rows = -(-flat.shape[1] // width)
    filled = torch.nn.functional.pad(flat, (0, rows * width - flat.shape[1]))
    return filled.reshape(len(flat), rows, width).transpose(0, 1)


def from_state(state_RBH: Tensor, count: int, dim: int) -> Tensor:
    """(B, K, D): the sums that `as_state` put into rows."""
    rows = state_RBH.transpose(0, 1)
    return rows.flatten(1)[:, : count * dim].reshape(len(rows), count, dim)
