"""The evaluate stage: compares networks and baselines, on the test range or on the pairs of a file of prefixes."""

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
from rayrec.embeddings.word2vec import PLAYLIST_WARNING, EmbedConfig
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
from rayrec.evaluation.plots import TITLED_SONGS, Plot, cosine_plot, most_played, song_map, training_plot
from rayrec.evaluation.protocol import COUNTED_BUCKETS, EvaluateConfig, plays_to_predict
from rayrec.evaluation.ranks import BASELINE_CHOICES, tune_baseline
from rayrec.evaluation.report import CURVES, SONG_EMBEDDINGS, settings_text, summary, write_report
from rayrec.evaluation.results import Statistics, settings_of, statistics_of
from rayrec.importing.readers.reader import Unit, byte_ranges, find_files
from rayrec.jobs.build_index import index_network
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.rank import fit_ablations
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.model.checkpoint import EPOCHS
from rayrec.model.train_config import SONG_VECTORS, TrainConfig
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
EXAMPLES, EXAMPLE_PLAYS, EXAMPLE_SONGS = 3, 5, 5  # users shown; last plays and songs shown per user
PREFIXES_AT_ONCE = 1 << 18  # bytes of a file of prefixes that one task reads
PREFIX_DESCRIPTION = (
    "The target of each line of the file is predicted from the songs of its prefix; there are no times."
)


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

    If `config.models` names no models, these are the network `model_id` (None: the model requested last) and every
    baseline. Baselines are fitted on the plays before the test range, with the song embeddings from which the network
    was trained, and tuned on the validation range. If the network was trained without song embeddings, baselines that
    need them are left out. With `config.ablation` two-step is also evaluated without each of its parts, with rankers
    that are trained for this. The manifest's metrics hold default, protocol, the result of `summary`, users, plays and
    seconds. The figures of `statistics_of`, the examples and the health of the song embeddings are in results.json; see
    `read_results`.

    Raises `InputError` without a split, for a split without a test range, for an unknown model, for an ablation without
    two-step among the models, and for a test range without queries; `NotFoundError` if there is no network or no song
    embeddings; `MismatchError` if they were made for another split.
    """
    if split is None or not split.has_test:
        raise InputError("No split to evaluate on; run `rayrec split`, `rayrec embed` and `rayrec train` first")
    started = time.monotonic()
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    compared_models = choose_models(workspace, dataset, config, split, model_id)
    settings = to_mapping(config)
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate", settings, compared_models.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    run_folder = f"{artifact_dir(KIND, report_id)}/run"
    with ray_cluster():
        ablation_folders = (
            fit_ablations(dataset, rankers_of(workspace, compared_models), run_folder) if config.ablation else {}
        )
        evaluator = make_evaluator(workspace, dataset, config, split, compared_models, ablation_folders)
        metric_sums = evaluate_buckets(workspace, evaluator, dataset.manifest.buckets, f"{run_folder}/evaluator")
    workspace.delete(run_folder)
    user_count = metric_sums.users[VIEWS.index("next")].sum()
    play_count = metric_sums.queries[:, VIEWS.index("next")].sum()
    if not user_count:
        raise InputError(
            f"no play of the test range ({split.test_range}) has an earlier play by the same user, so there is nothing "
            "to predict; run `rayrec split` with more --test-days or a larger --last-fraction"
        )
    results = statistics_of(metric_sums, evaluator, compared_models.default)
    results["examples"] = examples_of(dataset, evaluator, compared_models.default)
    results[SONG_EMBEDDINGS] = health_of(dataset, compared_models, evaluator.song_plays)
    plots = [*filter(None, [cosine_plot(results[CURVES])]), *plots_of(dataset, compared_models, evaluator.song_plays)]
    warning = {"warning": compared_models.warning} if compared_models.warning else {}
    return _publish_report(
        workspace,
        report_id,
        config,
        compared_models,
        results,
        settings=settings,
        protocol=split.protocol,
        metrics={
            **warning,
            "users": int(user_count),
            "plays": int(play_count),
            "seconds": round(time.monotonic() - started, 1),
        },
        about={"test range": split.test_range, **warning},
        plots=plots,
    )


def _publish_report(
    workspace: Workspace,
    report_id: str,
    config: EvaluateConfig,
    compared_models: ComparedModels,
    results: dict[str, Any],
    *,
    settings: Mapping[str, Any],
    protocol: str,
    metrics: Mapping[str, Any],
    about: Mapping[str, str],
    **report_options: Any,
) -> Manifest:
    """Write the files of a report and publish it; return its manifest.

    `settings` are those of the evaluation, `metrics` what the manifest holds after the summary, and `about` what the
    report says of its data. `report_options` are further arguments of `write_report`.
    """
    manifest = Manifest(
        kind=KIND,
        id=report_id,
        config=dict(settings),
        inputs=compared_models.inputs,
        seed=config.seed,
        metrics={
            "default": compared_models.default,
            "protocol": protocol,
            **summary(results, compared_models.default, config),
            **metrics,
        },
    )
    report_info = {"protocol": protocol, **about, **compared_models.inputs}
    report_info |= settings_of_parts(workspace, compared_models, config)
    file_names = write_report(
        workspace,
        manifest.folder,
        results,
        default=compared_models.default,
        about=report_info,
        config=config,
        **report_options,
    )
    return publish(workspace, manifest, file_names)


def settings_of_parts(workspace: Workspace, compared_models: ComparedModels, config: EvaluateConfig) -> dict[str, str]:
    """Return the settings that differ from the defaults, in one line per part of the models and for the evaluation."""
    parts: dict[str, tuple[type[Settings], Manifest]] = {}
    if compared_models.songs:
        parts["the song embeddings"] = EmbedConfig, compared_models.songs
    networks = {"the network": compared_models.model} if compared_models.model else {}
    parts |= {name: (TrainConfig, network) for name, network in {**networks, **compared_models.other_networks}.items()}
    for kind, settings_class in (("retrieval", RetrievalConfig), ("rankers", RankConfig)):
        if kind in compared_models.inputs:
            part = load_manifest(workspace, kind, compared_models.inputs[kind])
            parts[f"the {noun(kind)}"] = settings_class, part
    texts = {
        name: settings_text(changed_settings(config_class, part.config)) for name, (config_class, part) in parts.items()
    }
    texts["the evaluation"] = settings_text(changed_settings(EvaluateConfig, to_mapping(config)))
    return {f"settings of {name}": text for name, text in texts.items()}


def plots_of(dataset: Dataset, compared_models: ComparedModels, song_plays: np.ndarray) -> list[Plot]:
    """Return plots of the network's training and song embeddings; without a network, of the baselines' embeddings."""
    workspace, plots = dataset.workspace, []
    if compared_models.model and EPOCHS in compared_models.model.files:
        lines = workspace.read_bytes(compared_models.model.path(EPOCHS)).splitlines()
        plots.append(training_plot([json.loads(line) for line in lines]))
    for path in [*vector_paths(compared_models).values()][-1:]:
        vectors = np.asarray(workspace.read_array(path))
        vector_plays = song_plays[: len(vectors)]
        titles = dataset.catalog().titles(most_played(vectors, vector_plays, TITLED_SONGS))
        plots.append(song_map(vectors, vector_plays, titles))
    return [plot for plot in plots if plot is not None]


def examples_of(dataset: Dataset, evaluator: Evaluator, default: str) -> list[dict[str, Any]]:
    """Return the songs that the default model recommends to three users before their first play of the test range.

    Songs that the user has heard are left out. Each example has last_plays and songs, both as titles.
    """
    default_recommenders = [recommender for recommender in evaluator.recommenders if recommender.name == default]
    catalog, examples = dataset.catalog(), []
    for histories in dataset.read_all() if default_recommenders else ():
        plays = plays_to_predict(histories, evaluator.split)
        rows, first_indices = np.unique(histories.rows[plays], return_index=True)
        for row, play in zip(rows.tolist(), plays[first_indices].tolist(), strict=True):
            plays_before = play - histories.offsets[row]
            if plays_before < EXAMPLE_PLAYS:
                continue
            history = histories.take(np.array([row])).span(0, plays_before)
            songs, _ = default_recommenders[0].recommend_one(
                history, int(histories.played_at[play]), EXAMPLE_SONGS, exclude_heard=True
            )
            last_songs = history.songs[-EXAMPLE_PLAYS:]
            examples.append({"last_plays": catalog.titles(last_songs), "songs": catalog.titles(songs)})
            if len(examples) == EXAMPLES:
                return examples
    return examples


def health_of(dataset: Dataset, compared_models: ComparedModels, song_plays: np.ndarray) -> list[dict[str, Any]]:
    """Return the health of the song embeddings: one entry for those of the embed stage, one for the network's.

    Each entry has vectors ("songs" or "models"), id, dim, directions and the figures of `check_health` without its
    warning. `song_plays`, int (N,), are the plays by which `check_health` selects the most played songs.
    """
    entries = []
    for role, path in vector_paths(compared_models).items():
        vectors = SongVectors(np.asarray(dataset.workspace.read_array(path)))
        health = check_health(vectors, song_plays[: len(vectors)], dataset.catalog())
        del health["warning"]  # its advice is for word2vec; the report shows the limit
        source_info = {"vectors": role, "id": compared_models.inputs[role], "dim": vectors.dim}
        entries.append({**source_info, "directions": directions(vectors), **health})
    return entries


def vector_paths(compared_models: ComparedModels) -> dict[str, str]:
    """Return role -> path of the existing song embeddings: those of the embed stage, then the network's."""
    paths = {"songs": compared_models.songs.path(FINAL)} if compared_models.songs else {}
    return {**paths, "models": compared_models.model.path(SONG_VECTORS)} if compared_models.model else paths


