"""A plane to draw songs on: the two directions in which they differ most."""

import numpy as np


def principal_axes(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two principal components of float32 (n, D) vectors.

    Returns places float64 (n, 2) and float64 (2,), the shares of the variance along them. The same vectors give the
    same picture: of the two signs of a direction the one is taken under which the song furthest out lies on the
    positive side.
    """
    centered = vectors - vectors.mean(axis=0, dtype=np.float64) if len(vectors) else vectors.astype(np.float64)
    left, strength, _ = np.linalg.svd(centered, full_matrices=False)
    places, shares = np.zeros((len(vectors), 2)), np.zeros(2)
    count = min(2, len(strength))
    places[:, :count] = (left * strength)[:, :count]
    shares[:count] = strength[:count] ** 2 / max(float((strength**2).sum()), 1e-12)
    furthest = places[np.abs(places).argmax(axis=0), [0, 1]] if len(places) else np.ones(2)
    return places * np.where(furthest < 0, -1, 1), shares


def layout(vectors: np.ndarray) -> np.ndarray:
    """float32 (n, 2), within [-1, 1]: the principal axes of float32 (n, D) vectors, both on one scale."""
    places, _ = principal_axes(vectors)
    return (places / max(float(np.abs(places).max(initial=0)), 1e-9)).astype(np.float32)
