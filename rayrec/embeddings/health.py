"""Are song vectors fit for use? Figures and examples that a person can judge at a glance.

At gensim's usual settings all songs can end up pointing the same way while the loss looks fine,
and every model on top inherits that: the mean cosine of random pairs shows it.
"""

from typing import Any

import numpy as np

from rayrec.data.catalog import Catalog
from rayrec.embeddings.vectors import SongVectors

PAIRS = 20_000
COLLAPSED = 0.7  # mean cosine of random pairs: up to 0.57 at good settings on real plays, 0.98 where collapsed
MOST_PLAYED = 5
NEIGHBOURS = 5


def mean_cosine(vectors: SongVectors, seed: int = 0) -> float:
    """The mean cosine of random pairs of different songs that have vectors; 0 where fewer than two have."""
    known = np.flatnonzero(vectors.known)
    if len(known) < 2:
        return 0.0
    random = np.random.default_rng(seed)
    first = random.integers(len(known), size=PAIRS)
    second = (first + random.integers(1, len(known), size=PAIRS)) % len(known)
    left, right = vectors.vectors[known[first]], vectors.vectors[known[second]]
    return float(np.einsum("pd,pd->p", left, right).mean())


def check(vectors: SongVectors, counts: np.ndarray, catalog: Catalog, seed: int = 0) -> dict[str, Any]:
    """The health of vectors, as plain values for a manifest.

    `counts`, int (N,), are the plays by which the most played songs are chosen. Keys: coverage
    (share of songs with a vector), songs_with_vector, mean_cosine, neighbours (a list of {song,
    plays, neighbours: titles, cosines}), warning (a line, or None).
    """
    known = vectors.known
    cosine = mean_cosine(vectors, seed)
    most_played = np.argsort(-np.where(known, counts, -1), kind="stable")[: min(MOST_PLAYED, int(known.sum()))]
    return {
        "coverage": float(known.mean()) if len(known) else 0.0,
        "songs_with_vector": int(known.sum()),
        "mean_cosine": cosine,
        "neighbours": [_neighbours(vectors, int(song), int(counts[song]), catalog) for song in most_played],
        "warning": warning(cosine),
    }


def directions(vectors: SongVectors, seed: int = 0) -> float:
    """How many of the D directions the vectors use: (Σλ)² / Σλ² of the eigenvalues λ of their covariance.

    The participation ratio of physics: D where all are used alike, 1 where the vectors lie on a line, 0
    where fewer than two have one. Of at most `PAIRS` songs drawn.
    """
    known = np.flatnonzero(vectors.known)
    if len(known) < 2:
        return 0.0
    drawn = np.random.default_rng(seed).permutation(known)[:PAIRS]
    variances = np.linalg.eigvalsh(np.cov(vectors.vectors[drawn], rowvar=False, dtype=np.float64)).clip(min=0)
    return float(variances.sum() ** 2 / max(np.square(variances).sum(), 1e-24))


def warning(cosine: float) -> str | None:
    """A line for vectors that have collapsed, None for those that have not."""
    if cosine <= COLLAPSED:
        return None
    return (
        f"song embeddings point nearly the same way: the mean cosine of random pairs is {cosine:.2f}, expected below "
        f"{COLLAPSED:g}; train for more epochs, with skip-gram and without subsampling"
    )


def _neighbours(vectors: SongVectors, song: int, plays: int, catalog: Catalog) -> dict[str, Any]:
    nearest, cosines = vectors.nearest(song, NEIGHBOURS)
    return {
        "song": catalog.titles(np.array([song]))[0],
        "plays": plays,
        "neighbours": catalog.titles(nearest),
        "cosines": [round(float(cosine), 4) for cosine in cosines],
    }