def make_evaluator(
    workspace: Workspace,
    dataset: Dataset,
    config: EvaluateConfig,
    split: Split,
    compared_models: ComparedModels,
    ablation_folders: Mapping[str, str] | None = None,
) -> Evaluator:
    """Return an evaluator of `compared_models`, and of two-step without each part of `ablation_folders`.

    `ablation_folders` maps a part to the folder of its rankers.
    """
    recommenders, song_plays = make_recommenders(workspace, dataset, compared_models, split, ablation_folders)
    return Evaluator(
        recommenders,
        split=split,
        song_plays=song_plays,
        config=config,
        curve_share=min(1.0, config.max_curve_users / max(1, dataset.manifest.users)),
        contexts=dataset.manifest.contexts,
    )


def evaluate_buckets(workspace: Workspace, evaluator: Evaluator, buckets: int, folder: str) -> MetricAccumulator:
    """Return the sums over all users; the buckets are spread over the cluster.

    All workers of a node memory-map the evaluator's arrays. During the evaluation `folder` holds the arrays that no
    artifact holds.
    """
    metric_sums = evaluator.empty()
    ranges = cell_ranges(buckets, evaluator.cells_at_once)
    units = buckets * len(ranges)
    with ray_cluster(), progress("evaluate", units) as bar:
        evaluator.query_share = query_share(workspace, evaluator, buckets)
        with evaluator_files(workspace, folder, evaluator) as stored_files:
            arguments = {"workspace": workspace, "stored": stored_files, "ranges": ranges}
            for unit, unit_sums in run_buckets(BucketEvaluator, range(units), arguments=arguments):
                metric_sums.add(unit_sums, first_cell=unit * unit_sums.cells)
                bar.advance()
    return metric_sums


