"""The figures of an evaluation as plain values, the content of results.json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rayrec.evaluation.accumulator import (
    LAST,
    LISTED,
    NEGATIVES,
    PAIRED,
    SLICED,
    VIEWS,
    Curve,
    MetricAccumulator,
    means_with_intervals,
)
from rayrec.evaluation.calibration import CALIBRATED, expected_calibration_error
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import GROUPS, OFFSETS, TARGETS, EvaluateConfig, slices_of, usual_k
from rayrec.evaluation.ranks import metric_columns
from rayrec.recommend.base import BaseRecommender, CandidateRecommender

DIGITS = 6  # decimal places of every figure
# Targets and metrics of comparisons.
COMPARED = (("served", "next", "next_repeat", "offsets25_50", "served25_50", "cold_songs"), ("recall", "mrr"))

ABLATION = "ablation"  # the kind of models that lack a part of the default one

Entry = dict[str, Any]


def statistics_of(sums: MetricAccumulator, evaluator: Evaluator, default: str) -> dict[str, list[Entry]]:
    """Return all figures by name, as the methods of `Statistics` return them; `default` is the model of `recommend`."""
    statistics = Statistics(sums, evaluator.recommenders, evaluator.config, list(evaluator.days))
    return {
        "settings": settings_of(evaluator.recommenders),
        "results": statistics.results(),
        "comparisons": statistics.comparisons(default),
        "calibration": statistics.calibration(),
        "retrieval": statistics.retrieval(evaluator.retrievers),
        "pairwise": statistics.pairwise(evaluator.curves),
        "breakdowns": statistics.breakdowns(evaluator.contexts),
        "recommended": statistics.recommended(len(evaluator.coverage_songs)),
        "leave_one_out": statistics.leave_one_out(),
        "cosine_by_offset": statistics.cosine_by_offset(evaluator.curves),
    }


def settings_of(recommenders: Sequence[BaseRecommender]) -> list[Entry]:
    """Return the settings chosen for the data set: an entry per model, with model and each setting by name."""
    return [{"model": recommender.name, **recommender.settings} for recommender in recommenders if recommender.settings]


class Statistics:
    """Computes means and their bootstrap intervals over users, low and high, from the sums of all users."""

    def __init__(
        self,
        sums: MetricAccumulator,
        recommenders: Sequence[BaseRecommender],
        config: EvaluateConfig,
        days: Sequence[str] = (),
    ) -> None:
        """`days` are the targets in days, in the order of the sums."""
        self._days, self._views = days, (*VIEWS, *days)
        self._sums = sums.resampled(config.bootstrap_samples, config.seed)
        self._recommenders, self._config = recommenders, config
        self._columns, self._k = metric_columns(config.ks), usual_k(config.ks)

    def results(self, views: Sequence[str] | None = None) -> list[Entry]:
        """Return one entry per model, target, group of users, metric and cut-off; groups without a query are left out.

        Each has model, kind (baseline, network or ablation), users (all, seen, new or held_out), target, metric, k,
        value, low, high, and the numbers of queries (plays) and users (users_count) in it.
        """
        return [
            entry
            for model in range(len(self._recommenders))
            for view in views or (*TARGETS, *self._days)
            for group in ("all", *GROUPS)
            for entry in self._results_of(model, view, group)
        ]

    def leave_one_out(self) -> list[Entry]:
        """Return `results` for only the last play of each user, with target next, for comparison with publications."""
        return self.results((LAST,))

    def _results_of(self, model: int, view: str, group: str) -> Iterator[Entry]:
        view_index = self._views.index(view)
        groups = list(range(len(GROUPS))) if group == "all" else [GROUPS.index(group)]
        queries = self._sums.queries[:, view_index, groups].sum(axis=1)
        if queries[0] == 0:
            return
        means = self._means(self._sums.metrics[:, model, view_index, groups].sum(axis=1), queries)
        recommender, target = self._recommenders[model], "next" if view == LAST else view
        kind = ABLATION if recommender.without else recommender.kind
        labels = {"model": recommender.name, "kind": kind, "users": group, "target": target}
        counts = {"plays": int(queries[0]), "users_count": int(self._sums.users[view_index, groups].sum())}
        for column, (metric, k) in enumerate(self._columns):
            yield {**labels, "metric": metric, "k": k, **_interval(means, column), **counts}

    def comparisons(self, default: str) -> list[Entry]:
        """Return the difference between the default model and each other model (default - other), low and high.

        The bootstrap is paired: each sample holds the same users for both models, so an interval without 0 shows that
        the difference is not due to the users drawn. Empty if the default model is not among the recommenders.
        """
        names = [recommender.name for recommender in self._recommenders]
        if default not in names:
            return []
        entries = []
        for other_model in (name for name in names if name != default):
            for target in (*COMPARED[0], *self._days):
                view_index = self._views.index(target)
                queries = self._sums.queries[:, view_index].sum(axis=1)
                if queries[0] == 0:
                    continue
                default_metrics, other_metrics = (
                    self._sums.metrics[:, names.index(name), view_index].sum(axis=1) for name in (default, other_model)
                )
                means = self._means(default_metrics - other_metrics, queries)
                labels = {"model": default, "other": other_model, "users": "all", "target": target}
                for metric in COMPARED[1]:
                    interval = _interval(means, self._columns.index((metric, self._k)), "difference")
                    entries.append({**labels, "metric": metric, "k": self._k, **interval})
        return entries

    def calibration(self) -> list[Entry]:
        """Return the expected calibration error of each model with probabilities, over the first 20 songs per query.

        One entry per model and target of CALIBRATED, with model, target, value (the error), mean_probability,
        right (the share of the songs that are the next play) and songs (their number over all queries).
        """
        calibrated = [recommender.name for recommender in self._recommenders if recommender.scores_are_probabilities]
        entries: list[Entry] = []
        for model, target_sums in zip(calibrated, self._sums.bin_sums, strict=True):
            for target, sums in zip(CALIBRATED, target_sums, strict=True):
                num_songs, probability_sum, right_count = sums.sum(axis=0)
                if num_songs:
                    error = round(expected_calibration_error(sums), DIGITS)
                    mean_probability, right_share = (
                        round(float(total / num_songs), DIGITS) for total in (probability_sum, right_count)
                    )
                    fields = {"mean_probability": mean_probability, "right": right_share, "songs": int(num_songs)}
                    entries.append({"model": model, "target": target, "value": error, **fields})
        return entries

    def retrieval(self, retrievers: Sequence[str]) -> list[Entry]:
        """Return the share of the target songs that are candidates, the upper limit of what a ranker can find.

        One entry per candidate recommender, target and retriever ("all": the union), with model, retriever, target,
        candidates (mean number per query), value (recall of all candidates), low and high.
        """
        entries = []
        for model, recommender in enumerate(self._recommenders):
            if not isinstance(recommender, CandidateRecommender):
                continue
            next_queries = self._sums.queries[:, VIEWS.index("next")].sum(axis=1)
            for target_index, target in enumerate((*OFFSETS, *self._days)):
                queries = self._sums.queries[:, self._views.index(target)].sum(axis=1)
                if queries[0] == 0:
                    continue
                means = self._means(self._sums.retrieved[:, model, target_index], queries)
                for column, retriever in enumerate(("all", *retrievers)):
                    if retriever in ("all", *recommender.retrievers):
                        candidates = round(float(self._sums.candidates[0, model, column] / next_queries[0]), 2)
                        labels = {"model": recommender.name, "retriever": retriever, "target": target}
                        entries.append({**labels, "candidates": candidates, **_interval(means, column)})
        return entries

    def breakdowns(self, contexts: Sequence[str]) -> list[Entry]:
        """Return recall and MRR of the next play by slice: model, by, slice, metric, k, value, low, high and plays.

        Empty slices are left out; `by` is the criterion of `slices_of`.
        """
        entries = []
        for slice_index, (criterion, name) in enumerate(slices_of(contexts)):
            queries = self._sums.slice_queries[:, slice_index]
            if queries[0] == 0:
                continue
            for model, recommender in enumerate(self._recommenders):
                means = self._means(self._sums.slice_metrics[:, model, slice_index], queries)
                for column, metric in enumerate(SLICED):
                    labels = {
                        "model": recommender.name,
                        "by": criterion,
                        "slice": name,
                        "target": "next",
                        "metric": metric,
                    }
                    counts = {"plays": int(queries[0])}
                    entries.append({**labels, "k": self._k, **_interval(means, column), **counts})
        return entries

    def recommended(self, coverage_songs: int) -> list[Entry]:
        """Return figures of the lists of LIST_LENGTH songs that models recommend to the users drawn, one per model.

        coverage is the share of the `coverage_songs` drawn from the catalog that is in any list; popularity_rank (1:
        the most played song) and repeats (share of songs that the user had heard) are means over the songs of the
        lists, each with its low and high; lists is the number of lists.
        """
        entries = []
        for model, recommender in enumerate(self._recommenders):
            counts = self._sums.list_counts[:, model]
            if not counts[0]:
                continue
            means = self._means(self._sums.list_sums[:, model], counts)
            entry: Entry = {"model": recommender.name, "kind": recommender.kind}
            num_listed = int(np.unpackbits(self._sums.listed[model]).sum())
            entry["coverage"] = round(num_listed / max(1, coverage_songs), DIGITS)
            for column, name in enumerate(LISTED):
                value, low, high = _interval(means, column).values()
                entry |= {name: value, f"{name}_low": low, f"{name}_high": high}
            entries.append({**entry, "lists": int(self._sums.lists[model])})
        return entries

    def pairwise(self, curves: Sequence[Curve]) -> list[Entry]:
        """Return pairwise accuracy: model, kind, horizon, target, negatives, value, low, high, pairs (their number)."""
        entries = []
        for curve_index, (recommender, horizon) in enumerate(curves):
            for target_index, target in enumerate(PAIRED):
                pairs = self._sums.pairs[:, curve_index, target_index]
                means = means_with_intervals(
                    self._sums.pairs_won[:, curve_index, target_index], pairs, self._config.confidence
                )
                labels = {"model": recommender.name, "kind": recommender.kind, "horizon": horizon, "target": target}
                for column, negatives in enumerate(NEGATIVES):
                    if pairs[0, column]:
                        counts = {"pairs": int(pairs[0, column])}
                        entries.append({**labels, "negatives": negatives, **_interval(means, column), **counts})
        return entries

    def cosine_by_offset(self, curves: Sequence[Curve]) -> list[Entry]:
        """Return one entry per curve: model, kind, horizon, and lists over the offsets that have at least one play.

        The lists are offset, value (the mean cosine), low, high and plays.
        """
        entries: list[Entry] = []
        for curve_index, (recommender, horizon) in enumerate(curves if self._config.offsets else []):
            counts = self._sums.curve_counts[:, curve_index]
            means = means_with_intervals(self._sums.curve_sums[:, curve_index], counts, self._config.confidence)
            filled_offsets = np.flatnonzero(counts[0])
            values = {
                name: np.round(series[filled_offsets], DIGITS).tolist()
                for name, series in zip(("value", "low", "high"), means, strict=True)
            }
            labels = {"model": recommender.name, "kind": recommender.kind, "horizon": horizon}
            plays = counts[0, filled_offsets].astype(int).tolist()
            entries.append({**labels, "offset": (filled_offsets + 1).tolist(), **values, "plays": plays})
        return entries

    def _means(self, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return value, low and high of `sums`, (B + 1, K), each column divided by `counts`, (B + 1,)."""
        return means_with_intervals(sums, np.broadcast_to(counts[:, None], sums.shape), self._config.confidence)


def _interval(means: tuple[np.ndarray, np.ndarray, np.ndarray], column: int, name: str = "value") -> dict[str, float]:
    names = (name, "low", "high")
    return {key: round(float(series[column]), DIGITS) for key, series in zip(names, means, strict=True)}
