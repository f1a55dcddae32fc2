"""From files of plays to a live release: chosen and measured on the newest plays, then fitted on all plays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.config import Settings, from_mapping, section_of
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.display import html_table
from rayrec.errors import InputError
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import USUAL_K, EvaluateConfig
from rayrec.evaluation.report import verdict
from rayrec.evaluation.results import Entry, Figures
from rayrec.importing.inspection import describe_import, guess_import
from rayrec.jobs.add_songs import added_to
from rayrec.jobs.build_index import index_network
from rayrec.jobs.evaluate import evaluate_buckets
from rayrec.jobs.job_config import FitConfig
from rayrec.jobs.pipeline import CONFIGS, NO_RANGE, RANKING, Outcome, Stages, example_answer
from rayrec.jobs.runtime import ray_cluster
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import SELECTION_NETWORK, TrainConfig
from rayrec.recommend.answer import Answer
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import PopularityRecommender
from rayrec.recommend.index import IndexConfig, require_one_faiss
from rayrec.recommend.stored_retrieval import SELECTION_RETRIEVAL, Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HELD_OUT, SELECTION_RANKERS, checks_rankers, load_two_step
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.releases import VALIDATION, default_parts
from rayrec.storage.workspace import Workspace

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
    rankers: str | None = None  # folder of the rankers
    added: AddedSongs | None = None

    def load(self, dataset: Dataset, index: IndexConfig) -> BaseRecommender:
        """The recommender, with an index of its own."""
        network = TasteRecommender.from_folder(dataset.workspace, self.network)
        if self.added is not None:
            network.add_songs(self.added)
        network.index = index_network(dataset, network, index)
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


SECTIONS = ("import", "embed", "train", "retrieval", "rank", "taste", "index")

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a fit came to."""

    read_as: str  # format and columns
    last_import: Mapping[str, Any]  # as `ImportSummary.to_mapping` gives it; empty where no files were read
    outcomes: list[Outcome]
    release: str  # id
    split: Split | None  # whose validation range everything was chosen on; None: too few plays
    quality: Quality | None  # on that range, of models that have not seen it
    user: str  # an example
    answer: Answer  # what is recommended to this user

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "read_as": self.read_as,
            "import": dict(self.last_import),
            "stages": [outcome.to_mapping() for outcome in self.outcomes],
            "release": self.release,
            "split": None if self.split is None else self.split.id,
            "validation": None if self.quality is None else self.quality.to_mapping(),
            "user": self.user,
            **self.answer.to_mapping(),
        }