def query_share(workspace: Workspace, evaluator: Evaluator, buckets: int) -> float:
    """Return the share of the test range's queries to evaluate, so that about `config.queries` queries remain.

    Their total number is estimated from a few buckets. The share is 1 if `config.queries` is 0.
    """
    if not evaluator.config.queries:
        return 1.0
    sampled_buckets = np.unique(np.linspace(0, buckets - 1, min(buckets, COUNTED_BUCKETS)).astype(int)).tolist()
    arguments = {"workspace": workspace, "split": evaluator.split}
    query_count = sum(run_buckets(QueryCounter, sampled_buckets, arguments=arguments))
    return float(min(1.0, evaluator.config.queries / max(1.0, query_count * buckets / len(sampled_buckets))))


class QueryCounter:
    """Counts the plays to predict of one bucket at a time."""

    def __init__(self, workspace: Workspace, split: Split) -> None:
        self.dataset, self.split = Dataset(workspace), split

    def __call__(self, bucket: int) -> int:
        """Return the number of plays to predict of a bucket's users."""
        batches = self.dataset.read_bucket(int(bucket), USERS_PER_BATCH)
        return sum(len(plays_to_predict(histories, self.split)) for histories in batches)


class BucketEvaluator:
    """A bucket worker: evaluates the users of one bucket that are in one range of bootstrap cells."""

    def __init__(self, workspace: Workspace, stored: EvaluatorFiles[Evaluator], ranges: list[CellRange]) -> None:
        self.dataset, self.evaluator, self.ranges = Dataset(workspace), stored.load(), ranges

    def __call__(self, unit: int) -> tuple[int, MetricAccumulator]:
        """Return `unit` and the sums of its users. `unit` is the bucket times the number of ranges, plus the range."""
        bucket, range_index = divmod(int(unit), len(self.ranges))
        cells = self.ranges[range_index]
        metric_sums = self.evaluator.empty(cells.count)
        for histories in self.dataset.read_bucket(bucket, USERS_PER_BATCH):
            metric_sums.add(self.evaluator(histories, cells))
        return int(unit), metric_sums


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
    """Write reports/<id>/ about the models of `config` on the pairs of `file`: a prefix of songs, and its next song.

    The models are those made for `split`, or without a split those made from all plays; baselines are fitted on the
    same plays. The manifest's metrics hold default, protocol, the result of `summary`, pairs, unknown_targets (all of
    them count as misses), unknown_items and seconds. The results (users all, targets served and next), comparisons,
    calibration and the health of the song embeddings are in results.json; see `read_results`.

    Raises `InputError` for a file without pairs or with a line that cannot be read, and the errors of `evaluate`.
    """
    started = time.monotonic()
    if config.queries:
        raise InputError(
            "--queries samples the test range of a split, but all pairs of a file are evaluated; omit --queries"
        )
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    (prefix_file,) = find_files([file.path], ["*"])[:1]
    compared_models = choose_models(workspace, dataset, config, split, model_id)
    settings = {
        **to_mapping(config),
        "prefixes": {**to_mapping(file), "size": prefix_file.size, "changed": prefix_file.changed},
    }
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate prefixes", settings, compared_models.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    recommenders, song_plays = make_recommenders(workspace, dataset, compared_models, split)
    fit_end = fit_range(split).before
    start_time = dataset.manifest.last_play + 1 if fit_end is None else fit_end
    evaluator = PrefixEvaluator(
        recommenders,
        song_plays=song_plays,
        config=config,
        begin=start_time if dataset.manifest.times == "real" else 0,
    )
    units = byte_ranges(prefix_file.source, prefix_file.size, PREFIXES_AT_ONCE)
    metric_sums, counts = evaluate_pairs(workspace, evaluator, file, units, f"{artifact_dir(KIND, report_id)}/run")
    if not counts[0]:
        raise InputError(f"{file.path} has no pairs; expected lines with songs, a tab and the next song")
    metrics = Statistics(metric_sums, recommenders, config)
    result_rows = [entry for entry in metrics.results(["served", "next"]) if entry["users"] == "all"]
    results = {
        "settings": settings_of(recommenders),
        "results": [{name: value for name, value in entry.items() if name != "users_count"} for entry in result_rows],
        "comparisons": metrics.comparisons(compared_models.default),
        "calibration": metrics.calibration(),
        SONG_EMBEDDINGS: health_of(dataset, compared_models, song_plays),
    }
    pair_counts = dict(zip(("pairs", "unknown_targets", "unknown_items"), counts.tolist(), strict=True))
    return _publish_report(
        workspace,
        report_id,
        config,
        compared_models,
        results,
        settings=settings,
        protocol="prefixes",
        metrics={**pair_counts, "seconds": round(time.monotonic() - started, 1)},
        about={"file": file.path, **{name: f"{count:,}" for name, count in pair_counts.items()}},
        described=PREFIX_DESCRIPTION,
        drawn="pairs",
    )


