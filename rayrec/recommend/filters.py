"""Limits: which songs one answer may hold. The one way in which songs are filtered.

N songs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rayrec.data.histories import Histories

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The songs that one answer may hold: those allowed, without those banned.

    Rows past the catalog of who answers, songs that came later, do no harm.
    """

    banned: np.ndarray = field(default_factory=lambda: NOTHING)  # int (any,), song rows, some perhaps twice
    allowed: np.ndarray | None = None  # bool (N,); None: every song
    new_only: bool = False  # True where every song that the user has played is banned

    def banned_rows(self, num_songs: int) -> np.ndarray:
        """int (any,): the banned rows of a catalog, each once."""
        return np.unique(self.banned[self.banned < num_songs])

    def mask(self, num_songs: int) -> np.ndarray:
        """bool (num_songs,): true for the songs that qualify. The caller's own copy."""
        mask = np.zeros(num_songs, dtype=np.bool_)
        if self.allowed is None:
            mask[:] = True
        else:
            mask[: len(self.allowed)] = self.allowed[:num_songs]
        mask[self.banned[self.banned < num_songs]] = False
        return mask

    def strike(self, scores: np.ndarray) -> None:
        """Set float (N,) scores of songs that do not qualify to -inf, in place."""
        if self.allowed is not None:
            known = self.allowed[: len(scores)]
            scores[: len(known)][~known] = -np.inf
            scores[len(known) :] = -np.inf
        scores[self.banned[self.banned < len(scores)]] = -np.inf


def without_heard(histories: Histories, limits: Sequence[Limits] | None = None) -> list[Limits]:
    """The limits of each user, with the songs of the user's history banned as well."""
    heard = np.split(histories.songs, histories.offsets[1:-1]) if len(histories) else []
    if limits is None:
        return [Limits(banned=songs, new_only=True) for songs in heard]
    pairs = zip(limits, heard, strict=True)
    return [replace(limit, banned=np.concatenate([limit.banned, songs]), new_only=True) for limit, songs in pairs]
