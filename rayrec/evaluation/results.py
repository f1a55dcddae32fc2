"""The figures of an evaluation, as plain values: what results.json holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rayrec.evaluation.accumulator import LAST, LISTED, SLICED, VIEWS, Tally
from rayrec.evaluation.bootstrap import means_with_intervals
from rayrec.evaluation.cosine_curves import Curve
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.pairwise import NEGATIVES, PAIRED
from rayrec.evaluation.protocol import GROUPS, TARGETS, EvaluateConfig, slices_of, usual_k
from rayrec.evaluation.ranks import metric_columns
from rayrec.recommend.base import Recommender

DIGITS = 6  # of every figure
# Targets and metrics of comparisons.
COMPARED = (("served", "next", "next_repeat", "offsets25_50", "served25_50"), ("recall", "mrr"))

Entry = dict[str, Any]


def figures_of(tally: Tally, evaluator: Evaluator, default: str) -> dict[str, list[Entry]]:
    """All figures by name: results, comparisons, pairwise, breakdowns, recommended, leave_one_out, cosine_by_offset.

    `default` names the model that `recommend` uses. Each list's function below says what its entries hold.
    """
    recommenders, config = evaluator.recommenders, evaluator.config
    return {
        "results": results_of(tally, recommenders, config),
        "comparisons": comparisons_of(tally, recommenders, config, default),
        "pairwise": pairwise_of(tally, evaluator.curves, config),
        "breakdowns": breakdowns_of(tally, recommenders, config, evaluator.contexts),
        "recommended": recommended_of(tally, recommenders, config),
        "leave_one_out": leave_one_out_of(tally, recommenders, config),
        "cosine_by_offset": curves_of_tally(tally, evaluator.curves, config),
    }


def results_of(
    tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig, views: Sequence[str] = TARGETS
) -> list[Entry]:
    """One entry per model, target, group of users, metric and cut-off; groups without a question are left out.

    Each has model, kind, users (all, seen, new or held_out), target, metric, k, value, low and high
    (the bootstrap interval over users), plays (the questions) and users_count, which stand behind it.
    """
    return [
        entry
        for model, recommender in enumerate(recommenders)
        for view in views
        for group in ("all", *GROUPS)
        for entry in _entries(tally, model, recommender, view, group, config)
    ]


def leave_one_out_of(tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig) -> list[Entry]:
    """As `results_of` for the last play of each user alone, target next: for comparison with publications."""
    return results_of(tally, recommenders, config, (LAST,))


def _entries(
    tally: Tally, model: int, recommender: Recommender, view: str, group: str, config: EvaluateConfig
) -> Iterator[Entry]:
    place, groups = VIEWS.index(view), _groups(group)
    questions = tally.questions[place, groups].sum(axis=0)
    if questions[0] == 0:
        return
    sums = tally.metrics[model, place, groups].sum(axis=0)
    values, lows, highs = means_with_intervals(sums, np.broadcast_to(questions[:, None], sums.shape), config.confidence)
    target = "next" if view == LAST else view
    about = {"model": recommender.name, "kind": recommender.kind, "users": group, "target": target}
    behind = {"plays": int(questions[0]), "users_count": int(tally.users[place, groups].sum())}
    for column, (metric, k) in enumerate(metric_columns(config.ks)):
        yield {**about, "metric": metric, "k": k, **_figures(values, lows, highs, column), **behind}


def comparisons_of(
    tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig, default: str
) -> list[Entry]:
    """The default model against each other one: difference (default's minus other's), low and high.

    A paired bootstrap: in each sample both models are judged on the same users, so an interval
    without 0 says that the difference is not one of the users drawn. Nothing where the default
    model is not among the recommenders.
    """
    names = [recommender.name for recommender in recommenders]
    if default not in names:
        return []
    entries = []
    columns, k = metric_columns(config.ks), usual_k(config.ks)
    for other in (name for name in names if name != default):
        for target in COMPARED[0]:
            place = VIEWS.index(target)
            questions = tally.questions[place].sum(axis=0)
            if questions[0] == 0:
                continue
            ours, theirs = (tally.metrics[names.index(name), place].sum(axis=0) for name in (default, other))
            counts = np.broadcast_to(questions[:, None], ours.shape)
            figures = means_with_intervals(ours - theirs, counts, config.confidence)
            for metric in COMPARED[1]:
                about = {"model": default, "other": other, "users": "all", "target": target, "metric": metric, "k": k}
                entries.append({**about, **_figures(*figures, columns.index((metric, k)), name="difference")})
    return entries


def breakdowns_of(
    tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig, contexts: Sequence[str]
) -> list[Entry]:
    """Recall and MRR of the next play by slice: model, by, slice, metric, k, value, low, high and plays.

    Empty slices are left out; `by` is history, activity or context, see `slices_of`.
    """
    entries = []
    for place, (by, name) in enumerate(slices_of(contexts)):
        questions = tally.slice_questions[place]
        if questions[0] == 0:
            continue
        for model, recommender in enumerate(recommenders):
            sums = tally.slice_metrics[model, place]
            figures = means_with_intervals(sums, np.broadcast_to(questions[:, None], sums.shape), config.confidence)
            for column, metric in enumerate(SLICED):
                about = {"model": recommender.name, "by": by, "slice": name, "target": "next", "metric": metric}
                interval = _figures(*figures, column)
                entries.append({**about, "k": usual_k(config.ks), **interval, "plays": int(questions[0])})
    return entries


def recommended_of(tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig) -> list[Entry]:
    """What each model recommends to the users drawn, in lists of LIST_LENGTH songs: one entry a model.

    coverage is the share of the catalog that is in any list; popularity_rank (1: the most played
    song) and repeats (share of songs that the user had heard) are means over the places of the lists, each
    with its low and high; lists is how many lists there were.
    """
    entries = []
    for model, recommender in enumerate(recommenders):
        if not tally.list_counts[model, 0]:
            continue
        counts = np.broadcast_to(tally.list_counts[model][:, None], tally.list_sums[model].shape)
        figures = means_with_intervals(tally.list_sums[model], counts, config.confidence)
        entry: Entry = {"model": recommender.name, "kind": recommender.kind}
        entry["coverage"] = round(float(tally.listed[model].mean()), DIGITS)
        for column, name in enumerate(LISTED):
            value, low, high = _figures(*figures, column).values()
            entry |= {name: value, f"{name}_low": low, f"{name}_high": high}
        entries.append({**entry, "lists": int(tally.lists[model])})
    return entries


def pairwise_of(tally: Tally, curves: Sequence[Curve], config: EvaluateConfig) -> list[Entry]:
    """Pairwise accuracy: model, kind, horizon, target, negatives, value, low, high and pairs (how many)."""
    entries = []
    for row, (recommender, horizon) in enumerate(curves):
        for place, target in enumerate(PAIRED):
            pairs = tally.pairs[row, place]
            figures = means_with_intervals(tally.pairs_won[row, place], pairs, config.confidence)
            for column, negatives in enumerate(NEGATIVES):
                if pairs[0, column]:
                    about = {"model": recommender.name, "kind": recommender.kind, "horizon": horizon, "target": target}
                    behind = {"pairs": int(pairs[0, column])}
                    entries.append({**about, "negatives": negatives, **_figures(*figures, column), **behind})
    return entries


def curves_of_tally(tally: Tally, curves: Sequence[Curve], config: EvaluateConfig) -> list[Entry]:
    """One entry per curve: model, kind, horizon, and lists over the offsets that have a play behind them.

    The lists are offset, value (the mean cosine), low, high and plays.
    """
    entries: list[Entry] = []
    for row, (recommender, horizon) in enumerate(curves if config.offsets else []):
        counts = tally.curve_counts[row]
        value, low, high = means_with_intervals(tally.curve_sums[row], counts, config.confidence)
        filled = np.flatnonzero(counts[0])
        entries.append(
            {
                "model": recommender.name,
                "kind": recommender.kind,
                "horizon": horizon,
                "offset": (filled + 1).tolist(),
                "value": np.round(value[filled], DIGITS).tolist(),
                "low": np.round(low[filled], DIGITS).tolist(),
                "high": np.round(high[filled], DIGITS).tolist(),
                "plays": counts[0, filled].astype(int).tolist(),
            }
        )
    return entries


def _groups(name: str) -> list[int]:
    return list(range(len(GROUPS))) if name == "all" else [GROUPS.index(name)]


def _figures(
    values: np.ndarray, lows: np.ndarray, highs: np.ndarray, column: int, name: str = "value"
) -> dict[str, float]:
    interval = {name: values[column], "low": lows[column], "high": highs[column]}
    return {key: round(float(figure), DIGITS) for key, figure in interval.items()}