def evaluate_pairs(
    workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit], folder: str
) -> tuple[MetricAccumulator, np.ndarray]:
    """Return the sums and the counts over all units, which are spread over the cluster.

    The counts, int64 (3,), are those of `Prefixes.counts`; `folder` is as in `evaluate_buckets`.
    """
    metric_sums, counts = evaluator.empty(), np.zeros(3, dtype=np.int64)
    ranges = cell_ranges(len(units), evaluator.cells_at_once)
    tasks = len(units) * len(ranges)
    with (
        ray_cluster(),
        progress("evaluate", tasks) as bar,
        evaluator_files(workspace, folder, evaluator) as stored_files,
    ):
        arguments = {
            "workspace": workspace,
            "stored": stored_files,
            "file": file,
            "units": list(units),
            "ranges": ranges,
        }
        for task, task_sums, task_counts in run_buckets(UnitEvaluator, range(tasks), arguments=arguments):
            metric_sums.add(task_sums, first_cell=task * task_sums.cells)
            counts += task_counts
            bar.advance()
    return metric_sums, counts


class UnitEvaluator:
    """Evaluates the pairs of one unit of the file that are in one range of bootstrap cells."""

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
        """Return `task`, and the sums and counts of the pairs that begin in its unit and are in its range of cells.

        `task` is the unit times the number of ranges, plus the range.
        """
        unit, range_index = divmod(int(task), len(self.ranges))
        cells = self.ranges[range_index]
        metric_sums, counts = self.evaluator.empty(cells.count), np.zeros(3, dtype=np.int64)
        for prefixes in read_prefixes(self.units[unit], self.file, self.song_ids):
            selected_prefixes = prefixes.take(np.flatnonzero(cells.holds(prefixes.histories.user_ids)))
            metric_sums.add(self.evaluator(selected_prefixes, cells))
            counts += selected_prefixes.counts
        return int(task), metric_sums, counts


