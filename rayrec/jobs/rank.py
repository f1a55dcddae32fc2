"""The rank stage: trains rankers on the validation range, with a network and a retrieval that have not seen it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rayrec.config import to_mapping
from rayrec.data.dataset import Dataset
from rayrec.data.split import SELECTION_FOLDER, Split, holds_for, load_split, split_flag
from rayrec.display import progress
from rayrec.errors import MismatchError, TooFewQueriesError
from rayrec.jobs.add_songs import added_to
from rayrec.jobs.build_index import index_network
from rayrec.jobs.forget import erase_forgotten
from rayrec.jobs.planning.formulas import ranking_memory
from rayrec.jobs.runtime import node_cpus, ray_cluster, run_buckets, run_on_node
from rayrec.model.added_songs import AddedSongs
from rayrec.model.train_config import MODEL_CONFIG
from rayrec.recommend.index import INDEX_FILE, IndexConfig, IndexMetrics, SongIndex
from rayrec.recommend.ranker import FittedRanker, Ranker, RankerSettings, RankingExamples, fit_ranker, ndcg
from rayrec.recommend.stored_retrieval import Retrieval
from rayrec.recommend.taste_recommender import TasteRecommender
from rayrec.recommend.two_step import (
    KINDS,
    CandidateSource,
    RankerKind,
    collect_examples,
    pack_examples,
    unpack_examples,
    validation_queries,
)
from rayrec.recommend.two_step_config import ABLATED_PARTS, RankConfig
from rayrec.storage import artifacts
from rayrec.storage.artifacts import Manifest
from rayrec.storage.locking import writes
from rayrec.storage.workspace import Workspace

KIND = "rankers"
FEWEST_THREADS, MOST_THREADS = 2, 4  # threads that train one ranker: 40,000 queries do not keep more busy
NOTHING_LEFT_OUT = ""  # name of the left-out part if no part is left out


@writes("rank")
def fit_rankers(
    workspace: Workspace,
    config: RankConfig,
    *,
    model_id: str | None = None,
    retrieval_id: str | None = None,
    repeat: bool = False,
) -> Manifest:
    """Train the rankers of a model and a retrieval, by default those requested last; return the rankers artifact.

    The candidates and features for this come from the network that `train` chose before it learned from the validation
    range, and from the retrieval that was fitted before that range.
    In addition to the rankers, which learn from all queries of the range, the artifact holds under selection/ rankers
    that have not learned from the held-out users: on these users quality can be measured before a release.
    Metrics: seconds, queries, and for each ranker its form, the share of held-out queries whose right song is a
    candidate (for served, heard songs are not candidates), and its five most important features. Raises
    `MismatchError` if model and retrieval are of different data, `TooFewQueriesError`, an `InputError`, if the model
    has no validation range or the range has too few queries to learn from.
    """
    erase_forgotten(workspace)
    dataset = Dataset(workspace)
    model = (
        artifacts.load_manifest(workspace, "models", model_id)
        if model_id is not None
        else artifacts.newest(workspace, "models")
    )
    retrieval = (
        artifacts.load_manifest(workspace, "retrieval", retrieval_id)
        if retrieval_id is not None
        else artifacts.newest(workspace, "retrieval")
    )
    split = _split_of(workspace, dataset, model, retrieval)
    inputs = {"dataset": dataset.manifest.id, "split": split.id, "models": model.id, "retrieval": retrieval.id}
    added_songs = artifacts.latest(workspace, "added_songs", lambda manifest: manifest.inputs["models"] == model.id)
    # Added songs are not an input of the artifact, since rankers also rank songs that are added later.
    fingerprint_id = artifacts.fingerprint(
        "rank", to_mapping(config), inputs | ({"added_songs": added_songs.id} if added_songs is not None else {})
    )
    rankers_id, complete = artifacts.new_id(workspace, KIND, fingerprint_id, repeat=repeat)
    if complete:
        return artifacts.reuse(workspace, KIND, rankers_id)
    manifest = Manifest(kind=KIND, id=rankers_id, config=to_mapping(config), inputs=inputs, seed=config.seed)
    started = time.monotonic()
    input_folders = (model.path(SELECTION_FOLDER), retrieval.path(SELECTION_FOLDER))
    task = _Task(dataset, config, split, *input_folders, manifest.path("run"), has_added_songs=added_songs is not None)
    with ray_cluster():
        examples = _collect_examples(task)
        try:
            file_names, ranker_metrics = _train_rankers(task, {NOTHING_LEFT_OUT: manifest.folder}, examples)[
                NOTHING_LEFT_OUT
            ]
        except TooFewQueriesError:
            workspace.delete(manifest.folder)
            raise
    workspace.delete(task.run_folder)
    metrics = {**ranker_metrics, "queries": examples.queries, "seconds": round(time.monotonic() - started, 1)}
    return artifacts.publish(workspace, replace(manifest, metrics=metrics), file_names)


def fit_ablations(dataset: Dataset, rankers: Manifest, folder: str) -> dict[str, str]:
    """Train the rankers of an artifact again without each of ABLATED_PARTS; return part -> folder of its rankers.

    Settings, network and retrieval are the same. The folders are below `folder`, which the caller deletes. The part
    artists is skipped if the catalog has neither artists nor albums. Needs a running cluster.
    """
    workspace = dataset.workspace
    model, retrieval = (
        artifacts.load_manifest(workspace, kind, rankers.inputs[kind]) for kind in ("models", "retrieval")
    )
    split = _split_of(workspace, dataset, model, retrieval)
    has_artists_or_albums = retrieval.metrics["artists"] or retrieval.metrics["albums"]
    parts = tuple(part for part in ABLATED_PARTS if part != "artists" or has_artists_or_albums)
    config = RankConfig(**rankers.config)
    has_added_songs = (
        artifacts.latest(workspace, "added_songs", lambda manifest: manifest.inputs["models"] == model.id) is not None
    )
    input_folders = (model.path(SELECTION_FOLDER), retrieval.path(SELECTION_FOLDER))
    task = _Task(dataset, config, split, *input_folders, f"{folder}/run", parts, has_added_songs)
    folders = {part: f"{folder}/{part}" for part in parts}
    _train_rankers(task, folders, _collect_examples(task))
    workspace.delete(task.run_folder)
    return folders


@dataclass(frozen=True)
class _Examples:
    """The collected training examples."""

    queries: int
    buckets: list[int]  # buckets that have examples
    features: dict[str, list[str]]  # left-out part -> names of the features


def _collect_examples(task: _Task) -> _Examples:
    """Collect the examples of all buckets."""
    if task.has_added_songs:
        songs = added_to(task.dataset, task.network_folder)
        # Without held-out songs: they are never right here, so rankers would learn that no new song is right.
        songs = songs.take(task.split.final.allowed_songs(songs.rows))
        songs.save(task.dataset.workspace, f"{task.run_folder}/added_songs")
    cpus = node_cpus()
    features, *_ = run_on_node(_build_index, task, cpus, cpus=cpus)
    buckets = range(task.dataset.manifest.buckets)
    query_counts: dict[int, int] = {}
    with progress("Ranking examples", len(buckets)) as bar:
        for bucket, count in run_buckets(ExampleCollector, buckets, arguments={"task": task}):
            query_counts[bucket] = count
            bar.advance()
    return _Examples(
        sum(query_counts.values()), sorted(bucket for bucket in query_counts if query_counts[bucket]), features
    )


def _train_rankers(
    task: _Task, folders: dict[str, str], examples: _Examples
) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Train the rankers of all kinds for each of `folders`, in parallel; return part -> names of files, and figures.

    `folders` maps each left-out part to the folder of its rankers.
    """
    units = [RankerUnit(left_out_part, folder, kind) for kind in KINDS for left_out_part, folder in folders.items()]
    cpus = node_cpus()
    threads = min(cpus, MOST_THREADS, max(FEWEST_THREADS, cpus // len(units)))
    model_shape = task.dataset.workspace.read_json(f"{task.network_folder}/{MODEL_CONFIG}")
    memory = ranking_memory(model_shape["num_songs"], model_shape["embedding_dim"], examples.queries)
    file_names: dict[str, list[str]] = {left_out_part: [] for left_out_part in folders}
    metrics: dict[str, dict[str, Any]] = {left_out_part: {} for left_out_part in folders}
    arguments = {"task": task, "examples": examples}
    with progress("Rankers", len(units)) as bar:
        results = run_buckets(
            RankerTrainer,
            units,
            arguments=arguments | {"threads": threads},
            cpus=threads,
            memory=memory,
            called="ranker",
        )
        for unit, ranker_files, ranker_metrics in results:
            file_names[unit.left_out] += ranker_files
            metrics[unit.left_out] |= {unit.kind: ranker_metrics} if ranker_metrics else {}
            bar.advance(note=unit.kind)
        served_units = [unit for unit in units if unit.kind == "served" and "served" in metrics[unit.left_out]]
        for unit, is_better in run_buckets(
            RankerComparison, served_units, arguments=arguments, memory=memory, called="ranker"
        ):
            if not is_better:  # the ranker of all next plays orders new songs at least as well
                del metrics[unit.left_out]["served"]
                served_files = [
                    name for name in file_names[unit.left_out] if name.rpartition("/")[2].startswith("served.")
                ]
                file_names[unit.left_out] = [name for name in file_names[unit.left_out] if name not in served_files]
                for name in served_files:
                    task.dataset.workspace.delete(f"{unit.folder}/{name}")
    ordered_metrics: dict[str, dict[str, Any]] = {
        left_out_part: {kind: ranker_metrics[kind] for kind in KINDS if kind in ranker_metrics}
        for left_out_part, ranker_metrics in metrics.items()
    }
    return {
        left_out_part: (sorted(file_names[left_out_part]), ordered_metrics[left_out_part]) for left_out_part in folders
    }


FIT_COMMANDS = {"models": "`rayrec embed` and `rayrec train`", "retrieval": "`rayrec retrieval`"}  # kind -> commands


def _split_of(workspace: Workspace, dataset: Dataset, model: Manifest, retrieval: Manifest) -> Split:
    for manifest in (model, retrieval):
        if not dataset.descends_from(manifest.inputs["dataset"]):
            raise MismatchError(
                f"{artifacts.noun(manifest.kind)} {manifest.id} was made from data set {manifest.inputs['dataset']}, "
                f"but the workspace has {dataset.manifest.id}; run {FIT_COMMANDS[manifest.kind]} first"
            )
    split = load_split(workspace, model.inputs["split"]) if "split" in model.inputs else None
    if split is None or not workspace.exists(f"{model.path(SELECTION_FOLDER)}/model.safetensors"):
        if split is not None and "from" in model.inputs:
            start_id = model.inputs["from"]
            raise TooFewQueriesError(
                f"model {model.id} continues model {start_id} and has no network trained without "
                f"{split.validation_range}; make a split whose validation range has only plays that model {start_id} "
                "was not trained on, and train again with --from, or train without --from"
            )
        raise TooFewQueriesError(
            f"model {model.id} has no validation range to train a ranker on; "
            "run `rayrec split`, `rayrec embed` and `rayrec train` first"
        )
    if not holds_for(dataset, split):
        raise MismatchError(
            f"model {model.id} was trained on split {split.id} of data set {split.dataset}, which is not valid for the "
            f"appended data set {dataset.manifest.id}; run `rayrec split`, `rayrec embed` and `rayrec train` first"
        )
    if split.id != retrieval.inputs.get("split"):
        raise MismatchError(
            f"model {model.id} was trained on split {split.id}, retrieval {retrieval.id} on "
            f"{retrieval.inputs.get('split')}; run `rayrec retrieval{split_flag(split.id)}` first"
        )
    return split


@dataclass(frozen=True)
class _Task:
    """The data that all workers of one fit share."""

    dataset: Dataset
    config: RankConfig
    split: Split
    network_folder: str  # folder of the network that has not seen the validation range
    retrieval_folder: str  # folder of the retrieval that has not seen it either
    run_folder: str  # folder of the intermediate files
    left_out: tuple[str, ...] = (NOTHING_LEFT_OUT,)  # parts to leave out, one at a time
    has_added_songs: bool = False  # True if songs were added to the network; they are stored in `run_folder`

    def examples_path(self, bucket: int, left_out_part: str, kind: RankerKind) -> str:
        """Return the path of the examples of one bucket and kind of ranker, collected without `left_out_part`."""
        return f"{self.run_folder}/bucket={bucket:05d}/{left_out_part or 'all'}.{kind}.safetensors"

    def read_examples(self, buckets: Sequence[int], left_out_part: str, kind: RankerKind) -> RankingExamples:
        """Return the joined examples of `buckets`. Raises `TooFewQueriesError` if there are no buckets."""
        if not buckets:
            raise TooFewQueriesError(
                "the validation range has no play that a ranker can learn from; run `rayrec split` with more "
                "--validation-days"
            )
        workspace = self.dataset.workspace
        packed_examples = (workspace.read_bytes(self.examples_path(bucket, left_out_part, kind)) for bucket in buckets)
        return RankingExamples.concatenate([unpack_examples(packed) for packed in packed_examples])

    @property
    def index_path(self) -> str:
        """The path of the index of the network's songs, which all workers read."""
        return f"{self.run_folder}/{INDEX_FILE}"

    def network_and_songs(self) -> TasteRecommender:
        """Return the network that has not seen the validation range, with the added songs, without an index."""
        workspace = self.dataset.workspace
        network = TasteRecommender.from_folder(workspace, self.network_folder)
        if self.has_added_songs:
            network.add_songs(AddedSongs.load(workspace, f"{self.run_folder}/added_songs"))
        return network

    def sources(self) -> dict[str, CandidateSource]:
        """Return left-out part -> retrievers and features that have not seen the validation range."""
        workspace, network = self.dataset.workspace, self.network_and_songs()
        index_metrics = IndexMetrics(**workspace.read_json(f"{self.index_path}.json"))
        network.index = SongIndex.read(workspace, self.index_path, index_metrics, network.song_vectors)
        retrieval = Retrieval.load(workspace, self.retrieval_folder)
        real_times = self.dataset.manifest.times == "real"
        return {
            left_out_part: CandidateSource(network, retrieval, real_times=real_times, without=left_out_part)
            for left_out_part in self.left_out
        }


def _build_index(task: _Task, threads: int) -> Iterator[dict[str, list[str]]]:
    """Write the index that all workers read; yield left-out part -> names of the features.

    With a shared index no worker needs the memory and time to build its own.
    """
    index = index_network(task.dataset, task.network_and_songs(), IndexConfig(), threads=threads)
    index.save(task.dataset.workspace, task.index_path)
    task.dataset.workspace.write_json(f"{task.index_path}.json", asdict(index.figures))
    yield {left_out_part: source.sources.names for left_out_part, source in task.sources().items()}


class ExampleCollector:
    """A bucket worker: collects the examples of one bucket."""

    def __init__(self, task: _Task) -> None:
        self._task, self._sources = task, task.sources()
        self._queries_per_bucket = -(-task.config.queries // task.dataset.manifest.buckets)

    def __call__(self, bucket: int) -> tuple[int, int]:
        """Write the examples of a bucket; return its number and the number of queries."""
        task = self._task
        histories, plays = validation_queries(task.dataset.read_bucket(bucket), task.split, self._queries_per_bucket)
        examples = collect_examples(self._sources, histories, plays) if len(plays) else {}
        for left_out_part, examples_by_kind in examples.items():
            for kind, kind_examples in examples_by_kind.items():
                task.dataset.workspace.write_bytes(
                    task.examples_path(bucket, left_out_part, kind), pack_examples(kind_examples)
                )
        return bucket, len(plays)


@dataclass(frozen=True, order=True)
class RankerUnit:
    """One ranker to train; sorted and shown as text if its worker is lost."""

    left_out: str  # left-out part
    folder: str  # folder that the ranker is written to
    kind: RankerKind

    def __str__(self) -> str:
        return f"{self.kind} without {self.left_out}" if self.left_out else self.kind

    @property
    def checked_folder(self) -> str:
        """The folder of the ranker that has not learned from the held-out queries."""
        return f"{self.folder}/{SELECTION_FOLDER}"


class RankerTrainer:
    """Trains rankers, one at a time."""

    def __init__(self, task: _Task, examples: _Examples, threads: int) -> None:
        self._task, self._examples, self._threads = task, examples, threads

    def __call__(self, unit: RankerUnit) -> tuple[RankerUnit, list[str], dict[str, Any]]:
        """Train and write a ranker; return `unit`, file names and figures, both empty if it has too few queries."""
        task = self._task
        examples = task.read_examples(self._examples.buckets, unit.left_out, unit.kind)
        fitted_ranker = _train_ranker(
            unit.kind, examples, self._examples.features[unit.left_out], task.config, self._threads
        )
        if fitted_ranker is None:
            return unit, [], {}
        workspace, ranker = task.dataset.workspace, fitted_ranker.ranker
        checked_files = fitted_ranker.checked.save(workspace, unit.checked_folder, unit.kind)
        is_found = examples.has_right_candidate[examples.held_out]
        return (
            unit,
            [
                *ranker.save(workspace, unit.folder, unit.kind),
                *(f"{SELECTION_FOLDER}/{name}" for name in checked_files),
            ],
            {
                "form": ranker.form,
                "candidates_hold_the_answer": round(float(is_found.mean()), 4),
                "first_features": list(ranker.importance)[:5],
            },
        )


class RankerComparison:
    """Compares the ranker for songs new to the user with the ranker for all next plays."""

    def __init__(self, task: _Task, examples: _Examples) -> None:
        self._task, self._buckets = task, examples.buckets

    def __call__(self, unit: RankerUnit) -> tuple[RankerUnit, bool]:
        """Return `unit`, and True if its ranker has the higher NDCG@20 on the held-out queries of its kind."""
        workspace = self._task.dataset.workspace
        examples = self._task.read_examples(self._buckets, unit.left_out, unit.kind)
        checked_examples = examples.take(examples.held_out & examples.has_right_candidate)
        unit_ndcg, next_ndcg = (
            ndcg(
                checked_examples.rows,
                Ranker.load(workspace, unit.checked_folder, kind).scores(checked_examples.features),
                checked_examples.right,
            )
            for kind in (unit.kind, "next")
        )
        return unit, unit_ndcg > next_ndcg


def _train_ranker(
    kind: RankerKind, examples: RankingExamples, features: list[str], config: RankConfig, threads: int
) -> FittedRanker | None:
    """Train a ranker; return None if the kind is served or long and has too few queries.

    A validation range may reach too few plays ahead for the long horizon, or hold only songs that its users had heard.
    """
    checked_queries = int((examples.held_out & examples.has_right_candidate).sum())
    min_queries = {"next": 0, "served": 1, "long": config.min_long_queries}[kind]
    if min(checked_queries, int(examples.has_right_candidate.sum()) - checked_queries) < min_queries:
        return None
    settings = RankerSettings(
        trees=config.trees,
        leaves=config.leaves,
        learning_rate=config.learning_rate,
        seed=config.seed,
        threads=threads,
    )
    if kind == "long":  # successive queries share nearly all songs 25 to 50 plays ahead
        settings = settings.overlapping()
    return fit_ranker(examples, features, settings)
