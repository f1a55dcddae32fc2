"""The choice of diverse songs against a direct computation."""

import numpy as np
import pytest
from worlds import random_vectors

from rayrec.recommend.selection import diversify, pool_size


def by_hand(vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    chosen: list[int] = []
    left = list(range(len(vectors)))
    while left and len(chosen) < k:

        def worth(song: int) -> float:
            relevance = 1 - song / max(1, len(vectors) - 1)
            likeness = max((float(vectors[song] @ vectors[other]) for other in chosen), default=0.0)
            return (1 - diversity) * relevance - diversity * likeness

        best = max(left, key=worth)
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("songs", "k"), [(40, 10), (12, 12), (5, 9), (1, 1)])
def test_choices_equal_the_definition(songs: int, k: int, diversity: float) -> None:
    vectors = random_vectors(songs, dim=4, seed=songs)
    chosen = diversify(vectors, k, diversity)
    assert chosen.tolist() == by_hand(vectors, k, diversity)
    assert len(set(chosen.tolist())) == min(k, songs)


def test_no_diversity_keeps_the_order() -> None:
    assert diversify(random_vectors(30), 7, 0.0).tolist() == list(range(7))


def test_songs_of_one_kind_come_last_although_they_rank_first() -> None:
    alike = np.tile(random_vectors(1, dim=8), (6, 1))
    others = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0][:4].astype(np.float32)
    vectors = np.concatenate([alike, others])
    first = diversify(vectors, 5, 0.7)
    assert first[0] == 0
    assert set(first[1:].tolist()) == {6, 7, 8, 9}


def test_answers_grow_more_diverse() -> None:
    vectors = random_vectors(200, dim=6, seed=2)

    def likeness(diversity: float) -> float:
        chosen = vectors[diversify(vectors, 20, diversity)]
        return float((chosen @ chosen.T)[~np.eye(20, dtype=np.bool_)].mean())

    assert likeness(0.0) > likeness(0.3) > likeness(0.9)


def test_nothing_to_choose_from_chooses_nothing() -> None:
    assert diversify(np.zeros((0, 4), np.float32), 5, 0.5).tolist() == []


def test_there_are_always_more_songs_to_choose_from() -> None:
    assert pool_size(10) == 110
    assert pool_size(1_000) == 2_000
