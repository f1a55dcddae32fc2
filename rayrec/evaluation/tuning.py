"""Settings of baselines, chosen on the validation range of each data set by the metrics that the evaluation reports.

Q queries, N songs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rayrec.data.histories import Queries, uniform_draws, user_hash
from rayrec.evaluation.protocol import USUAL_K, HeardSongs, target_songs
from rayrec.evaluation.ranks import metric_columns, metrics_of, rank_targets
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import Selection, Settings, fit_baselines
from rayrec.recommend.session_knn import VsknnRecommender, VstanRecommender

QUERIES = 1_000  # of the validation range, by a hash of user and play
TUNED_TARGETS = ("served", "next")
MRR_WEIGHT = 0.2  # of MRR beside recall

# The values that are tried of each setting, one setting after the other, the others as chosen so far.
CHOICES: dict[str, dict[str, Sequence[float]]] = {
    "vstan": {
        "days_decay": (7.0, 30.0, 120.0, 365.0, 1825.0),
        "plays_decay": (1.0, 2.0, 4.0),
        "places_decay": (2.0, 5.0, 20.0),
        "neighbours": (100, 200, 500),
        "just_played": (0.05, 0.25, 1.0),
    },
    "vsknn": {"last_plays": (3, 5, 10, 20), "neighbours": (50, 100, 200, 500)},
    "sequential-rules": {"decay": (0.5, 1.0, 2.0)},
    "popularity-recent": {"days": (1.0, 7.0, 21.0, 60.0, 180.0)},
}


def tune_baseline(name: str, selection: Selection) -> Settings:
    """The best settings for a baseline of CHOICES; its trials are fitted on what precedes the validation range."""
    metric = TuningMetric(selection)
    trial = _trials(name, selection)
    chosen = dict(trial({}).settings)
    best = metric(trial(chosen))
    for setting, values in CHOICES[name].items():
        for value in values:
            settings = {**chosen, setting: value}
            if settings != chosen and (score := metric(trial(settings))) > best:
                best, chosen = score, settings
    return chosen


def _trials(name: str, selection: Selection) -> Callable[[Settings], BaseRecommender]:
    """What fits a baseline under given settings; session kNN reads the sessions once for all trials."""

    def fit(settings: Settings) -> BaseRecommender:
        return fit_baselines([name], selection.dataset, None, selection.allowed, settings={name: settings})[0]

    fitted = fit({})
    if isinstance(fitted, VstanRecommender):
        vstan = fitted
        return lambda settings: vstan.with_settings(replace(vstan.chosen, **settings))
    if isinstance(fitted, VsknnRecommender):
        vsknn = fitted
        return lambda settings: vsknn.with_settings(replace(vsknn.chosen, **settings))
    return fit


class TuningMetric:
    """Recall@20 plus a fifth of MRR@20, as served and of all next plays, added up, on the validation range."""

    def __init__(self, selection: Selection) -> None:
        histories = self._histories = selection.histories
        rows = histories.rows[selection.plays]
        plays_before = selection.plays - histories.offsets[rows]
        hashes = user_hash(histories.user_ids, salt="queries ")
        order = np.argsort(uniform_draws(hashes[rows], plays_before), kind="stable")
        drawn = np.sort(selection.plays[order[plays_before[order] > 0][:QUERIES]])
        self._queries = Queries.before_plays(histories, drawn)
        heard = HeardSongs(histories)
        self._targets = {name: target_songs(histories, self._queries, name, heard) for name in TUNED_TARGETS}
        self._known = np.ones(selection.dataset.num_songs, dtype=bool)

    def __len__(self) -> int:
        return len(self._queries)

    def __call__(self, recommender: BaseRecommender) -> float:
        """The metric of a recommender; 0 where there is no query."""
        ranked = rank_targets(recommender, self._histories, self._queries, self._targets, self._known, depth=USUAL_K)
        total, columns = 0.0, metric_columns((USUAL_K,))
        for name, target in self._targets.items():
            metrics = metrics_of(ranked.ranks[name], target.rows, target.sizes, (USUAL_K,))
            mean = metrics.sum(axis=0) / max(1, np.count_nonzero(target.sizes))
            total += mean[columns.index(("recall", USUAL_K))] + MRR_WEIGHT * mean[columns.index(("mrr", USUAL_K))]
        return float(total)
