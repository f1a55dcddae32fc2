"""The figures of an evaluation, as plain values: what results.json holds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayrec.evaluation.bootstrap import means_with_intervals
from rayrec.evaluation.curves import Curve
from rayrec.evaluation.metrics import metric_columns
from rayrec.evaluation.protocol import GROUPS, EvaluateConfig, Tally
from rayrec.recommend.recommender import Recommender

DIGITS = 6  # of every figure


def results_of(tally: Tally, recommenders: Sequence[Recommender], config: EvaluateConfig) -> list[dict[str, Any]]:
    """One entry per model, group of users, metric and cut-off; groups without a test play are left out.

    Each has model, kind, users (all, seen, new or held_out), target, metric, k, value, low and high
    (the bootstrap interval over users), plays and users_count (how many stand behind it).
    """
    entries = []
    groups = {"all": list(range(len(GROUPS))), **{name: [place] for place, name in enumerate(GROUPS)}}
    for model, recommender in enumerate(recommenders):
        for group, places in groups.items():
            plays = tally.plays[places].sum(axis=0)
            if plays[0] == 0:
                continue
            sums = tally.metrics[model, places].sum(axis=0)
            counts = np.broadcast_to(plays[:, None], sums.shape)
            values, lows, highs = means_with_intervals(sums, counts, config.confidence)
            about = {"model": recommender.name, "kind": recommender.kind, "users": group, "target": "next"}
            behind = {"plays": int(plays[0]), "users_count": int(tally.users[places].sum())}
            for column, (metric, k) in enumerate(metric_columns(config.ks)):
                interval = {"value": values[column], "low": lows[column], "high": highs[column]}
                rounded = {name: round(float(figure), DIGITS) for name, figure in interval.items()}
                entries.append({**about, "metric": metric, "k": k, **rounded, **behind})
    return entries


def curves_of_tally(tally: Tally, curves: Sequence[Curve], config: EvaluateConfig) -> list[dict[str, Any]]:
    """One entry per curve: model, kind, horizon, and lists over the offsets that have a play behind them.

    The lists are offset, value (the mean cosine), low, high and plays.
    """
    entries = []
    for row, (recommender, horizon) in enumerate(curves):
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
