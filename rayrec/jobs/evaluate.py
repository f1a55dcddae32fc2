"""Evaluate networks and baselines: on the test range by bucket of users, on given prefixes by piece of their file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayrec.config import Settings, changed_settings, to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split, fit_range, require_split_of
from rayrec.display import progress
from rayrec.embeddings.vectors import FINAL, SELECTION, SongVectors, check_health, directions
from rayrec.embeddings.word2vec import UNCUT, EmbedConfig
from rayrec.errors import InputError, MismatchError
from rayrec.evaluation.accumulator import VIEWS, CellRange, MetricAccumulator, cell_ranges
from rayrec.evaluation.evaluator import (
    Evaluator,
    EvaluatorFiles,
    PrefixEvaluator,
    PrefixFile,
    evaluator_files,
    read_prefixes,
)
from rayrec.evaluation.plots import NAMED, Plot, cosine_plot, most_played, song_map, training_plot
from rayrec.evaluation.protocol import COUNTED_BUCKETS, EvaluateConfig, plays_to_predict
from rayrec.evaluation.ranks import BASELINE_CHOICES, tune_baseline
from rayrec.evaluation.report import CURVES, SONG_EMBEDDINGS, settings_text, summary, write_report
from rayrec.evaluation.results import Figures, figures_of, settings_of
from rayrec.importing.readers.reader import Unit, byte_ranges, find_files
from rayrec.jobs.build_index import index_network
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.rank import fit_ablations
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.model.checkpoint import EPOCHS
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.base import BaseRecommender
from rayrec.recommend.baselines import BASELINES, PopularityRecommender, fit_baselines, make_selection, needs_vectors
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage.artifacts import Manifest, fingerprint, load_manifest, new_id, newest, noun, publish, reuse
from rayrec.storage.locking import writes
from rayrec.storage.releases import parts_of
from rayrec.storage.workspace import Workspace, artifact_dir

KIND = "reports"
USERS_PER_BATCH = 2_000
EXAMPLES, EXAMPLE_PLAYS, EXAMPLE_SONGS = 3, 5, 5  # users shown, with their last plays and recommended songs
PREFIXES_AT_ONCE = 1 << 18  # bytes of a file of prefixes that one task reads
ABOUT_PREFIXES = "The target of each line of the file is predicted from the songs of its prefix; there are no times."


@writes("evaluate")
def evaluate(
    workspace: Workspace,
    config: EvaluateConfig,
    *,
    split: Split | None,
    model_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write reports/<id>/ about the models of `config` on the test range of `split`.

    Without names these are the network `model_id` (None: the one trained last) and every baseline. Baselines are
    fitted on what came before the test range, with the song embeddings that the network was trained from, and tuned
    on the validation range; where it was trained without any, those that need them are left out. With
    `config.ablation` the default model is evaluated without each of its parts as well, by rankers that are trained for
    it. The manifest's metrics hold default, protocol, what `summary` gives, users, plays and seconds; the figures of
    `figures_of`, examples and the health of the song embeddings are in results.json, see `read_figures`.

    Raises `InputError` without a split or for one without a test range, for an unknown model, for an ablation without
    two-step among the models, and for a test range without queries, `NotFoundError` where there is no network or no
    song embeddings, `MismatchError` for those of another split.
    """
    if split is None or not split.has_test:
        raise InputError("No split to evaluate on; run `rayrec split`, `rayrec embed` and `rayrec train` first")
    started = time.monotonic()
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    compared = choose_models(workspace, dataset, config, split, model_id)
    settings = to_mapping(config)
    report_id, complete = new_id(workspace, KIND, fingerprint("evaluate", settings, compared.inputs), repeat=repeat)
    if complete:
        return reuse(workspace, KIND, report_id)
    run = f"{artifact_dir(KIND, report_id)}/run"
    with ray_cluster():
        without = fit_ablations(dataset, rankers_of(workspace, compared), run) if config.ablation else {}
        evaluator = make_evaluator(workspace, dataset, config, split, compared, without)
        sums = evaluate_buckets(workspace, evaluator, dataset.manifest.buckets, f"{run}/evaluator")
    workspace.delete(run)
    users, plays = sums.users[VIEWS.index("next")].sum(), sums.queries[:, VIEWS.index("next")].sum()
    if not users:
        raise InputError(
            f"none of {split.test_range} has an earlier play by the same user, so there is nothing to predict; "
            "run `rayrec split` with more test days or a larger last fraction"
        )
    figures = figures_of(sums, evaluator, compared.default)
    figures["examples"] = examples_of(dataset, evaluator, compared.default)
    figures[SONG_EMBEDDINGS] = health_of(dataset, compared, evaluator.song_plays)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=settings,
        inputs=compared.inputs,
        seed=config.seed,
        metrics={
            "default": compared.default,
            "protocol": split.protocol,
            **({"warning": compared.warning} if compared.warning else {}),
            **summary(figures, compared.default, config),
            "users": int(users),
            "plays": int(plays),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    about = {"protocol": split.protocol, "test range": split.test_range, **compared.inputs}
    about |= settings_of_parts(workspace, compared, config)
    about |= {"warning": compared.warning} if compared.warning else {}
    plots = [*filter(None, [cosine_plot(figures[CURVES])]), *plots_of(dataset, compared, evaluator.song_plays)]
    names = write_report(
        workspace, manifest.folder, figures, default=compared.default, about=about, plots=plots, config=config
    )
    return publish(workspace, manifest, names)


def settings_of_parts(workspace: Workspace, compared: ComparedModels, config: EvaluateConfig) -> dict[str, str]:
    """For each part of the models, and for the evaluation: the settings that are not the defaults, in a line."""
    parts: dict[str, tuple[type[Settings], Manifest]] = {}
    if compared.songs:
        parts["the song embeddings"] = EmbedConfig, compared.songs
    networks = {"the network": compared.model} if compared.model else {}
    parts |= {name: (TrainConfig, network) for name, network in {**networks, **compared.others}.items()}
    for kind, settings_class in (("retrieval", RetrievalConfig), ("rankers", RankConfig)):
        if kind in compared.inputs:
            part = load_manifest(workspace, kind, compared.inputs[kind])
            parts[f"the {noun(kind)}"] = settings_class, part
    texts = {name: settings_text(changed_settings(cls, part.config)) for name, (cls, part) in parts.items()}
    texts["the evaluation"] = settings_text(changed_settings(EvaluateConfig, to_mapping(config)))
    return {f"settings of {name}": text for name, text in texts.items()}


def plots_of(dataset: Dataset, compared: ComparedModels, song_plays: np.ndarray) -> list[Plot]:
    """The training of the network, and a map of the song embeddings that it scores, or of those it was made from."""
    workspace, plots = dataset.workspace, []
    if compared.model and EPOCHS in compared.model.files:
        lines = workspace.read_bytes(compared.model.path(EPOCHS)).splitlines()
        plots.append(training_plot([json.loads(line) for line in lines]))
    for path in [*vector_paths(compared).values()][-1:]:
        vectors = np.asarray(workspace.read_array(path))
        known = song_plays[: len(vectors)]
        titles = dataset.catalog().titles(most_played(vectors, known, NAMED))
        plots.append(song_map(vectors, known, titles))
    return [plot for plot in plots if plot is not None]


def examples_of(dataset: Dataset, evaluator: Evaluator, default: str) -> list[dict[str, Any]]:
    """What the default model recommends to three users, as served, before their first play of the test range.

    Each has last_plays and songs, by title.
    """
    named = [recommender for recommender in evaluator.recommenders if recommender.name == default]
    catalog, examples = dataset.catalog(), []
    for histories in dataset.read_all() if named else ():
        plays = plays_to_predict(histories, evaluator.split)
        rows, first = np.unique(histories.rows[plays], return_index=True)
        for row, play in zip(rows.tolist(), plays[first].tolist(), strict=True):
            plays_before = play - histories.offsets[row]
            if plays_before < EXAMPLE_PLAYS:
                continue
            history = histories.take(np.array([row])).span(0, plays_before)
            songs, _ = named[0].recommend_one(
                history, int(histories.played_at[play]), EXAMPLE_SONGS, exclude_heard=True
            )
            last = history.songs[-EXAMPLE_PLAYS:]
            examples.append({"last_plays": catalog.titles(last), "songs": catalog.titles(songs)})
            if len(examples) == EXAMPLES:
                return examples
    return examples


def health_of(dataset: Dataset, compared: ComparedModels, song_plays: np.ndarray) -> list[dict[str, Any]]:
    """The health of the song vectors behind the models: an entry for those embedded, one for the network's.

    Each has vectors (songs or models), id, dim, directions and the figures of `check_health`; `song_plays`,
    int (N,), choose the most played songs.
    """
    entries = []
    for role, path in vector_paths(compared).items():
        vectors = SongVectors(np.asarray(dataset.workspace.read_array(path)))
        figures = check_health(vectors, song_plays[: len(vectors)], dataset.catalog())
        del figures["warning"]  # its advice is for word2vec; the page tells the limit
        about = {"vectors": role, "id": compared.inputs[role], "dim": vectors.dim}
        entries.append({**about, "directions": directions(vectors), **figures})
    return entries


def vector_paths(compared: ComparedModels) -> dict[str, str]:
    """Role -> path of the song vectors, where they are there: those embedded, then those the network answers with."""
    from rayrec.model.checkpoint import SONG_VECTORS as TRAINED  # brings torch: only once needed

    paths = {"songs": compared.songs.path(FINAL)} if compared.songs else {}
    return {**paths, "models": compared.model.path(TRAINED)} if compared.model else paths


def make_evaluator(
    workspace: Workspace,
    dataset: Dataset,
    config: EvaluateConfig,
    split: Split,
    compared: ComparedModels,
    without: Mapping[str, str] | None = None,
) -> Evaluator:
    """An evaluator of the models of `compared`, and of the default one without parts (part -> folder of rankers)."""
    recommenders, song_plays = make_recommenders(workspace, dataset, compared, split, without)
    return Evaluator(
        recommenders,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=min(1.0, config.max_curve_users / max(1, dataset.manifest.users)),
        contexts=dataset.manifest.contexts,
    )


def evaluate_buckets(workspace: Workspace, evaluator: Evaluator, buckets: int, folder: str) -> MetricAccumulator:
    """The sums of all users, the buckets spread over the cluster.

    All workers of a node map the evaluator's arrays from files; `folder` holds those that no artifact does meanwhile.
    """
    sums = evaluator.empty()
    ranges = cell_ranges(buckets, evaluator.cells_at_once)
    units = buckets * len(ranges)
    with ray_cluster(), progress("evaluate", units) as bar:
        evaluator.query_share = query_share(workspace, evaluator, buckets)
        with evaluator_files(workspace, folder, evaluator) as stored:
            arguments = {"workspace": workspace, "stored": stored, "ranges": ranges}
            for unit, part in run_buckets(BucketEvaluator, range(units), arguments=arguments):
                sums.add(part, first_cell=unit * part.cells)
                bar.advance()
    return sums


def query_share(workspace: Workspace, evaluator: Evaluator, buckets: int) -> float:
    """The share of the test range's queries that leaves about `queries` of them, from the counts of a few buckets."""
    if not evaluator.config.queries:
        return 1.0
    counted = np.unique(np.linspace(0, buckets - 1, min(buckets, COUNTED_BUCKETS)).astype(int)).tolist()
    arguments = {"workspace": workspace, "split": evaluator.split}
    counts = sum(run_buckets(QueryCounter, counted, arguments=arguments))
    return float(min(1.0, evaluator.config.queries / max(1.0, counts * buckets / len(counted))))


class QueryCounter:
    """Counts the plays to predict of one bucket at a time."""

    def __init__(self, workspace: Workspace, split: Split) -> None:
        self.dataset, self.split = Dataset(workspace), split

    def __call__(self, bucket: int) -> int:
        """The plays to predict of a bucket's users."""
        batches = self.dataset.read_bucket(int(bucket), USERS_PER_BATCH)
        return sum(len(plays_to_predict(histories, self.split)) for histories in batches)


class BucketEvaluator:
    """Evaluates the users of some bootstrap cells of one bucket at a time."""

    def __init__(self, workspace: Workspace, stored: EvaluatorFiles[Evaluator], ranges: list[CellRange]) -> None:
        self.dataset, self.evaluator, self.ranges = Dataset(workspace), stored.load(), ranges

    def __call__(self, unit: int) -> tuple[int, MetricAccumulator]:
        """The unit and the sums of its users: a bucket's, divided by ranges of cells."""
        bucket, part = divmod(int(unit), len(self.ranges))
        cells = self.ranges[part]
        sums = self.evaluator.empty(cells.count)
        for histories in self.dataset.read_bucket(bucket, USERS_PER_BATCH):
            sums.add(self.evaluator(histories, cells))
        return int(unit), sums


@writes("evaluate --prefixes")
def evaluate_prefixes(
    workspace: Workspace,
    config: EvaluateConfig,
    file: PrefixFile,
    *,
    split: Split | None = None,
    model_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write reports/<id>/ about the models of `config` on the pairs of a file.

    Models are those made for `split`, or without one those made of all plays, and baselines are
    fitted likewise. The manifest's metrics hold default, what `summary` gives, pairs, unknown_targets (misses, all
    of them), unknown_items and seconds; results (users all, targets served and next), comparisons, calibration and the
    health of the song embeddings are in results.json, see `read_figures`.

    Raises `InputError` for a file without pairs or with a line that cannot be read, else as `evaluate`.
    """
    started = time.monotonic()
    if config.queries:
        raise InputError("--queries draws from the test range of a split; the pairs of a file are all evaluated")
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    (prefix_file,) = find_files([file.path], ["*"])[:1]
    compared = choose_models(workspace, dataset, config, split, model_id)
    settings = {
        **to_mapping(config),
        "prefixes": {**to_mapping(file), "size": prefix_file.size, "changed": prefix_file.changed},
    }
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate prefixes", settings, compared.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    recommenders, song_plays = make_recommenders(workspace, dataset, compared, split)
    fitted_before = fit_range(split).before
    begin = dataset.manifest.last_play + 1 if fitted_before is None else fitted_before
    evaluator = PrefixEvaluator(
        recommenders,
        song_plays=song_plays,
        config=config,
        begin=begin if dataset.manifest.times == "real" else 0,
    )
    units = byte_ranges(prefix_file.source, prefix_file.size, PREFIXES_AT_ONCE)
    sums, counts = evaluate_pairs(workspace, evaluator, file, units, f"{artifact_dir(KIND, report_id)}/run")
    if not counts[0]:
        raise InputError(f"{file.path} has no pairs; expected lines of songs, a tab and the next song")
    computed = Figures(sums, recommenders, config)
    results = [entry for entry in computed.results(["served", "next"]) if entry["users"] == "all"]
    figures = {
        "settings": settings_of(recommenders),
        "results": [{name: value for name, value in entry.items() if name != "users_count"} for entry in results],
        "comparisons": computed.comparisons(compared.default),
        "calibration": computed.calibration(),
        SONG_EMBEDDINGS: health_of(dataset, compared, song_plays),
    }
    pairs = dict(zip(("pairs", "unknown_targets", "unknown_items"), counts.tolist(), strict=True))
    seconds = round(time.monotonic() - started, 1)
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=settings,
        inputs=compared.inputs,
        seed=config.seed,
        metrics={
            "default": compared.default,
            "protocol": "prefixes",
            **summary(figures, compared.default, config),
            **pairs,
            "seconds": seconds,
        },
    )
    about = {"protocol": "prefixes", "file": file.path, **{name: f"{count:,}" for name, count in pairs.items()}}
    about |= compared.inputs | settings_of_parts(workspace, compared, config)
    names = write_report(
        workspace,
        manifest.folder,
        figures,
        default=compared.default,
        about=about,
        described=ABOUT_PREFIXES,
        config=config,
        drawn="pairs",
    )
    return publish(workspace, manifest, names)


def evaluate_pairs(
    workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit], folder: str
) -> tuple[MetricAccumulator, np.ndarray]:
    """The sums and the counts, as in `Prefixes`, of all units, spread over the cluster.

    `folder` is as in `evaluate_buckets`.
    """
    sums, counts = evaluator.empty(), np.zeros(3, dtype=np.int64)
    ranges = cell_ranges(len(units), evaluator.cells_at_once)
    tasks = len(units) * len(ranges)
    with ray_cluster(), progress("evaluate", tasks) as bar, evaluator_files(workspace, folder, evaluator) as stored:
        arguments = {"workspace": workspace, "stored": stored, "file": file, "units": list(units), "ranges": ranges}
        for task, part, pairs in run_buckets(UnitEvaluator, range(tasks), arguments=arguments):
            sums.add(part, first_cell=task * part.cells)
            counts += pairs
            bar.advance()
    return sums, counts


class UnitEvaluator:
    """Evaluates the pairs of some bootstrap cells of one unit of the file at a time."""

    def __init__(
        self,
        workspace: Workspace,
        stored: EvaluatorFiles[PrefixEvaluator],
        file: PrefixFile,
        units: Sequence[Unit],
        ranges: list[CellRange],
    ) -> None:
        self.evaluator, self.file, self.units, self.ranges = stored.load(), file, units, ranges
        self.song_ids = Dataset(workspace).catalog().table.column(columns.SONG_ID)

    def __call__(self, task: int) -> tuple[int, MetricAccumulator, np.ndarray]:
        """The task, and the sums and counts of its pairs: those that begin in a unit, divided by ranges of cells."""
        unit, part = divmod(int(task), len(self.ranges))
        cells = self.ranges[part]
        sums, counts = self.evaluator.empty(cells.count), np.zeros(3, dtype=np.int64)
        for prefixes in read_prefixes(self.units[unit], self.file, self.song_ids):
            some = prefixes.take(np.flatnonzero(cells.holds(prefixes.histories.user_ids)))
            sums.add(self.evaluator(some, cells))
            counts += some.counts
        return int(task), sums, counts


TWO_STEP, TASTE, TASTE_SHORT = "two-step", "taste", "taste-short"
NETWORKS = (TWO_STEP, TASTE, TASTE_SHORT)  # the recommenders that a models artifact may give


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """The models of an evaluation, all of one split."""

    names: tuple[str, ...]  # of the models
    default: str  # the one that `recommend` uses
    model: Manifest | None  # the network, where it is among them
    others: dict[str, Manifest]  # more networks by the name that they were given
    songs: Manifest | None  # the song vectors of the baselines, where one needs them
    inputs: dict[str, str]  # role -> id

    @property
    def warning(self) -> str | None:
        """A line about the parts that a split could not keep from the plays they are evaluated on."""
        if "split" not in self.inputs:
            return None
        parts = {"the network": self.model, **self.others, "the song embeddings": self.songs}
        uncut = [name for name, part in parts.items() if part and part.metrics.get("source") == "playlists"]
        return f"{', '.join(uncut)}: {UNCUT}" if uncut else None


def choose_models(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split | None, model_id: str | None
) -> ComparedModels:
    """The models of `config` with the artifacts they need, all made for `split` or, without one, of all plays.

    `NAME=ID` among the models is the network of another models artifact, under that name. Raises
    `InputError` for an unknown model, `NotFoundError` for an artifact that is not there, `MismatchError`
    for one of another split.
    """
    named, others = _named(workspace, config)
    if split is not None:
        require_split_of(dataset, split)
    inputs, model, songs, default = {"dataset": dataset.manifest.id}, None, None, TWO_STEP
    if split is not None:
        inputs["split"] = split.id
    if config.models is None or set(NETWORKS) & set(named):
        model = load_manifest(workspace, "models", model_id) if model_id else newest(workspace, "models")
        inputs["models"] = model.id
        parts = parts_of(workspace, model)
        default = TWO_STEP if "rankers" in parts else TASTE
        if TWO_STEP in named and default != TWO_STEP:
            raise InputError(
                f"model {model.id} has no rankers; run `rayrec retrieval` and `rayrec rank --model {model.id}` first"
            )
        inputs |= {kind: parts[kind] for kind in ("added_songs", "indexes", "retrieval", "rankers") if kind in parts}
    for network in (*([model] if model else []), *others.values()):
        require_split(network, split, dataset, "train")
    inputs |= {f"models {name}": other.id for name, other in others.items()}
    names = tuple(dict.fromkeys(named or (default, TASTE, *BASELINES)))
    trained = next((part for part in (model, *others.values()) if part is not None), None)
    songs_id = trained.inputs.get("songs") if trained else None
    if not named and songs_id is None:  # a network that was trained without song embeddings
        names = tuple(name for name in names if not needs_vectors([name]))
    if needs_vectors(names):
        songs = load_manifest(workspace, "songs", songs_id) if songs_id else newest(workspace, "songs")
        require_split(songs, split, dataset, "embed")
        inputs["songs"] = songs.id
    return ComparedModels(names=names, default=default, model=model, others=others, songs=songs, inputs=inputs)


def _named(workspace: Workspace, config: EvaluateConfig) -> tuple[list[str], dict[str, Manifest]]:
    """The names of the models wanted, and the artifacts of those given as NAME=ID."""
    names: list[str] = []
    others: dict[str, Manifest] = {}
    for spelled in config.models or ():
        name, equals, model_id = spelled.partition("=")
        if equals:
            if name in (*NETWORKS, *BASELINES, *others) or not name:
                raise InputError(f"{spelled}: name another model differently, such as r_hst={model_id}")
            others[name] = load_manifest(workspace, "models", model_id)
        elif name not in (*NETWORKS, *BASELINES):
            raise InputError(
                f"Unknown model {name!r}; expected {', '.join((*NETWORKS, *BASELINES))}, or NAME=ID for "
                "the network of another model"
            )
        names.append(name)
    return names, others


def require_split(part: Manifest, split: Split | None, dataset: Dataset, command: str) -> None:
    """Raise `MismatchError` for a part that was not made for the split, or without one not of all plays.

    Made from the data set, or from one that it descends from.
    """
    made_of, split_id = part.inputs.get("split"), split.id if split else None
    if made_of == split_id and dataset.descends_from(part.inputs.get("dataset", dataset.manifest.id)):
        return
    saw = f"was trained before the test range of split {made_of}" if made_of else "was trained on all plays"
    saw += ", including the test range" if split_id and not made_of else ""
    advice = f"run `rayrec {command} --split {split_id}` first" if split_id else f"pass --split {made_of}"
    evaluated = f"split {split_id}" if split_id else "no split"
    raise MismatchError(f"{noun(part.kind)} {part.id} {saw}, but the evaluation is of {evaluated}; {advice}")


def make_recommenders(
    workspace: Workspace,
    dataset: Dataset,
    compared: ComparedModels,
    split: Split | None,
    without: Mapping[str, str] | None = None,
) -> tuple[list[BaseRecommender], np.ndarray]:
    """Fit the baselines on what final fits may see and load the networks, in the order of the names, then ablations.

    `without` names the parts that two-step is evaluated without, each with the folder of its rankers. The settings
    of baselines are chosen on the validation range, where the split has one.

    Also float64 (N,): how often each song was played there.
    """
    vectors = np.asarray(workspace.read_array(compared.songs.path(FINAL))) if compared.songs else None
    allowed, selection = fit_range(split), None
    if split is not None and split.has_validation:
        songs = compared.songs
        early = np.asarray(workspace.read_array(songs.path(SELECTION))) if songs and SELECTION in songs.files else None
        selection = make_selection(dataset, split, early)
    fitted: dict[str, BaseRecommender] = {}
    baselines = dict.fromkeys(["popularity", *(name for name in compared.names if name in BASELINES)])
    with progress("fit baselines", len(baselines)) as bar:
        for name in baselines:
            settings = {name: tune_baseline(name, selection)} if selection and name in BASELINE_CHOICES else {}
            fitted[name] = fit_baselines([name], dataset, vectors, allowed, selection, settings)[0]
            bar.advance(note=name)
    fitted |= _networks(workspace, dataset, compared)
    popularity = fitted["popularity"]
    assert isinstance(popularity, PopularityRecommender)
    ablated = [_ablated(workspace, fitted[TWO_STEP], part, folder) for part, folder in (without or {}).items()]
    return [*(fitted[name] for name in compared.names), *ablated], popularity.plays


def _ablated(workspace: Workspace, two_step: BaseRecommender, part: str, folder: str) -> BaseRecommender:
    """Two-step without a part, by the rankers in a folder, named `without PART`."""
    from rayrec.recommend.two_step import TwoStepRecommender, load_rankers

    assert isinstance(two_step, TwoStepRecommender)
    model = two_step.without_part(part, load_rankers(workspace, folder))
    model.name, model.without = f"without {part}", part
    return model


def rankers_of(workspace: Workspace, compared: ComparedModels) -> Manifest:
    """The rankers of two-step, for an ablation. Raises `InputError` where two-step is not among the models."""
    if TWO_STEP not in compared.names:
        raise InputError(
            f"--ablation evaluates {TWO_STEP} without each of its parts, and it is not among the models; add it to "
            "--models, after `rayrec retrieval` and `rayrec rank`"
        )
    return load_manifest(workspace, "rankers", compared.inputs["rankers"])


def _networks(workspace: Workspace, dataset: Dataset, compared: ComparedModels) -> dict[str, BaseRecommender]:
    """The networks of an evaluation by name, and two-step where the model has rankers.

    Two-step searches the index that was made of the model, where there is one.
    """
    from rayrec.recommend.taste_recommender import TasteRecommender  # brings torch: only once needed
    from rayrec.recommend.two_step import load_two_step

    networks: dict[str, BaseRecommender] = {}
    for name, other in compared.others.items():
        added = parts_of(workspace, other).get("added_songs")
        networks[name] = TasteRecommender.load(workspace, other.id, added_id=added)
        networks[name].name = name
    if compared.model is None:
        return networks
    parts = compared.inputs
    network = TasteRecommender.load(workspace, parts["models"], parts.get("indexes"), parts.get("added_songs"))
    networks |= {TASTE: network, TASTE_SHORT: network.short_only()}
    if "rankers" in parts:
        network.index = network.index or index_network(dataset, network, IndexConfig())
        folders = (load_manifest(workspace, kind, parts[kind]).folder for kind in ("retrieval", "rankers"))
        real_times = dataset.manifest.times == "real"
        networks[TWO_STEP] = load_two_step(workspace, network, *folders, real_times=real_times)
    return networks
