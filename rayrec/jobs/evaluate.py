"""Evaluate networks and baselines: on the test range by bucket of users, on given prefixes by piece of their file."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rayrec.config import to_mapping
from rayrec.data import columns
from rayrec.data.dataset import Dataset
from rayrec.data.split import Split
from rayrec.embeddings.vectors import FINAL, SongVectors, check_health, directions
from rayrec.errors import InputError
from rayrec.evaluation.accumulator import VIEWS, MetricAccumulator
from rayrec.evaluation.bootstrap import CellRange, cell_ranges
from rayrec.evaluation.evaluator import Evaluator
from rayrec.evaluation.plots import NAMED, Plot, cosine_plot, most_played, song_map, training_plot
from rayrec.evaluation.prefixes import PrefixEvaluator, PrefixFile, read_prefixes
from rayrec.evaluation.protocol import COUNTED_BUCKETS, EvaluateConfig, plays_to_predict
from rayrec.evaluation.report import CURVES, SONG_EMBEDDINGS, headline, write_report
from rayrec.evaluation.results import Figures, figures_of, settings_of
from rayrec.importing.readers.files import byte_ranges, find_files
from rayrec.importing.readers.reader import Unit
from rayrec.jobs.compared_models import ComparedModels, choose_models, make_recommenders, rankers_of
from rayrec.jobs.rank import fit_ablations
from rayrec.jobs.runtime import ray_cluster, run_buckets
from rayrec.model.checkpoint import EPOCHS
from rayrec.progress import progress
from rayrec.storage.artifacts import Manifest, fingerprint, new_id, publish, reuse
from rayrec.storage.locking import writes
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
    split: Split,
    model_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Write reports/<id>/ about the models of `config` on the test range of `split`.

    Without names these are the network `model_id` (None: the one trained last) and every baseline. Baselines are
    fitted on what came before the test range, with the song embeddings that the network was trained from, and tuned
    on the validation range. With `config.ablation` the default model is evaluated without each of its parts as well,
    by rankers that are trained for it. The manifest's metrics hold default, protocol, its headline, users, plays and
    seconds; the figures of `figures_of`, examples and the health of the song embeddings are in results.json, see
    `read_figures`.

    Raises `InputError` for an unknown model, for an ablation without two-step among the models, and for a test range
    without queries, `NotFoundError` where there is no network or no song embeddings, `MismatchError` for those of
    another split.
    """
    started = time.monotonic()
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
        sums = evaluate_buckets(workspace, evaluator, dataset.manifest.buckets)
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
            **headline(figures, compared.default),
            "users": int(users),
            "plays": int(plays),
            "seconds": round(time.monotonic() - started, 1),
        },
    )
    about = {"protocol": split.protocol, "test range": split.test_range, **compared.inputs}
    about |= {"warning": compared.warning} if compared.warning else {}
    plots = [*filter(None, [cosine_plot(figures[CURVES])]), *plots_of(dataset, compared, evaluator.song_plays)]
    names = write_report(workspace, manifest.folder, figures, default=compared.default, about=about, plots=plots)
    return publish(workspace, manifest, names)


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
            seen = play - histories.offsets[row]
            if seen < EXAMPLE_PLAYS:
                continue
            history = histories.take(np.array([row])).span(0, seen)
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


def evaluate_buckets(workspace: Workspace, evaluator: Evaluator, buckets: int) -> MetricAccumulator:
    """The sums of all users, the buckets spread over the cluster, the evaluator shared by all workers of a node."""
    sums = evaluator.empty()
    ranges = cell_ranges(buckets, evaluator.cells_at_once)
    units = buckets * len(ranges)
    with ray_cluster(), progress("evaluate", units) as bar:
        evaluator.query_share = query_share(workspace, evaluator, buckets)
        arguments = {"workspace": workspace, "evaluator": evaluator, "ranges": ranges}
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

    def __init__(self, workspace: Workspace, evaluator: Evaluator, ranges: list[CellRange]) -> None:
        self.dataset, self.evaluator, self.ranges = Dataset(workspace), evaluator, ranges

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
    fitted likewise. The manifest's metrics hold default, its headline, pairs, unknown_targets (misses, all
    of them), unknown_items and seconds; results (users all, targets served and next), comparisons and the health of
    the song vectors are in results.json, see `read_figures`.

    Raises `InputError` for a file without pairs or with a line that cannot be read, else as `evaluate`.
    """
    started = time.monotonic()
    if config.queries:
        raise InputError("--queries draws from the test range of a split; the pairs of a file are all evaluated")
    dataset = Dataset(workspace)
    (found,) = find_files([file.path], ["*"])[:1]
    compared = choose_models(workspace, dataset, config, split, model_id)
    settings = {**to_mapping(config), "prefixes": {**asdict(file), "size": found.size, "changed": found.changed}}
    report_id, complete = new_id(
        workspace, KIND, fingerprint("evaluate prefixes", settings, compared.inputs), repeat=repeat
    )
    if complete:
        return reuse(workspace, KIND, report_id)
    recommenders, song_plays = make_recommenders(workspace, dataset, compared, split)
    evaluator = PrefixEvaluator(recommenders, song_plays=song_plays, config=config)
    sums, counts = evaluate_pairs(workspace, evaluator, file, byte_ranges(found.source, found.size, PREFIXES_AT_ONCE))
    if not counts[0]:
        raise InputError(f"{file.path} has no pairs; expected lines of songs, a tab and the next song")
    made = Figures(sums, recommenders, config)
    results = [entry for entry in made.results(["served", "next"]) if entry["users"] == "all"]
    figures = {
        "settings": settings_of(recommenders),
        "results": [{name: value for name, value in entry.items() if name != "users_count"} for entry in results],
        "comparisons": made.comparisons(compared.default),
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
            **headline(figures, compared.default),
            **pairs,
            "seconds": seconds,
        },
    )
    about = {"protocol": "prefixes", "file": file.path, **{name: f"{count:,}" for name, count in pairs.items()}}
    about |= compared.inputs
    names = write_report(
        workspace, manifest.folder, figures, default=compared.default, about=about, described=ABOUT_PREFIXES
    )
    return publish(workspace, manifest, names)


def evaluate_pairs(
    workspace: Workspace, evaluator: PrefixEvaluator, file: PrefixFile, units: Sequence[Unit]
) -> tuple[MetricAccumulator, np.ndarray]:
    """The sums and the counts, as in `Prefixes`, of all units, spread over the cluster."""
    sums, counts = evaluator.empty(), np.zeros(3, dtype=np.int64)
    ranges = cell_ranges(len(units), evaluator.cells_at_once)
    tasks = len(units) * len(ranges)
    with ray_cluster(), progress("evaluate", tasks) as bar:
        arguments = {"workspace": workspace, "evaluator": evaluator, "file": file, "units": list(units)}
        for task, part, pairs in run_buckets(UnitEvaluator, range(tasks), arguments={**arguments, "ranges": ranges}):
            sums.add(part, first_cell=task * part.cells)
            counts += pairs
            bar.advance()
    return sums, counts


class UnitEvaluator:
    """Evaluates the pairs of some bootstrap cells of one unit of the file at a time."""

    def __init__(
        self,
        workspace: Workspace,
        evaluator: PrefixEvaluator,
        file: PrefixFile,
        units: Sequence[Unit],
        ranges: list[CellRange],
    ) -> None:
        self.evaluator, self.file, self.units, self.ranges = evaluator, file, units, ranges
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