TWO_STEP, TASTE, TASTE_SHORT = "two-step", "taste", "taste-short"
NETWORKS = (TWO_STEP, TASTE, TASTE_SHORT)  # the recommenders that are made from a models artifact


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """The models of an evaluation, all of one split."""

    names: tuple[str, ...]  # names of the models
    default: str  # the model that `recommend` uses
    model: Manifest | None  # the network behind NETWORKS; None if none of these is evaluated
    other_networks: dict[str, Manifest]  # other networks, given as NAME=ID: name -> network
    songs: Manifest | None  # the song embeddings of the baselines; None if no baseline needs them
    inputs: dict[str, str]  # role -> id of the artifacts

    @property
    def warning(self) -> str | None:
        """A line that names the parts trained on playlists, which a split cannot cut; None without such parts."""
        if "split" not in self.inputs:
            return None
        parts = {"the network": self.model, **self.other_networks, "the song embeddings": self.songs}
        uncut_parts = [name for name, part in parts.items() if part and part.metrics.get("source") == "playlists"]
        return f"{', '.join(uncut_parts)}: {PLAYLIST_WARNING}" if uncut_parts else None


def choose_models(
    workspace: Workspace, dataset: Dataset, config: EvaluateConfig, split: Split | None, model_id: str | None
) -> ComparedModels:
    """Return the models of `config` with the artifacts they need, made for `split` or, without a split, from all plays.

    `NAME=ID` in `config.models` is the network of models artifact `ID` under the name `NAME`. Raises `InputError` for
    an unknown model, `NotFoundError` if an artifact does not exist, `MismatchError` for an artifact of another split.
    """
    model_names, other_networks = _named_models(workspace, config)
    if split is not None:
        require_split_of(dataset, split)
    inputs, model, songs, default = {"dataset": dataset.manifest.id}, None, None, TWO_STEP
    if split is not None:
        inputs["split"] = split.id
    if config.models is None or set(NETWORKS) & set(model_names):
        model = load_manifest(workspace, "models", model_id) if model_id is not None else newest(workspace, "models")
        inputs["models"] = model.id
        parts = parts_of(workspace, model)
        default = TWO_STEP if "rankers" in parts else TASTE
        if TWO_STEP in model_names and default != TWO_STEP:
            raise InputError(
                f"model {model.id} has no rankers; run `rayrec retrieval` and `rayrec rank --model {model.id}` first"
            )
        inputs |= {kind: parts[kind] for kind in ("added_songs", "indexes", "retrieval", "rankers") if kind in parts}
    for network in (*([model] if model else []), *other_networks.values()):
        require_split(network, split, dataset, "train")
    inputs |= {f"models {name}": manifest.id for name, manifest in other_networks.items()}
    names = tuple(dict.fromkeys(model_names or (default, TASTE, *BASELINES)))
    first_network = next((part for part in (model, *other_networks.values()) if part is not None), None)
    songs_id = first_network.inputs.get("songs") if first_network else None
    if not model_names and songs_id is None:  # a network that was trained without song embeddings
        names = tuple(name for name in names if not needs_vectors([name]))
    if needs_vectors(names):
        songs = load_manifest(workspace, "songs", songs_id) if songs_id is not None else newest(workspace, "songs")
        require_split(songs, split, dataset, "embed")
        inputs["songs"] = songs.id
    return ComparedModels(
        names=names, default=default, model=model, other_networks=other_networks, songs=songs, inputs=inputs
    )


