"""Pictures of a model: drawn from what is there, and only where there is something to draw."""

from typing import Any

import numpy as np
from worlds import random_vectors

from rayrec.evaluation.pictures import most_played, principal_axes, song_map, training_picture
from rayrec.evaluation.report import html_page

PNG = b"\x89PNG"


def _epochs(*phases: str) -> list[dict[str, Any]]:
    lines = []
    for epoch, phase in enumerate(phases):
        recall = {"validation_recall@20": 0.1 + epoch / 100} if phase == "selection" else {}
        lines.append({"phase": phase, "epoch": epoch, "loss": 3.0 - epoch, **recall})
    return lines


def test_a_training_is_drawn_with_and_without_validation() -> None:
    for phases in (("selection", "selection", "final"), ("final", "final")):
        picture = training_picture(_epochs(*phases))
        assert picture is not None
        assert picture.png.startswith(PNG)
    assert training_picture([]) is None


def test_the_axes_are_those_of_the_largest_variance() -> None:
    random = np.random.default_rng(0)
    planted = random.normal(size=(500, 2)) * [3, 2]
    turned, _ = np.linalg.qr(random.normal(size=(6, 6)))
    vectors = np.hstack([planted, random.normal(size=(500, 4)) * 0.1]) @ turned
    points, share = principal_axes(vectors)
    for axis in range(2):
        assert abs(np.corrcoef(points[:, axis], planted[:, axis])[0, 1]) > 0.99
    assert share[0] > share[1] > 0.2
    assert share.sum() > 0.98


def test_the_most_played_songs_that_have_a_vector_are_drawn() -> None:
    vectors = random_vectors(6)
    vectors[2] = 0
    np.testing.assert_array_equal(most_played(vectors, np.array([1, 5, 9, 5, 0, 7]), 4), [5, 1, 3, 0])


def test_a_map_is_drawn_of_three_songs_or_more_whatever_their_titles() -> None:
    picture = song_map(random_vectors(40), np.arange(40), ["A $very$ long title_with {odd} letters & more", "B"])
    assert picture is not None
    assert picture.png.startswith(PNG)
    assert "40 most played songs" in picture.note
    assert song_map(random_vectors(2), np.arange(2), []) is None


def test_songs_in_one_place_are_a_map_too() -> None:
    assert song_map(np.ones((5, 3), dtype=np.float32), np.zeros(5), ["a"] * 5) is not None


def test_a_page_holds_its_pictures_within_itself() -> None:
    picture = training_picture(_epochs("final"))
    assert picture is not None
    entry = {"model": "taste", "kind": "network", "users": "all", "target": "next", "metric": "recall", "k": 20}
    results = [{**entry, "value": 0.5, "low": 0.4, "high": 0.6, "plays": 9, "users_count": 3}]
    page = html_page({"results": results}, None, default="taste", about={}, pictures=[picture])
    assert "How the training went" in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="http' not in page
