"""Runs all stages from one TOML file in one Ray cluster, and the demo. Completed stages are skipped."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayrec.config import Settings, from_mapping, read_toml, section_of, to_mapping
from rayrec.data.catalog import DESCRIPTIONS
from rayrec.data.dataset import Dataset
from rayrec.data.moments import ASSUMED_GAP_MS
from rayrec.data.split import (
    Split,
    SplitConfig,
    describe_training_plays,
    hold_back_validation,
    list_splits,
    no_validation_reason,
    split_dataset,
)
from rayrec.data.synthetic import GenerateConfig
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.errors import InputError, NotFoundError, TooFewQueriesError
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_results
from rayrec.importing.descriptions import unused_metadata_notes
from rayrec.importing.import_plan import ImportConfig, import_notes, plan_import
from rayrec.jobs.add_songs import add_songs
from rayrec.jobs.build_index import build_index
from rayrec.jobs.embed import embed
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.generate import generate
from rayrec.jobs.import_data import import_data
from rayrec.jobs.job_config import resolve_paths
from rayrec.jobs.rank import fit_rankers
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend.answer import Answer, RecommendConfig, answer, load_recommender
from rayrec.recommend.index import IndexConfig, require_one_faiss
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage import artifacts, releases
from rayrec.storage.artifacts import DatasetManifest, Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace


class ReleaseConfig(Settings):
    """What to do with the release of a run."""

    activate: bool = Field(True, description="Make it the live release")


CONFIGS: dict[str, type[Settings]] = {
    "import": ImportConfig,
    "generate": GenerateConfig,
    "split": SplitConfig,
    "embed": EmbedConfig,
    "train": TrainConfig,
    "retrieval": RetrievalConfig,
    "rank": RankConfig,
    "taste": TasteConfig,
    "index": IndexConfig,
    "evaluate": EvaluateConfig,
    "release": ReleaseConfig,
}
OPTIONAL = ("import", "generate", "split")  # stages that run only if the file has their section
RANKING = ("retrieval", "rank")  # stages that need a validation range
NO_RANGE_REASON = "rankers need a validation range"  # the reason why they are left out


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of one stage."""

    stage: str
    status: Literal["done", "skipped", "left out"]  # skipped: its inputs and settings had not changed
    id: str  # id of the artifact; empty if the stage was left out
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict)  # role -> id of the artifact's inputs
    figures: dict[str, Any] = field(default_factory=dict)  # figures that the stage reported when it ran
    reason: str = ""  # why the stage was left out
    trained_on: str = ""  # the plays that it was trained on, in words; empty if it does not learn from plays

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@writes("run")
def run(
    workspace: Workspace,
    source: str | Path | Mapping[str, Any],
    *,
    force: bool = False,
    on_stage: Callable[[Outcome], None] = lambda outcome: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[Outcome]:
    """Run import or generate, split, embed, train, retrieval, rank, taste, index, evaluate and release, in this order.

    `source` is a TOML file, or its content, with a section of settings for each stage. The stages import, generate and
    split run only if they have a section, evaluate only after a split, the other stages always. Without a split, the
    newest plays are held back as the validation range, and the final models use all plays. If there are too few plays
    for a validation range, retrieval and rank are left out; with too few queries to learn from, rank is left out.
    `force` recomputes completed stages. `on_stage` is called after each stage, `on_note` with texts about the rows that
    the import rejected and the plays that were used for validation.

    Raises `InputError` for unknown sections or settings, and `MissingDependencyError` without faiss, before any work
    begins; `TooManyRejectedError` if more rows are rejected than the section import allows.
    """
    require_one_faiss()
    configs = read_configs(source)
    stages = Stages(workspace, force=force, on_stage=on_stage, on_note=on_note)
    with ray_cluster():
        for name, config in configs.items():
            if name == "embed" and "split" not in configs:
                stages.hold_back()
            if name in RANKING and stages.split is None:
                stages.leave_out(name, NO_RANGE_REASON)
            elif name != "evaluate" or "split" in configs:
                stages.run(name, config)
    return stages.outcomes


def read_configs(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return stage -> config, in the order in which the stages run.

    Raises `InputError` for unknown sections or settings, and if `source` has both import and generate.
    """
    sections = dict(source) if isinstance(source, Mapping) else read_toml(source)
    source_name = "the pipeline" if isinstance(source, Mapping) else str(source)
    folder = Path() if isinstance(source, Mapping) else Path(source).parent
    unknown_sections = sorted(set(sections) - set(CONFIGS))
    if unknown_sections:
        raise InputError(
            f"{source_name} has an unknown section {unknown_sections[0]!r}; expected one of {', '.join(CONFIGS)}"
        )
    if "import" in sections and "generate" in sections:
        raise InputError(f"{source_name} has both [import] and [generate]; keep one of them")
    configs = {}
    for name, config_class in CONFIGS.items():
        if name in sections or name not in OPTIONAL:
            section = resolve_paths(section_of(sections, name, source_name), folder)
            configs[name] = from_mapping(config_class, section, f"{source_name} [{name}]")
    return configs


def _same_paths(earlier_paths: Sequence[str], new_paths: Sequence[str]) -> bool:
    return resolve_paths({"paths": list(earlier_paths)}, Path()) == resolve_paths({"paths": list(new_paths)}, Path())


class Stages:
    """Runs stages, each with the artifacts of the earlier ones as inputs. Needs a running cluster."""

    def __init__(
        self,
        workspace: Workspace,
        *,
        force: bool = False,
        on_stage: Callable[[Outcome], None] = lambda outcome: None,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`force` recomputes completed stages; `on_stage` is called after each stage, `on_note` with texts."""
        self.workspace, self.force, self.on_stage, self.on_note = workspace, force, on_stage, on_note
        self.split: Split | None = None  # the split of the stages that follow
        self.start: str | None = None  # id of the model that `train` starts from
        self.artifact_ids: dict[str, str] = {}  # stage -> id of its artifact
        self.release_metrics: dict[str, Any] = {}  # kept in the manifest of the release
        self.outcomes: list[Outcome] = []
        if artifacts.ids_of_other_versions(workspace, DESCRIPTIONS):
            on_note(
                "The song metadata was stored by another version of rayrec and is not used; run `rayrec describe` with "
                "its file, and then this command again"
            )

    def hold_back(self) -> None:
        """Hold back the newest plays as the validation range of the following stages, if there are enough of them.

        These stages choose models on this range and then fit them on all plays.
        """
        dataset = Dataset(self.workspace)
        self.split = hold_back_validation(dataset)
        if self.split is None:
            self.on_note(
                f"{no_validation_reason(dataset)}: training runs the maximum number of epochs, quality is not "
                "measured, and no rankers are trained"
            )
        else:
            self.on_note(f"Validation range: {self.split.validation_range}; the final models use all plays")

    def run(self, name: str, config: Settings | None = None) -> Outcome:
        """Run a stage; songs has no config. The stage rank is left out if it has too few queries to learn from."""
        started = time.monotonic()
        existing_ids = self._existing_ids(name)
        try:
            artifact: Manifest | DatasetManifest | Split = getattr(self, f"_{name}")(config)
        except TooFewQueriesError as error:
            return self.leave_out(name, str(error).partition("; ")[0], round(time.monotonic() - started, 2))
        self.artifact_ids[name] = artifact.id
        return self._record(
            Outcome(
                stage=name,
                status="skipped" if artifact.id in existing_ids and not self.force else "done",
                id=artifact.id,
                seconds=round(time.monotonic() - started, 2),
                inputs=_inputs_of(artifact),
                figures=_metrics_of(artifact),
                trained_on=self._trained_on(artifact),
            )
        )

    def _trained_on(self, artifact: Manifest | DatasetManifest | Split) -> str:
        if isinstance(artifact, Manifest) and artifact.kind in artifacts.FITTED:
            return describe_training_plays(self.workspace, artifact)
        return ""

    def leave_out(self, name: str, reason: str, seconds: float = 0.0) -> Outcome:
        """Record that a stage is not run, and why."""
        return self._record(Outcome(stage=name, status="left out", id="", seconds=seconds, reason=reason))

    def _record(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        self.on_stage(outcome)
        return outcome

    def _existing_ids(self, name: str) -> set[str]:
        if name in ("import", "generate"):
            dataset = self._dataset()
            return {dataset.id} if dataset else set()
        if name == "split":
            return {split.id for split in list_splits(self.workspace)}
        return {item.id for item in artifacts.listing(self.workspace, KINDS[name])}

    def _import(self, config: ImportConfig) -> DatasetManifest:
        # Changed files are imported again. Other data, also appended plays, are replaced only with `force`.
        dataset = self._dataset()
        earlier_import: Any = dataset.config.get(config.produces) if dataset else None
        is_changed = isinstance(earlier_import, dict) and _same_paths(earlier_import["paths"], config.paths)
        is_changed = is_changed and earlier_import["plan"] != plan_import(config).id
        is_changed = is_changed and not (config.produces == "plays" and dataset is not None and dataset.appended)
        new_manifest = import_data(self.workspace, config, repeat=self.force or is_changed)
        metadata_notes = unused_metadata_notes(Dataset(self.workspace), "run this command again")
        for message in [*import_notes(new_manifest.last_import), *metadata_notes]:
            self.on_note(message)
        return new_manifest

    def _generate(self, config: GenerateConfig) -> DatasetManifest:
        dataset = self._dataset()
        is_generated = dataset is not None and dataset.source == "generated"
        if dataset and is_generated and dataset.config == to_mapping(config) and not self.force:
            return dataset
        return generate(self.workspace, config, repeat=self.force or is_generated)

    def _dataset(self) -> DatasetManifest | None:
        try:
            return Dataset(self.workspace).manifest
        except NotFoundError:
            return None

    def _split(self, config: SplitConfig) -> Split:
        self.split = split_dataset(self.workspace, config)
        return self.split

    def _embed(self, config: EmbedConfig) -> Manifest:
        return embed(self.workspace, config, split=self.split, repeat=self.force)

    def _train(self, config: TrainConfig) -> Manifest:
        return train(
            self.workspace,
            config,
            songs_id=self.artifact_ids.get("embed"),
            split=self.split,
            from_id=self.start,
            unfinished="resume" if config.workers else "restart",
            repeat=self.force,
        )

    def _songs(self, _config: None) -> Manifest:
        return add_songs(self.workspace, model_id=self.artifact_ids["train"], repeat=self.force)

    def _retrieval(self, config: RetrievalConfig) -> Manifest:
        return fit_retrieval(self.workspace, config, split=self.split, repeat=self.force)

    def _rank(self, config: RankConfig) -> Manifest:
        return fit_rankers(
            self.workspace,
            config,
            model_id=self.artifact_ids["train"],
            retrieval_id=self.artifact_ids["retrieval"],
            repeat=self.force,
        )

    def _taste(self, config: TasteConfig) -> Manifest:
        return compute_tastes(self.workspace, config, model_id=self.artifact_ids["train"], repeat=self.force)

    def _index(self, config: IndexConfig) -> Manifest:
        return build_index(self.workspace, config, model_id=self.artifact_ids["train"], repeat=self.force)

    def _evaluate(self, config: EvaluateConfig) -> Manifest:
        if self.split is None:
            raise AssertionError("evaluate runs after a split only")
        return evaluate(
            self.workspace, config, split=self.split, model_id=self.artifact_ids["train"], repeat=self.force
        )

    def _release(self, config: ReleaseConfig) -> Manifest:
        return releases.create_release(
            self.workspace,
            model_id=self.artifact_ids["train"],
            tastes_id=self.artifact_ids["taste"],
            index_id=self.artifact_ids["index"],
            rankers_id=self.artifact_ids.get("rank"),
            retrieval_id=self.artifact_ids.get("retrieval"),
            activate=config.activate,
            metrics=self.release_metrics,
        )


KINDS = {
    "embed": "songs",
    "train": "models",
    "songs": "added_songs",
    "retrieval": "retrieval",
    "rank": "rankers",
    "taste": "tastes",
    "index": "indexes",
    "evaluate": "reports",
    "release": "releases",
}


def _inputs_of(artifact: Manifest | DatasetManifest | Split) -> dict[str, str]:
    """Return role -> id of the inputs of an artifact; empty for a data set, which is made from files or a seed."""
    if isinstance(artifact, Split):
        return {"dataset": artifact.dataset}
    return artifact.inputs if isinstance(artifact, Manifest) else {}


def _metrics_of(artifact: Manifest | DatasetManifest | Split) -> dict[str, Any]:
    if isinstance(artifact, Manifest):
        return artifact.metrics
    if isinstance(artifact, DatasetManifest):
        counts = {"plays": artifact.plays, "users": artifact.users, "songs": artifact.songs}
        return {**counts, "rejected": sum(artifact.rejected.values())}
    return artifact.figures()


# The data is small, so that training takes about a minute on two cores. There are few songs, so that each is played
# often enough for the network to learn which songs follow it in which context.
DEMO_PIPELINE: dict[str, dict[str, Any]] = {
    "generate": {
        **{"users": 3_000, "songs": 400, "artists": 50, "genres": 8, "plays": 60.0, "buckets": 4},
        **{"follow": 0.5, "zipf": 1.3},
    },
    "split": {"test_days": 20.0, "validation_days": 7.0},
    "embed": {"dim": 32, "epochs": 10},
    "train": {
        **{"hidden_dim": 96, "negatives": 256, "batch": 16, "learning_rate": 0.005, "epochs": 10},
        "workers": 0,  # in this process: starting Ray Train's workers takes half as long as the training
    },
    "retrieval": {},
    "rank": {},
    "taste": {},
    "index": {},
    "evaluate": {"bootstrap_samples": 200, "max_curve_users": 500},
    "release": {},
}
EXAMPLE_SONGS = 5
MIN_PLAYS = 30  # plays of the example user, if any user has that many


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The results of the demo."""

    outcomes: list[Outcome]
    evaluation: dict[str, Any]  # result of `read_results`
    report: str  # path or URI of report.html
    user: str
    answer: Answer

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "stages": [outcome.to_mapping() for outcome in self.outcomes],
            "default": self.evaluation["default"],
            "results": self.evaluation["results"],
            "report": self.report,
            "user": self.user,
            **self.answer.to_mapping(),
        }


@writes("demo")
def demo(
    workspace: Workspace, *, force: bool = False, on_stage: Callable[[Outcome], None] = lambda outcome: None
) -> Demo:
    """Generate plays, run every stage, and recommend songs to one user at a moment three minutes after the last play.

    If the workspace already holds the demo, the stages are skipped, as in `run`: the plays come from a seed, so a new
    run would give the same figures. `force` recomputes them.
    Raises `InputError` if the workspace holds other data, which is never replaced, and `MissingDependencyError` without
    faiss.
    """
    _require_demo_workspace(workspace)
    outcomes = run(workspace, DEMO_PIPELINE, force=force, on_stage=on_stage)
    artifact_ids = {outcome.stage: outcome.id for outcome in outcomes}
    user, example = example_answer(workspace, releases.default_parts(workspace, artifact_ids["train"]), k=10)
    report = artifacts.load_manifest(workspace, "reports", artifact_ids["evaluate"])
    return Demo(
        outcomes=outcomes,
        evaluation=read_results(workspace, report),
        report=workspace.uri_of(report.path("report.html")),
        user=user,
        answer=example,
    )


def _require_demo_workspace(workspace: Workspace) -> None:
    try:
        manifest = Dataset(workspace).manifest
    except NotFoundError:
        return
    if manifest.source != "generated" or manifest.config != to_mapping(GenerateConfig(**DEMO_PIPELINE["generate"])):
        raise InputError(
            f"workspace {workspace.uri} holds another data set ({manifest.source}, {manifest.plays:,} plays); "
            "run the demo in its own workspace: rayrec --workspace ./demo demo"
        )


def example_answer(workspace: Workspace, parts: Mapping[str, str], k: int = EXAMPLE_SONGS) -> tuple[str, Answer]:
    """Return an example user, and the songs recommended 3 minutes after the last play; `parts` are as in a release."""
    dataset = Dataset(workspace)
    user, last_play = _example_user(dataset)
    recommender = load_recommender(workspace, dataset, parts)
    at = last_play + ASSUMED_GAP_MS
    return user, answer(dataset, recommender, RecommendConfig(k=k), parts=parts, at=at, user=user)


def _example_user(dataset: Dataset) -> tuple[str, int]:
    """Return the first user with `MIN_PLAYS` plays, else the one with most, and the time of the last play (ms UTC)."""
    most_plays, example = 0, ("", 0)
    for batch in dataset.read_all():
        if not len(batch):
            continue
        enough_rows = (batch.lengths >= MIN_PLAYS).nonzero()[0]
        row = int(enough_rows[0]) if len(enough_rows) else int(batch.lengths.argmax())
        if batch.lengths[row] > most_plays:
            most_plays = int(batch.lengths[row])
            example = str(batch.user_ids[row]), int(batch.played_at[batch.offsets[row + 1] - 1])
        if len(enough_rows):
            break
    return example
