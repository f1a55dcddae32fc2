"""How well models answer on plays that they have not seen, before the last fit on all plays is used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import USUAL_K, EvaluateConfig
from rayrec.evaluation.report import verdict
from rayrec.evaluation.results import Entry, Figures
from rayrec.jobs.evaluate import evaluate_buckets
from rayrec.model.added_songs import AddedSongs
from rayrec.notebook import html_table
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.index import IndexConfig, SongIndex
from rayrec.recommend.ranker_training import HELD_OUT, checks_rankers
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import load_two_step
from rayrec.storage.artifacts import Manifest

TARGETS = ("served", "next")
QUERIES = 10_000  # about
SAMPLES = 500  # of the bootstrap
SHARED = "reports/quality"  # folder of what workers share; the jobs that measure quality run one at a time


@dataclass(frozen=True, kw_only=True)
class ServedParts:
    """What answers: a network, and perhaps a retrieval with rankers."""

    name: str
    network: str  # folder of the network
    retrieval: str | None = None  # folder of the retrieval
    rankers: Manifest | None = None
    added: AddedSongs | None = None

    def load(self, dataset: Dataset) -> BaseRecommender:
        """The recommender, with an index of its own."""
        network = TasteRecommender.from_folder(dataset.workspace, self.network)
        if self.added is not None:
            network.add_songs(self.added)
        network.index = SongIndex.build(network.song_vectors, IndexConfig())
        recommender: BaseRecommender = network
        if self.rankers is not None and self.retrieval is not None:
            real_times = dataset.manifest.times == "real"
            recommender = load_two_step(dataset.workspace, network, self.retrieval, self.rankers, real_times=real_times)
        recommender.name = self.name
        return recommender


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Recall@20 and MRR@20 of models on the same queries; each row as `Figures.results` and `comparisons` give them."""

    results: list[Entry]  # model, target (served or next), metric, value, low, high, plays (queries)
    comparisons: list[Entry]  # of the first model with each other one

    @property
    def queries(self) -> int:
        """Queries behind the figures as served."""
        return max((row["plays"] for row in self.results if row["target"] == "served"), default=0)

    def value(self, model: str, target: str = "served", metric: str = "recall") -> float | None:
        """One figure; None where no query stands behind it."""
        row_of = {"model": model, "target": target, "metric": metric}
        return next((row["value"] for row in self.results if row_of.items() <= row.items()), None)

    def table(self) -> list[list[Any]]:
        """One row a model: name, recall@20 as served with low and high, MRR@20, and both of all next plays."""
        served = [row for row in self.results if row["target"] == "served" and row["metric"] == "recall"]
        others = (("served", "mrr"), ("next", "recall"), ("next", "mrr"))
        return [
            [
                row["model"],
                row["value"],
                row["low"],
                row["high"],
                *(self.value(row["model"], target, metric) for target, metric in others),
            ]
            for row in sorted(served, key=lambda row: -row["value"])
        ]

    def summary(self, model: str, shown: str) -> dict[str, Any]:
        """What a release keeps of a model, under the name that is `shown`: verdict, queries, figures at 20."""
        entries = {"results": self.results, "comparisons": self.comparisons}
        if shown != model:
            entries = {"results": [{**row, "model": shown} for row in self.results if row["model"] == model]}
        named = {"served_": "served", "": "next"}
        return {
            "verdict": verdict(entries, shown),
            "queries": self.queries,
            "figures": {
                f"{prefix}{metric}@{USUAL_K}": value
                for prefix, target in named.items()
                for metric in ("recall", "mrr")
                if (value := self.value(model, target, metric)) is not None
            },
        }

    def _repr_html_(self) -> str:
        headers = ("model", "served recall@20", "low", "high", "MRR@20", "all recall@20", "MRR@20")
        return html_table(f"Validation, {self.queries:,} queries as served", headers, self.table())

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"queries": self.queries, "results": self.results, "comparisons": self.comparisons}


def measure_quality(
    dataset: Dataset,
    models: Sequence[BaseRecommender],
    *,
    split: Split,
    song_plays: np.ndarray,
    checking_users: bool = False,
) -> Quality:
    """Recall@20 and MRR@20 of models on the test range of a split that none of them has seen.

    Their names differ. `song_plays`, int (N,), are the plays before the range: songs without one are a miss for every
    model. With `checking_users` only those who check rankers are evaluated: the others' queries trained them. About
    10,000 queries are answered. Needs a running cluster.
    """
    queries = QUERIES * HELD_OUT if checking_users else QUERIES  # of all users
    config = EvaluateConfig(ks=(USUAL_K,), queries=queries, bootstrap_samples=SAMPLES, offsets=0, max_curve_users=0)
    evaluator = Evaluator(
        models,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=0.0,
        chosen_users=checks_rankers if checking_users else None,
    )
    sums = evaluate_buckets(dataset.workspace, evaluator, dataset.manifest.buckets, SHARED)
    figures = Figures(sums, models, config)
    results = [row for row in figures.results(TARGETS) if row["users"] == "all" and row["metric"] in ("recall", "mrr")]
    comparisons = [row for row in figures.comparisons(models[0].name) if row["target"] in TARGETS]
    return Quality(results=results, comparisons=comparisons)
