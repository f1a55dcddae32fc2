import numpy as np
import pytest

from rayrec.embeddings.vectors import SongVectors
from rayrec.errors import InputError
from rayrec.storage.workspace import Workspace


def test_rows_are_scaled_to_length_one_and_zero_rows_stay() -> None:
    vectors = SongVectors.normalized(np.array([[3, 4], [0, 0], [-2, 0]]))
    np.testing.assert_allclose(vectors.vectors, [[0.6, 0.8], [0, 0], [-1, 0]], rtol=1e-6)
    assert vectors.vectors.dtype == np.float32
    assert vectors.known.tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_short_and_very_long_vectors_are_scaled_too(scale: float) -> None:
    vectors = SongVectors.normalized(np.array([[3, 4]]) * scale)
    np.testing.assert_allclose(vectors.vectors, [[0.6, 0.8]], rtol=1e-6)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf, 1e300])
def test_numbers_that_are_not_finite_are_refused_with_their_row(broken: float) -> None:
    with pytest.raises(InputError, match="1 of 2 song embeddings contain NaN or infinite numbers, the first is row 1"):
        SongVectors.normalized(np.array([[1, 0], [0, broken]]))


def test_nearest_leaves_out_the_song_itself_and_songs_without_a_vector() -> None:
    vectors = SongVectors.normalized(np.array([[1, 0], [0, 0], [1, 1], [-1, 0], [1, 1]]))
    songs, cosines = vectors.nearest(0, 10)
    assert songs.tolist() == [2, 4, 3]
    np.testing.assert_allclose(cosines, [0.5**0.5, 0.5**0.5, -1], rtol=1e-6)
    assert vectors.nearest(0, 1)[0].tolist() == [2]


def test_vectors_come_back_from_the_workspace_as_they_were(workspace: Workspace) -> None:
    vectors = SongVectors.normalized(np.random.default_rng(0).normal(size=(5, 3)))
    vectors.save(workspace, "vectors.npy")
    np.testing.assert_array_equal(workspace.read_array("vectors.npy"), vectors.vectors)


def test_centered_vectors_share_no_direction_and_keep_what_tells_songs_apart() -> None:
    random = np.random.default_rng(3)
    differences = random.normal(size=(200, 16)).astype(np.float32)
    shifted = SongVectors.normalized(differences / 10 + np.eye(16, dtype=np.float32)[0])
    assert float((shifted.vectors @ shifted.vectors.T).mean()) > 0.8
    centered = shifted.centered()
    assert abs(float((centered.vectors @ centered.vectors.T).mean())) < 0.01
    np.testing.assert_allclose(np.linalg.norm(centered.vectors, axis=1), 1, atol=1e-6)
    expected = SongVectors.normalized(differences - differences.mean(axis=0))
    assert float((centered.vectors[:, 1:] * expected.vectors[:, 1:]).sum(axis=1).mean()) > 0.9


def test_centering_leaves_songs_without_a_vector_and_a_song_alone() -> None:
    centered = SongVectors(np.array([[1, 0], [0, 0], [0, 1]], dtype=np.float32)).centered()
    np.testing.assert_allclose(
        centered.vectors, np.array([[1, -1], [0, 0], [-1, 1]]) / [[2**0.5], [1], [2**0.5]], atol=1e-6
    )
    single = SongVectors(np.array([[0.6, 0.8], [0, 0]], dtype=np.float32))
    np.testing.assert_array_equal(single.centered().vectors, single.vectors)