def _named_models(workspace: Workspace, config: EvaluateConfig) -> tuple[list[str], dict[str, Manifest]]:
    """Return the names of the models in `config`, and name -> artifact of those given as NAME=ID."""
    names: list[str] = []
    other_networks: dict[str, Manifest] = {}
    for entry in config.models or ():
        name, separator, model_id = entry.partition("=")
        if separator:
            if name in (*NETWORKS, *BASELINES, *other_networks) or not name:
                raise InputError(
                    f"{entry}: the name {name!r} is empty or already used; use another name, such as other={model_id}"
                )
            other_networks[name] = load_manifest(workspace, "models", model_id)
        elif name not in (*NETWORKS, *BASELINES):
            raise InputError(
                f"Unknown model {name!r}; expected {', '.join((*NETWORKS, *BASELINES))}, or NAME=ID for "
                "the network of another model"
            )
        names.append(name)
    return names, other_networks


def require_split(part: Manifest, split: Split | None, dataset: Dataset, command: str) -> None:
    """Raise `MismatchError` if `part` was not made for `split`, or without a split if it was not made from all plays.

    The part may be made from the data set, or from one that it descends from. The message suggests `command`.
    """
    part_split_id, split_id = part.inputs.get("split"), split.id if split else None
    if part_split_id == split_id and dataset.descends_from(part.inputs.get("dataset", dataset.manifest.id)):
        return
    training_text = (
        f"was trained on the plays before the test range of split {part_split_id}"
        if part_split_id
        else "was trained on all plays"
    )
    training_text += ", including the test range" if split_id and not part_split_id else ""
    advice = f"run `rayrec {command} --split {split_id}` first" if split_id else f"pass --split {part_split_id}"
    evaluation_text = f"split {split_id}" if split_id else "no split"
    raise MismatchError(
        f"{noun(part.kind)} {part.id} {training_text}, but the evaluation uses {evaluation_text}; {advice}"
    )


