"""Reports with planted figures: a small one for the parts of a release, and one with every kind of figure."""

from typing import Any

import numpy as np

from rayrec.evaluation.plots import Plot, cosine_plot, song_map, training_plot
from rayrec.evaluation.protocol import CLASSES
from rayrec.evaluation.report import BY_TITLES, TARGET_TITLES, html_page, summary, write_report
from rayrec.storage.artifacts import Manifest, publish
from rayrec.storage.workspace import Workspace


def plant_report(
    workspace: Workspace, parts: dict[str, str], *, recall: float = 0.42, report_id: str = "planted"
) -> None:
    """Publish a report with `recall` as served recall@20, an MRR@20 of 0.2 and a warning that the test range leaked."""
    fields = {"model": "two-step", "kind": "network", "users": "all", "target": "served", "k": 20}
    values = {"recall": recall, "mrr": 0.2}
    rows = [
        {**fields, "metric": metric, "value": value, "low": value - 0.01, "high": value + 0.01, "plays": 9}
        for metric, value in values.items()
    ]
    statistics = {"results": rows}
    metrics = {"default": "two-step", **summary(statistics, "two-step"), "plays": 9, "warning": "the test range leaked"}
    manifest = Manifest(kind="reports", id=report_id, inputs=dict(parts), metrics=metrics)
    names = write_report(workspace, manifest.folder, statistics, default="two-step", about={})
    publish(workspace, manifest, names)


RECALLS = {
    "two-step": 0.42,
    "taste": 0.35,
    "taste-short": 0.33,
    "r_hst": 0.31,
    "vstan": 0.39,
    "sequential-rules": 0.28,
    "item-knn": 0.19,
    "weighted-average-of-everything": 0.12,
    "popularity": 0.05,
}
NETWORKS = ("two-step", "taste", "taste-short", "r_hst")
TITLES = [f"The Artist of the Long Name – A Title that Takes Some Space, Part {number}" for number in range(12)]


def full_report() -> str:
    """Return the page of a report with every kind of figure: nine models, all targets, an ablation, three plots."""
    kinds = {name: "network" if name in NETWORKS else "baseline" for name in RECALLS}
    targets = [*TARGET_TITLES, "days0_7", "served_days0_7"]
    results = [
        _entry(name, target, metric, recall * (1 if metric == "recall" else 0.5), k=k, kind=kinds[name], users=users)
        for name, recall in RECALLS.items()
        for target in targets
        for metric in ("recall", "mrr", "ndcg")
        for k in (10, 20, 100)
        for users in ("all", "seen", "new", "held_out")
    ]
    other_recalls = {name: recall for name, recall in RECALLS.items() if name != "two-step"} | {"without sessions": 0.4}
    ablation = _entry("without sessions", "served", "recall", 0.4, kind="ablation")
    statistics = {
        "results": [*results, ablation],
        "comparisons": [
            {**_entry("two-step", target, metric, 0.42 - recall), "other": other_model, "difference": 0.42 - recall}
            for other_model, recall in other_recalls.items()
            for target in ("served", "next", "offsets25_50")
            for metric in ("recall", "mrr")
        ],
        "retrieval": [
            {**_entry("two-step", target, "recall", 0.6), "retriever": retriever, "candidates": 301.4}
            for retriever in ("all", "taste_short", "history_sessions", "recent_rules")
            for target in ("served", "next")
        ],
        "pairwise": [
            {**_entry(name, "next", "accuracy", 0.8), "negatives": negatives}
            for name in NETWORKS
            for negatives in ("uniform", "zipf")
        ],
        "breakdowns": [
            {**_entry(name, "next", "recall", recall), "by": grouping, "slice": slice_class}
            for name, recall in RECALLS.items()
            for grouping in BY_TITLES
            for slice_class in CLASSES
        ],
        "recommended": [
            {
                **{"model": name, "lists": 5000, "coverage": 0.31, "repeats": 0.2, "popularity_rank": 3210.4},
                **{"repeats_low": 0.1, "repeats_high": 0.3},
                **{"popularity_rank_low": 3000.0, "popularity_rank_high": 3400.0},
            }
            for name in RECALLS
        ],
        "leave_one_out": [_entry(name, "next", "recall", recall) for name, recall in RECALLS.items()],
        "song_vectors": [
            {
                **{"vectors": vectors, "id": "5f", "dim": 64, "directions": 21.7, "coverage": 0.9},
                **{"songs_with_vector": 12_345, "mean_cosine": 0.021},
                "neighbors": [
                    {"song": title, "plays": 4321, "neighbors": TITLES[:5], "cosines": [0.91, 0.8, 0.7, 0.6, 0.5]}
                    for title in TITLES
                ],
            }
            for vectors in ("songs", "models")
        ],
        "examples": [{"last_plays": TITLES[:5], "songs": TITLES[5:10]} for _ in range(3)],
        "settings": [{"model": "vstan", "days_decay": 30.0, "neighbors": 200}],
        "calibration": [
            {
                "model": "two-step",
                "target": target,
                "value": 0.0031,
                "mean_probability": 0.04,
                "right": 0.041,
                "songs": 987,
            }
            for target in ("served", "next")
        ],
    }
    details = {
        "protocol": "in time",
        "test range": "2015-01-01 00:00 UTC to 2015-01-20 00:00 UTC",
        **{kind: f"{number:012x}" for number, kind in enumerate(("dataset", "split", "models", "rankers"), 1)},
        "settings of the network": "hidden dim: 256; averages: 0, 0.5, 0.9; long days: 0, 7; epochs: 40; patience: 3",
        "settings of the rankers": "defaults",
        "warning": "the song embeddings: trained on playlists, which have no times: a split cannot cut them",
        "versions": "rayrec 0.1.0, Python 3.12.3, torch 2.9.0, numpy 2.3.4, lightgbm 4.6.0",
    }
    return html_page(statistics, default="two-step", about=details, plots=_plots())


def _entry(
    model: str,
    target: str,
    metric: str,
    value: float,
    *,
    k: int = 20,
    kind: str = "network",
    users: str = "all",
) -> dict[str, Any]:
    fields = {"model": model, "kind": kind, "users": users, "target": target, "metric": metric, "k": k}
    return {**fields, "value": value, "low": value - 0.012, "high": value + 0.011, "plays": 54_321, "users_count": 987}


def _plots() -> list[Plot]:
    curve: dict[str, Any] = {"offset": [1, 2, 5, 10], "plays": [9, 8, 7, 6], "horizon": "short"}
    curve |= {"value": [0.5, 0.4, 0.3, 0.2], "low": [0.4, 0.3, 0.2, 0.1], "high": [0.6, 0.5, 0.4, 0.3]}
    epochs = [
        {"phase": "selection", "epoch": epoch, "loss": 5 - epoch, "validation_recall@20": 0.1 * epoch}
        for epoch in range(3)
    ]
    random = np.random.default_rng(0)
    vectors, plays = random.normal(size=(50, 8)).astype(np.float32), random.integers(1, 99, size=50)
    plots = [
        cosine_plot([{**curve, "model": name, "kind": "network"} for name in NETWORKS]),
        training_plot(epochs),
        song_map(vectors, plays, TITLES[:10]),
    ]
    return [plot for plot in plots if plot is not None]
