"""The layout of songs on a plane, and principal axes."""

import numpy as np
from worlds import random_vectors

from rayrec.embeddings.vectors import layout, principal_axes


def test_distances_stay_where_the_songs_differ_in_two_directions_only() -> None:
    plane = np.random.default_rng(0).normal(size=(20, 2)) * [3, 1]
    vectors = (plane @ np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0][:2] + 5).astype(np.float32)
    positions = layout(vectors)

    def distances(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=2)

    layout_distances, true_distances = distances(positions), distances(plane)
    np.testing.assert_allclose(
        layout_distances / layout_distances.max(), true_distances / true_distances.max(), atol=1e-4
    )
    assert np.abs(positions).max() == 1
    assert np.ptp(positions[:, 0]) > np.ptp(positions[:, 1])


def test_the_same_songs_give_the_same_picture() -> None:
    vectors = random_vectors(30)
    order = np.random.default_rng(0).permutation(30)
    np.testing.assert_allclose(layout(vectors)[order], layout(vectors[order]), atol=1e-4)


def test_few_songs_have_positions_too() -> None:
    assert layout(random_vectors(0)).shape == (0, 2)
    assert layout(random_vectors(1)).tolist() == [[0, 0]]
    np.testing.assert_allclose(layout(random_vectors(2))[:, 1], 0, atol=1e-6)
    assert np.isfinite(layout(np.ones((4, 8), np.float32))).all()


def test_the_axes_are_those_of_the_largest_variance() -> None:
    random = np.random.default_rng(0)
    planted = random.normal(size=(500, 2)) * [3, 2]
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    vectors = np.hstack([planted, random.normal(size=(500, 4)) * 0.1]) @ rotation
    points, share = principal_axes(vectors)
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], planted[:, axis])[0, 1]) > 0.99
    assert share[0] > share[1] > 0.2
    assert share.sum() > 0.98