@writes("fit")
def fit(
    workspace: Workspace,
    config: FitConfig,
    *,
    settings: Sections | None = None,
    force: bool = False,
    on_stage: Callable[[Outcome], None] = lambda outcome: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> FitResult:
    """Import plays, use the newest for validation, fit everything on all plays and make the release live.

    `settings` are those of the stages, section -> name -> value, as in a pipeline file; those of `train` default to
    ones that suit the number of plays. Stages whose inputs and settings have not changed are skipped, unless with
    `force`. `on_stage` is called after each stage, `on_note` with texts on what was guessed, rejected
    and used for validation.

    The quality is that of the networks, retrieval and rankers that have not seen the validation range, on queries of
    the users by whom the rankers were not trained. Raises `InputError` for files that cannot be read, for unknown
    settings, in a workspace that holds other plays, and where plays were appended since and the files have changed,
    and `TooManyRejectedError` where more rows are rejected than `max_rejected` allows.
    """
    require_one_faiss()  # before any work
    sections = _checked(settings or {})
    if config.epochs is not None:
        sections["train"]["epochs"] = config.epochs
    for name, value in (("max_rejected", config.max_rejected), ("user", config.user)):
        if value is not None:
            sections["import"][name] = value
    plays = guess_import(
        config.paths,
        format_name=config.format,
        columns=config.columns,
        user=sections["import"].get("user", ""),
        timezone=config.timezone or "UTC",
        on_note=on_note,
    )
    plays = plays.replace(**sections["import"])
    on_note(f"Reading as {describe_import(plays)}")
    with ray_cluster():
        stages = Stages(workspace, force=force, on_stage=on_stage, on_note=on_note)
        stages.run("import", plays)
        stages.hold_back()
        dataset = Dataset(workspace)
        configs = stage_configs(dataset, sections)
        fit_models(stages, configs)
        index = configs["index"]
        assert isinstance(index, IndexConfig)
        quality = _quality(dataset, stages, index) if stages.split is not None else None
        if quality is not None:
            default = "two-step" if "rank" in stages.artifact_ids else "taste"
            stages.release_metrics = {VALIDATION: quality.summary(default, default)}
        for name in ("taste", "index", "release"):
            stages.run(name, configs[name])
    release = artifacts.load_manifest(workspace, "releases", stages.artifact_ids["release"])
    user, shown = example_answer(workspace, default_parts(workspace))
    return FitResult(
        read_as=describe_import(plays),
        last_import=dataset.manifest.last_import,
        outcomes=stages.outcomes,
        release=release.id,
        split=stages.split,
        quality=quality,
        user=user,
        answer=shown,
    )


def fit_models(stages: Stages, configs: Mapping[str, Settings]) -> None:
    """Embeddings, network, added songs, and with a split also retrieval and rankers."""
    stages.run("embed", configs["embed"])
    stages.run("train", configs["train"])
    stages.run("songs")  # before the rankers, which then learn where new songs belong
    for name in RANKING:
        if stages.split is None:
            stages.leave_out(name, NO_RANGE)
        else:
            stages.run(name, configs[name])


def stage_configs(dataset: Dataset, sections: Sections) -> dict[str, Settings]:
    """Stage -> config of all stages after the import, those of embeddings and training by the data set."""
    defaults = {
        "embed": {"session_gap_minutes": session_gap(dataset)},
        "train": {} if "preset" in sections.get("train", {}) else train_defaults(dataset.manifest),
    }
    return {
        name: from_mapping(CONFIGS[name], {**defaults.get(name, {}), **sections.get(name, {})}, f"settings [{name}]")
        for name in (*SECTIONS[1:], "release")
    }


# Why these: docs/training.md, "What fit chooses by itself".
STEPS_PER_EPOCH = 40
SMALLEST_BATCH = 4
PLAYS_WITHOUT_WORKERS = 2_000_000  # starting Ray Train's workers takes longer than a short training
SESSION_MINUTES = 30.0
WHOLE_HISTORY_MINUTES = 1e9
IN_SESSIONS = 0.5  # share of the plays below which each history counts as one session
SAMPLED_PLAYS = 1_000_000


def session_gap(dataset: Dataset) -> float:
    """The pause that ends a session, in minutes: none does where most plays are alone within half an hour."""
    plays = near = 0
    for histories in dataset.read_all():
        same_user = histories.rows[1:] == histories.rows[:-1]
        follows = same_user & (np.diff(histories.played_at) <= SESSION_MINUTES * 60_000)
        near += int((np.append(follows, False) | np.append(False, follows)).sum()) if len(histories.rows) else 0
        plays += histories.num_plays
        if plays >= SAMPLED_PLAYS:
            break
    return SESSION_MINUTES if near >= IN_SESSIONS * plays else WHOLE_HISTORY_MINUTES


def train_defaults(dataset: DatasetManifest) -> dict[str, Any]:
    """Settings of the training for the size of a data set: a small one is read in smaller batches and more epochs."""
    usual = TrainConfig()
    windows = dataset.users + dataset.plays // usual.window
    batch = min(usual.batch, max(SMALLEST_BATCH, windows // STEPS_PER_EPOCH))
    values: dict[str, Any] = {"workers": 0} if dataset.plays <= PLAYS_WITHOUT_WORKERS else {}
    return values | ({"batch": batch} if batch < usual.batch else {})


def served_before(
    dataset: Dataset, model: Manifest, retrieval: Manifest, rankers: Manifest | None, name: str
) -> ServedParts:
    """What answers with the parts that have not seen the validation range."""
    return ServedParts(
        name=name,
        network=model.path(SELECTION_NETWORK),
        retrieval=retrieval.path(SELECTION_RETRIEVAL),
        rankers=rankers.path(SELECTION_RANKERS) if rankers is not None else None,
        added=added_to(dataset, model.path(SELECTION_NETWORK)),
    )


def _quality(dataset: Dataset, stages: Stages, index: IndexConfig) -> Quality | None:
    """On the validation range: what answers, the network alone, and popularity; None where there is no query."""
    workspace, split = dataset.workspace, stages.split
    model, retrieval = (artifacts.load_manifest(workspace, kind, stages.artifact_ids[name]) for kind, name in PARTS)
    if split is None or not workspace.exists(model.path(SELECTION_NETWORK)):
        return None
    rankers = (
        artifacts.load_manifest(workspace, "rankers", stages.artifact_ids["rank"])
        if "rank" in stages.artifact_ids
        else None
    )
    song_plays = Retrieval.load(workspace, retrieval.path(SELECTION_RETRIEVAL)).plays.plays
    parts = [served_before(dataset, model, retrieval, rankers, "two-step")] if rankers else []
    parts.append(served_before(dataset, model, retrieval, None, "taste"))
    quality = measure_quality(
        dataset,
        [*(part.load(dataset, index) for part in parts), PopularityRecommender(song_plays)],
        split=split.validation_as_test(),
        song_plays=song_plays,
        checking_users=rankers is not None,
    )
    return quality if quality.queries else None


PARTS = (("models", "train"), ("retrieval", "retrieval"))  # kind and stage


def _checked(settings: Sections) -> dict[str, dict[str, Any]]:
    """The sections, all of them. Raises `InputError` for unknown sections or settings, and for values."""
    unknown = sorted(set(settings) - set(SECTIONS))
    if unknown:
        raise InputError(f"the settings have an unknown section {unknown[0]!r}; expected {', '.join(SECTIONS)}")
    sections = {name: section_of(settings, name, "settings") for name in SECTIONS}
    for name, section in sections.items():
        if name != "import":
            from_mapping(CONFIGS[name], section, f"settings [{name}]")
    return sections
