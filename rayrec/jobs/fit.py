"""Fits a live release from files of plays: models are chosen on the newest plays, then fitted on all plays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rayrec.config import Settings, from_mapping, section_of
from rayrec.data.dataset import Dataset
from rayrec.data.split import SELECTION_FOLDER, Split
from rayrec.display import html_table
from rayrec.errors import InputError
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.protocol import USUAL_K, EvaluateConfig
from rayrec.evaluation.report import verdict
from rayrec.evaluation.results import Entry, Statistics
from rayrec.importing.inspection import describe_import, guess_import
from rayrec.jobs.add_songs import added_to
from rayrec.jobs.build_index import index_network
from rayrec.jobs.evaluate import evaluate_buckets
from rayrec.jobs.job_config import FitConfig
from rayrec.jobs.pipeline import CONFIGS, NO_RANGE_REASON, RANKING, Outcome, Stages, example_answer
from rayrec.jobs.runtime import ray_cluster
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.answer import Answer
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import PopularityRecommender
from rayrec.recommend.index import IndexConfig, require_one_faiss
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import HELD_OUT, checks_rankers, load_two_step
from rayrec.storage import artifacts
from rayrec.storage.artifacts import DatasetManifest, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.releases import VALIDATION, default_parts
from rayrec.storage.workspace import Workspace

TARGETS = ("served", "next")
QUERIES = 10_000  # approximate number of queries that are answered
SAMPLES = 500  # bootstrap samples
SHARED = "reports/quality"  # folder of the files that workers share; only one job at a time measures quality


@dataclass(frozen=True, kw_only=True)
class ServedParts:
    """The parts of a recommender: a network, optionally with added songs, and optionally a retrieval with rankers."""

    name: str
    network: str  # folder of the network
    retrieval: str | None = None  # folder of the retrieval
    rankers: str | None = None  # folder of the rankers
    added: AddedSongs | None = None

    def load(self, dataset: Dataset, index: IndexConfig) -> BaseRecommender:
        """Return the recommender of these parts, with an index that is built for it."""
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
    """Recall@20 and MRR@20 of models on the same queries, with the rows of `Statistics.results` and `comparisons`."""

    results: list[Entry]  # model, target (served or next), metric, value, low, high, plays (queries)
    comparisons: list[Entry]  # the first model compared with each other model

    @property
    def queries(self) -> int:
        """Number of queries behind the figures as served."""
        return max((row["plays"] for row in self.results if row["target"] == "served"), default=0)

    def value(self, model: str, target: str = "served", metric: str = "recall") -> float | None:
        """Return one figure; None if it has no queries."""
        criteria = {"model": model, "target": target, "metric": metric}
        return next((row["value"] for row in self.results if criteria.items() <= row.items()), None)

    def difference(self, model: str, other: str) -> Entry:
        """Return the difference in recall@20 as served (`model` - `other`), with its 95 % interval, low and high.

        `model` is the first of the models that were measured.
        """
        criteria = {"model": model, "other": other, "target": "served", "metric": "recall"}
        return next(row for row in self.comparisons if criteria.items() <= row.items())

    def table(self) -> list[list[Any]]:
        """Return one row per model: name, recall@20 as served, low, high, MRR@20, and both of all next plays."""
        served_rows = [row for row in self.results if row["target"] == "served" and row["metric"] == "recall"]
        other_figures = (("served", "mrr"), ("next", "recall"), ("next", "mrr"))
        return [
            [
                row["model"],
                row["value"],
                row["low"],
                row["high"],
                *(self.value(row["model"], target, metric) for target, metric in other_figures),
            ]
            for row in sorted(served_rows, key=lambda row: -row["value"])
        ]

    def summary(self, model: str, shown: str) -> dict[str, Any]:
        """Return the verdict, the number of queries and the figures at 20 of `model`, for the manifest of a release.

        `shown` is the name of the model in the verdict.
        """
        entries = {"results": self.results, "comparisons": self.comparisons}
        if shown != model:
            entries = {"results": [{**row, "model": shown} for row in self.results if row["model"] == model]}
        target_by_prefix = {"served_": "served", "": "next"}
        return {
            "verdict": verdict(entries, shown),
            "queries": self.queries,
            "figures": {
                f"{prefix}{metric}@{USUAL_K}": value
                for prefix, target in target_by_prefix.items()
                for metric in ("recall", "mrr")
                if (value := self.value(model, target, metric)) is not None
            },
        }

    def _repr_html_(self) -> str:
        headers = ("model", "served recall@20", "low", "high", "MRR@20", "all recall@20", "MRR@20")
        return html_table(f"Validation, {self.queries:,} queries as served", headers, self.table())

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"queries": self.queries, "results": self.results, "comparisons": self.comparisons}


def measure_quality(
    dataset: Dataset,
    models: Sequence[BaseRecommender],
    *,
    split: Split,
    song_plays: np.ndarray,
    checking_users: bool = False,
    left_out: np.ndarray | None = None,
) -> Quality:
    """Measure recall@20 and MRR@20 of models on the test range of a split, which none of them has seen.

    The models must have different names. `song_plays`, int (N,), are the plays of each song before the range; a song
    without plays is a miss for every model, except one to which it was added. With `checking_users` only the users
    held out of the training of rankers are evaluated, and without the users `left_out`, object (U,), of whose range a
    model has seen plays. About 10,000 queries are answered. Needs a running cluster.
    """
    queries = QUERIES * HELD_OUT if checking_users else QUERIES  # drawn from all users
    config = EvaluateConfig(ks=(USUAL_K,), queries=queries, bootstrap_samples=SAMPLES, offsets=0, max_curve_users=0)
    evaluator = Evaluator(
        models,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=0.0,
        chosen_users=partial(_are_chosen, checking_users=checking_users, left_out=left_out),
    )
    metric_sums = evaluate_buckets(dataset.workspace, evaluator, dataset.manifest.buckets, SHARED)
    metrics = Statistics(metric_sums, models, config)
    results = [row for row in metrics.results(TARGETS) if row["users"] == "all" and row["metric"] in ("recall", "mrr")]
    comparisons = [row for row in metrics.comparisons(models[0].name) if row["target"] in TARGETS]
    return Quality(results=results, comparisons=comparisons)


def _are_chosen(user_ids: np.ndarray, *, checking_users: bool, left_out: np.ndarray | None) -> np.ndarray:
    """bool (U,): the users who are evaluated; the arguments are those of `measure_quality`."""
    is_evaluated = checks_rankers(user_ids) if checking_users else np.ones(len(user_ids), dtype=bool)
    return is_evaluated if left_out is None else is_evaluated & ~np.isin(user_ids, left_out)


GUESSED = ("format", "columns", "timezone")  # settings of an import that fit takes, too, and otherwise guesses
SECTIONS = ("import", "embed", "train", "retrieval", "rank", "taste", "index")

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The result of `fit`."""

    read_as: str  # the format and columns of the files, in words
    last_import: Mapping[str, Any]  # result of `ImportSummary.to_mapping`; empty if no files were read
    outcomes: list[Outcome]
    release: str  # id of the release
    split: Split | None  # models were chosen on its validation range; None if there are too few plays
    quality: Quality | None  # quality on that range, of models that have not seen it
    user: str  # id of an example user
    answer: Answer  # the songs recommended to this user

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
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

    `settings` are the settings of the stages, section -> name -> value, as in a pipeline file; `config` overrides those
    of the import. The default settings of `embed` and `train` depend on the plays. Stages whose inputs and settings
    have not changed are skipped, unless `force` is true. `on_stage` is called after each stage, `on_note` with texts
    about the settings that were guessed, the rows that were rejected and the plays that were used for validation.

    The quality is that of networks, retrieval and rankers that have not seen the validation range, on queries of users
    who were held out of the training of the rankers. Raises `InputError` for files that cannot be read, for unknown
    settings, if the workspace holds other plays, and if plays were appended since the import and the files have
    changed; `TooManyRejectedError` if more rows are rejected than `max_rejected` allows.
    """
    require_one_faiss()  # before any work
    sections = _checked_sections(settings or {})
    if config.epochs is not None:
        sections["train"]["epochs"] = config.epochs
    for name, value in (("max_rejected", config.max_rejected), ("user", config.user)):
        if value is not None:
            sections["import"][name] = value
    stored_values = {name: sections["import"].pop(name) for name in GUESSED if name in sections["import"]}
    stored = from_mapping(FitConfig, {"paths": config.paths, **stored_values}, "settings [import]")
    import_config = guess_import(
        config.paths,
        format_name=config.format or stored.format,
        columns=stored.columns | config.columns,
        user=sections["import"].get("user", ""),
        timezone=config.timezone or stored.timezone or "UTC",
        on_note=on_note,
    )
    import_config = import_config.replace(**sections["import"])
    on_note(f"Reading as {describe_import(import_config)}")
    with ray_cluster():
        stages = Stages(workspace, force=force, on_stage=on_stage, on_note=on_note)
        stages.run("import", import_config)
        stages.hold_back()
        dataset = Dataset(workspace)
        configs = stage_configs(dataset, sections)
        fit_models(stages, configs)
        index = configs["index"]
        assert isinstance(index, IndexConfig)
        quality = _quality(dataset, stages, index) if stages.split is not None else None
        if quality is not None:
            model_name = "two-step" if "rank" in stages.artifact_ids else "taste"
            stages.release_metrics = {VALIDATION: quality.summary(model_name, model_name)}
        for name in ("taste", "index", "release"):
            stages.run(name, configs[name])
    release = artifacts.load_manifest(workspace, "releases", stages.artifact_ids["release"])
    user, example = example_answer(workspace, default_parts(workspace))
    return FitResult(
        read_as=describe_import(import_config),
        last_import=dataset.manifest.last_import,
        outcomes=stages.outcomes,
        release=release.id,
        split=stages.split,
        quality=quality,
        user=user,
        answer=example,
    )


def fit_models(stages: Stages, configs: Mapping[str, Settings]) -> None:
    """Run the stages embed, train and songs, and with a split also retrieval and rank."""
    stages.run("embed", configs["embed"])
    stages.run("train", configs["train"])
    stages.run("songs")  # before rank, so that rankers learn to rank new songs
    for name in RANKING:
        if stages.split is None:
            stages.leave_out(name, NO_RANGE_REASON)
        else:
            stages.run(name, configs[name])


def stage_configs(dataset: Dataset, sections: Sections) -> dict[str, Settings]:
    """Return stage -> config of all stages after the import; the defaults of embed and train depend on the data set."""
    defaults = {
        "embed": {"session_gap_minutes": session_gap(dataset)},
        "train": train_defaults(dataset.manifest),
    }
    return {
        name: from_mapping(CONFIGS[name], {**defaults.get(name, {}), **sections.get(name, {})}, f"settings [{name}]")
        for name in (*SECTIONS[1:], "release")
    }


# docs/training.md, "What fit chooses by itself", gives the reasons for these values.
STEPS_PER_EPOCH = 40
SMALLEST_BATCH = 4
PLAYS_WITHOUT_WORKERS = 2_000_000  # starting Ray Train's workers takes longer than a short training
SESSION_MINUTES = 30.0
WHOLE_HISTORY_MINUTES = 1e9
IN_SESSIONS = 0.5  # if a smaller share of the plays is in such sessions, each history is one session
SAMPLED_PLAYS = 1_000_000


def session_gap(dataset: Dataset) -> float:
    """Return the pause that ends a session, in minutes.

    It is 30, or longer than any history if most plays have no other play of the user within 30 minutes.
    """
    plays = close_plays = 0
    for histories in dataset.read_all():
        same_user = histories.rows[1:] == histories.rows[:-1]
        is_close = same_user & (np.diff(histories.played_at) <= SESSION_MINUTES * 60_000)
        close_plays += (
            int((np.append(is_close, False) | np.append(False, is_close)).sum()) if len(histories.rows) else 0
        )
        plays += histories.num_plays
        if plays >= SAMPLED_PLAYS:
            break
    return SESSION_MINUTES if close_plays >= IN_SESSIONS * plays else WHOLE_HISTORY_MINUTES


def train_defaults(dataset: DatasetManifest) -> dict[str, Any]:
    """Return training settings for the size of a data set: small data gets smaller batches and no Ray Train workers."""
    defaults = TrainConfig()
    window_count = dataset.users + dataset.plays // defaults.window
    batch = min(defaults.batch, max(SMALLEST_BATCH, window_count // STEPS_PER_EPOCH))
    values: dict[str, Any] = {"workers": 0} if dataset.plays <= PLAYS_WITHOUT_WORKERS else {}
    return values | ({"batch": batch} if batch < defaults.batch else {})


def selection_parts(
    dataset: Dataset, model: Manifest, retrieval: Manifest, rankers: Manifest | None, name: str
) -> ServedParts:
    """Return the parts of a recommender that have not seen the validation range."""
    return ServedParts(
        name=name,
        network=model.path(SELECTION_FOLDER),
        retrieval=retrieval.path(SELECTION_FOLDER),
        rankers=rankers.path(SELECTION_FOLDER) if rankers is not None else None,
        added=added_to(dataset, model.path(SELECTION_FOLDER)),
    )


def _quality(dataset: Dataset, stages: Stages, index: IndexConfig) -> Quality | None:
    """Measure two-step (if there are rankers), the network alone and popularity on the validation range.

    None if there are no queries.
    """
    workspace, split = dataset.workspace, stages.split
    model, retrieval = (artifacts.load_manifest(workspace, kind, stages.artifact_ids[name]) for kind, name in PARTS)
    if split is None or not workspace.exists(model.path(SELECTION_FOLDER)):
        return None
    rankers = (
        artifacts.load_manifest(workspace, "rankers", stages.artifact_ids["rank"])
        if "rank" in stages.artifact_ids
        else None
    )
    song_plays = Retrieval.load(workspace, retrieval.path(SELECTION_FOLDER)).plays.plays
    parts = [selection_parts(dataset, model, retrieval, rankers, "two-step")] if rankers else []
    parts.append(selection_parts(dataset, model, retrieval, None, "taste"))
    quality = measure_quality(
        dataset,
        [*(part.load(dataset, index) for part in parts), PopularityRecommender(song_plays)],
        split=split.validation_as_test(),
        song_plays=song_plays,
        checking_users=rankers is not None,
    )
    return quality if quality.queries else None


PARTS = (("models", "train"), ("retrieval", "retrieval"))  # kind of an artifact, and the stage that makes it


def _checked_sections(settings: Sections) -> dict[str, dict[str, Any]]:
    """Return the settings of every section. Raises `InputError` for unknown sections or settings and invalid values."""
    unknown_sections = sorted(set(settings) - set(SECTIONS))
    if unknown_sections:
        raise InputError(
            f"the settings have an unknown section {unknown_sections[0]!r}; expected one of {', '.join(SECTIONS)}"
        )
    sections = {name: section_of(settings, name, "settings") for name in SECTIONS}
    for name, section in sections.items():
        if name != "import":
            from_mapping(CONFIGS[name], section, f"settings [{name}]")
    return sections
