"""Plots of a model: drawn from the available figures, and only if there is something to draw."""

from typing import Any

import numpy as np
from worlds import random_vectors

from rayrec.evaluation.plots import most_played, song_map, training_plot
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
        plot = training_plot(_epochs(*phases))
        assert plot is not None
        assert plot.png.startswith(PNG)
    assert training_plot([]) is None


def test_the_most_played_songs_that_have_a_vector_are_drawn() -> None:
    vectors = random_vectors(6)
    vectors[2] = 0
    np.testing.assert_array_equal(most_played(vectors, np.array([1, 5, 9, 5, 0, 7]), 4), [5, 1, 3, 0])


def test_a_map_is_drawn_of_three_songs_or_more_whatever_their_titles() -> None:
    plot = song_map(random_vectors(40), np.arange(40), ["A $very$ long title_with {odd} letters & more", "B"])
    assert plot is not None
    assert plot.png.startswith(PNG)
    assert "40 most played songs" in plot.note
    assert song_map(random_vectors(2), np.arange(2), []) is None


def test_songs_in_one_place_are_a_map_too() -> None:
    assert song_map(np.ones((5, 3), dtype=np.float32), np.zeros(5), ["a"] * 5) is not None


def test_a_page_holds_its_plots_within_itself() -> None:
    plot = training_plot(_epochs("final"))
    assert plot is not None
    entry = {"model": "taste", "kind": "network", "users": "all", "target": "next", "metric": "recall", "k": 20}
    results = [{**entry, "value": 0.5, "low": 0.4, "high": 0.6, "plays": 9, "users_count": 3}]
    page = html_page({"results": results}, default="taste", about={}, plots=[plot])
    assert "Loss and validation recall by epoch" in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="http' not in page
