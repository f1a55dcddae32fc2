"""The baselines by name, and how each is fitted."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS, FitRange
from rayrec.errors import InputError
from rayrec.recommend.base import Recommender
from rayrec.recommend.discounted_average import AverageRecommender
from rayrec.recommend.item_knn import NeighboursRecommender
from rayrec.recommend.popularity import RECENT_DAYS, PopularityRecommender
from rayrec.recommend.selection import Selection
from rayrec.recommend.sequential_rules import SequentialRulesRecommender
from rayrec.recommend.user_top import OwnPlaysRecommender
from rayrec.recommend.vsknn import SessionNeighboursRecommender
from rayrec.recommend.vstan import VstanRecommender
from rayrec.recommend.weighted_average import OFFSETS, fit_weighted

DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 1.0)

FromPlays = Callable[[Iterator[Histories], Dataset, FitRange], Recommender]
FromVectors = Callable[[np.ndarray], Recommender]


def _recent(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange) -> Recommender:
    """Where the data has no times, the last days are all of it."""
    end = dataset.manifest.last_play + 1 if allowed.before is None else allowed.before
    since = end - RECENT_DAYS * DAY_MS
    return PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, since=since)


def _from_plays(fit: Callable[..., Recommender]) -> FromPlays:
    return lambda batches, dataset, allowed: fit(batches, num_songs=dataset.num_songs, allowed=allowed)


FROM_PLAYS: dict[str, FromPlays] = {
    "popularity": _from_plays(PopularityRecommender.fit),
    "popularity-recent": _recent,
    "own-plays": lambda _batches, dataset, _allowed: OwnPlaysRecommender(dataset.num_songs),
    "sequential-rules": _from_plays(SequentialRulesRecommender.fit),
    "session-neighbours": _from_plays(SessionNeighboursRecommender.fit),
    "vstan": _from_plays(VstanRecommender.fit),
}


def _average(discount: float) -> FromVectors:
    return lambda vectors: AverageRecommender(vectors, discount)


FROM_VECTORS: dict[str, FromVectors] = {
    "neighbours": NeighboursRecommender,
    **{f"average-{discount}": _average(discount) for discount in DISCOUNTS},
}
FROM_BOTH = tuple(OFFSETS)  # the weight-based ones

BASELINES: tuple[str, ...] = (*FROM_PLAYS, *FROM_VECTORS, *FROM_BOTH)


def needs_vectors(names: Sequence[str]) -> bool:
    """True if one of the named baselines works on song vectors."""
    return any(name in FROM_VECTORS or name in FROM_BOTH for name in names)


def needs_selection(names: Sequence[str]) -> bool:
    """True if one of the named baselines chooses a setting on the validation range."""
    return any(name in FROM_BOTH for name in names)


def fit_baselines(
    names: Sequence[str],
    dataset: Dataset,
    vectors: np.ndarray | None,
    allowed: FitRange,
    selection: Selection | None = None,
) -> list[Recommender]:
    """Fit the named baselines on what `allowed` lets through of the data set, in the order of the names.

    `vectors` is float32 (N, D), normalized, and must itself come from that range; it is needed by
    `neighbours`, the averages and the weight-based ones, which share it. These last choose λ by
    `selection`, and take a usual one where there is none. Raises `InputError` for an unknown name.
    """
    fitted: list[Recommender] = []
    for name in names:
        batches = (allowed.select(batch) for batch in dataset.read_all())
        if name in FROM_PLAYS:
            fitted.append(FROM_PLAYS[name](batches, dataset, allowed))
        elif name not in BASELINES:
            raise InputError(f"there is no baseline {name!r}; there are: {', '.join(BASELINES)}")
        elif vectors is None:
            raise InputError(f"{name} requires song embeddings; run `rayrec embed` first")
        elif name in FROM_VECTORS:
            fitted.append(FROM_VECTORS[name](vectors))
        else:
            fitted.append(fit_weighted(batches, vectors, name, allowed, selection))
    return fitted
