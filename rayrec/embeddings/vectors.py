"""Song vectors: one L2-normalized row per song of the catalog.

N songs, D numbers per vector.
"""

from dataclasses import dataclass

import numpy as np

from rayrec.errors import InputError
from rayrec.storage.artifacts import Manifest
from rayrec.storage.workspace import Workspace

FINAL = "vectors.npy"  # fitted on all that a final fit may see
SELECTION = "selection_vectors.npy"  # fitted without the validation range; there where the split has one

SMALLEST_LENGTH = 1e-6  # of a vector that has a direction


@dataclass(frozen=True)
class SongVectors:
    """float32 (N, D), every row of length 1; zeros where a song has no vector."""

    vectors: np.ndarray

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.vectors.dtype != np.float32:
            raise ValueError(f"song embeddings must be float32 (N, D), got {self.vectors.dtype} {self.vectors.shape}")

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    @property
    def known(self) -> np.ndarray:
        """bool (N,): the songs that have a vector."""
        return np.asarray(self.vectors.any(axis=1))

    @classmethod
    def normalized(cls, raw: np.ndarray) -> "SongVectors":
        """From rows of any length; zero rows stay. Raises `InputError` where a number is not finite."""
        with np.errstate(over="ignore"):  # too large for float32 is infinite, and refused below
            rows = np.array(raw, dtype=np.float32)
        broken = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(broken):
            raise InputError(
                f"{len(broken)} of {len(rows)} song embeddings hold NaN or infinite numbers, the first row {broken[0]}"
                "; give finite vectors, or zeros for a song without one"
            )
        # Scaled by the largest number first: the square of a very small or large float32 is 0 or inf.
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        rows /= np.where(largest > 0, largest, 1)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return cls(rows / np.where(lengths > 0, lengths, 1))

    def centered(self) -> "SongVectors":
        """Without the mean of all known songs, normalized again; a song that is the mean stays as it is.

        word2vec leaves a direction that all songs share, the wider the more its negatives favour rare
        ones, and next to it what tells songs apart is small (Mu and Viswanath 2018, arXiv:1702.01417).
        """
        known = self.known
        moved = self.vectors - np.where(known[:, None], self.vectors[known].mean(axis=0, dtype=np.float64), 0)
        lengths = np.linalg.norm(moved, axis=1, keepdims=True)
        apart = lengths > SMALLEST_LENGTH
        rows = np.where(apart, moved / np.where(apart, lengths, 1), self.vectors)
        return SongVectors(rows.astype(np.float32))

    def nearest(self, song: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k other songs of highest cosine to one song: rows int64 (<= k,) and cosines float32, best first."""
        cosines = self.vectors @ self.vectors[song]
        cosines[song] = -np.inf
        cosines[~self.known] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:k]
        order = order[cosines[order] > -np.inf]
        return order, cosines[order]

    def save(self, workspace: Workspace, path: str) -> None:
        """Write the vectors as a .npy file."""
        workspace.write_array(path, self.vectors)

    @classmethod
    def load(cls, workspace: Workspace, manifest: Manifest, *, selection: bool = False) -> "SongVectors":
        """The vectors of a songs artifact; `selection`: those that have not seen the validation range.

        Memory-mapped, read-only, on a local disk. Raises `InputError` where selection vectors are
        asked of an artifact made without a validation range.
        """
        if selection and SELECTION not in manifest.files:
            raise InputError(
                f"songs {manifest.id!r} have no vectors fitted without a validation range; "
                "run `rayrec embed` with a split that has validation days"
            )
        return cls(workspace.read_array(manifest.path(SELECTION if selection else FINAL)))
