"""A plane to draw songs on: the two directions in which they differ most."""

import numpy as np


def layout(vectors: np.ndarray) -> np.ndarray:
    """float32 (n, 2), within [-1, 1]: principal components of float32 (n, D) vectors, both on one scale.

    The same vectors give the same picture: of the two signs of a direction the one is taken under which
    the song furthest out lies on the positive side.
    """
    centred = vectors - vectors.mean(axis=0) if len(vectors) else vectors
    left, strength, _ = np.linalg.svd(centred, full_matrices=False)
    places = np.zeros((len(vectors), 2), dtype=np.float32)
    found = min(2, len(strength))
    places[:, :found] = (left * strength)[:, :found]
    furthest = places[np.abs(places).argmax(axis=0), [0, 1]] if len(places) else np.ones(2)
    return places * np.where(furthest < 0, -1, 1).astype(np.float32) / max(float(np.abs(places).max(initial=0)), 1e-9)
