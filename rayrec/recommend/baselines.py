"""The baselines by name, and how each is fitted."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import FitRange
from rayrec.errors import InputError
from rayrec.recommend.average import AverageRecommender
from rayrec.recommend.neighbours import NeighboursRecommender
from rayrec.recommend.popularity import PopularityRecommender
from rayrec.recommend.recommender import Recommender
from rayrec.recommend.sequential_rules import SequentialRulesRecommender
from rayrec.recommend.session_neighbours import SessionNeighboursRecommender

DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 1.0)

FromPlays = Callable[[Iterator[Histories], int, FitRange], Recommender]
FromVectors = Callable[[np.ndarray], Recommender]

FROM_PLAYS: dict[str, FromPlays] = {
    "popularity": lambda batches, n, allowed: PopularityRecommender.fit(batches, num_songs=n, allowed=allowed),
    "sequential-rules": lambda batches, n, allowed: SequentialRulesRecommender.fit(
        batches, num_songs=n, allowed=allowed
    ),
    "session-neighbours": lambda batches, n, allowed: SessionNeighboursRecommender.fit(
        batches, num_songs=n, allowed=allowed
    ),
}


def _average(discount: float) -> FromVectors:
    return lambda vectors: AverageRecommender(vectors, discount)


FROM_VECTORS: dict[str, FromVectors] = {
    "neighbours": NeighboursRecommender,
    **{f"average-{discount}": _average(discount) for discount in DISCOUNTS},
}

BASELINES: tuple[str, ...] = (*FROM_PLAYS, *FROM_VECTORS)


def needs_vectors(names: Sequence[str]) -> bool:
    """True if one of the named baselines works on song vectors."""
    return any(name in FROM_VECTORS for name in names)


def fit_baselines(
    names: Sequence[str], dataset: Dataset, vectors: np.ndarray | None, allowed: FitRange
) -> list[Recommender]:
    """Fit the named baselines on what `allowed` lets through of the data set, in the order of the names.

    `vectors` is float32 (N, D), normalized, and must itself come from that range; it is needed by
    `neighbours` and the averages, which share it. Raises `InputError` for an unknown name.
    """
    fitted: list[Recommender] = []
    for name in names:
        if name in FROM_PLAYS:
            batches = (allowed.select(batch) for batch in dataset.read_all())
            fitted.append(FROM_PLAYS[name](batches, dataset.num_songs, allowed))
        elif name not in FROM_VECTORS:
            raise InputError(f"there is no baseline {name!r}; there are: {', '.join(BASELINES)}")
        elif vectors is None:
            raise InputError(f"{name} works on song vectors, and there are none; run `rayrec embed` first")
        else:
            fitted.append(FROM_VECTORS[name](vectors))
    return fitted
