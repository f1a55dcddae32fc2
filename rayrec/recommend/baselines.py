"""The baselines by name, and how each is fitted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.histories import Histories
from rayrec.data.split import DAY_MS, FitRange
from rayrec.errors import InputError
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.selection import Selection
from rayrec.recommend.sequential_rules import DECAY, SequentialRulesRecommender
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender
from rayrec.recommend.simple_baselines import RECENT_DAYS, ItemKnnRecommender, PopularityRecommender, UserTopRecommender
from rayrec.recommend.weighted_average import OFFSETS, AverageRecommender, fit_weighted

DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 1.0)

Settings = Mapping[str, Any]  # numbers, of a baseline, by name; those that are left out have their defaults
FromPlays = Callable[[Iterator[Histories], Dataset, FitRange, Settings], BaseRecommender]
FromVectors = Callable[[np.ndarray], BaseRecommender]


def _popularity(
    batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)


def _recent(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    """Where the data has no times, the last days are all of it."""
    end = dataset.manifest.last_play + 1 if allowed.before is None else allowed.before
    days = settings.get("days", RECENT_DAYS)
    since = end - round(days * DAY_MS)
    recent = PopularityRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, since=since)
    recent.settings = {"days": days}
    return recent


def _rules(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    decay = settings.get("decay", DECAY)
    return SequentialRulesRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed, decay=decay)


def _vsknn(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    fitted = VsknnRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return fitted.with_settings(replace(fitted.chosen, **settings))


def _vstan(batches: Iterator[Histories], dataset: Dataset, allowed: FitRange, settings: Settings) -> BaseRecommender:
    fitted = VstanRecommender.fit(batches, num_songs=dataset.num_songs, allowed=allowed)
    return fitted.with_settings(replace(fitted.chosen, **settings))


def _user_top(
    _batches: Iterator[Histories], dataset: Dataset, _allowed: FitRange, _settings: Settings
) -> BaseRecommender:
    return UserTopRecommender(dataset.num_songs)


FROM_PLAYS: dict[str, FromPlays] = {
    "popularity": _popularity,
    "popularity-recent": _recent,
    "user-top": _user_top,
    "sequential-rules": _rules,
    "vsknn": _vsknn,
    "vstan": _vstan,
}


def _average(discount: float) -> FromVectors:
    return lambda vectors: AverageRecommender(vectors, discount)


FROM_VECTORS: dict[str, FromVectors] = {
    "item-knn": ItemKnnRecommender,
    **{f"average-{discount}": _average(discount) for discount in DISCOUNTS},
}
FROM_BOTH = tuple(OFFSETS)  # the weight-based ones

BASELINES: tuple[str, ...] = (*FROM_PLAYS, *FROM_VECTORS, *FROM_BOTH)


def needs_vectors(names: Sequence[str]) -> bool:
    """True if one of the named baselines works on song vectors."""
    return any(name in FROM_VECTORS or name in FROM_BOTH for name in names)


def fit_baselines(
    names: Sequence[str],
    dataset: Dataset,
    vectors: np.ndarray | None,
    allowed: FitRange,
    selection: Selection | None = None,
    settings: Mapping[str, Settings] | None = None,
) -> list[BaseRecommender]:
    """Fit the named baselines on what `allowed` lets through of the data set, in the order of the names.

    `vectors` is float32 (N, D), normalized, and must itself come from that range; it is needed by `item-knn`, the
    averages and the weight-based ones, which share it. These last choose λ by `selection`, and take a usual one where
    there is none. `settings` are those of the others, by baseline. Raises `InputError` for an unknown name.
    """
    fitted: list[BaseRecommender] = []
    for name in names:
        batches = (allowed.select(batch) for batch in dataset.read_all())
        if name in FROM_PLAYS:
            fitted.append(FROM_PLAYS[name](batches, dataset, allowed, (settings or {}).get(name, {})))
        elif name not in BASELINES:
            raise InputError(f"there is no baseline {name!r}; there are: {', '.join(BASELINES)}")
        elif vectors is None:
            raise InputError(f"{name} requires song embeddings; run `rayrec embed` first")
        elif name in FROM_VECTORS:
            fitted.append(FROM_VECTORS[name](vectors))
        else:
            fitted.append(fit_weighted(batches, vectors, name, allowed, selection))
    return fitted
