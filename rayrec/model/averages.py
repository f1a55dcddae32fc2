"""Discounted averages of the songs played, as parts of the network's state.

What the averaging baseline computes afresh for every question, the network carries along: sums
Σ_j γ^(n−j) s_j, one a discount. Shapes: B rows, L plays, K discounts, D embedding, H hidden units,
M chunks of C plays each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 32  # plays summed up by one product with a triangle; the sums are carried from chunk to chunk by another


def running_sums(songs_BLD: Tensor, discounts: Sequence[float], start_BKD: Tensor) -> Tensor:
    """(B, L, K, D): after every play, Σ_j γ^(n−j) s_j over the plays so far, `start_BKD` being the sums before them.

    γ of the paper; 0 keeps the last song alone, 1 adds all of them up [the recurrence is ours]. The number of
    operations does not grow with L.
    """
    rows, length, dim = songs_BLD.shape
    chunks = -(-length // CHUNK)
    gamma_K = torch.tensor(discounts, dtype=songs_BLD.dtype, device=songs_BLD.device)
    padded = torch.nn.functional.pad(songs_BLD, (0, 0, 0, chunks * CHUNK - length))
    within = torch.einsum("kij,bmjd->bkmid", _powers(gamma_K, CHUNK), padded.view(rows, chunks, CHUNK, dim))
    # What stands before each chunk: the start, and the sums of the chunks before it, faded by the plays since.
    before_BKMD = torch.cat([start_BKD.to(songs_BLD.dtype).unsqueeze(2), within[:, :, :-1, -1]], dim=2)
    carried_BKMD = torch.einsum("kmn,bknd->bkmd", _powers(gamma_K**CHUNK, chunks), before_BKMD)
    fading_KC = gamma_K[:, None] ** torch.arange(1, CHUNK + 1, device=songs_BLD.device)
    sums = within + fading_KC[:, None, :, None] * carried_BKMD.unsqueeze(3)
    return sums.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _powers(gamma_K: Tensor, count: int) -> Tensor:
    """(K, count, count): γ^(i − j) on and below the diagonal, 0 above."""
    place = torch.arange(count, device=gamma_K.device)
    age = place[:, None] - place
    return gamma_K[:, None, None] ** age.clamp(min=0) * (age >= 0)


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
