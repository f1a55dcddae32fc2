"""Song vectors: one L2-normalized row per song of the catalog.

N songs, D numbers per vector.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.data.catalog import Catalog
from rayrec.errors import InputError
from rayrec.storage.workspace import Workspace

FINAL = "vectors.npy"  # fitted on all plays that the final fit may use
SELECTION = "selection_vectors.npy"  # fitted without the validation range; exists only if the split has one

SMALLEST_LENGTH = 1e-6  # vectors that are not longer have no direction
PAIRS = 20_000  # number of random pairs in `mean_cosine`, and of sampled songs in `directions`
COLLAPSE_COSINE = 0.7  # mean cosine of random pairs; on real plays up to 0.57 at good settings, 0.98 after a collapse
MOST_PLAYED = 5
NEIGHBORS = 5


@dataclass(frozen=True)
class SongVectors:
    """Song vectors, float32 (N, D): every row has length 1, or is zero if the song has no vector."""

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
        """Normalize rows of any length; zero rows stay zero. Raises `InputError` if a number is not finite."""
        with np.errstate(over="ignore"):  # numbers too large for float32 become infinite and are refused below
            rows = np.array(raw, dtype=np.float32)
        broken_rows = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if len(broken_rows):
            raise InputError(
                f"{len(broken_rows)} of {len(rows)} song embeddings contain NaN or infinite numbers, the first is row "
                f"{broken_rows[0]}; give finite vectors, or zeros for songs without a vector"
            )
        # Divide by the largest number first, since the square of a very small or large float32 is 0 or inf.
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        rows /= np.where(largest > 0, largest, 1)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return cls(rows / np.where(lengths > 0, lengths, 1))

    def centered(self) -> "SongVectors":
        """Subtract the mean of all songs that have a vector and normalize again. Vectors equal to the mean stay.

        word2vec leaves a direction that all songs share, which is larger the more its negatives favor rare songs. Next
        to it the differences between songs are small (Mu and Viswanath 2018, arXiv:1702.01417).
        """
        has_vector = self.known
        shifted = self.vectors - np.where(
            has_vector[:, None], self.vectors[has_vector].mean(axis=0, dtype=np.float64), 0
        )
        lengths = np.linalg.norm(shifted, axis=1, keepdims=True)
        has_direction = lengths > SMALLEST_LENGTH
        rows = np.where(has_direction, shifted / np.where(has_direction, lengths, 1), self.vectors)
        return SongVectors(rows.astype(np.float32))

    def nearest(self, song: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `k` other songs with the highest cosine to `song`, best first.

        Returns rows, int64 (<= k,), and cosines, float32.
        """
        cosines = self.vectors @ self.vectors[song]
        cosines[song] = -np.inf
        cosines[~self.known] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:k]
        order = order[cosines[order] > -np.inf]
        return order, cosines[order]

    def save(self, workspace: Workspace, path: str) -> None:
        """Write the vectors as a .npy file."""
        workspace.write_array(path, self.vectors)


def mean_cosine(vectors: SongVectors, seed: int = 0) -> float:
    """Return the mean cosine of random pairs of different songs that have vectors; 0 if fewer than two songs do."""
    song_rows = np.flatnonzero(vectors.known)
    if len(song_rows) < 2:
        return 0.0
    rng = np.random.default_rng(seed)
    first = rng.integers(len(song_rows), size=PAIRS)
    second = (first + rng.integers(1, len(song_rows), size=PAIRS)) % len(song_rows)
    left, right = vectors.vectors[song_rows[first]], vectors.vectors[song_rows[second]]
    return float(np.einsum("pd,pd->p", left, right).mean())


def check_health(vectors: SongVectors, counts: np.ndarray, catalog: Catalog, seed: int = 0) -> dict[str, Any]:
    """Return measures of the health of vectors, as plain values for a manifest.

    `counts`, int (N,), are the plays of each song; neighbors are given for the most played songs. Keys: coverage
    (share of songs with a vector), songs_with_vector, mean_cosine, neighbors (a list of {song, plays, neighbors:
    titles, cosines}), warning (one line, or None).
    """
    has_vector = vectors.known
    cosine = mean_cosine(vectors, seed)
    most_played = np.argsort(-np.where(has_vector, counts, -1), kind="stable")[
        : min(MOST_PLAYED, int(has_vector.sum()))
    ]
    return {
        "coverage": float(has_vector.mean()) if len(has_vector) else 0.0,
        "songs_with_vector": int(has_vector.sum()),
        "mean_cosine": cosine,
        "neighbors": [_neighbors(vectors, int(song), int(counts[song]), catalog) for song in most_played],
        "warning": _warning(cosine),
    }


def directions(vectors: SongVectors) -> float:
    """Return how many of the D directions the vectors use: (Σλ)² / Σλ² of the eigenvalues λ of their covariance.

    This is the participation ratio of physics: D if all directions are used equally, 1 if the vectors lie on a line.
    It is 0 if fewer than two songs have a vector. It is computed on a sample of at most `PAIRS` songs.
    """
    song_rows = np.flatnonzero(vectors.known)
    if len(song_rows) < 2:
        return 0.0
    sample = np.random.default_rng(0).permutation(song_rows)[:PAIRS]
    variances = np.linalg.eigvalsh(np.cov(vectors.vectors[sample], rowvar=False, dtype=np.float64)).clip(min=0)
    return float(variances.sum() ** 2 / max(np.square(variances).sum(), 1e-24))


def _warning(cosine: float) -> str | None:
    """Return a one-line warning if the vectors have collapsed, else None."""
    if cosine <= COLLAPSE_COSINE:
        return None
    return (
        f"song embeddings have collapsed: the mean cosine of random pairs is {cosine:.2f}, expected below "
        f"{COLLAPSE_COSINE:g}; train for more epochs, with skip-gram and without subsampling"
    )


def _neighbors(vectors: SongVectors, song: int, plays: int, catalog: Catalog) -> dict[str, Any]:
    nearest, cosines = vectors.nearest(song, NEIGHBORS)
    return {
        "song": catalog.titles(np.array([song]))[0],
        "plays": plays,
        "neighbors": catalog.titles(nearest),
        "cosines": [round(float(cosine), 4) for cosine in cosines],
    }


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first two principal components of float32 (n, D) vectors.

    Returns the coordinates, float64 (n, 2), and the shares of the variance along both axes, float64 (2,). The sign of
    an axis is chosen so that the song furthest from 0 is on the positive side: the same vectors give the same picture.
    """
    centered = vectors - vectors.mean(axis=0, dtype=np.float64) if len(vectors) else vectors.astype(np.float64)
    left_vectors, singular_values, _ = np.linalg.svd(centered, full_matrices=False)
    coordinates, shares = np.zeros((len(vectors), 2)), np.zeros(2)
    count = min(2, len(singular_values))
    coordinates[:, :count] = (left_vectors * singular_values)[:, :count]
    shares[:count] = singular_values[:count] ** 2 / max(float((singular_values**2).sum()), 1e-12)
    furthest = coordinates[np.abs(coordinates).argmax(axis=0), [0, 1]] if len(coordinates) else np.ones(2)
    return coordinates * np.where(furthest < 0, -1, 1), shares


def layout(vectors: np.ndarray) -> np.ndarray:
    """Return 2-D coordinates of float32 (n, D) vectors: float32 (n, 2) in [-1, 1], both axes with the same scale.

    The axes are those of `principal_axes`.
    """
    coordinates, _ = principal_axes(vectors)
    return (coordinates / max(float(np.abs(coordinates).max(initial=0)), 1e-9)).astype(np.float32)