def make_recommenders(
    workspace: Workspace,
    dataset: Dataset,
    compared_models: ComparedModels,
    split: Split | None,
    ablation_folders: Mapping[str, str] | None = None,
) -> tuple[list[BaseRecommender], np.ndarray]:
    """Fit the baselines and load the networks; return the recommenders and int64 (N,), the plays of each song.

    The recommenders are in the order of the names, then the ablations. Baselines are fitted on the plays that final
    fits may see, which are also the plays counted. Their settings are chosen on the validation range, if the split has
    one. `ablation_folders` maps each part that two-step is evaluated without to the folder of its rankers.
    """
    vectors = np.asarray(workspace.read_array(compared_models.songs.path(FINAL))) if compared_models.songs else None
    allowed, selection = fit_range(split), None
    if split is not None and split.has_validation:
        songs = compared_models.songs
        selection_vectors = (
            np.asarray(workspace.read_array(songs.path(SELECTION))) if songs and SELECTION in songs.files else None
        )
        selection = make_selection(dataset, split, selection_vectors)
    recommenders: dict[str, BaseRecommender] = {}
    baselines = dict.fromkeys(["popularity", *(name for name in compared_models.names if name in BASELINES)])
    with progress("fit baselines", len(baselines)) as bar:
        for name in baselines:
            settings = {name: tune_baseline(name, selection)} if selection and name in BASELINE_CHOICES else {}
            recommenders[name] = fit_baselines([name], dataset, vectors, allowed, selection, settings)[0]
            bar.advance(note=name)
    recommenders |= _networks(workspace, dataset, compared_models)
    popularity = recommenders["popularity"]
    assert isinstance(popularity, PopularityRecommender)
    ablated_recommenders = [
        _ablated_recommender(workspace, recommenders[TWO_STEP], part, folder)
        for part, folder in (ablation_folders or {}).items()
    ]
    return [*(recommenders[name] for name in compared_models.names), *ablated_recommenders], popularity.plays


def _ablated_recommender(workspace: Workspace, two_step: BaseRecommender, part: str, folder: str) -> BaseRecommender:
    """Return two-step without `part`, with the rankers in `folder`, under the name `without PART`."""
    from rayrec.recommend.two_step import TwoStepRecommender, load_rankers

    assert isinstance(two_step, TwoStepRecommender)
    model = two_step.without_part(part, load_rankers(workspace, folder))
    model.name, model.without = f"without {part}", part
    return model


def rankers_of(workspace: Workspace, compared_models: ComparedModels) -> Manifest:
    """Return the rankers of two-step, for an ablation. Raises `InputError` if two-step is not among the models."""
    if TWO_STEP not in compared_models.names:
        raise InputError(
            f"--ablation evaluates {TWO_STEP} without each of its parts, but {TWO_STEP} is not among the models; run "
            "`rayrec retrieval` and `rayrec rank`, then add it to --models"
        )
    return load_manifest(workspace, "rankers", compared_models.inputs["rankers"])


def _networks(workspace: Workspace, dataset: Dataset, compared_models: ComparedModels) -> dict[str, BaseRecommender]:
    """Return name -> network of an evaluation, and two-step if the model has rankers.

    Two-step searches the index that was built of the model; if there is none, one is built here.
    """
    from rayrec.recommend.taste_recommender import TasteRecommender  # imports torch, so only when needed
    from rayrec.recommend.two_step import load_two_step

    networks: dict[str, BaseRecommender] = {}
    for name, model in compared_models.other_networks.items():
        added_id = parts_of(workspace, model).get("added_songs")
        networks[name] = TasteRecommender.load(workspace, model.id, added_id=added_id)
        networks[name].name = name
    if compared_models.model is None:
        return networks
    part_ids = compared_models.inputs
    network = TasteRecommender.load(workspace, part_ids["models"], part_ids.get("indexes"), part_ids.get("added_songs"))
    networks |= {TASTE: network, TASTE_SHORT: network.short_only()}
    if "rankers" in part_ids:
        network.index = network.index or index_network(dataset, network, IndexConfig())
        folders = (load_manifest(workspace, kind, part_ids[kind]).folder for kind in ("retrieval", "rankers"))
        real_times = dataset.manifest.times == "real"
        networks[TWO_STEP] = load_two_step(workspace, network, *folders, real_times=real_times)
    return networks
